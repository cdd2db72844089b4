"""What is particular to the CPU kernels: threads, tiles, the two layouts."""

import numpy as np
import pytest
import torch

from kdcache_kernels import PackedTarget, distill_loss, pack
from kdcache_kernels.cpu import geometry as numba_loss_geometry
from kdcache_kernels.cpu import loss as numba_loss
from kdcache_kernels.cpu import math as numba_math
from kdcache_kernels.cpu.geometry import Geometry, plans


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def arguments(classes, grid, size, scale=4.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (torch.randn(2, classes, *grid, generator=generator) * scale for _ in range(2))
    labels = torch.randint(0, classes, (2, *size), generator=generator)
    labels[torch.rand(labels.shape, generator=generator) < 0.1] = 255
    return student, labels, PackedTarget(*pack(teacher, classes, impl="reference"), classes, size, False)


def loss_and_gradient(student, labels, target, impl="numba", **options):
    student = student.clone().requires_grad_()
    options = {"ce_weight": 0.5, "kl_weight": 0.5, "temperature": 2.0, **options}
    parts = distill_loss(student, labels, target, impl=impl, **options)
    (gradient,) = torch.autograd.grad(parts.loss, student)
    return parts.loss.detach(), gradient


def layout(size, grid, window=None, flip=None, classes=5, view=None):
    """ "cells" or "pixels": the first plan there is."""
    window = None if window is None else torch.tensor(window, dtype=torch.float64)
    geometry = Geometry(classes, size, grid, False, grid, view or size, False)
    plan = next(plans(geometry, window, flip))
    return "cells" if plan.columns is None else "pixels"


@pytest.mark.parametrize(
    ("size", "grid", "window", "expected"),
    [
        ((16, 24), (4, 6), None, "cells"),
        ((32, 48), (4, 6), None, "cells"),
        ((48, 72), (4, 6), None, "cells"),
        ((8, 12), (4, 6), None, "pixels"),
        ((16, 23), (4, 6), None, "pixels"),
        ((16, 24), (4, 6), [[0.0, 4, 16, 28]], "cells"),
        ((16, 24), (4, 6), [[0.0, 2, 16, 26]], "pixels"),
        ((16, 24), (4, 6), [[0.0, 3, 16, 27]], "pixels"),
        ((16, 24), (4, 6), [[0.0, 0, 16, 20]], "pixels"),
        ((17, 24), (5, 6), None, "cells"),  # rows may be anything
    ],
)
def test_the_fast_layout_is_taken_where_kinks_fall_on_nodes(size, grid, window, expected):
    assert layout(size, grid, window) == expected


def test_a_flip_keeps_the_fast_layout():
    assert layout((16, 24), (4, 6), flip=torch.tensor([True])) == "cells"


@pytest.mark.parametrize("size", [(64, 800), (63, 801)], ids=["cells", "pixels"])
@pytest.mark.parametrize("temperature", [1.0, 2.0, 3.0])
def test_bitwise_equal_over_thread_counts_and_tiles(size, temperature, monkeypatch, threads):
    inputs = arguments(21, (16, 200), size)
    results = []
    for count, scratch in ((1, 96), (2, 96), (3, 96), (2, 24)):
        threads(count)
        monkeypatch.setattr(numba_loss_geometry, "SCRATCH_FLOATS", scratch * 1024)
        numba_loss_geometry.plan_of_whole_view.cache_clear()
        results.append(loss_and_gradient(*inputs, temperature=temperature))
    numba_loss_geometry.plan_of_whole_view.cache_clear()
    for loss, gradient in results[1:3]:
        assert torch.equal(loss, results[0][0])
        assert torch.equal(gradient, results[0][1])
    # Other tiles add the losses of a row in another order, and the two halves of what lies on their seam.
    torch.testing.assert_close(results[3][0], results[0][0], rtol=1e-7, atol=0)
    torch.testing.assert_close(results[3][1], results[0][1], rtol=1e-6, atol=1e-10)


def test_wide_logits_are_left_to_the_other_layout(monkeypatch):
    """The fast kernel would overflow: 2**128 is beyond float32."""
    student, labels, target = arguments(5, (4, 6), (16, 24))
    student[0, 0, 1, 1] += 200
    used = []
    for name in ("cells", "pixels"):
        kernel = getattr(numba_loss, name)
        monkeypatch.setattr(numba_loss, name, lambda *a, name=name, kernel=kernel: (used.append(name), kernel(*a)))
    expected = loss_and_gradient(student.double(), labels, target, impl="reference")
    actual = loss_and_gradient(student, labels, target)
    assert set(used) == {"pixels"}
    torch.testing.assert_close(actual[0].double(), expected[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(actual[1].double(), expected[1], rtol=0, atol=2e-6 * expected[1].abs().max().item())


@pytest.mark.parametrize("size", [(64, 96), (48, 80)], ids=["cells", "pixels"])
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}, {"ce_weight": 0.0}], ids=["", "smoothed", "kl"])
def test_rows_in_which_nothing_counts(size, options):
    """They are left out; rows that count in one of the terms alone, and in neither, meet in a cell."""
    student, labels, target = arguments(5, (16, 24), size, scale=2.0)
    labels[:, : size[0] // 2 - 1] = 255
    gate = torch.zeros(labels.shape)
    gate[0, size[0] // 4 : size[0] // 2 + 3, 5:] = 1
    loss, gradient = loss_and_gradient(student, labels, target, pixel_weight_BHW=gate, **options)
    wide = {**options, "pixel_weight_BHW": gate.double()}
    expected, exact = loss_and_gradient(student.double(), labels, target, "reference", **wide)
    torch.testing.assert_close(loss.double(), expected, rtol=2e-6, atol=0)
    torch.testing.assert_close(gradient.double(), exact, rtol=0, atol=2e-6 * exact.abs().max().item())
    if "ce_weight" in options:
        assert not gradient[1].any()
    gate[0, 0, 0] = torch.nan
    assert loss_and_gradient(student, labels, target, pixel_weight_BHW=gate, **options)[0].isnan()


def test_exp2_and_log2_at_their_errors():
    x = np.linspace(-126, 127.49, 100_001, dtype=np.float32)
    exact = np.exp2(x.astype(np.float64))
    actual = np.array([numba_math.exp2(each) for each in x], np.float64)
    assert np.abs(actual / exact - 1).max() < 1.3e-7
    assert [numba_math.exp2(np.float32(each)) for each in (-127.5, -1e30)] == [0, 0]
    for y in (np.geomspace(1e-37, 1e37, 50_001), np.linspace(0.99, 1.01, 50_001)):
        y = y.astype(np.float32)
        exact = np.log2(y.astype(np.float64))
        actual = np.array([numba_math.log2(each) for each in y], np.float64)
        assert np.abs(actual - exact).max() <= 2e-7 * max(1, np.abs(exact).max())


def test_a_lost_pixel_hides_no_wide_logits_of_its_row():
    """The row's other logits span too much for the kernel of cells, and a pixel of the row is void and NaN."""
    student, labels, target = arguments(5, (4, 6), (16, 24))
    student[0, 0, 1, 5], student[0, 1, 1, 5] = 300, -300
    student[0, :, 1, 0] = np.nan
    labels[0, :12, :8] = 255
    loss, gradient = loss_and_gradient(student, labels, target, distill_void=False)
    assert loss.isfinite()
    assert gradient.isfinite().all()
    clean = student.nan_to_num(0).double()
    exact = loss_and_gradient(clean, labels, target, "reference", distill_void=False)
    torch.testing.assert_close(loss.double(), exact[0], rtol=2e-6, atol=0)
    assert (gradient - exact[1]).abs().max() <= 2e-6 * exact[1].abs().max()
