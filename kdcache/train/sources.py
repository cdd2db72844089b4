"""The data of a training: a store or a data folder to draw from, and a split to validate on."""

import itertools
from collections.abc import Iterator, Sequence

from kdcache.data import (
    Augmentation,
    ClassList,
    Split,
    check_fold_labels,
    check_folds,
    fold_alone,
    folds_of,
    open_split,
    prefetch,
    shared_sequences,
)
from kdcache.errors import DataError, MismatchError, RecipeError
from kdcache.store import Cache, Records, open_cache
from kdcache.train.config import TrainConfig
from kdcache.train.input.batch import Array
from kdcache.train.input.cache_dataset import CacheDataset
from kdcache.train.input.dataset import DrawnDataset, LabelledDataset
from kdcache.train.input.mix import Mix
from kdcache.train.input.subset import Part


def open_store(config: TrainConfig) -> Cache | None:
    """Open the store of a training and check its files; None when it draws from a data folder."""
    if config.cache is None:
        return None
    cache = open_cache(config.cache, cache_dir=config.cache_dir, cache_bytes=config.cache_bytes)
    cache.check_files()
    return cache


def open_dataset(config: TrainConfig, cache: Cache | None) -> DrawnDataset:
    """Open the samples of a training."""
    dataset = _of_folder(config) if cache is None else _of_store(config, cache)
    if config.mix is not None:
        dataset.dice = Mix(config.mix).dice
    return dataset


def open_validation(config: TrainConfig, classes: ClassList) -> Split | None:
    """Open the split that a training is validated on, or its fold `--val-fold`; None without `--val`.

    Raises: MismatchError when its classes are not those of the training.
    """
    if config.val is None:
        return None
    split = open_split(config.val, config.val_split)
    if split.classes.names != classes.names:
        raise MismatchError(
            "training and validation have the same classes in the same order",
            received=f"{', '.join(split.classes.names)} in {config.val} against {', '.join(classes.names)}",
            remedy="give the validation data of the same class list",
        )
    return split if config.validated_fold is None else fold_alone(split, *config.validated_fold)


def shared_with_judge(config: TrainConfig, dataset: DrawnDataset, val: Split | None) -> str | None:
    """A warning that names the sequences of which the training sees some samples and is judged on others, or None.

    The judge is the validation data, and the fold that is left out. `shared_sequences` has the rule for ids without
    `--folds-by`.
    """
    source = dataset.cache or dataset.split
    assert source is not None
    judges, judged = [], list[str]()
    if val is not None:
        judges.append("validation")
        judged += val.ids
    if config.left_out is not None:
        judges.append(f"fold {config.fold}")
        judged += itertools.compress(source.ids, config.left_out.holds(source.ids))
    shared = shared_sequences(source.ids, dataset.indices, list(dict.fromkeys(judged)), config.folds_by)
    if not shared:
        return None
    some = [f"{name} ({count} judged, {trained} trained on)" for name, count, trained in shared[:5]]
    more = f" and {len(shared) - len(some)} more" if len(shared) > len(some) else ""
    return (
        f"training and what judges it ({' and '.join(judges)}) share sequences: {', '.join(some)}{more}. Frames of one "
        "video are alike, so the score says little about other videos. Remedy: judge on other sequences, which "
        "--folds-by PATTERN (for instance '^(.+)_') keeps whole in a fold"
    )


def source_split(config: TrainConfig, cache: Cache) -> Split | None:
    """The data set of a store that keeps no pixels."""
    return open_split(config.data, config.split) if config.data and not cache.pixels_stored else None


def _part(config: TrainConfig) -> Part:
    return Part(
        samples=config.limit_samples,
        labels=config.limit_labels,
        without=config.left_out,
        views=config.limit_views,
    )


def _augmentation(config: TrainConfig) -> Augmentation:
    if config.augment == "none":
        return Augmentation.off()
    return Augmentation(scale=config.scale, flip=config.flip is not False, jitter=config.jitter)


def _of_folder(config: TrainConfig) -> LabelledDataset:
    assert config.data is not None
    split = open_split(config.data, config.split)
    if config.size is None:
        raise RecipeError(
            "training from a data folder needs the size of its pixels",
            received="no --size",
            remedy="add --size HxW, for instance --size 288x384",
        )
    if config.left_out is not None:
        check_folds(split, *config.left_out[1:])
    dataset = LabelledDataset(split, config.size, _augmentation(config), part=_part(config))
    if len(dataset) == 0:
        raise DataError(
            "training needs labelled images",
            received=f"{config.data}, split {config.split!r}: none of {len(split)} images has a label",
            remedy="give a labelled split with --split",
        )
    return dataset


def _of_store(config: TrainConfig, cache: Cache) -> CacheDataset:
    split = source_split(config, cache)
    dataset = CacheDataset(
        Records(cache, split),
        augment=config.augment,
        size=config.size,
        targets=config.reads_targets,
        augmentation=_augmentation(config),
        part=_part(config),
        labelled_only=not config.reads_targets or config.distill_on == "labelled",
    )
    if len(dataset) == 0:
        raise DataError(
            "training on labels needs labelled samples",
            received=f"{config.cache}: none of {cache.manifest.dataset.samples} samples has a label",
            remedy="use --method kl with --distill-on all, which learns from targets alone"
            if config.teacher == "store"
            else "leave --teacher labels out: the store's targets need no labels",
        )
    if config.left_out is not None:
        _, folds, by = config.left_out
        if split is None:
            check_fold_labels(_labels_of_folds(cache, folds, by), folds, dataset.classes.names)
        else:
            check_folds(split, folds, by)
    return dataset


def _labels_of_folds(cache: Cache, folds: int, by: str | None) -> Iterator[Iterator[tuple[int, Array]]]:
    """The labels that a store keeps, with the fold of each.

    A first view that is whole has all of its sample's labels but for pixels that its size loses: drawn views, which may
    show them, come in a second round. A store of crops gives all views at once: what the first ones miss is chance.
    """
    fold_of = folds_of(cache.ids, folds, by).tolist()
    labelled, view = cache.column("labelled"), cache.manifest.view

    def labels(views: Sequence[int]) -> Iterator[tuple[int, Array]]:
        numbers = [(number, cache.manifest.record(number, v)) for number in range(len(fold_of)) for v in views]
        numbers = [(number, record) for number, record in numbers if labelled[record]]
        path = "labels/segmentation"
        rows = prefetch(lambda item: cache.read(item[1], [path])[path], numbers, threads=2, ahead=8)
        return zip((fold_of[number] for number, _ in numbers), rows, strict=True)

    views = range(view.views_per_sample)
    first = len(views) if view.kind == "crop" else 1
    yield labels(views[:first])
    if views[first:]:
        yield labels(views[first:])
