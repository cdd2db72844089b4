"""The loss of relations: every implementation against the reference in float64, and what the operators promise."""

import math
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rounding import rounding
from torch import Tensor

from kdcache_kernels import ShapeError, average_moments, relation_loss, relation_moments
from kdcache_kernels.gpu.on_cells import cells as gpu_cells
from kdcache_kernels.on_cells import library
from kdcache_kernels.on_cells.problem import RelationProblem

UNIT = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
"""What the gradient's own dtype rounds of it."""
SUBNORMAL = {torch.float32: 2.0**-150, torch.float16: 2.0**-25, torch.bfloat16: 2.0**-134}
"""Half of the smallest step of a dtype, which is all that it rounds to near 0."""
SHARE = 5e-6
"""An error as a share of the largest element: ten times what these fixed cases have."""
PREDICTION = ("view_size", "size", "temperature", "window_B4", "flip_B", "pixel_weight_BHW", "counted_BHW")


class Call(NamedTuple):
    """The arguments of a call."""

    student: Tensor
    teacher: Tensor
    options: dict[str, Any]

    def of(self, rows: slice) -> "Call":
        """A part of the batch."""
        tensors = {name: value[rows] for name, value in self.options.items() if isinstance(value, Tensor)}
        return Call(self.student[rows], self.teacher[rows], self.options | tensors)

    def value(self, student: Tensor, impl: str, **changes: Any) -> Tensor:
        """The loss."""
        return relation_loss(student, self.teacher, impl=impl, **(self.options | changes))

    def loss(self, impl: str, dtype: torch.dtype | None = None, **changes: Any) -> tuple[Tensor, Tensor]:
        """The loss and its gradient."""
        leaf = self.student.detach().to(dtype or self.student.dtype).requires_grad_()
        loss = self.value(leaf, impl, **changes)
        return loss.detach(), torch.autograd.grad(loss, leaf)[0]

    def moments(self, impl: str, dtype: torch.dtype | None = None) -> Tensor:
        options = {name: value for name, value in self.options.items() if name in PREDICTION}
        return relation_moments(self.student.to(dtype or self.student.dtype), self.teacher, impl=impl, **options)


def make(
    device: torch.device = torch.device("cpu"),
    *,
    B: int = 2,
    C: int = 5,
    own: tuple[int, int] = (6, 9),
    grid: tuple[int, int] = (6, 9),
    size: tuple[int, int] = (23, 37),
    dtype: torch.dtype = torch.float32,
    scale: float = 3.0,
    seed: int = 0,
    masks: bool = True,
    window: str = "crop",
) -> Call:
    generator = torch.Generator().manual_seed(seed)
    student = (scale * torch.randn(B, C, *own, generator=generator)).to(dtype)
    teacher = (scale * torch.randn(B, C, *grid, generator=generator)).half()
    options: dict[str, Any] = {"view_size": (22, 34), "size": size, "temperature": 1.5, "beta": 0.5, "gamma": 2.0}
    edges = {"whole": [0.0, 0, 22, 34], "crop": [3.3, 5.25, 14.8, 22], "over the edge": [-6.5, -3, 30, 50.5]}
    if window in edges:
        options["window_B4"] = torch.tensor([edges[window]] * B, dtype=torch.float64).reshape(B, 4).to(device)
        options["flip_B"] = (torch.rand(B, generator=generator) < 0.5).to(device)
    if masks:
        options["pixel_weight_BHW"] = torch.rand(B, *size, generator=generator).to(device)
        options["counted_BHW"] = (torch.rand(B, *size, generator=generator) < 0.7).to(device)
    return Call(student.to(device), teacher.to(device), options)


def problem_of(made: Call, **others: Any) -> RelationProblem:
    """What the public function makes of the arguments."""
    absent: dict[str, Any] = dict.fromkeys(("window", "flip", "pixel_weight", "counted", "count", "moments"))
    short = {"window_B4", "flip_B", "pixel_weight_BHW", "counted_BHW"}
    options = {name.rpartition("_")[0] if name in short else name: value for name, value in made.options.items()}
    problem = absent | {"need_gradient": True} | options | others
    return RelationProblem(student=made.student, teacher=made.teacher, **problem)


def assert_exact(made: Call, impl: str, share: float = math.inf) -> None:
    """To what the roundings of float32 may change, and one of the result.

    Args:
        share: of the gradient's largest element that its errors reach at most, where it is known to be far less than
            roundings may add up to.
    """
    expected, wanted = made.loss("reference", torch.float64)
    loss, gradient = made.loss(impl)
    assert (loss.dtype, gradient.dtype) == (torch.float32, made.student.dtype)
    loss_bound, bound = rounding(problem_of(made))
    unit, subnormal = UNIT[gradient.dtype], SUBNORMAL[gradient.dtype]
    assert abs(loss.double() - expected) <= loss_bound + UNIT[torch.float32] * expected
    error = (gradient - wanted).abs()
    assert (error <= bound + unit * (wanted.abs() + bound) + subnormal).all()
    if share < 1 and wanted.numel():
        assert abs(loss.double() - expected) <= share * expected
        assert error.max() <= (share + unit) * wanted.abs().max() + subnormal


SIZES = [
    {},
    {"own": (7, 10)},
    {"own": (13, 4)},
    {"own": (3, 2)},
    {"grid": (1, 9), "own": (1, 9)},
    {"grid": (6, 1), "own": (2, 1)},
    {"B": 1, "C": 2},
    {"B": 1, "C": 3, "grid": (2, 150), "own": (2, 150), "size": (4, 300)},
    {"B": 0},
]


@pytest.mark.interpreted(window=["none", "over the edge"], masks=[True])
@pytest.mark.parametrize("masks", [False, True], ids=["all", "gated and counted"])
@pytest.mark.parametrize("window", ["none", "whole", "crop", "over the edge"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_losses_are_those_of_exact_arithmetic(backend, sizes, window, masks):
    # Of two classes, half of the gradient of relations is rounding.
    share = math.inf if sizes.get("C") == 2 else SHARE
    assert_exact(make(backend.device, window=window, masks=masks, **sizes), backend.impl, share)


@pytest.mark.interpreted(C=[33])
@pytest.mark.parametrize("C", [19, 21, 33, 150])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_losses_of_any_number_of_classes(backend, C, dtype):
    assert_exact(make(backend.device, C=C, dtype=dtype, own=(4, 5), grid=(4, 5)), backend.impl, SHARE)


@st.composite
def drawn(draw: st.DrawFn) -> Call:
    side = st.integers(1, 9)
    grid = (draw(side), draw(side))
    own = grid if draw(st.booleans()) else (draw(side), draw(side))
    made = make(
        B=draw(st.integers(0, 3)),
        C=draw(st.sampled_from([1, 2, 3, 19, 21, 33, 150])),
        own=own,
        grid=grid,
        size=(draw(st.integers(1, 30)), draw(st.integers(1, 30))),
        dtype=draw(st.sampled_from([torch.float32, torch.float32, torch.float16, torch.bfloat16])),
        scale=draw(st.sampled_from([0.3, 1.0, 3.0, 10.0])),
        seed=draw(st.integers(0, 2**16)),
        masks=draw(st.booleans()),
        window=draw(st.sampled_from(["none", "whole", "crop", "over the edge"])),
    )
    layout = draw(st.sampled_from(["contiguous", "channels_last", "slice"]))
    student = made.student
    if layout == "channels_last":
        student = student.to(memory_format=torch.channels_last)
    elif layout == "slice":
        student = torch.stack([student, student], -1).flatten(-2)[..., ::2]
    options = made.options | {"temperature": draw(st.sampled_from([0.5, 1.0, 2.0, 4.0]))}
    shut = draw(st.sampled_from(["nothing", "nothing", "gate", "one image", "all void"]))
    size = (len(student), *options["size"])
    if shut == "gate":
        options["pixel_weight_BHW"] = torch.zeros(size)
    elif shut != "nothing":
        options["counted_BHW"] = torch.zeros(size, dtype=torch.bool)
        if shut == "one image":
            options["counted_BHW"][1:] = True
    return made._replace(student=student, options=options)


@pytest.mark.native
@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(case=drawn())
def test_losses_of_drawn_inputs(backend, case):
    if backend.device.type == "cpu":
        assert_exact(case, backend.impl)


@pytest.mark.parametrize("sizes", [{}, {"own": (7, 10)}], ids=str)
def test_moments_and_their_exchange(backend, sizes):
    """Two parts of a batch that share moments and count average to the whole: loss and gradient."""
    whole = make(device=backend.device, B=3, **sizes)
    exact = whole.moments("reference", torch.float64)
    torch.testing.assert_close(whole.moments(backend.impl), exact, rtol=2e-5, atol=1e-7)
    loss, gradient = whole.loss(backend.impl)
    count = torch.tensor(10.0, dtype=torch.float64, device=backend.device)
    loss, gradient = whole.loss(backend.impl, count=3 * count)
    parts = [whole.of(slice(n, n + 1)) for n in range(3)]
    shared = average_moments(torch.stack([part.moments(backend.impl) for part in parts]))
    losses, gradients = zip(*(part.loss(backend.impl, moments_6C=shared, count=count) for part in parts), strict=True)
    assert sum(losses).item() / 3 == pytest.approx(loss.item(), rel=1e-6)
    largest = gradient.abs().max()
    assert (torch.cat(gradients) / 3 - gradient).abs().max() <= 2e-6 * largest


def test_gradients_are_those_of_the_value():
    made = make(own=(7, 10), B=1)
    student = made.student.double().requires_grad_()
    call = lambda x: made.value(x, "reference")  # noqa: E731
    assert torch.autograd.gradcheck(call, (student,), fast_mode=True)
    assert torch.autograd.gradgradcheck(call, (student,), fast_mode=True)


def test_an_even_class_does_not_cancel(backend):
    """A class that is almost everywhere alike: its variance is 1e-8 of its mean square."""
    made = make(device=backend.device, masks=False, window="none", C=3, scale=1e-2, grid=(8, 16), own=(8, 16))
    made.student[:, 0] += 4
    made.teacher[:, 0] += 4
    assert_exact(made, backend.impl)
    exact, moments = made.moments("reference", torch.float64), made.moments(backend.impl)
    assert ((moments - exact).abs() <= 2e-4 * exact.abs() + 1e-12).all()


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # of numpy, in the interpreter
@pytest.mark.interpreted(value=[float("inf")])
@pytest.mark.parametrize("where", ["student", "teacher", "gate"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_shows_where_it_counts(backend, where, value):
    made = make(backend.device, window="whole")
    counted = torch.ones_like(made.options["counted_BHW"])
    counted[0, :12, :20] = False
    made.options["counted_BHW"] = counted
    made.options["flip_B"].zero_()
    for at, shows in ((0, False), (5, True)):
        spoilt = made._replace(student=made.student.clone(), teacher=made.teacher.clone(), options=dict(made.options))
        if where == "gate":
            gate = spoilt.options["pixel_weight_BHW"] = spoilt.options["pixel_weight_BHW"].clone()
            gate[0, 4 * at, 4 * at] = value
        else:
            getattr(spoilt, where)[0, 2, at, at] = value
        loss, gradient = spoilt.loss(backend.impl)
        if shows:
            assert not loss.isfinite()
            assert gradient.isnan().all()
            assert where == "gate" or spoilt.moments(backend.impl).isnan().any()
        else:
            expected = made.loss(backend.impl)
            assert loss.item() == pytest.approx(expected[0].item(), rel=1e-6)
            assert (gradient - expected[1]).abs().max() <= 1e-6 * expected[1].abs().max()


@pytest.mark.parametrize("how", ["none counted", "gate shut", "beside the view", "one class", "no image"])
def test_where_there_is_nothing_to_learn(backend, how):
    made = make(backend.device, B=0 if how == "no image" else 2, C=1 if how == "one class" else 5)
    if how == "none counted":
        made.options["counted_BHW"] = torch.zeros_like(made.options["counted_BHW"])
    elif how == "gate shut":
        made.options["pixel_weight_BHW"] = torch.zeros_like(made.options["pixel_weight_BHW"])
    elif how == "beside the view":
        window = torch.tensor([[23.0, 0, 31, 9]] * 2, dtype=torch.float64)
        made.options["window_B4"] = window.to(backend.device)
    loss, gradient = made.loss(backend.impl)
    assert loss == 0
    assert (gradient == 0).all()
    assert gradient.shape == made.student.shape


def test_an_image_that_does_not_count_has_no_gradient(backend):
    made = make(backend.device)
    made.options["counted_BHW"][0] = False
    _, gradient = made.loss(backend.impl)
    assert (gradient[0] == 0).all()
    assert (gradient[1] != 0).any()


@pytest.mark.parametrize("sizes", [{}, {"own": (7, 10)}], ids=str)
def test_losses_repeat_to_the_bit(backend, sizes):
    made = make(backend.device, **sizes)
    first = made.loss(backend.impl)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            again = made.loss(backend.impl)
            if backend.impl != "reference" or threads == before:
                assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("sizes", [{}, {"own": (7, 10)}], ids=str)
def test_autocast_changes_no_bit(backend, sizes):
    made = make(backend.device, **sizes)
    results = []
    for enabled in (False, True):
        leaf = made.student.detach().requires_grad_()
        with torch.autocast(backend.device.type, torch.bfloat16, enabled=enabled):
            loss = made.value(leaf, backend.impl)
            moments = made.moments(backend.impl)
        results.append((loss.detach(), moments, *torch.autograd.grad(loss, leaf)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.fused
def test_the_gradient_is_scaled_in_float32(backend):
    made = make(backend.device, dtype=torch.float16)
    leaf = made.student.requires_grad_()
    loss = made.value(leaf, backend.impl)
    (gradient,) = torch.autograd.grad(loss, leaf, torch.tensor(2.0**16, device=backend.device))
    _, wanted = made.loss("reference", torch.float64)
    assert (gradient.double() / 2**16 - wanted).abs().max() <= 1e-3 * wanted.abs().max()
    assert (gradient != 0).float().mean() > 0.99


def operator_arguments(device: torch.device, everything: bool) -> tuple[Any, ...]:
    made = make(device, masks=everything, window="crop" if everything else "none")
    others: dict[str, Any] = {}
    if everything:
        others = {"count": torch.tensor(9.0, device=device), "moments": made.moments("reference")}
    made = made._replace(student=made.student.requires_grad_())
    return library.arguments_of(problem_of(made, **others))


@pytest.mark.fused
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.parametrize("everything", [False, True])
def test_opcheck_of_losses(backend, everything):
    student, *others = operator_arguments(backend.device, everything)
    torch.library.opcheck(library.relation_loss, (backend.impl, student, *others))
    torch.library.opcheck(library.relation_moments, (backend.impl, student.detach(), *others))


@pytest.mark.fused
def test_losses_in_a_compiled_step(backend):
    made = make(backend.device)
    head = torch.nn.Conv2d(3, 5, 1).to(backend.device)
    pixels = torch.randn(2, 3, 6, 9, device=backend.device)

    def step(pixels: Tensor, teacher: Tensor) -> Tensor:
        return relation_loss(head(pixels), teacher, impl=backend.impl, **made.options)

    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        loss = function(pixels, made.teacher)
        results.append((loss, *torch.autograd.grad(loss, list(head.parameters()))))
    for plain, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, plain, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("spread", [False, True], ids=["too many", "too far apart"])
@pytest.mark.parametrize("name", ["student", "teacher"])
def test_logits_beyond_offsets_of_32_bits_are_refused(name, spread):
    made = problem_of(make(masks=False, window="none"))
    shape = (1, 2, 4, 2**31) if spread else (1, 2, 2**15, 2**16)
    logits = torch.empty(shape, device="meta")[..., :: 2**30 if spread else 1]
    with pytest.raises(ShapeError, match=f"One image of {name}_logits_BChw is too large") as caught:
        gpu_cells.check_offsets(replace(made, **{name: logits}))
    assert str(tuple(logits.shape)) in caught.value.problem
    assert str(logits.stride()) in caught.value.problem
    assert "reference" in caught.value.fix
