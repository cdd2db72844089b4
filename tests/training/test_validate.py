"""A validation that several processes share is that of one: their counts of pixels add up to the whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from kdcache.data import open_split
from kdcache.models import build_model
from kdcache.training import Observer, TrainConfig
from kdcache.training.api import make_validator
from kdcache.training.distributed import Agreement, World

CPU = torch.device("cpu")
VAL = "scenes:32x48,train=6,val=5"


@dataclass(frozen=True)
class Told(World):
    """One of several processes, which is told what the others have counted."""

    others: tuple[Tensor, ...] = ()
    counted: tuple[list[Tensor], ...] = ()

    @contextmanager
    def together(self, *, stop: bool = False) -> Iterator[Agreement]:
        yield Agreement(stop)

    def total(self, tensor: Tensor) -> Tensor:
        for confusion in self.counted:
            confusion.append(tensor.clone())
        return torch.stack([tensor, *self.others]).sum(0)


@pytest.mark.parametrize("processes", [2, 3, 7])
def test_several_processes_validate_what_one_would(config: Callable[..., TrainConfig], processes: int) -> None:
    settings, val = config(val=VAL, batch_size=2 * processes), open_split(VAL, "val")
    torch.manual_seed(5)
    model = build_model("kdcache:tiny", len(val.classes))

    def validate(world: World) -> dict[str, object]:
        metrics = make_validator(val, settings, CPU, Observer(), world)(model)
        return dict(metrics.to_json())

    parts: list[Tensor] = []
    for rank in range(processes):
        validate(Told(rank, processes, counted=(parts,)))
    whole: list[Tensor] = []
    expected = validate(Told(0, 1, counted=(whole,)))
    assert torch.equal(torch.stack(parts).sum(0), whole[0])
    assert sum(bool(part.any()) for part in parts) == min(processes, len(val))
    for rank, own in enumerate(parts):
        others = tuple(part for part in parts if part is not own)
        assert validate(Told(rank, processes, others=others)) == expected
