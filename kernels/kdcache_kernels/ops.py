"""The public functions: they check their arguments and pick an implementation.

| impl | runs on | what it is |
| --- | --- | --- |
| triton | CUDA (and the CPU under TRITON_INTERPRET=1) | fused kernels; nothing of label size times classes |
| numba | CPU | the same for the CPU |
| torch | CPU | the loss in PyTorch operations with a gradient by hand; elsewhere the reference |
| reference | anything, float64 too | plain PyTorch, the oracle; several tensors of label size times classes |
| auto | | the fused family of the device, or torch where a table of small problems says that it is faster |

For tensors that no family takes, auto is the reference, with a warning.

Legend: B batch, C classes, k kept classes, H W label size, h w the student's or the target's own size.
"""

import importlib.util
import os
import warnings

import torch
from torch import Tensor

from . import autograd, checks, library, topk
from .errors import ShapeError, ValueRangeError, describe
from .plain.choice import prefers_torch
from .problem import LossProblem
from .reference import (
    Denominators,
    LossParts,
    argmax_confidence_reference,
    ce_weight_sum,
    distill_loss_reference,
    kl_pixels,
)
from .topk import PackedTarget

IMPLEMENTATIONS = ("auto", "triton", "numba", "torch", "reference")
FUSED_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_DEVICES = {"triton": "cuda", "numba": "cpu", "torch": "cpu"}
MOST_CONSTANTS = 256
"""Numbers that stay on their devices as tensors; a schedule may pass any number of others."""
CONSTANTS: dict[tuple[torch.device, float], tuple[Tensor, int]] = {}
INSTALLED = {name: importlib.util.find_spec(name) is not None for name in _DEVICES}


class ReferenceWarning(UserWarning):
    """A warning that `impl="auto"` uses the slow reference implementation, with the reason."""


def distill_loss(
    student_logits_BChw: Tensor,
    labels_BHW: Tensor | None = None,
    target: PackedTarget | None = None,
    *,
    size: tuple[int, int] | None = None,
    ce_weight: Tensor | float = 1.0,
    kl_weight: Tensor | float = 0.0,
    temperature: float = 1.0,
    class_weight: Tensor | None = None,
    ce_pixel_weight_BHW: Tensor | None = None,
    label_smoothing: float = 0.0,
    focal_gamma: float = 0.0,
    ignore_index: int = 255,
    window_B4: Tensor | None = None,
    flip_B: Tensor | None = None,
    pixel_weight_BHW: Tensor | None = None,
    distill_void: bool = True,
    align_corners: bool = False,
    ce_denominator: Tensor | float | None = None,
    kl_denominator: Tensor | float | None = None,
    impl: str = "auto",
) -> LossParts:
    """Return cross-entropy with labels plus KL(teacher || student), both at label size, from low-resolution logits.

    >>> logits = torch.zeros(1, 2, 4, 4, requires_grad=True)
    >>> parts = kdcache_kernels.distill_loss(logits, torch.zeros(1, 8, 8, dtype=torch.uint8))
    >>> parts.loss.backward()

    With student logits z, labels y, teacher logits t and the bilinear resize up, it computes `ce_weight * CE(up(z), y)
    + kl_weight * T^2 * KL(softmax(up(t) / T) || softmax(up(z) / T))`. CE counts the pixels whose label is not
    `ignore_index`, and divides by the sum of their class weights. KL counts the pixels whose centre lies in the
    target's view, and divides by their number.

    A term is 0 if its weight is the number 0, or if labels or target are missing. A term without counted pixels is 0
    with gradient 0, and so is the loss with one class. If a counted pixel is interpolated from a logit that is NaN,
    infinite, or so large that logits / T overflows, the term and the loss are NaN. The gradient is then NaN at every
    logit of the batch. Elsewhere such a logit changes nothing.

    Accuracy of top-k targets: the dropped classes share one value and its rounding to float32. At 8 of 171 classes and
    T = 4, the KL has an error of at most 2e-6 * KL + 2e-6 * T^2. If a tail has no mass, its classes have logits of
    -6e4. Between two pixels that keep different classes, interpolated logits then have errors of up to 2e-3 nats / T.
    With k of 2 to 8 of 21 classes, the gradient's errors are then at most 3e-4 of its largest element.

    Args:
        student_logits_BChw: raw logits, float32, float16, bfloat16 or float64, any strides. Only they and the weights
            get gradients. Computed in float32 even under autocast (float64 logits: in float64 by the reference).
        labels_BHW: class ids, uint8 or a signed integer, or None for an unlabelled batch.
        target: packed teacher logits of the same batch, or None for CE only.
        size: (H, W) in pixels. Needed without labels.
        ce_weight: >= 0, dimensionless. A number of 0 leaves the term out. A 0-dimensional tensor on the device is never
            read by the host, so a schedule can fill it under a CUDA graph. A learnt weight gets the term as its
            gradient.
        kl_weight: >= 0, dimensionless, as `ce_weight`.
        temperature: > 0, dimensionless.
        class_weight: (C,) floats >= 0, for CE. None weighs every class 1.
        ce_pixel_weight_BHW: weight of every pixel in CE, any dtype, such as a gate. It does not shrink the denominator:
            for a weighted mean, pass `ce_denominator`. A non-finite weight of a labelled pixel makes CE NaN.
        label_smoothing: share of every label, in [0, 1), that is spread over all classes, as in `F.cross_entropy`.
        focal_gamma: >= 0. It multiplies a pixel's cross-entropy by (1 - p)^gamma, with p the probability of its label.
            It excludes label smoothing. On CUDA, at strides above 1, it uses the slower kernel.
        ignore_index: the label of void pixels. It may be outside the range of the labels' dtype.
        window_B4: (B, 4) float64 edges (y0, x0, y1, x1), half-open, of what the image shows, in pixels of the target's
            view. It may reach beyond the view, but must overlap it. None is the whole view.
        flip_B: (B,) bool, whether the window is mirrored left to right. None mirrors nothing.
        pixel_weight_BHW: gate of the KL term, any dtype, taken as a number (uint8: 0 or 1, not 0 to 255). It multiplies
            a pixel's KL and does not shrink the denominator. A non-finite weight of a counted pixel makes KL NaN.
        distill_void: whether KL also counts void pixels. A batch without labels counts all pixels.
        align_corners: whether the student's resize aligns corners. For the teacher, see `PackedTarget.align_corners`.
        ce_denominator: a number or a 0-dimensional tensor on the device that replaces this batch's denominator of CE.
            Pass the sum of `distill_denominators` over ranks and accumulation steps.
        kl_denominator: the same for KL.
        impl: "auto" (the fastest for the device), "triton" (CUDA), "numba" (CPU), "torch" (small problems on the CPU)
            or "reference" (anything, slow).
    Returns: (loss, ce, kl), 0-dimensional float32 (float64 for float64 logits), nats per pixel, with T^2 in kl. Each is
        differentiable once, or several times with the reference. A backward through ce or kl takes as long as the call
        itself. If a compiled function returns them only for logging, detach them. `torch.func.grad` and `vmap` work,
        forward mode raises.
    Raises: ShapeError, ValueRangeError naming the argument. A wrong value inside a tensor is an error on the CPU. On
        CUDA, where nothing waits for the device, a class id out of range or a window that is NaN or outside the view
        makes the loss NaN. KDCACHE_DEBUG=1 in the environment checks on every device. It also raises for a loss that is
        not finite, with the position of its cause.
    Memory: the fused kernels need the gradient and float32 copies of the low-resolution logits, but no tensor of label
        size times classes. On CUDA, most targets with k = C are not copied if no window is given. The reference has up
        to eight (B, C, H, W) tensors.
    Source: Hinton et al. 2015, section 2. Smoothing: Szegedy et al. 2016, arXiv 1512.00567, section 7. Focal: Lin et
        al. 2017, arXiv 1708.02002. Oracle: kdcache_kernels.reference.
    """
    checks.check_student(student_logits_BChw)
    B, num_classes = student_logits_BChw.shape[:2]
    device = student_logits_BChw.device
    family = choose_implementation(
        impl, device, student_logits_BChw.dtype, has_torch=True, student_logits_BChw=student_logits_BChw
    )
    checks.check_number("temperature", temperature, above_zero=True)
    checks.check_scalar("ce_weight", ce_weight, device, "a scheduled weight")
    checks.check_scalar("kl_weight", kl_weight, device, "a scheduled weight")
    size = checks.check_size(labels_BHW, size)
    fix = "Pass one value per pixel of the label."
    checks.check_tensor("labels_BHW", labels_BHW, (B, *size), checks.LABEL_DTYPES, device, fix)
    checks.check_tensor("pixel_weight_BHW", pixel_weight_BHW, (B, *size), (), device, fix)
    checks.check_tensor("ce_pixel_weight_BHW", ce_pixel_weight_BHW, (B, *size), (), device, fix)
    checks.check_label_terms(label_smoothing, focal_gamma)
    checks.check_ignore_index(ignore_index)
    checks.check_class_weight(class_weight, num_classes, device)
    checks.check_window(window_B4, flip_B, B, device)
    checks.check_scalar("ce_denominator", ce_denominator, device, "a sum reduced over ranks", optional=True)
    checks.check_scalar("kl_denominator", kl_denominator, device, "a sum reduced over ranks", optional=True)
    if target is not None:
        checks.check_target(target, num_classes, B, device)
    scalars = (ce_weight, kl_weight, ce_denominator, kl_denominator)
    pixels = (labels_BHW, ce_pixel_weight_BHW, pixel_weight_BHW, window_B4, flip_B)
    teacher = library.target_arguments(target)
    traced = library.is_traced(student_logits_BChw, class_weight, *scalars, *pixels, *teacher)
    use_ce = labels_BHW is not None and (isinstance(ce_weight, Tensor) or ce_weight > 0)
    use_kl = target is not None and (isinstance(kl_weight, Tensor) or kl_weight > 0)

    def scalar(value: Tensor | float) -> Tensor:
        return value if isinstance(value, Tensor) else constant(value, device, traced=traced)

    problem = LossProblem(
        student=student_logits_BChw,
        labels=labels_BHW,
        target=target if use_kl else None,
        size=size,
        use_ce=use_ce,
        ce_weight=scalar(ce_weight),
        kl_weight=scalar(kl_weight),
        ce_denominator=None if ce_denominator is None else scalar(ce_denominator).detach(),
        kl_denominator=None if kl_denominator is None else scalar(kl_denominator).detach(),
        temperature=float(temperature),
        class_weight=None if class_weight is None else class_weight.detach(),
        ce_pixel_weight=None if ce_pixel_weight_BHW is None or not use_ce else ce_pixel_weight_BHW.detach(),
        label_smoothing=float(label_smoothing) if use_ce else 0.0,
        focal_gamma=float(focal_gamma) if use_ce else 0.0,
        ignore_index=int(ignore_index),
        window=None if window_B4 is None or not use_kl else window_B4.detach(),
        flip=flip_B if use_kl else None,
        pixel_weight=None if pixel_weight_BHW is None or not use_kl else pixel_weight_BHW.detach(),
        distill_void=distill_void,
        align_corners=align_corners,
        need_gradient=student_logits_BChw.requires_grad and torch.is_grad_enabled(),
    )
    if impl == "auto" and family == "numba" and not traced and prefers_torch(problem):
        family = "torch"
    if family == "reference":
        if not torch.compiler.is_compiling():
            checks.check_values(problem)
        parts = distill_loss_reference(problem)
        checks.explain_non_finite(problem, parts.loss)
        return parts
    return autograd.call_distill_loss(problem, family, traced=traced)


@torch.no_grad()
def distill_denominators(
    labels_BHW: Tensor | None = None,
    target: PackedTarget | None = None,
    *,
    num_classes: int,
    size: tuple[int, int] | None = None,
    class_weight: Tensor | None = None,
    ignore_index: int = 255,
    window_B4: Tensor | None = None,
    flip_B: Tensor | None = None,
    distill_void: bool = True,
    impl: str = "auto",
) -> Denominators:
    """Count the denominators of `distill_loss`, so that ranks and accumulation steps can share their sums.

    >>> labels = torch.tensor([[[0, 1], [1, 255]]], dtype=torch.uint8)
    >>> kdcache_kernels.distill_denominators(labels, num_classes=2).ce.item()
    3.0

    Pass the sums over all parts of a batch to each part's `distill_loss`. The parts' losses then add up to the loss of
    the whole batch. (DistributedDataParallel averages gradients, so multiply the loss by the number of ranks.)

    Pass labels_BHW, target or both. `num_classes` is the student's number of classes. All other arguments (label size,
    class weights, label of void, window, flip, whether KL counts void, implementation) must have the values that
    `distill_loss` gets, which explains them.

    Returns: (ce, kl), 0-dimensional float64 on the device. ce is the sum of the class weights of the labelled pixels,
        or 0 without labels. kl is the number of pixels that KL counts, or 0 without a target. A label outside 0 to
        `num_classes` - 1 does not count in ce.
    Raises: ShapeError, ValueRangeError naming the argument.
    Memory: nothing of label size. The reference needs several times the labels in int64.
    """
    size = checks.check_size(labels_BHW, size)
    if target is not None:
        checks.check_packed_target(target)
    anchor = target.values if labels_BHW is None and target is not None else labels_BHW
    if anchor is None:
        raise ShapeError("Missing labels_BHW or target", fix="Pass what distill_loss will get.")
    B, device = anchor.shape[0], anchor.device
    topk.check_device("labels_BHW", anchor)
    fix = "Pass one id per pixel."
    checks.check_tensor("labels_BHW", labels_BHW, (B, *size), checks.LABEL_DTYPES, device, fix)
    checks.check_class_weight(class_weight, num_classes, device)
    checks.check_ignore_index(ignore_index)
    family = choose_implementation(impl, device, torch.float32, labels_BHW=anchor)
    if target is not None:
        checks.check_target(target, num_classes, B, device)
        checks.check_window(window_B4, flip_B, B, device)
    if family != "reference":
        view_size = None if target is None else target.view_size
        window, flip = (None, None) if target is None else (window_B4, flip_B)
        options = (num_classes, int(ignore_index), distill_void, size, view_size, window, flip, anchor.detach())
        return Denominators(*library.denominators(family, labels_BHW, class_weight, *options).unbind())
    ce = kl = torch.zeros((), dtype=torch.float64, device=device)
    if labels_BHW is not None:
        ce = ce_weight_sum(labels_BHW.long(), class_weight, ignore_index, num_classes).double()
    if target is not None:
        counted, _ = kl_pixels(target, labels_BHW, size, ignore_index, window_B4, flip_B, distill_void)
        kl = counted.sum().double()
    return Denominators(ce, kl)


@torch.no_grad()
def target_argmax_confidence(
    target: PackedTarget,
    size: tuple[int, int],
    window_B4: Tensor | None = None,
    flip_B: Tensor | None = None,
    *,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Return the teacher's class and its probability (T = 1) at label size, for gates, pseudo labels and audits.

    >>> packed = kdcache_kernels.pack(torch.randn(1, 3, 4, 4), 3)
    >>> target = kdcache_kernels.PackedTarget(*packed, num_classes=3, view_size=(16, 16))
    >>> argmax, confidence = kdcache_kernels.target_argmax_confidence(target, (16, 16))
    >>> argmax.shape, argmax.dtype
    (torch.Size([1, 16, 16]), torch.uint8)

    Args:
        target: packed teacher logits.
        size: (H, W) of the result in pixels.
        window_B4: (B, 4) float64 edges (y0, x0, y1, x1) of what the result shows, in pixels of the target's view. None
            is the whole view.
        flip_B: (B,) bool, whether the window is mirrored left to right. None mirrors nothing.
        impl: "auto", "triton", "numba" or "reference" (see `choose_implementation`).

    Returns: (argmax, confidence), (B, H, W) each. argmax is uint8, int16 above 256 classes, or int32 above 32,768, and
        the lowest id of equal classes. confidence is float16, 0 to 1. Outside the view, argmax is from the nearest
        edge, and confidence is 0. If a NaN of the target enters a pixel, its confidence is NaN.
    Raises: ShapeError, ValueRangeError naming the argument.
    Memory: the results, and the target once in float32. The reference needs O(C*H*W), because it computes one image at
        a time.
    """
    checks.check_packed_target(target)
    size = checks.check_size(None, size)
    checks.check_window(window_B4, flip_B, target.batch_size, target.device)
    checks.check_window_values(window_B4, None)
    window_B4 = None if window_B4 is None else window_B4.detach()
    family = choose_implementation(impl, target.device, torch.float32, target=target.values)
    if family == "reference":
        return argmax_confidence_reference(target, size, window_B4, flip_B)
    result: tuple[Tensor, Tensor] = library.argmax_confidence(
        family, *library.target_arguments(target), window_B4, flip_B, size
    )
    return result


@torch.no_grad()
def pack(logits_BChw: Tensor, k: int, *, impl: str = "auto") -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Keep the k largest logits of every pixel, and summarise the other classes in one number.

    >>> values, indices, tail = kdcache_kernels.pack(torch.tensor([1.0, 3.0, 2.0]).view(1, 3, 1, 1), 2)
    >>> indices.flatten().tolist(), values.flatten().tolist()
    ([1, 2], [0.0, -1.0])

    That number is the log-odds of the other classes' probability mass. Of equal logits, the lowest class ids are kept.
    A pixel with NaN, +inf or only -inf gets NaN in every value and in the tail. This is not an error, because checking
    would wait for the device. Other -inf become -6e4.

    Args:
        logits_BChw: any floating dtype, any strides. Computed in float32, or in float64 if it is float64.
        k: 1 to C. C keeps every class in class order.
        impl: "auto", "triton", "numba", "torch" or "reference". "torch" is the reference here.
    Returns: (values, indices, tail) as in `PackedTarget`. indices and tail are None for k = C. For k < C, the classes
        are sorted from the largest to the smallest logit.
    Raises: ShapeError for a tensor that is not (B, C, h, w) of floats, ValueRangeError for k.
    Memory: the result. The reference needs O(B*C*h*w), 12 bytes per element more for k < C.
    """
    topk.check_logits(logits_BChw, k)
    family = choose_implementation(impl, logits_BChw.device, logits_BChw.dtype, logits_BChw=logits_BChw)
    if family == "reference":
        return topk.pack(logits_BChw, k)
    values, *sparse = library.pack(logits_BChw.detach(), k, family)
    indices, tail = sparse or (None, None)
    return values, indices, tail


@torch.no_grad()
def densify(
    values: Tensor,
    indices: Tensor | None,
    tail: Tensor | None,
    num_classes: int,
    dtype: torch.dtype = torch.float32,
    *,
    impl: str = "auto",
) -> Tensor:
    """Return logits of every class from packed logits, up to a constant per pixel. The inverse of `pack`.

    >>> values, indices, tail = kdcache_kernels.pack(torch.randn(1, 5, 4, 4), 2)
    >>> kdcache_kernels.densify(values, indices, tail, num_classes=5).shape
    torch.Size([1, 5, 4, 4])

    The dropped classes share the tail's mass evenly. Each gets logsumexp(kept logits) + tail - log(C - k), clamped to
    -6e4 to 6e4. This is computed in float64 and rounded once, except for the sum of exponentials, whose relative error
    is 3e-7.

    Args:
        values: (B, k, h, w), logit minus the pixel's largest logit, for the k kept classes.
        indices: (B, k, h, w) uint8 or uint16, the kept classes, or None if k = C.
        tail: (B, h, w), log-odds of the dropped classes' mass, or None if k = C.
        num_classes: C.
        dtype: dtype of the result. Only float32 uses the fused kernels, any other dtype the reference.
        impl: "auto", "triton", "numba", "torch" or "reference". "torch" is the reference here.
    Returns: (B, C, h, w) in `dtype`, contiguous for k < C.
    Raises: ShapeError, ValueRangeError naming the argument. A class id of C or more is an error on the CPU. On CUDA,
        where checking would wait for the device, the pixel is NaN (with KDCACHE_DEBUG=1 also an error).
    """
    topk.check_packed(values, indices, tail, num_classes)
    values = values.detach()
    dense = indices is None or tail is None
    family = "reference"
    if not dense and dtype == torch.float32:
        family = choose_implementation(impl, values.device, dtype, values=values)
    if family == "reference" or indices is None or tail is None:
        return topk.densify(values, indices, tail, num_classes, dtype)
    if checks.debugging() and checks.may_read(indices):
        topk.check_ids(indices, num_classes)
    result: Tensor = library.densify(values, indices, tail, num_classes, family)
    return result


def constant(value: float, device: torch.device, *, traced: bool) -> Tensor:
    """Return a number as a 0-dimensional float64 tensor on a device. Do not write to it.

    If `traced` (see `library.is_traced`), always make a new tensor. Otherwise up to 256 tensors are cached, because
    filling one costs more than a small kernel. On CUDA, a cached tensor is returned only if the current stream filled
    it, or while a CUDA graph is captured.
    """
    if traced:
        return torch.full((), value, dtype=torch.float64, device=device)
    cuda = device.type == "cuda"
    stream, capturing = 0, False
    if cuda:
        stream, capturing = torch.cuda.current_stream(device).cuda_stream, torch.cuda.is_current_stream_capturing()
    kept, of_stream = CONSTANTS.get((device, value), (None, 0))
    if kept is not None and (capturing or stream == of_stream):
        return kept
    with torch.inference_mode(False):
        filled = torch.full((), value, dtype=torch.float64, device=device)
    if kept is None and not capturing and len(CONSTANTS) < MOST_CONSTANTS:
        CONSTANTS[device, value] = filled, stream
    return filled


def choose_implementation(
    impl: str, device: torch.device, dtype: torch.dtype, *, has_torch: bool = False, **arguments: Tensor
) -> str:
    """Return "triton", "numba", "torch" or "reference", the implementation for tensors of a device and dtype.

    Args:
        impl: "auto" or the name of an implementation. "auto" chooses Triton on CUDA and numba on the CPU, or the
            reference with a warning if these cannot run.
        device: device of the tensors.
        dtype: dtype of the student's logits.
        has_torch: whether the operation has a "torch" implementation. If not, "torch" means the reference.
        arguments: tensors by name, for the error message.
    Raises: ValueRangeError for an unknown implementation, or for tensors that it cannot take.
    """
    if impl not in IMPLEMENTATIONS:
        raise ValueRangeError(f"Unknown impl {impl!r}", fix=f"Choose one of {', '.join(IMPLEMENTATIONS)}.")
    if impl == "reference" or (impl == "torch" and not has_torch):
        return "reference"
    family = next((name for name, kind in _DEVICES.items() if kind == device.type), "") if impl == "auto" else impl
    reason = _refusal(family, device, dtype)
    if reason is None:
        return family
    if impl != "auto":
        raise ValueRangeError(
            f"Cannot compute with impl={impl!r}: "
            + ", ".join((*(f"{name} is {describe(x)}" for name, x in arguments.items()), reason)),
            fix="Pass impl='auto', or impl='reference', which takes everything.",
        )
    if not torch.compiler.is_compiling():
        warnings.warn(f"kdcache_kernels computes with the slow reference: {reason}.", ReferenceWarning, stacklevel=3)
    return "reference"


def _refusal(family: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Return why a fused family cannot take tensors of this device and dtype, or None if it can."""
    if not family:
        return f"there are no fused kernels for {device.type} tensors"
    if not INSTALLED[family]:
        return f"{family} is not installed"
    if dtype not in FUSED_DTYPES:
        return f"{str(dtype).removeprefix('torch.')} is not among float32, float16 and bfloat16"
    interpreted = family == "triton" and device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
    if device.type != _DEVICES[family] and not interpreted:
        return f"{family} runs on {_DEVICES[family]}, the tensors are on {device.type}"
    return None
