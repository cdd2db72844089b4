"""Check a batch before a loss reads it: every active teacher term has a target, and labels match its window."""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from numbers import Real
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kdcache.distill.batch import SEGMENTATION, Batch, StoredTargets
from kdcache.distill.target import TargetFormat
from kdcache.errors import DataError, RecipeError, suggest
from kdcache_kernels import IMPLEMENTATIONS

if TYPE_CHECKING:
    from kdcache.distill.terms import Term

Size = tuple[int, int]


def check_weights(temperature: float, impl: str, **weights: float) -> None:
    """Check the settings of a loss at its construction, because an invalid weight would silently drop its term.

    Raises: RecipeError.
    """
    if impl not in IMPLEMENTATIONS:
        fix = suggest(str(impl), IMPLEMENTATIONS, f"Use one of {', '.join(IMPLEMENTATIONS)}.")
        raise RecipeError(f"Unknown impl {impl!r}", fix=fix)
    for name, number in weights.items():
        if not (isinstance(number, Real) and math.isfinite(number) and number >= 0):
            raise RecipeError(
                f"Invalid value of {name}: {number!r}",
                fix=f"Pass a number from 0 on. {name}=0 leaves its term out.",
            )
    if not (isinstance(temperature, Real) and math.isfinite(temperature) and temperature > 0):
        raise RecipeError(
            f"Invalid value of temperature: {temperature!r}",
            fix="Pass a number above 0. temperature=1 leaves the distributions as they are.",
        )


def check_targets(batch: Batch, form: TargetFormat | None, reading: Collection[str]) -> None:
    """Check that no teacher term of the loss becomes a silent 0.

    `form` is the cache of the loss. A loss without one learns from labels only, if a batch has no target. `reading`
    names the terms with a weight above 0 that read the teacher's logits.

    Raises: RecipeError.
    """
    if batch.targets is None or not reading:
        return
    names = ", ".join(reading)
    if form is None and batch.target is not None:
        raise RecipeError(
            f"Cannot compare targets without their cache ({names} have a weight above 0)",
            fix="Make the loss with the open cache, DistillLoss(cache). Or use kl_weight=0.",
        )
    if form is not None and batch.target is None:
        raise RecipeError(
            f"Missing target of {SEGMENTATION} in a batch ({names} have a weight above 0)",
            fix="Read targets: CacheDataset(cache, targets=True). Or use replace(batch, targets=None) for a batch "
            "without a teacher, or kl_weight=0 and no terms.",
        )


def labelled_batch(batch: Batch | StoredTargets, labels: Tensor | None, device: torch.device) -> Batch:
    """Return a batch, or stored targets on `device`, with the segmentation labels (B, H, W) of whole numbers.

    Raises: DataError for stored targets without labels, and for labels of another shape or of floats.
    """
    fix = "Pass labels=masks, whole (B, H, W) ids at the size of the student's image. For images without labels, pass "
    fix += "torch.full((B, H, W), 255, dtype=torch.uint8)"
    if labels is None:
        raise DataError("Missing labels for stored targets", fix=fix)
    if not isinstance(labels, Tensor) or labels.ndim != 3 or labels.is_floating_point():
        kind = f"{labels.dtype} {tuple(labels.shape)}" if isinstance(labels, Tensor) else type(labels).__name__
        raise DataError(f"Invalid labels: {kind}", fix=fix)
    whole = batch if isinstance(batch, Batch) else Batch.of_targets(batch, device)
    return replace(whole, labels={**whole.labels, SEGMENTATION: labels})


def check_rows(logits: Tensor | None, batch: Batch) -> None:
    """Check that a batch has labels, and that all its parts have equally many rows.

    `logits` (B, C, h, w) are the student's. None checks only the batch.

    Raises: DataError.
    """
    if not batch.labels:
        raise DataError(
            "A batch has no labels of any task",
            fix="For images without labels, add void ones: "
            f'labels={{"{SEGMENTATION}": torch.full((B, H, W), 255, dtype=torch.uint8)}}',
        )
    rows = {} if logits is None else {"logits": len(logits)}
    rows["labels"] = len(batch.any_label)
    rows |= {} if batch.target is None else {"target": len(batch.target.values)}
    rows |= {} if batch.window is None else {"window": len(batch.window)}
    if len(set(rows.values())) > 1:
        raise DataError(
            "A batch has parts of different lengths: "
            f"{', '.join(f'{name} of {count}' for name, count in rows.items())}",
            fix="Pass them as the loader gave them, and cut all or none.",
        )


def check_logits(reading: Sequence[str]) -> None:
    """Raise RecipeError for terms, named in `reading`, that read logits of a student without them."""
    if reading:
        raise RecipeError(
            f"{', '.join(reading)} need logits, but the student has no head {SEGMENTATION}",
            fix="Leave them out with ce_weight=0 and kl_weight=0, or use a student with that head.",
        )


def check_arrays(terms: "Sequence[Term]", batch: Batch) -> None:
    """Raise RecipeError for terms that read arrays of the cache that a batch lacks."""
    arrays = [path for term in terms for path in term.arrays() if path not in batch.arrays]
    if arrays:
        raise RecipeError(
            f"A batch lacks arrays of the cache: {', '.join(dict.fromkeys(arrays))}",
            fix="Read them: CacheDataset(cache, extras=criterion.arrays)",
        )


def check_taps(terms: "Sequence[Term]", features: Mapping[str, Tensor]) -> None:
    """Raise RecipeError for terms with taps that are not among the student's features."""
    taps = [tap for term in terms for tap in term.student_taps() if tap not in features]
    if taps:
        raise RecipeError(
            f"The student's outputs lack features: {', '.join(dict.fromkeys(taps))}",
            fix="Pass outputs=model(x, criterion.student_taps), which have logits and features.",
        )


def check_pseudo(terms: "Sequence[Term]", batch: Batch) -> None:
    """Raise RecipeError for active terms whose pseudo labels a batch lacks."""
    makers = dict.fromkeys(by for term in terms for by in term.labellers())
    missing = [by for by in makers if by not in batch.pseudo]
    if missing:
        raise RecipeError(
            f"A batch lacks the pseudo labels of its weak view by {', '.join(missing)}",
            fix=f'Add those of its logits: replace(batch, pseudo={{"{missing[0]}": pseudo_labels(logits, size)}})',
        )


def check_heads(terms: "Sequence[Term]", batch: Batch, heads: Mapping[str, Tensor] | None) -> None:
    """Check that a batch and a student have what active `terms` of heads other than segmentation compare.

    `heads` are the student's outputs by head. None checks only the batch.

    Raises: RecipeError for a missing output, label or target; DataError for labels of another size.
    """
    for term in terms:
        name = term.head
        if name is None:
            continue
        if heads is not None and name not in heads:
            raise RecipeError(
                f"{term.kind} needs the student's head {name}, but the outputs have none",
                fix="Use a model with that head, in training mode, and pass all its outputs: criterion(model(x), "
                "batch)",
            )
        if not (term.reads_teacher or term.reads_labels):
            continue
        where = "labels" if term.reads_labels else "targets"
        if term.task not in (getattr(batch, where) or {}):
            raise RecipeError(
                f"{term.kind} needs {where} of {term.task}, but a batch has none",
                fix="Train on data that has them, or leave the term out.",
            )
        label = batch.labels.get(name)
        if where == "labels" and label is not None and label.shape[-2:] != batch.size:
            raise DataError(
                f"Labels of one batch have different sizes: {name} {tuple(label.shape)}, "
                f"{SEGMENTATION} {tuple(batch.any_label.shape)}",
                fix="Render them as the loader does, (B, H, W) each.",
            )


def shows_otherwise(batch: Batch, form: TargetFormat, whole: Size | None) -> bool:
    """Return whether the shape of labels contradicts the windows of a batch, so the labels were cut differently.

    Labels in a window with the view's aspect ratio have the ratio of `whole`, (H, W) of a whole view's labels, up to a
    pixel. A window of another ratio contradicts nothing. All windows of a batch must contradict, because a single
    random window may do so by chance.
    """
    (height, width), (rows, columns) = whole or form.view_size, batch.size
    if abs(rows - columns * height / width) < 1 or abs(columns - rows * width / height) < 1:
        return False
    if batch.window is None:
        return True
    y0_B, x0_B, y1_B, x1_B = batch.window.unbind(1)
    upright_B, across_B = (y1_B - y0_B) / form.view_size[0], (x1_B - x0_B) / form.view_size[1]
    return bool(((upright_B - across_B).abs() <= 1e-9 * across_B.abs()).all())


def window_error(form: TargetFormat, size: Size, whole: Size | None) -> DataError:
    """Return the error for labels that were cut without the window of their target."""
    view = "x".join(map(str, form.view_size))
    stretched = "" if whole is None else f", whose labels are {'x'.join(map(str, whole))}"
    return DataError(
        f"Labels of {'x'.join(map(str, size))} do not fit the window of a target of {view}{stretched}",
        fix="Cut pixels, labels and window in the same way: replace(batch, window=...), (B, 4) float64 edges y0, x0, "
        f"y1, x1 in pixels of the {view} view. If whole views are stretched, use DistillLoss(..., size=(H, W)).",
    )


def may_read_values(tensor: Tensor) -> bool:
    """Return whether a tensor's values may be read: not while a step is traced, recorded or must not wait."""
    if torch.compiler.is_compiling():
        return False
    if tensor.device.type != "cuda":
        return True
    return not (torch.cuda.is_current_stream_capturing() or torch.cuda.get_sync_debug_mode())
