"""A call outside traced programs calls its family directly; whatever follows operators still gets an operator."""

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from kdcache_kernels import PackedTarget, distill_loss, library, ops, pack, relation_loss

C, SIZE = 5, (12, 16)
TEACHER = torch.randn(2, C, 3, 4, generator=torch.Generator().manual_seed(1))


def make():
    generator = torch.Generator().manual_seed(0)
    z = (torch.randn(2, C, 3, 4, generator=generator) * 2).requires_grad_()
    target = PackedTarget(*pack(torch.randn(2, C, 3, 4, generator=generator), 3), C, SIZE)
    return z, torch.randint(0, C, (2, *SIZE), generator=generator, dtype=torch.uint8), target


def loss_of(z, y, target):
    return distill_loss(z, y, target, kl_weight=1.0, temperature=2.0, impl="numba").loss


def relations_of(z, y, target):
    return relation_loss(z, TEACHER, view_size=SIZE, size=SIZE, impl="numba")


LOSSES = pytest.mark.parametrize(
    ("loss", "operator"), [(loss_of, "distill_loss"), (relations_of, "relation_loss")], ids=["distill", "relation"]
)


class Names(TorchDispatchMode):
    """Note the operators of kdcache that are dispatched."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        if function.namespace == "kdcache":
            self.seen.append(str(function).split(".")[1])
        return function(*arguments, **(options or {}))


@LOSSES
def test_the_operator_and_the_direct_call_have_the_same_bits(loss, operator):
    inputs = make()
    direct = loss(*inputs)
    (gradient,) = torch.autograd.grad(direct, inputs[0])
    with Names() as names:
        traced = loss(*inputs)
        (traced_gradient,) = torch.autograd.grad(traced, inputs[0])
    assert names.seen == [operator, "scale_gradient"]
    assert torch.equal(traced, direct)
    assert torch.equal(traced_gradient, gradient)


@LOSSES
def test_a_direct_call_dispatches_no_operator(loss, operator):
    """The profiler sees every operator, and is no mode that a call would give way to."""
    inputs = make()
    with torch.profiler.profile() as profile:
        loss(*inputs).backward()
        with torch.no_grad():
            loss(*inputs)
    assert not [event.name for event in profile.events() if event.name.startswith("kdcache::")]


def test_a_call_and_its_backward_look_once_each_for_who_traces(monkeypatch):
    looks = []
    monkeypatch.setattr(library, "is_traced", lambda *tensors: bool(looks.append(tensors)))
    loss = loss_of(*make())
    assert len(looks) == 1
    loss.backward()
    assert len(looks) == 2


@LOSSES
@pytest.mark.parametrize("factor", [1.0, 2.0])
def test_a_gradient_is_the_callers_own(loss, operator, factor):
    """Writing to it changes no later gradient of the same graph."""
    inputs = make()
    value = factor * loss(*inputs)
    (first,) = torch.autograd.grad(value, inputs[0], retain_graph=True)
    kept = first.clone()
    first.zero_()
    assert torch.equal(torch.autograd.grad(value, inputs[0])[0], kept)


@LOSSES
def test_a_traced_graph_holds_the_operator(loss, operator):
    z, y, target = make()

    def run(z: Tensor, y: Tensor) -> Tensor:
        return loss(z, y, target)

    with torch.no_grad():
        graph = make_fx(run)(z.detach(), y)
        assert operator in graph.code
        assert torch.equal(graph(z.detach(), y), run(z, y))


def test_fake_tensors_take_the_operator():
    z, y, target = make()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        parts = distill_loss(mode.from_tensor(z), mode.from_tensor(y), impl="numba")
    assert parts.loss.shape == ()
    assert distill_loss(z, y, target).loss.isfinite()


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")  # of dual tensors themselves
def test_forward_mode_raises():
    z, y, _ = make()
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(z.detach(), torch.ones_like(z))
        with pytest.raises(RuntimeError, match="Cannot differentiate distill_loss forwards"):
            distill_loss(dual, y, impl="numba")


def test_numbers_become_tensors_once(monkeypatch):
    monkeypatch.setattr(ops, "CONSTANTS", {})
    cpu = torch.device("cpu")
    first = ops.constant(0.25, cpu, traced=False)
    assert ops.constant(0.25, cpu, traced=False) is first
    assert first.item() == 0.25
    assert first.dtype == torch.float64
    with torch.inference_mode():
        assert not ops.constant(0.5, cpu, traced=False).is_inference()
    with FakeTensorMode():
        ops.constant(0.75, cpu, traced=library.is_traced())
    assert ops.constant(0.75, cpu, traced=False).item() == 0.75
    for value in range(2 * ops.MOST_CONSTANTS):
        assert ops.constant(float(value), cpu, traced=False).item() == value
    assert len(ops.CONSTANTS) == ops.MOST_CONSTANTS


def test_a_changed_input_is_noticed_in_the_backward():
    z, y, target = make()
    loss = loss_of(z, y, target)
    with torch.no_grad():
        z.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_the_family_is_not_told_of_autocast():
    z, y, target = make()
    plain = torch.autograd.grad(loss_of(z, y, target), z)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = loss_of(z, y, target)
    assert torch.equal(torch.autograd.grad(loss, z)[0], plain)


def test_the_constant_of_a_device_is_not_a_tensor_that_requires_a_gradient():
    z, y, target = make()
    with torch.inference_mode():
        loss_of(z.detach(), y, target)
    loss_of(z, y, target).backward()
    assert z.grad is not None
    assert library.is_traced() is False
