"""Samples of a training: pixels, label and target, rendered through a drawn window.

`LabelledDataset` draws from a data set, `CacheDataset` from a store. Both are torch map-style datasets whose
items `DataLoader` collates as they are; both draw their augmentation in the same way, and `CacheDataset` draws
the same whether it reads targets or not, so that runs with and without distillation see identical pixels.
"""

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from kdcache.data import Augmentation, Split, Window, colour_jitter, draw_window, pixel_checksum, render
from kdcache.distill import Target
from kdcache.errors import MismatchError, RecipeError
from kdcache.store import Cache

Size = tuple[int, int]
AUGMENTS = ("warp", "replay", "none")
Array = np.ndarray[Any, Any]


class Sample(NamedTuple):
    """One item; a batch has the same fields with a leading B."""

    pixels: Tensor  # uint8 (H, W, 3) RGB
    label: Tensor  # uint8 (H, W), 255 void
    target: Target


class DrawnDataset(Dataset[Sample], ABC):
    """A dataset whose every visit of a sample is drawn from a random generator.

    Args:
        size: (H, W) of the pixels that come out.
        augmentation: scale, flip and colour jitter; `Augmentation.off()` for none.
    """

    def __init__(self, size: Size, augmentation: Augmentation) -> None:
        self.size = size
        self.augmentation = augmentation

    @property
    def threads_suffice(self) -> bool:
        """Whether a draw leaves the GIL to others for most of its time, so that processes would gain nothing."""
        return False

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def sample_id(self, index: int) -> str:
        """Stable id, for messages."""

    @abstractmethod
    def draw(self, index: int, epoch: int, rng: np.random.Generator) -> Sample:
        """Sample `index` as `rng` augments it; the same generator state gives the same item."""

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

    def draw(self, index: int, epoch: int, rng: np.random.Generator) -> Sample:
        source = self._indices[index]
        image, label = self.split.image(source), self.split.label(source)
        window, flip = self._window(rng, *image.shape[:2])
        pixels, label = render(image, label, window, flip=flip, size=self.size)
        pixels = colour_jitter(rng, pixels, self.augmentation.jitter)
        return Sample(torch.from_numpy(pixels), torch.from_numpy(label), no_target())


class CacheDataset(DrawnDataset):
    """The samples of a store: (pixels, label, target).

    Args:
        cache: an open store.
        augment: `warp` draws a window of the stored view and moves the target with it; `replay` gives the views
            as the teacher saw them, with colour jitter; `none` without.
        size: (H, W) of the pixels; default the view's.
        targets: False reads no targets (same draws, empty target).
        split: the data set, needed when the store keeps no pixels. Its rendering is compared with the store's
            checksum at a sample's first visit by this process, also of a run that resumes.
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
        self._paths = cache.target_paths() if targets else []
        self._checksums = cache.column("pixel_checksum") if self.split is not None else None
        self._checked = set[int]()

    @property
    def threads_suffice(self) -> bool:
        return self.split is None

    def __len__(self) -> int:
        return len(self.cache)

    def sample_id(self, index: int) -> str:
        return self.cache.ids[index]

    def draw(self, index: int, epoch: int, rng: np.random.Generator) -> Sample:
        height, width = self.cache.view_size
        window, flip = Window.full(height, width), False
        if self.augment == "warp":
            window, flip = self._window(rng, height, width)
        rows = self.cache.read(index, self._paths + ([] if self.split else ["pixels/image", "labels/segmentation"]))
        if self.split is None:
            pixels, label = render(rows["pixels/image"], rows["labels/segmentation"], window, flip=flip, size=self.size)
        else:
            pixels, label = self._from_source(index, window, flip)
        pixels = colour_jitter(rng, pixels, self.augmentation.jitter)
        target = _target(rows, window, flip) if self._paths else no_target()
        return Sample(torch.from_numpy(pixels), torch.from_numpy(label), target)

    def _from_source(self, index: int, window: Window, flip: bool) -> tuple[Array, Array]:
        """Crop the source itself, which is sharper than enlarging the view; `window` is in pixels of the view."""
        assert self.split is not None
        assert self._checksums is not None
        image, label = self.split.image(index), self.split.label(index)
        height, width = image.shape[:2]
        if index not in self._checked:
            view, _ = render(image, None, Window.full(height, width), flip=False, size=self.cache.view_size)
            if pixel_checksum(view) != int(self._checksums[index]):
                raise MismatchError(
                    "an image must render to the pixels that the teacher saw",
                    received=f"{self.sample_id(index)} renders differently: the file or an image library has changed",
                    remedy="restore the image, build the store again, or build with --pixels stored",
                )
            self._checked.add(index)
        view_height, view_width = self.cache.view_size
        source = window.scaled(height / view_height, width / view_width)
        return render(image, label, source, flip=flip, size=self.size)


def no_target() -> Target:
    """A target that says nothing: no values."""
    half = torch.empty(0, dtype=torch.float16)
    return Target(
        half,
        torch.empty(0, dtype=torch.uint8),
        half,
        torch.zeros(4, dtype=torch.float64),
        torch.tensor(False),
    )


def _target(rows: dict[str, Array], window: Window, flip: bool) -> Target:
    parts = [rows.get(f"targets/segmentation/{name}") for name in ("values", "indices", "tail")]
    empty = no_target()
    values, indices, tail = (
        torch.from_numpy(part) if part is not None else absent for part, absent in zip(parts, empty[:3], strict=True)
    )
    return Target(values, indices, tail, torch.tensor(window.as_tuple(), dtype=torch.float64), torch.tensor(flip))


def _matching(cache: Cache, split: Split | None) -> Split:
    """The split that a store without pixels was built from."""
    if split is None:
        raise MismatchError(
            "a store built with --pixels source needs its data set beside it",
            received=f"{cache.path} keeps no pixels, and no data set was given",
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
