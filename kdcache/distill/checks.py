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
    """Check the settings of a loss when it is made, because an invalid weight would silently drop its term.

    Args:
        temperature: must be finite and above 0.
        impl: must be one of `kdcache_kernels.IMPLEMENTATIONS`.
        weights: name of an argument, such as `ce_weight` -> its value, which must be finite and at least 0.
    Raises: RecipeError for an invalid setting.
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
    """Check that a batch has the targets of all teacher terms, because a term without them would silently be 0.

    A batch passes if its `targets` is None, because it then has no teacher, or if `reading` is empty.

    Args:
        batch: the batch to check.
        form: the format of the loss's targets, such as an open cache. None is a loss that was made without a cache.
        reading: names of the terms that have a weight above 0 and read the teacher's logits.
    Raises: RecipeError if `form` is None but the batch has a segmentation target, or if `form` is given but `targets`
        lacks this target.
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
    """Return the batch with `labels` as its segmentation labels.

    Args:
        batch: a batch, or stored targets, which are moved to `device`.
        labels: (B, H, W), any integer dtype.
        device: where stored targets go.
    Raises: DataError if labels are None, floats, or not three-dimensional.
    """
    fix = "Pass labels=masks, whole (B, H, W) ids at the size of the student's image. For images without labels, pass "
    fix += "torch.full((B, H, W), 255, dtype=torch.uint8)"
    if labels is None:
        raise DataError("Missing labels for stored targets", fix=fix)
    if not isinstance(labels, Tensor) or labels.ndim != 3 or labels.is_floating_point():
        kind = f"{labels.dtype} {tuple(labels.shape)}" if isinstance(labels, Tensor) else type(labels).__name__
        raise DataError(f"Invalid labels: {kind}", fix=fix)
    with_targets = batch if isinstance(batch, Batch) else Batch.of_targets(batch, device)
    return replace(with_targets, labels={**with_targets.labels, SEGMENTATION: labels})


def check_rows(logits: Tensor | None, batch: Batch) -> None:
    """Check that a batch has labels, and that its labels, targets and windows have equally many rows.

    `logits` are the student's, (B, C, h, w), and must have as many rows. None checks only the batch.

    Raises: DataError for missing labels or different numbers of rows.
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
    """Raise RecipeError if any loss term needs segmentation logits. Call it for a student without that head.

    `reading` holds the names of these terms. If it is empty, nothing is raised.
    """
    if reading:
        raise RecipeError(
            f"{', '.join(reading)} need logits, but the student has no head {SEGMENTATION}",
            fix="Leave them out with ce_weight=0 and kl_weight=0, or use a student with that head.",
        )


def check_arrays(terms: "Sequence[Term]", batch: Batch) -> None:
    """Raise RecipeError if a term reads an array of the cache that `batch.arrays` lacks."""
    arrays = [path for term in terms for path in term.arrays() if path not in batch.arrays]
    if arrays:
        raise RecipeError(
            f"A batch lacks arrays of the cache: {', '.join(dict.fromkeys(arrays))}",
            fix="Read them: CacheDataset(cache, extras=criterion.arrays)",
        )


def check_taps(terms: "Sequence[Term]", features: Mapping[str, Tensor]) -> None:
    """Raise RecipeError if a term reads a feature of the student that `features` lacks.

    `features` is a dict: name of a tap -> features (B, c, h, w).
    """
    taps = [tap for term in terms for tap in term.student_taps() if tap not in features]
    if taps:
        raise RecipeError(
            f"The student's outputs lack features: {', '.join(dict.fromkeys(taps))}",
            fix="Pass outputs=model(x, criterion.student_taps), which have logits and features.",
        )


def check_pseudo(terms: "Sequence[Term]", batch: Batch) -> None:
    """Check that `batch.pseudo` has all pseudo labels that the terms read: of the networks `student`, `ema` or both.

    Raises: RecipeError if some are missing.

    `terms` are the terms with a weight other than 0.
    """
    makers = dict.fromkeys(by for term in terms for by in term.labellers())
    missing = [by for by in makers if by not in batch.pseudo]
    if missing:
        raise RecipeError(
            f"A batch lacks the pseudo labels of its weak view by {', '.join(missing)}",
            fix=f'Add those of its logits: replace(batch, pseudo={{"{missing[0]}": pseudo_labels(logits, size)}})',
        )


def check_heads(terms: "Sequence[Term]", batch: Batch, heads: Mapping[str, Tensor] | None) -> None:
    """Check that a batch and a student have everything that terms of other heads than segmentation need, such as depth.

    Args:
        terms: the active terms.
        batch: the batch with labels and targets.
        heads: name of a head -> the student's output. None checks only the batch.
    Raises: RecipeError for a missing output, label or target. DataError for labels of another size than the batch's.
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
    """Return True if the labels' shape proves that they were not cut by the batch's windows.

    If all windows have the view's aspect ratio, or the batch has no windows, cut labels would keep the aspect ratio of
    `whole`. Then return True if the labels' height and width are both a pixel or more off this ratio. In all other
    cases return False.

    Args:
        batch: the batch to check.
        form: the format of its targets, such as an open cache.
        whole: (H, W) of the labels of a whole view. None is the view's own size.
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
    """Return the DataError for a batch whose labels were cropped, but whose windows do not say so.

    The message names the sizes, and its fix shows how to give the windows.

    Args:
        form: the format of the targets, such as an open cache.
        size: (H, W) of the batch's labels.
        whole: (H, W) of labels that cover a whole view. None is the view's own size.
    """
    view = "x".join(map(str, form.view_size))
    stretched = "" if whole is None else f", whose labels are {'x'.join(map(str, whole))}"
    return DataError(
        f"Labels of {'x'.join(map(str, size))} do not fit the window of a target of {view}{stretched}",
        fix="Cut pixels, labels and window in the same way: replace(batch, window=...), (B, 4) float64 edges y0, x0, "
        f"y1, x1 in pixels of the {view} view. If whole views are stretched, use DistillLoss(..., size=(H, W)).",
    )


def may_read_values(tensor: Tensor) -> bool:
    """Return True if Python may read the tensor's values now.

    It may not while a step is compiled or recorded as a CUDA graph, or while PyTorch forbids waiting for the GPU.
    """
    if torch.compiler.is_compiling():
        return False
    if tensor.device.type != "cuda":
        return True
    return not (torch.cuda.is_current_stream_capturing() or torch.cuda.get_sync_debug_mode())
