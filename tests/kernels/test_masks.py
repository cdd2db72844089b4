"""What counts and what does not: labels, non-finite logits, denominators, terms that are left out."""

import pytest
import torch

from kdcache_kernels import PackedTarget, ValueRangeError, distill_denominators, pack

C, GRID, SIZE = 5, (4, 4), (16, 16)
NON_FINITE = [
    *(
        ("student", bad) for bad in (float("nan"), float("inf"), float("-inf"), 3e38, 3e37)
    ),  # 3e37 is until divided by T
    *(("target", bad) for bad in (float("nan"), float("inf"))),  # `pack` makes the others finite
]


def make(device, batch=2, k=C, dtype=torch.float32):
    generator = torch.Generator().manual_seed(7)
    z = torch.randn(batch, C, *GRID, generator=generator, dtype=torch.float64).to(device, dtype)
    t = torch.randn(batch, C, *GRID, generator=generator).to(device)
    y = torch.randint(0, C, (batch, *SIZE), generator=generator).to(device)
    return z.requires_grad_(), y, PackedTarget(*pack(t, k), C, SIZE)


def is_zero(x):
    return bool((x == 0).all())


@pytest.mark.native
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)
def test_all_ignored_is_zero_even_with_nan_logits(distill_loss, dtype, device):
    z, y, target = make(device, dtype=dtype)
    z = torch.full_like(z, torch.nan).requires_grad_()
    parts = distill_loss(z, torch.full_like(y, 255), target, kl_weight=1.0, distill_void=False)
    parts.loss.backward()
    assert [part.item() for part in parts] == [0, 0, 0]
    assert is_zero(z.grad)


def test_a_window_beside_the_view(distill_loss, device):
    """An error where the host can look, else NaN: not a batch that silently teaches nothing."""
    z, _, target = make(device)
    window = torch.tensor([[0.0, 0, 16, 16], [20, 0, 30, 16]], dtype=torch.float64, device=device)
    options = {"size": SIZE, "kl_weight": 1.0, "window_B4": window}
    if device.type == "cpu":
        with pytest.raises(ValueRangeError, match=r"Invalid window_B4: .* for sample 1 is outside the view \(16, 16\)"):
            distill_loss(z, None, target, **options)
    else:
        assert distill_loss(z, None, target, **options).kl.isnan()
    assert distill_loss(z, None, None, size=SIZE, window_B4=window).loss.item() == 0  # without a target, no effect


@pytest.mark.native
def test_an_ignored_image_has_no_gradient(distill_loss, device):
    z, y, target = make(device)
    y[1] = 255
    distill_loss(z, y, target, kl_weight=1.0, distill_void=False).loss.backward()
    assert is_zero(z.grad[1])
    assert not is_zero(z.grad[0])


@pytest.mark.native
def test_one_labelled_pixel(distill_loss, device):
    z, y, _ = make(device)
    y[:] = 255
    y[1, 0, 0] = 3
    loss = distill_loss(z, y).loss
    # The corner's bilinear weights are all on the corner cell.
    torch.testing.assert_close(loss, -z[1, :, 0, 0].log_softmax(0)[3])
    loss.backward()
    assert int((z.grad != 0).any(1).sum()) == 1


@pytest.mark.native
def test_classes_of_weight_zero_only(distill_loss, device):
    z, y, _ = make(device)
    weight = torch.tensor([0.0, 1, 1, 1, 1], device=device)
    parts = distill_loss(z, torch.zeros_like(y), class_weight=weight)
    parts.loss.backward()
    assert parts.loss.item() == 0
    assert is_zero(z.grad)


@pytest.mark.native
@pytest.mark.parametrize("windowed", [False, True])
@pytest.mark.parametrize(("where", "bad"), NON_FINITE)
def test_a_non_finite_logit_that_counts(distill_loss, where, bad, windowed, device):
    """In the loss if it touches a counted pixel, without a trace if it does not."""
    z, y, target = make(device)
    window = torch.tensor([[0.0, 0, *SIZE]] * 2, dtype=torch.float64, device=device) if windowed else None
    void = y.clone()
    void[0, :8, :8] = 255  # cell (0, 0) reaches rows and columns 0 to 5
    options = {"kl_weight": 1.0, "temperature": 0.05, "distill_void": False, "window_B4": window}
    clean = distill_loss(z, void, target, **options)
    expected = torch.autograd.grad(clean.loss, z)[0]
    spoilt = z.detach().clone()
    if where == "student":
        spoilt[0, 2, 0, 0] = bad
    else:
        target.values[0, 2, 0, 0] = bad
    spoilt.requires_grad_()

    unseen = distill_loss(spoilt, void, target, **options)
    assert torch.equal(unseen.loss, clean.loss)
    # Taking the cell out leaves the gradients of the pixels that count, and that one's is 0 as before.
    assert torch.equal(torch.autograd.grad(unseen.loss, spoilt)[0], expected)

    seen = distill_loss(spoilt, y, target, **options)
    assert seen.loss.isnan()
    assert torch.autograd.grad(seen.loss, spoilt)[0].isnan().all()
    assert seen.ce.isnan() == (where == "student")


@pytest.mark.native
@pytest.mark.parametrize(
    "cause", ["student", "target", "tail", "gate", "ce_weight", "kl_weight", "ce_denominator", "infinite weight"]
)
def test_a_loss_that_is_not_finite_has_a_gradient_of_nan_everywhere(distill_loss, cause, device):
    """Also at the lost logit and in an image that counts nothing: no optimiser goes on with half a gradient."""
    z, y, target = make(device, k=2)
    y[1] = 255
    nan = torch.tensor(torch.nan, device=device)
    options = {"kl_weight": 1.0, "temperature": 2.0, "distill_void": False}
    if cause == "student":
        z.data[0, 1, 2, 2] = torch.inf
    elif cause == "target":
        target.values[0, 0, 1, 1] = torch.nan
    elif cause == "tail":
        target.tail[0, 3, 3] = torch.nan
    elif cause == "gate":
        options["pixel_weight_BHW"] = torch.ones(2, *SIZE, device=device)
        options["pixel_weight_BHW"][0, 7, 7] = torch.nan
    elif cause == "infinite weight":
        options["ce_weight"] = torch.tensor(torch.inf, device=device)
    else:
        options[cause] = nan
    parts = distill_loss(z, y, target, **options)
    assert not parts.loss.isfinite()
    for upstream in (1.0, 0.0, 2.0**16):
        (gradient,) = torch.autograd.grad(parts.loss * upstream, z, retain_graph=True)
        assert gradient.isnan().all()


@pytest.mark.filterwarnings("ignore:All-NaN slice encountered:RuntimeWarning")  # numpy's, in Triton's interpreter
@pytest.mark.parametrize("size", [(16, 16), (4, 4), (13, 11)], ids=["cells", "pixels", "tiles"])
def test_one_class_teaches_nothing(distill_loss, size, device):
    """Its probability is 1 whatever its logit: exactly 0, and still NaN where a logit is."""
    generator = torch.Generator().manual_seed(3)
    z = (torch.randn(1, 1, 4, 4, generator=generator) * 5).to(device).requires_grad_()
    target = PackedTarget(*pack(torch.randn(1, 1, 4, 4, generator=generator).to(device) * 5, 1), 1, size)
    y = torch.zeros(1, *size, dtype=torch.uint8, device=device)
    for temperature in (1.0, 2.0, 2.5):
        parts = distill_loss(z, y, target, kl_weight=1.0, temperature=temperature)
        (gradient,) = torch.autograd.grad(parts.loss, z)
        assert [part.item() for part in parts] == [0, 0, 0]
        assert is_zero(gradient)
    z.data[0, 0, 1, 1] = torch.nan
    parts = distill_loss(z, y, target, kl_weight=1.0)
    assert [bool(part.isnan()) for part in parts] == [True] * 3
    assert torch.autograd.grad(parts.loss, z)[0].isnan().all()


@pytest.mark.native
def test_a_gate_cannot_hide_a_nan(distill_loss, device):
    z, y, target = make(device)
    z.data[0, 0, 0, 0] = torch.nan
    gate = torch.zeros(2, *SIZE, device=device)
    assert distill_loss(z, y, target, ce_weight=0.0, kl_weight=1.0, pixel_weight_BHW=gate).loss.isnan()


@pytest.mark.native
def test_a_nan_gate_counts_only_inside(distill_loss, device):
    z, y, target = make(device)
    y[0, 0, 0] = 255
    gate = torch.ones(2, *SIZE, device=device)
    gate[0, 0, 0] = torch.nan
    options = {"ce_weight": 0.0, "kl_weight": 1.0, "pixel_weight_BHW": gate}
    assert distill_loss(z, y, target, **options).kl.isnan()
    parts = distill_loss(z, y, target, distill_void=False, **options)
    assert parts.kl.isfinite()
    assert torch.autograd.grad(parts.loss, z)[0].isfinite().all()


@pytest.mark.native
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("ignore_index", [255, -1, 2])
def test_label_dtypes(distill_loss, dtype, ignore_index, device):
    z, y, _ = make(device)
    info = torch.iinfo(dtype)
    if info.min <= ignore_index <= info.max:
        y[0, :3] = ignore_index
    expected = distill_loss(z, y, ignore_index=ignore_index).loss
    assert torch.equal(distill_loss(z, y.to(dtype), ignore_index=ignore_index).loss, expected)


@pytest.mark.native
@pytest.mark.parametrize("wrong", [C, -3, 254])
def test_class_id_out_of_range(distill_loss, wrong, device):
    z, y, target = make(device)
    y[1, 3, 4] = wrong
    if device.type == "cpu":
        with pytest.raises(ValueRangeError, match=rf"Invalid labels_BHW: ids \[{wrong}\] in 1 pixels"):
            distill_loss(z, y, target)
    else:
        assert distill_loss(z, y, target).loss.isnan()
    # A term that does not read the ids does not mind them.
    assert distill_loss(z, y, target, ce_weight=0.0, kl_weight=1.0).loss.isfinite()


@pytest.mark.native
def test_terms_that_are_left_out(distill_loss, device):
    z, y, target = make(device)
    whole = distill_loss(z, y, target, kl_weight=1.0)
    assert torch.equal(distill_loss(z, y, target, ce_weight=0.0, kl_weight=1.0).loss, whole.kl)
    assert torch.equal(distill_loss(z, y, target, kl_weight=0.0).loss, whole.ce)
    assert distill_loss(z, y, None, kl_weight=1.0).kl.item() == 0
    assert distill_loss(z, None, target, size=SIZE, kl_weight=1.0).ce.item() == 0
    nothing = distill_loss(z, None, None, size=SIZE).loss
    nothing.backward()
    assert nothing.item() == 0
    assert is_zero(z.grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
def test_empty_batch(distill_loss, dtype, device):
    z, y, target = make(device, batch=0, k=2, dtype=dtype)
    parts = distill_loss(z, y, target, kl_weight=1.0)
    parts.loss.backward()
    assert parts.loss.item() == 0
    assert z.grad.shape == z.shape


@pytest.mark.native
@pytest.mark.parametrize("as_numbers", [False, True])
def test_parts_of_a_batch_add_up(distill_loss, as_numbers, device):
    z, y, target = make(device, batch=3)
    y[0, :7] = 255
    weight = torch.linspace(0.5, 2, C, device=device)
    window = torch.tensor([[0.0, 0, *SIZE], [-4, -4, 12, 12], [2, 2, 9, 9]], dtype=torch.float64, device=device)
    common = {"class_weight": weight, "distill_void": False}
    whole = distill_loss(z, y, target, kl_weight=2.0, window_B4=window, **common)
    expected = torch.autograd.grad(whole.loss, z)[0]
    pieces = []
    for part in (slice(0, 1), slice(1, 3)):
        t = PackedTarget(target.values[part], None, None, C, SIZE)
        counts = distill_denominators(y[part], t, num_classes=C, window_B4=window[part], **common)
        pieces.append((part, t, counts))
    ce, kl = (sum(counts[i] for _, _, counts in pieces) for i in range(2))
    if as_numbers:
        ce, kl = float(ce), float(kl)
    total = sum(
        distill_loss(
            z[part],
            y[part],
            t,
            kl_weight=2.0,
            window_B4=window[part],
            ce_denominator=ce,
            kl_denominator=kl,
            **common,
        ).loss
        for part, t, _ in pieces
    )
    torch.testing.assert_close(total, whole.loss)
    torch.testing.assert_close(torch.autograd.grad(total, z)[0], expected)


@pytest.mark.native
def test_only_the_student_gets_a_gradient(distill_loss, device):
    z, y, target = make(device)
    target.values.requires_grad_()
    distill_loss(z, y, target, kl_weight=1.0).loss.backward()
    assert target.values.grad is None
    assert not distill_loss(z.detach(), y, target, kl_weight=1.0).loss.requires_grad


def test_an_image_of_logits_beyond_a_window_changes_nothing(distill_loss, device):
    """A NaN of the target outside what the window shows leaves no trace."""
    z, _, target = make(device, batch=1)
    window = torch.tensor([[0.0, 0, 6, 6]], dtype=torch.float64, device=device)
    options = {"size": SIZE, "kl_weight": 1.0, "window_B4": window}
    clean = distill_loss(z, None, target, **options).loss
    target.values[0, :, 3, 3] = torch.nan
    assert torch.equal(distill_loss(z, None, target, **options).loss, clean)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
def test_nan_window_shows_on_cuda(distill_loss):
    z, y, target = make(torch.device("cuda"))
    window = torch.full((2, 4), torch.nan, dtype=torch.float64, device="cuda")
    assert distill_loss(z, y, target, kl_weight=1.0, window_B4=window).kl.isnan()
