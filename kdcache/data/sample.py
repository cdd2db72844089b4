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
    """Class names in the order of their ids, and a colour for each.

    Args:
        names: 2 to 255 unique, non-empty names. The position is the id. Empty for data without segmentation.
        colours: RGB, 0 to 255, one per name. Default: distinct colours.

    Raises: DataError for a list or colours that break these rules.
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
        """Return JSON values. `from_json` reverses it."""
        return {"names": list(self.names), "colours": [list(colour) for colour in self.colours]}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> ClassList:
        """Return the class list from the JSON of `to_json`. Raises: DataError as the constructor does."""
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
    """The classes of a data set and of a model that have equal names.

    Attributes:
        shared: names that both have, in the model's order.
        missing: names of the model that the data do not have.
        void: names of the data that the model does not have.
    """

    shared: tuple[str, ...]
    missing: tuple[str, ...]
    void: tuple[str, ...]


class Pickled:
    """A frozen data class with slots that is pickled as its fields: three times faster than by default."""

    __slots__ = ()
    __match_args__: ClassVar[tuple[str, ...]]

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), tuple(getattr(self, name) for name in self.__match_args__)


class Source(Pickled, ABC, Generic[Values]):
    """An array of a sample, an image or a label, that is read when it is asked for.

    It holds a path, or a reader and a number, never pixels. Subclasses define `read`, and the rest if it differs.
    """

    __slots__ = ()

    @property
    def path(self) -> Path | None:
        """The file that holds this array, or None for an array of another origin."""
        return None

    @abstractmethod
    def read(self) -> Values:
        """Return a new contiguous array, as `Split.image` and `Split.label` describe it. Raises: as they do."""

    def raw(self) -> Values:
        """Return the array, not checked against image and classes, for reports on broken data."""
        return self.read()

    def size(self) -> tuple[int, int]:
        """Return (H, W), from the file's header if possible. Raises: as `read`."""
        height, width, *_ = self.read().shape
        return height, width

    def digest(self, of_file: FileDigest | None = None) -> str:
        """Return the SHA-256 of the file, by `of_file` if given, or of the array if no file holds it."""
        array = self.read()
        return hashlib.sha256(repr(array.shape).encode() + np.ascontiguousarray(array).tobytes()).hexdigest()


@dataclass(frozen=True, slots=True, eq=False)
class Numbered(Source[Values]):
    """The array that a function returns for a number, such as a reader's method for an item of a data set."""

    function: Callable[[int], Values]
    number: int

    def read(self) -> Values:
        """Return the function's array. Raises: as the function."""
        return self.function(self.number)


@dataclass(frozen=True, slots=True, eq=False)
class Sample(Pickled):
    """An image with its labels.

    Attributes:
        id: stable and unique in its split.
        image: uint8 (H, W, 3), RGB, EXIF-upright.
        labels: task -> source of the label, for the tasks that have one.
        origin: a name that images of two splits share only if they are the same image.
    """

    id: str
    image: Source[Pixels]
    labels: Mapping[str, Source[Any]]
    origin: str


@dataclass(frozen=True, eq=False, repr=False)
class Split:
    """One split of a data set: its samples and classes.

    Attributes:
        data: the spec or folder as the user gave it.
        split: the split's name.
        classes: names and colours of the label ids.
        samples: in the order of their ids. `index` below counts in this order.
        label_map: uint8 (256,), the class id of every number in the label files, or None if they are class ids already.
        match: how labels were mapped to these classes, or None if they were not.
        fold_ids: in an excerpt, the ids of the whole split, which decide the folds. None: this split's ids.
        known_digest: what `digest` returns. None: the digest of this split's names.
        id_rule: what the ids are made of, in words, and so which changes `digest` can notice. Empty for files.
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
        """The stable unique sample ids, sorted."""
        return tuple(sample.id for sample in self.samples)

    @cached_property
    def tasks(self) -> tuple[str, ...]:
        """The tasks with a label of any sample, in the order of `TASKS`. Reads no file."""
        return tuple(task for task in TASKS if any(task in sample.labels for sample in self.samples))

    def image(self, index: int) -> Pixels:
        """Return the image as a new contiguous array: uint8 (H, W, 3), RGB, EXIF-upright.

        Raises: DataError naming the file.
        """
        return self.samples[index].image.read()

    def image_size(self, index: int) -> tuple[int, int]:
        """Return (H, W) of an image, from the file's header if possible. Raises: as `image`."""
        return self.samples[index].image.size()

    @overload
    def label(self, index: int, task: Literal["segmentation"] = ...) -> Pixels | None: ...
    @overload
    def label(self, index: int, task: Literal["depth"]) -> Depth | None: ...
    @overload
    def label(self, index: int, task: str) -> Pixels | Depth | None: ...
    def label(self, index: int, task: str = SEGMENTATION) -> Pixels | Depth | None:
        """Return the label of a task, of the image's size, or None without one.

        Segmentation is uint8 (H, W) class ids, 255 for void. Depth is float32 (H, W) metres above 0, NaN for unknown.

        Raises: DataError for a file that does not fit this image, ids beyond the classes, or impossible depths;
            ValueError for another task.
        """
        source = self._source(index, task)
        return None if source is None else source.read()

    def has_label(self, index: int, task: str = SEGMENTATION) -> bool:
        """Return whether the sample has a label of a task. Reads no file."""
        return task in self.samples[index].labels

    def raw_label(self, index: int, task: str = SEGMENTATION) -> Any:
        """Return the label of a task or None, not checked against image and classes, for reports on broken data.

        Numbers without a class stay unchanged. Depths may be negative or without a unit.

        Raises: DataError for a file that cannot be read; ValueError for another task.
        """
        source = self._source(index, task)
        return None if source is None else source.raw()

    def content_digests(self, index: int, of_file: FileDigest | None = None) -> tuple[str | None, ...]:
        """Return the SHA-256 of the image, of the label (None without one) and, if there is depth, of the depth.

        A digest covers the file's bytes (`of_file` computes it, if given), or the array if no file holds it.
        """
        sample = self.samples[index]
        labels = [sample.labels[task].digest(of_file) if task in sample.labels else None for task in TASKS]
        while labels[-1] is None and len(labels) > 1:
            labels.pop()
        return sample.image.digest(of_file), *labels

    def folds(self, folds: int, by: str | None = None) -> npt.NDArray[np.int64]:
        """Return the fold of every sample (N,) by `folds_of`. Raises RecipeError as it does."""
        if self.fold_ids is None:
            return folds_of(self.ids, folds, by)
        of_id = dict(zip(self.fold_ids, folds_of(self.fold_ids, folds, by).tolist(), strict=True))
        return np.array([of_id[sample] for sample in self.ids], np.int64)

    def digest(self) -> str:
        """Return the SHA-256 over class names, sample ids and `label_map`. It reads no file, so ignores contents."""
        return self.known_digest or ids_digest(self.classes.names, self.ids, self.label_map)

    def _source(self, index: int, task: str) -> Source[Any] | None:
        if task not in TASKS:
            raise ValueError(f"a task is one of {', '.join(TASKS)}, got {task!r}")
        return self.samples[index].labels.get(task)


def ids_digest(class_names: Sequence[str], ids: Sequence[str], label_map: Pixels | None = None) -> str:
    """Return the SHA-256 of class names, ids and, if given, a label map: `Split.digest`, and a manifest's digest."""
    content: list[list[str] | list[int]] = [list(class_names), list(ids)]
    if label_map is not None:
        content.append(label_map.tolist())
    return hashlib.sha256(json.dumps(content, ensure_ascii=True).encode("ascii")).hexdigest()


def ids_out_of_range(label: Pixels, classes: int) -> dict[int, int]:
    """Return ids of a uint8 label that are neither a class nor void, with their pixel counts."""
    counts = np.bincount(label.reshape(-1), minlength=256)
    return {int(i): int(counts[i]) for i in np.flatnonzero(counts[:IGNORE_INDEX]) if i >= classes}


def default_colours(count: int, taken: Iterable[tuple[int, int, int]] = ()) -> tuple[tuple[int, int, int], ...]:
    """Return `count` distinct RGB colours: the PASCAL VOC colour map from 1 on (0 is black), without `taken`."""
    used = set(taken)
    free = [colour for colour in (voc_colour(i) for i in range(1, 256 + len(used))) if colour not in used]
    return tuple(free[:count])


def voc_colour(index: int) -> tuple[int, int, int]:
    """Return an id's RGB in the PASCAL VOC colour map. Bits 0, 3, 6 are red's high bits; 1, 4, 7 are green's."""
    r, g, b = (sum(((index >> (3 * bit + channel)) & 1) << (7 - bit) for bit in range(8)) for channel in range(3))
    return r, g, b
