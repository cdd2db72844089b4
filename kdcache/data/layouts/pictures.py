"""Find the image that an annotation file means: tools write other folders, separators and whole URLs."""

from __future__ import annotations

import posixpath
from collections import defaultdict
from functools import cached_property
from pathlib import Path

from kdcache.data.layouts.scan import composed, is_picture, names_below, walk_once

MASKS = {"labels", "label", "masks", "mask", "annotations", "ann_dir", "segmentationclass", "segmentationobject"}
"""Folders whose pictures are labels, in lower case."""


class Pictures:
    """The images below a folder of a data set, found by their names in annotation files.

    Args:
        root: the data set's folder. No name leads out of it.
        place: the folder below it that is searched for bare file names. Empty for all of it.
    """

    def __init__(self, root: Path, place: str = "") -> None:
        self._root, self._place = root, place

    def find(self, name: str, *folders: str) -> str | None:
        """Return the path, below the root, of the only image that a name fits, or None.

        A backslash is a separator, unless a file has it in its name. The name may be a path below one of `folders`, or
        the last parts of an image's path. If several images fit equally well, there is no result.

        Args:
            name: the image's name in an annotation file.
            folders: folders below the root. Default: the root.
        """
        plain = name if "\\" not in name else name.replace("\\", "/")
        tail = posixpath.basename(plain)
        for spelling in dict.fromkeys((name, plain, tail)):
            for folder in folders or ("",):
                path = posixpath.normpath(posixpath.join(folder, spelling))
                if is_inside(path) and (self._root / path).is_file():
                    return path
        ends = composed(plain).split("/")[::-1]
        paths = self._by_name.get(composed(tail), [])
        common = {path: _common(composed(path).split("/")[::-1], ends) for path in paths}
        best = [path for path, length in common.items() if length == max(common.values())]
        return best[0] if len(best) == 1 else None

    @cached_property
    def _by_name(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = defaultdict(list)
        for below in names_below(self._root / self._place).values():
            path = posixpath.join(self._place, below)
            if not is_mask(path):
                found[composed(posixpath.basename(path))].append(path)
        return found


def is_inside(path: str) -> bool:
    """Return True if a normalised path below a folder stays below it."""
    return not path.startswith(("/", "../")) and path != ".."


def is_mask(path: str) -> bool:
    """Return True if a picture lies in a folder of labels."""
    return not MASKS.isdisjoint(part.lower() for part in path.split("/")[:-1])


def holds_masks(root: Path) -> bool:
    """Return True if label pictures lie below a folder, so other annotations there are not its labels."""
    for folder, folders, names in walk_once(root):
        folders.sort(key=lambda name: (name.lower() not in MASKS, name))  # where the first one lies, if any does
        parts = Path(folder).relative_to(root).parts
        if not MASKS.isdisjoint(part.lower() for part in parts) and any(is_picture(name) for name in names):
            return True
    return False


def _common(one: list[str], other: list[str]) -> int:
    """Return the number of equal items that two lists begin with."""
    return next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
