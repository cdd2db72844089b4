"""Weights of pixels in the cross-entropy, smoothed labels and the focal loss, beside other people's code in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kdcache_kernels import PackedTarget, ValueRangeError, pack

C, GRID = 5, (3, 4)
SIZES = [(12, 16), (3, 4), (10, 13)]  # cells, pixels, tiles
CLASS_WEIGHT = torch.tensor([0.2, 3.0, 1.0, 0.0, 0.5])


def make(device, size, scale=2.0):
    generator = torch.Generator().manual_seed(size[1])
    z = (torch.randn(2, C, *GRID, generator=generator) * scale).to(device)
    t = torch.randn(2, C, *GRID, generator=generator) * 2
    y = torch.randint(0, C, (2, *size), generator=generator, dtype=torch.uint8)
    y[torch.rand(y.shape, generator=generator) < 0.2] = 255
    m = torch.rand(2, *size, generator=generator) * 2
    return (
        z.requires_grad_(),
        y.to(device),
        PackedTarget(*pack(t, C, impl="reference"), C, size).to(device),
        m.to(device),
    )


def oracle(z, y, *, class_weight=None, smoothing=0.0, gamma=0.0, pixel_weight=None) -> Tensor:
    """The usual code: what is written in PyTorch's documentation and in the paper on the focal loss."""
    u = F.interpolate(z, y.shape[1:], mode="bilinear")
    weight = None if class_weight is None else class_weight.double()
    options = {"ignore_index": 255, "reduction": "none"}
    loss = F.cross_entropy(u, y.long(), weight, label_smoothing=smoothing, **options)
    if gamma:
        probability = u.softmax(1).gather(1, y.long().clamp(max=C - 1)[:, None])[:, 0]
        loss = loss * (1 - probability) ** gamma
    if pixel_weight is not None:
        loss = loss * pixel_weight.double()
    of_label = torch.ones(C, dtype=torch.float64, device=z.device) if weight is None else weight
    return loss.sum() / of_label[y.long().clamp(max=C - 1)][y != 255].sum()


@pytest.mark.interpreted(size=[SIZES[2]], kl=[1.0], temperature=[2.0])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("kl", [0.0, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 2.0, 2.5])
@pytest.mark.parametrize(
    "terms",
    [
        {"pixel_weight": True},
        {"smoothing": 0.1},
        {"smoothing": 0.6, "class_weight": CLASS_WEIGHT},
        {"smoothing": 0.3, "class_weight": CLASS_WEIGHT, "pixel_weight": True},
        {"smoothing": 0.3, "pixel_weight": True},
        {"gamma": 2.0},
        {"gamma": 0.5, "class_weight": CLASS_WEIGHT, "pixel_weight": True},
    ],
    ids=lambda terms: "+".join(terms),
)
def test_beside_pytorch(distill_loss, size, kl, temperature, terms, device):
    z, y, target, m = make(device, size)
    terms = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in terms.items()}
    m = m if terms.pop("pixel_weight", False) else None
    parts = distill_loss(
        z, y, target, ce_weight=0.7, kl_weight=kl, temperature=temperature, class_weight=terms.get("class_weight"),
        ce_pixel_weight_BHW=m, label_smoothing=terms.get("smoothing", 0.0), focal_gamma=terms.get("gamma", 0.0),
    )  # fmt: skip
    (gradient,) = torch.autograd.grad(parts.ce, z, retain_graph=True)
    exact = z.detach().double().requires_grad_()
    expected = oracle(exact, y, pixel_weight=m, **terms)
    assert parts.ce.item() == pytest.approx(expected.item(), rel=2e-6)
    (expected_gradient,) = torch.autograd.grad(expected, exact)
    assert (gradient - expected_gradient).abs().max() <= 2e-6 * expected_gradient.abs().max()
    # KL is what it is without them, and the gradient of the loss that of the sum.
    plain = distill_loss(z, y, target, ce_weight=0.7, kl_weight=kl, temperature=temperature)
    assert torch.equal(parts.kl, plain.kl) or parts.kl.item() == pytest.approx(plain.kl.item(), rel=1e-6)
    (of_loss,) = torch.autograd.grad(parts.loss, z, retain_graph=True)
    of_kl = torch.autograd.grad(parts.kl, z)[0] if kl else 0.0
    assert (of_loss - 0.7 * gradient - kl * of_kl).abs().max() <= 2e-6 * of_loss.abs().max()


@pytest.mark.native
@pytest.mark.parametrize("scale", [30.0, 90.0, 3e3])
@pytest.mark.parametrize("terms", [{"label_smoothing": 0.1}, {"focal_gamma": 2.0}, {"focal_gamma": 0.5}], ids=str)
def test_logits_of_any_range(distill_loss, scale, terms, device):
    """Probabilities of exactly 0 and 1: finite, with a finite gradient."""
    z, y, target, _ = make(device, (12, 16), scale)
    parts = distill_loss(z, y, target, kl_weight=1.0, **terms)
    (gradient,) = torch.autograd.grad(parts.loss, z)
    exact = z.detach().double().requires_grad_()
    expected = oracle(exact, y, smoothing=terms.get("label_smoothing", 0), gamma=terms.get("focal_gamma", 0))
    assert parts.ce.item() == pytest.approx(expected.item(), rel=2e-6)
    assert gradient.isfinite().all()


@pytest.mark.native
def test_a_pixel_weight_is_a_number_of_any_kind(distill_loss, device):
    """A mask counts like zeros and ones, at any strides; void pixels' weights are never read."""
    z, y, target, m = make(device, (12, 16))
    mask = m > 1
    options = {"kl_weight": 1.0, "temperature": 2.0}
    expected = distill_loss(z, y, target, ce_pixel_weight_BHW=mask.float(), **options)
    wide = torch.zeros(2, 12, 40, dtype=torch.bool, device=device)
    wide[:, :, 3:35:2] = mask
    nan = mask.double().masked_fill(y == 255, torch.nan)
    for weight in (mask, mask.to(torch.uint8), mask.to(torch.int64), wide[:, :, 3:35:2], mask.half(), nan):
        parts = distill_loss(z, y, target, ce_pixel_weight_BHW=weight, **options)
        assert torch.equal(parts.loss, expected.loss)
    nan[0, 2, 3], y[0, 2, 3] = torch.nan, 1
    assert distill_loss(z, y, target, ce_pixel_weight_BHW=nan, **options).ce.isnan()
    # It does not shrink the denominator: with the sum of the weights in its place, it is a weighted mean.
    total = float((mask & (y != 255)).sum())
    mean = distill_loss(z, y, ce_pixel_weight_BHW=mask, ce_denominator=total)
    torch.testing.assert_close(mean.ce, distill_loss(z, y.masked_fill(~mask, 255)).ce)


@pytest.mark.native
def test_nothing_labelled_is_nothing(distill_loss, device):
    z, y, target, m = make(device, (12, 16))
    void = torch.full_like(y, 255)
    for terms in ({"label_smoothing": 0.2}, {"focal_gamma": 2.0}):
        parts = distill_loss(z, void, target, ce_pixel_weight_BHW=m, **terms)
        assert parts.ce.item() == 0
        assert (torch.autograd.grad(parts.ce, z)[0] == 0).all()


@pytest.mark.parametrize("terms", [{"label_smoothing": 0.2}, {"focal_gamma": 2.0}], ids=str)
def test_a_lost_logit_is_seen_and_one_class_is_nothing(distill_loss, terms, device):
    z, y, target, m = make(device, (12, 16))
    z.data[0, 1, 1, 1] = torch.nan
    assert distill_loss(z, y, target, ce_pixel_weight_BHW=m, **terms).ce.isnan()
    labels = torch.zeros(1, 4, 4, dtype=torch.uint8, device=device)
    assert distill_loss(torch.randn(1, 1, 2, 2, device=device), labels, **terms).ce.item() == 0


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"label_smoothing": 1.0}, r"Invalid label_smoothing: 1\.0\n.*below 1"),
        ({"label_smoothing": -0.1}, "label_smoothing"),
        ({"focal_gamma": -1.0}, r"Invalid focal_gamma: -1\.0"),
        ({"focal_gamma": float("nan")}, "focal_gamma"),
        ({"label_smoothing": 0.1, "focal_gamma": 2.0}, r"Cannot combine focal_gamma 2\.0 with label_smoothing 0\.1"),
    ],
)
def test_what_is_refused(distill_loss, options, match, device):
    z, y, _, _ = make(device, (12, 16))
    with pytest.raises(ValueRangeError, match=match):
        distill_loss(z, y, **options)
