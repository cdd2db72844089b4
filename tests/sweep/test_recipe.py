"""Recipes: what is read, what is refused and how, and that the shipped ones name flags that exist."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kdcache.data import open_split
from kdcache.errors import RecipeError
from kdcache.models import build_model
from kdcache.sweep import list_recipes, read_recipe

TEXT = """
title = "T"
seeds = [0, 3]
[data]
path = "scenes"
[teacher]
model = "kdcache:base"
[student]
model = "kdcache:tiny"
lr = [1e-3, 2e-3]
[[arm]]
name = "plain {lr}"
method = "none"
[[arm]]
name = "kl"
lr = 4e-3
kl-weight = [0.5, 1]
temperature = [1.0, 4.0]
term = [{ kind = "cosine", weight = 0.1 }]
[smoke]
seeds = [7]
[smoke.student]
lr = 0.1
[smoke.teacher]
iterations = 2
"""


def replace_in(path: Path, old: str, new: str) -> None:
    """Replace a part of a recipe that stands in it."""
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new, 1), encoding="utf-8")


def fix_of(recipe: str, **options: bool) -> str:
    """The fix with which a recipe is refused."""
    with pytest.raises(RecipeError) as caught:
        read_recipe(recipe, **options)
    return caught.value.fix


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    path = tmp_path / "mine.toml"
    path.write_text(TEXT, encoding="utf-8")
    return str(path)


def test_lists_are_choices_and_every_combination_is_an_arm(recipe: str) -> None:
    arms = read_recipe(recipe).arms
    assert [arm.name for arm in arms] == [
        "plain 0.001",
        "plain 0.002",
        "kl, kl-weight 0.5, temperature 1.0",
        "kl, kl-weight 0.5, temperature 4.0",
        "kl, kl-weight 1, temperature 1.0",
        "kl, kl-weight 1, temperature 4.0",
    ]
    assert arms[1].flags == {"method": "none", "lr": 2e-3}
    assert arms[5].flags["term"] == [{"kind": "cosine", "weight": 0.1}]
    assert (arms[5].flags["kl-weight"], arms[5].flags["lr"]) == (1, 4e-3)


def test_smoke_replaces_keys_and_the_teacher_as_a_whole(recipe: str) -> None:
    small = read_recipe(recipe, smoke=True)
    assert (small.seeds, small.student["lr"], small.student["model"]) == ((7,), 0.1, "kdcache:tiny")
    assert small.teacher == {"iterations": 2}
    assert small.arms[0].name == "plain 0.1"


def test_changes_are_values_of_toml_or_words(recipe: str) -> None:
    changed = read_recipe(
        recipe, changes=["student.iterations=5", "teacher.model=kdcache:tiny", "student.lr=[0.5, 0.25]", "seeds=[1]"]
    )
    assert changed.student["iterations"] == 5
    assert changed.teacher["model"] == "kdcache:tiny"
    assert [arm.name for arm in changed.arms][:2] == ["plain 0.5", "plain 0.25"]
    assert changed.seeds == (1,)


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ('title = "T"', "titel = 1", "title"),
        ("[data]\npath", "[data]\npaht", "path"),
        ("[smoke.student]", "[smoke.studnet]", "student"),
        ("seeds = [0, 3]", "seeds = 3", "seeds = [0, 1, 2]"),
        ("seeds = [0, 3]", "seeds = [-1]", "seeds = [0, 1, 2]"),
        ('name = "kl"', 'nam = "kl"', "name = ..."),
        ('name = "plain {lr}"', 'name = "kl"\nlr = 1', "{kl-weight}"),
        ("[teacher]", "[teacher", "Correct that line"),
    ],
)
def test_what_is_wrong_is_named_with_its_remedy(recipe: str, old: str, new: str, named: str) -> None:
    if new.startswith('name = "kl"'):
        replace_in(Path(recipe), "kl-weight = [0.5, 1]\ntemperature = [1.0, 4.0]\n", "")
    replace_in(Path(recipe), old, new)
    assert named in fix_of(recipe)


@pytest.mark.parametrize("change", ["iterations=5", "student", "studnet.lr=1", "student.=1"])
def test_changes_that_are_none_are_refused(recipe: str, change: str) -> None:
    with pytest.raises(RecipeError):
        read_recipe(recipe, changes=[change])


def test_an_unknown_recipe_is_answered_with_the_nearest() -> None:
    with pytest.raises(RecipeError, match="voc-compare"):
        read_recipe("voc-compar")


def test_a_recipe_without_a_small_form_says_so(recipe: str) -> None:
    path = Path(recipe)
    path.write_text(path.read_text(encoding="utf-8").partition("[smoke]")[0], encoding="utf-8")
    with pytest.raises(RecipeError, match="smoke"):
        read_recipe(recipe, smoke=True)


def test_the_shipped_recipes_are_read_whole_and_small() -> None:
    names = list_recipes()
    assert {"camvid-segformer", "camvid-segformer-cure", "voc-compare", "voc-deeplab-mobilenet"} <= set(names)
    assert "safetrip-hydranet" in names
    for name, title in names.items():
        for smoke in (False, True):
            read = read_recipe(name, smoke=smoke)
            assert read.title == ("Smoke run: " if smoke else "") + title
            assert len(read.arms) > 1


def test_small_arms_replace_keys_of_the_arm_of_their_name(recipe: str) -> None:
    path = Path(recipe)
    path.write_text(TEXT + '[[smoke.arm]]\nname = "kl"\ntemperature = 2.0\nterm = []\n', encoding="utf-8")
    small = read_recipe(recipe, smoke=True)
    assert [arm.name for arm in small.arms] == ["plain 0.1", "kl, kl-weight 0.5", "kl, kl-weight 1"]
    assert small.arms[1].flags == {"lr": 4e-3, "temperature": 2.0, "term": [], "kl-weight": 0.5}
    assert [arm.flags.get("temperature") for arm in read_recipe(recipe).arms][2:] == [1.0, 4.0] * 2
    path.write_text(TEXT + '[[smoke.arm]]\nname = "lk"\n', encoding="utf-8")
    with pytest.raises(RecipeError, match="kl"):
        read_recipe(recipe, smoke=True)
    path.write_text(TEXT + "[[smoke.arm]]\ntemperature = 2.0\n", encoding="utf-8")
    with pytest.raises(RecipeError, match="name"):
        read_recipe(recipe, smoke=True)


@pytest.mark.parametrize("name", list_recipes())
def test_small_recipes_train_long_enough_to_show_something(name: str) -> None:
    """Two hundred steps of the small networks, on scenes: pictures of a network that has learnt. Of many rows 40."""
    small = read_recipe(name, smoke=True)
    data = [str(table["data"]) for table in small.stream] or [small.data["path"]]
    samples = len(open_split(data[0], "train"))
    steps = small.student.get("iterations") or small.student["epochs"] * samples // small.student["batch-size"]
    assert small.teacher["iterations"] == 200
    assert steps == (40 if name == "gta5-cityscapes" else 200)
    assert small.student["model"] in ("kdcache:tiny", "kdcache:hydra")
    assert small.teacher["model"] == "kdcache:base"
    assert small.smoke


@pytest.mark.parametrize("name", list_recipes())
def test_taps_that_recipes_name_are_taps_of_their_models(name: str) -> None:
    """`--smoke` has other networks, so nothing else opens those of the recipe."""
    for smoke in (False, True):
        read = read_recipe(name, smoke=smoke)
        teacher = read.teacher.get("model") or read.teacher["spec"].partition("@")[0]
        taps = {}
        for spec in {teacher, read.student["model"]}:
            with torch.device("meta"):
                taps[spec] = set(build_model(spec, 3).taps)
        assert set(read.store.get("features", "").split(",")) <= taps[teacher] | {""}
        for arm in read.arms:
            for term in arm.flags.get("term", []):
                assert term["teacher_tap"] in read.store["features"].split(",")
                assert term["student_tap"] in taps[read.student["model"]]


STREAMS = """
[teacher]
model = "kdcache:base"
stream = ["city"]
[teachers.second]
seed = 1
[stores.mirrored]
tta = "flip"
[[stream]]
name = "city"
class-map = "city.txt"
[[stream]]
name = "far"
cache = "@store"
share = 0.5
term = [{ kind = "pseudo", threshold = 0.7 }]
[student]
model = "kdcache:hydra"
[[arm]]
name = "as it is"
[[arm]]
name = "share {far.share}"
lr = [1e-3, 2e-3]
stream.far.share = [0.25, 0.75]
[[arm]]
name = "alone"
stream.city = false
stream.far.term = []
[[arm]]
name = "own"
stream = [{ name = "other", data = "DIR" }]
[smoke.student]
iterations = 3
[[smoke.stream]]
name = "far"
data = "scenes"
"""


@pytest.fixture
def streams(tmp_path: Path) -> Path:
    path = tmp_path / "streams.toml"
    path.write_text(STREAMS, encoding="utf-8")
    return path


def test_arms_change_streams_by_name_and_their_lists_are_choices(streams: Path) -> None:
    read = read_recipe(str(streams))
    city, far = (
        {"name": "city", "class_map": "city.txt"},
        {"name": "far", "cache": "@store", "share": 0.5, "term": [{"kind": "pseudo", "threshold": 0.7}]},
    )
    assert {arm.name: (arm.flags.get("lr"), arm.flags["stream"]) for arm in read.arms} == {
        "as it is": (None, [city, far]),
        "share 0.25, lr 0.001": (1e-3, [city, far | {"share": 0.25}]),
        "share 0.75, lr 0.001": (1e-3, [city, far | {"share": 0.75}]),
        "share 0.25, lr 0.002": (2e-3, [city, far | {"share": 0.25}]),
        "share 0.75, lr 0.002": (2e-3, [city, far | {"share": 0.75}]),
        "alone": (None, [far | {"term": []}]),
        "own": (None, [{"name": "other", "data": "DIR"}]),
    }
    small = read_recipe(str(streams), smoke=True, changes=["stream.far.share=0.75", "teachers.second.lr=0.1"])
    assert small.arms[0].flags["stream"] == [city, far | {"data": "scenes", "share": 0.75}]
    assert small.teachers == {"second": {"seed": 1, "lr": 0.1}}


def test_names_of_streams_may_hold_dots(streams: Path) -> None:
    streams.write_text(
        STREAMS.replace("stream.far.", 'stream."fda-0.05".').replace('name = "far"', 'name = "fda-0.05"'),
        encoding="utf-8",
    )
    alone = read_recipe(str(streams)).arm("alone")
    assert [(table["name"], table["term"]) for table in alone.flags["stream"]] == [("fda-0.05", [])]


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("stream.far.share =", "stream.fr.share =", "Did you mean far"),
        ("stream.city = false", "stream.city = 3", "stream.NAME = false"),
        ('stream = ["city"]', 'stream = ["cty"]', "Did you mean city"),
        ("share = 0.5", "shar = 0.5", "Did you mean share"),
        ('[[stream]]\nname = "city"', "[[stream]]", "name = ..."),
        ("[teachers.second]", "[teachers.teacher]", "another"),
        ('[stores.mirrored]\ntta = "flip"', "[stores]\nmirrored = 1", "another"),
        ('[[smoke.stream]]\nname = "far"', '[[smoke.stream]]\nname = "fra"', "Did you mean far"),
    ],
)
def test_streams_that_are_wrong_are_named_with_their_fix(streams: Path, old: str, new: str, named: str) -> None:
    replace_in(streams, old, new)
    assert named in fix_of(str(streams), smoke=True)
