"""One way to run a teacher: as it is placed, in the precision that was asked for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from kdcache.models import Outputs, SegmentationModel
from kdcache.teacher.load.forward import place, teach

CPU = torch.device("cpu")


class Noisy(SegmentationModel):
    """Answers otherwise while it is trained; `seen` has the type that its layers compute in."""

    def __init__(self) -> None:
        super().__init__(spec="own:noisy", num_classes=3, stride=4, taps=("body",))
        torch.manual_seed(0)
        self.body = nn.Conv2d(3, 3, 4, 4)
        self.drop = nn.Dropout(0.5)
        self.seen: list[torch.dtype] = []

    def forward(self, x_B3HW: Tensor, taps: object = ()) -> Outputs:
        y = self.body(x_B3HW)
        self.seen.append(y.dtype)
        return Outputs({"segmentation": self.drop(y)}, dict.fromkeys(taps, y))


@pytest.fixture
def pixels() -> Tensor:
    return torch.randint(0, 256, (2, 16, 24, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def test_a_teacher_that_was_being_trained_answers_as_one_that_is_not(pixels) -> None:
    model = Noisy().train()
    with torch.no_grad():
        wanted = model.body(model.normalise(pixels))
    place(model, CPU)
    logits = teach(model, pixels, (), "float32", CPU).logits
    torch.testing.assert_close(logits, wanted)
    assert not logits.requires_grad


@pytest.mark.parametrize(
    ("precision", "computed"), [("float32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
def test_the_precision_is_the_one_that_was_asked_for(pixels, precision, computed) -> None:
    """Inside; logits come as float32 whatever it was."""
    model = Noisy().eval()
    outputs = teach(model, pixels, ("body",), precision, CPU)
    logits, features = outputs.logits, outputs.features
    assert (model.seen, features["body"].dtype, logits.dtype) == ([computed], computed, torch.float32)
