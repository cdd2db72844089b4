"""Every verb from Python and from the command line: the same results, the same files, the same errors."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from safetensors.torch import load_file

import kdcache
from kdcache.errors import KDCacheError
from kdcache.run_folder import Run

Tree = dict[str, bytes]
SHORT: dict[str, Any] = {"iterations": 3, "batch_size": 2, "device": "cpu", "gradients_every": 0, "workers": 0}
QUIET: dict[str, Any] = {"progress": False}


def flags(settings: dict[str, Any]) -> list[str]:
    """Settings as flags."""
    return [word for name, value in settings.items() for word in (f"--{name.replace('_', '-')}", str(value))]


@pytest.fixture(scope="module")
def student(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that learnt from the cache."""
    out = tmp_path_factory.mktemp("both") / "student"
    kdcache.train(out, model="kdcache:tiny", cache=made / "store.zarr", val=made / "data", **SHORT, **QUIET)
    return out


def weights(run: Path) -> Tree:
    """The tensors of a run, as bytes."""
    return {name: tensor.numpy().tobytes() for name, tensor in load_file(Run.open(run).weights("best")).items()}


def content(path: Path) -> tuple[dict[str, str], Tree]:
    """The metadata and the tensors of a file."""
    with safe_open(path, "pt") as file:
        return file.metadata(), {name: file.get_tensor(name).numpy().tobytes() for name in file.keys()}  # noqa: SIM118


@pytest.mark.parametrize("verb", ["train-teacher", "train-student"])
def test_trainings(verb: str, made: Path, tmp_path: Path, cli: Callable[..., Any]) -> None:
    source = {"cache": made / "store.zarr"} if verb == "train-student" else {"data": made / "data", "size": "32x48"}
    own = {**source, "val": made / "data", "model": "kdcache:tiny", **SHORT}
    run = kdcache.train(tmp_path / "python", **own, **QUIET)
    ended = cli(verb, *flags(own), "--out", tmp_path / "typed")
    assert ended.code == 0, ended.err
    assert weights(tmp_path / "typed") == weights(run.folder)
    typed = Run.open(tmp_path / "typed")
    assert typed.recipe == run.recipe
    assert typed.result["best_miou"] == run.result["best_miou"]


def test_builds(made: Path, tmp_path: Path, cli: Callable[..., Any], unstamped: Any, tree: Any) -> None:
    settings = {"views": 2, "crop": "16x24", "shard_records": 4, "device": "cpu"}
    kdcache.build_cache(made / "data", made / "teacher", tmp_path / "python.zarr", **settings, **QUIET)
    words = ["--data", made / "data", "--teacher", made / "teacher", *flags(settings)]
    ended = cli("build-teacher-cache", *words, "--out", tmp_path / "typed.zarr")
    assert ended.code == 0, ended.err
    assert unstamped(tree(tmp_path / "typed.zarr")) == unstamped(tree(tmp_path / "python.zarr"))


def test_plans(made: Path, tmp_path: Path, cli: Callable[..., Any]) -> None:
    planned = kdcache.plan(made / "data", made / "teacher", records=8, device="cpu", **QUIET).to_json()
    words = ["--data", made / "data", "--teacher", made / "teacher", "--records", 8, "--device", "cpu"]
    assert cli("plan", *words, "--json", tmp_path / "plan.json").code == 0
    typed = json.loads((tmp_path / "plan.json").read_text())
    assert planned.keys() <= typed.keys()
    for side in (planned, typed):
        assert side["chosen"]["bytes"] == planned["chosen"]["bytes"]


def test_evaluations_are_kept_for_each_other(
    student: Path, made: Path, tmp_path: Path, cli: Callable[..., Any]
) -> None:
    first, second = (shutil.copytree(student, tmp_path / name) for name in ("first", "second"))
    of_python = kdcache.evaluate(first, made / "data", device="cpu", **QUIET)
    ended = cli("evaluate", second, "--data", made / "data", "--device", "cpu")
    assert ended.code == 0, ended.err
    names = sorted(path.name for path in first.glob("evaluation-*"))
    assert names == sorted(path.name for path in second.glob("evaluation-*"))
    assert len(names) == 3
    one, other = (json.loads((folder / names[0]).read_text()) for folder in (first, second))
    assert {**one, "run": ""} == {**other, "run": ""}
    assert "--fresh" not in ended.out
    assert "--fresh" in cli("evaluate", first, "--data", made / "data", "--device", "cpu").out
    again = kdcache.evaluate(second, made / "data", device="cpu", **QUIET)
    assert again.reused
    assert again == of_python
    assert not kdcache.evaluate(second, made / "data", device="cpu", fresh=True, **QUIET).reused


def test_comparisons_and_pages(student: Path, made: Path, tmp_path: Path, cli: Callable[..., Any]) -> None:
    teacher = shutil.copytree(made / "teacher", tmp_path / "teacher")
    settings = {"data": made / "data", "teacher": teacher, "device": "cpu", "repeats": 0}
    comparison = kdcache.compare([student], **settings, **QUIET)
    assert cli("compare", student, *flags(settings), "--json", tmp_path / "c.json").code == 0
    typed = (tmp_path / "c.json").read_text()
    assert '"reused": true' in typed
    assert json.loads(typed.replace("true", "false")) == json.loads(
        json.dumps(comparison.to_json()).replace("true", "false")
    )
    kdcache.report([student], tmp_path / "python.html", num=1, **settings, **QUIET)
    assert cli("report", student, *flags(settings), "--num", 1, "--out", tmp_path / "typed.html").code == 0
    assert (tmp_path / "python.html").stat().st_size == pytest.approx(
        (tmp_path / "typed.html").stat().st_size, rel=0.02
    )


def test_what_a_cache_is(made: Path, tmp_path: Path, cli: Callable[..., Any], tree: Any) -> None:
    store = made / "store.zarr"
    assert json.loads(cli("inspect", store, "--json").out) == json.loads(json.dumps(kdcache.inspect(store).to_json()))
    assert cli("inspect", store, "--card").out == kdcache.card(store)
    assert cli("inspect", made / "teacher", "--card").out == kdcache.card(made / "teacher")
    audited = kdcache.audit(store, out=tmp_path / "python", **QUIET)
    assert cli("inspect", store, "--teacher-report", "--out", tmp_path / "typed").code == 0
    assert tree(tmp_path / "typed") == tree(audited.folder)


def test_verification(made: Path, world: Path, cli: Callable[..., Any]) -> None:
    own = {"teacher": made / "teacher", "data": made / "data"}
    verified = kdcache.verify(made / "store.zarr", **own, device="cpu", **QUIET)
    ended = cli("verify", made / "store.zarr", *flags(own))
    assert verified
    assert (ended.code, verified.files.seal in ended.out, "6 samples" in ended.out) == (0, True, True)
    shard = next((world / "store.zarr" / "targets").rglob("c/*"), None)
    shard = (
        shard
        if shard is not None and shard.is_file()
        else next(p for p in (world / "store.zarr").rglob("c/**/*") if p.is_file())
    )
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    assert not kdcache.verify(world / "store.zarr", **QUIET)
    assert cli("verify", world / "store.zarr").code == 1


def test_copies(made: Path, tmp_path: Path, cli: Callable[..., Any], unstamped: Any, tree: Any) -> None:
    done = kdcache.copy(made / "store.zarr", tmp_path / "python.zarr", samples=3, shard_records=2, **QUIET)
    words = ["--samples", 3, "--shard-records", 2]
    assert cli("copy", made / "store.zarr", tmp_path / "typed.zarr", *words).code == 0
    assert unstamped(tree(tmp_path / "typed.zarr")) == unstamped(tree(tmp_path / "python.zarr"))
    assert done.bytes == kdcache.inspect(tmp_path / "typed.zarr").bytes_on_disk


def test_what_a_model_is_for(student: Path, made: Path, tmp_path: Path, cli: Callable[..., Any], tree: Any) -> None:
    exported = kdcache.export(student, tmp_path / "python.safetensors")
    assert cli("export", student, "--out", tmp_path / "typed.safetensors").code == 0
    assert content(tmp_path / "typed.safetensors") == content(exported.path)
    predicted = kdcache.predict(student, made / "data" / "images" / "val", tmp_path / "python", device="cpu", **QUIET)
    assert predicted.images == 2
    assert cli("predict", student, made / "data" / "images" / "val", "--out", tmp_path / "typed").code == 0
    assert tree(tmp_path / "typed") == tree(tmp_path / "python")


def test_pseudo_labels(made: Path, tmp_path: Path, cli: Callable[..., Any], tree: Any) -> None:
    done = kdcache.export_pseudo_labels(made / "store.zarr", tmp_path / "python", quantile=0.5, **QUIET)
    assert done.written == 6
    words = ["--quantile", 0.5, "--out", tmp_path / "typed"]
    assert cli("export-pseudo-labels", made / "store.zarr", *words).code == 0
    assert tree(tmp_path / "typed") == tree(tmp_path / "python")


WRONG: dict[str, tuple[Callable[[Path, Path], Any], tuple[str, ...], str]] = {
    "value": (
        lambda made, out: kdcache.evaluate(made / "teacher", made / "data", fit="bend"),
        ("evaluate", "teacher", "--data", "data", "--fit", "bend"),
        "bend",
    ),
    "type": (
        lambda made, out: kdcache.predict(made / "teacher", made / "data", out, size=3.5),
        ("predict", "teacher", "data", "--out", "out", "--size", "3.5"),
        "3.5",
    ),
    "unknown": (
        lambda made, out: kdcache.compare(made / "teacher", weihgts="last"),
        ("compare", "teacher", "--weihgts", "last"),
        "weights",
    ),
    "of another verb": (
        lambda made, out: kdcache.report(made / "teacher", out / "r.html", shard_records=3),
        ("report", "teacher", "--shard-records", "3"),
        "shard",
    ),
    "nothing there": (
        lambda made, out: kdcache.verify(made / "none.zarr"),
        ("verify", "none.zarr"),
        "none.zarr",
    ),
    "a run, no cache": (
        lambda made, out: kdcache.inspect(made / "teacher"),
        ("inspect", "teacher"),
        "it is a run",
    ),
    "no hub": (
        lambda made, out: kdcache.copy(made / "store.zarr", out / "c.zarr", license="mit"),
        ("copy", "store.zarr", "out", "--license", "mit"),
        "license",
    ),
    "no depth": (
        lambda made, out: kdcache.predict(made / "teacher", made / "data", out, depth_format="npy"),
        ("predict", "teacher", "data", "--out", "out", "--depth-format", "npy"),
        "no depth head",
    ),
    "no folder of pictures": (
        lambda made, out: kdcache.report(made / "teacher", out / "r.html", layout="row"),
        ("report", "teacher", "--layout", "row"),
        "without",
    ),
    "whole images": (
        lambda made, out: kdcache.plan(made / "data", made / "teacher", views="full", crop="16x16"),
        ("plan", "--data", "data", "--teacher", "teacher", "--views", "full", "--crop", "16x16"),
        "16x16",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_input_is_one_error_both_ways(
    name: str, made: Path, tmp_path: Path, cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python names keywords, the command line flags. Nothing is written."""
    call, words, said = WRONG[name]
    with pytest.raises(KDCacheError) as caught:
        call(made, tmp_path / "out")
    monkeypatch.chdir(made)
    ended = cli(*(tmp_path / word if word == "out" else word for word in words))
    assert ended.code == 2
    assert said in str(caught.value)
    assert said in ended.err
    assert "--" not in caught.value.problem
    assert not (tmp_path / "out").exists()
