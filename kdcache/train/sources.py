"""The data of a training: a store or a data folder to draw from, and a split to validate on."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kdcache.data import (
    IGNORE_INDEX,
    Augmentation,
    ClassList,
    RandAugment,
    Split,
    check_fold_labels,
    check_folds,
    fold_alone,
    folds_of,
    open_split,
    prefetch,
    shared_sequences,
)
from kdcache.distill.terms.spec import of_depth, reads_logits, reads_teacher
from kdcache.errors import DataError, KDCacheError, MismatchError, RecipeError
from kdcache.heads import DEPTH, SEGMENTATION
from kdcache.models import read_class_map
from kdcache.models.class_map import DROPPED
from kdcache.settings.spelling import rand_augment
from kdcache.store import Cache, Records, open_cache
from kdcache.train.config import TrainConfig, check_replays
from kdcache.train.input.batch import Array
from kdcache.train.input.cache_dataset import CacheDataset, choose_augment
from kdcache.train.input.dataset import DepthZoom, DrawnDataset, LabelledDataset
from kdcache.train.input.mix import Mix
from kdcache.train.input.subset import Part
from kdcache.train.run.monitor import check_logits
from kdcache.train.streams import Stream, in_stream


@dataclass
class Source:
    """The data of a stream.

    Attributes:
        stream: name, weight and class map.
        given: the stream's settings, with `augment` resolved; `flip` is as the user gave it.
        config: the same with `flip` resolved, and whatever else depends on the data.
        rows: its rows of every batch.
    """

    stream: Stream[TrainConfig]
    given: TrainConfig
    config: TrainConfig
    cache: Cache | None
    dataset: DrawnDataset
    rows: int

    @contextmanager
    def named(self) -> Iterator[None]:
        """Errors inside name the stream."""
        with _named(self.stream.name):
            yield

    def note(self, note: Callable[[str], None]) -> Callable[[str], None]:
        """A receiver of notes that names the stream."""
        name = self.stream.name
        return (lambda text: note(f"stream {name}: {text}")) if name else note


def open_sources(config: TrainConfig, parts: int) -> list[Source]:
    """Open and check the data of every stream.

    Args:
        parts: number of processes times parts that share every batch.
    Raises: KDCacheError of every kind, with the name of the stream.
    """
    rows = config.rows(parts) if config.stream else [config.batch_size]
    opened = []
    for stream in config.streams:
        with _named(stream.name):
            opened.append((stream, open_store(stream.config)))
    size = _shared_size(config, [cache for _, cache in opened]) if config.stream else config.size
    sources = []
    for (stream, cache), count in zip(opened, rows, strict=True):
        with _named(stream.name):
            augment = choose_augment(stream.config.augment, cache)
            given = stream.config.model_copy(
                update={"augment": augment, "size": size, "scale": _drawn_scale(stream.config)}
            )
            check_replays(given)
            if cache is not None and given.reads_targets:
                check_logits(cache, needed=given.reads_logits)
            own = given.model_copy(update={"flip": given.flip is not False})
            sources.append(Source(stream, given, own, cache, open_dataset(own, cache), count))
    _check_both_learn(config, sources)
    return sources


def share_classes(sources: Sequence[Source], val: ClassList | None = None) -> ClassList:
    """Let every stream draw labels of the same classes, by its class map where it has one; returns the classes.

    They are those of the streams without a class map; where all that have classes have one, those of the validation
    data. A stream of data without classes, such as KITTI's depth, takes them as they are.
    Raises: MismatchError for streams of other classes, or a class map where targets are of its own classes;
        ModelError for a class map that is malformed.
    """
    first = _class_source(sources)
    classes = val if first is None else first.dataset.classes
    if classes is None:
        raise MismatchError(
            "the classes of a training are those of a stream without a class map, or of its validation data",
            received="a class map for every stream that has classes, and no --val",
            remedy="add --val DATA, whose classes those maps name",
        )
    for source in sources:
        names = source.dataset.own_classes.names
        if source.stream.class_map is not None:
            with source.named():
                _map_classes(source, classes)
        elif not names:
            source.dataset.mapped = classes, _void_but([])
        elif first is not None and names != classes.names:
            raise MismatchError(
                "all streams have the same classes in the same order",
                received=f"{', '.join(names)} in the stream {source.stream.name} against {', '.join(classes.names)} in "
                f"{first.stream.name}",
                remedy="give the one with other classes a class-map: a file with a line `<its id> <class>` for each",
            )
    return classes


def _class_source(sources: Sequence[Source]) -> Source | None:
    """The stream whose classes are those of all; None where they are the validation data's."""
    own = [source for source in sources if source.stream.class_map is None]
    named = [source for source in own if source.dataset.own_classes.names]
    return named[0] if named else own[0] if len(own) == len(sources) else None


def _void_but(classes: Sequence[int]) -> Array:
    """The ids (256,) uint8 that the first ids of a label become; all others are void."""
    lookup = np.full(256, IGNORE_INDEX, np.uint8)
    lookup[: len(classes)] = classes
    return lookup


def _map_classes(source: Source, classes: ClassList) -> None:
    """Let the labels of a stream become classes of the training. Raises: MismatchError, ModelError."""
    path, own = source.stream.class_map, source.dataset.own_classes.names
    assert path is not None
    taught = SEGMENTATION in source.dataset.heads
    if taught:
        _check_mapped_targets(source, path)
    # A class that no target can have would be taught to be nowhere.
    table = read_class_map(path, len(own), classes.names, all_hit=taught)
    lookup = _void_but([IGNORE_INDEX if target == DROPPED else target for target in table.tolist()])
    source.dataset.mapped = classes, lookup


def _check_mapped_targets(source: Source, path: Path) -> None:
    """Refuse to map targets that cannot be. Raises: MismatchError."""
    assert source.cache is not None
    head, config = source.cache.head, source.config
    raw = [term.kind for term in config.terms if term.kind == "cwd" and reads_logits(term)]
    lacks = [f"the {head.k} largest of {head.classes} classes in {source.cache.place}"] if not head.dense else []
    lacks += [f"{kind}, which reads raw logits" for kind in raw]
    lacks += [f"--class-trust {config.class_trust}, of the store's classes"] if config.class_trust else []
    if lacks:
        raise MismatchError(
            "a class map sums the probabilities of a store's classes: its targets have all of them",
            received=f"class-map {path} with {', '.join(lacks)}",
            remedy="build the store for the training's classes (build-teacher-cache --class-map), or "
            + (f"with --top-k {head.classes}" if not head.dense else "leave that out"),
        )


def _shared_size(config: TrainConfig, caches: Sequence[Cache | None]) -> tuple[int, int] | None:
    """(H, W) of the pixels of all streams: as it is given, or that of the stores' views.

    Raises: RecipeError for views of several sizes.
    """
    sizes = dict.fromkeys(cache.view_size for cache in caches if cache is not None)
    if config.size is None and len(sizes) > 1:
        texts = [f"{height}x{width}" for height, width in sizes]
        raise RecipeError(
            "all streams have pixels of one size",
            received=f"stores with views of {' and '.join(texts)}, and no --size",
            remedy=f"add --size {texts[0]}",
        )
    return config.size or next(iter(sizes), None)


@contextmanager
def _named(name: str) -> Iterator[None]:
    try:
        yield
    except KDCacheError as error:
        if not name:
            raise
        raise in_stream(name, error) from error


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
    _check_labels(config, dataset)
    if config.mix is not None:
        dataset.dice = Mix(config.mix).dice
    return dataset


def open_validation(config: TrainConfig) -> Split | None:
    """Open the split that a training is validated on, or its fold `--val-fold`; None without `--val`."""
    if config.val is None:
        return None
    split = open_split(config.val, config.val_split)
    return split if config.validated_fold is None else fold_alone(split, *config.validated_fold)


def check_validation(config: TrainConfig, classes: ClassList, split: Split) -> None:
    """Raises: MismatchError when the classes of the validation data are not those of the training."""
    if split.classes.names != classes.names:
        raise MismatchError(
            "training and validation have the same classes in the same order",
            received=f"{', '.join(split.classes.names)} in {config.val} against {', '.join(classes.names)}",
            remedy="give the validation data of the same class list",
        )


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


def _check_labels(config: TrainConfig, dataset: DrawnDataset) -> None:
    """Refuse terms on labels that nothing is labelled for. Raises: RecipeError."""
    terms = [term.kind for term in config.terms if not reads_teacher(term) and term.weight != 0]
    if terms and not dataset.labelled:
        raise RecipeError(
            "terms on labels take labelled samples",
            received=f"{', '.join(terms)}, and no sample with a label that is used (--labels {config.labels})",
            remedy="leave them out, or give labels",
        )


def _check_tasks(config: TrainConfig, offered: Sequence[str]) -> None:
    """Refuse terms on labels of a task that is none of `offered`, which the source labels. Raises: RecipeError."""
    named = () if config.labels in ("all", "none") else config.labels.split("+")
    terms = [term for term in config.terms if not reads_teacher(term) and term.weight != 0]
    for task in (SEGMENTATION, DEPTH):
        kinds = [term.kind for term in terms if of_depth(term) == (task == DEPTH)]
        if task in offered or not (kinds or task in named):
            continue
        asked = [f"--labels {config.labels}"] if task in named else []
        example = ", for instance --data scenes:96x128,depth=exact" if task == DEPTH else ""
        raise RecipeError(
            f"terms of {task} on labels take a data set with labels of {task}, or a store that was built from one",
            received=f"{', '.join([*asked, *kinds])} for data with labels of {', '.join(offered) or 'no task'}",
            remedy=f"give such a data set as the source{example}; or leave {task} out",
        )


def _check_both_learn(config: TrainConfig, sources: Sequence[Source]) -> None:
    """Refuse a balance of two tasks where segmentation has neither labels nor targets. Raises: RecipeError."""
    if len(config.tasks) > 1 and not any(map(_shows_classes, sources)):
        raise RecipeError(
            "each of two tasks learns from labels, or from a teacher's targets",
            received=f"--ce-weight {config.ce_weight:g} and labels of depth alone",
            remedy="add --ce-weight 0, so that depth alone is learnt; or give data with labels of segmentation",
        )


def _shows_classes(source: Source) -> bool:
    """Whether a stream has labels of segmentation that are used, or targets of it."""
    config, cache, split = source.config, source.cache, source.dataset.split
    if source.stream.weight == 0 or config.reads_logits:
        return source.stream.weight > 0
    if SEGMENTATION not in config.label_tasks or config.labels == "none":
        return False
    return SEGMENTATION in split.tasks if split is not None else cache is not None and bool(cache.has_label.any())


def _zoom_of_depth(config: TrainConfig, cache: Cache) -> DepthZoom:
    """What a zoom does to metres: as the training says, or where it replays zoomed views, as the store was built.

    Raises: RecipeError where both say something else, or neither says anything.
    """
    drawn, depth = cache.manifest.view.drawn, cache.manifest.depth
    if config.augment != "replay" or drawn is None or drawn.scale == (1.0, 1.0) or not config.compares_metres:
        return config.depth_zoom
    built = "none" if depth is None else depth.zoom
    if built == config.depth_zoom == "none":
        raise RecipeError(
            "a zoomed image looks nearer than it is: replayed views with a zoom want a rule for metric depth",
            received=f"{cache.place}, whose views are zoomed {drawn.scale[0]:g} to {drawn.scale[1]:g} times, and no "
            "--depth-zoom",
            remedy="add --depth-zoom divide, or keep; or use --augment warp; or build views without a zoom",
        )
    if "none" not in (built, config.depth_zoom) and built != config.depth_zoom:
        raise RecipeError(
            "replayed views have the depth that their store was built with",
            received=f"--depth-zoom {config.depth_zoom} for {cache.place}, built with --depth-zoom {built}",
            remedy=f"use --depth-zoom {built}, or leave it out; or build another store",
        )
    return config.depth_zoom if built == "none" else built


def _drawn_scale(config: TrainConfig) -> tuple[float, float]:
    """The zoom that is drawn: none where metric depth is to keep its meaning."""
    return (1.0, 1.0) if config.compares_metres and config.depth_zoom == "none" else config.scale


def _part(config: TrainConfig) -> Part:
    return Part(
        samples=config.limit_samples,
        labels=0 if config.labels == "none" else config.limit_labels,
        without=config.left_out,
        views=config.limit_views,
    )


def _augmentation(config: TrainConfig) -> Augmentation:
    if config.augment == "none":
        return Augmentation.off()
    return Augmentation(scale=config.scale, flip=config.flip is not False, jitter=_jitter(config.jitter))


def _jitter(setting: float | str) -> float | RandAugment:
    if not isinstance(setting, str):
        return setting
    operations = rand_augment(setting)
    assert operations is not None, setting
    return RandAugment(*operations)


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
    _check_tasks(config, split.tasks)
    dataset = LabelledDataset(
        split,
        config.size,
        _augmentation(config),
        part=_part(config),
        tasks=config.label_tasks,
        depth_zoom=config.depth_zoom,
    )
    if len(dataset) == 0:
        raise DataError(
            "training needs labelled images",
            received=f"{config.data}, split {config.split!r}: none of {len(split)} images has a label",
            remedy="give a labelled split with --split",
        )
    return dataset


def _of_store(config: TrainConfig, cache: Cache) -> CacheDataset:
    split = source_split(config, cache)
    _check_tasks(config, _stored_tasks(cache) if split is None else split.tasks)
    dataset = CacheDataset(
        Records(cache, split),
        augment=config.augment,
        size=config.size,
        targets=config.target_heads,
        augmentation=_augmentation(config),
        part=_part(config),
        labelled_only=not config.reads_targets or config.distill_on == "labelled",
        tasks=config.label_tasks,
        depth_zoom=_zoom_of_depth(config, cache),
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


def _stored_tasks(cache: Cache) -> tuple[str, ...]:
    """The tasks of which a store with pixels keeps labels."""
    classes = (SEGMENTATION,) if cache.manifest.dataset.class_names else ()
    return (*classes, DEPTH) if "labels/depth" in cache.specs else classes


def _labels_of_folds(cache: Cache, folds: int, by: str | None) -> Iterator[Iterator[tuple[int, Array]]]:
    """The labels that a store keeps, with the fold of each.

    A first view that is whole has all of its sample's labels but for pixels that its size loses: drawn views, which may
    show them, come in a second round. A store of crops gives all views at once: what the first ones miss is chance.
    """
    fold_of = folds_of(cache.ids, folds, by).tolist()
    labelled, view = cache.has_label, cache.manifest.view

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
