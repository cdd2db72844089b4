"""Trust in a teacher, class by class: from a file, and measured beside a plain run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kdcache.data import folds_of, open_split
from kdcache.errors import KDCacheError
from kdcache.evaluate import ConfusionMatrix
from kdcache.models.run import load_run
from kdcache.store import open_cache
from kdcache.train import Observer, make_config, train
from kdcache.train.trust import read_trust, trust_from_run

NAMES = ("sky", "road", "pole")


def test_a_file_names_every_class(tmp_path: Path) -> None:
    (tmp_path / "trust.toml").write_text("sky = 1\nroad = 0.5\npole = 0\n")
    (tmp_path / "trust.json").write_text('{"pole": 0, "road": 0.5, "sky": 1.0}')
    for name in ("trust.toml", "trust.json"):
        assert read_trust(str(tmp_path / name), NAMES) == [1.0, 0.5, 0.0]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("sky = 1\nroad = 1\npoles = 1", "'pole'"),
        ("sky = 1\nroad = 1", "pole"),
        ("sky = -1\nroad = 1\npole = 1", "sky"),
        ("sky = nan\nroad = 1\npole = 1", "sky"),
        ('sky = "much"\nroad = 1\npole = 1', "sky"),
        ("sky = true\nroad = 1\npole = 1", "sky"),
        ("sky", "trust.toml"),
    ],
)
def test_a_file_that_is_wrong_is_refused(content: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "trust.toml"
    path.write_text(content)
    with pytest.raises(KDCacheError, match="--class-trust auto") as caught:
        read_trust(str(path), NAMES)
    assert said in caught.value.received


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
        said = torch.from_numpy(rows["targets/segmentation/values"]).double()[None]
        with torch.inference_mode():
            own = model.eval()(model.normalise(pixels)).logits.double()
        for confusion, logits in zip(confusions, (said, own), strict=True):
            full = torch.nn.functional.interpolate(logits, label.shape, mode="bilinear")
            confusion.update(full[0].argmax(0), label)
    lead = [t - s for t, s in zip(*(confusion.metrics().iou for confusion in confusions), strict=True)]
    expected = [1.0 if np.isnan(value) else float(np.clip(value / 0.05, 0, 1)) for value in lead]
    found = trust_from_run(cache, None, str(plain), torch.device("cpu"))
    assert found == pytest.approx(expected, abs=1e-4)
    assert len(set(found)) > 1


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
            trust_from_run(cache, None, str(run), torch.device("cpu"))
    with pytest.raises(KDCacheError):
        trust_from_run(cache, None, str(tmp_path / "nowhere"), torch.device("cpu"))
