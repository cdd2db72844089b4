"""Make the loss of a training from its settings: terms, gate, class weights."""

from collections.abc import Callable, Sequence
from typing import Literal
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kdcache.data import IGNORE_INDEX, class_weights
from kdcache.distill import SEGMENTATION, DistillLoss, Gate, LabelTargets, MergedTargets, parse_gate
from kdcache.distill.terms import (
    Term,
    TermTargets,
    make_term,
    with_companions,
)
from kdcache.errors import RecipeError
from kdcache.models import ClassMerge, Outputs, SegmentationModel
from kdcache.settings.parse import rare_temperature
from kdcache.settings.term import LossTerm, check_terms
from kdcache.settings.terms import Auxiliary, CrossEntropy, Projected, Pseudo
from kdcache.store import Cache, Records, evenly_spread
from kdcache.training.class_trust import read_trust, trust_from_run
from kdcache.training.config import TrainConfig
from kdcache.training.input.batch import Array
from kdcache.training.input.dataset import DrawnDataset
from kdcache.training.input.sampler import Rare
from kdcache.training.run.monitor import TARGET_VALUES

Size = tuple[int, int]
_NAMED = 5
"""So many of the classes that are drawn most are named."""
COUNTED_TARGETS = 256
"""Samples of a store, at most, that the frequencies of the teacher's classes are counted on."""

_COUNTED: "WeakKeyDictionary[DrawnDataset, tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]]" = WeakKeyDictionary()


def needed_arrays(config: TrainConfig, cache: Cache | None, model: SegmentationModel) -> tuple[str, ...]:
    """Return the paths of the cache's arrays, other than targets, that the loss terms read, such as `features/stage4`.

    Without a cache, and with labels in the teacher's place, there are none.

    Args:
        config: the stream's settings.
        cache: the stream's open cache. None for a data folder.
        model: the student, whose taps choose the features.
    Raises: RecipeError if the cache lacks some.
    """
    if cache is None or config.loss.teacher == "labels":
        return ()
    check_terms(config.all_terms, cache.manifest)
    resolved = [spec.resolved(cache.manifest, model.taps) for spec in config.terms]
    return tuple(dict.fromkeys(path for spec in resolved for path in spec.arrays(cache.manifest)))


def make_criterion(
    config: TrainConfig,
    model: SegmentationModel,
    dataset: DrawnDataset,
    device: torch.device,
    note: Callable[[str], None],
    pasted: DrawnDataset | None = None,
) -> DistillLoss:
    """Return the loss of a stream, on the CPU.

    Args:
        config: the stream's settings.
        model: the student.
        dataset: the stream's samples.
        device: where `--class-trust auto` evaluates a run, to compare the teacher with it.
        note: is called with notes for the user, such as the trust in each class.
        pasted: the samples that are pasted into this stream's samples, or None.
    Raises: RecipeError for a model without the heads that the loss compares.
    """
    if not model.head_kinds and config.given.isdisjoint(CrossEntropy().takes):
        if dataset.labels_used.any():
            note("labels are not used: the student has no heads")
        config = config.changed(ce_weight=0.0)
    for spec in config.active:
        if spec.fused:
            spec.check_student(model.head_kinds)
    cache = dataset.cache
    gate = None if cache is None or not config.reads_targets else _gate(config, cache, dataset, device, note)
    stored = None if cache is None else stored_targets(cache, dataset)
    alone = config.loss.teacher == "labels" or cache is None
    labels = _label_targets(config, model, dataset) if alone and (config.teaches or config.terms) else None
    if labels is not None and config.teaches:
        note(f"--teacher labels: a control without a teacher, labels on {labels.grid[0]}x{labels.grid[1]} cells")
    class_weight = _class_weight(config, dataset, pasted)
    return DistillLoss(
        labels if config.loss.teacher == "labels" else stored,
        ce_weight=config.loss.ce_weight if config.data.labels != "none" or pasted is not None else 0.0,
        kl_weight=config.loss.kl_weight if config.wants_kl else 0.0,
        temperature=config.loss.temperature,
        class_weight=class_weight,
        label_smoothing=config.loss.label_smoothing,
        focal_gamma=config.loss.focal_gamma,
        distill_void=config.loss.distill_void,
        align_corners=model.align_corners,
        gate=gate,
        further=_terms(config, labels or stored, model, dataset, class_weight),
        scheduled=config.loss.distill_schedule != "constant",
        size=config.data.size,
        impl=config.machine.impl,
    )


def stored_targets(cache: Cache, dataset: DrawnDataset) -> Cache | MergedTargets:
    """Return the object that turns a stream's stored targets into logits of the training's classes.

    With a class map and a segmentation head, it is `MergedTargets`, which merges the teacher's classes. Otherwise it is
    the cache itself.
    """
    if dataset.mapped is None or SEGMENTATION not in dataset.heads:
        return cache
    lookup = dataset.mapped[1][: cache.num_classes].astype(int)
    return MergedTargets(cache, ClassMerge(np.where(lookup == IGNORE_INDEX, -1, lookup).tolist()), len(dataset.classes))


def label_counts(dataset: DrawnDataset) -> npt.NDArray[np.int64]:
    """Return the number of pixels (C,) of each class, in the labels of all labelled samples.

    Each sample counts once, also with several views.
    """
    counts: npt.NDArray[np.int64] = sample_counts(dataset)[0].sum(0)
    return counts


def sample_counts(dataset: DrawnDataset) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return the numbers of pixels in the N labelled samples: of each class (N, C), and of all pixels, also void, (N,).

    The result is kept for the next call with the same data set, because counting reads all labels.
    """
    if dataset not in _COUNTED:
        classes = len(dataset.classes)
        counted = [(_bincount(label)[:classes], label.size) for label in dataset.labels()]
        counts_NC = np.array([counts for counts, _ in counted], np.int64).reshape(-1, classes)
        _COUNTED[dataset] = counts_NC, np.array([size for _, size in counted], np.int64)
    return _COUNTED[dataset]


def rare_order(config: TrainConfig, dataset: DrawnDataset, seed: int, note: Callable[[str], None]) -> Rare | None:
    """Return the order in which `--sampling rare` draws samples, or None for even sampling.

    Args:
        config: the stream's settings.
        dataset: the stream's samples.
        seed: seed of the draws.
        note: is called with a text that names the classes that are drawn most.
    Raises: RecipeError if a sample has no segmentation label, or all labels are void.
    """
    temperature = rare_temperature(config.data.sampling)
    if temperature is None:
        return None
    counts_NC, pixels_N = sample_counts(dataset)
    without = len(dataset) - len(counts_NC)
    if without or not counts_NC.any():
        raise RecipeError(
            "Cannot use --sampling rare: "
            + (
                f"{without} of {len(dataset)} samples have no label of classes that is used"
                if without
                else "the labels are void everywhere"
            ),
            fix="Leave it out. Or draw labelled samples only (--distill-on labelled), or as a --stream with "
            "sampling=rare of their own.",
        )
    order = Rare(counts_NC, pixels_N, seed, temperature)
    most = np.argsort(-order.probabilities_C, kind="stable")[:_NAMED]
    drawn = [f"{dataset.classes.names[c]} {100 * order.probabilities_C[c]:.3g} %" for c in most]
    note(f"--sampling {config.data.sampling} draws samples by a class that they show: {', '.join(drawn)}")
    return order


def target_counts(cache: Cache, dataset: DrawnDataset) -> npt.NDArray[np.int64]:
    """Return for each class (C,) the number of cells in which it is the teacher's best class.

    View 0 of at most 256 samples is counted, evenly spread. With a class map, classes are those of the training.
    """
    samples, mapped = dataset.indices, dataset.mapped
    counts = np.zeros(256, np.int64)
    for number in evenly_spread(len(samples), COUNTED_TARGETS):
        best = _best_class(cache, cache.manifest.record(samples[number]))
        counts += _bincount(best if mapped is None else mapped[1][best])
    return counts[: len(dataset.classes)]


def channel_moments(cache: Cache, tap: str, samples: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation, (c,) float32 each, of the channels of a stored feature.

    They are measured over all cells of at most 256 of the given samples, evenly spread. A constant channel has standard
    deviation 1.

    Args:
        cache: an open cache.
        tap: name of the feature.
        samples: numbers of samples in the cache.
    """
    numbers = evenly_spread(len(samples), COUNTED_TARGETS)
    means = []
    for number in numbers:
        row_chw = cache.feature(cache.manifest.record(samples[number]), tap).astype(np.float64)
        means.append(np.stack([row_chw.mean((1, 2)), np.square(row_chw).mean((1, 2))]))
    mean_c, square_c = np.mean(means, axis=0)
    std_c = np.sqrt(np.maximum(square_c - mean_c**2, 0))
    std_c = np.where(std_c > 1e-6 * np.abs(mean_c), std_c, 1)
    return torch.tensor(mean_c, dtype=torch.float32), torch.tensor(std_c, dtype=torch.float32)


def _best_class(cache: Cache, record: int) -> Array:
    rows = cache.read(record, cache.target_paths())
    best = rows[TARGET_VALUES].argmax(0)
    indices = rows.get("targets/segmentation/indices")
    argmax = best if indices is None else np.take_along_axis(indices, best[None], 0)[0]
    return np.asarray(argmax).astype(np.int64)


def _label_targets(config: TrainConfig, model: SegmentationModel, dataset: DrawnDataset) -> LabelTargets:
    """Return labels as targets, on the cache's cells, or on the cells of the student's logits without a cache."""
    assert config.data.size is not None
    cache = dataset.cache
    stored = None if cache is None else cache.specs.get(TARGET_VALUES)
    shape = _of_classes(_probe(model, config.data.size)).shape if stored is None else stored.shape
    return LabelTargets(len(dataset.classes), config.data.size, (shape[-2], shape[-1]))


def _terms(
    config: TrainConfig,
    targets: TermTargets | None,
    model: SegmentationModel,
    dataset: DrawnDataset,
    label_weight: Tensor | None,
) -> list[Term]:
    """Return the loss terms except `ce` and `kl`. `label_weight` (C,) is the class weight of cross-entropy."""
    if targets is None or not config.terms:
        return []
    shapes = tap_shapes(model, config)
    channels = {tap: channels for tap, (channels, _, _) in shapes.items()}
    grids = {tap: (height, width) for tap, (_, height, width) in shapes.items()}

    def term(spec: LossTerm) -> Term:
        moments = None
        if spec.reads_taps and targets.manifest is not None:
            spec = spec.resolved(targets.manifest, list(channels), grids)
        if isinstance(spec, Projected) and spec.standardise == "channels" and dataset.cache is not None:
            moments = channel_moments(dataset.cache, spec.teacher_tap or "", dataset.indices)
        return make_term(
            spec,
            targets=targets,
            student_taps=channels,
            student_heads=model.head_kinds | model.training_heads,
            align_corners=model.align_corners,
            impl=config.machine.impl,
            class_weight=label_weight
            if isinstance(spec, Auxiliary)
            else _target_weight(config, spec.class_weights if isinstance(spec, Pseudo) else "none", dataset),
            label_smoothing=config.loss.label_smoothing,
            moments=moments,
        )

    return with_companions([term(spec) for spec in config.terms if spec.active])


def _target_weight(
    config: TrainConfig, kind: Literal["none", "median", "sqrt"], dataset: DrawnDataset
) -> Tensor | None:
    """Return class weights (C,) by rarity in the targets, which are the cache's or the labels. None for kind "none"."""
    if kind == "none":
        return None
    stored = dataset.cache if config.loss.teacher == "store" else None
    counts = label_counts(dataset) if stored is None else target_counts(stored, dataset)
    return torch.as_tensor(class_weights(counts, kind), dtype=torch.float32)


def tap_shapes(model: SegmentationModel, config: TrainConfig) -> dict[str, tuple[int, int, int]]:
    """Return the shape of each feature of the model, for one image of the training's size: tap -> (c, h, w)."""
    assert config.data.size is not None
    features = _probe(model, config.data.size).features
    return {tap: (features[tap].shape[1], features[tap].shape[2], features[tap].shape[3]) for tap in model.taps}


def _of_classes(outputs: Outputs) -> Tensor:
    """Return the segmentation logits, or another head's output without them."""
    return outputs.logits if SEGMENTATION in outputs.heads else next(iter(outputs.heads.values()))


def _probe(model: SegmentationModel, size: Size) -> Outputs:
    """Return the model's outputs for a black image of (H, W). The model stays unchanged."""
    was_training = model.training
    device = next(model.parameters()).device
    try:
        with torch.inference_mode():
            pixels = torch.zeros((1, *size, 3), dtype=torch.uint8, device=device)
            outputs: Outputs = model.eval()(model.normalise(pixels), model.taps)
    finally:
        model.train(was_training)
    return outputs


def _gate(
    config: TrainConfig, cache: Cache, dataset: DrawnDataset, device: torch.device, note: Callable[[str], None]
) -> Gate:
    spec = parse_gate(config.loss.gate)
    if spec.kind == "correct" and not dataset.labelled:
        raise RecipeError(
            f"Cannot use --gate correct: in {cache.place}, no sample that is used has a label",
            fix="Use --gate confidence:0.7 or none.",
        )
    weight = torch.ones(len(dataset.classes))
    if config.loss.class_balance != "none":
        counts = target_counts(cache, dataset)
        weight = weight * torch.as_tensor(class_weights(counts, config.loss.class_balance), dtype=torch.float32)
    if config.loss.class_trust is not None:
        weight = weight * _trust(config, cache, dataset, device, note)
    balanced = config.loss.class_balance != "none" or config.loss.class_trust is not None
    return Gate(spec, weight if balanced else None)


def _trust(
    config: TrainConfig, cache: Cache, dataset: DrawnDataset, device: torch.device, note: Callable[[str], None]
) -> Tensor:
    names = cache.manifest.dataset.class_names
    if config.loss.class_trust == "auto":
        assert config.loss.trust_against is not None
        trust = trust_from_run(Records(cache, dataset.split), config.loss.trust_against, device, note)
    else:
        assert config.loss.class_trust is not None
        trust = read_trust(config.loss.class_trust, names)
    note(
        "trust in the teacher: " + ", ".join(f"{name} {weight:.2f}" for name, weight in zip(names, trust, strict=True))
    )
    return torch.tensor(trust, dtype=torch.float32)


def _class_weight(config: TrainConfig, dataset: DrawnDataset, pasted: DrawnDataset | None) -> Tensor | None:
    if config.loss.class_weights == "none" or config.loss.ce_weight == 0:
        return None
    counts = label_counts(dataset) + (0 if pasted is None else label_counts(pasted))
    return torch.as_tensor(class_weights(counts, config.loss.class_weights), dtype=torch.float32)


def _bincount(ids: Array) -> npt.NDArray[np.int64]:
    return np.bincount(ids.reshape(-1), minlength=256)
