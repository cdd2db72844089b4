"""Classes that the streams of a training share."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from kdcache.data import IGNORE_INDEX, ClassList
from kdcache.errors import MismatchError
from kdcache.models import read_class_map
from kdcache.models.class_map import DROPPED
from kdcache.tasks import SEGMENTATION
from kdcache.training.input.batch import Array
from kdcache.training.sources.source import Source


def share_classes(sources: Sequence[Source], val: ClassList | None = None) -> ClassList:
    """Give all streams the same classes, and return these classes. Streams with a class map are mapped to them.

    They are the classes of the streams without a class map. If every stream has a class map, they are the classes of
    the validation data. A stream that reads no segmentation labels takes the shared classes.

    Args:
        sources: the data of each stream.
        val: the classes of the validation data, or None.
    Raises: MismatchError for streams with different classes, for targets that a class map cannot convert, or if all
        streams have class maps and `val` is None. ModelError for an invalid class map.
    """
    first = _class_source(sources)
    classes = val if first is None else first.dataset.classes
    if classes is None:
        raise MismatchError(
            "Unknown classes of the training: every stream that has classes has a class map, and there is no --val",
            fix="Add --val DATA, whose classes those maps name.",
        )
    for source in sources:
        names = _names_read(source)
        if source.stream.class_map is not None:
            with source.named():
                _map_classes(source, classes)
        elif not names:
            source.dataset.mapped = classes, _void_but([])
        elif first is not None and names != classes.names:
            raise MismatchError(
                f"The streams have different classes: {', '.join(names)} in {source.stream.name} against "
                f"{', '.join(classes.names)} in {first.stream.name}",
                fix="Give the one with other classes a class-map: a file with a line `<its id> <class>` for each.",
            )
    return classes


def _class_source(sources: Sequence[Source]) -> Source | None:
    """Return the stream whose classes all streams get, or None for the validation data's classes."""
    unmapped = [source for source in sources if source.stream.class_map is None]
    named = [source for source in unmapped if _names_read(source)]
    return named[0] if named else unmapped[0] if len(unmapped) == len(sources) else None


def _names_read(source: Source) -> tuple[str, ...]:
    """Return the class names of the labels or targets that a stream uses."""
    used = SEGMENTATION in source.config.label_tasks and source.config.data.labels != "none"
    return source.dataset.own_classes.names if used or SEGMENTATION in source.dataset.heads else ()


def _void_but(classes: Sequence[int]) -> Array:
    """Return a lookup table (256,) uint8: id n becomes `classes[n]`, and all other ids become void."""
    lookup = np.full(256, IGNORE_INDEX, np.uint8)
    lookup[: len(classes)] = classes
    return lookup


def _map_classes(source: Source, classes: ClassList) -> None:
    """Map the labels of a stream to the training's classes. Raises: MismatchError, ModelError."""
    path, names = source.stream.class_map, source.dataset.own_classes.names
    assert path is not None
    taught = SEGMENTATION in source.dataset.heads
    if taught:
        _check_mapped_targets(source, path)
    # A class that no target can have would be taught to be nowhere.
    table = read_class_map(path, len(names), classes.names, all_hit=taught)
    if not taught and source.learns_classes_from_labels and (table == DROPPED).all():
        raise MismatchError(
            f"class-map {path} makes void of all {len(names)} classes",
            fix="Map one of them at least. Or leave them out by labels=none, with a --method that reads no labels.",
        )
    lookup = _void_but([IGNORE_INDEX if target == DROPPED else target for target in table.tolist()])
    source.dataset.mapped = classes, lookup


def _check_mapped_targets(source: Source, path: Path) -> None:
    """Raise MismatchError if the stream has targets that a class map cannot convert."""
    assert source.cache is not None
    head, config = source.cache.head, source.config
    raw = [term.kind for term in config.terms if term.raw_logits and term.reads_logits]
    lacks = [f"the {head.k} largest of {head.classes} classes in {source.cache.place}"] if not head.dense else []
    lacks += [f"{kind}, which reads raw logits" for kind in raw]
    lacks += [f"--class-trust {config.loss.class_trust}, of the cache's classes"] if config.loss.class_trust else []
    if lacks:
        raise MismatchError(
            f"Cannot use class-map {path} with {', '.join(lacks)}: it sums the probabilities of all classes",
            fix="Build the cache for the training's classes (build-teacher-cache --class-map), or "
            + (f"with --top-k {head.classes}" if not head.dense else "leave that out"),
        )
