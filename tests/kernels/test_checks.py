"""Every bad argument has its own error: the problem names the argument, and a fix is offered."""

import pickle
import subprocess
import sys

import pytest
import torch

import kdcache_kernels
from kdcache_kernels import (
    KernelError,
    PackedTarget,
    ReferenceWarning,
    ShapeError,
    ValueRangeError,
    choose_k,
    densify,
    distill_denominators,
    distill_loss,
    gradient_error,
    ops,
    pack,
    target_argmax_confidence,
    topk,
)

C, SIZE = 5, (8, 8)
LOGITS = torch.zeros(2, C, 2, 2)
LABELS = torch.zeros(2, *SIZE, dtype=torch.uint8)
TARGET = PackedTarget(torch.zeros(2, C, 2, 2, dtype=torch.float16), None, None, C, SIZE)
WINDOW = torch.tensor([[0.0, 0, 8, 8]] * 2, dtype=torch.float64)
NAN = float("nan")


def test_impl_lists_what_exists():
    with pytest.raises(ValueRangeError, match=r"(?s)'cutlass'.*auto, triton, numba, torch, reference"):
        distill_loss(LOGITS, LABELS, impl="cutlass")


def test_a_family_refuses_what_it_cannot_take(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueRangeError, match=r"(?s)impl='triton'.*triton runs on cuda, the tensors are on cpu"):
        distill_loss(LOGITS, LABELS, impl="triton")
    with pytest.raises(ValueRangeError, match=r"(?s)impl='numba'.*float64 is not among"):
        distill_loss(LOGITS.double(), LABELS, impl="numba")
    monkeypatch.setitem(ops.INSTALLED, "numba", False)
    with pytest.raises(ValueRangeError, match="numba is not installed"):
        distill_loss(LOGITS, LABELS, impl="numba")
    with pytest.warns(ReferenceWarning, match="slow reference: numba is not installed"):
        distill_loss(LOGITS, LABELS)


def test_auto_names_why_it_takes_the_reference():
    with pytest.warns(ReferenceWarning, match="slow reference: float64 is not among float32, float16 and bfloat16"):
        distill_loss(LOGITS.double(), LABELS)


VALUES, INDICES, TAIL = pack(torch.randn(2, 9, 2, 2, generator=torch.Generator().manual_seed(0)), 3)


@pytest.mark.parametrize(
    ("name", "arguments", "kind"),
    [
        ("values", (VALUES[0], INDICES, TAIL, 9, SIZE), ShapeError),
        ("values", (VALUES.float(), INDICES, TAIL, 9, SIZE), ShapeError),
        ("values", (VALUES, INDICES, TAIL, 2, SIZE), ShapeError),
        ("values", (VALUES[:, :0], INDICES, TAIL, 9, SIZE), ShapeError),
        ("indices", (VALUES, None, TAIL, 9, SIZE), ShapeError),
        ("indices", (VALUES, INDICES.long(), TAIL, 9, SIZE), ShapeError),
        ("indices", (VALUES, INDICES[:, :2], TAIL, 9, SIZE), ShapeError),
        ("indices", (VALUES, INDICES.to("meta"), TAIL, 9, SIZE), ShapeError),
        ("tail", (VALUES, INDICES, None, 9, SIZE), ShapeError),
        ("tail", (VALUES, INDICES, TAIL[:, None], 9, SIZE), ShapeError),
        ("target", (VALUES, INDICES, TAIL, 3, SIZE), ShapeError),
        ("view_size", (VALUES, INDICES, TAIL, 9, (0, 8)), ValueRangeError),
    ],
)
def test_packed_target_refuses(name, arguments, kind):
    with pytest.raises(kind) as caught:
        PackedTarget(*arguments)
    assert caught.value.problem.startswith(f"Invalid {name}: ")


@pytest.mark.parametrize(
    ("call", "kind"),
    [
        (lambda: pack(LOGITS[0], 1), ShapeError),
        (lambda: pack(LOGITS.long(), 1), ShapeError),
        (lambda: pack(LOGITS, 0), ValueRangeError),
        (lambda: pack(LOGITS, C + 1), ValueRangeError),
        (lambda: densify(VALUES, None, None, 9), ShapeError),
        (lambda: distill_loss(LOGITS), ShapeError),
        (lambda: distill_loss(LOGITS, size=(0, 8)), ShapeError),
        (lambda: gradient_error(LOGITS, 2, 0.0, SIZE), ValueRangeError),
        (lambda: gradient_error(LOGITS, 9, 1.0, SIZE), ValueRangeError),
        (lambda: choose_k(LOGITS, SIZE, 6), ShapeError),
        (lambda: target_argmax_confidence(TARGET, (0, 8)), ShapeError),
        (lambda: target_argmax_confidence(TARGET, SIZE, WINDOW[:1]), ShapeError),
        (lambda: distill_denominators(num_classes=C), ShapeError),
        (lambda: distill_denominators(num_classes=C, size=SIZE), ShapeError),
        (lambda: distill_denominators(LABELS, TARGET, num_classes=9), ShapeError),
    ],
)
def test_other_functions_refuse(call, kind):
    with pytest.raises(kind):
        call()


META = TARGET.to("meta")


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("student_logits_BChw", lambda impl: distill_loss(LOGITS.to("meta"), LABELS.to("meta"), impl=impl)),
        ("student_logits_BChw", lambda impl: distill_loss(LOGITS.to("meta"), LABELS.to("meta"), META, impl=impl)),
        ("logits_BChw", lambda impl: pack(LOGITS.to("meta"), 2, impl=impl)),
        ("logits_BChw", lambda _: gradient_error(LOGITS.to("meta"), 2, 1.0, SIZE)),
        ("values", lambda impl: densify(META.values, None, None, C, impl=impl)),
        ("values", lambda impl: target_argmax_confidence(TARGET.to("meta"), SIZE, impl=impl)),
        ("labels_BHW", lambda _: distill_denominators(LABELS.to("meta"), num_classes=C)),
    ],
)
@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_a_device_without_float64_is_refused(name, call, impl, monkeypatch):
    """Apple's MPS raises a bare TypeError over it; here the meta device stands for it."""
    assert "mps" in topk.NO_FLOAT64
    monkeypatch.setattr(topk, "NO_FLOAT64", ("meta",))
    with pytest.raises(ShapeError, match=rf"Invalid {name}: .*meta, a device without float64\n.*to the CPU"):
        call(impl)


def test_message_layout_and_pickle():
    error = ShapeError("Invalid x: this", fix="Do that.", rule="The rule.")
    assert str(error) == "Invalid x: this\n  fix: Do that.\n  The rule."
    with pytest.raises(ShapeError) as caught:
        topk.pack(torch.zeros(1), 2)
    for each in (error, caught.value):
        copy = pickle.loads(pickle.dumps(each))
        assert (type(copy), str(copy)) == (ShapeError, str(each))
    assert issubclass(ShapeError, KernelError)
    assert issubclass(KernelError, ValueError)


def test_exported_names():
    assert kdcache_kernels.__all__ == sorted(kdcache_kernels.__all__, key=lambda n: (not n.isupper(), n))
    assert set(kdcache_kernels.__all__) == {
        *("IMPLEMENTATIONS", "LOGIT_LIMIT", "Denominators", "KernelError", "LossParts", "LossProblem"),
        *("PackedTarget", "ReferenceWarning", "ShapeError", "ValueRangeError", "choose_k", "densify"),
        *(
            "average_moments",
            "distill_denominators",
            "distill_loss",
            "distill_loss_reference",
            "gradient_error",
        ),
        *("pack", "relation_loss", "relation_moments", "target_argmax_confidence"),
    }
    assert all(hasattr(kdcache_kernels, name) for name in kdcache_kernels.__all__)


def test_import_is_light():
    code = (
        "import sys, torch; before = set(sys.modules); import kdcache_kernels; "
        "new = set(sys.modules) - before; "
        "print([m for m in new if m.split('.')[0] in ('triton', 'numba', 'kdcache', 'zarr', 'torchvision')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
