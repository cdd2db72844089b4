"""Every tensor argument of every public function may lie anyhow in memory: with gaps, turned, expanded."""

import dataclasses

import pytest
import torch
from torch import Tensor

from kdcache_kernels import (
    LossProblem,
    PackedTarget,
    ShapeError,
    choose_k,
    densify,
    distill_denominators,
    distill_loss,
    gradient_error,
    library,
    pack,
    target_argmax_confidence,
)
from kdcache_kernels.gpu import loss

from .conftest import HAS_CUDA
from .triton_cases import make_problem

B, C, K = 2, 4, 2


def with_gaps(x: Tensor) -> Tensor:
    """Every second element of every axis, from an offset on, of a tensor that is wrong everywhere else."""
    if x.dim() == 0:
        return torch.stack([x + 7, x, x + 9])[1]
    wrong = x.new_full((), x.dtype == torch.bool or 3)
    big = wrong.expand([2 * n + 1 for n in x.shape]).clone()
    inner = big[tuple(slice(1, None, 2) for _ in x.shape)]
    inner.copy_(x)
    return inner


def turned(x: Tensor) -> Tensor:
    """The axes lie in memory in the opposite order."""
    axes = list(range(x.dim()))[::-1]
    return x.permute(axes).contiguous().permute(axes)


def expanded(x: Tensor) -> Tensor:
    """One row, image or vector of it in all places, with strides of 0; classes and the edges of a window stay apart."""
    kept = {4: (0, 1), 3: (0,), 2: (1,)}.get(x.dim(), ())
    return x[tuple(slice(None) if axis in kept else slice(0, 1) for axis in range(x.dim()))].expand(x.shape)


def attached(x: Tensor) -> Tensor:
    """A tensor that asks for a gradient, and gets none."""
    return x.detach().clone().requires_grad_() if x.is_floating_point() else x


LAYOUTS = [with_gaps, turned, expanded, attached]


def arguments(stride: int | None, device: torch.device) -> dict[str, Tensor]:
    """All tensors of a call of `distill_loss`; stride None is a ratio that is no integer."""
    generator = torch.Generator().manual_seed(5)
    grid = (2, 3) if stride != 1 else (3, 4)
    size = (5, 7) if stride is None else (grid[0] * stride, grid[1] * stride)
    values, indices, tail = pack(torch.randn(B, C, *grid, generator=generator) * 3, K, impl="reference")
    tensors = {
        "student_logits_BChw": torch.randn(B, C, *grid, generator=generator) * 3,
        "labels_BHW": torch.randint(0, C, (B, *size), generator=generator, dtype=torch.uint8),
        "values": values,
        "indices": indices,
        "tail": tail,
        "window_B4": torch.tensor([[0.0, 0.0, *size], [1.0, 0.5, *size]], dtype=torch.float64),
        "flip_B": torch.tensor([True, False]),
        "pixel_weight_BHW": torch.rand(B, *size, generator=generator) + 0.1,
        "class_weight": torch.rand(C, generator=generator) + 0.1,
        "ce_weight": torch.tensor(0.7),
        "kl_weight": torch.tensor(0.3),
        "ce_denominator": torch.tensor(41.0),
        "kl_denominator": torch.tensor(43.0),
    }
    return {name: tensor.to(device) for name, tensor in tensors.items()}


NAMES = list(arguments(4, torch.device("cpu")))


def loss_and_gradient(tensors: dict[str, Tensor], impl: str) -> tuple[Tensor, ...]:
    tensors = dict(tensors)
    student = tensors.pop("student_logits_BChw")
    student = student if student.requires_grad else student.detach().requires_grad_()
    labels, (H, W) = tensors.pop("labels_BHW"), tensors["pixel_weight_BHW"].shape[1:]
    target = PackedTarget(*(tensors.pop(name) for name in ("values", "indices", "tail")), C, (H, W))
    parts = distill_loss(student, labels, target, temperature=2.0, impl=impl, **tensors)
    (gradient,) = torch.autograd.grad(parts.loss, student)
    return (*(part.detach() for part in parts), gradient)


def assert_same(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    """To the bit, but for the reference: its matrix products go another way over matrices with gaps."""
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def contiguous(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}


@pytest.mark.native  # all arguments at once below
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("stride", [4, None, 1])
def test_each_argument_of_the_loss(name, layout, stride, backend):
    tensors = arguments(stride, backend.device)
    tensors[name] = layout(tensors[name])
    expected = loss_and_gradient(contiguous(tensors), backend.impl)
    assert_same(loss_and_gradient(tensors, backend.impl), expected)


@HAS_CUDA
@pytest.mark.parametrize(
    "layout",
    [with_gaps, expanded, *(pytest.param(layout, marks=pytest.mark.slow) for layout in (turned, attached))],
    ids=lambda f: f.__name__,
)
@pytest.mark.parametrize("stride", [2, None, 1], ids=["cells", "tiles", "pixels"])
def test_all_arguments_of_the_loss_at_once(stride, layout):
    """In the interpreter, quickly: all kernels of the loss."""
    impl = "triton"
    tensors = {name: layout(tensor) for name, tensor in arguments(stride, torch.device("cpu")).items()}
    expected = loss_and_gradient(contiguous(tensors), impl)
    assert_same(loss_and_gradient(tensors, impl), expected)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
def test_arguments_of_the_other_functions(layout, backend):
    tensors = arguments(4, backend.device)
    laid_out = {name: layout(tensor) for name, tensor in tensors.items()}
    results = []
    for laid in (contiguous(laid_out), laid_out):
        packed = tuple(laid[name] for name in ("values", "indices", "tail"))
        target, size = PackedTarget(*packed, C, (8, 12)), (8, 12)
        where = {"window_B4": laid["window_B4"], "flip_B": laid["flip_B"]}
        counts = distill_denominators(
            laid["labels_BHW"], target, num_classes=C, class_weight=laid["class_weight"], distill_void=False, **where
        )
        logits = laid["student_logits_BChw"]
        kept = [pack(x, k, impl=backend.impl) for k in (K, C) for x in (logits, logits.half())]
        results.append(
            (
                *counts,
                *target_argmax_confidence(target, size, **where, impl=backend.impl),
                *(part for parts in kept for part in parts if part is not None),
                densify(*packed, C, impl=backend.impl),
                densify(packed[0].float(), None, None, K, impl=backend.impl),
                torch.tensor(gradient_error(logits, K, 2.0, size)),
            )
        )
        assert choose_k(logits, size, C) == (C, {})
    for actual, expected in zip(*reversed(results), strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)
        assert not actual.requires_grad


@pytest.mark.parametrize("layout", [with_gaps, turned, expanded], ids=lambda f: f.__name__)
def test_scaling_a_gradient(layout, backend):
    """The operator of the backward, which a compiled program may hand a gradient with gaps."""
    gradient, factor = layout(torch.randn(2, 3, 4, 5, device=backend.device)), with_gaps(torch.tensor(0.5))
    scale = loss.scale_gradient if backend.impl == "triton" else library.scale_gradient
    actual = scale(gradient, factor.to(backend.device), torch.ones((), device=backend.device), torch.float16)
    torch.testing.assert_close(actual, (gradient * 0.5).half(), rtol=0, atol=0)
    assert actual.is_contiguous()


class TestOffsetsBeyond32Bits:
    """Told from sizes and strides alone: no such tensor is made."""

    @staticmethod
    def problem(**changes: object) -> LossProblem:
        return make_problem(4, (4, 4), **changes)

    @pytest.mark.parametrize("name", ["student", "labels", "pixel_weight"])
    @pytest.mark.parametrize("axis", [1, 2, -1])
    def test_an_image_whose_elements_lie_far_apart_is_refused(self, name, axis):
        """As after a permute of a large batch: few elements, but the offset of the last wraps around in 32 bits."""
        shape = (1, 3, 4, 4) if name == "student" else (1, 16, 16)
        dtype = torch.uint8 if name == "labels" else torch.float32
        strides = [0] * len(shape)
        for step, fits in ((2**31 // (shape[axis] - 1) - 1, True), (2**31 // (shape[axis] - 1) + 1, False)):
            strides[axis] = step
            tensor = torch.empty_strided(shape, strides, dtype=dtype, device="meta")
            problem = dataclasses.replace(self.problem(), **{name: tensor})
            if fits:
                loss.check_offsets(problem)
                continue
            with pytest.raises(ShapeError, match=rf"(?s)One image of {name}.*2\^31.*{step}.*{name}\w*\.contiguous\(\)"):
                loss.check_offsets(problem)

    def test_strides_that_only_add_up_to_it(self):
        tensor = torch.empty_strided((1, 3, 4, 4), (0, 2**29, 2**28, 2**27), device="meta")
        with pytest.raises(ShapeError, match="spans too much memory"):
            loss.check_offsets(dataclasses.replace(self.problem(), student=tensor))

    def test_between_images_and_along_axes_of_one_element_any_stride_will_do(self):
        tensor = torch.empty_strided((5, 3, 4, 4), (2**40, 16, 4, 1), device="meta")
        loss.check_offsets(dataclasses.replace(self.problem(), student=tensor))
        tensor = torch.empty_strided((1, 3, 1, 4), (0, 4, 2**40, 1), device="meta")
        loss.check_offsets(dataclasses.replace(self.problem(), student=tensor))

    @pytest.mark.parametrize("side", [2**15, 2**15 - 1])
    def test_an_image_of_too_many_logits_is_refused_however_it_lies(self, side):
        student = torch.empty((1, 2, side, 2**15), device="meta").to(memory_format=torch.channels_last)
        problem = dataclasses.replace(self.problem(), student=student)
        if side * 2**16 < 2**31:
            loss.check_offsets(problem)
            return
        with pytest.raises(ShapeError, match=r"too many logits.*2\^31"):
            loss.check_offsets(problem)
        problem = dataclasses.replace(problem, student=student[:1, :1, :1, :1].expand(student.shape))
        with pytest.raises(ShapeError, match=r"too many logits.*2\^31"):
            loss.check_offsets(problem)
