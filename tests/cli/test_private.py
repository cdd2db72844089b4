"""Nothing that travels names a folder of this machine: caches, runs, what loggers send, tables, pictures, audits."""

from __future__ import annotations

import json
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
    weights = f"{home}/nets/net.py:make@{home}/teacher/last.safetensors"
    for line in (
        f"train-teacher --data {home}/data --model {home}/nets/net.py:make {SMALL} --out {home}/teacher",
        f"build-teacher-cache --data {home}/data --teacher {home}/teacher --views 1 --out {home}/c.zarr",
        f"build-teacher-cache --data {home}/data --teacher {home}/teacher --teacher {home}/teacher --views 1 "
        f"--out {home}/several.zarr",
        f"train-student --cache {home}/c.zarr --data {home}/data --val {home}/data --init {home}/teacher/"
        f"last.safetensors --model {home}/nets/net.py:make {SMALL} --log tensorboard --out {home}/student",
        f"evaluate {home}/student --data {home}/data",
        f"compare {home}/student {home}/teacher --data {home}/data --repeats 0 --json {home}/tables/t.json "
        f"--markdown {home}/tables/t.md --csv {home}/tables/t.csv --text {home}/tables/t.txt",
        f"report {home}/student {weights} --teacher {home}/teacher --baseline {weights} --data {home}/data "
        f"--size 32x48 --repeats 0 --format svg --num 1 --draw {home}/pictures --out {home}/drawn.html",
        f"inspect {home}/c.zarr --teacher-report --data {home}/data --out {home}/audit",
        f"report {home}/student {home}/teacher --data {home}/data --repeats 0 --out {home}/page.html",
        f"export {home}/student --out {home}/exported.safetensors",
        f"inspect {home}/c.zarr --card",
        f"inspect {home}/several.zarr --card",
        f"inspect {home}/student --card",
    ):
        ended = cli(*line.split(), "--trust")
        assert ended.code == 0, (line, ended.err)
        if line.endswith("--card"):
            (home / f"card-{len(list(home.glob('card*')))}.md").write_text(ended.out)
    return home


def test_nothing_that_travels_names_a_folder(way) -> None:
    """What lies beside these stays: the data, the code and local.json."""
    travel = [way / "page.html", way / "exported.safetensors", *way.glob("card*")]
    for folder in ("c.zarr", "several.zarr", "teacher", "student", "tables", "pictures", "audit"):
        travel += [path for path in (way / folder).rglob("*") if path.is_file() and path.name != "local.json"]
    assert len(travel) > 60
    named = [f"{path}: {line}" for path in travel for line in path.read_bytes().splitlines() if NAME.encode() in line]
    assert [text.replace(str(way), "")[:300] for text in named] == []
    assert "net.py:make" in (way / "card-0.md").read_text()
    assert "net.py:make" in (way / "page.html").read_text()
    assert any("baseline: nets/net.py:make" in path.read_text() for path in way.glob("pictures/student/*/*.svg"))
    assert [run["run"] for row in json.loads((way / "tables/t.json").read_text())["rows"] for run in row["runs"]] == [
        "student",
        "teacher",
    ]
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
