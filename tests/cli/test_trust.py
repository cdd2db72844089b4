"""A run folder or a recipe runs no code without --trust, whatever verb reads it."""

from __future__ import annotations

import json
import shutil
import sys

import pytest

CODE = """
from pathlib import Path
from torch import nn
Path(__file__).with_name("imported").touch()

def build(num_classes): return nn.Conv2d(3, num_classes, 3, 4, 1)
"""
TRAIN = "train-teacher --data {w}/data --size 32x48 --iterations 1 --batch-size 2"
MODEL = TRAIN + " --model foreign_code:build --out {w}/mine"
READERS = {
    "evaluate": "evaluate {r} --data {w}/data",
    "compare": "compare {r} {w}/teacher --data {w}/data",
    "compare with a teacher": "compare {w}/teacher --teacher {r} --data {w}/data",
    "report": "report {r} --data {w}/data --out {w}/report.html",
    "export": "export {r} --out {w}/out.safetensors",
    "predict": "predict {r} {w}/data/images/val --out {w}/predicted",
    "build": "build-teacher-cache --data {w}/data --teacher {r} --views 1 --out {w}/new",
    "plan": "plan --data {w}/data --teacher {r} --views 1",
    "verify": "verify {w}/store.zarr --teacher {r}",
    "extend": "build-teacher-cache --from {w}/store.zarr --data {w}/data --teacher {r} --views 2 --out {w}/new",
}
QUICK = ("evaluate", "export", "build")


@pytest.fixture
def here(world, monkeypatch):
    """The world, and we stand in it; `theirs` is a run of elsewhere whose model is code that lies about."""
    (world / "foreign_code.py").write_text(CODE)
    shutil.copytree(world / "teacher", world / "theirs")
    about = json.loads((world / "theirs/model.json").read_text())
    (world / "theirs/model.json").write_text(json.dumps(about | {"spec": "foreign_code:build"}))
    monkeypatch.chdir(world)
    monkeypatch.delitem(sys.modules, "foreign_code", raising=False)
    return world


def imported(world) -> bool:
    return (world / "imported").exists()


@pytest.mark.parametrize("command", READERS.values(), ids=READERS)
def test_a_run_from_elsewhere_runs_no_code(here, cli, command) -> None:
    ended = cli(*command.format(w=here, r=here / "theirs").split())
    assert ended.code == 2, ended.out
    assert not imported(here)
    assert "Cannot import foreign_code:build" in ended.err
    whole = " ".join(ended.err.replace("│", " ").split())  # two paths are wider than a panel
    assert f"{here}/theirs/model.json names it: {here}/foreign_code.py would be imported" in whole
    assert ended.err.count("fix: ") == 1
    assert "--trust" in ended.err
    assert not (here / "new").exists()


@pytest.mark.parametrize("name", QUICK)
def test_a_run_that_was_trained_here_needs_trust_too(here, cli, name) -> None:
    assert cli(*MODEL.format(w=here).split()).code == 0
    words = READERS[name].format(w=here, r=here / "mine").split()
    assert cli(*words).code == 2
    ended = cli(*words, "--trust")
    assert ended.code == 0, ended.err


@pytest.mark.parametrize("place", ["before", "after"])
def test_trust_imports_it(here, cli, place) -> None:
    assert cli(*MODEL.format(w=here).split()).code == 0
    words = READERS["evaluate"].format(w=here, r=here / "mine").split()
    ended = cli(*(["--trust", *words] if place == "before" else [*words, "--trust"]))
    assert ended.code == 0, ended.err
    assert cli(*words).code == 2  # once is not for ever


def test_a_name_on_the_command_line_is_imported(here, cli) -> None:
    assert cli(*MODEL.format(w=here).split()).code == 0
    teacher = f"build-teacher-cache --data {here}/data --teacher foreign_code:build@{here}/mine/best.safetensors"
    ended = cli(*f"{teacher} --size 32x48 --views 1 --out {here}/new".split())
    assert ended.code == 0, ended.err


def test_a_recipe_runs_no_code_unless_the_command_line_names_it(here, cli) -> None:
    (here / "r.toml").write_text('model = "foreign_code:build"\n')
    base = f"{TRAIN} --recipe {here}/r.toml".format(w=here)
    ended = cli(*base.split(), "--out", here / "one")
    assert (ended.code, imported(here), (here / "one").exists()) == (2, False, False)
    assert "Cannot import foreign_code:build" in ended.err
    assert "r.toml names it: " in ended.err
    assert cli(*base.split(), "--out", here / "two", "--trust").code == 0
    assert cli(*base.split(), "--model", "kdcache:tiny", "--out", here / "three").code == 0
    assert cli(*base.split(), "--model", "foreign_code:build", "--out", here / "four").code == 0
    assert cli(*base.split(), "--out", here / "five").code == 2


SWEEP = """
[teacher]
model = "{teacher}"
size = "32x48"
iterations = 1
batch-size = 2
[store]
views = "full"
[student]
model = "{student}"
iterations = 1
batch-size = 2
[[arm]]
name = "none"
method = "none"
"""


@pytest.mark.parametrize("who", ["teacher", "student", "published"])
def test_a_recipe_of_a_sweep_runs_no_code(here, cli, who) -> None:
    models = {"teacher": "kdcache:tiny", "student": "kdcache:tiny"} | {who: "foreign_code:build"}
    text = SWEEP.format(**{name: models[name] for name in ("teacher", "student")})
    if who == "published":
        text = (
            text.replace("[teacher]\n", '[teacher]\nspec = "foreign_code:build@w.pth"\n')
            .replace('model = "kdcache:tiny"\nsize = "32x48"\niterations = 1\nbatch-size = 2\n[store]', "[store]", 1)
            .replace("[store]\n", '[store]\nsize = "32x48"\n')
        )
    (here / "s.toml").write_text(text)
    ended = cli("sweep", here / "s.toml", "--data", here / "data", "--out", here / "swept")
    assert ended.code == 2, ended.out
    assert "foreign_code:build" in ended.err
    assert "--trust" in ended.err
    assert not imported(here)
    assert not (here / "swept").exists()


@pytest.mark.parametrize("trust", [True, False])
def test_a_sweep_of_code_needs_trust_before_its_first_job(here, cli, monkeypatch, trust) -> None:
    from kdcache_cli.verbs import sweep

    began = []
    monkeypatch.setattr(sweep.InProcess, "__call__", lambda self, job: began.append(job.name))
    (here / "s.toml").write_text(SWEEP.format(teacher="kdcache:tiny", student="kdcache:tiny"))
    base = ["sweep", here / "s.toml", "--data", here / "data", "--out", here / "swept"]
    ended = cli(*base, "--set", 'student.model="foreign_code:build"', *(["--trust"] if trust else []))
    assert bool(began) is trust, ended.err


@pytest.mark.usefixtures("forked_jobs")
def test_a_sweep_of_several_processes_trusts_in_each(here, cli) -> None:
    """Its later commands read the folder of a run whose model is code."""
    (here / "s.toml").write_text(SWEEP.format(teacher="foreign_code:build", student="kdcache:tiny"))
    base = ["sweep", here / "s.toml", "--data", here / "data", "--out", here / "swept", "--parallel", "2"]
    ended = cli(*base, "--trust")
    assert ended.code == 0, ended.err + "".join(path.read_text() for path in here.glob("swept/**/*.log"))


def remedy_of(ended) -> str:
    """What a message tells its reader to do."""
    assert ended.code == 2, ended.out
    return ended.err.partition("│ fix: ")[2]


def rename(run, spec: str) -> None:
    about = json.loads((run / "model.json").read_text())
    (run / "model.json").write_text(json.dumps(about | {"spec": spec}))


@pytest.mark.parametrize(
    ("spec", "suggested"), [("foreign_code:build", False), ("kdcache:nothing", False), ("kdcache:base", True)]
)
def test_a_remedy_names_the_model_of_weights_only_if_kdcache_has_it(here, cli, spec, suggested) -> None:
    from safetensors.torch import load_file, save_file

    from kdcache.run_folder import Run

    about = Run.open(here / "teacher").model.metadata()
    save_file(load_file(here / "teacher/best.safetensors"), here / "w.safetensors", about | {"spec": spec})
    ended = cli("predict", f"kdcache:tiny@{here}/w.safetensors", here / "data/images/val", "--out", here / "new")
    assert f"w.safetensors: that file is of {spec}" in ended.err
    assert (f"{spec}@" in remedy_of(ended)) is suggested
    assert not imported(here)


@pytest.mark.parametrize(
    "spec",
    ["foreign_code:build+dept", "foreign_code:build+depth,as=x", "foreign_code:build+aux,tap=", "kdcache:tiny@$(id)",
     "kdcache:tiny+depth,tap=$(id)", "kdcache:tiny+aux,tap=$(id)"],
)  # fmt: skip
def test_no_remedy_spells_what_a_file_spells(here, cli, spec) -> None:
    """The spec stands in a run's description, and in a recipe."""
    rename(here / "theirs", spec)
    (here / "r.toml").write_text(f'model = "{spec}"\n')
    for command in (READERS["evaluate"], TRAIN + " --recipe {w}/r.toml --out {w}/new"):
        remedy = remedy_of(cli(*command.format(w=here, r=here / "theirs").split()))
        assert "foreign_code" not in remedy
        assert "$(id)" not in remedy
        assert remedy.strip()
    assert not imported(here)


def test_no_command_takes_its_verb_from_a_recipe(here, cli) -> None:
    (here / "r.toml").write_text('verb = "x; touch imported"\n')
    assert "touch" not in remedy_of(cli("train-teacher", "--recipe", here / "r.toml", "--out", here / "new"))
    shutil.copy(here / "r.toml", here / "theirs/recipe.toml")
    assert "kdcache x" not in cli("inspect", here / "theirs", "--card").out
    (here / "r.toml").write_text('verb = "train-student"\n')
    assert "Run kdcache train-student" in remedy_of(cli("train-teacher", "--recipe", here / "r.toml"))


def test_a_sweep_suggests_no_model_of_its_recipe(here, cli) -> None:
    (here / "s.toml").write_text(
        SWEEP.format(teacher="", student="kdcache:tiny").replace('model = ""', 'spec = "foreign_code:build"')
    )
    ended = cli("sweep", here / "s.toml", "--data", here / "data", "--out", here / "swept")
    assert "foreign_code" not in remedy_of(ended)
