"""What is measured and against whom: shapes, tensors, and rivals that compute the same loss and gradient."""

from __future__ import annotations

import sys
import types
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from kdcache.bench.kernels import KINDS, PRESETS, RIVALS, Case, Settings, Shape, parse_names, parse_shapes, rivals
from kdcache.bench.kernels.inputs import make_inputs
from kdcache.bench.kernels.losses import loss_of
from kdcache.bench.kernels.rivals import OURS, UnavailableError, prepare
from kdcache.errors import RecipeError
from kdcache_kernels import target_argmax_confidence

CPU = torch.device("cpu")
SMALL = Shape(2, 5, 24, 32, 4)


def relative(error: torch.Tensor, of: torch.Tensor) -> float:
    return (error.double().abs().max() / of.double().abs().max()).item()


# Shapes


def test_shapes_and_presets_are_parsed_once_each() -> None:
    assert parse_shapes(" 2x5x24x32/4, camvid,4X11x288x288/4") == (SMALL, *PRESETS["camvid"])
    assert parse_shapes("cuda") == PRESETS["cuda"]
    assert str(SMALL) == "2x5x24x32/4"
    assert parse_shapes(str(SMALL)) == (SMALL,)


@pytest.mark.parametrize(
    ("text", "value"), [("camvit", "camvit"), ("2x5x24x32", "2x5"), ("2x5x0x32/4", "x0x"), ("", "''")]
)
def test_unknown_shapes(text: str, value: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_shapes(text)
    assert value in caught.value.problem
    assert ("Did you mean camvid?" in caught.value.fix) == (text == "camvit")


def test_unknown_names() -> None:
    assert parse_names("liger, eager,liger", "--against", RIVALS) == ("liger", "eager")
    with pytest.raises(RecipeError, match=r"Did you mean eager\?") as caught:
        parse_names("eager,eagre", "--against", RIVALS)
    assert caught.value.problem == "Unknown name in --against: 'eagre'"


def test_sizes_of_a_shape() -> None:
    odd = Shape(1, 3, 500, 512, 8)
    assert (odd.native, odd.divides, SMALL.divides) == ((63, 64), False, True)
    assert SMALL.class_pixels == 2 * 5 * 24 * 32


@pytest.mark.parametrize(("classes", "kept", "k"), [(32, None, 32), (33, None, 8), (33, 40, 33), (21, 4, 4)])
def test_a_target_keeps_what_a_store_would(classes: int, kept: int | None, k: int) -> None:
    assert Case(Shape(1, classes, 8, 8, 4), kept=kept).k == k


def test_cases_are_drawn_once() -> None:
    settings = Settings(CPU, (SMALL, SMALL), ("fp32", "bf16"))
    assert len(list(settings.cases())) == 2
    assert len(list(replace(settings, kinds=tuple(KINDS)).cases())) == len(KINDS) * 2


@pytest.mark.parametrize("classes", [5, 300])
def test_inputs_are_the_same_every_time_and_partly_void(classes: int) -> None:
    case = Case(Shape(1, classes, 24, 32, 4), dtype="bf16")
    one, other = make_inputs(case, CPU), make_inputs(case, CPU)
    assert torch.equal(one.student, other.student)
    assert torch.equal(one.labels, other.labels)
    assert one.student.dtype == torch.bfloat16
    assert one.student.is_leaf
    assert torch.equal(one.labels.long(), one.labels_int64), "no id was cut short"
    void = one.labels_int64 == case.shape.ignore_index
    assert 0.05 < void.float().mean() < 0.2
    assert int(one.labels_int64[~void].max()) < classes
    assert torch.equal(one.mask, 1 - void.float())


def test_labels_lie_in_blobs() -> None:
    """Four rows of 124 pixels, a warp of the Triton kernel at stride 4, show about as many classes as real images."""
    labels = make_inputs(Case(Shape(3, 21, 512, 512, 4)), CPU).labels
    strips = labels[:, :, :496].reshape(3, 128, 4, 4, 124).movedim(3, 2).flatten(3).flatten(0, 2)
    classes = [len(set(strip.tolist()) - {255}) for strip in strips]
    assert 1.5 < sum(classes) / len(classes) < 3
    assert all(len(image.unique()) > 6 for image in labels)


def test_kinds_are_what_they_are_called() -> None:
    drawn = {kind: make_inputs(Case(replace(SMALL, batch=8), kind=kind), CPU) for kind in KINDS}
    for kind, inputs in drawn.items():
        assert (inputs.class_weight is None) == (kind == "plain")
        still = (inputs.window is None, inputs.flip is None, inputs.grid is None)
        assert still == 3 * (not kind.endswith("warp"),)
        assert inputs.mask.shape[1:] == (SMALL.native if KINDS[kind].on_cells else SMALL.size)
        assert inputs.mask.sum() == pytest.approx(inputs.kl_count.item())
    assert not drawn["plain"].mask[drawn["plain"].labels == 255].any()
    assert drawn["trained"].mask.all(), "void pixels teach"
    assert drawn["dist"].mask.min() == pytest.approx(1)
    for kind in ("warp", "dist-warp"):
        assert 0 < drawn[kind].mask.mean() < 1, "a window of the default zooms shows pixels beside the view"
    assert drawn["dist-warp"].mask.unique().numel() > 2, "cells on the edge count by a share"


# Rivals compute the same loss and gradient


def reference(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """In float64, from the rounded logits."""
    inputs, kind = make_inputs(case, CPU), KINDS[case.kind]
    leaf = inputs.student.detach().double().requires_grad_()
    if kind.threshold is not None:
        size = case.shape.size
        _, confidence = target_argmax_confidence(inputs.target, size, inputs.window, inputs.flip, impl="reference")
        assert 0.05 < (confidence >= kind.threshold).float().mean() < 0.95
    loss = loss_of(case).ours(case, replace(inputs, student=leaf), "reference")
    return loss.detach(), torch.autograd.grad(loss, leaf)[0]


NUMBERS = ((1.0, 5, None), (2.5, 40, 8))
CASES = [(name, kind, *numbers) for name in (OURS, "eager", "chunked") for kind in KINDS for numbers in NUMBERS]
COMPILED = [
    pytest.param(name, kind, *NUMBERS[(of + number) % 2], marks=pytest.mark.slow)
    for of, name in enumerate(("compile", "compile-max-autotune"))
    for number, kind in enumerate(KINDS)
]
"""What is compiled is the code of `eager`, which meets all numbers: each way to compile meets each kind once."""


@pytest.mark.parametrize(("name", "kind", "temperature", "classes", "kept"), [*CASES, *COMPILED])
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
def test_rivals_agree_with_the_reference(name: str, kind: str, temperature: float, classes: int, kept: int) -> None:
    torch.compiler.reset()
    case = Case(replace(SMALL, num_classes=classes), temperature=temperature, kept=kept, kind=kind)
    if name == "chunked" and not loss_of(case).by_image:
        with pytest.raises(UnavailableError, match=f"loss of {kind} compares images"):
            prepare(name, case, make_inputs(case, CPU), "auto")
        return
    expected_loss, expected = reference(case)
    step = prepare(name, case, make_inputs(case, CPU), "auto").step
    for _ in range(2):
        loss, gradient = step()
        assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-5)
        assert relative(gradient - expected, expected) < 1e-5


@pytest.mark.parametrize("name", [OURS, "eager", "chunked"])
@pytest.mark.parametrize(("dtype", "error"), [("fp16", 2e-3), ("bf16", 2e-2)])
def test_narrow_logits(name: str, dtype: str, error: float) -> None:
    case = Case(SMALL, dtype=dtype)
    expected_loss, expected = reference(case)
    loss, gradient = prepare(name, case, make_inputs(case, CPU), "auto").step()
    assert gradient.shape == expected.shape
    assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-5)
    assert relative(gradient - expected, expected) < error


class _LigerCE(torch.nn.Module):
    """As Liger's: the mean over rows; the gradient is written over the input."""

    def __init__(self, ignore_index: int) -> None:
        super().__init__()

    def forward(self, rows: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        class Function(torch.autograd.Function):
            @staticmethod
            def forward(ctx, rows):  # type: ignore[no-untyped-def]
                loss = F.cross_entropy(rows, labels)
                gradient = (rows.softmax(1) - F.one_hot(labels, rows.shape[1])) / len(rows)
                rows.detach().untyped_storage().copy_(gradient.contiguous().untyped_storage())
                ctx.save_for_backward(rows.detach())
                return loss

            @staticmethod
            def backward(ctx, grad):  # type: ignore[no-untyped-def]
                return ctx.saved_tensors[0] * grad

        return Function.apply(rows)


@pytest.fixture
def fake_liger(monkeypatch: pytest.MonkeyPatch) -> None:
    """Liger's two classes in torch, so that what we pass to them is judged without a GPU."""
    classes = {"LigerCrossEntropyLoss": _LigerCE, "LigerKLDIVLoss": torch.nn.KLDivLoss}
    for name, path in rivals.LIGER_MODULES.items():
        module = types.ModuleType(path)
        setattr(module, name, classes[name])
        monkeypatch.setitem(sys.modules, path, module)
    for path in ("liger_kernel", "liger_kernel.transformers"):
        monkeypatch.setitem(sys.modules, path, types.ModuleType(path))
    monkeypatch.setattr(rivals.metadata, "version", lambda name: "0.8.5")
    monkeypatch.setenv("TRITON_INTERPRET", "1")


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_liger_gets_the_same_pixels(fake_liger: None, temperature: float) -> None:
    case = Case(SMALL, temperature=temperature)
    inputs = make_inputs(case, CPU)
    expected_loss, expected = reference(case)
    contestant = prepare("liger", case, inputs, "auto")
    loss, gradient_NC = contestant.step()
    assert not contestant.capturable
    assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-5)
    gradient_BHWC = torch.zeros(*inputs.mask.shape, SMALL.num_classes)
    gradient_BHWC[inputs.mask > 0] = gradient_NC
    leaf = inputs.student.detach().requires_grad_()
    upsampled = F.interpolate(leaf, SMALL.size, mode="bilinear")
    back = torch.autograd.grad(upsampled, leaf, gradient_BHWC.permute(0, 3, 1, 2))[0]
    assert relative(back - expected, expected) < 1e-5


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "plain"])
def test_liger_takes_the_plain_case_alone(kind: str, fake_liger: None) -> None:
    case = Case(SMALL, kind=kind)
    with pytest.raises(UnavailableError, match=kind):
        prepare("liger", case, make_inputs(case, CPU), "auto")


def test_liger_says_why_it_cannot_run(fake_liger: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def reason() -> str:
        with pytest.raises(UnavailableError) as caught:
            prepare("liger", Case(SMALL), make_inputs(Case(SMALL), CPU), "auto")
        assert "\n" not in str(caught.value)
        return str(caught.value)

    monkeypatch.delattr(sys.modules["liger_kernel.transformers.kl_div"], "LigerKLDIVLoss")
    assert "cannot be used" in reason()
    monkeypatch.setattr(rivals.metadata, "version", lambda name: "0.4.2")
    assert "older than 0.5" in reason()
    monkeypatch.delenv("TRITON_INTERPRET")
    assert "no kernel for cpu" in reason()

    def absent(name: str) -> str:
        raise rivals.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(rivals.metadata, "version", absent)
    assert "not installed" in reason()
