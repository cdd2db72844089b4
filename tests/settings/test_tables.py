"""Tables of settings: how they are read, and what verbs, recipes and models make of them."""

from __future__ import annotations

from dataclasses import MISSING, dataclass
from typing import Annotated, Any, Literal

import pytest
import typer
from annotated_types import Ge, Le
from typer.testing import CliRunner

from kdcache.errors import RecipeError
from kdcache.settings import entries, names, read, read_values, setting
from kdcache.settings.building import BUILD, BuildSettings
from kdcache.settings.parse import Size, TopK, Words, lr_scales, parse_bytes, parse_views, task_weights
from kdcache.settings.setting import REQUIRED
from kdcache.settings.training import TRAINING, Loss
from kdcache.teacher import BuildOptions
from kdcache.training import make_config
from kdcache_cli.app import app
from kdcache_cli.settings.signature import takes


@dataclass(frozen=True, kw_only=True)
class Bread:
    secret: str = "no flag"
    flour: Literal["rye", "wheat"] = setting(REQUIRED, "Of what.")
    loaves: Annotated[int, Ge(1), Le(9)] = setting(2, "How many.", panel="Oven", ranged=True)
    tin: Size | None = setting(None, "How large.", panel="Oven")
    seeds: Words = setting(("poppy",), "What is on it.")
    slices: TopK | None = setting(None, "How thin.")
    crisp: bool = setting(True, "Whether it is.")
    hours: float = setting(1.5, "How long.", automatic=True)
    guests: tuple[str, ...] = setting((), "Who eats it.", repeated=True)


def test_a_table_is_read_once_in_its_order() -> None:
    table = entries(Bread)
    assert list(table) == ["flour", "loaves", "tin", "seeds", "slices", "crisp", "hours", "guests"]
    assert table["flour"].default is MISSING
    assert table["flour"].required
    assert (table["tin"].optional, table["loaves"].optional) == (True, False)
    assert table["loaves"].type is int
    assert names(Bread, panel="Oven") == ("loaves", "tin")


def test_a_default_is_shown_as_one_types_it() -> None:
    texts = {name: entry.text for name, entry in entries(Bread).items()}
    assert texts["seeds"] == "poppy"
    assert texts["slices"] == "auto"
    assert [texts[name] for name in ("flour", "tin", "hours", "guests")] == [None] * 4


def test_values_are_read_from_text() -> None:
    typed = {"flour": "rye", "tin": "3x4", "seeds": "a, b,a", "slices": "7", "hours": None, "other": 1}
    bread = read(Bread, typed)
    assert (bread.flour, bread.tin, bread.seeds, bread.slices, bread.hours) == ("rye", (3, 4), ("a", "b"), 7, 1.5)
    assert read_values({"slices": "auto", "hours": None}, Bread) == {"slices": None}


def test_numbers_by_name_are_read_up_to_their_ends() -> None:
    """A weight of 0 leaves its task out. A factor of 0 would freeze what it scales."""
    assert task_weights(("depth=0", "segmentation=2")) == {"depth": 0, "segmentation": 2}
    assert lr_scales(("encoder=0.1", "head=10")) == {"encoder": 0.1, "head": 10}
    assert [parse_views(text) for text in ("full", "1", "4")] == [1, 1, 4]
    for read_numbers, texts in ((task_weights, ("depth=-1",)), (task_weights, ("depth=inf",)), (lr_scales, ("a=0",))):
        with pytest.raises(ValueError, match=r"^$"):
            read_numbers(texts)


@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        ("flour", "sand", "one of rye, wheat"),
        ("tin", "3", "HEIGHTxWIDTH in pixels, two whole numbers from 1"),
        ("slices", "thin", "auto or a number of classes"),
    ],
)
def test_a_wrong_text_is_refused_by_its_flag(name: str, value: str, rule: str) -> None:
    with pytest.raises(RecipeError) as caught:
        read_values({name: value}, Bread)
    assert caught.value.problem == f"Invalid value of --{name}: {value!r}"
    assert caught.value.fix.startswith(f"Give {rule}, ")
    assert f"for example --{name} " in caught.value.fix or name == "flour"


def app_of(verb: Any) -> typer.Typer:
    made = typer.Typer(add_completion=False)
    made.command()(verb)
    return made


def test_a_verb_has_the_flags_of_its_tables() -> None:
    seen = {}

    @takes(
        Bread,
        order=("hours", "butter", "flour", "crisp", "loaves", "guests", "tin"),
        required=("tin",),
        unset=("crisp", "loaves"),
        wording={"hours": {"help": "Minutes."}},
    )
    def bake(settings: dict[str, Any], butter: bool = False) -> None:
        seen.update(settings, butter=butter)

    baker = app_of(bake)
    flags = {flag.name: flag for flag in typer.main.get_command(baker).params}
    assert list(flags) == ["hours", "butter", "flour", "crisp", "loaves", "guests", "tin"]
    assert [name for name, flag in flags.items() if flag.required] == ["flour", "tin"]
    assert flags["crisp"].secondary_opts == ["--no-crisp"]
    assert (flags["hours"].help, flags["loaves"].rich_help_panel) == ("Minutes.", "Oven")
    needed = ["--flour", "rye", "--tin", "1x1"]
    assert [CliRunner().invoke(baker, [*needed, "--loaves", count]).exit_code for count in "0519"] == [2, 0, 0, 0]
    assert CliRunner().invoke(baker, [*needed, "--butter", "--guests", "a"]).exit_code == 0
    assert seen == {
        **{"hours": None, "flour": "rye", "crisp": None, "loaves": None, "guests": ("a",), "tin": "1x1"},
        "butter": True,
    }


def test_no_setting_is_without_a_flag() -> None:
    verbs = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    for verb, tables in (("train-student", TRAINING), ("build-teacher-cache", BUILD), ("plan", BUILD)):
        assert set(entries(*tables)) - {"verb"} <= {flag.name for flag in verbs[verb].params}


def test_the_models_are_those_of_the_tables() -> None:
    config = make_config(verb="train-student", model="x", cache="y")
    assert set(config.settings) == set(entries(*TRAINING))
    chosen = {"verb", "model", "cache", "method"}
    defaults = {name: entry.default for name, entry in entries(*TRAINING).items() if name not in chosen}
    assert {name: config.settings[name] for name in defaults} == defaults
    options = BuildOptions((32, 48))
    assert all(getattr(options, name) == entry.default for name, entry in entries(BuildSettings).items())
    assert Loss.temperature == config.loss.temperature


@pytest.mark.parametrize(
    ("text", "count"),
    [("123", 123), ("50GiB", 50 * 2**30), ("200MB", 2 * 10**8), ("1.5k", 1500), ("2 tib", 2**41), ("7B", 7)],
)  # fmt: skip
def test_bytes_as_one_writes_them(text: str, count: int) -> None:
    assert parse_bytes(text) == count
