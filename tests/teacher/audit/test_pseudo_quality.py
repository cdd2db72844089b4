"""Pseudo labels beside labels, against counts pixel by pixel."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from kdcache.data import open_split
from kdcache.store import Records, open_cache
from kdcache.teacher import build_cache
from kdcache.teacher.audit.audit import THRESHOLDS, audit_cache
from kdcache.teacher.audit.pseudo_labels import Rule, export_pseudo_labels
from kdcache.teacher.audit.pseudo_quality import PseudoCounts, PseudoQuality


def oracle(pseudo: np.ndarray, label: np.ndarray, classes: int) -> tuple[list[float], list[float], list[float]]:
    """Kept, precision and IoU of every class, from masks; NaN of nothing."""
    labelled, has = label != 255, (label != 255) & (pseudo != 255)
    kept, precision, iou = [], [], []
    for c in range(classes):
        right = (has & (pseudo == c) & (label == c)).sum()
        kept.append(ratio((has & (label == c)).sum(), (labelled & (label == c)).sum()))
        precision.append(ratio(right, (has & (pseudo == c)).sum()))
        iou.append(ratio(right, (has & ((pseudo == c) | (label == c))).sum()))
    return kept, precision, iou


def ratio(part: int, whole: int) -> float:
    return part / whole if whole else float("nan")


def check(quality: PseudoQuality, pseudo: np.ndarray, label: np.ndarray, classes: int) -> None:
    kept, precision, iou = oracle(pseudo, label, classes)
    np.testing.assert_allclose(quality.kept, kept)
    np.testing.assert_allclose(quality.precision, precision)
    np.testing.assert_allclose(quality.metrics.iou, iou)
    occur = [value for value in iou if value == value]
    assert quality.metrics.miou == pytest.approx(sum(occur) / len(occur) if occur else float("nan"), nan_ok=True)
    has = (label != 255) & (pseudo != 255)
    assert quality.total_kept == pytest.approx(ratio(has.sum(), (label != 255).sum()), nan_ok=True)
    assert quality.metrics.aacc == pytest.approx(ratio((has & (pseudo == label)).sum(), has.sum()), nan_ok=True)


@given(st.integers(0, 2**32 - 1), st.integers(2, 6))
def test_thresholds_keep_what_reaches_them(seed: int, classes: int) -> None:
    rng = np.random.default_rng(seed)
    thresholds = (0.25, 0.5, 0.75)
    counts = PseudoCounts([f"c{i}" for i in range(classes)], thresholds)
    argmax, label = (rng.integers(0, classes, (2, 5, 7)) for _ in range(2))
    label[rng.random(label.shape) < 0.3] = 255
    confidence = (rng.integers(0, 9, argmax.shape) / 8).astype(np.float16)
    inside = rng.random(argmax.shape) < 0.8
    for one in range(2):
        counts.update(argmax[one], confidence[one], label[one], inside[one])
    truth = np.where(inside, label, 255)
    for number, threshold in enumerate(thresholds):
        check(counts.quality(number), np.where(confidence >= threshold, argmax, 255), truth, classes)


def test_the_audit_judges_the_pixels_that_an_export_writes(tmp_path, teacher, folder_data, options) -> None:
    """View size is the labels' own here."""
    (folder_data / "labels" / "train" / "train-000001.png").unlink()
    split = open_split(folder_data, "train")
    size = split.label(0).shape
    build_cache(split, teacher, tmp_path / "s.zarr", options(size=size))
    records = Records(open_cache(tmp_path / "s.zarr"), split)
    audit = audit_cache(records)
    for threshold in (0.5, 0.6):
        out = tmp_path / f"out-{threshold}"
        export_pseudo_labels(records, out, Rule(threshold=threshold))
        assert audit.labelled == len(split) - 1
        labelled = [i for i in range(len(split)) if split.has_label(i)]
        files = [np.asarray(Image.open(out / "labels/train" / f"{split.ids[i]}.png")) for i in labelled]
        truth = np.stack([split.label(i) for i in labelled])
        quality = audit.quality[THRESHOLDS.index(threshold)]
        check(quality, np.stack(files), truth, len(split.classes))
    at = audit.to_json()["pseudo_labels"][0]
    assert at["beside_labels"]["precision"] == pytest.approx(at["precision"])
