"""Samples of a training: pixels, label and target, rendered through a drawn window.

`LabelledDataset` draws from a data set, `CacheDataset` from a store. Both are torch map-style datasets whose
items `DataLoader` collates as they are; both draw their augmentation in the same way, and `CacheDataset` draws
the same whether it reads targets or not, so that runs with and without distillation see identical pixels.

A sample is drawn into memory that the caller gives, mostly a row of a batch (`Row`): torch tensors of single samples,
and stacking them, would cost as much as reading does.
"""

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from kdcache.data import Augmentation, Split, Window, colour_jitter, draw_window, id_hash, pixel_checksum, render
from kdcache.distill import Target
from kdcache.errors import MismatchError, RecipeError
from kdcache.store import Cache
from kdcache.train.records import PIXEL_PATHS, TARGET_PARTS, DeviceTargets, RecordSource, target_paths

Size = tuple[int, int]
Field = tuple[tuple[int, ...], torch.dtype]
AUGMENTS = ("warp", "replay", "none")
Array = np.ndarray[Any, Any]


class Sample(NamedTuple):
    """One item; a batch has the same fields with a leading B."""

    pixels: Tensor  # uint8 (H, W, 3) RGB
    label: Tensor  # uint8 (H, W), 255 void
    target: Target


class Row(NamedTuple):
    """One sample as arrays that are drawn into: the tensors of a `Sample`, or of one row of a batch, in their order."""

    pixels: Array
    label: Array
    values: Array
    indices: Array
    tail: Array
    window: Array
    flip: Array

    @classmethod
    def of(cls, sample: Sample, *at: int) -> "Row":
        """Of a sample, or of the sample `at` a place in a batch."""
        place: Any = (*at, ...)
        return cls(*(part.numpy()[place] for part in (*sample[:2], *sample.target)))


ABSENT: tuple[Field, ...] = (((0,), torch.float16), ((0,), torch.uint8), ((0,), torch.float16))
"""Values, indices and tail of a target that says nothing."""


class DrawnDataset(Dataset[Sample], ABC):
    """A dataset whose every visit of a sample is drawn from a random generator.

    Args:
        size: (H, W) of the pixels that come out.
        augmentation: scale, flip and colour jitter; `Augmentation.off()` for none.
    Attributes:
        on_device: the targets, when a GPU keeps them: samples then hold the number of their record as `values`.
    """

    def __init__(self, size: Size, augmentation: Augmentation) -> None:
        self.size = size
        self.augmentation = augmentation
        self.on_device: DeviceTargets | None = None

    @property
    def threads_suffice(self) -> bool:
        """Whether a draw leaves the GIL to others for most of its time, so that processes would gain nothing."""
        return False

    @property
    def shard_records(self) -> int | None:
        """Records that are stored side by side, for orders that read one shard after another."""
        return None

    @property
    def remote(self) -> bool:
        """Whether a shard is dear to fetch."""
        return False

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def sample_id(self, index: int) -> str:
        """Stable id, for messages."""

    @abstractmethod
    def draw_into(self, index: int, epoch: int, rng: np.random.Generator, out: Row) -> None:
        """Sample `index` as `rng` augments it, into `out`, all of it; the same generator state gives the same.

        Raises: KDCacheError of a sample that cannot be had; `out` is undefined then.
        """

    def target_fields(self) -> tuple[Field, ...]:
        """Shapes and types of values, indices and tail of a sample."""
        return ABSENT

    def empty(self, *leading: int, pin_memory: bool = False) -> Sample:
        """Memory for samples: of shape (*leading, ...), so empty() is for one and empty(B) for a batch."""
        height, width = self.size
        fields = (((height, width, 3), torch.uint8), ((height, width), torch.uint8), *self.target_fields())
        parts = [
            torch.empty((*leading, *shape), dtype=dtype, pin_memory=pin_memory)
            for shape, dtype in (*fields, ((4,), torch.float64), ((), torch.bool))
        ]
        return Sample(parts[0], parts[1], Target(*parts[2:]))

    def draw(self, index: int, epoch: int, rng: np.random.Generator) -> Sample:
        """`draw_into` memory of its own."""
        sample = self.empty()
        self.draw_into(index, epoch, rng, Row.of(sample))
        return sample

    def __getitem__(self, index: int) -> Sample:
        # torch seeds its generator in every worker and epoch, so a DataLoader user gets fresh draws.
        seed = int(torch.randint(2**62, ()).item())
        return self.draw(index, 0, np.random.default_rng(seed))

    def _window(self, rng: np.random.Generator, height: int, width: int) -> tuple[Window, bool]:
        return draw_window(rng, (height, width), self.augmentation.scale, self.augmentation.flip)


class LabelledDataset(DrawnDataset):
    """The labelled samples of a split, for training without a teacher."""

    def __init__(self, split: Split, size: Size, augmentation: Augmentation | None = None) -> None:
        super().__init__(size, Augmentation() if augmentation is None else augmentation)
        self.split = split
        self._indices = [index for index in range(len(split)) if split.has_label(index)]

    def __len__(self) -> int:
        return len(self._indices)

    def sample_id(self, index: int) -> str:
        return self.split.ids[self._indices[index]]

    def draw_into(self, index: int, epoch: int, rng: np.random.Generator, out: Row) -> None:
        source = self._indices[index]
        image, label = self.split.image(source), self.split.label(source)
        window, flip = self._window(rng, *image.shape[:2])
        pixels, out.label[...] = render(image, label, window, flip=flip, size=self.size)
        out.pixels[...] = colour_jitter(rng, pixels, self.augmentation.jitter)
        out.window[...] = 0
        out.flip[...] = False


class CacheDataset(DrawnDataset):
    """The samples of a store: (pixels, label, target).

    Args:
        cache: an open store.
        augment: `warp` draws a window of the stored whole image and moves the target with it; `replay` gives the views
            as the teacher saw them, another one in every epoch, with colour jitter; `none` the whole image without.
        size: (H, W) of the pixels; default the view's.
        targets: False reads no targets (same draws, empty target).
        split: the data set, needed when the store keeps no pixels. Its rendering is compared with the store's
            checksum at a sample's first visit by this process, also of a run that resumes.
    Attributes:
        records: where decoded rows come from: the store, or what keeps them.
    """

    def __init__(
        self,
        cache: Cache,
        *,
        augment: str = "warp",
        size: Size | None = None,
        targets: bool = True,
        split: Split | None = None,
        augmentation: Augmentation | None = None,
    ) -> None:
        if augment not in AUGMENTS:
            raise RecipeError(
                f"augment is one of {', '.join(AUGMENTS)}", received=repr(augment), remedy="use warp, the default"
            )
        chosen = Augmentation() if augmentation is None else augmentation
        super().__init__(cache.view_size if size is None else size, chosen if augment != "none" else Augmentation.off())
        self.cache = cache
        self.augment = augment
        self.split = None if cache.pixels_stored else _matching(cache, split)
        self.records: RecordSource = cache
        self._targets = target_paths(cache) if targets else {}
        views = cache.manifest.view.views_per_sample
        # Samples begin with different views, so that an epoch has about as many of each.
        self._turns = [id_hash(sample) % views for sample in cache.ids] if augment == "replay" and views > 1 else None
        self._views = views
        self._rendered = None if self.split is None else _Rendered(cache)
        self._checked = set[int]()

    @property
    def threads_suffice(self) -> bool:
        return self.split is None

    @property
    def shard_records(self) -> int:
        return max(1, self.cache.manifest.build.shard_records // self._views)

    @property
    def remote(self) -> bool:
        return self.cache.remote

    @property
    def target_paths(self) -> tuple[str, ...]:
        """The arrays of its target; none when it reads none."""
        return tuple(self._targets.values())

    @property
    def paths(self) -> tuple[str, ...]:
        """All arrays that a sample is read from."""
        return (*self.target_paths, *(() if self.split else PIXEL_PATHS))

    def __len__(self) -> int:
        return self.cache.manifest.dataset.samples

    def sample_id(self, index: int) -> str:
        return self.cache.ids[index]

    def record(self, index: int, epoch: int) -> int:
        """What a visit of a sample reads."""
        view = 0 if self._turns is None else (epoch + self._turns[index]) % self._views
        return self.cache.manifest.record(index, view)

    def target_fields(self) -> tuple[Field, ...]:
        if self.on_device is not None:
            return ((), torch.int64), *ABSENT[1:]
        fields = list(ABSENT)
        for name, path in self._targets.items():
            spec = self.cache.specs[path]
            fields[TARGET_PARTS.index(name)] = spec.shape, getattr(torch, spec.dtype)
        return tuple(fields)

    def draw_into(self, index: int, epoch: int, rng: np.random.Generator, out: Row) -> None:
        record = self.record(index, epoch)
        height, width = self.cache.view_size
        warped = self.augment == "warp"
        window, flip = self._window(rng, height, width) if warped else (Window.full(height, width), False)
        if self.split is None:
            image, label = self._read(record, PIXEL_PATHS[0]), self._read(record, PIXEL_PATHS[1])
            pixels, out.label[...] = render(image, label, window, flip=flip, size=self.size)
        else:
            pixels, out.label[...] = self._from_source(index, record, window, flip)
        out.pixels[...] = colour_jitter(rng, pixels, self.augmentation.jitter)
        out.window[...] = (window.y0, window.x0, window.y1, window.x1)
        out.flip[...] = flip
        if self.on_device is not None:
            out.values[...] = record
            return
        for name, path in self._targets.items():
            self.records.read_into(record, path, getattr(out, name))

    def _read(self, record: int, path: str) -> Array:
        spec = self.cache.specs[path]
        row = np.empty(spec.shape, spec.dtype)
        self.records.read_into(record, path, row)
        return row

    def _from_source(self, index: int, record: int, window: Window, flip: bool) -> tuple[Array, Array]:
        """Crop the source itself, which is sharper than enlarging the view; `window` is in pixels of the view."""
        assert self.split is not None
        assert self._rendered is not None
        image, label = self.split.image(index), self.split.label(index)
        source, mirrored = self._rendered.window(record)
        if record not in self._checked:
            view, _ = render(image, None, source, flip=mirrored, size=self.cache.view_size)
            if pixel_checksum(view) != self._rendered.checksum(record):
                raise MismatchError(
                    "an image must render to the pixels that the teacher saw",
                    received=f"{self.sample_id(index)} renders differently: the file or an image library has changed",
                    remedy="restore the image, build the store again, or build with --pixels stored",
                )
            self._checked.add(record)
        if self.augment == "warp":  # of view 0, which is the whole image
            (height, width), (view_height, view_width) = image.shape[:2], self.cache.view_size
            source, mirrored = window.scaled(height / view_height, width / view_width), flip
        return render(image, label, source, flip=mirrored, size=self.size)


class _Rendered:
    """Where a store's records lie in their sources, and what they rendered to."""

    def __init__(self, cache: Cache) -> None:
        self._windows, self._flips = cache.column("window"), cache.column("flip")
        self._checksums = cache.column("pixel_checksum")

    def window(self, record: int) -> tuple[Window, bool]:
        return Window(*self._windows[record].tolist()), bool(self._flips[record])

    def checksum(self, record: int) -> int:
        return int(self._checksums[record])


def _matching(cache: Cache, split: Split | None) -> Split:
    """The split that a store without pixels was built from."""
    if split is None:
        raise MismatchError(
            "a store built with --pixels source needs its data set beside it",
            received=f"{cache.place} keeps no pixels, and no data set was given",
            remedy=f"add --data (the folder of {cache.manifest.dataset.name!r})",
        )
    dataset = cache.manifest.dataset
    if split.digest() != dataset.ids_digest:
        raise MismatchError(
            "a store built with --pixels source is used with the data set it was built from",
            received=f"{split.data}, split {split.split!r} ({len(split)} samples, {len(split.classes)} classes) "
            f"against {dataset.name!r}, split {dataset.split!r} ({dataset.samples} samples, "
            f"{len(dataset.class_names)} classes)",
            remedy="give the original data set with --data and --split, or build a store of this one",
        )
    return split
