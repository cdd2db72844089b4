"""samples.json of a run: what it learnt from, so that changed data and images that were trained on are noticed."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kdcache.data import Contents, Split, open_split, read_contents, write_scenes
from kdcache.run_samples import SAMPLES, RunSamples, judging_notes

NAMES = ("sky", "road")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KDCACHE_CACHE_DIR", str(tmp_path / "cache"))
    return write_scenes(tmp_path / "data", "scenes:32x48,train=4,val=3")


def opened(folder: Path, split: str) -> Split:
    return open_split(str(folder), split)


def samples_of(folder: Path) -> RunSamples:
    """Of a run on one data set and one store that does not record its samples."""
    return RunSamples(NAMES, (read_contents(opened(folder, "train")), None), read_contents(opened(folder, "val")))


def files(folder: Path, kind: str, split: str) -> list[Path]:
    return sorted((folder / kind / split).iterdir())


def correct(folder: Path, split: str, number: int) -> str:
    path = files(folder, "labels", split)[number]
    Image.fromarray((np.array(Image.open(path)) + 1) % 3).save(path)
    return path.stem


def test_they_are_read_as_they_were_written(folder: Path, tmp_path: Path) -> None:
    samples = samples_of(folder)
    samples.write(tmp_path)
    read = RunSamples.read(tmp_path)
    assert read is not None
    assert (read.class_names, read.streams[1]) == (NAMES, None)
    assert not read.changes(samples)
    for before, after in zip((samples.streams[0], samples.validation), (read.streams[0], read.validation), strict=True):
        assert before is not None
        assert after is not None
        assert before.digest == after.digest


@pytest.mark.parametrize("content", [None, "", "[]", '{"streams": 3}', '{"streams": [{"ids": ["a"], "image": "AA"}]}'])
def test_a_run_without_them_says_nothing(folder: Path, tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / SAMPLES).write_text(content)
    assert RunSamples.read(tmp_path) is None
    assert judging_notes(tmp_path, opened(folder, "val")) == ()


@pytest.mark.parametrize("split", ["train", "val"])
def test_changes_are_named(folder: Path, split: str) -> None:
    before = samples_of(folder)
    name = correct(folder, split, 1)
    assert before.changes(samples_of(folder)).labels == (name,)


def test_changed_classes_are_named(folder: Path) -> None:
    samples = samples_of(folder)
    assert "'road' is now 'street'" in samples.changes(replace(samples, class_names=("sky", "street"))).describe()


def test_what_was_not_recorded_is_not_compared(folder: Path) -> None:
    samples = samples_of(folder)
    unknown = replace(samples, streams=(None, samples.streams[0]), validation=None)
    assert not samples.changes(unknown)
    assert not unknown.changes(samples)


def test_copies_are_trained_on_whatever_their_names(folder: Path) -> None:
    target = files(folder, "images", "val")[2]
    shutil.copy(files(folder, "images", "train")[0], target)
    samples = samples_of(folder)
    assert samples.validation is not None
    assert samples.trained_on(samples.validation) == (target.stem,)
    assert RunSamples(NAMES, (None,)).trained_on(samples.validation) == ()


def test_a_score_on_training_images_is_called_one(folder: Path, tmp_path: Path) -> None:
    samples_of(folder).write(tmp_path)
    (note,) = judging_notes(tmp_path, opened(folder, "train"))
    assert note.startswith(f"4 of 4 images of {folder}, split 'train' were trained on")
    assert judging_notes(tmp_path, opened(folder, "val")) == ()


def test_a_score_on_changed_validation_data_says_so(folder: Path, tmp_path: Path) -> None:
    samples_of(folder).write(tmp_path)
    name = correct(folder, "val", 0)
    (note,) = judging_notes(tmp_path, opened(folder, "val"))
    assert f"has changed since the training was validated on it: 1 label differs ({name!r})" in note


def test_a_score_on_other_data_needs_no_note(folder: Path, tmp_path: Path) -> None:
    samples_of(folder).write(tmp_path)
    other = write_scenes(tmp_path / "other", "scenes:32x48,train=1,val=3,seed=1")
    for path in sorted((other / "images/val").iterdir()) + sorted((other / "labels/val").iterdir()):
        path.rename(path.with_stem(f"other-{path.stem}"))
    assert judging_notes(tmp_path, opened(other, "val")) == ()


def test_depth_is_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KDCACHE_CACHE_DIR", str(tmp_path / "cache"))
    folder = write_scenes(tmp_path / "data", "scenes:32x48,train=2,val=2,depth=exact")
    before = samples_of(folder)
    first, second = files(folder, "depth", "train")
    shutil.copy(first, second)
    assert before.changes(samples_of(folder)).depths == (second.stem,)
    empty = Contents((), *(np.zeros((0, 16), np.uint8) for _ in range(3)))
    assert not RunSamples(NAMES, (empty,)).changes(RunSamples(NAMES, (empty,)))
