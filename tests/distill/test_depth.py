"""The losses of depth beside their papers' formulas, and what must not change them."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from depth_oracle import ORACLES
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from kdcache.distill import depth

LOSSES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {name: getattr(depth, name) for name in ORACLES}
SCALED = ("l1", "berhu", "gradient_matching")


def maps(seed: int, shape: tuple[int, int, int] = (3, 9, 11), share: float = 0.7) -> tuple[Tensor, Tensor, Tensor]:
    """Predictions, references of 0.5 to 60 m, and which pixels are valid; what is not, is no number."""
    generator = torch.Generator().manual_seed(seed)
    reference = (torch.rand(shape, generator=generator, dtype=torch.float64) * math.log(120)).exp() / 2
    prediction = reference * (0.4 * torch.randn(shape, generator=generator, dtype=torch.float64)).exp()
    mask = torch.rand(shape, generator=generator) < share
    return prediction, reference.masked_fill(~mask, math.nan), mask


def of_oracle(name: str, prediction: Tensor, reference: Tensor, mask: Tensor) -> list[float]:
    images = zip(*(part.detach().double().numpy() for part in (prediction, reference)), mask.numpy(), strict=True)
    return [ORACLES[name](p, r, valid) for p, r, valid in images]


@pytest.mark.parametrize("name", LOSSES)
@settings(deadline=None, max_examples=25)
@given(
    seed=st.integers(0, 2**31),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 19), st.integers(1, 19)),
    share=st.sampled_from([0.0, 0.05, 0.7, 1.0]),
)
def test_a_loss_is_its_definition(name: str, seed: int, shape: tuple[int, int, int], share: float) -> None:
    prediction, reference, mask = maps(seed, shape, share)
    expected = of_oracle(name, prediction, reference, mask)
    assert LOSSES[name](prediction, reference, mask).tolist() == pytest.approx(expected, rel=1e-9, abs=1e-12)
    single = LOSSES[name](prediction.float(), reference.float(), mask)
    assert single.dtype == torch.float32
    assert single.tolist() == pytest.approx(expected, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_are_those_of_the_function(name: str) -> None:
    prediction, reference, mask = maps(5, (2, 4, 5))
    prediction.requires_grad_()
    loss = LOSSES[name]
    if name == "berhu":  # whose bound is a constant to the gradient
        error = (prediction - reference)[mask].detach()
        images = mask.nonzero()[:, 0]
        largest = torch.stack([error[images == image].abs().amax() for image in (0, 1)])[images]
        expected = torch.where(error.abs() > largest / 5, error / (largest / 5), error.sign())
        expected = expected / mask.sum((1, 2))[images]
        (gradient,) = torch.autograd.grad(loss(prediction, reference, mask).sum(), prediction)
        assert gradient[mask].tolist() == pytest.approx(expected.tolist(), rel=1e-12)
        assert (gradient[~mask] == 0).all()
        return
    assert torch.autograd.gradcheck(lambda x: loss(x, reference, mask), (prediction,))


@pytest.mark.parametrize("name", LOSSES)
def test_what_is_not_valid_touches_nothing(name: str) -> None:
    prediction, reference, mask = maps(6)
    mask[1] = False
    broken = torch.where(
        mask, prediction, torch.tensor([math.nan, math.inf, -1.0]).double().repeat(99)[:297].view(3, 9, 11)
    )
    clean = torch.where(mask, prediction, 1.0).requires_grad_()
    broken.requires_grad_()
    losses = [LOSSES[name](p, reference, mask) for p in (clean, broken)]
    assert torch.equal(*losses)
    assert losses[0][1] == 0
    gradients = [torch.autograd.grad(loss.sum(), p)[0] for loss, p in zip(losses, (clean, broken), strict=True)]
    assert torch.equal(*gradients)
    assert (gradients[1][~mask] == 0).all()


@pytest.mark.parametrize("name", LOSSES)
def test_a_valid_prediction_that_is_no_number_shows(name: str) -> None:
    prediction, reference, mask = maps(7, share=1.0)
    for value in (math.nan, math.inf):
        prediction[1, 4, 4] = value
        loss = LOSSES[name](prediction, reference, mask)
        assert loss[[0, 2]].isfinite().all()
        assert not loss[1].isfinite()


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("case", ["equal", "constant", "one pixel", "none", "tiny", "huge"])
def test_losses_and_gradients_are_finite_at_the_edges(name: str, case: str) -> None:
    prediction, reference, mask = (part.clone() for part in maps(8, share=1.0))
    if case == "equal":
        prediction = reference.clone()
    if case == "constant":
        prediction, reference = torch.full_like(prediction, 7.0), torch.full_like(reference, 3.0)
    if case in ("one pixel", "none"):
        mask = torch.zeros_like(mask)
        mask[:, 3, 3] = case == "one pixel"
    if case in ("tiny", "huge"):  # smaller than float16 has, larger than its largest
        factor = 1e-7 if case == "tiny" else 1e6
        prediction, reference = prediction * factor, reference * factor
    single = prediction.float().requires_grad_()
    loss = LOSSES[name](single, reference.float(), mask)
    (gradient,) = torch.autograd.grad(loss.sum(), single)
    assert loss.isfinite().all()
    assert gradient.isfinite().all()
    if case in ("equal", "none"):
        assert loss.tolist() == [0, 0, 0]
        assert (gradient == 0).all()


@pytest.mark.parametrize("name", SCALED)
def test_errors_scale_with_depth(name: str) -> None:
    prediction, reference, mask = maps(9)
    expected = LOSSES[name](prediction, reference, mask)
    assert torch.allclose(LOSSES[name](3 * prediction, 3 * reference, mask), 3 * expected, rtol=1e-12)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 1000), st.floats(0.01, 100), st.floats(-50, 50))
def test_alignment_forgives_scale_and_shift(seed: int, scale: float, shift: float) -> None:
    prediction, reference, mask = maps(seed)
    expected = depth.scale_shift_invariant(prediction, reference, mask)
    assume(bool((expected > 0).all()))
    moved = scale * prediction + shift
    assert torch.allclose(depth.scale_shift_invariant(moved, reference, mask), expected, rtol=1e-6)
    assert depth.scale_shift_invariant(scale * reference + shift, reference, mask).max() < 1e-9


def test_silog_forgives_most_of_a_common_factor() -> None:
    _, reference, mask = maps(10)
    loss = depth.silog(2 * reference, reference, mask)
    assert loss.tolist() == pytest.approx([10 * math.sqrt(0.15) * math.log(2)] * 3)


@pytest.mark.parametrize("name", LOSSES)
def test_images_are_on_their_own_and_runs_repeat(name: str) -> None:
    parts = maps(12)
    whole = LOSSES[name](*parts)
    assert torch.equal(whole, LOSSES[name](*parts))
    for image in range(3):
        assert torch.equal(LOSSES[name](*(part[image : image + 1] for part in parts)), whole[image : image + 1])


@pytest.mark.parametrize("name", LOSSES)
def test_no_shape_depends_on_data(name: str) -> None:
    """Traced with shapes alone, so nothing can be read from a device."""
    compiled = torch.compile(LOSSES[name], fullgraph=True, backend="eager")
    prediction, reference, mask = maps(13)
    assert torch.allclose(compiled(prediction, reference, mask), LOSSES[name](prediction, reference, mask), rtol=1e-12)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", LOSSES)
def test_nothing_waits_on_a_gpu(name: str) -> None:
    prediction, reference, mask = (part.cuda() for part in maps(14))
    prediction.requires_grad_()
    LOSSES[name](prediction, reference, mask).sum().backward()  # first uses may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss = LOSSES[name](prediction, reference, mask)
        loss.sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert np.allclose(loss.detach().cpu(), of_oracle(name, *(part.cpu() for part in (prediction, reference, mask))))
