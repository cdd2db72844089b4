"""The samples of a cache as a dataset: warped, replayed or unchanged."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from kdcache.data import (
    IGNORE_INDEX,
    RENDERERS,
    Augmentation,
    ClassList,
    Fit,
    Window,
    fitted_share,
    id_hash,
    inside_rectangle,
    prefetch,
    render,
    zoom_of,
)
from kdcache.distill import SEGMENTATION
from kdcache.errors import RecipeError, suggest
from kdcache.store import Cache, Records, seal_of
from kdcache.tasks import TASKS, in_metres, numeric
from kdcache.training.input.batch import CLASS_LABEL, Array, Row
from kdcache.training.input.dataset import DepthZoom, DrawnDataset, Field, Size
from kdcache.training.input.resident_records import PIXEL_PATHS, RamRecords, RecordSource, target_paths
from kdcache.training.input.subset import Part, Selection

AUGMENTS = ("auto", "warp", "replay", "none")


def choose_augment(augment: str, cache: Cache | None) -> str:
    """Return `augment`, with `auto` replaced: by `replay` for a cache of several views or of crops, else by `warp`.

    `cache` is None for a data folder.
    """
    if augment != "auto":
        return augment
    view = None if cache is None else cache.manifest.view
    return "replay" if view is not None and (view.views_per_sample > 1 or view.kind == "crop") else "warp"


class CacheDataset(DrawnDataset):
    """The samples of a cache: pixels, labels and targets.

    >>> import kdcache
    >>> dataset = kdcache.CacheDataset(kdcache.open_cache("streets.zarr"))
    >>> len(dataset), dataset[0].pixels.shape
    (8, torch.Size([48, 64, 3]))

    Args:
        source: an open cache. For a cache without pixels, `Records`, which join it to its data set. Each image is then
            compared with the cache's checksum when this process first reads it, also in a resumed run.
        augment: `warp` draws a window of the stored whole image and moves the target with it. `replay` gives the views
            as the teacher saw them, another one in every epoch, with colour jitter. `none` gives the whole image
            without jitter. `auto` replays a cache of several views or of crops, and warps others.
        size: (H, W) of the pixels. None is the view's size.
        targets: the heads whose targets are read. True is all heads, False is none. Pixels and labels do not depend on
            it.
        augmentation: scale, flip and colour jitter. None is the default `Augmentation()`.
        extras: paths of further arrays that a sample has, such as `features/stage4`.
        part: which samples, labels and views are used. None is all.
        labelled_only: True leaves out samples that have no label for any task in `tasks`.
        tasks: tasks whose labels are used. Depth labels come from the cache, or with `--pixels source` from the data
            set.
        depth_zoom: what a warp's zoom does to metres in labels and targets. `divide` divides them by the zoom. `keep`
            leaves them unchanged, and so does `none`, which is meant for an augmentation without zoom. With `divide`,
            labels that a replayed view takes from the data set are also divided by the zoom of that view.
    Raises: RecipeError for an unknown augmentation, or one that a cache of crops cannot have.
    """

    cache: Cache
    records: RecordSource
    part: Part

    def __init__(
        self,
        source: Cache | Records,
        *,
        augment: str = "auto",
        size: Size | None = None,
        targets: bool | Sequence[str] = True,
        augmentation: Augmentation | None = None,
        extras: Sequence[str] = (),
        part: Part | None = None,
        labelled_only: bool = False,
        tasks: Sequence[str] = (SEGMENTATION,),
        depth_zoom: DepthZoom = "none",
    ) -> None:
        if augment not in AUGMENTS:
            raise RecipeError(
                f"Unknown augment {augment!r}",
                fix=suggest(str(augment), AUGMENTS, f"Use one of {', '.join(AUGMENTS)}."),
            )
        self.source = Records.of(source)
        self.source.check_complete()
        self.cache = cache = self.source.cache
        self.split = None if cache.pixels_stored else self.source.split
        augment = choose_augment(augment, cache)
        augmentation = Augmentation() if augmentation is None else augmentation
        if cache.manifest.view.kind == "crop" and augment != "replay":
            raise RecipeError(
                f"Cannot use --augment {augment} for {cache.place}: it is a cache of crops, and {augment} begins with "
                "the whole image",
                fix="Use --augment replay.",
            )
        augmentation = augmentation if augment != "none" else Augmentation.off()
        super().__init__(cache.view_size if size is None else size, augmentation, tasks, depth_zoom)
        self.augment = augment
        self.records = cache
        self.remote = cache.remote
        self.shard_records = max(1, cache.manifest.build.shard_records // cache.manifest.view.views_per_sample)
        heads = tuple(cache.manifest.heads)
        self.heads = heads if targets is True else tuple(head for head in heads if targets and head in targets)
        self.target_paths = target_paths(cache, self.heads)
        self.extras = tuple(extras)
        self.part = part = Part() if part is None else part
        everything = range(cache.manifest.dataset.samples)
        used = Selection(everything, everything) if part.whole else part.choose(cache.ids)
        self._labels_used = used.labelled
        self._flags = {task: self._of_task(task) for task in self.tasks}
        self._complete = bool(np.any([*self._flags.values()], axis=0).all()) and (part.labels, part.labels_from) == (
            None,
            None,
        )
        self.indices = used.samples
        if labelled_only and not self._complete:
            self.indices = [number for number in used.samples if self._has_label(number)]
            self._complete = True
        self._views = _views(cache, part.views)
        # Samples begin with different views, so that an epoch has about as many of each.
        turning = augment == "replay" and self._views > 1
        self._turns = [id_hash(cache.ids[number]) % self._views for number in self.indices] if turning else None
        view = cache.manifest.view
        grey = view.fit == "pad" or (augment == "replay" and view.reaches_beyond)
        self._inside = _inside(cache) if grey else None
        self._zooms = augment == "warp" and depth_zoom == "divide" and in_metres(self.heads)

    @property
    def fit(self) -> Fit:
        """How images of another shape were fitted into the cache's views: `squash`, `pad` or `crop`."""
        return self.cache.manifest.view.fit

    @property
    def own_classes(self) -> ClassList:
        """The classes of the cache's data set, before any class map."""
        dataset = self.cache.manifest.dataset
        return ClassList(dataset.class_names, dataset.class_colours)

    @property
    def identity(self) -> str:
        """Text that identifies the cache's content: the word "store", a space and the cache's seal."""
        return f"store {seal_of(self.cache)}"

    @property
    def threads_suffice(self) -> bool:
        """True if the cache stores pixels. Then a draw decodes no image files, so threads are as fast as processes."""
        return self.split is None

    @property
    def paths(self) -> tuple[str, ...]:
        """Paths of the cache's arrays that a sample is read from: targets, `extras`, and stored pixels and labels."""
        pixels = (*PIXEL_PATHS, *(f"labels/{task}" for task in numeric(self.tasks)))
        return (*self.target_paths, *self.extras, *(() if self.split else pixels))

    def sample_id(self, index: int) -> str:
        """Return the id of the sample at `index` of the dataset."""
        return self.cache.ids[self.indices[index]]

    def record(self, index: int, epoch: int) -> int:
        """Return the number of the record that is read for a sample in an epoch.

        `index` is the sample's index in this dataset. Replay takes another view in each epoch. Otherwise it is view 0.
        """
        view = 0 if self._turns is None else (epoch + self._turns[index]) % self._views
        return self.cache.manifest.record(self.indices[index], view)

    def _own_labels(self) -> Iterator[Array]:
        if self.split is not None or SEGMENTATION not in self.tasks:
            return super()._own_labels()
        records, path = map(self.cache.manifest.record, self._with_classes()), PIXEL_PATHS[1]
        return prefetch(lambda record: self.cache.read(record, [path])[path], records, threads=2, ahead=8)

    def fields(self) -> dict[str, Field]:
        """Return the shape and dtype of each tensor of a sample, by the names of `Batch.to_dict`."""
        fields = super().fields()
        if self.augment == "warp":  # the others show whole views, for which None stands
            fields |= {"window": ((4,), torch.float64), "flip": ((), torch.bool)}
        fields |= {f"arrays/{path}": self._field(path) for path in self.extras}
        if self._inside is not None:
            fields["inside"] = (4,), torch.float64
        if self._zooms:
            fields["zoom"] = (), torch.float64
        if self.on_device is not None:
            return fields | {"record": ((), torch.int64)}
        return fields | {path: self._field(path) for path in self.target_paths}

    def _field(self, path: str) -> Field:
        spec = self.cache.specs[path]
        return spec.shape, getattr(torch, spec.dtype)

    def draw_into(self, index: int, epoch: int, rng: np.random.Generator, out: Row) -> None:
        """Write an augmented sample into the arrays of `out`: pixels, labels and targets.

        Args:
            index: index of the sample in the dataset.
            epoch: chooses the view for `replay`.
            rng: source of all random numbers of the augmentation.
            out: name -> the array to fill, as `row_of` returns it.
        Raises: KDCacheError for a sample that cannot be read.
        """
        record = self.record(index, epoch)
        height, width = self.cache.view_size
        warped = self.augment == "warp"
        window, flip = self._window(rng, height, width) if warped else (Window.full(height, width), False)
        if self.split is None:
            image, label = self._read(record, PIXEL_PATHS[0]), self._read(record, PIXEL_PATHS[1])
            render(image, label, window, flip=flip, size=self.size, out=(out["pixels"], out[CLASS_LABEL]))
            zoom = zoom_of(window, (height, width)) if self.depth_zoom == "divide" else 1.0
            for task in numeric(self.tasks):
                path = f"labels/{task}"
                RENDERERS[task](self._read(record, path), window, flip=flip, size=self.size, zoom=zoom, out=out[path])
        else:
            self._from_source(index, record, window, flip, out)
        self._jitter(rng, out)
        if "window" in out:
            out["window"][...] = (window.y0, window.x0, window.y1, window.x1)
            out["flip"][...] = flip
        if self._inside is not None:
            out["inside"][...] = self._inside[record]
        if "zoom" in out:
            out["zoom"][...] = zoom_of(window, (height, width))
        if "record" in out:
            out["record"][...] = record
        if not self._has_label(self.indices[index], SEGMENTATION):
            out[CLASS_LABEL][...] = IGNORE_INDEX
        for task in numeric(self.tasks):
            if not self._has_label(self.indices[index], task):
                out[f"labels/{task}"][...] = TASKS[task].void
        for name, array in out.items():
            if name.startswith(("targets/", "arrays/")):
                self.records.read_into(record, name.removeprefix("arrays/"), array)
        self._finish(rng, out)

    def _has_label(self, number: int, task: str | None = None) -> bool:
        tasks = self.tasks if task is None else (task,)
        return number in self._labels_used and any(task in self._flags and self._flags[task][number] for task in tasks)

    def _of_task(self, task: str) -> npt.NDArray[np.bool_]:
        """Return True for each of the N samples of the cache that has a label of a task, (N,)."""
        if self.split is not None and numeric([task]):
            return np.isin(np.arange(len(self.split)), self.split.labelled(task))
        return self.cache.labelled[task]

    def _read(self, record: int, path: str) -> Array:
        """Return a row of an array. It must not be written to."""
        if isinstance(self.records, RamRecords):
            return self.records.row(record, path)
        spec = self.cache.specs[path]
        row = np.empty(spec.shape, spec.dtype)
        self.records.read_into(record, path, row)
        return row

    def _from_source(self, index: int, record: int, window: Window, flip: bool, out: Row) -> None:
        """Write a crop of the source image, which is sharper than an enlarged view.

        `window` is in pixels of the view.
        """
        assert self.split is not None
        number = self.indices[index]
        image = self.split.image(number)
        label = self.split.label(number) if SEGMENTATION in self.tasks else None
        self.source.check_image(record, image, label)
        source_window, mirrored = self.source.window(record)
        image_size = image.shape[0], image.shape[1]
        fitted = fitted_share(self.fit, image_size, self.cache.manifest.view.image_size or self.cache.view_size)
        if self.augment == "warp":  # of view 0, which is the whole image
            view_height, view_width = self.cache.view_size
            height, width = image_size[0] * fitted[0], image_size[1] * fitted[1]
            moved, mirrored = window.scaled(height / view_height, width / view_width), flip
            source_window = moved if fitted == (1.0, 1.0) else moved.moved(source_window.y0, source_window.x0)
        render(image, label, source_window, flip=mirrored, size=self.size, out=(out["pixels"], out[CLASS_LABEL]))
        share = (1.0, 1.0) if self.augment == "warp" else self.cache.manifest.view.share or (1.0, 1.0)
        share = share[0] * fitted[0], share[1] * fitted[1]
        zoom = zoom_of(source_window, image_size, share) if self.depth_zoom == "divide" else 1.0
        for task in numeric(self.tasks):
            numbers: Any = self.split.label(number, task)
            memory = out[f"labels/{task}"]
            RENDERERS[task](numbers, source_window, flip=mirrored, size=self.size, zoom=zoom, out=memory)


def _views(cache: Cache, limit: int | None) -> int:
    views = cache.manifest.view.views_per_sample
    if limit is not None and limit > views:
        raise RecipeError(
            f"Cannot use --limit-views {limit}: the cache has {views} view{'s' * (views > 1)}",
            fix="Leave it out, or build with more --views.",
        )
    return limit or views


def _inside(cache: Cache) -> Array:
    """Return the edges (R, 4) float64 of the part of every view that shows its image. The rest is grey."""
    window, flip, source_size = (cache.column(name) for name in ("window", "flip", "source_size"))
    return inside_rectangle(window, flip, source_size, cache.view_size)
