"""Labels and folds that a run goes without, and its teacher did not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kdcache.data import Fold, folds_of, open_split, write_scenes
from kdcache.errors import CorruptError, MismatchError
from kdcache.store import Cache, inspect_store, open_cache
from kdcache.store.format.flags import pack_flags, unpack_flags
from kdcache.store.format.manifest import Manifest
from kdcache.store.format.teacher_models import Training
from kdcache.tasks import DEPTH, SEGMENTATION
from kdcache.teacher import BuildOptions, build_cache, load_teacher, load_teachers
from kdcache.training import Observer, make_config, train
from kdcache.training.input.subset import Part
from kdcache.training.leakage import check_teacher
from kdcache.training.sources import open_dataset

Notes = Callable[..., list[str]]
SAMPLES = 6


def first(count: int, ids: list[str]) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """The samples that --limit-samples COUNT and --limit-labels COUNT take."""
    return np.isin(np.arange(len(ids)), sorted(Part(samples=count).choose(ids).samples))


@pytest.fixture
def taught(cache: Cache) -> Callable[..., Cache]:
    """The store, had its teacher been trained on the labels of its first so many samples; None for unknown ones."""

    def make(count: int | None, digest: str | None = None, **changes: Any) -> Cache:
        labels = None if count is None else pack_flags(first(count, list(cache.ids)))
        digest = cache.manifest.dataset.ids_digest if digest is None else digest
        return with_trainings(cache, Training(ids_digest=digest, **{"labels": labels, **changes}))

    return make


def with_trainings(cache: Cache, *trainings: Training | None) -> Cache:
    teacher = cache.manifest.teacher.model_copy(update={"trainings": trainings})
    return Cache(cache.place, cache.manifest.model_copy(update={"teacher": teacher}), cache.ledger)


@pytest.fixture
def notes(student: dict[str, Any]) -> Notes:
    """What a distillation from a store is warned of, with some settings changed."""

    def check(cache: Cache, **changes: Any) -> list[str]:
        config = make_config(**(student | changes))
        return check_teacher(cache, config, open_dataset(config, cache).labels_used)

    return check


@pytest.mark.parametrize("changes", [{}, {"limit_samples": 4}, {"fold": "0/3"}, {"augment": "replay"}])
def test_a_teacher_of_more_labels_is_refused(
    changes: dict[str, Any], taught: Callable[..., Cache], notes: Notes
) -> None:
    with pytest.raises(MismatchError, match="The teacher saw other labels than the student") as caught:
        notes(taught(SAMPLES), limit_labels=2, **changes)
    fold = "fold" in changes
    assert f"--limit-labels 2: 2 labels, and the teacher of {taught(1).place} was trained" in caught.value.problem
    assert f"on labels of {2 if fold else 4} more" in caught.value.problem
    assert "train-teacher --limit-samples 2" + " --fold 0/3" * fold + "," in caught.value.fix
    assert "--teacher labels" in caught.value.fix


def test_a_share_is_met_by_a_number(taught: Callable[..., Cache], notes: Notes) -> None:
    with pytest.raises(MismatchError, match="The teacher saw other labels than the student") as caught:
        notes(taught(SAMPLES), limit_labels=0.5)
    assert "--limit-samples 3," in caught.value.fix
    assert notes(taught(3), limit_labels=0.5) == []


def test_a_teacher_of_the_same_labels_or_fewer(taught: Callable[..., Cache], notes: Notes) -> None:
    assert [notes(taught(count), limit_labels=2) for count in (1, 2)] == [[], []]
    assert notes(taught(SAMPLES)) == [], "all labels are used"
    assert notes(taught(SAMPLES), limit_labels=SAMPLES) == []


def test_other_labels_are_more_labels(cache: Cache, taught: Callable[..., Cache], notes: Notes) -> None:
    """A teacher of as many labels, of other samples, is refused too."""
    labels = pack_flags(~first(4, list(cache.ids)))
    with pytest.raises(MismatchError, match="The teacher saw other labels than the student"):
        notes(taught(2, labels=labels), limit_labels=2)


@pytest.mark.parametrize("changes", [{"method": "none"}, {"method": "dist", "teacher": "labels"}])
def test_without_targets_nothing_is_checked(
    changes: dict[str, Any], taught: Callable[..., Cache], notes: Notes
) -> None:
    assert notes(taught(SAMPLES), limit_labels=2, fold="0/3", **changes) == []


def test_one_of_several_teachers_is_enough(cache: Cache, taught: Callable[..., Cache], notes: Notes) -> None:
    trainings = [taught(count).manifest.teacher.trainings[0] for count in (2, SAMPLES)]
    with pytest.raises(MismatchError, match="of 4 more"):
        notes(with_trainings(cache, None, *trainings), limit_labels=2)


def test_a_teacher_of_unknown_labels_is_noted(cache: Cache, taught: Callable[..., Cache], notes: Notes) -> None:
    for unknown in (taught(None), with_trainings(cache), with_trainings(cache, None)):
        (text,) = notes(unknown, limit_labels=2)
        assert "does not say which labels its teacher was trained on" in text
        assert "what 2 labels can do" in text
        assert notes(unknown) == []


def test_a_teacher_of_other_samples_is_not(taught: Callable[..., Cache], notes: Notes) -> None:
    assert notes(taught(SAMPLES, digest="0" * 64), limit_labels=2, fold="0/3") == []


def test_labels_of_other_samples_are_damage(cache: Cache, taught: Callable[..., Cache], notes: Notes) -> None:
    with pytest.raises(CorruptError, match="which samples had labels") as caught:
        notes(taught(2, labels=pack_flags(np.ones(600, np.bool_))), limit_labels=2)
    assert str(cache.place) in caught.value.problem


@pytest.mark.parametrize(
    ("count", "fold", "seen"),
    [
        (SAMPLES, None, "all of these samples"),
        (SAMPLES - 1, None, "the labels of 5 of these samples"),
        (None, None, "all of these samples"),
        (None, (1, 3), "all but fold 1/3 of these samples"),
        (None, (0, 3), None),
        (SAMPLES, (0, 3), None),
    ],
)
def test_a_fold_that_the_teacher_has_seen_is_noted(
    count: int | None, fold: tuple[int, int] | None, seen: str | None, taught: Callable[..., Cache], notes: Notes
) -> None:
    texts = notes(taught(count, fold=fold), fold="0/3")
    assert len(texts) == (0 if seen is None else 1)
    for text in texts:
        assert f"trained on {seen}" in text
        assert "train the teacher with --fold 0/3 and build" in text


def test_a_fold_whose_labels_the_teacher_had_not(cache: Cache, taught: Callable[..., Cache], notes: Notes) -> None:
    assert notes(taught(None, labels=pack_flags(folds_of(cache.ids, 3) != 0)), fold="0/3") == []


def test_labels_that_only_the_fold_has_are_noted(cache: Cache, taught: Callable[..., Cache], notes: Notes) -> None:
    """The student's score is too high; it has as many labels to learn from as it claims."""
    labels = (folds_of(cache.ids, 3) == 0) | first(1, list(cache.ids))
    config = {"fold": "0/3", "limit_labels": 3}
    (text,) = notes(taught(None, labels=pack_flags(labels)), **config)
    assert "may have seen fold 0/3" in text


@pytest.fixture
def stored(settings: dict[str, Any], tmp_path: Path) -> Callable[..., Cache]:
    """Trains a teacher and builds its store, on one data set or on two."""

    def make(data: Path, built_of: Path | None = None, **changes: Any) -> Cache:
        run = tmp_path / "teacher"
        train(make_config(**(settings | {"data": str(data), "val": None, "iterations": 1} | changes)), run)
        split = open_split(built_of or data, "train")
        teacher = load_teacher(str(run), split.classes)
        build_cache(split, teacher, tmp_path / "s.zarr", BuildOptions(size=(32, 48), views=1))
        return open_cache(tmp_path / "s.zarr")

    return make


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_scenes(tmp_path / "data", "scenes:32x48,train=6,val=1")


def without_labels(data: Path, *, but: int) -> Path:
    """A copy of the data set that has labels for some of its images."""
    few = write_scenes(data.parent / "few", "scenes:32x48,train=6,val=1")
    for path in sorted((few / "labels/train").iterdir())[but:]:
        path.unlink()
    return few


def test_a_store_knows_how_many_labels_its_teacher_had(
    stored: Callable[..., Cache], data: Path, student: dict[str, Any], tmp_path: Path
) -> None:
    cache = stored(data, limit_samples=2)
    few = student | {"cache": str(cache.place), "val": None, "iterations": 1}
    texts = list[str]()

    class Noted(Observer):
        def note(self, text: str) -> None:
            texts.append(text)

    train(make_config(**few, limit_labels=2), tmp_path / "run", observer=Noted())
    assert not [text for text in texts if "its teacher" in text]
    with pytest.raises(MismatchError, match="The teacher saw other labels than the student"):
        train(make_config(**few, limit_labels=1), tmp_path / "fewer")
    assert not (tmp_path / "fewer").exists()


def test_labels_that_the_store_lacks(stored: Callable[..., Cache], data: Path, notes: Notes) -> None:
    """A teacher of the same images had them all."""
    cache = stored(data, without_labels(data, but=2))
    with pytest.raises(MismatchError, match="The teacher saw other labels than the student") as caught:
        notes(cache)
    assert caught.value.problem.startswith("The teacher saw other labels than the student: 2 labels, and")
    assert "4 more of its samples (train-000002" in caught.value.problem
    assert "the data set as it was when the cache was built" in caught.value.fix
    assert notes(cache, method="none") == []
    (training,) = cache.manifest.teacher.trainings
    assert training is not None
    (text,) = notes(with_trainings(cache, training.model_copy(update={"labels": None})))
    assert "does not say which labels" in text
    assert notes(with_trainings(cache, None)) == [], "images without labels usually have a teacher from elsewhere"


def test_labels_that_the_teacher_lacked_too(stored: Callable[..., Cache], data: Path, notes: Notes) -> None:
    few = without_labels(data, but=2)
    assert notes(stored(few)) == []


def test_a_teacher_of_two_tasks_learnt_from_no_more_samples_than_have_a_label_of_either(
    make_cache: Callable[..., Path], notes: Notes
) -> None:
    """Half of the samples have classes, the others depth: none is without a label."""
    cache = open_cache(make_cache("scenes:32x48,train=6,val=2,depth=exact,tasks=halves"))
    assert cache.labelled[SEGMENTATION].sum() == cache.labelled[DEPTH].sum() == 3
    training = Training(ids_digest=cache.manifest.dataset.ids_digest, labels=pack_flags(np.ones(6, np.bool_)))
    assert notes(with_trainings(cache, training)) == []


def test_every_stream_of_a_teacher_counts(settings: dict[str, Any], data: Path, tmp_path: Path, notes: Notes) -> None:
    """A student cannot go without labels that one stream of its teacher had, though the others had none of them."""
    others, teacher = "scenes:32x48,train=5,val=2", str(tmp_path / "teacher")
    streams: list[dict[str, Any]] = [
        {"name": "others", "data": others, "share": 0.5},
        {"name": "few", "data": str(data), "fold": "1/3", "limit_labels": 2},
        {"name": "bare", "data": str(data), "labels": "none", "method": "entropy"},
    ]
    changes = {"data": None, "batch_size": 4, "stream": streams, "iterations": 1, "val": None}
    train(make_config(**settings | changes), tmp_path / "teacher")
    split = open_split(str(data), "train")
    trainings = load_teacher(teacher, split.classes).trainings
    digests = [open_split(others, "train").digest(), split.digest(), split.digest()]
    assert [training and training.ids_digest for training in trainings] == digests
    assert [training and training.fold for training in trainings] == [None, (1, 3), None]
    build_cache(split, load_teacher(teacher, split.classes), tmp_path / "store", BuildOptions(size=(32, 48)))
    cache = open_cache(tmp_path / "store")
    assert cache.manifest.teacher.trainings == trainings
    few = Part(labels=2, without=Fold(1, 3, None)).choose(cache.ids).labelled
    labels = [unpack_flags(training.labels, SAMPLES, "") for training in trainings if training and training.labels]
    assert [set(np.flatnonzero(flags)) for flags in labels[1:]] == [few, set()]
    assert notes(cache, limit_labels=2, fold="1/3") == []
    with pytest.raises(MismatchError, match="The teacher saw other labels than the student") as caught:
        notes(cache, limit_labels=1, fold="1/3")
    assert "labels of 1 more" in caught.value.problem


def test_the_teacher_of_a_stream_s_store_is_not_known(
    student: dict[str, Any], cache_path: Path, data: Path, tmp_path: Path
) -> None:
    streams = [f"taught,cache={cache_path},share=0.5,method=kl", f"labelled,data={data}"]
    changes = {"cache": None, "method": "auto", "batch_size": 2, "stream": streams, "iterations": 1, "val": None}
    train(make_config(**student | changes | {"size": "32x48"}), tmp_path / "run")
    split = open_split(str(data), "train")
    *seen, unknown = load_teacher(str(tmp_path / "run"), split.classes).trainings
    assert unknown is None
    digests = [open_cache(cache_path).manifest.dataset.ids_digest, split.digest()]
    assert [training and training.ids_digest for training in seen] == digests


def test_a_store_names_the_stores_that_its_teacher_learnt_from(
    student: dict[str, Any], settings: dict[str, Any], cache_path: Path, data: Path, tmp_path: Path
) -> None:
    """Of streams and of one store; of a store whose labels alone were learnt from nothing is a student's."""
    taught = f"taught,cache={cache_path},share=0.5,method=kl"
    streams = {
        "streams": [taught, f"labelled,data={data}"],
        "twice": [taught, taught.replace("taught,", "again,")],
        "labels": [taught.replace("method=kl", "method=none"), f"labelled,data={data}"],
        "weightless": [f"{taught},weight=0", f"labelled,data={data}"],
    }
    common = {"iterations": 1, "val": None, "batch_size": 2, "size": "32x48"}
    for name, lines in streams.items():
        train(make_config(**student | {"cache": None, "method": "auto", "stream": lines} | common), tmp_path / name)
    train(make_config(**student | {"method": "kl"} | common), tmp_path / "alone")
    train(make_config(**settings | common), tmp_path / "plain")
    split, ledger = open_split(str(data), "train"), open_cache(cache_path).ledger
    assert ledger is not None
    seal = (ledger.completion.digest,)
    for name, parents in {"streams": seal, "twice": seal, "alone": seal}.items() | {
        (name, ()) for name in ("labels", "weightless", "plain")
    }:
        assert load_teacher(str(tmp_path / name), split.classes).parents == parents, name
    teachers = load_teachers([str(tmp_path / name) for name in ("plain", "alone", "streams")], split.classes)
    build_cache(split, teachers, tmp_path / "child", BuildOptions(size=(32, 48)))
    child = open_cache(tmp_path / "child").manifest
    assert child.teacher.parents == seal
    orphan = child.model_copy(update={"teacher": child.teacher.model_copy(update={"parents": ()})})
    assert orphan.differences(child) == []
    assert "parents" not in orphan.to_json()["teacher"]
    assert Manifest.model_validate_json(json.dumps(orphan.to_json())) == orphan
    assert ("parents", f"the teacher is a student of {seal[0]}") in inspect_store(tmp_path / "child").facts()
    for wrong in ("x" * 64, "0" * 63):
        content = child.to_json() | {"teacher": child.to_json()["teacher"] | {"parents": [wrong]}}
        with pytest.raises(ValueError, match="parents"):
            Manifest.model_validate_json(json.dumps(content))


def test_a_teacher_of_one_stream_has_the_fold_of_that(settings: dict[str, Any], data: Path, tmp_path: Path) -> None:
    changes = {"data": None, "stream": [f"only,data={data},fold=1/3"], "iterations": 1, "val": None}
    train(make_config(**settings | changes), tmp_path / "teacher")
    (training,) = load_teacher(str(tmp_path / "teacher"), open_split(str(data), "train").classes).trainings
    assert training is not None
    assert training.fold == (1, 3)
