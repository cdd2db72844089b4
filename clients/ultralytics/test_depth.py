"""YOLO26-depth as teacher and student: rmse in metres is the same for Ultralytics' validator."""

from pathlib import Path
from typing import Any

import pytest
from ultralytics.models.yolo.depth import DepthValidator
from ultralytics.utils.metrics import DepthMetrics

import kdcache
from kdcache.data import open_split
from kdcache.models import trusting
from kdcache.teacher import load_teacher

pytestmark = pytest.mark.timeout(1800)


class InMetres(DepthValidator):
    """Ultralytics' validator without its scaling of each image to the label's median."""

    def init_metrics(self, model: Any) -> None:
        super().init_metrics(model)
        self.metrics = DepthMetrics(max_depth=80.0, align="none")


def rmse_of(of: Any, checkpoint: Path) -> float:
    metrics = of.validated(checkpoint, validator=InMetres, rect=False)  # which otherwise stretches images further
    return float(metrics.results_dict["metrics/rmse"])


def test_a_teacher_and_its_student_have_the_rmse_of_ultralytics(depth: Any, tmp_path: Path) -> None:
    with trusting():
        teacher = load_teacher(f"ultralytics:{depth.teacher}", open_split(depth.named, "val"))
    measured = kdcache.evaluate(teacher, depth.named, split="val", size=depth.size, progress=False).depth
    assert measured is not None
    assert measured.rmse == pytest.approx(rmse_of(depth, depth.teacher), abs=5e-4)
    run = depth.student(tmp_path / "run", "ultralytics:yolo26n-depth", "depth-l1", 12, ce_weight=0)
    kdcache.export(run, tmp_path / "best.pt")
    learnt = kdcache.evaluate(run, depth.named, split="val", progress=False).depth
    assert learnt is not None
    assert learnt.rmse == pytest.approx(rmse_of(depth, tmp_path / "best.pt"), abs=5e-4)
