"""What judges a training: sequences that it shares with the samples, and folds that keep sequences whole."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kdcache.data import write_scenes
from kdcache.errors import RecipeError
from kdcache.store import open_cache
from kdcache.training import make_config
from kdcache.training.sources import judged_by_its_own, open_dataset, open_validation, read_samples, shared_with_judge

VIDEOS = [f"{video}_{frame:04d}" for video in ("bus", "tram") for frame in range(0, 120, 30)]


@pytest.fixture
def videos(tmp_path: Path) -> str:
    """Two videos of four frames, and two more frames of one of them for validation."""
    folder = write_scenes(tmp_path / "videos", "scenes:32x48,train=8,val=2")
    for split, names in (("train", VIDEOS), ("val", ["bus_0045", "bus_0047"])):
        for kind in ("images", "labels"):
            for path, name in zip(sorted((folder / kind / split).iterdir()), names, strict=True):
                path.rename(path.with_stem(name))
    return str(folder)


@pytest.mark.parametrize(
    ("changes", "shared"),
    [
        ({"val": None}, None),
        ({}, "warning: training shares sequences with validation: bus_* (2 images there, 4 in training, 4 of these "),
        ({"val": None, "fold": "0/2"}, "training shares sequences with fold 0/2: "),
        (
            {"val_split": "train", "val_fold": "0/2", "fold": "0/2"},
            "training shares sequences with validation and fold 0/2: ",
        ),
        ({"val_split": "train", "val_fold": "0/2", "fold": "0/2", "folds_by": "^(.+)_"}, None),
        ({"fold": "0/2", "folds_by": "^(.+)_"}, "bus (2 images there, 4 in training, 4 of these with a label). Frames"),
        ({"fold": "1/2", "folds_by": "^(.+)_"}, None),
    ],
)
def test_sequences_that_judge_and_training_share(
    settings: dict[str, Any], videos: str, changes: dict[str, Any], shared: str | None
) -> None:
    config = make_config(**(settings | {"data": videos, "val": videos} | changes))
    dataset = open_dataset(config, None)
    text = shared_with_judge(config, dataset, open_validation(config))
    assert (text is None) if shared is None else (text is not None and shared in text), text


@pytest.mark.parametrize(
    ("changes", "shared"),
    [
        ({}, None),
        ({"val_split": "train"}, "warning: 8 of 8 validation images are also trained on, such as 'bus_0000'"),
        ({"val_split": "train", "val_fold": "0/2"}, "leave this fold out of the training with --fold I/K"),
        ({"val_split": "train", "val_fold": "0/2", "fold": "0/2"}, None),
        ({"val_split": "train", "val": "segmentation:"}, "8 of 8 validation images"),
    ],
)
def test_images_that_judge_and_training_share(
    settings: dict[str, Any], videos: str, changes: dict[str, Any], shared: str | None
) -> None:
    val = changes.get("val", "") + videos
    config = make_config(**(settings | {"data": videos} | changes | {"val": val}))
    text = judged_by_its_own(read_samples([open_dataset(config, None)], open_validation(config)))
    assert (text is None) if shared is None else (text is not None and shared in text), text


def test_folds_of_a_store_keep_sequences_whole(
    settings: dict[str, Any], make_cache: Callable[..., Path], videos: str
) -> None:
    cache = open_cache(make_cache(videos))
    changes = {"verb": "train-student", "method": "none", "data": None, "size": None, "cache": str(cache.place)}
    config = make_config(**(settings | changes | {"fold": "0/2", "folds_by": "^(.+)_"}))
    dataset = open_dataset(config, cache)
    assert [dataset.sample_id(index) for index in range(len(dataset))] in (VIDEOS[:4], VIDEOS[4:])
    with pytest.raises(RecipeError, match="Cannot deal 2 sequences"):
        open_dataset(config.changed(fold="0/3"), cache)


def test_unlabelled_frames_next_to_the_judge_are_counted_apart(
    settings: dict[str, Any], make_cache: Callable[..., Path], videos: str
) -> None:
    cache = open_cache(make_cache(videos))
    student = {"verb": "train-student", "data": None, "size": None, "cache": str(cache.place), "val": videos}
    config = make_config(**(settings | student | {"limit_labels": 2}))
    text = shared_with_judge(config, open_dataset(config, cache), open_validation(config))
    assert text is not None
    assert "bus_* (2 images there, 4 in training, 1 of these with a label)" in text
