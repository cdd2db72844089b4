"""The probe of a teacher that is known to the last digit: what older stores say of theirs must go on holding."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kdcache.models import Outputs, SegmentationModel
from kdcache.teacher import Teacher
from kdcache.teacher.load.fingerprint import fingerprint

GOLDEN = (
    0.303399,
    0.217288,
    0.210994,
    0.213834,
    0.385452,
    0.375554,
    0.360162,
    0.38494,
    0.0127877,
    -0.00942486,
    -0.0989749,
    -0.0404911,
    0.211997,
    0.215509,
    0.301312,
    0.218762,
    0.391951,
    0.419283,
    0.415048,
    0.41176,
    -0.0931237,
    -0.0392564,
    0.0120154,
    -0.0087574,
)


class Known(SegmentationModel):
    """Three numbers of every 8 x 8 pixels, without a weight: brightness, contrast, and how red goes with blue."""

    def __init__(self) -> None:
        super().__init__(spec="own:known", num_classes=3, stride=8, taps=())
        self.mean, self.std = (0.2, 0.4, 0.6), (0.5, 1.0, 2.0)

    def forward(self, x_B3HW: Tensor, taps: object = ()) -> Outputs:
        pooled = torch.nn.functional.avg_pool2d
        bright = pooled(x_B3HW, 8).mean(1)
        contrast = pooled((x_B3HW[:, :1] - x_B3HW[:, :1].mean()).square(), 8)[:, 0]
        together = pooled(x_B3HW[:, :1] * x_B3HW[:, 2:], 8)[:, 0]
        return Outputs({"segmentation": torch.stack([bright, contrast, together], 1)}, {})


def test_the_probe_is_of_the_precision_of_the_build(teacher) -> None:
    single, half = (fingerprint(teacher, precision, torch.device("cpu")) for precision in ("float32", "bf16"))
    assert half.probe != single.probe
    assert half.probe == pytest.approx(single.probe, rel=0.05, abs=0.05)
    assert [line.partition(":")[0] for line in single.differences(half)][:1] == ["precision"]


def test_the_probe_is_the_one_that_stores_carry() -> None:
    found = fingerprint(Teacher(Known().eval(), "known"), "float32", torch.device("cpu"))
    assert found.probe == pytest.approx(GOLDEN, rel=2e-5, abs=1e-6)
    assert (found.spec, found.precision, found.mean, found.std) == (
        "own:known",
        "float32",
        (0.2, 0.4, 0.6),
        (0.5, 1.0, 2.0),
    )
    assert found.weights == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"  # of nothing
