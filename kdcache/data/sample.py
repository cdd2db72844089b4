"""The data set interface of kdcache: class names and, per split, samples with stable ids.

The teacher pass, the trainer and the checks all read from a `Split`: a tuple of samples and their classes. A sample
holds sources, which hold paths or seeds, never pixels. So a split is small, picklable (DataLoader workers use
forkserver) and quick to open. `image` and `label` return new arrays, which a caller may modify.

Other splits are made of the same samples: a fold (folds.py), several data sets joined and the labels of one task
(concat.py), labels in other classes (match_classes.py).

A sample may have a label of every task, of some or of none. Segmentation labels are uint8 with 255 for void, which
limits a class list to 255 classes: every published benchmark in use fits, and the label of a 1024 x 2048 image takes
2 MiB. Depth labels are float32 metres with NaN for unknown depth.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Generic, Literal, TypeVar, overload

import numpy as np
import numpy.typing as npt

from kdcache.data.sequences import folds_of
from kdcache.errors import DataError
from kdcache.tasks import IGNORE_INDEX, SEGMENTATION, TASKS

Pixels = npt.NDArray[np.uint8]
FileDigest = Callable[[Path], str]
Depth = npt.NDArray[np.float32]
Values = TypeVar("Values", bound=npt.NDArray[Any])


@dataclass(frozen=True)
class ClassList:
    """Class names in the order of their ids, and a colour for each class.

    Args:
        names: 2 to 255 unique, non-empty names. A name's position is its class id. Empty for data without segmentation.
        colours: one RGB triple for each name, each value 0 to 255. Empty means distinct default colours.

    Raises: DataError for invalid names or colours.
    """

    names: tuple[str, ...]
    colours: tuple[tuple[int, int, int], ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "names", tuple(self.names))
        colours = tuple((int(r), int(g), int(b)) for r, g, b in self.colours)
        object.__setattr__(self, "colours", colours or default_colours(len(self.names)))
        self._check()

    def __len__(self) -> int:
        return len(self.names)

    def to_json(self) -> dict[str, Any]:
        """Return {"names": list of str, "colours": list of [r, g, b]}. `from_json` reads it."""
        return {"names": list(self.names), "colours": [list(colour) for colour in self.colours]}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> ClassList:
        """Return the class list for `value`, a dict from `to_json`. Raises: DataError for invalid names or colours."""
        colours = tuple((r, g, b) for r, g, b in value.get("colours", ()))
        return cls(tuple(value["names"]), colours)

    def _check(self) -> None:
        if len(self.names) == 1 or len(self.names) > IGNORE_INDEX:
            raise DataError(
                f"Invalid number of classes: {len(self.names)}",
                fix=f"List 2 to {IGNORE_INDEX} classes. Give unused pixels the id {IGNORE_INDEX} (void) instead of a "
                "class.",
            )
        bad = sorted(name for name, n in Counter(self.names).items() if n > 1 or not name.strip())
        if bad:
            raise DataError(
                "Repeated or empty class names: "
                f"{', '.join(f'{name!r} {self.names.count(name)} times' for name in bad)}",
                fix="Rename or remove them.",
            )
        channels = [channel for colour in self.colours for channel in colour]
        if len(self.colours) != len(self.names) or any(not 0 <= c <= 255 for c in channels):
            raise DataError(
                f"Invalid colours for {len(self.names)} classes: {self.colours}",
                fix="Give every class one RGB triple of 0 to 255, or give no colours.",
            )


@dataclass(frozen=True)
class ClassMatch:
    """The result of comparing a data set's class names with a model's class names.

    Attributes:
        shared: names that are in both lists, in the model's order.
        missing: names that only the model has.
        void: names that only the data set has. Labels of these classes become void.
    """

    shared: tuple[str, ...]
    missing: tuple[str, ...]
    void: tuple[str, ...]


class Pickled:
    """A base class for frozen dataclasses with slots, which makes pickling three times faster than the default.

    The pickle holds the class and the values of its fields. `__match_args__` has the names of the fields, and every
    dataclass sets it.
    """

    __slots__ = ()
    __match_args__: ClassVar[tuple[str, ...]]

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), tuple(getattr(self, name) for name in self.__match_args__)


class Source(Pickled, ABC, Generic[Values]):
    """A sample's image or label, which is read from its origin on request.

    A source holds a path, or a function and a number, but never pixels. Subclasses define `read`, and override other
    methods if needed.
    """

    __slots__ = ()

    @property
    def path(self) -> Path | None:
        """The file that holds this array, or None if no file does."""
        return None

    @abstractmethod
    def read(self) -> Values:
        """Return the array as a new contiguous copy.

        An image is uint8 (H, W, 3). A segmentation label is uint8 (H, W), a depth label float32 (H, W) in metres.

        Raises: DataError for a file that cannot be read or does not fit the sample.
        """

    def raw(self) -> Values:
        """Return the array like `read`, but do not check that a label fits its image's size and its classes.

        Reports use it, to show faulty labels.
        """
        return self.read()

    def size(self) -> tuple[int, int]:
        """Return the array's (height, width) in pixels, from the file's header if possible.

        Raises: DataError for a file that cannot be read or does not fit the sample.
        """
        height, width, *_ = self.read().shape
        return height, width

    def digest(self, of_file: FileDigest | None = None) -> str:
        """Return the SHA-256 (hex) of the file's bytes, or of the array if no file holds it.

        Args:
            of_file: computes a file's SHA-256, for example from a store of known digests. None reads the file.
        """
        array = self.read()
        return hashlib.sha256(repr(array.shape).encode() + np.ascontiguousarray(array).tobytes()).hexdigest()


@dataclass(frozen=True, slots=True, eq=False)
class Numbered(Source[Values]):
    """A source whose array is `function(number)`, for example item `number` of a data set in memory."""

    function: Callable[[int], Values]
    number: int

    def read(self) -> Values:
        """Return the array that `function` returns for `number`, both attributes. Raises: the function's errors."""
        return self.function(self.number)


@dataclass(frozen=True, slots=True, eq=False)
class Sample(Pickled):
    """An image with its labels.

    Attributes:
        id: a name that is unique in its split and stays the same when the split is opened again.
        image: source of the image, uint8 (H, W, 3), RGB, rotated as its EXIF data say.
        labels: task ("segmentation" or "depth") -> source of the label. Tasks without a label are absent.
        origin: a name of the image itself, equal in two splits only if both have the same image.
    """

    id: str
    image: Source[Pixels]
    labels: Mapping[str, Source[Any]]
    origin: str


@dataclass(frozen=True, eq=False, repr=False)
class Split:
    """One split of a data set: its samples and classes.

    Attributes:
        data: the data set's folder or spec, as the user gave it.
        split: the split's name.
        classes: names and colours of the label ids.
        samples: sorted by id. The methods' `index` is a position in it.
        label_map: uint8 (256,), the class id for every number in the label files. None if the numbers are class ids.
        match: how class names were mapped to a model's classes, or None if they were not mapped.
        fold_ids: all ids of the split from which this one was taken, so that folds stay the same. None means `ids`.
        known_digest: the result of `digest`. None means that `digest` computes it.
        id_rule: how the ids were derived, in words. Empty if ids are file names.
    """

    data: str
    split: str
    classes: ClassList
    samples: tuple[Sample, ...]
    label_map: Pixels | None = None
    match: ClassMatch | None = None
    fold_ids: tuple[str, ...] | None = None
    known_digest: str | None = None
    id_rule: str = ""

    def __len__(self) -> int:
        return len(self.samples)

    def __repr__(self) -> str:
        tasks = " and ".join(self.tasks) or "no labels"
        ids = f"; ids are {self.id_rule}" if self.id_rule else ""
        return f"<{self.data}, split {self.split}: {len(self)} samples, {tasks}{ids}>"

    @cached_property
    def ids(self) -> tuple[str, ...]:
        """The unique ids of all samples, in the order of `samples`."""
        return tuple(sample.id for sample in self.samples)

    @cached_property
    def tasks(self) -> tuple[str, ...]:
        """The tasks for which at least one sample has a label: "segmentation", "depth", both or none. Reads no file."""
        return tuple(task for task in TASKS if any(task in sample.labels for sample in self.samples))

    def image(self, index: int) -> Pixels:
        """Return the image of sample number `index` as a new contiguous array.

        It is uint8 (H, W, 3), RGB, rotated as its EXIF data say. Samples are numbered from 0 in the order of `samples`.

        Raises: DataError for a file that cannot be read.
        """
        return self.samples[index].image.read()

    def image_size(self, index: int) -> tuple[int, int]:
        """Return (height, width) in pixels of the image of sample number `index`, from the file's header if possible.

        Raises: DataError for a file that cannot be read.
        """
        return self.samples[index].image.size()

    @overload
    def label(self, index: int, task: Literal["segmentation"] = ...) -> Pixels | None: ...
    @overload
    def label(self, index: int, task: Literal["depth"]) -> Depth | None: ...
    @overload
    def label(self, index: int, task: str) -> Pixels | Depth | None: ...
    def label(self, index: int, task: str = SEGMENTATION) -> Pixels | Depth | None:
        """Return the label of sample number `index` for a task, or None if it has no such label.

        The label has the image's size.

        "segmentation" gives class ids, uint8 (H, W), 255 for void. "depth" gives metres above 0, float32 (H, W), NaN
        for unknown.

        Raises:
            DataError: the label does not fit the image, has ids without a class, or has impossible depths.
            ValueError: for an unknown task.
        """
        source = self._source(index, task)
        return None if source is None else source.read()

    def has_label(self, index: int, task: str = SEGMENTATION) -> bool:
        """Return whether sample number `index` has a label for the task, "segmentation" or "depth". Reads no file."""
        return task in self.samples[index].labels

    def labelled(self, *tasks: str) -> list[int]:
        """Return the positions in `samples` of those samples that have a label for any of the tasks. Reads no file.

        `tasks` are "segmentation" or "depth". Without arguments, any label counts.
        """
        counted = tasks or tuple(TASKS)
        return [number for number, sample in enumerate(self.samples) if any(task in sample.labels for task in counted)]

    def raw_label(self, index: int, task: str = SEGMENTATION) -> Any:
        """Return the label of sample number `index` as `label` does, but without checks.

        Return None if the sample has no such label.

        Reports on broken data use it. The label may have ids without a class, impossible depths, or another size.

        Raises:
            DataError: for a file that cannot be read.
            ValueError: for an unknown task.
        """
        source = self._source(index, task)
        return None if source is None else source.raw()

    def content_digests(self, index: int, of_file: FileDigest | None = None) -> tuple[str | None, ...]:
        """Return the SHA-256 (hex) of a sample's image, segmentation label and depth label, in this order.

        A missing segmentation label gives None. If the depth label is missing, the tuple has only two items. Each
        digest covers the file's bytes, or the array if no file holds it.

        Args:
            index: the sample's position in the split.
            of_file: computes a file's SHA-256. None reads the file.
        """
        sample = self.samples[index]
        labels = [sample.labels[task].digest(of_file) if task in sample.labels else None for task in TASKS]
        while labels[-1] is None and len(labels) > 1:
            labels.pop()
        return sample.image.digest(of_file), *labels

    def folds(self, folds: int, by: str | None = None) -> npt.NDArray[np.int64]:
        """Return the fold number of every sample, int64 (N,), from 0 to `folds` - 1.

        A sample's fold depends on the ids of all samples. A part of a split keeps the folds of the whole split.

        Args:
            folds: the number of folds.
            by: a regular expression whose match in an id names a sequence that must stay in one fold, or None.

        Raises: RecipeError unless there are 2 to 255 folds and a sample or sequence for each, or if `by` is invalid.
        """
        if self.fold_ids is None:
            return folds_of(self.ids, folds, by)
        of_id = dict(zip(self.fold_ids, folds_of(self.fold_ids, folds, by).tolist(), strict=True))
        return np.array([of_id[sample] for sample in self.ids], np.int64)

    def digest(self) -> str:
        """Return the SHA-256 (hex) of class names, sample ids and `label_map`. File contents do not count."""
        return self.known_digest or ids_digest(self.classes.names, self.ids, self.label_map)

    def _source(self, index: int, task: str) -> Source[Any] | None:
        if task not in TASKS:
            raise ValueError(f"a task is one of {', '.join(TASKS)}, got {task!r}")
        return self.samples[index].labels.get(task)


def ids_digest(class_names: Sequence[str], ids: Sequence[str], label_map: Pixels | None = None) -> str:
    """Return the SHA-256 (hex) of class names, sample ids and an optional label map.

    `Split.digest` returns this value, and a cache's manifest stores it. `label_map` is uint8 (256,), the class id for
    every number in label files. None means that numbers are class ids.
    """
    content: list[list[str] | list[int]] = [list(class_names), list(ids)]
    if label_map is not None:
        content.append(label_map.tolist())
    return hashlib.sha256(json.dumps(content, ensure_ascii=True).encode("ascii")).hexdigest()


def ids_out_of_range(label: Pixels, classes: int) -> dict[int, int]:
    """Return id -> number of its pixels, for the label ids that are neither void nor below `classes`.

    `label` is uint8 of any shape, and `classes` is the number of classes.
    """
    counts = np.bincount(label.reshape(-1), minlength=256)
    return {int(i): int(counts[i]) for i in np.flatnonzero(counts[:IGNORE_INDEX]) if i >= classes}


def default_colours(count: int, taken: Iterable[tuple[int, int, int]] = ()) -> tuple[tuple[int, int, int], ...]:
    """Return `count` distinct RGB colours that are not in `taken`.

    They come from the PASCAL VOC colour map, from index 1 on. Index 0, black, is left out.
    """
    used = set(taken)
    free = (colour for colour in map(voc_colour, range(1, 256 + len(used))) if colour not in used)
    return tuple(itertools.islice(free, count))


def voc_colour(index: int) -> tuple[int, int, int]:
    """Return the (r, g, b) at an index of the PASCAL VOC colour map. For example, 1 gives (128, 0, 0)."""
    r, g, b = (sum(((index >> (3 * bit + channel)) & 1) << (7 - bit) for bit in range(8)) for channel in range(3))
    return r, g, b
