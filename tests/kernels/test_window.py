"""Windows and flips against a sampler that walks over single pixels with Python numbers."""

import math

import numpy as np
import pytest
import torch

from kdcache_kernels import PackedTarget, distill_denominators, pack, target_argmax_confidence
from kdcache_kernels.window import full_float32, hat_matrix, resample, view_positions, window_misses_view

VIEW = (12, 20)
WINDOWS = {
    "whole": (0.0, 0.0, 12.0, 20.0),
    "crop": (2.0, 4.0, 8.0, 16.0),
    "fraction": (1.25, 3.7, 9.1, 18.33),
    "enlarged": (5.0, 6.0, 6.5, 8.0),
    "over_the_edge": (-3.0, -2.5, 10.0, 26.0),
    "outside": (13.0, 2.0, 20.0, 9.0),
}


def sample_axis(j, n_out, start, stop, flip, n_view, n_cells, align_corners):
    """Position in the view, then the two cells and the weight of the second."""
    if flip:
        j = n_out - 1 - j
    p = start + (j + 0.5) * (stop - start) / n_out
    if align_corners:
        s = (p - 0.5) * (n_cells - 1) / (n_view - 1) if n_view > 1 else 0.0
    else:
        s = p * n_cells / n_view - 0.5
    s = min(max(s, 0.0), n_cells - 1.0)
    low = min(math.floor(s), n_cells - 1)
    return p, low, min(low + 1, n_cells - 1), s - low


def sample_image(cells, window, flip, size, align_corners, view=VIEW):
    """(C, h, w) -> (C, H, W) and the (H, W) pixels inside the view, one pixel after the other."""
    C, h, w = cells.shape
    image, inside = np.zeros((C, *size)), np.zeros(size, bool)
    for i in range(size[0]):
        py, y0, y1, fy = sample_axis(i, size[0], window[0], window[2], False, view[0], h, align_corners)
        for j in range(size[1]):
            px, x0, x1, fx = sample_axis(j, size[1], window[1], window[3], flip, view[1], w, align_corners)
            top = cells[:, y0, x0] * (1 - fx) + cells[:, y0, x1] * fx
            bottom = cells[:, y1, x0] * (1 - fx) + cells[:, y1, x1] * fx
            image[:, i, j] = top * (1 - fy) + bottom * fy
            inside[i, j] = 0 <= py <= view[0] and 0 <= px <= view[1]
    return image, inside


def softmax(x):
    e = np.exp(x - x.max(0))
    return e / e.sum(0)


@pytest.fixture
def batch(device):
    generator = torch.Generator().manual_seed(3)
    t = torch.randn(2, 4, 3, 5, generator=generator) * 3
    z = torch.randn(2, 4, 4, 6, generator=generator, dtype=torch.float64) * 2
    return z.to(device), pack(t.to(device), 4)[0]


@pytest.mark.interpreted(name=["enlarged", "over_the_edge"], flip=[True])
@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("name", [name for name in WINDOWS if name != "outside"])
def test_kl_through_a_window(distill_loss, backend, name, flip, align_corners, batch, device):
    z, values = batch
    size, T = (7, 9), 2.0
    target = PackedTarget(values, None, None, 4, VIEW, align_corners)
    windows = (WINDOWS[name], WINDOWS["fraction"])
    total, count = 0.0, 0
    for b, window in enumerate(windows):
        v, inside = sample_image(values[b].double().cpu().numpy(), window, flip and b == 0, size, align_corners)
        u, _ = sample_image(z[b].cpu().numpy(), (0, 0, *size), False, size, False, view=size)
        q, p = softmax(v / T), softmax(u / T)
        total += (q * (np.log(q) - np.log(p))).sum(0)[inside].sum()
        count += int(inside.sum())
    window_B4 = torch.tensor(windows, dtype=torch.float64, device=device)
    flip_B = torch.tensor([flip, False], device=device)
    options = {"size": size, "window_B4": window_B4, "flip_B": flip_B}
    for x, tolerance in ((z, 1e-12), (z.float(), 2e-6)):
        if x.dtype == torch.float64 and backend.impl != "reference":
            continue
        kl = distill_loss(x, None, target, kl_weight=1.0, temperature=T, **options).kl
        assert kl.item() == pytest.approx(T * T * total / count, rel=tolerance)
    assert distill_denominators(None, target, num_classes=4, **options).kl.item() == count


def test_view_of_another_size_than_the_label(distill_loss, batch, device):
    z, values = batch
    size = (7, 9)
    for align_corners in (False, True):
        target = PackedTarget(values, None, None, 4, VIEW, align_corners)
        window = torch.tensor([(0.0, 0, *VIEW)] * 2, dtype=torch.float64, device=device)
        without = distill_loss(z.float(), None, target, size=size, kl_weight=1.0).kl
        with_window = distill_loss(z.float(), None, target, size=size, kl_weight=1.0, window_B4=window).kl
        assert without.item() == pytest.approx(with_window.item(), rel=1e-6)


def test_flip_is_a_mirrored_image(distill_loss, batch, device):
    z, values = batch
    target = PackedTarget(values, None, None, 4, VIEW)
    window = torch.tensor([WINDOWS["fraction"]] * 2, dtype=torch.float64, device=device)
    flip = torch.tensor([True, True], device=device)
    z = z.float()
    straight = distill_loss(z, None, target, size=VIEW, kl_weight=1.0, window_B4=window).kl
    mirrored = distill_loss(z.flip(-1), None, target, size=VIEW, kl_weight=1.0, window_B4=window, flip_B=flip).kl
    torch.testing.assert_close(straight, mirrored, rtol=1e-6, atol=0)


def test_aligned_crop_is_a_slice(device):
    """A crop on cell borders, of the same scale, is exactly the slice of the whole upsampled target."""
    cells = torch.randn(1, 3, 6, 8, dtype=torch.float64, device=device)
    whole = view_positions(None, None, (24, 32), (24, 32), device).hat_matrices((6, 8), False, torch.float64)
    window = torch.tensor([[4.0, 8.0, 20.0, 28.0]], dtype=torch.float64, device=device)
    crop = view_positions(window, None, (24, 32), (16, 20), device).hat_matrices((6, 8), False, torch.float64)
    torch.testing.assert_close(resample(cells, *crop), resample(cells, *whole)[:, :, 4:20, 8:28])


@pytest.mark.parametrize("align_corners", [False, True])
def test_hat_rows_sum_to_one(align_corners, device):
    position = torch.linspace(-5, 30, 200, dtype=torch.float64, device=device)[None]
    for n_view, n_in in ((20, 5), (1, 1), (1, 3), (20, 1), (7, 20)):
        weights = hat_matrix(position, n_view, n_in, align_corners, torch.float64)
        torch.testing.assert_close(weights.sum(-1), torch.ones_like(position))
        assert int((weights > 0).sum(-1).max()) <= 2


def test_view_edges_are_inside(device):
    # Pixel centres at 0, 4, 8 (the far edge) and 12 of a view of 8.
    window = torch.tensor([[-2.0, -2.0, 14.0, 14.0]], dtype=torch.float64, device=device)
    inside = view_positions(window, None, (8, 8), (4, 4), device).inside()[0]
    assert inside.tolist() == [[i < 3 and j < 3 for j in range(4)] for i in range(4)]


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("name", WINDOWS)
def test_argmax_and_confidence(name, align_corners, batch, device):
    _, values = batch
    target = PackedTarget(values, None, None, 4, VIEW, align_corners)
    window = torch.tensor([WINDOWS[name]] * 2, dtype=torch.float64, device=device)
    flip = torch.tensor([False, True], device=device)
    argmax, confidence = target_argmax_confidence(target, (7, 9), window, flip)
    assert (argmax.dtype, confidence.dtype, argmax.shape) == (torch.uint8, torch.float16, (2, 7, 9))
    for b in range(2):
        v, inside = sample_image(values[b].double().cpu().numpy(), WINDOWS[name], b == 1, (7, 9), align_corners)
        p = softmax(v)
        np.testing.assert_array_equal(argmax[b].cpu().numpy(), p.argmax(0))
        np.testing.assert_allclose(confidence[b].cpu().numpy(), np.where(inside, p.max(0), 0), atol=5e-4)


def test_argmax_of_many_classes_and_of_nan(device):
    logits = torch.zeros(1, 300, 2, 2, device=device)
    logits[:, 299] = 5
    logits[0, 0, 0, 0] = torch.nan
    target = PackedTarget(*pack(logits, 8), 300, (8, 8))
    argmax, confidence = target_argmax_confidence(target, (8, 8))
    assert argmax.dtype == torch.int16
    assert int(argmax[0, 7, 7]) == 299
    assert confidence[0, 0, 0].isnan()
    assert confidence[0, 7, 7].isfinite()


def test_full_float32_sets_and_restores():
    """By its settings: a processor without bfloat16 units computes the same either way."""
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
    try:
        torch.set_float32_matmul_precision("medium")
        with full_float32():
            assert [backend.fp32_precision for backend in backends] == ["ieee", "ieee"]
        assert [backend.fp32_precision for backend in backends] == ["tf32", "bf16"]
        with pytest.raises(RuntimeError, match="boom"), full_float32():
            raise RuntimeError("boom")
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_a_window_that_only_touches_the_view_misses_it():
    """At each of its four edges, of a view that is wider than high."""
    H, W = VIEW
    touching = [(H, 0, H + 8, W), (0, W, H, W + 8), (-8, 0, 0, W), (0, -8, H, 0)]
    within = [(H - 0.5, 0, H + 8, W), (0, W - 0.5, H, W + 8), (-8, 0, 0.5, W), (0, -8, H, 0.5), (0, 0, H, W)]
    windows = torch.tensor([*touching, *within], dtype=torch.float64)
    assert window_misses_view(windows, VIEW).tolist() == [True] * len(touching) + [False] * len(within)


def test_denominators_count_labels_where_a_mirrored_image_shows_them():
    """The right half of the image lies beyond the view; mirrored, it is the left one, which is void."""
    target = PackedTarget(torch.zeros(2, 3, 2, 2, dtype=torch.float16), None, None, 3, (4, 4))
    labels = torch.zeros(2, 4, 4, dtype=torch.uint8)
    labels[:, :, :2] = 255
    window = torch.tensor([[0.0, 2, 4, 6]] * 2, dtype=torch.float64)
    for flip, count in (([False, False], 0), ([True, False], 8), ([True, True], 16)):
        options = {"window_B4": window, "flip_B": torch.tensor(flip), "distill_void": False}
        assert distill_denominators(labels, target, num_classes=3, **options).kl.item() == count
