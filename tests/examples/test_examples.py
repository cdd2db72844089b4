"""The programs in examples/: each runs with and without a store, and differs by three lines."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from fork_server import ForkServer

from kdcache.data import open_split
from kdcache.distill import Batch
from kdcache.distill.batch import tensors_of
from kdcache.models import build_model
from kdcache.store import open_cache
from kdcache.teacher import BuildOptions, Teacher, build_cache
from kdcache.training import CacheDataset, make_config, sample_loader, train
from kdcache.training.input.loader import Draws

FOLDER = Path(__file__).parents[2] / "examples"
NAMES = ("plain_loop", "lightning_module", "hf_trainer")
SCENES = "scenes:32x48,train=6,val=3"
LINE = re.compile(r"^iteration (\d+) loss ([0-9.]+) (?:ce [0-9.]+ )?kl ([0-9.]+)$", re.MULTILINE)
FOREIGN = "ignore"  # what Lightning and transformers warn of themselves and each other is theirs
STEPS = 5


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of six scenes."""
    samples = open_split(SCENES, "train")
    torch.manual_seed(11)
    teacher = Teacher(build_model("kdcache:tiny", len(samples.classes)).eval(), "test")
    path = tmp_path_factory.mktemp("store") / "cache.zarr"
    build_cache(samples, teacher, path, BuildOptions(size=(32, 48), views=1, batch_size=4))
    return path


IN_TURN = """
import json, runpy, sys
for sys.argv in json.loads(sys.argv[1]):
    runpy.run_path(sys.argv[0], run_name="__main__")
    print("--- next ---")
"""


@pytest.fixture(scope="module")
def printed(forks: ForkServer) -> Callable[..., list[str]]:
    """What programs print that run in turn in one process, given the words of their command lines."""

    def texts(folder: Path, warnings: str, *runs: list[object]) -> list[str]:
        words = json.dumps([list(map(str, words)) for words in runs])
        done = subprocess.run(
            [forks.python, "-W", warnings, "-c", IN_TURN, words],
            cwd=folder,
            env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        *parts, last = done.stdout.split("--- next ---\n")
        assert (len(parts), last) == (len(runs), "")
        return parts

    return texts


Rows = list[tuple[int, float, float]]


@pytest.fixture(scope="module")
def learnt(
    store: Path, printed: Callable[..., list[str]], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[Rows, Rows]]:
    """What an example prints with the store, and without one: (iteration, loss, kl)."""

    @cache
    def rows(name: str) -> tuple[Rows, Rows]:
        given = [FOLDER / f"{name}.py", "--data", SCENES, "--size", 32, 48, "--iterations", STEPS, "--batch-size", 2]
        warnings = "error" if name == "plain_loop" else FOREIGN
        runs = [*given, "--cache", store, "--val", SCENES], given
        texts = printed(tmp_path_factory.mktemp(name), warnings, *runs)
        assert ["mIoU 0." in text for text in texts] == [True, False], texts
        taught, alone = ([(int(n), float(loss), float(kl)) for n, loss, kl in LINE.findall(text)] for text in texts)
        return taught, alone

    return rows


@pytest.mark.parametrize("name", NAMES)
def test_a_teacher_takes_three_lines_of_the_public_interface(name: str) -> None:
    text = (FOLDER / f"{name}.py").read_text(encoding="utf-8")
    assert text.count("  # distilled\n") == 3
    imported = re.findall(r"^from (kdcache[\w.]*) import (.+)$", text, re.MULTILINE)
    assert {module for module, _ in imported} <= {"kdcache", "kdcache.training"}
    for module, names in imported:
        for one in names.split(", "):
            assert one in sys.modules[module].__all__, one


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_it_learns_with_a_store_and_without(name: str, learnt: Callable[[str], tuple[Rows, Rows]]) -> None:
    taught, alone = learnt(name)
    for rows in (taught, alone):
        assert [number for number, _, _ in rows] == list(range(1, STEPS + 1))
    assert all(kl > 0 for _, _, kl in taught)
    assert all(kl == 0 for _, _, kl in alone)
    assert taught[0][1] > alone[0][1]


@pytest.mark.slow
def test_the_plain_loop_is_the_trainer(store: Path, learnt: Callable[[str], tuple[Rows, Rows]], tmp_path: Path) -> None:
    settings: dict[str, Any] = {"verb": "train-student", "model": "kdcache:tiny", "cache": str(store), "method": "kl"}
    settings |= {"iterations": STEPS, "batch_size": 2, "schedule": "constant", "weight_decay": 0.0, "device": "cpu"}
    settings |= {"log_every": 1, "lr": 1e-3, "class_weights": "none"}
    train(make_config(**settings), tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    expected = [(line["step"], line["loss"], line["kl"]) for line in lines if line["kind"] == "train"]
    for found, wanted in zip(learnt("plain_loop")[0], expected, strict=True):
        assert found == pytest.approx(wanted, rel=1e-5)


def distilled(text: str) -> str:
    """A program with the changes of the diff in docs/loops.md, each of which fits one place."""
    page = (FOLDER.parent / "docs" / "loops.md").read_text(encoding="utf-8")
    diff = page.partition("<!-- the diff -->\n```diff\n")[2].partition("```")[0]
    hunks = re.split(r"^@@.*@@$\n", diff, flags=re.MULTILINE)[1:]
    assert len(hunks) == 5
    for hunk in hunks:
        lines = hunk.splitlines()
        before = "".join(f"\n{line[1:]}" for line in lines if line[0] in " -")
        after = "".join(f"\n{line[1:]}" for line in lines if line[0] in " +")
        assert text.count(before) == 1, before
        text = text.replace(before, after)
    return text


@pytest.mark.slow
def test_the_lines_of_the_page_distil_somebody_s_own_loop(
    store: Path, printed: Callable[..., list[str]], tmp_path: Path
) -> None:
    text = (FOLDER / "own_loop.py").read_text(encoding="utf-8")
    (tmp_path / "alone.py").write_text(text, encoding="utf-8")
    (tmp_path / "taught.py").write_text(distilled(text).replace('"camvid.zarr"', repr(str(store))), encoding="utf-8")
    words = ["--data", SCENES, "--size", 32, 48, "--iterations", 4, "--batch-size", 2]
    found = []
    for shown in printed(tmp_path, "error", ["alone.py", *words], ["taught.py", *words]):
        assert re.search(r"^mIoU 0\.\d{4}$", shown, re.MULTILINE)
        found.append([float(loss) for loss in re.findall(r"^iteration \d+ loss ([\d.]+)$", shown, re.MULTILINE)])
    alone, taught = found
    assert len(alone) == len(taught) == 4
    assert taught[0] > alone[0], "the same crops, and one term more"


# --- what the loops are made of ----------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_the_loader_gives_the_batches_of_a_training(workers: int, store: Path) -> None:
    dataset = CacheDataset(open_cache(store))
    loader = sample_loader(dataset, batch_size=4, iterations=3, seed=7, workers=workers)
    draws = Draws(dataset, 7)
    assert len(loader) == 3
    for number, batch in enumerate(loader):
        for row in range(4):
            expected = draws[4 * number + row]
            assert isinstance(expected, Batch)
            assert torch.equal(batch.pixels[row], expected.pixels)
            assert torch.equal(batch.target.values[row], expected.target.values)
    assert number == 2


def test_a_damaged_record_is_an_error_of_the_loader(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from kdcache.errors import DataError

    def fail(*_: object) -> None:
        raise DataError("Cannot read x", fix="Restore it.")

    dataset = CacheDataset(open_cache(store))
    monkeypatch.setattr(dataset, "draw_into", fail)
    with pytest.raises(DataError, match="Cannot read x"):
        next(iter(sample_loader(dataset, batch_size=2, iterations=1)))


def test_a_batch_survives_as_a_dictionary(store: Path) -> None:
    dataset = CacheDataset(open_cache(store), extras=("labels/segmentation",))
    (batch,) = sample_loader(dataset, batch_size=2, iterations=1)
    named = batch.to_dict()
    assert set(named) == {
        "pixels", "labels/segmentation", "targets/segmentation/values", "window", "flip", "arrays/labels/segmentation",
    }  # fmt: skip
    again = Batch.from_dict(dict(reversed(named.items())))
    assert all(a is b for a, b in zip(tensors_of(again), tensors_of(batch), strict=True))
    assert again.arrays.keys() == batch.arrays.keys() == {"labels/segmentation"}
