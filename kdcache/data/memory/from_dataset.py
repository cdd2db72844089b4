"""A map-style data set in memory (PyTorch or Hugging Face) as a split."""

from __future__ import annotations

import hashlib
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Annotated, Any

import numpy as np
from annotated_types import Ge, Le

from kdcache.data.memory.items import Key, Keys, depth_of, find_keys, image_of, label_of, naming_item, part_of
from kdcache.data.memory.opened import PREFIX, register
from kdcache.data.sample import ClassList, Depth, Numbered, Pixels, Sample, Split, Values, ids_digest
from kdcache.errors import DataError
from kdcache.tasks import DEPTH, IGNORE_INDEX, SEGMENTATION

Progress = Callable[[int, int], None]
_READINGS = 5
"""Times that three items are read, to see whether they change: a flip of every other image escapes once in 4,096."""


class Items:
    """The items of a data set that the program holds, as arrays by their numbers there.

    Args:
        items: the data set.
        keys: where an item has its parts.
        classes: names in the order of the ids.
        void: the number in labels that means no class.
        data: the data set's name in messages.
    """

    def __init__(self, items: Any, keys: Keys, classes: ClassList, void: int, data: str) -> None:
        self._items, self._keys, self._classes, self._void, self._data = items, keys, classes, void, data
        self._start()

    def _start(self) -> None:
        self._lock, self._last = threading.Lock(), threading.local()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("_lock", "_last")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._start()

    def image(self, number: int) -> Pixels:
        """Return the image of an item as RGB pixels."""
        value, where = self._part(number, self._keys.image), self._where(number)
        with naming_item(where):
            return image_of(value, where)

    def label(self, number: int) -> Pixels:
        """Return the class ids of an item."""
        value, where, size = self._part(number, self._keys.label), self._where(number), self._size(number)
        with naming_item(where):
            return self._there(label_of(value, size, self._classes.names, self._void, where), where)

    def depth(self, number: int) -> Depth:
        """Return the depth of an item."""
        value, where, size = self._part(number, self._keys.depth), self._where(number), self._size(number)
        with naming_item(where):
            return self._there(depth_of(value, size, where), where)

    def _size(self, number: int) -> tuple[int, int]:
        height, width, _ = self.image(number).shape
        return height, width

    def _part(self, number: int, key: Key | None) -> Any:
        """Return a part of an item, which is kept until this thread reads another one: its parts are read together.

        One at a time: a data set of torch is read by one thread of a process.
        """
        where = self._where(number)
        if getattr(self._last, "number", None) != number:
            with self._lock:
                self._last.item = read_item(self._items, number, where)
            self._last.number = number
        with naming_item(where):
            return part_of(self._last.item, key)

    def _where(self, number: int) -> str:
        return f"item {number} of {self._data}"

    @staticmethod
    def _there(label: Values | None, where: str) -> Values:
        if label is None:
            raise DataError(
                f"{where} has no label, though it had one before",
                fix="Leave ids out: kdcache then reads all samples once, and knows those without a label.",
            )
        return label


def from_dataset(
    dataset: Any,
    classes: ClassList | Sequence[str],
    *,
    split: str | None = None,
    name: str | None = None,
    ids: str | Sequence[str] | None = None,
    image: Key | None = None,
    label: Key | None = None,
    depth: Key | None = None,
    void: Annotated[int, Ge(0), Le(255)] = IGNORE_INDEX,
    progress: Progress | None = None,
) -> Split:
    """Turn a data set in memory into a split, for builds, trainings and evaluations.

    >>> import kdcache
    >>> pixels, label = np.zeros((48, 64, 3), np.uint8), np.ones((48, 64), np.uint8)
    >>> split = kdcache.from_dataset([(pixels, label)], classes=["road", "car"], split="val")
    >>> split.label(0).max()
    np.uint8(1)

    Ids identify samples in caches and digests. With `ids` they come from a column, and their digest covers only names
    and classes, as for a folder. Without, every sample is read once, and its id is its number and a digest of its
    contents. Either way, a cache fails on an image that renders to other pixels than its teacher saw.

    Args:
        dataset: map-style, with a length and numbers as keys. An item is a mapping or tuple of an image (Pillow, uint8)
            and a label (class ids), before any augmentation or normalisation.
        classes: names in the order of the ids.
        split: its name. Default: the data set's own, else `train`.
        name: its name in recipes and messages. Default: the data set's own.
        ids: the column that has them, or one for each sample. Default: number and digest of contents.
        image: key of an item's image, or its place in a tuple. Default: a usual name, such as `image`.
        label: key or place of the label. Default: a usual name, such as `label` or `mask`.
        depth: key or place of depth in metres. No default.
        void: the number in labels that means no class. 255 always does.
        progress: called with (samples read, samples), if all are read.
    Raises: DataError for items of another form, that differ from one reading to the next, or whose ids are not unique.
    """
    count = _length(dataset)
    classes = classes if isinstance(classes, ClassList) else ClassList(_names(classes))
    first = read_item(dataset, 0, "item 0")
    keys = find_keys(first, image, label, depth, "item 0")
    split = split or str(getattr(dataset, "split", None) or "train").partition("[")[0]
    name = _plain(name or _own_name(dataset))
    _check_still(dataset, keys, count, classes, void)
    labelled = {SEGMENTATION: [keys.label is not None] * count, DEPTH: [keys.depth is not None] * count}
    if ids is not None:
        texts, rule = _given_ids(dataset, ids, count), "as given" if not isinstance(ids, str) else f"of column {ids}"
    else:
        texts, labelled = _ids_of_contents(dataset, keys, count, classes, void, progress)
        rule = "numbers and digests of contents: every sample was read once"
    order = sorted(range(count), key=texts.__getitem__)
    data = f"{PREFIX}{name}@{ids_digest(classes.names, [texts[number] for number in order])[:12]}"
    items = Items(dataset, keys, classes, void, data)
    read_image = items.image
    read: dict[str, Callable[[int], Any]] = {SEGMENTATION: items.label, DEPTH: items.depth}
    samples = tuple(
        Sample(
            id=texts[number],
            image=Numbered(read_image, number),
            labels={task: Numbered(read[task], number) for task, flags in labelled.items() if flags[number]},
            origin=f"{data} {split} {texts[number]}",
        )
        for number in order
    )
    made = Split(data, split, classes, samples, id_rule=rule)
    register(made)
    return made


def read_item(dataset: Any, number: int, where: str) -> Any:
    """Return an item of a data set. Raises: DataError if the data set fails on it."""
    with naming_item(where):
        return dataset[number]


def _length(dataset: Any) -> int:
    if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        raise DataError(
            f"Cannot use a {type(dataset).__name__} as a data set: it has no length and items by number",
            fix="Give a torch.utils.data.Dataset, a Hugging Face Dataset (not streaming), a list of items, or a "
            "DataLoader's .dataset.",
        )
    if isinstance(dataset, dict) or hasattr(dataset, "keys"):
        raise DataError(
            f"Cannot use several splits at once: {type(dataset).__name__} with "
            f"{', '.join(map(str, list(dataset.keys())[:5]))}",
            fix="Pick one: kdcache.from_dataset(splits['train'], ...)",
        )
    with naming_item("the length of the data set"):
        count = len(dataset)
    if not count:
        raise DataError("The data set is empty", fix="Give one with samples.")
    return count


def _names(classes: Any) -> tuple[str, ...]:
    """Return class names. Raises: DataError for an invalid list."""
    if isinstance(classes, str) or not isinstance(classes, Iterable) or not all(isinstance(c, str) for c in classes):
        raise DataError(
            f"Invalid value of classes: {repr(classes)[:80]}",
            fix="Give names in the order of the ids in labels, such as ['road', 'car']. A Hugging Face ClassLabel has "
            "them as .names",
        )
    return tuple(classes)


def _own_name(dataset: Any) -> str:
    info = getattr(getattr(dataset, "info", None), "dataset_name", None)
    return str(info) if info else type(dataset).__name__.lower()


def _plain(name: str) -> str:
    return re.sub(r"[^\w.-]+", "-", name).strip("-") or "data"


def _given_ids(dataset: Any, ids: str | Sequence[str], count: int) -> list[str]:
    """Return the ids of a column, or the given ids. Raises: DataError unless each sample has a unique one."""
    if isinstance(ids, str):
        columns = getattr(dataset, "column_names", None)
        if columns is not None and ids in columns:
            values: Sequence[Any] = list(dataset[ids])
        else:
            values = [_column(read_item(dataset, number, f"item {number}"), ids, number) for number in range(count)]
    else:
        values = list(ids)
    texts = [str(value) for value in values]
    repeated = [text for text, times in Counter(texts).items() if times > 1 or not text]
    if len(texts) != count or repeated:
        raise DataError(
            f"Invalid ids: {len(texts)} for {count} samples"
            + (f", {repeated[0]!r} twice or empty" if repeated else ""),
            fix="Name a column whose values differ. Or leave ids out, for numbers and digests of contents.",
        )
    return texts


def _column(item: Any, column: str, number: int) -> Any:
    try:
        return item[column]
    except (KeyError, TypeError, IndexError) as error:
        offered = ", ".join(map(str, item)) if hasattr(item, "keys") else type(item).__name__
        raise DataError(
            f"Unknown column of ids: {column!r} (item {number} has {offered})",
            fix="Name a column that exists, give a list of ids, or leave ids out.",
        ) from error


def _contents(item: Any, keys: Keys, classes: ClassList, void: int, where: str) -> tuple[str, bool, bool]:
    """Return (Digest of an item's image and labels, whether it has a label of classes, and of depth)."""
    with naming_item(where):
        pixels = image_of(part_of(item, keys.image), where)
        size = (pixels.shape[0], pixels.shape[1])
        label = label_of(part_of(item, keys.label), size, classes.names, void, where)
        metres = depth_of(part_of(item, keys.depth), size, where)
    digest = hashlib.sha256()
    for array in (pixels, label, metres):
        digest.update(b"none" if array is None else repr(array.shape).encode() + np.ascontiguousarray(array).tobytes())
    return digest.hexdigest(), label is not None, metres is not None


def _ids_of_contents(
    dataset: Any, keys: Keys, count: int, classes: ClassList, void: int, progress: Progress | None
) -> tuple[list[str], dict[str, list[bool]]]:
    """Return ids of number and digest, and which samples have labels of each task. Reads every item."""
    texts, labelled = list[str](), {SEGMENTATION: list[bool](), DEPTH: list[bool]()}
    for number in range(count):
        item = read_item(dataset, number, f"item {number}")
        digest, has_label, has_depth = _contents(item, keys, classes, void, f"item {number}")
        texts.append(f"{number:07d}-{digest[:16]}")
        labelled[SEGMENTATION].append(has_label)
        labelled[DEPTH].append(has_depth)
        if progress is not None:
            progress(number + 1, count)
    return texts, labelled


def _check_still(dataset: Any, keys: Keys, count: int, classes: ClassList, void: int) -> None:
    """Raise DataError if items change from one reading to the next."""
    for number in sorted({0, count // 2, count - 1}):
        where = f"item {number}"
        digests = {_contents(read_item(dataset, number, where), keys, classes, void, where) for _ in range(_READINGS)}
        if len(digests) > 1:
            raise DataError(
                f"{where} differs from one reading to the next",
                fix="Take the augmentation out of the data set, as the build and the training draw views. Or keep it "
                "in your own loop, with Cache.targets_for (docs: Use your own training loop).",
            )
