"""The denominators by themselves: every family counts as the reference does, and as the loss."""

import pytest
import torch

from kdcache_kernels import PackedTarget, distill_denominators, distill_loss, pack

C, GRID = 6, (4, 4)


def batch(device, size, labels_dtype=torch.uint8):
    generator = torch.Generator().manual_seed(size[0])
    y = torch.randint(0, C, (3, *size), generator=generator)
    y[torch.rand(y.shape, generator=generator) < 0.3] = 255
    y[0] = 255
    z, t = torch.randn(2, 3, C, *GRID, generator=generator)
    target = PackedTarget(*pack(t, C, impl="reference"), C, (16, 16))
    return z.to(device), y.to(labels_dtype if size[0] < 20 else torch.int64).to(device), target.to(device)


WINDOWS = [[[0, 0, 16, 16]] * 3, [[-4, -4, 12, 12], [2, 2, 9, 9], [8, 1.5, 20, 40]]]


@pytest.mark.parametrize("size", [(16, 16), (11, 7), (33, 150)], ids=str)
@pytest.mark.parametrize("window", [None, *WINDOWS], ids=["none", "whole", "crops"])
@pytest.mark.parametrize("distill_void", [True, False])
def test_beside_the_reference_and_the_loss(size, window, distill_void, backend):
    z, y, target = batch(backend.device, size)
    options = {
        "class_weight": torch.tensor([0, 0.25, 1, 3, 0.5, 2.0], device=backend.device),
        "window_B4": None if window is None else torch.tensor(window, dtype=torch.float64, device=backend.device),
        "flip_B": torch.tensor([True, False, True], device=backend.device),
        "distill_void": distill_void,
    }
    counts = distill_denominators(y, target, num_classes=C, **options, impl=backend.impl)
    assert [count.dtype for count in counts] == [torch.float64] * 2
    assert counts == distill_denominators(y, target, num_classes=C, **options, impl="reference")
    if backend.interpreted and size == (33, 150):
        return  # the interpreter takes a minute for the loss
    own = distill_loss(z, y, target, kl_weight=1.0, **options, impl=backend.impl)
    shared = distill_loss(
        z, y, target, kl_weight=1.0, **options, ce_denominator=counts.ce, kl_denominator=counts.kl, impl=backend.impl
    )
    for one, other in zip(own, shared, strict=True):
        assert torch.equal(one, other)


def test_labels_alone_and_a_target_alone(backend):
    _, y, target = batch(backend.device, (16, 16))
    options = {"num_classes": C, "impl": backend.impl}
    assert distill_denominators(y, **options) == (int((y != 255).sum()), 0)
    assert distill_denominators(None, target, size=(5, 9), **options) == (0, 3 * 5 * 9)
    strided = y.to(torch.int16).mT
    assert distill_denominators(strided, target, distill_void=False, **options) == (int((y != 255).sum()),) * 2
    assert distill_denominators(y[:0], target.map(lambda x: x[:0]), **options) == (0, 0)


def test_an_id_out_of_range_is_not_counted(backend):
    _, y, _ = batch(backend.device, (16, 16), torch.int32)
    expected = int((y == 3).sum() + (y == 4).sum())
    y[(y != 3) & (y != 4) & (y != 255)] = 77
    assert distill_denominators(y, num_classes=C, impl=backend.impl).ce == expected
    y[y == 77] = -2
    assert distill_denominators(y, num_classes=C, impl=backend.impl).ce == expected


@pytest.mark.fused
def test_a_compiled_program_counts_in_one_graph(backend):
    _, y, target = batch(backend.device, (16, 16))

    def count(y, values):
        packed = PackedTarget(values, None, None, C, (16, 16))
        return torch.stack(distill_denominators(y, packed, num_classes=C, distill_void=False, impl=backend.impl))

    compiled = torch.compile(count, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(y, target.values), count(y, target.values))
