"""The teacher's class and its probability at label size, against float64 and the definition written out."""

import importlib
import math

import pytest
import torch

from kdcache_kernels import PackedTarget, ValueRangeError, pack, target_argmax_confidence
from kdcache_kernels.library import FAMILIES
from kdcache_kernels.window import resample, view_positions

HALF_UNIT, SMALLEST = 2**-10, 2**-24


def random_target(num_classes, k, grid, view_size, device, *, B=2, align_corners=False, seed=0):
    logits = torch.randn(B, num_classes, *grid, generator=torch.Generator().manual_seed(seed)) * 4
    return PackedTarget(*pack(logits.to(device), k, impl="reference"), num_classes, view_size, align_corners)


def exact_logits(target, size, window, flip):
    """(B, C, H, W) float64."""
    positions = view_positions(window, flip, target.view_size, size, target.device)
    grid = target.values.shape[2:]
    matrices = positions.hat_matrices((grid[0], grid[1]), target.align_corners, torch.float64)
    return resample(target.densify(torch.float64), *matrices), positions.inside()


def assert_exact(target, size, backend, window=None, flip=None):
    """Ids but where the two largest logits are a rounding apart; confidences to a unit of float16, 0 outside."""
    ids, confidence = target_argmax_confidence(target, size, window, flip, impl=backend.impl)
    assert ids.dtype == (torch.uint8 if target.num_classes <= 256 else torch.int16)
    assert confidence.dtype == torch.float16
    assert ids.shape == confidence.shape == (target.batch_size, *size)
    logits, inside = exact_logits(target, size, window, flip)
    highest = logits.amax(1)
    argmax_logit = logits.gather(1, ids.long()[:, None])[:, 0]
    torch.testing.assert_close(argmax_logit, highest, rtol=0, atol=2e-5)
    assert (ids == logits.argmax(1)).float().mean() > 0.99
    exact = (highest - logits.logsumexp(1)).exp() * inside
    torch.testing.assert_close(confidence.double(), exact, rtol=HALF_UNIT, atol=SMALLEST)
    return ids, confidence


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("size", [(12, 20), (9, 7), (3, 5), (2, 3), (1, 1), (6, 33)], ids=str)
def test_any_size(size, align_corners, backend):
    """Enlarging, shrinking, one pixel; ratios that are no integers."""
    for k in (4, 9):
        target = random_target(9, k, (3, 5), (12, 20), backend.device, align_corners=align_corners)
        assert_exact(target, size, backend)
    assert_exact(random_target(3, 3, (1, 1), (1, 1), backend.device, align_corners=align_corners), size, backend)


@pytest.mark.parametrize(("num_classes", "dtype"), [(32768, torch.int16), (32769, torch.int32), (70000, torch.int32)])
def test_ids_of_many_classes_are_not_negative(num_classes, dtype, device):
    logits = torch.zeros(1, num_classes, 1, 1, device=device)
    logits[0, num_classes - 1] = 1
    target = PackedTarget(*pack(logits, num_classes), num_classes, (2, 2))
    for impl in ("auto", "reference"):
        ids, _ = target_argmax_confidence(target, (2, 2), impl=impl)
        assert ids.dtype == dtype
        assert (ids == num_classes - 1).all()


@pytest.mark.interpreted(num_classes=[1, 2, 21, 257])
@pytest.mark.parametrize("num_classes", [1, 2, 21, 150, 256, 257])
def test_any_number_of_classes(num_classes, backend):
    for k in {num_classes, min(5, num_classes)}:
        assert_exact(random_target(num_classes, k, (3, 4), (9, 16), backend.device, seed=k), (7, 11), backend)


@pytest.mark.interpreted(size=[(5, 61)])
@pytest.mark.parametrize(
    ("num_classes", "grid", "size"), [(5, (5, 40), (35, 301)), (300, (2, 3), (19, 67)), (5, (2, 9), (5, 61))], ids=str
)
def test_more_columns_than_a_block(num_classes, grid, size, backend):
    """Blocks of columns have an end, and 300 classes make the blocks short."""
    assert_exact(random_target(num_classes, 4, grid, size, backend.device, B=3), size, backend)


@pytest.mark.parametrize("k", [3, 7])
def test_windows_and_flips(k, backend):
    """The whole view, a crop, two scales, over the edge; mirrored and not; where the view ends, confidence is 0."""
    target = random_target(7, k, (4, 6), (16, 24), backend.device, B=6)
    windows = [[0, 0, 16, 24], [4, 8, 12, 20], [1.3, 2.7, 9.9, 11.1], [-8, -12, 24, 36], [10, 15, 30, 40], [7, 7, 8, 8]]
    window = torch.tensor(windows, dtype=torch.float64, device=backend.device)
    flip = torch.tensor([False, True, True, True, False, False], device=backend.device)
    size = (10, 14)
    _, confidence = assert_exact(target, size, backend, window, flip)
    assert (confidence[4, 4:] == 0).all()
    assert (confidence[:4, 3:7, 4:10] > 0).all()
    assert_exact(target, size, backend, window)
    mirrored, _ = assert_exact(target, size, backend, None, ~torch.zeros_like(flip))
    plain, _ = assert_exact(target, size, backend)
    assert torch.equal(mirrored, plain.flip(2))


def test_outside_the_view_the_class_is_that_of_the_nearest_edge(backend):
    values = torch.full((1, 3, 2, 2), -5.0, dtype=torch.float16, device=backend.device)
    values[0, [0, 1, 2, 0], [0, 0, 1, 1], [0, 1, 0, 1]] = 0
    target = PackedTarget(values, None, None, 3, (2, 2))
    window = torch.tensor([[-2.0, -2.0, 4.0, 4.0]], dtype=torch.float64, device=backend.device)
    ids, confidence = target_argmax_confidence(target, (6, 6), window, impl=backend.impl)
    assert ids[0].tolist() == [[0] * 3 + [1] * 3] * 3 + [[2] * 3 + [0] * 3] * 3
    assert (confidence[0, 2:4, 2:4] > 0.9).all()
    assert int((confidence != 0).sum()) == 4


def test_equal_logits_choose_the_lowest_class(backend):
    values = torch.zeros(1, 6, 2, 2, dtype=torch.float16, device=backend.device)
    values[:, :2] = -1
    ids, confidence = target_argmax_confidence(PackedTarget(values, None, None, 6, (8, 8)), (8, 8), impl=backend.impl)
    assert (ids == 2).all()
    expected = 1 / (4 + 2 * math.exp(-1))
    torch.testing.assert_close(confidence, torch.full_like(confidence, expected), rtol=HALF_UNIT, atol=0)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # numpy's, in the interpreter
@pytest.mark.parametrize("k", [2, 4])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_lost_pixels_are_nan_as_far_as_they_reach(bad, k, backend):
    """Exactly where their weight is above 0, and the rest is what it was."""
    target = random_target(4, k, (3, 4), (12, 16), backend.device)
    for size in ((12, 16), (3, 4), (6, 6)):
        before, sure = target_argmax_confidence(target, size, impl=backend.impl)
        values = target.values.clone()
        values[1, 1, 1, 2] = bad
        broken = PackedTarget(values, target.indices, target.tail, 4, (12, 16))
        ids, confidence = target_argmax_confidence(broken, size, impl=backend.impl)
        touched = torch.zeros(2, 1, 3, 4, dtype=torch.float64, device=backend.device)
        touched[1, 0, 1, 2] = 1
        positions = view_positions(None, None, (12, 16), size, backend.device)
        reached = resample(touched.expand(2, 1, 3, 4), *positions.hat_matrices((3, 4), False, torch.float64))[:, 0] > 0
        assert torch.equal(confidence.isnan(), reached)
        assert torch.equal(ids[~reached], before[~reached])
        assert torch.equal(confidence[~reached], sure[~reached])
    outside = torch.tensor([[0.0, 0, 12, 16], [-4, 0, 0.5, 16]], dtype=torch.float64, device=backend.device)
    _, confidence = target_argmax_confidence(broken, (9, 4), outside, impl=backend.impl)
    assert not confidence[1, :8].isnan().any()


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_a_nan_window_is_seen(backend):
    """On CUDA, where looking would wait for the device, by its confidences; the class is still one."""
    target = random_target(5, 5, (3, 4), (12, 16), backend.device)
    window = torch.tensor([[0.0, 0, 12, 16], [0, math.nan, 12, 16]], dtype=torch.float64, device=backend.device)
    if backend.impl == "reference":
        compute = importlib.import_module("kdcache_kernels.reference").argmax_confidence_reference
    else:
        compute = importlib.import_module(f"kdcache_kernels{FAMILIES[backend.impl]}.argmax").argmax_confidence
    ids, confidence = compute(target, (6, 7), window, None)
    assert confidence[0].isfinite().all()
    assert confidence[1].isnan().all()
    assert int(ids.max()) < 5


def test_class_ids_out_of_range(backend):
    target = random_target(9, 3, (2, 3), (4, 6), backend.device, B=1)
    target.indices[0, 1, 1, 2] = 9
    if backend.device.type == "cpu" and backend.impl != "triton":
        with pytest.raises(ValueRangeError, match=r"Invalid indices: ids \[9\] are not below 9"):
            target_argmax_confidence(target, (4, 6), impl=backend.impl)
        return
    _, confidence = target_argmax_confidence(target, (4, 6), impl=backend.impl)
    assert confidence[0, 3, 5].isnan()
    assert confidence[0, 0].isfinite().all()


def test_no_images(backend):
    target = random_target(9, 3, (2, 3), (4, 6), backend.device, B=0)
    ids, confidence = target_argmax_confidence(target, (4, 6), impl=backend.impl)
    assert ids.shape == confidence.shape == (0, 4, 6)
    assert (ids.dtype, confidence.dtype) == (torch.uint8, torch.float16)


def test_any_strides(backend):
    whole = random_target(9, 4, (6, 8), (24, 32), backend.device, B=3)
    values, indices = (x[1:, :, ::2, 1:-1] for x in (whole.values, whole.indices))
    assert_exact(PackedTarget(values, indices, whole.tail[1:, ::2, 1:-1], 9, (24, 32)), (10, 12), backend)
    dense = random_target(9, 9, (6, 8), (24, 32), backend.device)
    values = dense.values.to(memory_format=torch.channels_last)
    assert_exact(PackedTarget(values, None, None, 9, (24, 32)), (10, 12), backend)


def test_the_result_does_not_depend_on_the_threads():
    """Of numba: the others have none of their own."""
    target = random_target(40, 8, (17, 19), (68, 76), "cpu", B=3)
    flip = torch.tensor([True, False, True])
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(target_argmax_confidence(target, (68, 76), None, flip, impl="numba"))
    finally:
        torch.set_num_threads(before)
    for ids, confidence in results[1:]:
        assert torch.equal(ids, results[0][0])
        assert torch.equal(confidence, results[0][1])
