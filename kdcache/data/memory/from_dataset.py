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
    """A reader of the items of a user's data set, such as a PyTorch `Dataset`, as arrays.

    Args:
        items: the data set.
        keys: where image and labels lie in an item.
        classes: class names in the order of their ids.
        void: the number in labels that means no class.

    Attributes:
        place: the data set in messages, such as " of memory:NAME@DIGEST". It is '' until the data set has a name.
        tasks: the tasks for which items may have a label: "segmentation", "depth" or both.
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
        """Return the image of item `number`, uint8 (H, W, 3) RGB. Raises: DataError for an item that cannot be read."""
        item, where = self._item(number), self._where(number)
        with naming_item(where):
            return image_of(part_of(item, self._keys.image), where)

    def label(self, task: str, number: int) -> Any:
        """Return the label of item `number` for a task, "segmentation" or "depth".

        It is uint8 (H, W) class ids, or float32 (H, W) metres.

        Raises: DataError for an item that cannot be read, or that no longer has this label.
        """
        label = self._label(task, number, self.image(number))
        if label is None:
            raise DataError(
                f"{self._where(number)} has no label, though it had one before",
                fix="Leave ids out: kdcache then reads all samples once, and knows those without a label.",
            )
        return label

    def contents(self, number: int) -> tuple[str, tuple[str, ...]]:
        """Return the SHA-256 (hex) of an item's image and labels, and the tasks for which it has a label.

        `number` is the item's position. The item is read again, even if it is still in memory.
        """
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
        """Return an item.

        It is kept until this thread reads another item, so that an image and its label are read once.

        Only one thread of a process reads the data set at a time.
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
    """Turn a data set in memory, such as a PyTorch or Hugging Face data set, into a split for kdcache.

    >>> import kdcache
    >>> pixels, label = np.zeros((48, 64, 3), np.uint8), np.ones((48, 64), np.uint8)
    >>> split = kdcache.from_dataset([(pixels, label)], classes=["road", "car"], split="val")
    >>> split.label(0).max()
    np.uint8(1)

    Without `ids`, every sample is read once, and its id is its number and a digest of its contents. With `ids`, the
    split's digest covers only class names and ids.

    Args:
        dataset: has a length, and returns an item for a number. An item is a mapping or tuple with an image (Pillow, or
            uint8) and a label (class ids). Items must not be augmented or normalised.
        classes: class names in the order of their ids.
        split: the split's name. None takes the data set's, or "train".
        name: the name in recipes and messages. None takes the data set's.
        ids: the column with ids, or a list with an id for each sample. None derives ids from the contents.
        image: the image's key in an item, or its position in a tuple. None tries usual names, such as "image".
        label: the label's key or position. None tries usual names, such as "label" or "mask".
        depth: the key or position of depth in metres. None means that there is no depth.
        void: the number in labels that means no class, in addition to 255.
        progress: called with (samples read, samples) if all samples are read.
    Raises: DataError for unsuitable items, items that differ when they are read again, or ids that are not unique.
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
    result = Split(data, split, classes, samples, id_rule=rule)
    register(result)
    return result


def read_item(dataset: Any, number: int, where: str) -> Any:
    """Return `dataset[number]`. Raises: DataError if the data set raises an error.

    `where` names the item in the error's message.
    """
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
    """Return the ids in a column, or the given ids. Raises: DataError unless each sample has a unique id."""
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
    """Return an id from number and digest for every item, and the tasks for which it has a label. Reads every item."""
    texts, tasks = list[str](), list[tuple[str, ...]]()
    for number in range(count):
        digest, labelled = items.contents(number)
        texts.append(f"{number:07d}-{digest[:16]}")
        tasks.append(labelled)
        if progress is not None:
            progress(number + 1, count)
    return texts, tasks


def _check_still(items: Items, count: int) -> None:
    """Raise DataError if items change when they are read again."""
    for number in sorted({0, count // 2, count - 1}):
        if len({items.contents(number) for _ in range(_READINGS)}) > 1:
            raise DataError(
                f"item {number} differs from one reading to the next",
                fix="Take the augmentation out of the data set, as the build and the training draw views. Or keep it "
                "in your own loop, with Cache.targets_for (docs: Use your own training loop).",
            )
