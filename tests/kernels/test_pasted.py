"""Targets of pixels that were pasted from other images: one call is what two are, with masks for weights."""

from functools import partial

import pytest
import torch
from float32 import error_of_value
from hypothesis import given, settings
from hypothesis import strategies as st

from kdcache_kernels import PackedTarget, PastedTarget, distill_denominators, distill_loss, pack

B, C, GRID = 2, 5, (4, 4)
SIZE = (16, 16)


def allowed(z, *targets) -> float:
    """How far a cross-entropy of order 1, or a difference of probabilities, may be off in float32.

    Four times the roundings of one pixel: terms with smoothed labels and factors of the focal loss have more of them.
    """
    spans = [z.max() - z.min(), *(target.densify().amax() - target.densify().amin() for target in targets)]
    return 4 * error_of_value(float(max(spans)))


def target_of(generator, k=C, grid=GRID, view=SIZE) -> PackedTarget:
    return PackedTarget(*pack(2 * torch.randn(B, C, *grid, generator=generator), k, impl="reference"), C, view)


def batch(device, size=SIZE, seed=3, **other):
    """Logits, labels, the image's own target, and a third of the pixels pasted, at random and in a box."""
    generator = torch.Generator().manual_seed(seed)
    z = 2 * torch.randn(B, C, *GRID, generator=generator)
    y = torch.randint(0, C, (B, *size), generator=generator)
    y[torch.rand(y.shape, generator=generator) < 0.2] = 255
    mask = torch.rand(y.shape, generator=generator) < 0.3
    mask[0] = False
    mask[0, size[0] // 2 :, size[1] // 3 :] = True
    own, pasted = target_of(generator), PastedTarget(mask, target_of(generator, **other))
    return z.to(device).requires_grad_(), y.to(device), own.to(device), moved(pasted, device)


def moved(pasted: PastedTarget, device, **changes) -> PastedTarget:
    fields = {"mask": pasted.mask, "target": pasted.target, "window": pasted.window, "flip": pasted.flip} | changes
    return PastedTarget(**{name: None if value is None else value.to(device) for name, value in fields.items()})


def two_calls(z, y, own, pasted, *, window_B4=None, flip_B=None, pixel_weight_BHW=None, ce_weight=1.0, **options):
    """The sum of a call for each target, by the reference in float64, each with its own pixels."""
    views = ((own, window_B4, flip_B, ~pasted.mask), (pasted.target, pasted.window, pasted.flip, pasted.mask))
    weight = torch.ones(y.shape, device=y.device) if pixel_weight_BHW is None else pixel_weight_BHW
    count, parts = 0, []
    for target, window, flip, mask in views:
        taught = torch.where(mask & (options.get("distill_void", True) | (y != 255)), 0, -1)
        shown = {"num_classes": C, "ignore_index": -1, "distill_void": False, "impl": "reference"}
        count = count + distill_denominators(taught, target, window_B4=window, flip_B=flip, **shown).kl
    logits = z.detach().double().requires_grad_()
    for n, (target, window, flip, mask) in enumerate(views):
        parts.append(
            distill_loss(
                logits, y, target, window_B4=window, flip_B=flip, pixel_weight_BHW=weight * mask,
                kl_denominator=count, ce_weight=0.0 if n else ce_weight, impl="reference", **options,
            )
        )  # fmt: skip
    loss, ce, kl = (sum(values) for values in zip(*parts, strict=True))
    return (loss, ce, kl), torch.autograd.grad(loss, logits)[0]


def check(distill_loss, z, y, own, pasted, kl_weight, temperature=1.0, **options):
    options |= {"kl_weight": kl_weight, "temperature": temperature}
    parts = distill_loss(z, y, own, pasted=pasted, **options)
    (loss, ce, kl), gradient = two_calls(z, y, own, pasted, **options)
    error = allowed(z.detach(), own, pasted.target)
    of_ce, of_kl = error * (1 + ce.item()), error * (temperature**2 + kl.item())
    assert abs(parts.ce.item() - ce.item()) <= of_ce
    assert abs(parts.kl.item() - kl.item()) <= of_kl
    assert abs(parts.loss.item() - loss.item()) <= of_ce + kl_weight * of_kl
    (own_gradient,) = torch.autograd.grad(parts.loss, z)
    assert (own_gradient - gradient).abs().max() <= error * (1 + kl_weight * temperature)


FLIPS = [[True, False], [True, True]]
WINDOWS = {
    "whole": (None, None),
    "cells": ([[0, 0, 16, 16], [-4, 4, 12, 20]], [[4, 0, 20, 16], [0, 0, 8, 8]]),
    "anywhere": ([[1.5, 0, 16, 15], [0, 0, 16, 16]], [[0, 0, 16, 16], [2.5, -3, 13, 12]]),
}


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("size", [(16, 16), (4, 4), (13, 11)], ids=["cells", "pixels", "tiles"])
def test_beside_two_calls(distill_loss, size, window, device):
    z, y, own, pasted = batch(device, size)
    windows = [None if rows is None else torch.tensor(rows, dtype=torch.float64) for rows in WINDOWS[window]]
    flips = [None if rows is None else torch.tensor(flip) for rows, flip in zip(windows, FLIPS, strict=True)]
    pasted = moved(pasted, device, window=windows[1], flip=flips[1])
    moves = {name: None if x is None else x.to(device) for name, x in (("window_B4", windows[0]), ("flip_B", flips[0]))}
    check(distill_loss, z, y, own, pasted, kl_weight=0.7, temperature=2.0, distill_void=False, **moves)


@pytest.mark.native
@pytest.mark.parametrize("temperature", [1.0, 2.0, 3.0])
@pytest.mark.parametrize("other", [{"k": 2}, {"grid": (5, 3), "view": (20, 12)}], ids=["top-k", "another grid"])
@pytest.mark.parametrize(
    "terms", [{}, {"label_smoothing": 0.1}, {"focal_gamma": 2.0}], ids=["plain", "smoothed", "focal"]
)
def test_targets_and_terms(distill_loss, terms, other, temperature, device):
    z, y, own, pasted = batch(device, **other)
    weight = torch.rand(y.shape, generator=torch.Generator().manual_seed(5)).to(device)
    options = {"kl_weight": 0.7, "temperature": temperature, "pixel_weight_BHW": weight, **terms}
    check(distill_loss, z, y, own, pasted, **options)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 99),
    size=st.tuples(st.integers(2, 24), st.integers(2, 24)),
    grid=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    k=st.integers(2, C),
    temperature=st.sampled_from([1.0, 2.0, 4.0]),
    void=st.booleans(),
)
def test_any_shapes(seed, size, grid, k, temperature, void):
    z, y, own, pasted = batch("cpu", size, seed, grid=grid, k=k, view=(3 * size[0], size[1]))
    check(
        partial(distill_loss, impl="numba"),
        z,
        y,
        own,
        pasted,
        kl_weight=1.0,
        temperature=temperature,
        distill_void=void,
    )


@pytest.mark.parametrize("everywhere", [False, True])
def test_nothing_and_everything_pasted(distill_loss, everywhere, device):
    """A call in which one target teaches all pixels is the call with that target alone."""
    z, y, own, pasted = batch(device)
    pasted = moved(pasted, device, mask=torch.full_like(pasted.mask, everywhere))
    one = distill_loss(z, y, own, pasted=pasted, kl_weight=1.0)
    other = distill_loss(z, y, pasted.target if everywhere else own, kl_weight=1.0)
    torch.testing.assert_close(one, other, rtol=1e-6, atol=0)
    gradients = [torch.autograd.grad(parts.loss, z)[0] for parts in (one, other)]
    assert (gradients[0] - gradients[1]).abs().max() <= allowed(z.detach(), own, pasted.target)


def test_parts_of_a_batch_add_up(distill_loss, device):
    z, y, own, pasted = batch(device)
    whole = distill_loss(z, y, own, pasted=pasted, kl_weight=1.0, distill_void=False).loss
    counts = distill_denominators(y, own, num_classes=C, pasted=pasted, distill_void=False)
    total = 0
    for n in range(B):
        row = slice(n, n + 1)
        part = PastedTarget(pasted.mask[row], pasted.target.map(lambda x, row=row: x[row]))
        one = own.map(lambda x, row=row: x[row])
        options = {"ce_denominator": counts.ce, "kl_denominator": counts.kl, "distill_void": False, "kl_weight": 1.0}
        total = total + distill_loss(z[row], y[row], one, pasted=part, **options).loss
    torch.testing.assert_close(total, whole)


@pytest.mark.native
def test_gradients_of_terms(distill_loss, device):
    """KL alone has a gradient, and a learnt weight has the term as its own."""
    z, y, own, pasted = batch(device)
    weight = torch.tensor(0.7, device=device, requires_grad=True)
    parts = distill_loss(z, y, own, pasted=pasted, kl_weight=weight, temperature=2.0)
    (by_weight,) = torch.autograd.grad(parts.loss, weight, retain_graph=True)
    torch.testing.assert_close(by_weight, parts.kl.detach())
    (gradient,) = torch.autograd.grad(parts.kl, z)
    _, expected = two_calls(z, y, own, pasted, kl_weight=1.0, temperature=2.0, ce_weight=0.0)
    assert (gradient - expected).abs().max() <= 2 * allowed(z.detach(), own, pasted.target)


@pytest.mark.native
def test_each_pixel_is_counted_in_the_view_of_its_own_target(distill_loss, device):
    """Weights and NaN outside of it change nothing."""
    z, y, own, pasted = batch(device)
    window = torch.tensor([[0.0, 0, 16, 16], [8, 0, 24, 16]], dtype=torch.float64)
    pasted = moved(pasted, device, window=window)
    weight = torch.ones(y.shape, device=device)
    clean = distill_loss(z, y, own, pasted=pasted, kl_weight=1.0, pixel_weight_BHW=weight)
    beyond = torch.zeros_like(pasted.mask)
    beyond[1, 8:] = pasted.mask[1, 8:]
    assert beyond.any()
    spoilt = weight.masked_fill(beyond, torch.nan)
    assert torch.equal(distill_loss(z, y, own, pasted=pasted, kl_weight=1.0, pixel_weight_BHW=spoilt).loss, clean.loss)
    spoilt = weight.clone()
    spoilt[pasted.mask.nonzero()[0].unbind()] = torch.nan
    assert distill_loss(z, y, own, pasted=pasted, kl_weight=1.0, pixel_weight_BHW=spoilt).kl.isnan()
    pasted.target.values[1, :, 0, 0] = torch.nan  # seen by no pixel
    assert torch.equal(distill_loss(z, y, own, pasted=pasted, kl_weight=1.0, pixel_weight_BHW=weight).loss, clean.loss)
    pasted.target.values[1, :, 3, 3] = torch.nan
    assert distill_loss(z, y, own, pasted=pasted, kl_weight=1.0, pixel_weight_BHW=weight).kl.isnan()


@pytest.mark.native
@pytest.mark.fused
def test_the_same_bits_for_any_number_of_threads(distill_loss, device):
    z, y, own, pasted = batch(device, (64, 64))
    results = []
    before = torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        parts = distill_loss(z, y, own, pasted=pasted, kl_weight=1.0, temperature=2.0)
        results.append((parts.loss.detach(), torch.autograd.grad(parts.loss, z)[0]))
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))
