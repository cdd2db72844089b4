"""Evaluation at the labels' own size, against the same thing written out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from kdcache.data import Split, open_split
from kdcache.errors import DataError
from kdcache.metrics import ConfusionMatrix, Metrics, evaluate_model
from kdcache.models import SegmentationModel

SIZE = (32, 48)


def direct(model: SegmentationModel, split: Split, *, at_size: bool) -> Metrics:
    """Pillow's resize, one image at a time, bilinear logits, argmax."""
    confusion = ConfusionMatrix(split.classes.names)
    model.eval()
    for index in range(len(split)):
        label = split.label(index)
        if label is None:
            continue
        small = Image.fromarray(split.image(index)).resize(SIZE[::-1], Image.Resampling.BILINEAR)
        if at_size:
            rows, columns = (((np.arange(n) + 0.5) * m / n).astype(int) for n, m in zip(SIZE, label.shape, strict=True))
            label = label[rows][:, columns]
        with torch.inference_mode():
            logits = model(model.normalise(torch.from_numpy(np.array(small))[None])).logits
            full = F.interpolate(logits, label.shape, mode="bilinear", align_corners=model.align_corners)
        confusion.update(full[0].argmax(0), torch.from_numpy(label))
    return confusion.metrics()


def same(one: Metrics, two: Metrics) -> bool:
    """Rounding may turn a pixel in a tie: one in ten thousand is allowed."""
    return one.label_pixels == two.label_pixels and np.allclose(one.iou, two.iou, atol=2e-3, equal_nan=True)


@pytest.mark.parametrize("at_size", [False, True])
@pytest.mark.parametrize("batch_size", [1, 2, 5, 8])
def test_scores_are_those_of_the_direct_way_at_every_batch_size(
    model: SegmentationModel, split: Split, at_size: bool, batch_size: int
) -> None:
    found = evaluate_model(model, split, SIZE, batch_size=batch_size, at_size=at_size)
    assert same(found, direct(model, split, at_size=at_size))
    assert found.class_names == split.classes.names
    assert np.isnan(found.acc[4])
    pixels = (
        5 * SIZE[0] * SIZE[1] if at_size else sum(split.image(i).shape[0] * split.image(i).shape[1] for i in range(5))
    )
    assert 0.8 * pixels < sum(found.label_pixels) < pixels


def test_threads_change_nothing(model: SegmentationModel, split: Split) -> None:
    results = [evaluate_model(model, split, SIZE, threads=threads) for threads in (0, 1, 3)]
    assert all(np.array_equal(r.iou, results[0].iou, equal_nan=True) for r in results)


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_put_back_and_nothing_is_learnt(model: SegmentationModel, split: Split, training: bool) -> None:
    model.train(training)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    evaluate_model(model, split, SIZE)
    assert all(module.training is training for module in model.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    model.train(True)
    pixels = torch.zeros(2, 32, 32, 3, dtype=torch.uint8)
    model(model.normalise(pixels)).logits.sum().backward()  # nothing of inference mode stays behind


def test_the_mode_is_put_back_after_an_error(model: SegmentationModel, split: Split) -> None:
    def stop(done: int, total: int) -> None:
        raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        evaluate_model(model.train(), split, SIZE, progress=stop)
    assert model.training


def test_progress_counts_labelled_images(model: SegmentationModel, split: Split) -> None:
    seen: list[tuple[int, int]] = []
    evaluate_model(model, split, SIZE, batch_size=2, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(2, 5), (4, 5), (5, 5)]


def test_without_labels_there_is_nothing_to_evaluate(model: SegmentationModel) -> None:
    with pytest.raises(DataError, match="none of the 3 images"):
        evaluate_model(model, open_split("scenes:32x48,unlabelled=3", "unlabelled"), SIZE)


def test_a_broken_image_is_named(model: SegmentationModel, folder: Path, tmp_path: Path) -> None:
    import shutil

    root = Path(shutil.copytree(folder, tmp_path / "data"))
    (root / "images" / "val" / "3.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"3\.png"):
        evaluate_model(model, open_split(str(root), "val"), SIZE)
