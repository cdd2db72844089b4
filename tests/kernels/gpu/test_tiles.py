"""The generic Triton loss kernel by itself, against the reference in float64.

Natively on a GPU, else in Triton's interpreter. Four classes at a time are summed there, so C = 4 is the quickest.
"""

from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from triton_cases import Result, assert_close

from kdcache_kernels import PackedTarget, pack
from kdcache_kernels.gpu import loss as triton_loss
from kdcache_kernels.gpu.prep import prepare
from kdcache_kernels.gpu.prepared import Prepared
from kdcache_kernels.gpu.tiles import Tiling, choose_tiling, launch, needs
from kdcache_kernels.problem import LossProblem
from kdcache_kernels.reference import distill_loss_reference

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NAN = float("nan")


def make(
    B: int = 2,
    C: int = 4,
    student: tuple[int, int] = (2, 3),
    grid: tuple[int, int] = (3, 2),
    size: tuple[int, int] = (5, 4),
    *,
    k: int | None = None,
    view: tuple[int, int] | None = None,
    target_align: bool = False,
    scale: float = 3.0,
    terms: str = "ce kl",
    window: list[list[float]] | None = None,
    flip: list[bool] | None = None,
    **others: object,
) -> LossProblem:
    """A random problem with a fifth of its pixels void; `others` are attributes of LossProblem."""
    generator = torch.Generator().manual_seed(B + 10 * C + 100 * size[0])
    z = torch.randn(B, C, *student, generator=generator) * scale
    t = torch.randn(B, C, *grid, generator=generator) * scale
    y = torch.randint(0, C, (B, *size), generator=generator)
    y[torch.rand(B, *size, generator=generator) < 0.2] = 255
    packed = pack(t, C if k is None else k, impl="reference")
    target = PackedTarget(*packed, C, view or size, target_align).to(DEVICE)
    problem = LossProblem(
        student=z.to(DEVICE),
        labels=y.to(DEVICE),
        target=target if "kl" in terms else None,
        size=size,
        use_ce="ce" in terms,
        ce_weight=torch.tensor(0.7, dtype=torch.float64, device=DEVICE),
        kl_weight=torch.tensor(0.3, device=DEVICE),
        ce_denominator=None,
        kl_denominator=None,
        temperature=2.0,
        class_weight=None,
        ignore_index=255,
        window=None if window is None else torch.tensor(window, dtype=torch.float64, device=DEVICE),
        flip=None if flip is None else torch.tensor(flip, device=DEVICE),
        pixel_weight=None,
        distill_void=True,
        align_corners=False,
        need_gradient=True,
    )
    return replace(problem, **others)


class Found(NamedTuple):
    """Terms, times their weights, and the gradient."""

    ce: Tensor
    kl: Tensor
    gradient: Tensor


def expect(problem: LossProblem) -> Found:
    z = problem.student.double().requires_grad_()
    parts = distill_loss_reference(replace(problem, student=z))
    (gradient,) = torch.autograd.grad(parts.loss, z)
    return Found(parts.ce, parts.kl, gradient)


def run(problem: LossProblem, tiling: Tiling | None = None, prepared: Prepared | None = None) -> Found:
    """Tiles takes every image, or with `prepared` those that it routes there; what it leaves unwritten stays NaN."""
    all_images = prepared is None
    prepared = prepare(problem) if prepared is None else prepared
    gradient = torch.full(problem.student.shape, NAN, dtype=problem.gradient_dtype, device=DEVICE)
    tiling = choose_tiling(problem, all_images=all_images) if tiling is None else tiling
    buffers = triton_loss.make_buffers(problem, needs(problem, tiling))
    launch(problem, prepared, gradient, buffers, tiling, all_images=all_images)
    ce, kl = buffers.partials.sum(0) * prepared.factors[2:4]
    return Found(ce, kl, gradient)


def check(problem: LossProblem, rounding: float = 0.0, tiling: Tiling | None = None) -> None:
    """Against the reference; `rounding` is what the float32 rounding of large logits adds, relative."""
    actual = run(problem, tiling)
    result = Result(actual.ce.item(), actual.kl.item(), actual.gradient)
    assert_close(result, problem, gradient_error=2e-6 + rounding, term_error=rounding)


RESIZES = {
    "enlarged": {"student": (3, 2), "grid": (2, 3), "size": (7, 5)},
    "enlarged to whole strides": {"student": (2, 3), "grid": (2, 3), "size": (4, 9)},
    "shrunk": {"student": (6, 7), "grid": (7, 5), "size": (4, 3)},
    "one enlarged, one shrunk": {"student": (2, 3), "grid": (9, 11), "size": (5, 6)},
    "as it is": {"student": (4, 5), "grid": (4, 5), "size": (4, 5)},
    "one row": {"student": (1, 3), "grid": (3, 1), "size": (5, 7)},
    "one column": {"student": (3, 1), "grid": (1, 3), "size": (5, 3)},
    "one pixel": {"student": (1, 1), "grid": (1, 1), "size": (1, 1)},
    "one pixel of label": {"student": (3, 3), "grid": (2, 2), "size": (1, 1)},
    "a view of another size": {"view": (20, 9), "window": [[0, 0, 20, 9], [3, -1, 18, 7]]},
    "odd classes": {"B": 1, "C": 5, "student": (2, 2), "size": (5, 3)},
    "one class": {"C": 1},
}
ALIGNED = {
    "student": {"align_corners": True},
    "target": {"target_align": True},
    "both": {"align_corners": True, "target_align": True},
    "both, shrunk": {"align_corners": True, "target_align": True, "student": (6, 7), "grid": (7, 5), "size": (4, 3)},
    "one pixel of label": {"align_corners": True, "target_align": True, "size": (1, 1), "grid": (1, 4), "terms": "kl"},
}


@pytest.mark.parametrize("case", RESIZES.values(), ids=RESIZES.keys())
def test_any_ratio_of_sizes(case):
    check(make(**case))


@pytest.mark.parametrize("case", ALIGNED.values(), ids=ALIGNED.keys())
def test_aligned_corners(case):
    check(make(**case))


def test_the_blocks_of_a_gpu():
    """One class in a block and four blocks at a time, of which the last three here have no class."""
    problem = make(B=1, C=5, student=(2, 2), size=(5, 3))
    check(problem, tiling=Tiling(1, 32, 1, 1, 4, 2))


WINDOWS = {
    "whole": [[0, 0, 5, 4]] * 2,
    "crops": [[1, 0.3, 3.5, 3], [2.2, 1, 5, 4]],
    "larger than the view": [[-6, -9, 15, 12], [-1, 0, 7, 4]],
    "over an edge": [[-2, 2, 3, 6], [4.5, -3, 9.5, 1]],
    "within a cell": [[3.1, 2.1, 3.4, 2.2], [0, 0, 0.1, 0.1]],
    "reversed": [[4.9, 0, 0.5, 4], [4, 3.9, 1, 0.5]],
}


@pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS.keys())
def test_windows_and_flips(window):
    check(make(window=window, grid=(4, 3), flip=[True, False], scale=2.0))


def test_flips_without_a_window():
    check(make(flip=[False, True], terms="kl"))


@pytest.mark.slow
@pytest.mark.parametrize("C", [19, 21, 32, 33, 150, 171])
def test_many_classes(C):
    check(make(B=1, C=C, student=(1, 2), grid=(2, 1), size=(2, 3)))


@pytest.mark.slow
@pytest.mark.parametrize("terms", ["ce kl", "ce", "kl"])
@pytest.mark.parametrize("temperature", [0.05, 1, 2, 2.5, 3, 4, 100])
def test_temperatures_and_terms(temperature, terms):
    check(make(B=1, terms=terms, temperature=float(temperature)), rounding=3e-7 / min(temperature, 1))


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("scale", [0.0, 40.0, 300.0, 3e4])
def test_ranges(scale, temperature):
    """Beyond 2^-60, the softmaxes are taken relative to their maxima."""
    check(make(B=1, scale=scale, temperature=temperature), rounding=1e-7 * scale / min(temperature, 1))


@pytest.mark.slow
@pytest.mark.parametrize("which", ["student", "target", "both"])
def test_one_set_of_logits_is_the_largest_there_is(which):
    problem = make(B=1, temperature=1.0)
    signs = torch.tensor([1.0, -1], device=DEVICE)
    if which != "target":
        problem.student[:] = 6e4 * signs[torch.arange(24, device=DEVICE).view(1, 4, 2, 3) * 5 // 2 % 2]
    if which != "student":
        problem.target.values[:] = -6e4 * (torch.arange(24, device=DEVICE).view(1, 4, 3, 2) * 5 // 3 % 2)
    check(problem, rounding=4e-3)


WEIGHTS = torch.linspace(0, 2, 4).to(DEVICE)
MASKS = {
    "class weights": {"class_weight": WEIGHTS},
    "class weights, float64": {"class_weight": WEIGHTS.double(), "terms": "ce"},
    "void does not teach": {"distill_void": False},
    "void does not teach, kl alone": {"distill_void": False, "terms": "kl"},
    "no labels": {"labels": None, "use_ce": False, "distill_void": False},
    "given denominators": {
        "ce_denominator": torch.tensor(5.5, dtype=torch.float64, device=DEVICE),
        "kl_denominator": torch.tensor(3.0, device=DEVICE),
    },
}


@pytest.mark.parametrize("case", MASKS.values(), ids=MASKS.keys())
def test_what_counts(case):
    check(make(**case))


@pytest.mark.parametrize("ignore_index", [1, -7, 2**40])
def test_another_void(ignore_index):
    problem = make(ignore_index=ignore_index, distill_void=False)
    problem.labels[:] = torch.where(problem.labels == 255, ignore_index, problem.labels)
    check(problem)


def test_denominators_of_0():
    zero = torch.zeros((), device=DEVICE)
    actual = run(make(ce_denominator=zero, kl_denominator=zero))
    assert actual.ce == actual.kl == 0
    assert (actual.gradient == 0).all()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.uint8, torch.bool, torch.float16, torch.float64], ids=str)
def test_pixel_weights(dtype):
    weight = (torch.rand(2, 8, 6, generator=torch.Generator().manual_seed(0)) * 2).to(dtype).to(DEVICE)[:, 1:6, 1:5]
    check(make(pixel_weight=weight, distill_void=False))


def test_a_nan_pixel_weight_where_nothing_counts():
    problem = make(pixel_weight=torch.rand(2, 5, 4, device=DEVICE), distill_void=False, window=WINDOWS["over an edge"])
    problem.pixel_weight[problem.labels == 255] = NAN
    problem.pixel_weight[0, :2] = NAN  # beyond the view
    check(problem)
    problem.labels[1, 0, 3] = 0
    problem.pixel_weight[1, 0, 3] = NAN
    assert run(problem).kl.isnan()


@pytest.mark.parametrize(("wrong", "dtype"), [(4, torch.uint8), (200, torch.int16), (-3, torch.int64)], ids=str)
def test_a_class_id_out_of_range(wrong, dtype):
    problem = make(B=1)
    labels = problem.labels.to(dtype)
    labels[0, 3, 2] = wrong
    actual = run(replace(problem, labels=labels))
    assert actual.ce.isnan()
    assert actual.kl.isfinite()


def test_all_void():
    problem = make(distill_void=False)
    problem.labels[:] = 255
    actual = run(problem)
    assert actual.ce == actual.kl == 0
    assert (actual.gradient == 0).all()


@pytest.mark.slow
@pytest.mark.parametrize("counted", [False, True])
@pytest.mark.parametrize("where", ["student", "target"])
@pytest.mark.parametrize("at", [(0, 0), (1, 1)])
def test_lost_logits(where, at, counted):
    """Seen by the pixels that it enters with weight above 0, and by them alone."""
    problem = make(B=1, student=(3, 3), grid=(3, 3), size=(5, 7), distill_void=False, temperature=0.5)
    reach = make(B=1, student=(3, 3), grid=(3, 3), size=(5, 7), scale=0.0).target.values.float()
    reach[0, 0, at[0], at[1]] = 1
    entered = torch.nn.functional.interpolate(reach, (5, 7), mode="bilinear")[0, 0] > 0
    problem.labels[0] = torch.where(entered, 255, 1)
    if counted:
        y, x = entered.nonzero()[-1].tolist()
        problem.labels[0, y, x] = 2
    clean = run(problem)
    logits = problem.student if where == "student" else problem.target.values
    # The gradient of a lost student pixel is 0, and it is 0 without the loss too when nothing counts there.
    logits[0, 2, at[0], at[1]] = NAN
    spoilt = run(problem)
    if counted:
        assert spoilt.kl.isnan()
        assert spoilt.ce.isnan() == (where == "student")
    else:
        assert all(torch.equal(a, b) for a, b in zip(spoilt, clean, strict=True))


@pytest.mark.parametrize("window", [[NAN] * 4, [6.0, 0, 9, 4], [0, -3, 5, 0], [0, 0, NAN, 4]], ids=str)
def test_a_window_that_shows_nothing_makes_kl_nan(window):
    actual = run(make(window=[[0, 0, 5, 4], window]))
    assert actual.kl.isnan()
    assert actual.ce.isfinite()


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("tail", [None, float("-inf"), 6e4])
def test_kept_classes(k, tail):
    problem = make(k=k)
    if tail is not None:
        problem.target.tail[:, 0] = tail
    check(problem, rounding=0 if tail is None else 2e-3)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["channels_last", "slice", "expanded"])
def test_layouts(layout):
    problem = make()
    z = problem.student
    if layout == "channels_last":
        other = z.to(memory_format=torch.channels_last)
    elif layout == "slice":
        big = z.new_full((4, 5, 4, 6), NAN)
        big[::2, 1:, 2:, ::2] = z
        other = big[::2, 1:, 2:, ::2]
    else:
        z = z[:1, :, :, :1].expand_as(z).contiguous()
        other = z[:1, :, :, :1].expand_as(z)
    a, b = run(replace(problem, student=z)), run(replace(problem, student=other))
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize(
    "dtype",
    [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.skipif(DEVICE.type == "cpu", reason="truncated"))],
    ids=str,
)
def test_half_precision(dtype):
    problem = make()
    problem = replace(problem, student=problem.student.to(dtype))
    actual = run(problem)
    assert actual.gradient.dtype == (torch.bfloat16 if dtype == torch.bfloat16 else torch.float32)
    if dtype == torch.float16:
        check(problem)
    else:
        expected = expect(problem).gradient
        assert (actual.gradient.double() - expected).abs().max() <= 8e-3 * expected.abs().max()


@pytest.mark.slow
def test_without_a_gradient():
    problem = make(window=WINDOWS["crops"])
    whole = run(problem)
    prepared = prepare(problem)
    tiling = Tiling(2, 32, 4, 4, 1, 3)
    buffers = triton_loss.make_buffers(replace(problem, need_gradient=False), needs(problem, tiling))
    launch(problem, prepared, None, buffers, tiling, all_images=True)
    terms = buffers.partials.sum(0) * prepared.factors[2:4]
    torch.testing.assert_close(terms, torch.stack(whole[:2]), rtol=1e-14, atol=0)


TILINGS = [Tiling(1, 8, 4, 4, 1, 100), Tiling(2, 32, 4, 4, 1, 2), Tiling(3, 64, 4, 1, 4, 1)]


def mixed() -> LossProblem:
    """The second image's range needs the maxima, the others' do not."""
    problem = make(
        B=3,
        student=(3, 4),
        size=(6, 7),
        window=[[0.5, 1, 4, 5], [-2, -3, 8, 9], [3, 3, 6, 6]],
        flip=[True, False, True],
        ce_denominator=torch.tensor(100.0, device=DEVICE),
        kl_denominator=torch.tensor(120.0, device=DEVICE),
        temperature=1.0,
    )
    problem.student[1] *= 40
    return problem


@pytest.mark.slow
def test_the_same_bits_for_every_tiling():
    problem = mixed()
    expected = run(problem, choose_tiling(problem)._replace(block_sums=4, block_classes=4))
    for tiling in TILINGS:
        actual = run(problem, tiling)
        assert torch.equal(actual.gradient, expected.gradient), tiling
        torch.testing.assert_close(torch.stack(actual[:2]), torch.stack(expected[:2]), rtol=1e-14, atol=0)


def part(problem: LossProblem, image: int) -> LossProblem:
    one = slice(image, image + 1)
    return replace(
        problem,
        student=problem.student[one],
        labels=problem.labels[one],
        target=replace(problem.target, values=problem.target.values[one]),
        window=problem.window[one],
        flip=problem.flip[one],
    )


@pytest.mark.slow
def test_an_image_does_not_depend_on_its_batch():
    problem = mixed()
    whole = run(problem).gradient
    for image in range(3):
        assert torch.equal(run(part(problem, image)).gradient[0], whole[image])


@pytest.mark.slow
def test_images_of_another_route_are_left_alone():
    problem = mixed()
    prepared = prepare(problem)
    prepared.route[:, 0] = torch.tensor([1, 0, 1], dtype=torch.int32, device=DEVICE)
    actual = run(problem, prepared=prepared)
    alone = run(part(problem, 1))
    assert actual.gradient[0].isnan().all()
    assert actual.gradient[2].isnan().all()
    assert torch.equal(actual.gradient[1], alone.gradient[0])
    torch.testing.assert_close(torch.stack(actual[:2]), torch.stack(alone[:2]), rtol=1e-14, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("size", [(8, 12), (2, 3)], ids=["cells", "pixels"])
def test_a_batch_of_both_routes(size):
    """An image that meets the grid cell by cell and one that does not, in one call."""
    H, W = size
    window = [[H / 2, 0, 1.5 * H, W], [0.1, 0, 0.9 * H, W]]
    problem = make(student=(2, 3), grid=(2, 3), size=size, window=window, flip=[True, False])
    assert prepare(problem).route[:, 0].tolist() == [1, 0]
    actual, expected = triton_loss.distill_loss(problem), expect(problem)
    loss = 0.7 * expected.ce + 0.3 * expected.kl
    for a, b in zip(actual[:3], (loss, expected.ce, expected.kl), strict=True):
        assert abs(a - b) <= 1e-6 * abs(b) + 4e-7
    error = (actual.gradient.double() - expected.gradient).abs().max()
    assert error <= 2e-6 * expected.gradient.abs().max()


def test_an_empty_batch():
    problem = make()
    empty = replace(problem, student=problem.student[:0], labels=problem.labels[:0], target=None)
    actual = triton_loss.distill_loss(empty)
    assert actual.loss == 0
    assert actual.gradient.shape == (0, 4, 2, 3)
