"""A teacher whose head resizes with align_corners=True is read so wherever its targets are resized."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from kdcache.data import Window, open_split, render
from kdcache.models import Outputs, SegmentationModel
from kdcache.store import Records, open_cache
from kdcache.teacher import Teacher, TeacherProbe, build_cache, copied_fidelity, plan_manifest
from kdcache.teacher.audit.audit import audit_cache
from kdcache.teacher.audit.pseudo_labels import Rule, export_pseudo_labels
from kdcache.teacher.audit.topk_error import gradient_errors
from kdcache.teacher.build.fidelity import measure_fidelity

CLASSES = 40


class Coarse(SegmentationModel):
    """2 x 3 logits of an image of 32 x 48, so that the corners matter."""

    def __init__(self, classes: int, align_corners: bool) -> None:
        super().__init__(spec="own:coarse", num_classes=classes, stride=16, taps=(), align_corners=align_corners)
        torch.manual_seed(2)
        self.body = torch.nn.Conv2d(3, classes, 16, 16)
        torch.nn.init.normal_(self.body.weight, std=0.2)

    def forward(self, x_B3HW: Tensor, taps: object = ()) -> Outputs:
        return Outputs({"segmentation": self.body(x_B3HW)}, {})


def coarse(classes: int, align_corners: bool = True) -> Teacher:
    return Teacher(Coarse(classes, align_corners).eval(), "coarse")


@pytest.fixture
def many(tmp_path: Path):
    """Three images and forty classes, nothing labelled."""
    folder = tmp_path / "data/images/train"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(4)
    for number in range(3):
        Image.fromarray(rng.integers(0, 256, (36, 52, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    (tmp_path / "data/classes.txt").write_text("".join(f"class{i} {i} {2 * i} {3 * i}\n" for i in range(CLASSES)))
    return open_split(tmp_path / "data", "train")


@pytest.mark.parametrize("aligned", [True, False])
def test_auto_k_measures_what_the_head_would_say(many, options, monkeypatch, aligned) -> None:
    """On the view's size, by the teacher's own resize; the answer is what the manifest has."""
    asked = []

    def chosen(logits, size, classes, *, align_corners):
        asked.append((tuple(logits.shape), tuple(size), classes))
        return (8 if align_corners else 16), {}

    monkeypatch.setattr("kdcache.teacher.build.manifest.choose_k", chosen)
    manifest = plan_manifest(TeacherProbe(many, coarse(CLASSES, aligned), options(fidelity=False)))
    assert manifest.heads["segmentation"].k == (8 if aligned else 16)
    assert manifest.heads["segmentation"].align_corners is aligned
    assert asked == [((3, CLASSES, 2, 3), (32, 48), CLASSES)]


@pytest.mark.parametrize("views", [1, 3])
def test_what_storing_loses_is_measured_so_too(many, options, views) -> None:
    """On the whole images, also where these are not all views."""
    teacher = coarse(CLASSES)
    found = plan_manifest(TeacherProbe(many, teacher, options(top_k=4, views=views, fidelity=True))).fidelity
    with torch.inference_mode():
        rendered = [np.asarray(many.image(n)) for n in range(3)]
        pixels = [render(image, None, Window.full(36, 52), flip=False, size=(32, 48))[0] for image in rendered]
        logits = [teacher.model(teacher.model.normalise(torch.from_numpy(p)[None])).logits[0] for p in pixels]
    right, wrong = (measure_fidelity(logits, 4, "default", (32, 48), align_corners=how) for how in (True, False))
    assert right != wrong
    assert found.kl_t1 == pytest.approx(right.kl_t1, rel=1e-4)
    assert found.kl_t1 != pytest.approx(wrong.kl_t1, rel=1e-3)


def test_pseudo_labels_are_those_of_the_head(split, options, tmp_path) -> None:
    build_cache(split, coarse(7), tmp_path / "s.zarr", options())
    cache = open_cache(tmp_path / "s.zarr")
    export_pseudo_labels(Records(cache), tmp_path / "out", Rule(threshold=0.3))
    labels = {}
    for aligned in (True, False):
        rows = [cache.read(n, ["targets/segmentation/values"])["targets/segmentation/values"] for n in range(7)]
        up = F.interpolate(torch.from_numpy(np.stack(rows)).double(), (32, 48), mode="bilinear", align_corners=aligned)
        sure, said = up.softmax(1).max(1)
        labels[aligned] = torch.where(sure >= 0.3, said, 255).numpy()
    written = np.stack([np.asarray(Image.open(tmp_path / f"out/labels/train/{name}.png")) for name in cache.ids])
    assert (written == labels[True]).mean() > 0.999
    assert (written == labels[False]).mean() < 0.97


@pytest.mark.parametrize("aligned", [True, False])
def test_a_copy_and_an_audit_are_judged_so_too(split, options, tmp_path, aligned) -> None:
    """The audit on the whole images, also where these are not all views."""
    build_cache(split, coarse(7, aligned), tmp_path / "s.zarr", options(views=2, fidelity=True))
    cache = open_cache(tmp_path / "s.zarr")
    path = "targets/segmentation/values"
    values = [torch.from_numpy(cache.read(record, [path])[path]).float() for record in range(14)]
    assert copied_fidelity(cache, "small") == measure_fidelity(values, 7, "small", (32, 48), align_corners=aligned)
    found = audit_cache(Records(cache)).gradient
    right, wrong = (gradient_errors(values[::2], 7, (32, 48), align_corners=how) for how in (aligned, not aligned))
    assert found == right != wrong
    assert found != gradient_errors(values[:7], 7, (32, 48), align_corners=aligned)
