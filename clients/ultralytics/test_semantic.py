"""YOLO26-sem as teacher and student, judged by Ultralytics' own validator on images of the labels' size."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from ultralytics import SETTINGS, YOLO

import kdcache
from kdcache.data import open_split
from kdcache.errors import MismatchError
from kdcache.metrics import Inference
from kdcache.metrics.evaluate import count_pixels
from kdcache.model_table import list_models
from kdcache.models import SegmentationModel, build_model, trusting
from kdcache.models.export import export_model
from kdcache.run_folder import RunModel
from kdcache.teacher import load_teacher

SIZE = (96, 128)
pytestmark = pytest.mark.timeout(1800)  # a fresh environment compiles all kernels


def check_equal(of: Any, model: SegmentationModel, checkpoint: Path) -> int:
    """Compare Ultralytics' confusion matrix and mIoU with kdcache's; returns the number of predicted classes."""
    split = open_split(of.named, "val")
    counts = count_pixels(model, split, Inference(of.size, threads=1))
    theirs = of.validated(checkpoint)
    ours = counts.metrics()
    moved = (theirs.matrix.long() - counts.counts).abs().sum().item() / 2
    assert moved <= 1e-4 * counts.counts.sum().item()
    assert abs(theirs.miou - ours.miou) <= 5e-4
    return int((counts.counts.sum(0) > 0).sum())


def test_a_teacher_is_read_as_ultralytics_reads_it(semantic: Any) -> None:
    with trusting():
        teacher = load_teacher(f"ultralytics:{semantic.teacher}", open_split(semantic.named, "train"))
    assert teacher.size == (128, 128)
    assert (teacher.model.mean, teacher.model.std) == ((0, 0, 0), (1, 1, 1))
    assert any("model.17.aux_head.1.weight" in note for note in teacher.notes)
    assert check_equal(semantic, teacher.model, semantic.teacher) >= 4


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("method", ["kl", "dist"])
def test_a_student_scores_the_same_in_both(semantic: Any, method: str, tmp_path: Path) -> None:
    run = semantic.student(tmp_path / "run", "ultralytics:yolo26n-sem", method, 100)
    done = kdcache.export(run, tmp_path / "best.pt")
    assert (done.notes, done.checked_by) == ((), "ultralytics")
    assert check_equal(semantic, kdcache.load_run(run)[0], tmp_path / "best.pt") >= 2
    net = YOLO(tmp_path / "best.pt")
    assert net.task == "semantic"
    assert tuple(net.names.values()) == open_split(semantic.named, "val").classes.names
    image = sorted((semantic.data.parent / "images" / "val").iterdir())[0]
    (found,) = net.predict(image, imgsz=max(semantic.size), device="cpu", verbose=False, project=tmp_path)
    kdcache.predict(run, [image], tmp_path / "predicted", progress=False)
    ours = np.asarray(Image.open(next((tmp_path / "predicted" / "labels").rglob("*.png"))))
    assert (found.semantic_mask.data.numpy() != ours).mean() <= 1e-4
    assert Path(net.export(format="torchscript", imgsz=semantic.size, device="cpu")).is_file()


def test_a_training_begins_with_a_checkpoint(semantic: Any) -> None:
    with trusting():
        model = build_model("ultralytics:yolo26s-sem", 7, weights=f"ultralytics:{semantic.teacher}", strict_head=False)
    assert model.load_report is not None
    assert model.load_report.reinitialised == ()
    assert model.load_report.class_names == open_split(semantic.named, "val").classes.names
    image_13HW = torch.rand(1, 3, *SIZE, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = YOLO(semantic.teacher).model.float().eval()(image_13HW)
        assert torch.equal(model.eval()(image_13HW).logits, expected)


def test_published_weights_are_looked_for_where_ultralytics_keeps_them(tmp_path: Path) -> None:
    before = SETTINGS["weights_dir"]
    network = YOLO("yolo26n-sem.yaml")
    network.model.names = dict(enumerate(f"kind {number}" for number in range(19)))
    network.save(tmp_path / "yolo26n-sem.pt")
    SETTINGS["weights_dir"] = str(tmp_path)
    try:
        for spec in ("ultralytics:yolo26n-sem@default", "ultralytics:yolo26n-sem.pt"):
            with trusting():
                teacher = load_teacher(spec, list(network.model.names.values()))
            weight = network.model.model[0].conv.weight.half().float()  # as a file has it
            assert torch.equal(teacher.model.state_dict()["model.0.conv.weight"], weight)
    finally:
        SETTINGS["weights_dir"] = before


def test_another_normalisation_is_folded_and_said(tmp_path: Path) -> None:
    torch.manual_seed(0)
    moments = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
    model = build_model("ultralytics:yolo26n-sem", 3, **moments)
    names, colours = ("a", "b", "c"), ((1, 1, 1), (2, 2, 2), (3, 3, 3))
    about = RunModel(spec=model.spec, class_names=names, class_colours=colours, size=SIZE, **moments)
    done = export_model(model, about, tmp_path / "best.pt")
    assert "folded into the first convolution" in done.notes[0]
    assert done.relative < 1e-4
    image_13HW = torch.rand(1, 3, *SIZE, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        given = model.eval()(model.standardise(image_13HW)).logits
        answer = YOLO(tmp_path / "best.pt").model.float().eval()(image_13HW)
    assert (answer - given).abs().median() < 0.05 * given.std()


def test_classes_in_another_order_are_seen(semantic: Any, tmp_path: Path) -> None:
    lines = semantic.data.read_text().splitlines()
    lines[-2:] = [f"  5: {lines[-1].split()[1]}", f"  6: {lines[-2].split()[1]}"]
    (tmp_path / "other.yaml").write_text("\n".join(lines))
    with trusting(), pytest.raises(MismatchError, match="another order"):
        load_teacher(f"ultralytics:{semantic.teacher}", open_split(f"ultralytics:{tmp_path / 'other.yaml'}", "train"))


def test_margins_are_grey_as_in_a_letterbox() -> None:
    from kdcache.data.rendering.view import OUTSIDE_RGB

    pixels_BHW3 = torch.full((1, 64, 64, 3), 200, dtype=torch.uint8)
    pixels_BHW3[:, :5] = pixels_BHW3[:, -7:] = pixels_BHW3[:, 30, 30] = torch.tensor(OUTSIDE_RGB, dtype=torch.uint8)
    x_B3HW = build_model("ultralytics:yolo26n-sem", 2).normalise(pixels_BHW3) * 255
    assert x_B3HW[0, :, 4, 9].round().tolist() == x_B3HW[0, :, -7, 0].round().tolist() == [114] * 3
    assert x_B3HW[0, :, 30, 30].round().tolist() == list(OUTSIDE_RGB)
    assert x_B3HW[0, :, 5, 9].round().tolist() == [200] * 3


def test_the_table_of_models_has_them_as_they_are() -> None:
    for info in list_models("ultralytics:yolo26n-"):
        model = build_model(info.spec, 21)
        assert (model.taps, tuple(model.head_kinds)) == (tuple(info.taps), info.heads)
        assert sum(p.numel() for p in model.parameters()) == info.parameters
