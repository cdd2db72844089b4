"""Packing and densifying: round trips, ties, extremes, and how many classes to keep."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kdcache_kernels import LOGIT_LIMIT, PackedTarget, ValueRangeError, choose_k, densify, gradient_error, pack


def random_logits(shape, device, seed=0, scale=4.0):
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale).to(device)


@st.composite
def shapes_and_k(draw):
    shape = tuple(draw(st.integers(low, high)) for low, high in ((0, 3), (1, 40), (1, 4), (1, 4)))
    return shape, draw(st.integers(1, shape[1]))


@settings(max_examples=60, deadline=None)
@given(case=shapes_and_k(), seed=st.integers(0, 1000))
def test_round_trip(case, seed):
    """The kept classes come back to float16, the others share what is left, and the whole sums to one."""
    (B, C, h, w), k = case
    logits = random_logits((B, C, h, w), "cpu", seed)
    values, indices, tail = pack(logits, k)
    target = PackedTarget(values, indices, tail, C, (4 * h, 4 * w))
    dense = target.densify(torch.float64)
    assert dense.shape == logits.shape
    assert target.k == k
    exact, p = logits.double().softmax(1), dense.softmax(1)
    kept = torch.ones(B, C, h, w, dtype=torch.bool)
    if k < C:
        assert indices.dtype == torch.uint8
        kept = torch.zeros(B, C, h, w, dtype=torch.bool).scatter(1, indices.long(), True)
        assert (kept.sum(1) == k).all()
        torch.testing.assert_close(values, values.sort(1, descending=True).values)
        # Relative error of a probability is the absolute error of its logit: half a unit of float16.
        rest = torch.where(kept, 0, p).sum(1)
        torch.testing.assert_close(rest, torch.where(kept, 0, exact).sum(1), rtol=0.02, atol=1e-7)
    torch.testing.assert_close(p[kept], exact[kept], rtol=0.02, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_dense_is_the_logits_minus_their_maximum(dtype, device):
    logits = random_logits((2, 21, 3, 5), device).to(dtype)
    values, indices, tail = pack(logits, 21, impl="reference" if dtype == torch.float64 else "auto")
    assert indices is None
    assert tail is None
    wide = logits.double()
    assert torch.equal(values, (wide - wide.amax(1, keepdim=True)).to(torch.float16))
    assert torch.equal(densify(values, None, None, 21), values.float())


def test_layout_does_not_matter(device):
    logits = random_logits((2, 9, 4, 6), device)
    for k in (4, 9):
        plain, strided = pack(logits, k), pack(logits.to(memory_format=torch.channels_last), k)
        assert all(a is b or torch.equal(a, b) for a, b in zip(plain, strided, strict=True))


def test_ties_keep_the_lowest_ids(device):
    _, indices, _ = pack(torch.zeros(1, 50, 2, 2, device=device), 3)
    assert indices[0, :, 0, 0].tolist() == [0, 1, 2]
    logits = torch.zeros(1, 50, 1, 1, device=device)
    logits[0, 40:] = 1
    assert pack(logits, 12)[1].flatten().tolist() == [*range(40, 50), 0, 1]


@pytest.mark.parametrize(("num_classes", "dtype"), [(256, torch.uint8), (257, torch.uint16), (400, torch.uint16)])
def test_many_classes(num_classes, dtype, device):
    logits = torch.arange(float(num_classes), device=device).reshape(1, -1, 1, 1) / 10
    values, indices, tail = pack(logits, 8)
    assert indices.dtype == dtype
    assert indices.long().flatten().tolist() == list(range(num_classes - 1, num_classes - 9, -1))
    dense = densify(values, indices, tail, num_classes)
    assert dense.argmax(1).item() == num_classes - 1


def test_class_ids_end_at_sixteen_bits(device):
    """The last id of 65,536 classes is kept; of more classes none wraps round: only dense targets are made."""
    logits = torch.zeros(1, 65536, 1, 1, device=device)
    logits[0, 65535] = 1
    assert pack(logits, 2)[1].long().flatten().tolist() == [65535, 0]
    many = torch.zeros(1, 70000, 1, 1, device=device)
    many[0, 69999] = 1
    with pytest.raises(ValueRangeError, match="top 2 of 70000 classes"):
        pack(many, 2)
    values, indices, tail = pack(logits, 2)
    with pytest.raises(ValueRangeError, match="70000 classes"):
        PackedTarget(values, indices, tail, 70000, (1, 1))
    assert pack(many, 70000)[0].argmax().item() == 69999


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_tail_is_the_log_odds_of_the_rest(impl, device):
    logits = random_logits((1, 30, 2, 2), device)
    _, indices, tail = pack(logits, 4, impl=impl)
    p_in = logits.double().softmax(1).gather(1, indices.long()).sum(1)
    torch.testing.assert_close(tail.double(), ((1 - p_in) / p_in).log(), rtol=1e-3, atol=1e-3)


def test_extremes_are_clamped_to_finite_values(device):
    logits = torch.full((1, 6, 1, 1), -torch.inf, device=device)
    logits[0, 2] = 3.0
    values, indices, tail = pack(logits, 2)
    assert values.flatten().tolist() == [0, -LOGIT_LIMIT]
    assert tail.item() == -LOGIT_LIMIT
    p = densify(values, indices, tail, 6).softmax(1).flatten()
    assert p.tolist() == [0, 0, 1, 0, 0, 0]
    # A tail of minus infinity, which another writer might store, is clamped as well.
    assert densify(values, indices, tail.fill_(-torch.inf), 6).isfinite().all()
    assert densify(values, indices, tail.fill_(torch.inf), 6).isfinite().all()
    huge = torch.tensor([3e38, -3e38], device=device).reshape(1, 2, 1, 1)
    assert pack(huge, 2)[0].flatten().tolist() == [0, -LOGIT_LIMIT]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("k", [2, 5])
def test_lost_pixels_are_nan(bad, k, device):
    logits = random_logits((1, 5, 1, 3), device)
    logits[0, 3, 0, 1] = bad
    logits[0, :, 0, 2] = -torch.inf
    values, indices, tail = pack(logits, k)
    assert values.isnan().all(1).flatten().tolist() == [False, True, True]
    assert values[..., 0].isfinite().all()
    if k == 2:
        assert tail.isnan().flatten().tolist() == [False, True, True]
        assert int(indices.max()) < 5
    assert densify(values, indices, tail, 5).isnan().any(1).flatten().tolist() == [False, True, True]


def test_class_ids_out_of_range(device):
    values, indices, tail = pack(random_logits((1, 9, 2, 2), device), 3)
    indices[0, 1, 1, 1] = 9
    if device.type == "cpu":
        with pytest.raises(ValueRangeError, match=r"Invalid indices: ids \[9\] are not below 9"):
            densify(values, indices, tail, 9)
    else:
        assert densify(values, indices, tail, 9).isnan().any(1).flatten().tolist() == [False] * 3 + [True]


def test_to_moves_every_part(device):
    target = PackedTarget(*pack(random_logits((1, 9, 2, 2), "cpu"), 3), 9, (8, 8), True)
    moved = target.to(device, non_blocking=True)
    assert {t.device.type for t in (moved.values, moved.indices, moved.tail)} == {device.type}
    assert (moved.num_classes, moved.view_size, moved.align_corners, moved.batch_size) == (9, (8, 8), True, 1)


def smooth_logits(num_classes, scale, device, seed=0):
    coarse = random_logits((2, num_classes, 3, 3), device, seed, scale)
    return torch.nn.functional.interpolate(coarse, (8, 8), mode="bicubic")


def test_gradient_error_falls_with_k_and_rises_with_temperature(device):
    logits = smooth_logits(21, 4.0, device)
    errors = [gradient_error(logits, k, 1.0, (16, 16)) for k in (1, 2, 4, 8, 16, 21)]
    assert errors == sorted(errors, reverse=True)
    assert 0 < errors[-1] < 2e-3
    by_temperature = [gradient_error(logits, 8, T, (16, 16)) for T in (1.0, 2.0, 4.0)]
    assert by_temperature == sorted(by_temperature)
    assert gradient_error(logits, 8, 2.0, (16, 16)) == by_temperature[1]


def test_gradient_error_is_what_it_says():
    """Against the definition, written out for one pixel without a resize."""
    logits = random_logits((1, 12, 1, 1), "cpu").double()
    noise = torch.randn(logits.shape, generator=torch.Generator().manual_seed(20), dtype=torch.float64)
    p, student = (logits / 2).softmax(1), ((logits + noise) / 2).softmax(1)
    kept = (densify(*pack(logits, 4, impl="reference"), 12, torch.float64) / 2).softmax(1)
    expected = ((kept - p).norm() / (student - p).norm()).item()
    assert gradient_error(logits, 4, 2.0, (1, 1)) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("align_corners", [False, True])
def test_gradient_error_is_over_all_pixels_of_all_images(align_corners):
    """Resized as the head is, every image with noise of its own."""
    logits, size = random_logits((2, 12, 3, 4), "cpu").double(), (7, 9)
    logits[1] *= 3
    generator = torch.Generator().manual_seed(20)
    noise = torch.stack([torch.randn(1, 12, 3, 4, generator=generator, dtype=torch.float64)[0] for _ in range(2)])
    kept = densify(*pack(logits, 4, impl="reference"), 12, torch.float64)
    p, student, approximate = (
        (torch.nn.functional.interpolate(x, size, mode="bilinear", align_corners=align_corners) / 2).softmax(1)
        for x in (logits, logits + noise, kept)
    )
    expected = ((approximate - p).norm() / (student - p).norm()).item()
    actual = gradient_error(logits, 4, 2.0, size, align_corners=align_corners)
    assert actual == pytest.approx(expected, rel=1e-12)
    logits = smooth_logits(40, 4.0, "cpu")
    _, table = choose_k(logits, size, 40, align_corners=align_corners)
    assert table[8] == {T: gradient_error(logits, 8, T, size, align_corners=align_corners) for T in (1.0, 2.0)}


def test_gradient_error_of_nothing_to_learn():
    assert gradient_error(torch.zeros(1, 1, 2, 2), 1, 1.0, (4, 4)) == 0
    assert math.isnan(gradient_error(torch.full((1, 3, 2, 2), torch.nan), 1, 1.0, (4, 4)))


def test_choose_k(device):
    assert choose_k(smooth_logits(32, 4.0, device), (16, 16), 32) == (32, {})
    logits = smooth_logits(40, 4.0, device)
    logits[:, 12:] -= 30  # 12 classes that matter: 8 are too few
    best_k, table = choose_k(logits, (16, 16), 40)
    assert best_k == 16
    assert list(table) == [8, 16]
    assert max(table[8].values()) > 0.05 >= max(table[16].values())
    flat, table = choose_k(smooth_logits(40, 1.0, device), (16, 16), 40)
    assert flat == 40
    assert list(table) == [8, 16, 32, 40]
    assert set(table[8]) == {1.0, 2.0}
    assert all(max(table[k].values()) > 0.05 for k in (8, 16, 32))
