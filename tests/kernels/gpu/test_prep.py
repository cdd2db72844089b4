"""What the Triton loss kernels start from: normalised logits, lost pixels, tables of taps, routes, factors."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kdcache_kernels import PackedTarget, pack
from kdcache_kernels.gpu import prep
from kdcache_kernels.gpu.geometry import Taps
from kdcache_kernels.gpu.prep import fast_stride, prepare
from kdcache_kernels.problem import LossProblem
from kdcache_kernels.reference import ce_weight_sum, kl_pixels
from kdcache_kernels.window import hat_matrix, view_positions

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LARGEST = torch.finfo(torch.float32).max


def make(
    B: int = 2,
    C: int = 3,
    student: tuple[int, int] = (3, 4),
    grid: tuple[int, int] | None = None,
    size: tuple[int, int] = (6, 8),
    *,
    k: int | None = None,
    view: tuple[int, int] | None = None,
    target_align: bool = False,
    terms: str = "ce kl",
    window: list[list[float]] | None = None,
    flip: list[bool] | None = None,
    **others: object,
) -> LossProblem:
    """A random problem with a fifth of its pixels void; `others` are attributes of LossProblem."""
    generator = torch.Generator().manual_seed(C)
    t = torch.randn(B, C, *(grid or student), generator=generator) * 3
    y = torch.randint(0, C, (B, *size), generator=generator)
    y[torch.rand(B, *size, generator=generator) < 0.2] = 255
    target = PackedTarget(*pack(t, k or C, impl="reference"), C, view or size, target_align).to(DEVICE)
    problem = LossProblem(
        student=torch.randn(B, C, *student, generator=generator).to(DEVICE),
        labels=y.to(DEVICE),
        target=target if "kl" in terms else None,
        size=size,
        use_ce="ce" in terms,
        ce_weight=torch.tensor(0.7, dtype=torch.float64, device=DEVICE),
        kl_weight=torch.tensor(0.3, device=DEVICE),
        ce_denominator=None,
        kl_denominator=None,
        temperature=2.5,
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


@pytest.fixture(params=["blocks", "lanes"])
def classes_at_once(request, monkeypatch):
    """Blocks of classes, as the interpreter takes them, or one at a time, as a GPU does where pixels are neighbours."""
    if request.param == "lanes":
        monkeypatch.setattr(prep, "classes_at_once", lambda *_, **__: 1)


def normalised(logits_BChw: Tensor, temperature: float) -> Tensor:
    logits_BChw = logits_BChw.float()
    return (logits_BChw - logits_BChw.amax(1, keepdim=True)) * (math.log2(math.e) / temperature)


@pytest.mark.usefixtures("classes_at_once")
@pytest.mark.parametrize(
    ("layout", "dtype"),
    [
        ("contiguous", torch.float32),
        ("contiguous", torch.bfloat16),
        ("channels_last", torch.float16),
        ("slice", torch.float32),
        ("expanded", torch.float32),
    ],
    ids=str,
)
def test_logits_are_normalised(layout, dtype):
    """More pixels than a program takes, more classes than it holds at once."""
    problem = make(C=37, student=(11, 13))
    z = problem.student.to(dtype)
    if layout == "channels_last":
        z = z.to(memory_format=torch.channels_last)
    elif layout == "slice":
        big = z.new_full((4, 38, 22, 15), torch.nan)
        big[1::2, 1:, ::2, 2:] = z
        z = big[1::2, 1:, ::2, 2:]
    elif layout == "expanded":
        z = z[:1, :, :1].expand(2, 37, 11, 13)
    prepared = prepare(replace(problem, student=z))
    assert torch.equal(prepared.student, normalised(z, 2.5))
    assert torch.equal(prepared.target, normalised(problem.target.values, 2.5))
    assert prepared.student.is_contiguous()
    assert not prepared.student_lost.any()
    assert not prepared.target_lost.any()


def test_dense_targets_of_whole_views_are_read_as_they_are():
    problem = make()
    prepared = prepare(problem)
    assert prepared.target is problem.target.values
    assert prepared.target_scale == pytest.approx(math.log2(math.e) / 2.5)
    others = (replace(problem, window=torch.tensor([[0.0, 0, 6, 8]] * 2, device=DEVICE, dtype=torch.float64)),)
    others += (make(k=2), make(grid=(6, 8)), make(size=(3, 4)), replace(problem, temperature=1e-30))
    for other in others:
        prepared = prepare(other)
        assert (prepared.target.dtype, prepared.target_scale) == (torch.float32, None)


@pytest.mark.usefixtures("classes_at_once")
@pytest.mark.parametrize("temperature", [0.05, 1.0, 100.0])
def test_lost_pixels(temperature):
    problem = make(B=1, student=(2, 4), size=(6, 12), temperature=temperature)
    limit = LARGEST / 8 * min(1.0, temperature)
    wrong = [math.nan, math.inf, -math.inf, 1.001 * limit, -1.001 * limit]
    right = [0.999 * limit, -0.999 * limit]
    problem.student[0, 1].view(-1)[:7] = torch.tensor(wrong + right, device=DEVICE)
    values = problem.target.values[0, 2].view(-1)
    values[:4] = torch.tensor([math.nan, math.inf, -math.inf, -6e4], device=DEVICE)
    prepared = prepare(problem)
    lost = torch.tensor([1] * 5 + [0] * 3, device=DEVICE)
    assert torch.equal(prepared.student_lost.view(-1).int(), lost.int())
    assert prepared.target_lost.view(-1).tolist() == [1, 1, 1, 0, 0, 0, 0, 0]
    kept = (lost == 0).view(1, 1, 2, 4)
    assert torch.equal(prepared.student, torch.where(kept, normalised(problem.student, temperature), 0))
    assert (prepared.target[0, :, 0, :3] == 0).all()


@pytest.mark.usefixtures("classes_at_once")
@pytest.mark.parametrize("k", [1, 6])
def test_packed_targets_are_spread(k):
    problem = make(C=34, grid=(12, 11), k=k, temperature=0.5)
    tail = problem.target.tail
    tail[0, 0, 0], tail[0, 0, 1] = 6e4, -math.inf
    prepared = prepare(problem)
    expected = normalised(problem.target.densify(), 0.5)
    torch.testing.assert_close(prepared.target, expected, rtol=1e-6, atol=1e-5)
    assert not prepared.target_lost.any()
    tail[0, 0, 2] = math.nan
    problem.target.values[0, 0, 0, 3] = math.inf
    problem.target.indices[0, 0, 0, 4] = 34
    prepared = prepare(problem)
    assert prepared.target_lost.nonzero().tolist() == [[0, 0, 2], [0, 0, 3], [0, 0, 4]]
    assert (prepared.target[0, :, 0, 2:5] == 0).all()
    torch.testing.assert_close(prepared.target[:, :, 1:], expected[:, :, 1:], rtol=1e-6, atol=1e-5)


def tables(problem: LossProblem) -> list[Taps]:
    """Taps of the student's rows and columns, and of the target's (images, pixels)."""
    prepared = prepare(problem)
    (H, W), images = problem.size, prepared.target_batch
    shapes = [(H,), (W,), (images, H), (images, W)]
    parts = prepared.tables.split([3 * math.prod(shape) for shape in shapes])
    planes = [part.view(3, *shape) for part, shape in zip(parts, shapes, strict=True)]
    return [Taps(index, fraction.view(torch.float32), inside) for index, fraction, inside in planes]


def assert_taps(taps: Taps, position_BN: Tensor, n_view: int, n_in: int, align: bool) -> None:
    """To the bit: the fraction is the upper cell's entry of the hat matrix, and there are no others."""
    hat_BNn = hat_matrix(position_BN, n_view, n_in, align, torch.float64)
    index = taps.index.view(position_BN.shape).long()[..., None]
    upper = (index + 1).clamp(max=n_in - 1)
    weight = torch.where(index + 1 < n_in, hat_BNn.gather(-1, upper), 0)
    assert torch.equal(taps.fraction.view(position_BN.shape), weight[..., 0].float())
    assert torch.equal(hat_BNn.gather(-1, index) + weight, hat_BNn.sum(-1, keepdim=True))
    assert (hat_BNn.gather(-1, index) > 0).all()


WINDOWS = [
    None,
    [[0, 0, 30, 41]] * 2,
    [[1.7, 3.3, 21, 20.1], [-5, 17, 22, 49]],
    [[-31.3, -17, 99, 70], [3.1, 5.2, 3.4, 5.4]],
]


@pytest.mark.parametrize("window", WINDOWS, ids=["none", "whole", "crops", "extremes"])
@pytest.mark.parametrize("flip", [None, [True, False]], ids=["as it is", "flipped"])
@pytest.mark.parametrize("align", [False, True])
def test_tables_of_taps(align, flip, window):
    problem = make(
        student=(7, 10), grid=(9, 13), size=(23, 31), view=(30, 41), window=window, flip=flip, align_corners=align
    )
    problem = replace(problem, target=replace(problem.target, align_corners=align))
    rows, columns, target_rows, target_columns = tables(problem)
    whole = view_positions(None, None, (23, 31), (23, 31), DEVICE)
    assert_taps(rows, whole.y, 23, 7, align)
    assert_taps(columns, whole.x, 31, 10, align)
    positions = view_positions(problem.window, problem.flip, (30, 41), (23, 31), DEVICE)
    assert_taps(target_rows, positions.y, 30, 9, align)
    assert_taps(target_columns, positions.x, 41, 13, align)
    inside = target_rows.inside.bool()[:, :, None] & target_columns.inside.bool()[:, None, :]
    assert torch.equal(inside, positions.inside())


@pytest.mark.parametrize("student", [(1, 300), (700, 1)], ids=str)
def test_tables_of_one_cell_and_of_more_than_a_block(student):
    size = (2048 if student[0] > 1 else 1, 1100 if student[1] > 1 else 3)
    taps_of_axes = tables(make(B=1, C=1, student=student, size=size, labels=None, use_ce=False))
    positions = view_positions(None, None, size, size, DEVICE)
    for taps in taps_of_axes[::2]:
        assert_taps(taps, positions.y, size[0], student[0], False)
    for taps in taps_of_axes[1::2]:
        assert_taps(taps, positions.x, size[1], student[1], False)


@pytest.mark.parametrize("window", [[math.nan] * 4, [6.0, 0, 9, 8], [0, -4, 6, 0], [0, 0, math.nan, 8]], ids=str)
def test_a_window_that_shows_nothing(window):
    """NaN in the table, so that it shows in the loss."""
    problem = make(window=[[0, 0, 6, 8], window])
    _, _, rows, columns = tables(problem)
    assert rows.fraction[1].isnan().all() or columns.fraction[1].isnan().all()
    assert (rows.index[1] >= 0).all()
    assert rows.fraction[0].isfinite().all()
    assert prepare(problem).route[:, 0].tolist() == [1, 0]


STRIDES = {
    "2": (2, {}),
    "1": (1, {"size": (3, 4)}),
    "4, no target": (4, {"size": (12, 16), "terms": "ce"}),
    "8, another grid in a window": (
        8,
        {"size": (24, 32), "grid": (5, 5), "view": (40, 40), "window": [[0, 8, 24, 40]] * 2},
    ),
    "3": (0, {"size": (9, 12)}),
    "16": (0, {"size": (48, 64)}),
    "differs": (0, {"size": (6, 16)}),
    "a ratio": (0, {"size": (7, 8)}),
    "shrunk": (0, {"size": (1, 2)}),
    "another grid": (0, {"grid": (4, 4)}),
    "student aligned": (0, {"align_corners": True}),
    "target aligned": (0, {"target_align": True}),
}


@pytest.mark.parametrize(("stride", "case"), STRIDES.values(), ids=STRIDES.keys())
def test_the_host_knows_where_the_fast_kernels_cannot_run(stride, case):
    problem = make(**case)
    assert fast_stride(problem) == stride
    prepared = prepare(problem)
    assert prepared.stride == stride
    assert prepared.route[:, 0].tolist() == [int(stride > 0)] * 2


# Of a 5 x 6 target in a view of 10 x 12, so that a cell is 2 x 2, for a student of 3 x 4.
ROUTES = {
    "first cells": ([0, 0, 6, 8], (0, 0)),
    "moved": ([4, 2, 10, 10], (2, 1)),
    "over the edges": ([-4, 6, 2, 14], (-2, 3)),
    "within rounding": ([2 + 1e-10, -1e-10, 8, 8 + 1e-10], (1, 0)),
    "half a cell off": ([1, 0, 7, 8], None),
    "a little off": ([0, 1e-6, 6, 8 + 1e-6], None),
    "scaled rows": ([0, 0, 7, 8], None),
    "scaled columns": ([0, 0, 6, 10], None),
}


@pytest.mark.parametrize(("window", "shift"), ROUTES.values(), ids=ROUTES.keys())
@pytest.mark.parametrize("size", [(3, 4), (6, 8)], ids=["pixels", "cells"])
def test_routes_and_shifts(size, window, shift):
    flip = [False, True]
    problem = make(grid=(5, 6), view=(10, 12), size=size, window=[window] * 2, flip=flip)
    prepared = prepare(problem)
    if shift is None:
        assert prepared.route[:, 0].tolist() == [0, 0]
        return
    assert prepared.route[:, 0].tolist() == [1, 1]
    assert prepared.route[:, 1:].tolist() == [[*shift, 0], [*shift, 1]]
    if size == (3, 4):
        # Every pixel is a cell's centre: what the shift says is what the table of taps says.
        j = torch.arange(4, device=DEVICE)
        columns = torch.stack([shift[1] + j, shift[1] + 3 - j]).clamp(0, 5)
        rows = (shift[0] + torch.arange(3, device=DEVICE)).clamp(0, 4).expand(2, 3)
        nearest = [(taps.index + taps.fraction.round()).long() for taps in tables(problem)[2:]]
        assert torch.equal(nearest[0], rows)
        assert torch.equal(nearest[1], columns)


WIDE = {
    "student": ("student", 81, 1, 0),
    "student, just not": ("student", 79, 1, 1),
    "a high temperature does not help": ("student", 81, 9, 0),
    "a low one counts": ("target", 41, 0.5, 0),
    "a low one, just not": ("target", 39, 0.5, 1),
    "packed target": ("packed target", 81, 1, 0),
    "packed target, just not": ("packed target", 79, 1, 1),
}


@pytest.mark.usefixtures("classes_at_once")
@pytest.mark.parametrize(("where", "nats", "temperature", "route"), WIDE.values(), ids=WIDE.keys())
def test_wide_logits_do_not_take_cells(where, nats, temperature, route):
    problem = make(temperature=float(temperature), k=2 if where == "packed target" else None)
    problem.student.clamp_(-5, 5)
    problem.target.values.clamp_(-5, 0)
    logits = problem.student if where == "student" else problem.target.values
    logits[1, 0, 2, 3], logits[1, 1, 2, 3] = 0, -nats
    if where == "packed target":
        problem.target.tail[:] = math.log(math.expm1(1.0))  # the third class has mass near that of the others
    assert prepare(problem).route[:, 0].tolist() == [1, route]
    # The kernel for pixels takes any range, and a lost pixel has none.
    assert prepare(replace(problem, size=(3, 4), labels=problem.labels[:, :3, :4])).route[:, 0].tolist() == [1, 1]
    logits[1, 0, 2, 3] = math.nan
    # Cells cannot leave out a lost pixel of a target that is read as it was packed.
    assert prepare(problem).route[:, 0].tolist() == [1, int(where != "target")]


FACTORS = {
    "plain": {},
    "ce": {"terms": "ce"},
    "kl": {"terms": "kl"},
    "class weights": {"class_weight": torch.tensor([0.5, 0, 2], device=DEVICE)},
    "void does not teach": {"distill_void": False},
    "windows": {"window": [[-3, 1, 7, 9.5], [2, -6, 12, 2]], "flip": [True, False]},
    "windows, void": {"window": [[-3, 1, 7, 9.5], [2, -6, 12, 2]], "flip": [True, False], "distill_void": False},
    "no labels": {"labels": None, "use_ce": False, "distill_void": False},
    "another void": {"ignore_index": -1, "window": [[-3, 1, 7, 9.5], [2, -6, 12, 2]], "distill_void": False},
    "many labels": {"student": (2, 2), "size": (19, 150), "distill_void": False},
}


@pytest.mark.parametrize("case", FACTORS.values(), ids=FACTORS.keys())
def test_factors(case):
    problem = make(**case)
    ce = kl = 0.0
    if problem.use_ce:
        problem.labels[1, 0, 0] = 77  # out of range: counts for nothing here
        ce = float(ce_weight_sum(problem.labels.long(), problem.class_weight, problem.ignore_index, 3))
    if problem.target is not None:
        labels, size = problem.labels, problem.size
        kl = float(
            kl_pixels(
                problem.target, labels, size, problem.ignore_index, problem.window, problem.flip, problem.distill_void
            )[0].sum()
        )
    expected = [0.7 / ce, 1 / ce] if ce else [0, 0]
    expected_kl = [0.3 * 2.5 / kl, 2.5**2 / kl] if kl else [0, 0]
    actual = prepare(problem).factors
    assert actual[[0, 2]].tolist() == pytest.approx(expected, rel=1e-6)
    assert actual[[1, 3]].tolist() == pytest.approx(expected_kl, rel=1e-6)


@pytest.mark.parametrize("given", [4.5, 0.0])
def test_given_denominators(given):
    denominators = {name: torch.tensor(given, device=DEVICE) for name in ("ce_denominator", "kl_denominator")}
    actual = prepare(make(**denominators)).factors[:4].tolist()
    expected = [0.7 / given, 0.3 * 2.5 / given, 1 / given, 2.5**2 / given] if given else [0] * 4
    assert actual == pytest.approx(expected, rel=1e-6)


def test_nothing_to_count():
    problem = make(distill_void=False)
    problem.labels[:] = 255
    assert prepare(problem).factors[:4].tolist() == [0, 0, 0, 0]
