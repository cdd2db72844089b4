"""Terms of a batch that real processes share, and terms of a real store."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.data import default_collate

from kdcache.distill.outputs import StudentOutputs
from kdcache.distill.terms import TermBatch, loss_term, make_term
from kdcache.models import build_model
from kdcache.store import Cache
from kdcache.training import CacheDataset

_PART = """
import sys
from types import SimpleNamespace
import torch
import torch.distributed as dist
from torch import nn
from kdcache.distill import Batch, Target
from kdcache.distill.outputs import StudentOutputs
from kdcache.distill.terms import TermBatch, LossTerm, loss_term, make_term
from kdcache.training.distributed import World

rank, size, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
torch.set_num_threads(1)
torch.use_deterministic_algorithms(True)
torch.manual_seed(0)
images, teacher = torch.randn(4, 3, 24, 36), torch.randn(4, 6, 5, 8)
values = torch.randn(4, 5, 6, 9)
window = torch.tensor([[0.0, 0, 24, 36], [3, 5, 20, 30], [-6, -6, 30, 50], [0, 0, 12, 18]], dtype=torch.float64)
flip = torch.tensor([False, True, False, True])
student = nn.Conv2d(3, 5, 3, stride=4, padding=1)
manifest = SimpleNamespace(
    heads={"segmentation": SimpleNamespace(k=5, classes=5, raw=True)},
    features={"deep": SimpleNamespace(channels=6, size=(5, 8))},
)
store = SimpleNamespace(num_classes=5, view_size=(24, 36), align_corners=False, manifest=manifest)
if size > 1:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=size)
world, part = World(rank, size), slice(rank * 4 // size, (rank + 1) * 4 // size)
found = {}
for kind in ("at", "sp", "hint", "dist", "dkd"):
    term = make_term(loss_term(kind), targets=store, student_taps={"deep": 5})
    if size > 1:
        term.gather = world.rows
    z = student(images[part])
    packed = (values - values.amax(1, keepdim=True)).half()[part]
    stored = {"features/deep": teacher[part].half()}
    rows = Batch(
        labels={"depth": torch.zeros(len(z), 24, 36)},
        targets={"segmentation": Target(packed)},
        arrays=stored,
        window=window[part],
        flip=flip[part],
    )
    batch = TermBatch(StudentOutputs(z, {}, {"deep": z}), rows)
    loss = term(batch, world.mean(term.count(batch)))
    gradients = torch.autograd.grad(loss, [*student.parameters(), *term.parameters()])
    found[kind] = [world.mean(x) for x in (loss, *gradients)]
if rank == 0:
    torch.save(found, f"{folder}/{size}.pt")
if size > 1:
    dist.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_learn_what_one_does(tmp_path: Path) -> None:
    """Through gloo: the mean over the processes of every term's loss and of its gradients by all parameters."""
    actual = []
    for size in (1, 2):
        words = [[sys.executable, "-c", _PART, str(rank), str(size), str(tmp_path)] for rank in range(size)]
        processes = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for command in words]
        errors = [process.communicate(timeout=120)[1] for process in processes]
        assert not any(process.returncode for process in processes), errors
        actual.append(torch.load(tmp_path / f"{size}.pt", weights_only=True))
    for kind, one in actual[0].items():
        for a, b in zip(one, actual[1][kind], strict=True):
            assert (a - b).norm() <= 1e-5 * a.norm(), kind
        assert one[1].norm() > 0


@pytest.mark.parametrize("augment", ["warp", "none"])
def test_a_student_learns_from_a_store_with_features(make_cache: Callable[..., Cache], augment: str) -> None:
    cache = make_cache(features=("stage2", "head"))
    torch.manual_seed(0)
    dataset = CacheDataset(cache, augment=augment)
    batch = default_collate([dataset[index] for index in range(4)])
    student = build_model("kdcache:tiny", 7)
    taps = {"stage2": 32, "head": 32}
    for spec in (
        loss_term("at"),
        loss_term("sp", teacher_tap="stage2"),
        loss_term("hint", student_tap="head", teacher_tap="stage2"),
        loss_term("cosine"),
        loss_term("cwd", teacher_tap="head"),
        loss_term("dist"),
        loss_term("dkd"),
        loss_term("pseudo"),
    ):
        term = make_term(spec, targets=cache, student_taps=taps)
        out = student(student.normalise(batch.pixels), term.student_taps())
        stored = {
            path: torch.stack([torch.from_numpy(cache.read(index, [path])[path]) for index in range(4)])
            for path in term.arrays()
        }
        loss = term(TermBatch(StudentOutputs(out.logits, {}, out.features), replace(batch, arrays=stored)))
        gradient = torch.autograd.grad(loss, list(student.encoder["stem"].parameters()))
        assert loss > 0
        assert all(part.isfinite().all() for part in gradient)
        assert sum(part.norm() for part in gradient) > 0
