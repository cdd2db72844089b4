"""Nothing that travels names a folder of this machine: caches, cards, runs, recipes, evaluations, pages, exports."""

from __future__ import annotations

import shutil

import pytest

NAME = "ann-private"
CODE = "from torch import nn\n\ndef make(num_classes): return nn.Conv2d(3, num_classes, 1, stride=4)\n"
SMALL = "--size 32x48 --iterations 1 --batch-size 2"


@pytest.fixture(scope="module")
def way(cli, tmp_path_factory):
    """A whole way, every path of it typed whole: the home folder where it was gone, and what its commands printed."""
    from kdcache.data import write_scenes

    home = tmp_path_factory.mktemp("way") / NAME
    (home / "nets").mkdir(parents=True)
    (home / "nets/net.py").write_text(CODE)
    write_scenes(home / "data", "scenes:32x48,train=4,val=2")
    for line in (
        f"train-teacher --data {home}/data --model {home}/nets/net.py:make {SMALL} --out {home}/teacher",
        f"build-teacher-cache --data {home}/data --teacher {home}/teacher --views 1 --out {home}/c.zarr",
        f"build-teacher-cache --data {home}/data --teacher {home}/teacher --teacher {home}/teacher --views 1 "
        f"--out {home}/several.zarr",
        f"train-student --cache {home}/c.zarr --data {home}/data --val {home}/data --init {home}/teacher/"
        f"last.safetensors --model {home}/nets/net.py:make {SMALL} --out {home}/student",
        f"evaluate {home}/student --data {home}/data",
        f"report {home}/student {home}/teacher --data {home}/data --repeats 0 --out {home}/page.html",
        f"export {home}/student --out {home}/exported.safetensors",
        f"inspect {home}/c.zarr --card",
        f"inspect {home}/several.zarr --card",
        f"inspect {home}/student --card",
    ):
        ended = cli(*line.split(), "--trust")
        assert ended.code == 0, (line, ended.err)
        if line.startswith("inspect"):
            (home / f"card-{len(list(home.glob('card*')))}.md").write_text(ended.out)
    return home


def test_nothing_that_travels_names_a_folder(way) -> None:
    """What lies beside these stays: the data, the code and local.json."""
    travel = [way / "page.html", way / "exported.safetensors", *way.glob("card*")]
    for folder in ("c.zarr", "several.zarr", "teacher", "student"):
        travel += [path for path in (way / folder).rglob("*") if path.is_file() and path.name != "local.json"]
    assert len(travel) > 60
    named = [f"{path}: {line}" for path in travel for line in path.read_bytes().splitlines() if NAME.encode() in line]
    assert [text.replace(str(way), "")[:300] for text in named] == []
    assert "net.py:make" in (way / "card-0.md").read_text()
    assert "net.py:make" in (way / "page.html").read_text()
    assert {path.name for path in (way / "c.zarr").iterdir()}.isdisjoint({"local.json"})


@pytest.mark.parametrize("run", ["teacher", "student"])
def test_a_run_finds_its_code_and_data_on_its_machine(way, cli, run, tmp_path, monkeypatch) -> None:
    """From any folder, and in a copy."""
    shutil.copytree(way / run, tmp_path / "copy")
    monkeypatch.chdir(tmp_path)
    assert cli(*f"evaluate copy --data {way}/data --trust".split()).code == 0
    verb = "train-student" if run == "student" else "train-teacher"
    again = cli(*f"{verb} --recipe copy/recipe.toml --out again --trust".split())
    assert again.code == 0, again.err
    assert (tmp_path / "again/recipe.toml").read_bytes() == (way / run / "recipe.toml").read_bytes()


def test_elsewhere_a_run_says_which_file_is_missing(way, cli, tmp_path, monkeypatch) -> None:
    shutil.copytree(way / "student", tmp_path / "sent", ignore=shutil.ignore_patterns("local.json"))
    monkeypatch.chdir(tmp_path)
    ended = cli(*f"evaluate sent --data {way}/data".split())
    assert ended.code == 2
    assert "Cannot find net.py" in ended.err
    assert f"no {tmp_path}/net.py" in ended.err
    shutil.copy(way / "nets/net.py", tmp_path)
    assert cli(*f"evaluate sent --data {way}/data --trust".split()).code == 0


def test_a_cache_of_an_older_version_is_continued_by_its_teacher(way, cli, tmp_path) -> None:
    """It names the folder of the teacher's code; the digest of the weights and the probe say who that is."""
    from kdcache.store import open_cache

    teacher = open_cache(way / "several.zarr").manifest.teacher
    texts = [teacher.model_dump_json().replace("net.py", name) for name in ("/somewhere/else/net.py", "other.py")]
    older, other = map(type(teacher).model_validate_json, texts)
    assert older.spec.startswith("/somewhere")
    assert older.differences(teacher) == teacher.differences(older) == []
    assert "spec" in other.differences(teacher)[0]
