"""The fused pack and densify against the reference, bitwise where it is, and against float64 where it rounds.

In Triton's interpreter a class of a block costs half a millisecond, so it gets fewer classes and examples.
"""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kdcache_kernels import LOGIT_LIMIT, ValueRangeError, densify, pack, topk

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# numpy, which computes for the interpreter, warns of infinities that a GPU passes over in silence.
INFINITIES = pytest.mark.filterwarnings("ignore:(divide by zero|invalid value|overflow) encountered:RuntimeWarning")


def random_logits(shape, seed=0, scale=4.0, device="cpu"):
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale).to(device)


def assert_packs_like_the_reference(logits, k, backend):
    """Values and class ids bitwise; the tail to a unit of float16 of the exact one."""
    values, indices, tail = packed = pack(logits, k, impl=backend.impl)
    expected_values, expected_indices, expected_tail = topk.pack(logits, k)
    assert values.dtype == torch.float16
    assert values.is_contiguous() or backend.impl == "reference"
    torch.testing.assert_close(values, expected_values, rtol=0, atol=0, equal_nan=True)
    if k == logits.shape[1]:
        assert indices is None
        assert tail is None
        return packed
    assert indices.dtype == topk.index_dtype(logits.shape[1])
    assert torch.equal(indices.long(), expected_indices.long())
    exact = topk.pack(logits.double(), k)[2].double()
    assert torch.equal(tail.isnan(), expected_tail.isnan())
    torch.testing.assert_close(tail.double(), exact, rtol=2**-10, atol=1e-5, equal_nan=True)
    return packed


@st.composite
def cases(draw):
    shape = tuple(draw(st.integers(low, high)) for low, high in ((0, 3), (1, 40), (1, 4), (1, 5)))
    return shape, draw(st.integers(1, shape[1])), draw(st.sampled_from(DTYPES[:2])), draw(st.sampled_from([0.0, 0.5]))


def test_any_shape(backend):
    @settings(max_examples=8 if backend.interpreted else 80, deadline=None)
    @given(case=cases(), seed=st.integers(0, 1000))
    def check(case, seed):
        shape, k, dtype, grid = case
        logits = random_logits(shape, seed, device=backend.device)
        if grid:  # many equal logits
            logits = (logits / grid).round() * grid
        packed = assert_packs_like_the_reference(logits.to(dtype), k, backend)
        assert_densifies(*packed, shape[1], backend)

    check()


def assert_densifies(values, indices, tail, num_classes, backend):
    """Kept classes are exact, the others within a few units of float32 of float64."""
    dense = densify(values, indices, tail, num_classes, impl=backend.impl)
    assert dense.dtype == torch.float32
    assert dense.is_contiguous()
    exact = topk.densify(values, indices, tail, num_classes, torch.float64)
    torch.testing.assert_close(dense.double(), exact, rtol=4e-7, atol=2e-6, equal_nan=True)
    if indices is not None:
        torch.testing.assert_close(dense.gather(1, indices.long()), values.float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.interpreted(num_classes=[2, 3, 19, 33, 257])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_classes", [2, 3, 19, 33, 150, 257, 300])
def test_any_number_of_classes(num_classes, dtype, backend):
    logits = random_logits((2, num_classes, 3, 5), num_classes, device=backend.device).to(dtype)
    some = {1, min(4, num_classes - 1), num_classes - 1}
    for k in {5} if backend.interpreted and num_classes > 19 else some:
        assert_densifies(*assert_packs_like_the_reference(logits, k, backend), num_classes, backend)
    assert_packs_like_the_reference(logits, num_classes, backend)


@pytest.mark.parametrize("k", [4, 9])
def test_any_strides(k, backend):
    logits = random_logits((3, 9, 6, 8), device=backend.device)
    for strided in (
        logits.to(memory_format=torch.channels_last),
        logits[1:, :, 1:, 2:-1],
        logits[:, :, ::2, ::3],
        logits.transpose(2, 3),
        logits.permute(0, 2, 1, 3)[:, :9].contiguous().permute(0, 2, 1, 3)[:, :, :, :1],
        logits[:1].expand(2, -1, -1, -1),
        logits[:, :, :1, :1].expand(-1, -1, 2, 3),
    ):
        classes = min(k, strided.shape[1])
        assert_packs_like_the_reference(strided, classes, backend)


@pytest.mark.interpreted(k=[2, 4])
@pytest.mark.parametrize(("shape", "k"), [((2, 5, 37, 41), 2), ((1, 300, 17, 19), 3), ((3, 4, 1, 700), 4)], ids=str)
def test_more_pixels_than_a_block(shape, k, backend):
    packed = assert_packs_like_the_reference(random_logits(shape, device=backend.device), k, backend)
    assert_densifies(*packed, shape[1], backend)


def test_equal_logits_keep_the_lowest_ids(backend):
    """Equal after the maximum is subtracted: -1e-8 and -2e-8 are both 3 below 3."""
    logits = torch.zeros(1, 12, 1, 4, device=backend.device)
    logits[0, 9, 0, 0] = 3
    logits[0, [2, 5, 7], 0, 0] = torch.tensor([-2e-8, -1e-8, 1e-8], device=backend.device)
    logits[0, ::2, 0, 1] = -0.0
    logits[0, 1::3, 0, 2] = 1
    logits[0, :, 0, 3] = -torch.arange(12.0, device=backend.device)
    _, indices, _ = assert_packs_like_the_reference(logits, 5, backend)
    assert indices[0, :, 0].T.tolist() == [[9, 0, 1, 2, 3], [0, 1, 2, 3, 4], [1, 4, 7, 10, 0], [0, 1, 2, 3, 4]]
    assert_packs_like_the_reference(logits, 12, backend)


@INFINITIES
@pytest.mark.parametrize("k", [1, 4, 6])
def test_extremes(k, backend):
    """One pixel each; a lost one is NaN throughout, and its class ids are in range."""
    inf, nan = math.inf, math.nan
    pixels = [
        [0, -inf, 1, -inf, -inf, 2],
        [-inf, 5, -inf, -inf, -inf, -inf],
        [3e38, -3e38, 0, -inf, 3e38, 1],
        [-3e38] * 6,
        [0, 6.1e4, 1e5, -1e5, 7, 8],
        [1e-40, 2e-40, -1e-40, 0, -0.0, 1e-38],
        [0, nan, 1, 2, 3, 4],
        [0, inf, 1, 2, 3, 4],
        [inf, -inf, nan, inf, 0, -nan],
        [-inf] * 6,
    ]
    lost = [False] * 6 + [True] * 4
    logits = torch.tensor(pixels, device=backend.device).T.reshape(1, 6, 2, 5)
    values, indices, tail = assert_packs_like_the_reference(logits, k, backend)
    assert values.isnan().all(1).flatten().tolist() == lost
    assert values.isnan().any(1).flatten().tolist() == lost
    assert not values.isinf().any()
    if k < 6:
        assert int(indices.max()) < 6
        assert tail.isnan().flatten().tolist() == lost
        assert tail.flatten()[1].item() == -LOGIT_LIMIT
        assert_densifies(values, indices, tail, 6, backend)


def test_the_largest_logit_is_plus_zero(backend):
    """-0 and +0 are equal, but a store holds bytes."""
    for k in (2, 5):
        values, _, _ = pack(random_logits((1, 5, 3, 3), device=backend.device), k, impl=backend.impl)
        assert not values[values == 0].signbit().any()


def test_nothing_to_pack(backend):
    for shape in ((0, 7, 2, 3), (2, 7, 0, 3)):
        values, indices, tail = pack(torch.zeros(shape, device=backend.device), 3, impl=backend.impl)
        assert values.shape == indices.shape == (shape[0], 3, *shape[2:])
        assert tail.shape == (shape[0], *shape[2:])
    empty = pack(torch.zeros(0, 7, 2, 3, device=backend.device), 3, impl=backend.impl)
    assert densify(*empty, 7, impl=backend.impl).shape == (0, 7, 2, 3)


def test_the_round_trip_keeps_the_distribution(backend):
    """Kept probabilities to half a unit of a float16 logit, the mass of the others to one of the tail."""
    logits = random_logits((2, 33, 4, 5), scale=2.0, device=backend.device)
    values, indices, tail = pack(logits, 6, impl=backend.impl)
    p = densify(values, indices, tail, 33, impl=backend.impl).double().softmax(1)
    exact = logits.double().softmax(1)
    ids_long = indices.long()
    torch.testing.assert_close(p.gather(1, ids_long), exact.gather(1, ids_long), rtol=4e-3, atol=0)
    torch.testing.assert_close(
        1 - p.gather(1, ids_long).sum(1), 1 - exact.gather(1, ids_long).sum(1), rtol=4e-3, atol=1e-12
    )


@pytest.mark.parametrize("scale", [1.0, 4.0, 12.0])
def test_what_missing_classes_share_is_rounded_once(scale, backend):
    """To half a unit of float32 but for the sum of exponentials, and to no side: many classes share the error."""
    num_classes = 21 if backend.interpreted else 171
    packed = topk.pack(random_logits((1, num_classes, 6, 8), scale=scale, device=backend.device), 8)
    exact = densify(*packed, num_classes, torch.float64, impl="reference")
    actual = densify(*packed, num_classes, impl=backend.impl)
    unit = torch.nextafter(exact.float().abs(), torch.tensor(torch.inf, device=backend.device)) - exact.float().abs()
    error = actual.double() - exact
    assert (error.abs() <= unit.double() / 2 + 3e-7).all()
    if scale == 1:
        assert abs(error.mean().item()) <= 8e-8


@INFINITIES
def test_densify_what_another_writer_stored(backend):
    """Infinite or NaN values and tails come out as from the reference."""
    inf, nan = math.inf, math.nan
    values = torch.tensor([[0, -1], [0, -1], [0, -1], [nan, -1], [-inf, -inf], [0, -inf], [inf, 0], [-6e4, -6e4]])
    tail = torch.tensor([-inf, inf, nan, 0, 0, 1, 2, 3])
    parts = (
        values.T.reshape(1, 2, 2, 4).half().to(backend.device),
        torch.tensor([3, 1], dtype=torch.uint8).reshape(1, 2, 1, 1).expand(1, 2, 2, 4).to(backend.device),
        tail.reshape(1, 2, 4).half().to(backend.device),
    )
    assert_densifies(*parts, 5, backend)


def test_densify_other_dtypes_and_strides(backend):
    values, indices, tail = topk.pack(random_logits((3, 21, 6, 8), device=backend.device), 5)
    assert_densifies(values[1:, :, ::2, 1:-1], indices[1:, :, ::2, 1:-1], tail[1:, ::2, 1:-1], 21, backend)
    shuffled = (values.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2), indices, tail)
    assert_densifies(*shuffled, 21, backend)
    assert_densifies(values.float(), indices, tail.double(), 21, backend)


@pytest.mark.parametrize(("num_classes", "wrong"), [(9, 9), (9, 255), (300, 300), (300, 65535)])
def test_class_ids_out_of_range(num_classes, wrong, backend):
    values, indices, tail = topk.pack(random_logits((1, num_classes, 2, 3), device=backend.device), 3)
    ids = indices.long()
    ids[0, 1, 1, 1] = wrong
    indices = ids.to(indices.dtype)
    if backend.device.type == "cpu" and backend.impl != "triton":
        with pytest.raises(ValueRangeError, match=rf"Invalid indices: ids \[{wrong}\] are not below {num_classes}"):
            densify(values, indices, tail, num_classes, impl=backend.impl)
        return
    lost = densify(values, indices, tail, num_classes, impl=backend.impl).isnan().any(1)
    assert lost.flatten().tolist() == [False] * 4 + [True, False]


def test_the_result_does_not_depend_on_the_threads():
    """Of numba: the others have none of their own."""
    logits = random_logits((3, 40, 33, 35))
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            packed = pack(logits, 8, impl="numba")
            results.append((*packed, densify(*packed, 40, impl="numba"), pack(logits, 40, impl="numba")[0]))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            np.testing.assert_array_equal(a.numpy(), b.numpy())


def test_the_families_densify_dense_targets():
    """The public function converts those itself; inside the loss a family does. Never a view of the stored values."""
    from kdcache_kernels.cpu import topk as numba_topk
    from kdcache_kernels.gpu import topk as triton_topk

    values = random_logits((2, 5, 3, 4)).to(memory_format=torch.channels_last)
    for family in (numba_topk, triton_topk):
        for dtype in (torch.float16, torch.float32):
            stored = values.to(dtype)
            dense = family.densify(stored, None, None, 5)
            assert torch.equal(dense, stored.float())
            assert dense.is_contiguous()
            assert dense.data_ptr() != stored.data_ptr()
