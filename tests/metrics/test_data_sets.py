"""One model on several data sets: classes that are shared, and means over them."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from kdcache.data import ClassList, Split, classes_by_name, open_split
from kdcache.metrics import ConfusionMatrix, Inference, OnDataSet, TaskMetrics, evaluate_tasks, iou_listing
from kdcache.metrics.confusion import mean_of
from kdcache.metrics.data_sets import class_table, common_classes, data_sets_markdown, listing
from kdcache.models import SegmentationModel

CLASSES = ("road", "car", "sky", "tree", "never")


def other_folder(folder: Path, root: Path) -> Path:
    """The same images with the classes in another order and case, one unknown and two lacking; returns the folder."""
    (root / "labels" / "val").mkdir(parents=True)
    (root / "images").symlink_to(folder / "images")
    (root / "classes.txt").write_text("Sky\nlamp\nroad")
    new_id = np.full(256, 255, np.uint8)
    new_id[[0, 2, 1]] = (2, 0, 1)  # road, sky; a car is a lamp here
    for path in (folder / "labels" / "val").iterdir():
        Image.fromarray(new_id[np.array(Image.open(path))]).save(root / "labels" / "val" / path.name)
    return root


def test_predictions_of_other_classes_are_misses(model: SegmentationModel, folder: Path, tmp_path: Path) -> None:
    whole = open_split(other_folder(folder, tmp_path), "val")
    joined = classes_by_name(whole, ClassList(CLASSES))
    result = OnDataSet.of(joined, evaluate_tasks(model, joined, Inference((64, 64))))
    metrics = result.metrics.segmentation
    assert metrics is not None
    assert metrics.images is not None
    assert (metrics.class_names, result.missing, result.void) == (("road", "sky"), ("car", "tree", "never"), ("lamp",))
    # Independent: pixel by pixel, from the predictions for the folder with the model's own classes.
    own = open_split(folder, "val")
    hits, unions = np.zeros(2), np.zeros(2)
    for index in range(len(own)):
        if own.has_label(index):
            predicted, label = prediction(model, own, index), own.label(index)
            counted = (label == 0) | (label == 2)
            for place, number in enumerate((0, 2)):
                answered, labelled = (predicted == number) & counted, (label == number) & counted
                hits[place] += (answered & labelled).sum()
                unions[place] += (answered | labelled).sum()
    np.testing.assert_allclose(metrics.iou, hits / unions)
    assert metrics.miou == pytest.approx((hits / unions).mean())
    np.testing.assert_array_equal(metrics.images.hits.sum(0), hits)
    np.testing.assert_array_equal(metrics.images.unions.sum(0), unions)


def prediction(model: SegmentationModel, split: Split, index: int) -> np.ndarray:
    from kdcache.metrics.predictions import predictions

    return next(iter(predictions(model, split, [index], Inference((64, 64)))))[0].argmax.numpy()


def result(name: str, counts: dict[str, tuple[int, int]], missing: tuple[str, ...] = ()) -> OnDataSet:
    """Metrics with (right, wrong) pixels of each class; wrong ones are predicted as the next class."""
    confusion = ConfusionMatrix(tuple(counts))
    for number, (right, wrong) in enumerate(counts.values()):
        confusion.counts[number, number] += right
        confusion.counts[number, (number + 1) % len(counts)] += wrong
    return OnDataSet(name, "val", TaskMetrics(confusion.metrics()), missing)


def test_each_mean_is_the_mean_of_its_rows() -> None:
    one = result("one", {"road": (90, 10), "car": (5, 5), "sky": (50, 0)})
    two = result("two", {"sky": (30, 30), "road": (40, 20)}, missing=("car",))
    header, rows = class_table([one, two], ("road", "car", "sky"))
    cells = {row[0]: row[1:] for row in rows}
    assert header == ["IoU %", "one, val", "two, val"]
    assert cells["car"][1] == "not shared"
    assert common_classes([one, two]) == ("road", "sky")
    for column in (0, 1):
        values = {name: cells[name][column] for name in ("road", "car", "sky")}
        numbers = [float(value) for value in values.values() if value != "not shared"]
        assert float(cells["mIoU"][column]) == pytest.approx(sum(numbers) / len(numbers), abs=0.006)
        common = [float(values[name]) for name in ("road", "sky")]
        assert float(cells["mIoU, 2 common"][column]) == pytest.approx(sum(common) / 2, abs=0.006)
    for name, shares in (("mAcc", (0.8, 7 / 12)), ("aAcc", (145 / 160, 70 / 120))):
        assert [float(cell) for cell in cells[name]] == pytest.approx([100 * share for share in shares], abs=0.006)
    assert "two has no car" in data_sets_markdown("title", [one, two], ("road", "car", "sky"))
    assert "mIoU, 2 common" not in str(class_table([one, one], ("road", "car", "sky")))


def test_the_listing_is_that_of_the_published_code() -> None:
    """The form of seeds: two digits at most, zeros at the end left out, names padded to twelve."""
    confusion = ConfusionMatrix(("road", "vegetation", "traffic light", "none"))
    confusion.counts[:3, :3] = torch.tensor([[6535, 3465, 0], [0, 651, 0], [0, 0, 0]])
    metrics = confusion.metrics()
    lines = iou_listing(metrics).splitlines()
    assert lines[0] == "===>road:          65.35"
    assert lines[2] == "===>traffic light: nan"
    short = ConfusionMatrix(("road", "vegetation"))
    short.counts[:] = torch.tensor([[1307, 693], [0, 0]])
    assert iou_listing(short.metrics()) == "===>road:       65.35\n===>vegetation: 0.0\n===> mIoU: 32.67\n"
    assert listing([OnDataSet("data", "val", TaskMetrics(metrics))]).startswith("# data, val\n===>road: ")


def test_a_mean_leaves_out_nan() -> None:
    assert mean_of([1.0, math.nan, 3.0]) == 2
    assert math.isnan(mean_of([math.nan]))
