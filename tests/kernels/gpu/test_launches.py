"""What a call costs the host: kernels that it launches and tensors that it allocates, counted."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from triton_cases import make_problem, windows

pytest.importorskip("triton")
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

from kdcache_kernels import ValueRangeError
from kdcache_kernels.gpu import loss
from kdcache_kernels.gpu.common import register_limit
from kdcache_kernels.gpu.on_cells import relations
from kdcache_kernels.on_cells.problem import RelationProblem

CELLS = ["prepare_kernel", "geometry_kernel", "tiles_kernel", "cells_kernel", "totals_kernel"]
PIXELS = ["prepare_kernel", "geometry_kernel", "tiles_kernel", "pixels_kernel", "totals_kernel"]
TILES = ["prepare_kernel", "geometry_kernel", "tiles_kernel", "totals_kernel"]


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The names of the kernels that are launched from now on."""
    names: list[str] = []

    def counting(kind: type) -> None:
        run = kind.run

        def count(self, *arguments, **options):
            names.append(self.fn.__name__)
            assert len(options["grid"]) == 1, "the second and third dimension of a grid end at 65,535"
            with _disable_current_modes():  # the interpreter computes with torch
                return run(self, *arguments, **options)

        monkeypatch.setattr(kind, "run", count)

    for kind in (JITFunction, InterpretedFunction):
        counting(kind)
    return names


class Allocations(TorchDispatchMode):
    """Counts the operations of torch that return new memory, and those that compute anything."""

    def __init__(self) -> None:
        super().__init__()
        self.allocated = self.computed = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        if isinstance(result, torch.Tensor) and not function.is_view:
            self.allocated += 1
            self.computed += "empty" not in function.name()
        return result


@pytest.mark.parametrize(
    ("problem", "kernels", "allocated"),
    [
        (make_problem(2, (3, 3)), CELLS, 14),
        (make_problem(2, (3, 3), window=windows([0, 0, 6, 6])), CELLS, 15),
        (make_problem(2, (3, 3), need_gradient=False), CELLS, 14),
        (make_problem(1, (3, 3)), PIXELS, 15),
        (make_problem(2, (3, 3), align_corners=True), TILES, 15),
    ],
    ids=["cells", "window", "no gradient", "pixels", "tiles"],
)
def test_a_call(problem, kernels, allocated, launched):
    """Torch itself computes nothing: each of its operations would be one more launch."""
    with Allocations() as counts:
        loss.distill_loss(problem)
    assert launched == kernels
    assert (counts.allocated, counts.computed) == (allocated, 0)


CALL = """
import json, torch, triton
from kdcache_kernels import PackedTarget, distill_loss
from kdcache_kernels.gpu.offline import compile_instead, gpu_target, launch_from_meta_tensors
launched = compile_instead(gpu_target("sm_90"))
launch_from_meta_tensors()
triton.knobs.runtime.jit_cache_hook = lambda **_: True  # nothing is compiled
empty = lambda *shape, dtype=torch.float32: torch.empty(shape, dtype=dtype, device="meta")
target = PackedTarget(empty(2, 3, 8, 8, dtype=torch.float16), None, None, 3, (32, 32))
student, labels, factor = empty(2, 3, 8, 8).requires_grad_(), empty(2, 32, 32, dtype=torch.uint8), empty()
def step(*weights):
    launched.clear()
    parts = distill_loss(student, labels, target, ce_weight=weights[0], kl_weight=weights[1], temperature=2.0)
    torch.autograd.grad(parts.loss, student, factor)
for weights in (0.7, 0.3), (empty(), empty()):
    step(*weights)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step(*weights)
    operations = {event.key for event in profile.key_averages() if event.key.startswith("aten::")}
    print(json.dumps([[name for name, _ in launched], sorted(operations)]))
"""


def test_a_whole_call_is_six_launches():
    """Forward and backward, with weights that are numbers and tensors, of tensors of a GPU that is not there.

    From the second call on, since the first may fill what later ones use again. The profiler also sees operations of
    torch within an operator: each that computes anything would be a launch.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", CALL], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    calls = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(calls) == 2
    for launched, operations in calls:
        assert launched == [*CELLS, "scale_kernel"]
        assert set(operations) <= {f"aten::{name}" for name in ("empty", "empty_strided", "detach", "alias", "view")}


def relation_problem(moved: bool) -> RelationProblem:
    """A problem of 2x3x4x5 cells, through a window and of a student of another grid where it is moved."""
    teacher = torch.zeros(2, 3, 4, 5)
    return RelationProblem(
        student=torch.zeros(2, 3, 3, 6) if moved else teacher,
        teacher=teacher,
        view_size=(8, 10),
        size=(8, 10),
        temperature=2.0,
        window=windows([0, 0, 8, 10], [1, 2, 5, 8]) if moved else None,
        flip=None,
        pixel_weight=None,
        counted=None,
        count=None,
        need_gradient=True,
        beta=1.0,
        gamma=1.0,
        moments=None,
    )


RELATIONS = ["relations_kernel", "classes_kernel", "relations_totals_kernel", "relations_gradient_kernel"]


@pytest.mark.parametrize(("moved", "allocated"), [(False, 9), (True, 31)], ids=["whole", "moved"])
def test_a_call_of_the_loss_of_relations(moved, allocated, launched):
    """As above, of whole views on the teacher's own grid, and of windows and another grid."""
    problem = relation_problem(moved)
    with Allocations() as counts:
        relations.relation_loss(problem)
    before = ["tables_kernel", "weights_kernel"] if moved else []
    after = ["gather_kernel"] if moved else []
    assert launched == [*before, *RELATIONS, *after]
    assert (counts.allocated, counts.computed) == (allocated, 0)


def test_a_backward_is_one_launch(launched):
    gradient, factor = torch.ones(1, 3, 2, 2), torch.tensor(0.5)
    with Allocations() as counts:
        scaled = loss.scale_gradient(gradient, factor, torch.tensor(torch.nan), torch.float16)
    assert launched == ["scale_kernel"]
    assert (counts.allocated, counts.computed) == (1, 0)
    assert scaled.isnan().all()


def test_the_limit_of_registers_is_a_choice_of_the_environment(monkeypatch):
    monkeypatch.delenv("KDCACHE_CELLS_REGISTERS", raising=False)
    assert register_limit(168) == 168
    monkeypatch.setenv("KDCACHE_CELLS_REGISTERS", "152")
    assert register_limit(168) == 152
    for wrong in ("31", "256", "many", "-1"):
        monkeypatch.setenv("KDCACHE_CELLS_REGISTERS", wrong)
        with pytest.raises(ValueRangeError, match=f"(?s)KDCACHE_CELLS_REGISTERS.*{wrong}"):
            register_limit(168)
