"""A map-style data set in memory (PyTorch or Hugging Face) as a split."""

from __future__ import annotations

import hashlib
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Annotated, Any

import numpy as np
from annotated_types import Ge, Le

from kdcache.data.memory.items import Key, Keys, depth_of, find_keys, image_of, label_of, naming_item, part_of
from kdcache.data.memory.opened import PREFIX, register
from kdcache.data.sample import ClassList, Numbered, Pixels, Sample, Split, ids_digest
from kdcache.errors import DataError
from kdcache.tasks import DEPTH, IGNORE_INDEX, SEGMENTATION, TASKS

Progress = Callable[[int, int], None]
_READINGS = 5
"""Times that three items are read, to see whether they change: a flip of every other image escapes once in 4,096."""


class Items:
    """The items of a data set in memory, read as arrays by their numbers.

    Args:
        items: the data set.
        keys: where image and labels lie in an item.
        classes: names in the order of the ids.
        void: the number in labels that means no class.

    Attributes:
        place: ` of DATA` for messages, once the data set has a name.
        tasks: the tasks that items have a place for.
    """

    def __init__(self, items: Any, keys: Keys, classes: ClassList, void: int) -> None:
        self._items, self._keys, self.place = items, keys, ""
        readers: dict[str, tuple[Key | None, Callable[..., Any]]] = {
            SEGMENTATION: (keys.label, partial(label_of, classes=classes.names, void=void)),
            DEPTH: (keys.depth, depth_of),
        }
        self._readers = {task: (key, read) for task, (key, read) in readers.items() if key is not None}
        self.tasks = tuple(self._readers)
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
        item, where = self._item(number), self._where(number)
        with naming_item(where):
            return image_of(part_of(item, self._keys.image), where)

    def label(self, task: str, number: int) -> Any:
        """Return the label of an item that has one. Raises: DataError if it is gone."""
        label = self._label(task, number, self.image(number))
        if label is None:
            raise DataError(
                f"{self._where(number)} has no label, though it had one before",
                fix="Leave ids out: kdcache then reads all samples once, and knows those without a label.",
            )
        return label

    def contents(self, number: int) -> tuple[str, tuple[str, ...]]:
        """Read an item again. Return the digest of its image and labels, and the tasks that it has a label of."""
        self._last.number = None
        image = self.image(number)
        labels = {task: self._label(task, number, image) for task in self.tasks}
        digest = hashlib.sha256()
        for array in (image, *(labels.get(task) for task in TASKS)):
            digest.update(
                b"none" if array is None else repr(array.shape).encode() + np.ascontiguousarray(array).tobytes()
            )
        return digest.hexdigest(), tuple(task for task, label in labels.items() if label is not None)

    def _label(self, task: str, number: int, image: Pixels) -> Any:
        key, read = self._readers[task]
        item, where = self._item(number), self._where(number)
        with naming_item(where):
            return read(part_of(item, key), image.shape[:2], where=where)

    def _item(self, number: int) -> Any:
        """Return an item, which is kept until this thread reads another one: an image and its label are one item.

        One at a time: a data set of torch is read by one thread of a process.
        """
        if getattr(self._last, "number", None) != number:
            with self._lock:
                self._last.item = read_item(self._items, number, self._where(number))
            self._last.number = number
        return self._last.item

    def _where(self, number: int) -> str:
        return f"item {number}{self.place}"


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
    items = Items(dataset, keys, classes, void)
    _check_still(items, count)
    if ids is not None:
        texts, tasks = _given_ids(dataset, ids, count), [items.tasks] * count
        rule = f"of column {ids}" if isinstance(ids, str) else "as given"
    else:
        texts, tasks = _ids_of_contents(items, count, progress)
        rule = "numbers and digests of contents: every sample was read once"
    order = sorted(range(count), key=texts.__getitem__)
    data = f"{PREFIX}{name}@{ids_digest(classes.names, [texts[number] for number in order])[:12]}"
    items.place = f" of {data}"
    read_image, readers = items.image, {task: partial(items.label, task) for task in items.tasks}
    samples = tuple(
        Sample(
            id=texts[number],
            image=Numbered(read_image, number),
            labels={task: Numbered(readers[task], number) for task in tasks[number]},
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


def _ids_of_contents(items: Items, count: int, progress: Progress | None) -> tuple[list[str], list[tuple[str, ...]]]:
    """Return ids of number and digest, and the tasks that each sample has a label of. Reads every item."""
    texts, tasks = list[str](), list[tuple[str, ...]]()
    for number in range(count):
        digest, labelled = items.contents(number)
        texts.append(f"{number:07d}-{digest[:16]}")
        tasks.append(labelled)
        if progress is not None:
            progress(number + 1, count)
    return texts, tasks


def _check_still(items: Items, count: int) -> None:
    """Raise DataError if items change from one reading to the next."""
    for number in sorted({0, count // 2, count - 1}):
        if len({items.contents(number) for _ in range(_READINGS)}) > 1:
            raise DataError(
                f"item {number} differs from one reading to the next",
                fix="Take the augmentation out of the data set, as the build and the training draw views. Or keep it "
                "in your own loop, with Cache.targets_for (docs: Use your own training loop).",
            )
