"""The Triton kernel for strides 2, 4 and 8 against the reference in float64, launched by itself.

Without a GPU it runs in Triton's interpreter, where its time grows with the pixels of a cell, the classes and the rows
of cells of a strip, hardly with the cells of a row: hence stride 2 and strips of one row for most of what is tested.
"""

import dataclasses

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from triton_cases import DEVICE, INTERPRETED, VOID, Result, assert_close, exact, make_problem, same_bits, slow, windows

from kdcache_kernels import LossProblem, PackedTarget, pack

pytest.importorskip("triton")


def run(problem: LossProblem, rows: int = 1, lanes: int = 32) -> Result:
    """The kernel on a problem that must be its own; what it leaves out of the gradient stays NaN."""
    from kdcache_kernels.gpu import cells, loss
    from kdcache_kernels.gpu.prep import prepare

    prepared = prepare(problem)
    stride = problem.size[0] // problem.student.shape[2]
    assert prepared.stride == stride
    assert prepared.route[:, 0].tolist() == [1] * problem.student.shape[0]
    gradient = None
    if problem.need_gradient:
        gradient = torch.full(problem.student.shape, torch.nan, dtype=problem.gradient_dtype, device=DEVICE)
    tiling = cells.Tiling(rows, lanes)
    buffers = loss.make_buffers(problem, cells.needs(problem, stride, tiling))
    cells.launch(problem, prepared, gradient, buffers, tiling, stride=stride)
    seams = cells.seams(problem, stride, tiling)
    _, ce, kl = loss.add_up(problem, prepared, gradient, buffers, seams)
    return Result(ce.item(), kl.item(), gradient)


def assert_exact(problem: LossProblem, gradient_error: float = 2e-6, **tiling: int) -> Result:
    actual = run(problem, **tiling)
    assert_close(actual, problem, gradient_error)
    return actual


@pytest.mark.parametrize("temperature", [1.0, 2.0, 2.5, slow(3.0), slow(4.0)])
@pytest.mark.parametrize("terms", ["both", "ce", slow("kl")])
def test_temperatures(terms, temperature):
    """T = 1 to 4 take powers of one exponential, the others a second one."""
    assert_exact(make_problem(2, terms=terms, temperature=temperature))


@pytest.mark.parametrize("temperature", [0.05, slow(0.3), slow(100.0)])
def test_extreme_temperatures(temperature):
    """Low ones as far as the range of the logits over T allows; high ones leave differences of small numbers."""
    problem = make_problem(2, scale=min(5 * temperature, 8.0), temperature=temperature)
    assert_exact(problem, gradient_error=2e-6 if temperature < 10 else 1e-5)


@pytest.mark.parametrize(("stride", "temperature"), [(4, 2.0), (8, 2.0), slow(4, 2.5), slow(8, 2.5), slow(8, 1.0)])
def test_strides(stride, temperature):
    """At 8, a row of cells takes four turns, whose gradients wait in memory for each other."""
    assert_exact(make_problem(stride, (1, 2), C=2, temperature=temperature))


@pytest.mark.slow
@pytest.mark.parametrize("stride", [4, 8])
def test_strips(stride):
    """The upper and lower edge of the image, and what is between, in one strip and where two meet."""
    for rows in (1, 2, 4):
        assert_exact(make_problem(stride, (3, 2), C=2), rows=rows)


@pytest.mark.parametrize("C", [1, 2, *map(slow, (5, 19, 21, 32, 33, 150, 171))])
def test_numbers_of_classes(C):
    """Beyond 32, classes share a bit in the set of those that are present."""
    # With 150 classes the fill of what is not kept is rounded as one, which shows in the KL of so few pixels.
    assert_exact(make_problem(2, (1, 3), C=C, kept=(C + 1) // 2 if C < 100 else C))


@pytest.mark.parametrize("grid", [(1, 2), (3, 2), slow((1, 3)), slow((5, 4))])
def test_small_grids(grid):
    assert_exact(make_problem(2, grid), rows=2)


def test_a_single_column_is_left_to_another_kernel():
    from kdcache_kernels.gpu.prep import prepare

    assert prepare(make_problem(2, (3, 1))).stride == 0


@pytest.mark.parametrize("stride", [2, slow(4), slow(8)])
def test_flip(stride):
    flip = torch.tensor([True, False], device=DEVICE)
    assert_exact(make_problem(stride, (1, 3), B=2, flip=flip))


WINDOWS = {
    "inside": ([1, 1, 3, 4], [2, 0, 4, 3]),
    "over the upper left edge": ([-1, -2, 1, 1], [-1, 0, 1, 3]),
    "over the lower right edge": ([3, 3, 5, 6], [2, 4, 4, 7]),
    "a corner": ([-1, 4, 1, 7], [3, -2, 5, 1]),
}


@pytest.mark.parametrize("place", WINDOWS)
@pytest.mark.parametrize(("stride", "flipped"), [(2, True), slow(2, False), slow(4, True), slow(8, False)])
def test_aligned_windows(stride, flipped, place):
    """Whole cells of a target of 4 x 5; pixels beyond its edge do not count."""
    flip = torch.tensor([True, False], device=DEVICE) if flipped else None
    window = windows(*WINDOWS[place]) * stride
    assert_exact(make_problem(stride, B=2, target_grid=(4, 5), window=window, flip=flip))


def test_class_weights():
    """Also with weight 0; the denominator is their sum."""
    assert_exact(make_problem(2, C=4, class_weight=torch.tensor([0.0, 0.5, 1.0, 3.0], device=DEVICE)))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, slow(torch.float16), slow(torch.bool)])
def test_pixel_weights(dtype):
    weight = (torch.rand(1, 4, 6, generator=torch.Generator().manual_seed(1)) * 3).to(dtype).to(DEVICE)
    assert_exact(make_problem(2, pixel_weight=weight))


@pytest.mark.parametrize("terms", ["both", slow("kl")])
def test_void_pixels_without_distillation(terms):
    """Their pixel weights do not enter, whatever they are."""
    problem = make_problem(2, terms=terms, distill_void=False)
    weight = torch.rand(problem.labels.shape, device=DEVICE)
    weight[problem.labels == VOID] = torch.nan
    expected = assert_exact(dataclasses.replace(problem, pixel_weight=weight.nan_to_num(0)))
    assert same_bits(run(dataclasses.replace(problem, pixel_weight=weight)), expected)


def test_pixel_weights_outside_the_view_do_not_enter():
    weight = torch.rand(1, 4, 6, device=DEVICE)
    problem = make_problem(2, window=windows([-2, 0, 2, 6]), pixel_weight=weight.clone())
    expected = assert_exact(problem)
    weight[:, :2] = torch.nan
    assert same_bits(run(dataclasses.replace(problem, pixel_weight=weight)), expected)


@pytest.mark.parametrize("dtype", [torch.int64, slow(torch.int16), slow(torch.int8)])
def test_label_types_and_strides(dtype):
    problem = make_problem(2, ignore_index=-1)
    labels = problem.labels.to(torch.int16)
    labels[labels == VOID] = -1
    labels = labels.to(dtype).mT.contiguous().mT
    assert not labels.is_contiguous()
    assert_exact(dataclasses.replace(problem, labels=labels))


def test_no_labels():
    assert_exact(make_problem(2, terms="kl", labels=None))


def test_an_image_of_void_alone():
    problem = make_problem(2, B=2, distill_void=False)
    problem.labels[0] = VOID
    actual = assert_exact(problem)
    assert not actual.gradient[0].any()
    problem.labels[:] = VOID
    actual = run(problem)
    assert actual[:2] == (0, 0)
    assert not actual.gradient.any()


@pytest.mark.parametrize("value", [torch.nan, slow(-torch.inf), slow(3e38)])
@pytest.mark.parametrize("counted", [True, False])
def test_a_lost_student_pixel(counted, value):
    """It spoils the terms that count one of the cells around it, and changes no bit otherwise."""
    problem = make_problem(2, (3, 4), distill_void=False)
    # Logit (0, 0) enters the label pixels (0..2, 0..2); the next one's own is left out as well.
    problem.labels[:, :3, :3] = VOID
    problem.student[:, :, 0, 0] = 0
    expected = run(problem)
    problem.student[:, 1, 0, 0] = value
    if not counted:
        assert same_bits(run(problem), expected)
        return
    problem.labels[0, 2, 2] = 1
    actual = run(problem)
    assert actual.ce != actual.ce
    assert actual.kl != actual.kl


@pytest.mark.parametrize("flipped", [slow(False), True])
@pytest.mark.parametrize("counted", [True, False])
def test_a_lost_target_pixel(counted, flipped):
    """It spoils KL alone. Without a window its image would be of tiles, for dense values are then read as they are."""
    flip = torch.tensor([True], device=DEVICE) if flipped else None
    problem = make_problem(2, (3, 4), distill_void=False, flip=flip, window=windows([0, 0, 6, 8]))
    problem.labels[0, :3, -3:] = VOID
    problem.labels[0, :3, :3] = VOID
    problem.target.values[0, :, 0, 0] = 0
    expected = run(problem)
    problem.target.values[0, 1, 0, 0] = torch.nan
    if not counted:
        assert same_bits(run(problem), expected)
        return
    problem.labels[0, 2, -3 if flipped else 2] = 1
    actual = run(problem)
    assert actual.ce == pytest.approx(exact(problem).ce, rel=1e-6)
    assert actual.kl != actual.kl


@pytest.mark.parametrize("counted", [True, False])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_lost_pixel_of_a_target_that_is_read_as_it_is(bad, counted):
    """Its image is of tiles; the other one is not."""
    from kdcache_kernels.gpu import loss
    from kdcache_kernels.gpu.prep import prepare

    problem = make_problem(2, (3, 4), B=2, distill_void=False)
    problem.labels[1, :3, :3] = VOID
    problem.target.values[1, :, 0, 0] = 0
    without = dataclasses.replace(problem, target=problem.target.map(torch.clone))
    problem.target.values[1, 1, 0, 0] = bad
    assert prepare(problem).route[:, 0].tolist() == [1, 0]
    if counted:
        problem.labels[1, 2, 2] = 1
        actual = loss.distill_loss(problem)
        assert actual.ce.isfinite()
        assert actual.kl.isnan()
        return
    actual = loss.distill_loss(problem)
    assert_close(Result(actual.ce.item(), actual.kl.item(), actual.gradient), without)


def test_a_lost_pixel_counts_at_weight_0():
    weight = torch.zeros(3, device=DEVICE)
    weight[2] = 1
    problem = make_problem(2, class_weight=weight, pixel_weight=torch.zeros(1, 4, 6, device=DEVICE))
    problem.labels[:] = VOID
    problem.labels[0, 0, 0] = 0
    problem.labels[0, -1, -1] = 2
    problem.student[0, 1, 0, 0] = torch.nan
    actual = run(problem)
    assert actual.ce != actual.ce
    assert actual.kl != actual.kl


@pytest.mark.parametrize("label", [3, slow(200), slow(-7)])
def test_a_class_out_of_range_spoils_ce_alone(label):
    problem = make_problem(2)
    labels = problem.labels.to(torch.int32)
    kl = exact(problem).kl
    labels[0, 3, 4] = label
    actual = run(dataclasses.replace(problem, labels=labels))
    assert actual.ce != actual.ce
    assert actual.kl == pytest.approx(kl, rel=1e-6)


@pytest.mark.parametrize("terms", ["both", slow("ce"), slow("kl")])
def test_without_a_gradient_the_terms_have_the_same_bits(terms):
    problem = make_problem(2, terms=terms)
    actual = run(dataclasses.replace(problem, need_gradient=False))
    assert actual.gradient is None
    assert actual[:2] == run(problem)[:2]


@pytest.mark.parametrize("stride", [2, slow(4), slow(8)])
def test_no_tiling_changes_a_bit(stride):
    """Several blocks of lanes, one strip or many, and a last strip that is not full."""
    problem = make_problem(stride, (3, 33), C=2)
    expected = assert_exact(problem, rows=1, lanes=64)
    for rows, lanes in [(3, 128), (4, 32)]:
        assert same_bits(run(problem, rows, lanes), expected), (rows, lanes)


def test_a_repeat_has_the_same_bits():
    problem = make_problem(2, class_weight=torch.rand(3, device=DEVICE))
    assert same_bits(run(problem), run(problem))


def test_an_image_does_not_depend_on_the_others():
    shared = {"ce_denominator": torch.tensor(5.0, device=DEVICE), "kl_denominator": torch.tensor(9.0, device=DEVICE)}
    both = make_problem(2, B=2, terms="ce", **shared)
    second = dataclasses.replace(both, student=both.student[1:], labels=both.labels[1:])
    gradients = run(both).gradient, run(second).gradient
    assert torch.equal(gradients[0][1:], gradients[1])


def test_half_precision_has_a_gradient_in_float32():
    assert assert_exact(make_problem(2, dtype=torch.float16)).gradient.dtype == torch.float32


@pytest.mark.skipif(INTERPRETED, reason="Triton's interpreter truncates bfloat16")
@pytest.mark.parametrize("stride", [2, 4, 8])
def test_bfloat16(stride):
    assert_exact(make_problem(stride, (5, 6), C=19, dtype=torch.bfloat16), gradient_error=8e-3)


def test_equal_logits_have_no_kl():
    problem = make_problem(2, terms="kl")
    # Packing keeps such numbers as they are.
    problem.student.copy_((problem.student * 4).round() / 4)
    target = PackedTarget(*pack(problem.student, 3, impl="reference"), 3, problem.size)
    actual = run(dataclasses.replace(problem, target=target))
    assert abs(actual.kl) <= 1e-7
    assert actual.gradient.abs().max() <= 1e-8


def test_images_of_another_kernel_are_passed_by():
    """Logits too wide for this kernel: their gradient is not touched; both kernels together are exact."""
    from kdcache_kernels.gpu import cells, loss
    from kdcache_kernels.gpu.prep import prepare

    problem = make_problem(2, B=2)
    problem.student[1, 0] += 100
    prepared = prepare(problem)
    assert prepared.route[:, 0].tolist() == [1, 0]
    gradient = torch.full(problem.student.shape, torch.nan, device=DEVICE)
    tiling = cells.Tiling(1, 32)
    buffers = loss.make_buffers(problem, cells.needs(problem, 2, tiling))
    cells.launch(problem, prepared, gradient, buffers, tiling, stride=2)
    loss.add_up(problem, prepared, gradient, buffers, cells.seams(problem, 2, tiling))
    partials = buffers.partials
    assert gradient[0].isfinite().all()
    assert gradient[1].isnan().all()
    assert not partials[partials.shape[0] // 2 :].any()
    expected = exact(problem)
    actual = loss.distill_loss(problem)
    assert actual.ce.item() == pytest.approx(expected.ce, rel=1e-6)
    assert actual.kl.item() == pytest.approx(expected.kl, rel=1e-6)
    error = (actual.gradient.double() - expected.gradient).abs().max()
    assert error <= 2e-6 * expected.gradient.abs().max()


@st.composite
def cases(draw: st.DrawFn) -> LossProblem:
    stride = draw(st.sampled_from([2, 2, 4, 8]))
    grid = (draw(st.integers(1, 4)), draw(st.integers(2, 5)))
    B, C = draw(st.integers(1, 2)), draw(st.sampled_from([2, 3, 5]))
    seed = draw(st.integers(0, 2**16))
    generator = torch.Generator().manual_seed(seed)
    target_grid, window, flip = grid, None, None
    if draw(st.booleans()):
        target_grid = (draw(st.integers(1, 5)), draw(st.integers(2, 6)))
        # At least one cell of the target shows.
        first = [[draw(st.integers(1 - grid[axis], target_grid[axis] - 1)) for axis in (0, 1)] for _ in range(B)]
        window = windows(*([y, x, y + grid[0], x + grid[1]] for y, x in first)) * stride
    if draw(st.booleans()):
        flip = torch.tensor([draw(st.booleans()) for _ in range(B)], device=DEVICE)
    weight = torch.rand(B, grid[0] * stride, grid[1] * stride, generator=generator).to(DEVICE)
    return make_problem(
        stride,
        grid,
        B=B,
        C=C,
        target_grid=target_grid,
        kept=draw(st.integers(1, C)),
        seed=seed,
        scale=draw(st.sampled_from([0.5, 3.0, 8.0])),
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
    max_examples=25 if INTERPRETED else 200,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
@given(problem=cases(), rows=st.integers(1, 4), lanes=st.sampled_from([32, 64]))
def test_any_problem(problem, rows, lanes):
    assert_exact(problem, rows=rows, lanes=lanes)
