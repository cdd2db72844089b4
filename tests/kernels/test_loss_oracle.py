"""The loss and its gradient against F.interpolate, F.cross_entropy and F.kl_div in float64, whole view."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import kdcache_kernels
from kdcache_kernels import PackedTarget, densify, pack

LOSS_RELATIVE, LOSS_ABSOLUTE = 1e-6, 1e-7
GRADIENT_ERROR = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}

# B, C, student h w, target h w, label H W
SHAPES = [
    (2, 2, (3, 3), (3, 3), (12, 12)),
    (1, 3, (1, 5), (4, 1), (9, 20)),
    (2, 19, (5, 7), (9, 4), (17, 23)),
    (1, 21, (6, 5), (6, 5), (48, 40)),
    (2, 32, (4, 4), (2, 2), (8, 8)),
    (1, 33, (7, 3), (7, 3), (13, 11)),
    (1, 150, (4, 5), (4, 5), (15, 21)),
    (1, 171, (3, 3), (5, 2), (10, 7)),
    (2, 5, (1, 1), (1, 1), (1, 1)),
    (2, 5, (9, 11), (12, 10), (5, 6)),
]


def make_target(logits: Tensor, k: int, view_size: tuple[int, int], align_corners: bool = False) -> PackedTarget:
    values, indices, tail = pack(logits, k)
    return PackedTarget(values, indices, tail, logits.shape[1], view_size, align_corners)


def oracle(
    student: Tensor,
    labels: Tensor,
    target: PackedTarget,
    *,
    ce_weight: float,
    kl_weight: float,
    temperature: float,
    class_weight: Tensor | None = None,
    pixel_weight: Tensor | None = None,
    distill_void: bool = True,
    align_corners: bool = False,
) -> tuple[Tensor, Tensor]:
    """The usual training code, in float64, with a gradient by autograd."""
    z = student.detach().double().requires_grad_()
    t = densify(target.values, target.indices, target.tail, target.num_classes, torch.float64)
    size, T = labels.shape[1:], temperature
    u = F.interpolate(z, size, mode="bilinear", align_corners=align_corners)
    v = F.interpolate(t, size, mode="bilinear", align_corners=target.align_corners)
    weight = None if class_weight is None else class_weight.double()
    ce = F.cross_entropy(u, labels.long(), weight, ignore_index=255)
    log_p, log_q = F.log_softmax(u / T, 1), F.log_softmax(v / T, 1)
    kl_pixels = F.kl_div(log_p, log_q, reduction="none", log_target=True).sum(1)
    mask = torch.ones_like(kl_pixels) if distill_void else (labels != 255).double()
    gate = mask if pixel_weight is None else mask * pixel_weight.double()
    loss = ce_weight * ce + kl_weight * T * T * (kl_pixels * gate).sum() / mask.sum()
    loss.backward()
    return loss.detach(), z.grad


def random_case(shape, dtype, device, *, scale=3.0, align_corners=False, k=None):
    B, C, student, grid, size = shape
    generator = torch.Generator().manual_seed(B * 1000 + C)
    z = (torch.randn(B, C, *student, generator=generator) * scale).to(device, dtype)
    t = (torch.randn(B, C, *grid, generator=generator) * scale).to(device)
    y = torch.randint(0, C, (B, *size), generator=generator, dtype=torch.uint8)
    y[torch.rand(B, *size, generator=generator) < 0.2] = 255
    y[0, 0, 0] = 0
    return z.requires_grad_(), y.to(device), make_target(t, C if k is None else k, size, align_corners)


def assert_matches(parts, gradient, expected, expected_gradient, temperature):
    dtype = gradient.dtype
    error = abs(parts.loss.item() - expected.item())
    if dtype == torch.float64:
        assert error <= 1e-12 * (1 + abs(expected.item()))
    else:
        assert error <= LOSS_RELATIVE * abs(expected.item()) + LOSS_ABSOLUTE * max(1.0, temperature**2)
    scale = expected_gradient.abs().max().clamp_min(1e-30)
    assert ((gradient.double() - expected_gradient).abs().max() / scale).item() <= GRADIENT_ERROR[dtype]


@pytest.mark.interpreted(shape=[SHAPES[0], SHAPES[1], SHAPES[8], SHAPES[9]])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"C{s[1]}_{s[2][0]}x{s[2][1]}_to_{s[4][0]}x{s[4][1]}")
@pytest.mark.parametrize("dtype", GRADIENT_ERROR, ids=str)
def test_shapes_and_dtypes(distill_loss, shape, dtype, device):
    z, y, target = random_case(shape, dtype, device)
    parts = distill_loss(z, y, target, ce_weight=0.7, kl_weight=0.3, temperature=2.5)
    parts.loss.backward()
    expected = oracle(z, y, target, ce_weight=0.7, kl_weight=0.3, temperature=2.5)
    assert parts.loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert z.grad.dtype == dtype
    assert_matches(parts, z.grad, *expected, temperature=2.5)


@pytest.mark.native
@pytest.mark.parametrize("temperature", [0.05, 1.0, 2.0, 2.5, 4.0, 100.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_temperatures(distill_loss, temperature, dtype, device):
    z, y, target = random_case((2, 19, (5, 7), (5, 7), (20, 28)), dtype, device)
    parts = distill_loss(z, y, target, kl_weight=1.0, temperature=temperature)
    parts.loss.backward()
    expected = oracle(z, y, target, ce_weight=1.0, kl_weight=1.0, temperature=temperature)
    assert_matches(parts, z.grad, *expected, temperature=temperature)


@pytest.mark.native
@pytest.mark.parametrize("student_aligned", [False, True])
@pytest.mark.parametrize("target_aligned", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_align_corners(distill_loss, student_aligned, target_aligned, dtype, device):
    z, y, target = random_case(SHAPES[2], dtype, device, align_corners=target_aligned)
    parts = distill_loss(z, y, target, kl_weight=2.0, align_corners=student_aligned)
    parts.loss.backward()
    options = {"ce_weight": 1.0, "kl_weight": 2.0, "temperature": 1.0}
    assert_matches(parts, z.grad, *oracle(z, y, target, align_corners=student_aligned, **options), temperature=1)


@pytest.mark.native
@pytest.mark.parametrize("k", [1, 8, 21])
def test_kept_classes(distill_loss, k, device):
    z, y, target = random_case(SHAPES[3], torch.float32, device, k=k)
    parts = distill_loss(z, y, target, kl_weight=1.0, temperature=2.0)
    parts.loss.backward()
    expected = oracle(z, y, target, ce_weight=1.0, kl_weight=1.0, temperature=2.0)
    assert_matches(parts, z.grad, *expected, temperature=2)


@pytest.mark.native
@pytest.mark.parametrize("scale", [0.0, 30.0, 90.0, 6e4])
def test_value_ranges(distill_loss, scale, device):
    z, y, target = random_case(SHAPES[2], torch.float32, device)
    z = (z.detach().clamp(-1, 1) * scale).requires_grad_()
    parts = distill_loss(z, y, target, kl_weight=1.0)
    parts.loss.backward()
    expected = oracle(z, y, target, ce_weight=1.0, kl_weight=1.0, temperature=1.0)
    # The rounding of a float32 logit is 6e-8 of it, and comes through as that much absolute error in a gradient.
    allowed = 2e-6 + 2e-7 * scale
    assert parts.loss.item() == pytest.approx(expected[0].item(), rel=2e-6)
    assert ((z.grad - expected[1]).abs().max() / expected[1].abs().max()).item() <= allowed


@pytest.mark.interpreted(span=[79.0, 100.0, 200.0], temperature=[1.0, 0.5])
@pytest.mark.parametrize("span", [60.0, 79.0, 81.0, 100.0, 130.0, 159.0, 200.0])
@pytest.mark.parametrize("temperature", [1.0, 2.0, 0.5])
@pytest.mark.parametrize("wide", ["student", "target"])
def test_logits_that_span_more_than_exponentials_can(distill_loss, span, temperature, wide, device):
    """Around the 80 nats up to which kernels leave out the maximum: a loss of 130 nats is not 88."""
    z = torch.zeros(1, 3, 2, 2)
    z[0, 1], z[0, 2] = -span, -span / 2
    t = torch.randn(1, 3, 2, 2, generator=torch.Generator().manual_seed(1))
    student, teacher = (z, t) if wide == "student" else (t, z)
    student = student.to(device).requires_grad_()
    target = make_target(teacher.to(device), 3, (8, 8))
    labels = torch.ones(1, 8, 8, dtype=torch.uint8, device=device)  # the class of the lowest logit
    parts = distill_loss(student, labels, target, kl_weight=1.0, temperature=temperature)
    parts.loss.backward()
    expected = oracle(student, labels, target, ce_weight=1.0, kl_weight=1.0, temperature=temperature)
    assert parts.loss.item() == pytest.approx(expected[0].item(), rel=2e-6)
    assert ((student.grad - expected[1]).abs().max() / expected[1].abs().max()).item() <= 2e-6 + 2e-7 * span
    if wide == "student":
        assert parts.ce.item() == pytest.approx(span, rel=1e-6)


@pytest.mark.interpreted(size=[(2, 3)])
@pytest.mark.parametrize("size", [(8, 12), (7, 9), (2, 3)], ids=["cells", "tiles", "pixels"])
@pytest.mark.parametrize("scale", [1.0, 4.0, 12.0])
def test_the_shared_value_of_many_missing_classes(distill_loss, size, scale, device):
    """163 classes share one rounding of float32, so the bound is wider than elsewhere: as `distill_loss` says."""
    generator = torch.Generator().manual_seed(round(scale))
    t, noise = (torch.randn(1, 171, 2, 3, generator=generator) for _ in range(2))
    target = make_target((t * scale).to(device), 8, size)
    for z in (torch.zeros_like(t), noise.clone(), noise * scale):
        z = z.to(device)
        parts = distill_loss(z, None, target, size=size, ce_weight=0.0, kl_weight=1.0, temperature=4.0)
        labels = torch.zeros(1, *size, dtype=torch.uint8, device=device)
        exact = oracle(z, labels, target, ce_weight=0.0, kl_weight=1.0, temperature=4.0)[0].item()
        assert abs(parts.kl.item() - exact) <= 2e-6 * exact + 2e-6 * 4.0**2


@pytest.mark.native
@pytest.mark.parametrize("distill_void", [True, False])
@pytest.mark.parametrize("gate", [torch.float32, torch.uint8, torch.bool], ids=str)
def test_gate_void_and_class_weight(distill_loss, distill_void, gate, device):
    z, y, target = random_case(SHAPES[2], torch.float32, device)
    class_weight = torch.linspace(0, 2, 19, device=device)
    pixel_weight = (torch.rand(y.shape, device=device) * 2).to(gate)
    parts = distill_loss(
        z,
        y,
        target,
        kl_weight=1.0,
        class_weight=class_weight,
        pixel_weight_BHW=pixel_weight,
        distill_void=distill_void,
    )
    parts.loss.backward()
    expected = oracle(
        z,
        y,
        target,
        ce_weight=1.0,
        kl_weight=1.0,
        temperature=1.0,
        class_weight=class_weight,
        pixel_weight=pixel_weight,
        distill_void=distill_void,
    )
    assert_matches(parts, z.grad, *expected, temperature=1)


def test_gradcheck(device):
    """Of the reference, which alone computes in float64."""
    z, y, target = random_case((2, 3, (2, 3), (3, 2), (5, 7)), torch.float64, device)
    window = torch.tensor([[1.0, -2.0, 4.5, 6.0], [0, 0, 5, 7]], dtype=torch.float64, device=device)
    flip = torch.tensor([True, False], device=device)

    def loss(x: Tensor) -> Tensor:
        options = {"ce_weight": 0.6, "kl_weight": 1.7, "temperature": 2.5, "window_B4": window, "flip_B": flip}
        return -3.5 * kdcache_kernels.distill_loss(x, y, target, **options, impl="reference").loss

    assert torch.autograd.gradcheck(loss, (z,))
    assert torch.autograd.gradgradcheck(loss, (z,))


@pytest.mark.native
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_equal_student_has_no_kl(distill_loss, temperature, device):
    z, _, target = random_case((2, 11, (5, 5), (5, 5), (20, 20)), torch.float32, device)
    z = target.densify().requires_grad_()
    parts = distill_loss(z, None, target, size=(20, 20), kl_weight=1.0, temperature=temperature)
    parts.loss.backward()
    assert abs(parts.loss.item()) <= 1e-7 * temperature**2
    assert z.grad.abs().max().item() <= 1e-8


@pytest.mark.native
def test_layouts_give_the_same_bits(distill_loss, device):
    z, y, target = random_case(SHAPES[2], torch.float32, device)
    big = torch.zeros(4, 20, 10, 14, device=device)
    big[::2, 1:, ::2, ::2] = z.detach()
    results = []
    for x in (z.detach(), z.detach().to(memory_format=torch.channels_last), big[::2, 1:, ::2, ::2]):
        x = x.detach().requires_grad_()
        parts = distill_loss(x, y, target, kl_weight=1.0, temperature=2.0)
        results.append((parts.loss, torch.autograd.grad(parts.loss, x)[0]))
    for loss, gradient in results[1:]:
        assert torch.equal(loss, results[0][0])
        assert torch.equal(gradient, results[0][1])


@pytest.mark.native
def test_bitwise_repeat(distill_loss, device):
    z, y, target = random_case((4, 21, (16, 16), (16, 16), (64, 64)), torch.float32, device)
    window = torch.tensor([[0.5, 3, 40, 60.25]] * 4, dtype=torch.float64, device=device)
    runs = []
    for _ in range(3):
        loss = distill_loss(z, y, target, kl_weight=1.0, temperature=2.0, window_B4=window).loss
        runs.append((loss.detach(), torch.autograd.grad(loss, z)[0]))
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True))


@pytest.mark.native
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_changes_nothing(distill_loss, dtype, device):
    z, y, target = random_case(SHAPES[2], torch.float32, device)
    flip = torch.tensor([True, False], device=device)
    options = {"kl_weight": 1.0, "flip_B": flip}
    plain = torch.autograd.grad(distill_loss(z, y, target, **options).loss, z)[0]
    with torch.autocast(device.type, dtype=dtype):
        loss = distill_loss(z, y, target, **options).loss
    assert torch.equal(torch.autograd.grad(loss, z)[0], plain)


@pytest.mark.native
def test_low_matmul_precision_changes_nothing(distill_loss, device):
    z, y, target = random_case((2, 21, (16, 16), (16, 16), (64, 64)), torch.float32, device)
    flip = torch.tensor([True, False], device=device)

    def gradient() -> Tensor:
        return torch.autograd.grad(distill_loss(z, y, target, kl_weight=1.0, flip_B=flip).loss, z)[0]

    plain = gradient()
    try:
        torch.set_float32_matmul_precision("medium")
        assert torch.equal(gradient(), plain)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.native
def test_scaled_half_gradient(distill_loss, device):
    z, y, target = random_case(SHAPES[3], torch.float16, device)
    (65536.0 * distill_loss(z, y, target, kl_weight=1.0).loss).backward()
    expected = oracle(z, y, target, ce_weight=1.0, kl_weight=1.0, temperature=1.0)[1]
    assert ((z.grad.double() / 65536 - expected).abs().max() / expected.abs().max()).item() <= 1e-3


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
def test_no_host_synchronisation(distill_loss):
    z, y, target = random_case(SHAPES[2], torch.float32, torch.device("cuda"), k=8)
    window = torch.tensor([[0.0, 0, 17, 23]] * 2, dtype=torch.float64, device="cuda")
    flip = torch.tensor([True, False], device="cuda")
    weight = torch.ones(19, device="cuda")
    options = {"kl_weight": 1.0, "temperature": 2.0, "window_B4": window, "flip_B": flip, "class_weight": weight}
    distill_loss(z, y, target, **options).loss.backward()
    try:
        torch.cuda.set_sync_debug_mode("error")
        distill_loss(z, y, target, **options).loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
