"""Open the samples of one stream, from a cache or a data folder."""

from collections.abc import Iterator, Sequence

import numpy as np

from kdcache.data import (
    Augmentation,
    RandAugment,
    Split,
    check_fold_labels,
    check_folds,
    folds_of,
    open_split,
    prefetch,
)
from kdcache.errors import DataError, RecipeError
from kdcache.settings.parse import all_listed, rand_augment
from kdcache.store import Cache, Records, open_caches
from kdcache.tasks import DEPTH, SEGMENTATION, TASKS, numeric
from kdcache.training.config import TrainConfig
from kdcache.training.input.batch import Array
from kdcache.training.input.cache_dataset import CacheDataset
from kdcache.training.input.dataset import DepthZoom, DrawnDataset, LabelledDataset
from kdcache.training.input.mix import Mix
from kdcache.training.input.subset import Part


def open_store(config: TrainConfig) -> Cache | None:
    """Open the cache that the settings of a stream name, and check the sizes of its files.

    Return None if they name no cache but a data folder. Raises: KDCacheError for a cache that cannot be opened.
    """
    if config.data.cache is None:
        return None
    cache = open_caches(config.data.cache, cache_dir=config.data.cache_dir, cache_bytes=config.data.cache_bytes)
    cache.check_files()
    return cache


def open_folder(config: TrainConfig) -> Split | None:
    """Open the data set that a stream's settings name. Return None if the stream has a cache, or no data."""
    return (
        open_split(config.data.data, config.data.split)
        if config.data.cache is None and config.data.data is not None
        else None
    )


def open_dataset(
    config: TrainConfig, cache: Cache | None, paste: str | None = None, split: Split | None = None
) -> DrawnDataset:
    """Return the samples of a stream, with the augmentation of its settings.

    Args:
        config: the stream's settings.
        cache: the stream's open cache, or None for a stream from a data folder.
        paste: how another stream's samples are pasted into this stream's, such as `classmix`. This stream then needs no
            labels. None pastes nothing.
        split: the stream's opened data set, if there is no cache. None opens the data set of `config`.
    Raises: RecipeError or DataError if no sample, or no label that a term needs, is left.
    """
    labelled_only = not (config.learns_unlabelled or paste is not None)
    if cache is None:
        dataset: DrawnDataset = _of_folder(config, split or open_folder(config), labelled_only)
    else:
        dataset = _of_store(config, cache, labelled_only)
    _check_listed(config, dataset)
    if paste is None:
        check_labels(config, dataset)
    if paste is not None or config.augmentation.mix is not None:
        dataset.dice = Mix(paste or str(config.augmentation.mix)).dice
    return dataset


def source_split(config: TrainConfig, cache: Cache) -> Split | None:
    """Return the data set that `config` names, from which images are read if `cache` does not store pixels.

    Return None if the cache stores pixels, or if `config` names no data set.
    """
    return open_split(config.data.data, config.data.split) if config.data.data and not cache.pixels_stored else None


def _zoom_of_depth(config: TrainConfig, cache: Cache) -> DepthZoom:
    """Return what a zoom does to metres ("none", "divide" or "keep"): the setting, or for replayed views the cache's.

    Raises: RecipeError if the two differ, or neither is set.
    """
    zoom = config.augmentation.depth_zoom
    drawn, depth = cache.manifest.view.drawn, cache.manifest.depth
    if (
        config.augmentation.augment != "replay"
        or drawn is None
        or drawn.scale == (1.0, 1.0)
        or not config.compares_metres
    ):
        return zoom
    built = "none" if depth is None else depth.zoom
    if built == zoom == "none":
        raise RecipeError(
            f"Missing --depth-zoom: the views of {cache.place} are zoomed {drawn.scale[0]:g} to {drawn.scale[1]:g} "
            "times, and a zoomed image looks nearer than it is",
            fix="Add --depth-zoom divide, or keep. Or use --augment warp, or build views without a zoom.",
        )
    if "none" not in (built, zoom) and built != zoom:
        raise RecipeError(
            f"Cannot use --depth-zoom {zoom} for {cache.place}: it was built with --depth-zoom {built}",
            fix=f"Use --depth-zoom {built}, or leave it out. Or build another cache.",
        )
    return zoom if built == "none" else built


def drawn_scale(config: TrainConfig) -> tuple[float, float]:
    """Return the smallest and the largest zoom to draw: the user's range, or by default 0.5 to 2.

    The default is 1 to 1 (no zoom) if a loss term compares depth in metres, and `--depth-zoom` does not say how a zoom
    changes depth.
    """
    still = config.compares_metres and config.augmentation.depth_zoom == "none"
    return config.augmentation.scale or ((1.0, 1.0) if still else Augmentation.scale)


def _part(config: TrainConfig) -> Part:
    return Part(
        samples=config.data.limit_samples,
        labels=0 if config.data.labels == "none" else config.data.limit_labels,
        labels_from=config.data.labels_from,
        without=config.left_out,
        held_out=config.data.val_share,
        views=config.data.limit_views,
    )


def _augmentation(config: TrainConfig) -> Augmentation:
    if config.augmentation.augment == "none":
        return Augmentation.off()
    return Augmentation(
        scale=drawn_scale(config),
        flip=config.augmentation.flip is not False,
        jitter=_jitter(config.augmentation.jitter),
    )


def _jitter(setting: float | str) -> float | RandAugment:
    if not isinstance(setting, str):
        return setting
    operations = rand_augment(setting)
    assert operations is not None, setting
    return RandAugment(*operations)


def _of_folder(config: TrainConfig, split: Split | None, labelled_only: bool) -> LabelledDataset:
    assert split is not None
    if config.data.size is None:
        raise RecipeError(
            "Missing --size: training from a data folder needs the size of its pixels",
            fix="Add --size HxW, for example --size 288x384",
        )
    if config.left_out is not None:
        check_folds(split, *config.left_out[1:])
    check_tasks(config, split.tasks)
    dataset = LabelledDataset(
        split,
        config.data.size,
        _augmentation(config),
        part=_part(config),
        tasks=config.label_tasks,
        depth_zoom=config.augmentation.depth_zoom,
        labelled_only=labelled_only,
        fit="squash" if config.data.fit == "auto" else config.data.fit,
    )
    if len(dataset) == 0:
        raise DataError(
            f"No labelled images in {split.data}, split {split.split!r}: none of {len(split)} images has a "
            f"label{_used(config)}",
            fix=_LABELLED_SPLIT if config.data.labels == "all" else _OTHER_LABELS,
        )
    return dataset


_LABELLED_SPLIT = "give a labelled split with --split, or put the labels where the docs page Data layouts says"
_OTHER_LABELS = "leave --labels out, or use a --method that learns without labels"


def _used(config: TrainConfig) -> str:
    """Return the words that follow "a label" in a message, if only some labels are used."""
    return "" if config.data.labels == "all" else f" that --labels {config.data.labels} leaves to it"


def _of_store(config: TrainConfig, cache: Cache, labelled_only: bool) -> CacheDataset:
    split = source_split(config, cache)
    check_tasks(config, _stored_tasks(cache) if split is None else split.tasks)
    dataset = CacheDataset(
        Records(cache, split),
        augment=config.augmentation.augment,
        size=config.data.size,
        targets=config.target_heads,
        augmentation=_augmentation(config),
        part=_part(config),
        labelled_only=labelled_only or config.loss.distill_on == "labelled",
        tasks=config.label_tasks,
        depth_zoom=_zoom_of_depth(config, cache),
    )
    if len(dataset) == 0:
        raise DataError(
            f"No labelled samples in {cache.place}: none of {cache.manifest.dataset.samples} samples has a label"
            + _used(config),
            fix=_OTHER_LABELS
            if config.data.labels != "all" and config.loss.teacher == "store"
            else "Use --method kl with --distill-on all, which learns from targets only."
            if config.loss.teacher == "store"
            else "Leave --teacher labels out: the cache's targets need no labels.",
        )
    if config.left_out is not None:
        _, folds, by = config.left_out
        if split is None:
            check_fold_labels(_labels_of_folds(cache, folds, by), folds, dataset.classes.names)
        else:
            check_folds(split, folds, by)
    return dataset


def _stored_tasks(cache: Cache) -> tuple[str, ...]:
    """Return the tasks with labels in a cache with pixels."""
    classes = (SEGMENTATION,) if cache.manifest.dataset.class_names else ()
    return (*classes, *(task for task in numeric(TASKS) if f"labels/{task}" in cache.specs))


def _labels_of_folds(cache: Cache, folds: int, by: str | None) -> Iterator[Iterator[tuple[int, Array]]]:
    """Yield pairs of fold and label for the labels in a cache, in two rounds.

    The first round has the first view of each sample. It is whole, so it has all classes except pixels lost in
    resizing. The second round has the other views. A cache of crops gives all views in the first round, because each
    crop shows a random part.
    """
    fold_of = folds_of(cache.ids, folds, by).tolist()
    labelled, view = cache.labelled[SEGMENTATION], cache.manifest.view

    def labels(views: Sequence[int]) -> Iterator[tuple[int, Array]]:
        used = np.flatnonzero(labelled).tolist()
        numbers = [(number, cache.manifest.record(number, v)) for number in used for v in views]
        path = "labels/segmentation"
        rows = prefetch(lambda item: cache.read(item[1], [path])[path], numbers, threads=2, ahead=8)
        return zip((fold_of[number] for number, _ in numbers), rows, strict=True)

    views = range(view.views_per_sample)
    first = len(views) if view.kind == "crop" else 1
    yield labels(views[:first])
    if views[first:]:
        yield labels(views[first:])


def check_labels(config: TrainConfig, dataset: DrawnDataset) -> None:
    """Raise RecipeError if a loss term needs labels, and no sample has a label that is used."""
    terms = [term.kind for term in config.terms if term.needs_labels]
    if terms and not dataset.labelled:
        raise RecipeError(
            f"Cannot learn {', '.join(terms)}: no sample has a label that is used (--labels {config.data.labels})",
            fix="Leave them out, or give labels.",
        )


def _check_listed(config: TrainConfig, dataset: DrawnDataset) -> None:
    """Check that all ids of `--labels-from` have labels, and that other samples are left. Raises: RecipeError."""
    path = config.data.labels_from
    if path is None:
        return
    ids = dataset.source_ids
    selection = _part(config).choose(ids)
    if bare := sorted(set(selection.labelled) - set(dataset.labelled)):
        raise RecipeError(
            f"--labels-from {path} lists more labels than there are: {len(bare)} of its {len(selection.labelled)} ids "
            f"have none, such as {ids[bare[0]]!r}",
            fix="Take these ids out of the list, or put their labels where the docs page Data layouts says.",
        )
    if config.reads_targets and len(selection.labelled) == len(selection.samples):
        raise all_listed(path, len(selection.samples))


_EXAMPLES = {DEPTH: ", for instance --data scenes:96x128,depth=exact"}
"""Where to find labels of a task that few data sets have."""


def check_tasks(config: TrainConfig, offered: Sequence[str]) -> None:
    """Raise RecipeError if a loss term needs labels of a task that the data source does not have.

    The setting `labels` may also name such a task, which is the same error. `offered` are the tasks for which the data
    source has labels.
    """
    named = () if config.data.labels in ("all", "none") else config.data.labels.split("+")
    terms = [term for term in config.terms if term.needs_labels]
    for task in TASKS:
        kinds = [term.kind for term in terms if term.task == task]
        if task in offered or not (kinds or task in named):
            continue
        asked = [f"--labels {config.data.labels}"] if task in named else []
        example = _EXAMPLES.get(task, "")
        raise RecipeError(
            f"Cannot learn {', '.join([*asked, *kinds])}: the data have labels of {', '.join(offered) or 'no task'}, "
            f"and not of {task}",
            fix=f"Give a data set with labels of {task}, or a cache that was built from one, as the source{example}. "
            f"Or leave {task} out.",
        )
