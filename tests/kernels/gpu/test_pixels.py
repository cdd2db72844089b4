"""The Triton kernel without a resize against the reference in float64, launched by itself.

Without a GPU it runs in Triton's interpreter, where its time grows with the programs and the blocks of classes.
"""

import dataclasses
from typing import TYPE_CHECKING

import pytest
import torch
import triton_cases
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from triton_cases import DEVICE, INTERPRETED, VOID, Result, assert_close, exact, same_bits, slow, windows

from kdcache_kernels import LossProblem

if TYPE_CHECKING:
    from kdcache_kernels.gpu.pixels import Tiling

pytest.importorskip("triton")


def make_problem(grid: tuple[int, int] = (3, 5), **options: object) -> LossProblem:
    return triton_cases.make_problem(1, grid, **options)


def run(problem: LossProblem, tiling: "Tiling | None" = None) -> Result:
    """The kernel on a problem that must be its own; what it leaves out of the gradient stays NaN."""
    from kdcache_kernels.gpu import loss
    from kdcache_kernels.gpu import pixels as triton_pixels
    from kdcache_kernels.gpu.prep import prepare

    prepared = prepare(problem)
    assert prepared.stride == 1
    assert prepared.route[:, 0].tolist() == [1] * problem.student.shape[0]
    gradient = None
    if problem.need_gradient:
        gradient = torch.full(problem.student.shape, torch.nan, dtype=problem.gradient_dtype, device=DEVICE)
    tiling = triton_pixels.choose_tiling(problem) if tiling is None else tiling
    buffers = loss.make_buffers(problem, triton_pixels.needs(problem, tiling))
    triton_pixels.launch(problem, prepared, gradient, buffers, tiling)
    _, ce, kl = loss.add_up(problem, prepared, gradient, buffers, None)
    return Result(ce.item(), kl.item(), gradient)


def assert_exact(problem: LossProblem, gradient_error: float = 2e-6, tiling: "Tiling | None" = None) -> Result:
    actual = run(problem, tiling)
    assert_close(actual, problem, gradient_error)
    return actual


def tiling(classes: int, pixels: int, programs: int = 1000, num_warps: int = 1) -> "Tiling":
    from kdcache_kernels.gpu.pixels import Tiling

    return Tiling(classes, pixels, programs, num_warps)


@pytest.mark.parametrize("temperature", [0.05, 1.0, 2.0, 2.5, slow(3.0), 4.0])
@pytest.mark.parametrize("terms", ["both", "ce", "kl"])
def test_temperatures(terms, temperature):
    """T = 1 to 4 take powers of one exponential, the others a second one."""
    assert_exact(make_problem(terms=terms, temperature=temperature))


@pytest.mark.parametrize("C", [1, 2, 5, slow(19)])
@pytest.mark.parametrize("grid", [(1, 7), (7, 1), (9, 15)], ids=str)
def test_sizes(grid, C):
    """Pixels that fill no block, or more than one; classes that fill no block."""
    assert_exact(make_problem(grid, C=C, kept=(C + 1) // 2))


@pytest.mark.parametrize(("C", "temperature"), [(2, 2.0), (19, 1.0), (150, 2.5), slow(1100, 2.0)])
def test_images_of_one_pixel(C, temperature):
    """Neighbouring lanes take neighbouring classes: here they fill a block partly, or several."""
    assert_exact(make_problem((1, 1), B=4, C=C, temperature=temperature))


def test_images_of_one_pixel_in_several_blocks():
    problem = make_problem((1, 1), B=6, C=5)
    expected = assert_exact(problem)
    assert same_bits(run(problem, tiling(8, 4)), expected)
    assert same_bits(run(problem, tiling(8, 8, programs=1, num_warps=4)), expected)


def test_a_class_block_smaller_than_the_classes():
    assert_exact(make_problem((2, 3), C=19), tiling=tiling(8, 32))
    assert_exact(make_problem((1, 1), B=2, C=19), tiling=tiling(16, 2))


@pytest.mark.parametrize("scale", [0.0, 30.0, 1e4])
def test_any_range_of_logits(scale):
    """No limit: what is far below the maximum adds nothing."""
    assert_exact(make_problem(B=2, C=5, scale=scale))


def test_the_smallest_temperature_at_large_logits():
    assert_exact(make_problem(C=5, scale=1e4, temperature=0.05))


def test_flip():
    flip = torch.tensor([True, False], device=DEVICE)
    assert_exact(make_problem(B=2, flip=flip))


WINDOWS = {
    "inside": ([1, 1, 4, 6], [2, 0, 5, 5]),
    "over the upper left edge": ([-1, -2, 2, 3], [-1, 0, 2, 5]),
    "over the lower right edge": ([3, 3, 6, 8], [4, 4, 7, 9]),
    "a corner": ([-2, 6, 1, 11], [4, -4, 7, 1]),
}


@pytest.mark.parametrize("flipped", [slow(False), True])
@pytest.mark.parametrize("place", WINDOWS)
def test_windows(place, flipped):
    """Whole pixels of a target of 5 x 7; pixels beyond its edge do not count."""
    flip = torch.tensor([True, False], device=DEVICE) if flipped else None
    assert_exact(make_problem(B=2, target_grid=(5, 7), window=windows(*WINDOWS[place]), flip=flip))


@pytest.mark.parametrize("grid", [(3, 5), (1, 1)], ids=str)
def test_class_weights(grid):
    """Also with weight 0; the denominator is their sum."""
    weight = torch.tensor([0.0, 0.5, 1.0, 3.0], device=DEVICE)
    assert_exact(make_problem(grid, B=3, C=4, class_weight=weight))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, slow(torch.float16), slow(torch.bool)])
def test_pixel_weights(dtype):
    weight = (torch.rand(1, 3, 5, generator=torch.Generator().manual_seed(1)) * 3).to(dtype).to(DEVICE)
    assert_exact(make_problem(pixel_weight=weight))


@pytest.mark.parametrize("terms", ["both", "kl"])
def test_void_pixels_without_distillation(terms):
    """Their pixel weights do not enter, whatever they are."""
    problem = make_problem(terms=terms, distill_void=False)
    weight = torch.rand(problem.labels.shape, device=DEVICE)
    weight[problem.labels == VOID] = torch.nan
    expected = assert_exact(dataclasses.replace(problem, pixel_weight=weight.nan_to_num(0)))
    assert same_bits(run(dataclasses.replace(problem, pixel_weight=weight)), expected)


def test_pixel_weights_outside_the_view_do_not_enter():
    weight = torch.rand(1, 3, 5, device=DEVICE)
    problem = make_problem(window=windows([-1, 0, 2, 5]), pixel_weight=weight.clone())
    expected = assert_exact(problem)
    weight[:, :1] = torch.nan
    assert same_bits(run(dataclasses.replace(problem, pixel_weight=weight)), expected)


@pytest.mark.parametrize("dtype", [torch.int64, slow(torch.int16), slow(torch.int8)])
def test_label_types_and_strides(dtype):
    problem = make_problem(ignore_index=-1)
    labels = problem.labels.to(torch.int16)
    labels[labels == VOID] = -1
    labels = labels.to(dtype).mT.contiguous().mT
    assert not labels.is_contiguous()
    assert_exact(dataclasses.replace(problem, labels=labels))


def test_no_labels():
    assert_exact(make_problem(terms="kl", labels=None))


def test_an_image_of_void_alone():
    problem = make_problem(B=2, distill_void=False)
    problem.labels[0] = VOID
    actual = assert_exact(problem)
    assert not actual.gradient[0].any()
    problem.labels[:] = VOID
    actual = run(problem)
    assert actual[:2] == (0, 0)
    assert not actual.gradient.any()


@pytest.mark.parametrize("value", [torch.nan, slow(-torch.inf), slow(3e38)])
@pytest.mark.parametrize("of", ["student", "target"])
def test_a_lost_pixel(of, value):
    """It spoils the terms that count it, the target's KL alone; otherwise it changes no bit."""
    problem = make_problem(distill_void=False)
    logits = problem.student if of == "student" else problem.target.values
    problem.labels[0, 1, 2] = VOID
    logits[0, :, 1, 2] = 0
    expected = run(problem)
    logits[0, 1, 1, 2] = value
    assert same_bits(run(problem), expected)
    problem.labels[0, 1, 2] = 1
    actual = run(problem)
    assert (actual.ce != actual.ce) == (of == "student")
    assert actual.kl != actual.kl


def test_a_lost_pixel_counts_at_weight_0():
    weight = torch.tensor([0.0, 1.0, 1.0], device=DEVICE)
    problem = make_problem(class_weight=weight, pixel_weight=torch.zeros(1, 3, 5, device=DEVICE))
    problem.labels[0, 1, 2] = 0
    problem.student[0, 1, 1, 2] = torch.nan
    actual = run(problem)
    assert actual.ce != actual.ce
    assert actual.kl != actual.kl


@pytest.mark.parametrize("label", [3, slow(200), slow(-7)])
def test_a_class_out_of_range_spoils_ce_alone(label):
    problem = make_problem()
    labels = problem.labels.to(torch.int32)
    kl = exact(problem).kl
    labels[0, 2, 4] = label
    actual = run(dataclasses.replace(problem, labels=labels))
    assert actual.ce != actual.ce
    assert actual.kl == pytest.approx(kl, rel=1e-6)


@pytest.mark.parametrize("terms", ["both", "ce", "kl"])
def test_without_a_gradient_the_terms_have_the_same_bits(terms):
    problem = make_problem(terms=terms)
    actual = run(dataclasses.replace(problem, need_gradient=False))
    assert actual.gradient is None
    assert actual[:2] == run(problem)[:2]


def test_no_tiling_changes_a_bit():
    """Blocks that end within an image; programs that do one block or several."""
    problem = make_problem((5, 9), B=2, C=3)
    expected = assert_exact(problem, tiling=tiling(2, 64))
    for other in (tiling(2, 16, programs=3), tiling(2, 32), tiling(2, 128, num_warps=4)):
        assert same_bits(run(problem, other), expected), other


def test_a_repeat_has_the_same_bits():
    problem = make_problem(class_weight=torch.rand(3, device=DEVICE))
    assert same_bits(run(problem), run(problem))


def test_half_precision_has_a_gradient_in_float32():
    assert assert_exact(make_problem(dtype=torch.float16)).gradient.dtype == torch.float32


@pytest.mark.skipif(INTERPRETED, reason="Triton's interpreter truncates bfloat16")
@pytest.mark.parametrize("grid", [(1, 1), (16, 33)], ids=str)
def test_bfloat16(grid):
    assert_exact(make_problem(grid, B=2, C=19, dtype=torch.bfloat16), gradient_error=8e-3)


def test_images_of_another_kernel_are_passed_by():
    """A window that is not aligned: that image's gradient is not touched; both kernels together are exact."""
    from kdcache_kernels.gpu import loss
    from kdcache_kernels.gpu import pixels as triton_pixels
    from kdcache_kernels.gpu.prep import prepare

    problem = make_problem(B=2, target_grid=(5, 7), window=windows([0, 0, 3, 5], [0.5, 1, 3.5, 6]))
    prepared = prepare(problem)
    assert prepared.route[:, 0].tolist() == [1, 0]
    gradient = torch.full(problem.student.shape, torch.nan, device=DEVICE)
    tiling = triton_pixels.choose_tiling(problem)
    buffers = loss.make_buffers(problem, triton_pixels.needs(problem, tiling))
    triton_pixels.launch(problem, prepared, gradient, buffers, tiling)
    assert gradient[0].isfinite().all()
    assert gradient[1].isnan().all()
    expected = exact(problem)
    actual = loss.distill_loss(problem)
    assert actual.ce.item() == pytest.approx(expected.ce, rel=1e-6)
    assert actual.kl.item() == pytest.approx(expected.kl, rel=1e-6)
    error = (actual.gradient.double() - expected.gradient).abs().max()
    assert error <= 2e-6 * expected.gradient.abs().max()


@st.composite
def cases(draw: st.DrawFn) -> LossProblem:
    grid = (draw(st.integers(1, 4)), draw(st.integers(1, 9)))
    B, C = draw(st.integers(1, 3)), draw(st.sampled_from([2, 3, 5]))
    seed = draw(st.integers(0, 2**16))
    generator = torch.Generator().manual_seed(seed)
    target_size, window, flip = grid, None, None
    if draw(st.booleans()):
        target_size = (draw(st.integers(1, 5)), draw(st.integers(1, 9)))
        # At least one pixel of the target shows.
        first = [[draw(st.integers(1 - grid[axis], target_size[axis] - 1)) for axis in (0, 1)] for _ in range(B)]
        window = windows(*([y, x, y + grid[0], x + grid[1]] for y, x in first))
    if draw(st.booleans()):
        flip = torch.tensor([draw(st.booleans()) for _ in range(B)], device=DEVICE)
    weight = torch.rand(B, *grid, generator=generator).to(DEVICE)
    return make_problem(
        grid,
        B=B,
        C=C,
        target_grid=target_size,
        kept=draw(st.integers(1, C)),
        seed=seed,
        scale=draw(st.sampled_from([0.5, 3.0, 100.0])),
        terms=draw(st.sampled_from(["both", "both", "ce", "kl"])),
        dtype=draw(st.sampled_from([torch.float32, torch.float16])),
        temperature=draw(st.sampled_from([1.0, 2.0, 2.5, 4.0])),
        window=window,
        flip=flip,
        distill_void=draw(st.booleans()),
        class_weight=torch.rand(C, generator=generator).to(DEVICE) if draw(st.booleans()) else None,
        pixel_weight=weight if draw(st.booleans()) else None,
    )


@pytest.mark.slow
@settings(
    max_examples=20 if INTERPRETED else 300,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
@given(problem=cases())
def test_any_problem(problem):
    assert_exact(problem)
