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
    """A lookup of the images below a data set's folder by the names in annotation files.

    Args:
        root: the data set's folder. Results are always inside it.
        place: the folder below `root` in which bare file names are searched. Empty means all of `root`.
    """

    def __init__(self, root: Path, place: str = "") -> None:
        self._root, self._place = root, place

    def find(self, name: str, *folders: str) -> str | None:
        """Return the image that a name refers to, as a path below the root, or None.

        The name may be a path below one of `folders`, or the last parts of an image's path. If several images fit
        equally well, the result is None.

        Args:
            name: the image's name in an annotation file. Backslashes count as slashes unless such a file exists.
            folders: folders below the root to look in first. Default: the root.
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
    """Return whether a normalised relative path stays inside its folder. "../a.png" and "/a.png" do not."""
    return not path.startswith(("/", "../")) and path != ".."


def is_mask(path: str) -> bool:
    """Return whether a folder in a picture's path has a name for labels, such as masks/ or annotations/."""
    return not MASKS.isdisjoint(part.lower() for part in path.split("/")[:-1])


def holds_masks(root: Path) -> bool:
    """Return whether a picture lies in a folder for labels, such as masks/ or annotations/, anywhere below `root`."""
    for folder, folders, names in walk_once(root):
        folders.sort(key=lambda name: (name.lower() not in MASKS, name))  # where the first one lies, if any does
        parts = Path(folder).relative_to(root).parts
        if not MASKS.isdisjoint(part.lower() for part in parts) and any(is_picture(name) for name in names):
            return True
    return False


def _common(first: list[str], second: list[str]) -> int:
    """Return how many items at the beginning of two lists are equal."""
    return next(
        (n for n, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second))
    )
