"""`--labels-from`: the labels of listed samples, for teachers and students alike."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kdcache.data import open_split
from kdcache.errors import MismatchError, RecipeError
from kdcache.run_folder import Run
from kdcache.store import Cache, open_cache
from kdcache.store.format.flags import pack_flags, unpack_flags
from kdcache.store.format.teacher_models import Training
from kdcache.training import make_config, train
from kdcache.training.leakage import check_teacher
from kdcache.training.sources import open_dataset

PICKED = [1, 4]


@pytest.fixture
def write(tmp_path: Path, scenes: str) -> Callable[..., Path]:
    """Writes a list of samples by their numbers, or of other lines."""
    ids = open_split(scenes, "train").ids

    def of(*lines: int | str, name: str = "list.txt") -> Path:
        path = tmp_path / name
        path.write_text("".join(f"{line if isinstance(line, str) else ids[line]}\n" for line in lines))
        return path

    return of


def used(run: Path) -> list[int]:
    return np.flatnonzero(unpack_flags(Run.open(run).model.labels or "", 6, run)).tolist()


def test_a_teacher_and_a_student_use_the_listed_labels(
    write: Callable[..., Path], scenes: str, student: dict[str, Any], tmp_path: Path
) -> None:
    short = {"labels_from": write(*PICKED, "", name="two.txt"), "iterations": 1, "val_every": 1}
    teacher = {"verb": "train-teacher", "model": "kdcache:tiny", "data": scenes, "val": scenes, "size": (32, 48)}
    train(make_config(**teacher | {"batch_size": 2, "device": "cpu"} | short), tmp_path / "teacher")
    train(make_config(**student | short), tmp_path / "student")
    assert used(tmp_path / "teacher") == used(tmp_path / "student") == PICKED
    recipe = (tmp_path / "student" / "recipe.toml").read_text()
    assert "two.txt" in recipe
    assert "labelled-share = 0.5" in recipe


def test_listed_samples_outside_of_the_fold_alone_are_used(write: Callable[..., Path], student: dict[str, Any]) -> None:
    config = make_config(**student | {"labels_from": write(*range(5)), "fold": "0/2", "method": "none"})
    cache = open_cache(str(student["cache"]))
    left_out = {
        number for number in range(6) if config.left_out is not None and config.left_out.holds(cache.ids)[number]
    }
    labelled = set(open_dataset(config, cache).labelled)
    assert labelled == set(range(5)) - left_out
    assert left_out & set(range(5))


@pytest.mark.parametrize(
    ("lines", "problem", "detail"),
    [
        ((0, "nobody", "none"), "Unknown id 'nobody'", ", and 1 more"),
        ((0, 0), "twice", "000000"),
        (("",), "lists no id", "list.txt"),
        (range(6), "No image is left to distil", "lists all 6"),
    ],
)
def test_a_list_that_cannot_be(
    lines: tuple[int | str, ...], problem: str, detail: str, write: Callable[..., Path], student: dict[str, Any]
) -> None:
    config = make_config(**student | {"labels_from": write(*lines)})
    with pytest.raises(RecipeError, match=problem) as caught:
        open_dataset(config, open_cache(str(student["cache"])))
    assert detail in caught.value.problem


def test_a_nearly_right_id_is_suggested(write: Callable[..., Path], scenes: str, student: dict[str, Any]) -> None:
    ids = open_split(scenes, "train").ids
    config = make_config(**student | {"labels_from": write(ids[3] + "x")})
    with pytest.raises(RecipeError, match="Unknown id") as caught:
        open_dataset(config, open_cache(str(student["cache"])))
    assert caught.value.fix == f"Did you mean {ids[3]}?"


def test_more_labels_than_there_are(make_cache: Callable[..., Path], student: dict[str, Any], tmp_path: Path) -> None:
    data = "scenes:32x48,train=6,val=3,unlabelled=2"
    cache = open_cache(make_cache(data, "unlabelled"))
    (tmp_path / "list.txt").write_text(f"{cache.ids[0]}\n")
    config = make_config(**student | {"cache": str(cache.path), "labels_from": tmp_path / "list.txt"})
    with pytest.raises(RecipeError, match="lists more labels than there are") as caught:
        open_dataset(config, cache)
    assert "1 of its 1 ids have none" in caught.value.problem


@pytest.mark.parametrize("other", [{"limit_labels": 2}, {"labels": "none"}])
def test_labels_are_chosen_in_one_way(
    other: dict[str, Any], write: Callable[..., Path], student: dict[str, Any]
) -> None:
    with pytest.raises(RecipeError, match="not both"):
        make_config(**student | {"labels_from": write(1)} | other)


def test_a_teacher_of_other_labels_fails(write: Callable[..., Path], student: dict[str, Any], cache: Cache) -> None:
    labels = pack_flags(np.isin(np.arange(6), [*PICKED, 5]))
    training = Training(ids_digest=cache.manifest.dataset.ids_digest, labels=labels)
    teacher = cache.manifest.teacher.model_copy(update={"trainings": (training,)})
    taught = Cache(cache.place, cache.manifest.model_copy(update={"teacher": teacher}), cache.ledger)

    def notes(*listed: int) -> list[str]:
        config = make_config(**student | {"labels_from": write(*listed)})
        return check_teacher(taught, config, open_dataset(config, taught).labels_used)

    assert notes(*PICKED, 5) == []
    with pytest.raises(
        MismatchError, match=r"The teacher saw other labels than the student: --labels-from .*list.txt: 2 labels"
    ) as caught:
        notes(*PICKED)
    assert "2 labels, and the teacher" in str(caught.value)
    assert "train-teacher --labels-from" in caught.value.fix


def test_a_run_does_not_resume_with_another_list(
    write: Callable[..., Path], student: dict[str, Any], tmp_path: Path
) -> None:
    settings = student | {"labels_from": write(*PICKED), "iterations": 1, "val_every": 1}
    train(make_config(**settings), tmp_path / "run")
    write(*PICKED, 2)
    with pytest.raises(RecipeError, match="Cannot resume with other settings") as caught:
        train(make_config(**settings), tmp_path / "run", resume=True)
    assert "the labels of other samples" in str(caught.value)
