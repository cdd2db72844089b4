"""The data set interface of kdcache: class names and, per split, samples with stable ids.

The teacher pass, the trainer and the checks all read from a `Split`. It holds paths or seeds, never pixels, so it is
small, picklable (DataLoader workers use forkserver) and quick to open. `image` and `label` return new arrays, which a
caller may modify.

A sample may have a label of every task, of some or of none. Segmentation labels are uint8 with 255 for void, which
limits a class list to 255 classes: every published benchmark in use fits, and the label of a 1024 x 2048 image takes
2 MiB. Depth labels are float32 metres with NaN for unknown depth.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np
import numpy.typing as npt

from kdcache.data.sequences import folds_of
from kdcache.errors import DataError
from kdcache.tasks import DEPTH, IGNORE_INDEX, SEGMENTATION, TASKS

Pixels = npt.NDArray[np.uint8]
FileDigest = Callable[[Path], str]
Depth = npt.NDArray[np.float32]


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


class Split(ABC):
    """One split of a data set: an ordered list of samples.

    Attributes:
        data: the spec or folder as the user gave it.
        split: the split's name.
        classes: names and colours of the label ids.
        ids: stable unique sample ids, sorted. `index` below counts in this order.
        label_map: uint8 (256,), the class id of every number in the label files, or None if they are class ids already.

    Subclasses set these and define `image`, `has_label` and `_segmentation`. Subclasses with depth also define
    `_depth`.
    """

    data: str
    split: str
    classes: ClassList
    ids: tuple[str, ...]
    label_map: Pixels | None = None

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def tasks(self) -> tuple[str, ...]:
        """The tasks with a label of any sample, in the order of `TASKS`. Reads no file."""
        return tuple(task for task in TASKS if any(self.has_label(index, task) for index in range(len(self))))

    @abstractmethod
    def image(self, index: int) -> Pixels:
        """Return the image as a new contiguous array: uint8 (H, W, 3), RGB, EXIF-upright.

        Raises: DataError naming the file.
        """

    def image_size(self, index: int) -> tuple[int, int]:
        """Return (H, W) of an image, from the file's header if possible. Raises: as `image`."""
        height, width, _ = self.image(index).shape
        return height, width

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
        check_task(task)
        return self._depth(index) if task == DEPTH else self._segmentation(index)

    @abstractmethod
    def has_label(self, index: int, task: str = SEGMENTATION) -> bool:
        """Return whether the sample has a label of a task. Reads no file."""

    def raw_label(self, index: int) -> Pixels | None:
        """Return the segmentation label, not checked against image and classes, for reports on broken data.

        Numbers without a class stay unchanged.
        """
        return self._segmentation(index)

    def raw_depth(self, index: int) -> Depth | None:
        """Return the unchecked depth label for reports. Its numbers may be negative or without a unit."""
        return self._depth(index)

    def origin(self, index: int) -> str:
        """Return a name of the image that another split's image has only if it is the same. Reads no file."""
        return f"{self.data} {self.split} {self.ids[index]}"

    def content_digests(self, index: int, of_file: FileDigest | None = None) -> tuple[str | None, ...]:
        """Return the SHA-256 of the image, of the label (or None) and, if any, of the depth.

        Here they are digests of the arrays. A split of files returns digests of the files' bytes, by `of_file` if
        given.
        """
        segmentation, depth = self._segmentation(index), self._depth(index)
        return (
            _array_digest(self.image(index)),
            None if segmentation is None else _array_digest(segmentation),
            *(() if depth is None else (_array_digest(depth),)),
        )

    @abstractmethod
    def _segmentation(self, index: int) -> Pixels | None:
        """Return the label of segmentation, as `label` describes it. Raises: as it does."""

    def _depth(self, index: int) -> Depth | None:
        """Return the label of depth, as `label` describes it. Raises: as it does."""
        return None

    def folds(self, folds: int, by: str | None = None) -> npt.NDArray[np.int64]:
        """Return the fold of every sample (N,) by `folds_of`. Raises RecipeError as it does."""
        return folds_of(self.ids, folds, by)

    def digest(self) -> str:
        """Return the SHA-256 over class names, sample ids and `label_map`. It reads no file, so ignores contents."""
        content: list[list[str] | list[int]] = [list(self.classes.names), list(self.ids)]
        if self.label_map is not None:
            content.append(self.label_map.tolist())
        return hashlib.sha256(json.dumps(content, ensure_ascii=True).encode("ascii")).hexdigest()


class DerivedSplit(Split):
    """A split with samples of other splits. Subclasses say where each comes from, and what differs."""

    @abstractmethod
    def _at(self, index: int) -> tuple[Split, int]:
        """Return the split that a sample comes from, and its number there."""

    def image(self, index: int) -> Pixels:
        """Return the image of the source's sample."""
        source, number = self._at(index)
        return source.image(number)

    def image_size(self, index: int) -> tuple[int, int]:
        """Return (H, W) of the source's image."""
        source, number = self._at(index)
        return source.image_size(number)

    def origin(self, index: int) -> str:
        """Return the origin of the source's sample."""
        source, number = self._at(index)
        return source.origin(number)

    def has_label(self, index: int, task: str = SEGMENTATION) -> bool:
        """Return whether the source's sample has a label of the task."""
        source, number = self._at(index)
        return source.has_label(number, task)

    def raw_label(self, index: int) -> Pixels | None:
        """Return the source's unchecked segmentation label."""
        source, number = self._at(index)
        return source.raw_label(number)

    def raw_depth(self, index: int) -> Depth | None:
        """Return the source's unchecked depth label."""
        source, number = self._at(index)
        return source.raw_depth(number)

    def content_digests(self, index: int, of_file: FileDigest | None = None) -> tuple[str | None, ...]:
        """Return the digests of the source's sample."""
        source, number = self._at(index)
        return source.content_digests(number, of_file)

    def _segmentation(self, index: int) -> Pixels | None:
        source, number = self._at(index)
        return source.label(number)

    def _depth(self, index: int) -> Depth | None:
        source, number = self._at(index)
        return source.label(number, DEPTH)


def check_task(task: str) -> None:
    """Raise ValueError for an unknown task."""
    if task not in TASKS:
        raise ValueError(f"a task is one of {', '.join(TASKS)}, got {task!r}")


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


def _array_digest(array: Pixels | Depth) -> str:
    return hashlib.sha256(repr(array.shape).encode() + np.ascontiguousarray(array).tobytes()).hexdigest()
