"""The data of every stream of a training: a cache or a data folder to draw from."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from kdcache.data import Fit, Split, choose_fit
from kdcache.data.rendering.fit import MOST_SQUASHED, squashed
from kdcache.distill.terms.depth import stored_head
from kdcache.errors import KDCacheError, RecipeError
from kdcache.store import Cache
from kdcache.tasks import SEGMENTATION, TASKS
from kdcache.training.checks import check_replays, check_whole_views
from kdcache.training.config import TrainConfig
from kdcache.training.input.cache_dataset import choose_augment
from kdcache.training.input.dataset import DrawnDataset
from kdcache.training.run.monitor import check_logits
from kdcache.training.sources.fresh import check_same_data
from kdcache.training.sources.samples import drawn_scale, open_dataset, open_folder, open_store
from kdcache.training.streams import Stream, in_stream


@dataclass
class Source:
    """The opened data of a stream: its cache or data set, its samples and its settings.

    Attributes:
        stream: name, weight and class map.
        given: the stream's settings with size, fit, zoom and kind of augmentation filled in, but `flip` as the user
            gave it.
        config: the same settings, with `flip` and all other settings that depend on the data filled in.
        cache: the open cache, or None for a data folder.
        dataset: the samples.
        rows: the number of the stream's samples in every batch.
        pasted: the data of another stream, whose samples are pasted into this stream's. None pastes nothing.
    """

    stream: Stream[TrainConfig]
    given: TrainConfig
    config: TrainConfig
    cache: Cache | None
    dataset: DrawnDataset
    rows: int
    pasted: "Source | None" = None

    @contextmanager
    def named(self) -> Iterator[None]:
        """Add the stream's name to the errors of a with block."""
        with _named(self.stream.name):
            yield

    @property
    def learns_classes_from_labels(self) -> bool:
        """True if the stream learns segmentation from labels, and has at least one label."""
        config = self.config
        on_labels = config.loss.ce_weight > 0 or any(term.reads_labels and not term.numeric for term in config.terms)
        used = self.stream.weight > 0 and SEGMENTATION in config.label_tasks and config.data.labels != "none"
        return on_labels and used and bool(self.dataset.labelled)

    def note(self, note: Callable[[str], None]) -> Callable[[str], None]:
        """Return a function that calls `note` with the stream's name before the text."""
        lead = f"stream {self.stream.name}: " if self.stream.name else ""

        def named(text: str) -> None:
            warned = "warning: " if text.startswith("warning: ") else ""
            note(f"{warned}{lead}{text.removeprefix(warned)}")

        return named


def open_sources(config: TrainConfig, parts: int, note: Callable[[str], None]) -> list[Source]:
    """Open and check the data of every stream. Return a `Source` for each, in the order of `config.streams`.

    Args:
        config: the training's settings.
        parts: the number of processes times accumulated parts, which divide every batch.
        note: is called with notes for the user.
    Raises: KDCacheError for data that cannot be read or do not suit the settings. It names the stream at fault.
    """
    rows = config.rows(parts) if config.data.stream else [config.optimizer.batch_size]
    opened = []
    for stream in config.streams:
        with _named(stream.name):
            opened.append((stream, open_store(stream.config), open_folder(stream.config)))
            if (cache := opened[-1][1]) is not None:
                check_same_data(stream.config.changed(val=config.data.val), cache, note)
    size = _shared_size(config, [cache for _, cache, _ in opened]) if config.data.stream else config.data.size
    fit = shared_fit(config, opened, size, note)
    sources = []
    for (stream, cache, split), count in zip(opened, rows, strict=True):
        with _named(stream.name):
            augment = choose_augment(stream.config.augmentation.augment, cache)
            given = stream.config.changed(augment=augment, size=size, fit=fit, scale=drawn_scale(stream.config))
            check_replays(given)
            check_whole_views(given)
            if cache is not None and given.reads_targets:
                check_logits(cache, needed=given.reads_logits)
            settings = given.changed(flip=given.augmentation.flip is not False)
            dataset = open_dataset(settings, cache, stream.paste, split)
            sources.append(Source(stream, given, settings, cache, dataset, count))
    _check_both_learn(config, sources)
    by_name = {source.stream.name: source for source in sources}
    for source in sources:
        if source.stream.paste_from is not None:
            source.pasted = by_name[source.stream.paste_from]
    return sources


def _shared_size(config: TrainConfig, caches: Sequence[Cache | None]) -> tuple[int, int] | None:
    """Return (H, W) of the pixels of all streams: the given size, or the size of the caches' views.

    Raises: RecipeError if the caches have views of different sizes and no size is given.
    """
    sizes = dict.fromkeys(cache.view_size for cache in caches if cache is not None)
    if config.data.size is None and len(sizes) > 1:
        texts = [f"{height}x{width}" for height, width in sizes]
        raise RecipeError(
            f"Missing --size: the caches have views of {' and '.join(texts)}", fix=f"Add --size {texts[0]}"
        )
    return config.data.size or next(iter(sizes), None)


@contextmanager
def _named(name: str) -> Iterator[None]:
    try:
        yield
    except KDCacheError as error:
        if not name:
            raise
        raise in_stream(name, error) from error


def _check_both_learn(config: TrainConfig, sources: Sequence[Source]) -> None:
    """Raise RecipeError if two tasks are balanced, but no stream has labels or targets of segmentation."""
    if len(config.tasks) > 1 and not any(map(_shows_classes, sources)):
        raise RecipeError(
            f"Cannot use --ce-weight {config.loss.ce_weight:g} with labels of depth alone",
            fix="Add --ce-weight 0, so that depth alone is learnt, or give data with labels of segmentation.",
        )


def _shows_classes(source: Source) -> bool:
    """Return True if a stream has segmentation labels or targets, or features, that the training uses."""
    config, cache, split = source.config, source.cache, source.dataset.split
    if source.stream.weight == 0 or config.reads_logits or any(term.reads_taps for term in config.terms):
        return source.stream.weight > 0
    if SEGMENTATION not in config.label_tasks or config.data.labels == "none":
        return False
    return (
        SEGMENTATION in split.tasks
        if split is not None
        else cache is not None and bool(cache.labelled[SEGMENTATION].any())
    )


def taught_tasks(sources: Sequence[Source]) -> tuple[str, ...]:
    """Return the tasks, `segmentation` or `depth`, that at least one stream of weight above 0 learns.

    A stream learns the tasks of its loss terms of weight above 0. Terms on features do not count. Terms on labels count
    only if the stream, or the samples pasted into it, have labels.
    """
    learnt = {
        term.task
        for source in sources
        if source.stream.weight > 0
        for term in source.config.active
        if not term.reads_taps and (not term.reads_labels or source.dataset.labelled or source.pasted is not None)
    }
    return tuple(task for task in TASKS if task in learnt)


def shared_fit(
    config: TrainConfig,
    opened: Sequence[tuple[Stream[TrainConfig], Cache | None, Split | None]],
    size: tuple[int, int] | None,
    note: Callable[[str], None],
) -> Fit:
    """Return how images of another shape are fitted into the views: `squash`, `pad` or `crop`.

    If there is a cache, it is the fit that its views were built with. Otherwise it is the setting `fit`. If this is
    `auto`, it is `pad` for images whose aspect ratio differs from `size`, and else `squash`.

    Args:
        config: the training's settings.
        opened: every stream with its cache or its data set.
        size: (H, W) of the pixels. None is the size of the caches' views.
        note: is called with the reason if images are padded by default.
    Raises: RecipeError if caches and setting differ, or if padded or cropped views have another aspect ratio than
        `size`.
    """
    stores = {cache.manifest.view.fit: cache for _, cache, _ in opened if cache is not None}
    if not stores and config.data.fit != "auto":
        return config.data.fit
    if not stores:
        return _by_shapes([split for _, _, split in opened if split is not None], size, note)
    (fit, cache), *others = stores.items()
    if others:
        raise RecipeError(
            "The caches fit images in different ways: "
            f"{', '.join(f'{cache.place} ({fit})' for fit, cache in stores.items())}",
            fix=f"Build the others again with --fit {fit}",
        )
    if config.data.fit not in ("auto", fit):
        raise RecipeError(
            f"Cannot use --fit {config.data.fit} for {cache.place}: it was built with --fit {fit}",
            fix=f"Leave --fit out, or build a cache with --fit {config.data.fit}",
        )
    if fit != "squash" and size is not None and squashed(cache.view_size, size) > MOST_SQUASHED:
        height, width = cache.view_size
        raise RecipeError(
            f"Cannot use --size {size[0]}x{size[1]} for views of {height}x{width} with --fit {fit}: the shapes differ",
            fix=f"Use --size {height}x{width}, or build a cache of that shape.",
        )
    return fit


def _by_shapes(splits: Sequence[Split], size: tuple[int, int] | None, note: Callable[[str], None]) -> Fit:
    """Return the default fit of data sets: `pad` if any of them has images of another shape, else `squash`."""
    for split in splits:
        if size is None:  # which is refused later, by the rule of its own
            break
        fit, reason = choose_fit(split, size)
        if reason is not None:
            note(reason)
            return fit
    return "squash"


def check_pasting(sources: Sequence[Source]) -> None:
    """Check that the samples that are pasted into a stream fit it, for every stream with pasted samples.

    The pasted samples must have class labels. If the stream and the pasted samples have targets, these must have the
    same meaning, for example the same head for depth. A stream that learns from depth targets needs them in metres.

    Raises: RecipeError that names the stream.
    """
    for source in sources:
        if source.pasted is not None:
            with source.named():
                _check_labels(source, source.pasted)
                _check_forms(source, source.pasted)


def _check_labels(source: Source, pasted: Source) -> None:
    dataset = pasted.dataset
    classes = SEGMENTATION in dataset.tasks and bool(dataset.own_classes.names)
    if not dataset.labelled or not classes:
        raise RecipeError(
            f"Cannot use paste-from {pasted.stream.name}: "
            + ("its labels are of depth alone" if dataset.labelled else "no sample of it has a label that is used")
            + f" (labels={pasted.config.data.labels})",
            fix="Paste from a stream with labels of classes. Of two streams, labels go into the one without.",
        )


def _check_forms(source: Source, pasted: Source) -> None:
    """Check that a stream's targets and the pasted targets have the same meaning. Raises: RecipeError."""
    cache, pasted_cache = source.cache, pasted.cache
    differs, read = [], {term.task for term in source.config.active if term.numeric and term.reads_teacher}
    own_heads = {} if cache is None else {task: stored_head(cache.manifest, task) for task in read}
    for task, head in own_heads.items():
        if head.unit != TASKS[task].unit:
            differs.append(f"{task} in unit {head.unit!r}, known up to a scale of each image")
    if cache is not None and pasted_cache is not None:
        shared = set(source.dataset.heads) & set(pasted.dataset.heads)
        if SEGMENTATION in shared and cache.align_corners != pasted_cache.align_corners:
            differs.append(f"logits resized with align_corners={pasted_cache.align_corners} into {cache.align_corners}")
        theirs = {task: stored_head(pasted_cache.manifest, task) for task in shared & set(own_heads)}
        differs += [
            f"{task} as {head} into {own_heads[task]}" for task, head in theirs.items() if head != own_heads[task]
        ]
    if differs:
        raise RecipeError(
            f"Cannot use paste-from {pasted.stream.name}: its targets mean something else ({'; '.join(differs)})",
            fix="Leave the terms that read them out of one stream, or give caches of one teacher.",
        )
