"""Trust in a teacher, class by class: from a file, and measured beside a plain run."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kdcache.data import folds_of, open_split
from kdcache.errors import KDCacheError
from kdcache.metrics import ConfusionMatrix
from kdcache.models.run import load_run
from kdcache.store import Cache, CopyChanges, Records, copy_store, open_cache
from kdcache.store.format.teacher_models import Training
from kdcache.training import Observer, make_config, train
from kdcache.training.class_trust import read_trust, trust_from_run

NAMES = ("sky", "road", "pole")


def test_a_file_names_every_class(tmp_path: Path) -> None:
    (tmp_path / "trust.toml").write_text("sky = 1\nroad = 0.5\npole = 0\n")
    (tmp_path / "trust.json").write_text('{"pole": 0, "road": 0.5, "sky": 1.0}')
    for name in ("trust.toml", "trust.json"):
        assert read_trust(str(tmp_path / name), NAMES) == [1.0, 0.5, 0.0]


def test_a_pipe_is_no_file_of_trust(tmp_path: Path) -> None:
    """A plain read would wait for a writer."""
    os.mkfifo(tmp_path / "trust.toml")
    with pytest.raises(KDCacheError, match="regular file"):
        read_trust(str(tmp_path / "trust.toml"), NAMES)


@pytest.mark.parametrize(
    ("content", "received"),
    [
        ("sky = 1\nroad = 1\npoles = 1", "Did you mean pole?"),
        ("sky = 1\nroad = 1", "pole"),
        ("sky = -1\nroad = 1\npole = 1", "sky"),
        ("sky = nan\nroad = 1\npole = 1", "sky"),
        ('sky = "much"\nroad = 1\npole = 1', "sky"),
        ("sky = true\nroad = 1\npole = 1", "sky"),
        ("sky", "trust.toml"),
    ],
)
def test_a_file_that_is_wrong_is_refused(content: str, received: str, tmp_path: Path) -> None:
    path = tmp_path / "trust.toml"
    path.write_text(content)
    with pytest.raises(KDCacheError, match="--class-trust auto") as caught:
        read_trust(str(path), NAMES)
    assert received in caught.value.problem


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("trust")


@pytest.fixture
def plain(student: dict[str, Any], folder: Path) -> Path:
    """A run without a teacher and without a third of the samples."""
    run = folder / "plain"
    if not run.exists():
        train(
            make_config(**(student | {"method": "none", "fold": "0/3", "val": None, "iterations": 3, "lr": 1e-3})), run
        )
    return run


def test_trust_is_the_teacher_s_lead_on_what_was_left_out(plain: Path, cache_path: Path, scenes: str) -> None:
    cache, split = open_cache(cache_path), open_split(scenes, "train")
    model, _ = load_run(plain)
    confusions = [ConfusionMatrix(split.classes.names) for _ in range(2)]
    for number in np.flatnonzero(folds_of(cache.ids, 3) == 0).tolist():
        rows = cache.read(number, ["pixels/image", "labels/segmentation", "targets/segmentation/values"])
        label = torch.from_numpy(rows["labels/segmentation"])
        pixels = torch.from_numpy(rows["pixels/image"])[None]
        target = torch.from_numpy(rows["targets/segmentation/values"]).double()[None]
        with torch.inference_mode():
            own = model.eval()(model.normalise(pixels)).logits.double()
        for confusion, logits in zip(confusions, (target, own), strict=True):
            full = torch.nn.functional.interpolate(logits, label.shape, mode="bilinear")
            confusion.update(full[0].argmax(0), label)
    lead = [t - s for t, s in zip(*(confusion.metrics().iou for confusion in confusions), strict=True)]
    expected = [1.0 if np.isnan(value) else float(np.clip(value / 0.05, 0, 1)) for value in lead]
    trust = trust_from_run(Records(cache), str(plain), torch.device("cpu"))
    assert trust == pytest.approx(expected, abs=1e-4)
    assert len(set(trust)) > 1


def test_a_training_says_what_it_trusts(plain: Path, student: dict[str, Any], tmp_path: Path) -> None:
    texts: list[str] = []

    class Notes(Observer):
        def note(self, text: str) -> None:
            texts.append(text)

    settings = student | {"class_trust": "auto", "trust_against": str(plain), "class_balance": "sqrt", "iterations": 2}
    train(make_config(**settings), tmp_path / "run", observer=Notes())
    assert any(text.startswith("trust in the teacher: ") for text in texts)


def test_only_a_plain_run_with_a_fold_can_be_compared(
    plain: Path, student: dict[str, Any], make_cache: Callable[..., Path], tmp_path: Path
) -> None:
    cache = open_cache(student["cache"])
    for changes in ({"method": "none"}, {"method": "kl", "fold": "0/3"}):
        run = tmp_path / changes["method"]
        train(make_config(**(student | changes | {"val": None, "iterations": 1})), run)
        with pytest.raises(KDCacheError, match="--method none --fold"):
            trust_from_run(Records(cache), str(run), torch.device("cpu"))
    with pytest.raises(KDCacheError):
        trust_from_run(Records(cache), str(tmp_path / "nowhere"), torch.device("cpu"))


def with_teacher(cache: Cache, **changes: Any) -> Cache:
    """The store, had its teacher another history."""
    teacher = cache.manifest.teacher.model_copy(update=changes)
    return Cache(cache.place, cache.manifest.model_copy(update={"teacher": teacher}), cache.ledger)


def noted(cache: Cache, run: Path) -> list[str]:
    notes = list[str]()
    trust_from_run(Records(cache), str(run), torch.device("cpu"), notes.append)
    return notes


@pytest.mark.parametrize("fold", [(0, 3), None, (1, 3), (0, 6)])
def test_a_teacher_that_may_have_seen_the_fold(fold: tuple[int, int] | None, plain: Path, cache: Cache) -> None:
    """Half of a third is not all of it."""
    digest = cache.manifest.dataset.ids_digest
    notes = noted(with_teacher(cache, trainings=(Training(ids_digest=digest, fold=fold),)), plain)
    if fold == (0, 3):
        assert notes == []
        return
    seen = "all of these" if fold is None else f"all but fold {fold[0]}/{fold[1]} of these"
    assert len(notes) == 1
    assert f"trained on {seen} samples" in notes[0]
    assert "too generous" in notes[0]
    assert "--fold 0/3" in notes[0]
    assert "--folds K" in notes[0]


def test_a_teacher_of_whom_nothing_is_known(plain: Path, cache: Cache) -> None:
    digest = cache.manifest.dataset.ids_digest
    left_out = Training(ids_digest=digest, fold=(0, 3))
    for trainings in ((), (None,), (Training(ids_digest="0" * 64),), (left_out, None)):
        (text,) = noted(with_teacher(cache, trainings=trainings), plain)
        assert "does not say" in text
        assert "--fold 0/3" in text
    (text,) = noted(with_teacher(cache, trainings=(None, Training(ids_digest=digest))), plain)
    assert "may have seen" in text
    assert noted(with_teacher(cache, folds=3), plain) == [], "each sample's teacher has not seen it"


def test_a_fold_of_sequences_is_no_fold_of_ids(plain: Path, cache: Cache) -> None:
    left_out = Training(ids_digest=cache.manifest.dataset.ids_digest, fold=(0, 3), folds_by="(.)$")
    (text,) = noted(with_teacher(cache, trainings=(left_out,)), plain)
    assert "trained on all but fold 0/3 by (.)$ of these samples" in text
    recipe = plain / "recipe.toml"
    content = recipe.read_text()
    recipe.write_text(f'folds-by = "(.)$"\n{content}')
    try:
        assert noted(with_teacher(cache, trainings=(left_out,)), plain) == []
        (text,) = noted(with_teacher(cache, trainings=(left_out.model_copy(update={"folds_by": None}),)), plain)
        assert "--fold 0/3 --folds-by '(.)$'" in text
    finally:
        recipe.write_text(content)


def test_a_half_left_out_is_two_quarters() -> None:
    half = Training(ids_digest="", fold=(1, 2))
    assert [half.left_out(fold, 4) for fold in range(4)] == [False, True, False, True]
    folds = [folds_of([f"{number}" for number in range(11)], count) for count in (2, 4)]
    assert set(folds[1][folds[0] == 1]) == {1, 3}
    assert not half.left_out(1, 3)


def test_without_a_listener_the_log_is_told(plain: Path, cache: Cache, caplog: pytest.LogCaptureFixture) -> None:
    trust_from_run(Records(cache), str(plain), torch.device("cpu"))
    assert "does not say whether its teacher" in caplog.text


def test_a_fold_of_other_samples_is_refused(
    plain: Path, settings: dict[str, Any], student: dict[str, Any], cache: Cache, tmp_path: Path
) -> None:
    others = tmp_path / "others"
    more = {"data": "scenes:32x48,train=8", "fold": "0/3", "val": None, "iterations": 1}
    train(make_config(**(settings | more)), others)
    copy_store(cache, tmp_path / "part", CopyChanges(samples=range(5)))
    part = open_cache(tmp_path / "part")
    for store, run in ((cache, others), (part, plain)):
        with pytest.raises(KDCacheError, match="on other samples") as caught:
            noted(store, run)
        assert str(run) in caught.value.problem
        assert f"--cache {store.place} --method none --fold 0/3" in caught.value.fix
    own = tmp_path / "own"
    train(make_config(**(student | more | {"data": None, "method": "none", "cache": str(part.place)})), own)
    noted(part, own)


def test_a_run_from_the_data_or_another_store_of_it(
    settings: dict[str, Any], student: dict[str, Any], cache: Cache, make_cache: Callable[..., Path], tmp_path: Path
) -> None:
    cross_fitted = with_teacher(cache, folds=3)
    short = {"method": "none", "fold": "0/3", "val": None, "iterations": 1}
    train(make_config(**(settings | short)), tmp_path / "folder")
    assert noted(cross_fitted, tmp_path / "folder") == []
    other = make_cache(top_k=2)
    train(make_config(**(student | short | {"cache": str(other)})), tmp_path / "store")
    assert noted(cross_fitted, tmp_path / "store") == []
    other.rename(tmp_path / "moved.zarr")
    (text,) = noted(cross_fitted, tmp_path / "store")
    assert "cannot tell whether" in text
    assert str(other) in text


def test_crops_are_refused_in_words_of_their_own(plain: Path, make_cache: Callable[..., Path]) -> None:
    crops = open_cache(make_cache(crop=(16, 24), views=2))
    with pytest.raises(KDCacheError, match="a cache of crops") as caught:
        noted(crops, plain)
    assert "--augment" not in str(caught.value)
    assert "--class-trust FILE" in caught.value.fix
