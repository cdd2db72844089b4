"""Samples of a training: pixels, label and target, rendered through a drawn window.

`LabelledDataset` draws from a data set, `CacheDataset` (cache_dataset.py) from a cache. Both are torch map-style
datasets whose items `DataLoader` can collate. Both draw their augmentation in the same way, and `CacheDataset` draws
the same whether it reads targets or not, so runs with and without distillation see identical pixels.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import Dataset

from kdcache.data import (
    RENDERERS,
    Augmentation,
    ClassList,
    Fit,
    Split,
    Window,
    colour_jitter,
    draw_window,
    fitted_share,
    prefetch,
    render,
    zoom_of,
)
from kdcache.distill import SEGMENTATION, Batch
from kdcache.store import Cache
from kdcache.tasks import numeric
from kdcache.training.input.batch import CLASS_LABEL, Row, row_of
from kdcache.training.input.resident_records import DeviceTargets, RecordSource
from kdcache.training.input.subset import Part

Size = tuple[int, int]
DepthZoom = Literal["none", "divide", "keep"]
Field = tuple[tuple[int, ...], torch.dtype]
"""Shape and type of a tensor of one sample."""


class DrawnDataset(Dataset[Batch], ABC):
    """The base of datasets whose samples are augmented at random each time they are drawn.

    A subclass sets `indices`, and `cache` or `split`. It defines `own_classes`, `identity`, `sample_id`, `draw_into`
    and `_has_label`.

    Args:
        size: (H, W) of the pixels of a sample.
        augmentation: scale, flip and colour jitter. `Augmentation.off()` for none.
        tasks: tasks whose labels are used. Samples always have segmentation labels, which are void if they are not
            used.
        depth_zoom: what a drawn zoom does to metres in labels and targets. `divide` divides them by the zoom. `keep`
            leaves them unchanged, and so does `none`, which is meant for an augmentation without zoom.

    Attributes:
        cache: the cache that targets come from. None without a cache.
        split: the data set that pixels and labels come from. None for a cache that stores pixels.
        indices: numbers of the samples, in the cache or the data set, that are drawn.
        extras: paths of further arrays that a sample has. They may change before the first draw.
        records: the object that reads the cache's records. This is the cache, or memory that keeps its records. None
            without a cache.
        shard_records: number of samples in a shard, for orders that read one shard after another. None without a cache.
        remote: True if shards are downloaded.
        heads: names of the cache's heads whose targets a sample has. `target_paths` are the paths of their arrays.
        on_device: the targets, if a GPU keeps them. A sample then has the number of its record instead.
        dice: number of random numbers in 0..1 that a sample has, for draws on the batch's device (mix.py).
        weak: True if a sample also has its pixels before the colour jitter.
        mapped: the classes after a class map, and the new id of each label value (256,) uint8. None without a map.
    """

    cache: Cache | None = None
    split: Split | None = None
    indices: Sequence[int]
    extras: tuple[str, ...] = ()
    records: RecordSource | None = None
    shard_records: int | None = None
    remote: bool = False
    heads: tuple[str, ...] = ()
    target_paths: tuple[str, ...] = ()
    _complete = True
    """Whether every sample has a label that is used."""

    def __init__(
        self,
        size: Size,
        augmentation: Augmentation,
        tasks: Sequence[str] = (SEGMENTATION,),
        depth_zoom: DepthZoom = "none",
    ) -> None:
        self.size = size
        self.augmentation = augmentation
        self.tasks = tuple(tasks)
        self.depth_zoom = depth_zoom
        self.on_device: DeviceTargets | None = None
        self.dice = 0
        self.weak = False
        self.mapped: tuple[ClassList, npt.NDArray[np.uint8]] | None = None

    @property
    def threads_suffice(self) -> bool:
        """True if a draw mostly releases the GIL, so threads are as fast as processes."""
        return False

    @property
    def label_flags(self) -> npt.NDArray[np.bool_] | None:
        """Bool array (len(self),), True for each sample with a label that the training uses. None means all samples."""
        if self._complete:
            return None
        return np.array([self._has_label(number) for number in self.indices], np.bool_)

    @property
    def paths(self) -> tuple[str, ...]:
        """Paths of all arrays of the cache that a sample is read from."""
        return ()

    @property
    def labelled(self) -> Sequence[int]:
        """Numbers of the drawn samples that have a label for at least one of `tasks`, and may use it.

        The numbers count samples of the cache or data set from 0, as in `indices`. A run with fewer labels does not use
        the labels of all samples.
        """
        return [number for number in self.indices if self._has_label(number)]

    @property
    def labels_used(self) -> npt.NDArray[np.bool_]:
        """Bool array (N,) for all N samples of the cache or data set: True for the samples whose label is used."""
        count = len(self.split or ()) if self.cache is None else self.cache.manifest.dataset.samples
        used = np.zeros(count, np.bool_)
        used[list(self.labelled)] = True
        return used

    @property
    def classes(self) -> ClassList:
        """The classes of the labels, after any class map."""
        return self.own_classes if self.mapped is None else self.mapped[0]

    @property
    @abstractmethod
    def own_classes(self) -> ClassList:
        """The classes of the labels before any class map."""

    @property
    @abstractmethod
    def identity(self) -> str:
        """Text that identifies the samples: a digest of the data set's ids and classes, or the cache's seal."""

    @property
    def source_ids(self) -> Sequence[str]:
        """The ids of all samples of the cache or data set, also of those that are not drawn."""
        if self.cache is not None:
            return self.cache.ids
        assert self.split is not None
        return self.split.ids

    @property
    def ids_digest(self) -> str:
        """The digest of the ids and classes of the cache or data set, as in a cache's manifest."""
        if self.cache is not None:
            return self.cache.manifest.dataset.ids_digest
        assert self.split is not None
        return self.split.digest()

    def __len__(self) -> int:
        return len(self.indices)

    def record(self, index: int, epoch: int) -> int:
        """Return the number of the record (cache) or image (data set) that is read for a sample in an epoch.

        `index` is the sample's index in this dataset.
        """
        return self.indices[index]

    def labels(self) -> Iterator[npt.NDArray[np.uint8]]:
        """Yield the segmentation labels that the training uses, uint8 (H, W) each, in the order of the samples.

        Samples without such a label are skipped. (H, W) is the size of the label file, or of the sample's first view if
        the cache stores labels. A class map is applied.

        Raises: KDCacheError for a label that cannot be read.
        """
        return self._own_labels() if self.mapped is None else map(self.mapped[1].take, self._own_labels())

    def _own_labels(self) -> Iterator[npt.NDArray[np.uint8]]:
        assert self.split is not None
        if SEGMENTATION not in self.tasks:
            return iter(())
        labels = prefetch(self.split.label, self._with_classes(), threads=2, ahead=8)
        return (label for label in labels if label is not None)

    def _with_classes(self) -> Sequence[int]:
        """Return those of `indices` whose samples have a segmentation label that the training uses."""
        return [number for number in self.indices if self._has_label(number, SEGMENTATION)]

    @abstractmethod
    def _has_label(self, number: int, task: str | None = None) -> bool:
        """Return True if a sample of the cache or data set has a label that is used. `task` is None for any task."""

    @abstractmethod
    def sample_id(self, index: int) -> str:
        """Return the stable id of the sample at `index` of the dataset, for messages."""

    @abstractmethod
    def draw_into(self, index: int, epoch: int, rng: np.random.Generator, out: Row) -> None:
        """Write an augmented sample into the arrays of `out`. Equal states of `rng` give equal samples.

        Args:
            index: index of the sample in the dataset.
            epoch: chooses the view of a cache with several views.
            rng: source of all random numbers of the augmentation.
            out: name -> the array to fill, as `row_of` returns it.
        Raises: KDCacheError for a sample that cannot be read. The content of `out` is then undefined.
        """

    def fields(self) -> dict[str, Field]:
        """Return the shape and dtype of each tensor of one sample: name -> (shape, dtype).

        The names are those of `Batch.to_dict`, such as `pixels` and `labels/depth`. Shapes have no batch axis.
        """
        fields: dict[str, Field] = {
            "pixels": ((*self.size, 3), torch.uint8),
            CLASS_LABEL: (self.size, torch.uint8),
        }
        fields |= {f"labels/{task}": (self.size, torch.float32) for task in numeric(self.tasks)}
        if self.weak:
            fields["weak"] = ((*self.size, 3), torch.uint8)
        return fields | ({"dice": ((self.dice,), torch.float32)} if self.dice else {})

    def empty(self, *leading: int, pin_memory: bool = False) -> Batch:
        """Return a `Batch` of uninitialised tensors with the shapes and dtypes of this dataset's samples.

        `empty()` is for one sample, `empty(B)` for a batch of B samples. `pin_memory` is True for page-locked memory,
        from which copies to a GPU are fast.
        """
        return Batch.from_dict(
            {
                name: torch.empty((*leading, *shape), dtype=dtype, pin_memory=pin_memory)
                for name, (shape, dtype) in self.fields().items()
            }
        )

    def draw(self, index: int, epoch: int, rng: np.random.Generator) -> Batch:
        """Return an augmented sample, as a batch of one.

        Args:
            index: index of the sample in the dataset.
            epoch: chooses the view of a cache with several views.
            rng: source of all random numbers of the augmentation.
        Raises: KDCacheError for a sample that cannot be read.
        """
        sample = self.empty()
        self.draw_into(index, epoch, rng, row_of(sample))
        return sample

    def __getitem__(self, index: int) -> Batch:
        # torch seeds its generator in every worker and epoch, so a DataLoader user gets fresh draws. A dataset of a
        # DataLoader does not get the epoch: the seed stands for it, so that any of a sample's views may come.
        seed = int(torch.randint(2**62, ()).item())
        return self.draw(index, seed, np.random.default_rng(seed))

    def _jitter(self, rng: np.random.Generator, out: Row) -> None:
        """Change the colours of the pixels. The weak view, if there is one, keeps the pixels as they were."""
        pixels = out["pixels"]
        if "weak" in out:
            out["weak"][...] = pixels
        colour_jitter(rng, pixels, self.augmentation.jitter, out=pixels)

    def _finish(self, rng: np.random.Generator, out: Row) -> None:
        """Map the label's classes and draw the dice. The dice come last, so no other draw depends on them."""
        if self.mapped is not None:
            self.mapped[1].take(out[CLASS_LABEL], out=out[CLASS_LABEL])
        if "dice" in out:
            rng.random(out=out["dice"], dtype=np.float32)

    def _window(
        self, rng: np.random.Generator, height: int, width: int, share: tuple[float, float] = (1.0, 1.0)
    ) -> tuple[Window, bool]:
        return draw_window(rng, (height, width), self.augmentation.scale, self.augmentation.flip, share)


class LabelledDataset(DrawnDataset):
    """The samples of a split, for training without a teacher.

    >>> import kdcache
    >>> dataset = kdcache.LabelledDataset(kdcache.open_split("streets", "train"), (48, 64))
    >>> dataset[0].label.shape
    torch.Size([48, 64])

    Args:
        split: an open split of a data set.
        size: (H, W) of the pixels of a sample.
        augmentation: scale, flip and colour jitter. None is the default `Augmentation()`.
        part: which samples and labels of the split are used. None is all.
        tasks: tasks whose labels are used.
        depth_zoom: what a drawn zoom does to metres in labels. `divide` divides them by the zoom. `keep` and `none`
            leave them unchanged.
        labelled_only: True leaves out samples without a label of any of the tasks.
        fit: how images of another shape are fitted into `size`: `squash`, `pad` (with grey, which has no labels) or
            `crop`.
    """

    def __init__(
        self,
        split: Split,
        size: Size,
        augmentation: Augmentation | None = None,
        *,
        part: Part | None = None,
        tasks: Sequence[str] = (SEGMENTATION,),
        depth_zoom: DepthZoom = "none",
        labelled_only: bool = True,
        fit: Fit = "squash",
    ) -> None:
        super().__init__(size, Augmentation() if augmentation is None else augmentation, tasks, depth_zoom)
        self.split: Split = split
        self.fit = fit
        used = (Part() if part is None else part).choose(split.ids)
        self._labels_used = used.labelled
        labelled = [number for number in used.samples if self._has_label(number)]
        self._complete = labelled_only or len(labelled) == len(used.samples)
        self.indices = labelled if self._complete else used.samples

    @property
    def own_classes(self) -> ClassList:
        """The classes of the split, before any class map."""
        return self.split.classes

    @property
    def identity(self) -> str:
        """Text that identifies the split: "data DIGEST", with the digest of the split's ids and classes."""
        return f"data {self.split.digest()}"

    def sample_id(self, index: int) -> str:
        """Return the id of the sample at `index` of the dataset."""
        return self.split.ids[self.indices[index]]

    def _has_label(self, number: int, task: str | None = None) -> bool:
        tasks = self.tasks if task is None else (task,)
        return number in self._labels_used and any(
            task in self.tasks and self.split.has_label(number, task) for task in tasks
        )

    def _label(self, number: int, task: str) -> npt.NDArray[Any] | None:
        """Return a label if it is used, else None."""
        return self.split.label(number, task) if self._has_label(number, task) else None

    def draw_into(self, index: int, epoch: int, rng: np.random.Generator, out: Row) -> None:
        """Write an augmented sample into the arrays of `out`: image and labels.

        Args:
            index: index of the sample in the dataset.
            epoch: ignored.
            rng: source of all random numbers of the augmentation.
            out: name -> the array to fill, as `row_of` returns it.
        Raises: KDCacheError for a sample that cannot be read.
        """
        source = self.indices[index]
        image = self.split.image(source)
        label = self._label(source, SEGMENTATION)
        image_size = image.shape[0], image.shape[1]
        share = fitted_share(self.fit, image_size, self.size)
        window, flip = self._window(rng, *image_size, share)
        render(image, label, window, flip=flip, size=self.size, out=(out["pixels"], out[CLASS_LABEL]))
        zoom = zoom_of(window, image_size, share) if self.depth_zoom == "divide" else 1.0
        for task in numeric(self.tasks):
            memory = out[f"labels/{task}"]
            RENDERERS[task](self._label(source, task), window, flip=flip, size=self.size, zoom=zoom, out=memory)
        self._jitter(rng, out)
        self._finish(rng, out)
