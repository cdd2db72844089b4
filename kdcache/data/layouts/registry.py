"""The layout of a data set: named by a prefix (`voc:/data/VOC2012`), or found by the folder's contents."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import NamedTuple

from kdcache.data.classes import CLASSES_FILE, read_classes
from kdcache.data.layouts import exports, own, published
from kdcache.data.layouts.base import Layout
from kdcache.data.layouts.exports.base import Export
from kdcache.data.layouts.own.folder import IMAGES, LABELS, Folder
from kdcache.data.layouts.pictures import holds_masks
from kdcache.data.layouts.published.gta5 import Gta5
from kdcache.data.layouts.scan import folders_in, holds_pictures
from kdcache.errors import DataError, suggest


def _layouts() -> Iterator[Layout]:
    """Yield one instance of each layout class in the packages own, published and exports."""
    for package in (own, published, exports):
        for file in iter_modules(package.__path__, f"{package.__name__}."):
            module = import_module(file.name)
            kinds = (kind for kind in vars(module).values() if isinstance(kind, type) and issubclass(kind, Layout))
            yield from (kind() for kind in kinds if "name" in vars(kind) and kind.__module__ == file.name)


LAYOUTS: dict[str, Layout] = {layout.name: layout for layout in _layouts()}

_MOST_FOLDERS = 20
"""The most folders of a folder in which a data set is looked for to suggest it."""

# Two characters at least: one is a Windows drive.
_OTHER_IMAGES = re.compile(r"(?P<data>.+),\s*images=(?P<images>[^,]*)", re.DOTALL)
_PREFIXED = re.compile(r"(?P<name>[A-Za-z0-9][\w.+-]+):(?P<path>.*)", re.DOTALL)


def convert_command(data: str) -> str:
    """Return the shell command that converts a data set into a new folder in the current directory.

    The new folder is called like the data set's folder, with "-folder" at the end. `data` is the data set as the user
    named it.
    """
    out = f"{split_prefix(split_images(data)[0])[1].resolve().name or 'data'}-folder"
    return f"kdcache data convert {shlex.quote(data)} {shlex.quote(out)}"


class LayoutRoot(NamedTuple):
    """A data set on disk.

    Attributes:
        layout: its layout.
        root: the data set's top folder.
        images: a folder whose images replace the data set's own images, or None.
    """

    layout: Layout
    root: Path
    images: Path | None = None


def find_layout(data: str) -> LayoutRoot:
    """Find the layout of a data set on disk, and the layout's top folder.

    Args:
        data: FOLDER or LAYOUT:FOLDER, perhaps with `,images=FOLDER` for a folder with other images.

    Raises: DataError if the folder or layout does not exist, or if no layout or several layouts fit.
    """
    data, images = split_images(data)
    return _layout_of(data)._replace(images=images)


def split_images(data: str) -> tuple[str, Path | None]:
    """Split "DATA,images=FOLDER" into ("DATA", FOLDER). Without `,images=`, return (data, None).

    A path that exists is never split. Raises: DataError if FOLDER does not exist.
    """
    match = None if Path(data).expanduser().exists() else _OTHER_IMAGES.fullmatch(data)
    if match is None:
        return data, None
    folder = Path(match["images"].strip()).expanduser()
    if not match["images"].strip() or not folder.is_dir():
        raise DataError(
            f"Not a folder: images={match['images']!r} in {data!r}",
            fix="Name a folder with FOLDER/SPLIT/ID.png or FOLDER/ID.png for every sample, or leave out images=.",
        )
    return match["data"], folder


def _layout_of(data: str) -> LayoutRoot:
    """Return the layout and the root for FOLDER or LAYOUT:FOLDER. Raises: DataError like `find_layout`."""
    name, folder = split_prefix(data)
    if not folder.is_dir() and not (name and LAYOUTS[name].of_file and folder.is_file()):
        raise _no_folder(folder)
    if name is not None:
        return _with_its_classes(_named(LAYOUTS[name], folder), folder)
    candidates = _fitting(folder)
    if not candidates or not holds_masks(folder):  # what annotates masks besides is not their labels
        candidates = _fitting(folder, drawn=True) or candidates
    if any(isinstance(candidate.layout, Folder) for candidate in candidates):
        # A classes.txt beside images/ and labels/ makes them one's own data: GTA5's release has none.
        candidates = [
            candidate
            for candidate in candidates
            if not isinstance(candidate.layout, Gta5) or not (candidate.root / CLASSES_FILE).is_file()
        ]
    if len(candidates) == 1:
        return _with_its_classes(candidates[0], folder)
    if candidates:
        raise DataError(
            f"Several layouts fit {folder}: "
            + ", ".join(f"{candidate.layout.name} ({candidate.root})" for candidate in candidates),
            fix="Name the one that is meant: "
            + " or ".join(f"{candidate.layout.name}:{folder}" for candidate in candidates),
        )
    hint = _nearly_a_folder(folder) or _inside(folder) or _around(folder)
    pictures = [
        LayoutRoot(layout, folder) for layout in LAYOUTS.values() if not layout.has_labels and layout.find(folder)
    ]
    if pictures and not hint:
        return pictures[0]
    raise DataError(
        f"Cannot find a data set in {folder}: no layout fits",
        fix=(hint or "Check the path, or lay the data out as images/<split>, labels/<split> and classes.txt.")
        + "".join(f" Or name {place.layout.name}:{folder} for its pictures without labels." for place in pictures),
        rule="\n  ".join(("Layouts:", *(f"{layout.name}: {layout.requirement}" for layout in LAYOUTS.values()))),
    )


def _no_folder(folder: Path) -> DataError:
    archive = folder.name.lower().endswith((".zip", ".tar", ".tgz", ".gz", ".7z", ".rar"))
    files = [name for name, layout in LAYOUTS.items() if layout.of_file and layout.find(folder) is not None]
    if not folder.exists():
        fix = "Check the path. "
    elif files:
        fix = f"Name its layout, {files[0]}:{folder}. "
    else:
        fix = f"{'Unpack it, and name the' if archive else 'Name its'} folder. "
    return DataError(
        f"Not a folder: {folder}" if folder.exists() else f"Data folder not found: {folder}",
        fix=f"{fix}kdcache reads {', '.join(LAYOUTS)}, and the built-in scenes.",
    )


def _fitting(folder: Path, *, drawn: bool = False) -> list[LayoutRoot]:
    """Return the layouts that fit a folder: layouts with label files, or exports with drawn labels if `drawn`."""
    layouts = (layout for layout in LAYOUTS.values() if layout.has_labels and isinstance(layout, Export) == drawn)
    return [LayoutRoot(layout, root) for layout in layouts if (root := layout.find(folder)) is not None]


def split_prefix(data: str) -> tuple[str | None, Path]:
    """Split "LAYOUT:FOLDER" into ("LAYOUT", FOLDER). Without a prefix, return (None, FOLDER).

    A path that exists is never split. Raises: DataError for an unknown layout, or a prefix without a folder.
    """
    folder = Path(data).expanduser()
    match = _PREFIXED.fullmatch(data)
    if match is None or folder.exists():
        return None, folder
    name, path = match["name"], match["path"]
    if name not in LAYOUTS:
        raise DataError(
            f"Unknown layout {name!r} in {data!r}, and no such folder",
            fix=suggest(name.lower(), LAYOUTS, "Name a layout, or check the path. Data must lie on disk.", cutoff=0.5),
            rule=f"Layouts: {', '.join(LAYOUTS)}, and the built-in scenes.",
        )
    if not path:
        raise DataError(
            f"Missing folder after the layout: {data!r}", fix=f"Name the folder, for example {name}:/data/{name}"
        )
    return name, Path(path).expanduser()


def _with_its_classes(place: LayoutRoot, folder: Path) -> LayoutRoot:
    """Return `place`, or raise DataError if `folder`, above the data set, has a class list that would be ignored."""
    above = folder / CLASSES_FILE
    if place.root == folder or not above.is_file() or (place.root / CLASSES_FILE).is_file():
        return place
    if read_classes(folder).names == place.layout.classes(place.root).names:
        return place
    raise DataError(
        f"{above} lists other classes than the data set in {place.root} (layout {place.layout.name})",
        fix=f"Move it to {place.root} if it is meant for these data. Otherwise name {place.root} as the data folder.",
    )


def _nearly_a_folder(folder: Path) -> str:
    """Return advice for a folder that has `images/` but misses parts of the folder layout, or ''."""
    if not (folder / IMAGES).is_dir():
        return ""
    others = [name for name in folders_in(folder) if name not in (IMAGES, LABELS)]
    if not others and not (folder / LABELS).is_dir() and not (folder / CLASSES_FILE).is_file():
        return ""
    steps = [] if (folder / CLASSES_FILE).is_file() else [f"add {CLASSES_FILE} with one class name per line"]
    if others and not (folder / LABELS).is_dir():
        steps.append(f"rename the folder with the labels ({', '.join(others[:3])}) to {LABELS}")
    if not folders_in(folder / IMAGES) and not holds_pictures(folder / IMAGES):
        steps.append(f"put pictures into {IMAGES}/<split>/")
    return f"To use it as a data set, {', '.join(steps)}." if steps else ""


def _inside(folder: Path) -> str:
    """Return advice that names data sets up to two levels below the folder, or ''."""
    children = [folder / name for name in folders_in(folder)[:_MOST_FOLDERS]]
    grandchildren = [child / name for child in children for name in folders_in(child)[:_MOST_FOLDERS]]
    for level in (children, grandchildren):
        fits = [
            f"{subfolder} ({names[0]})"
            for subfolder in level
            if (names := [k for k, v in LAYOUTS.items() if v.has_labels and v.find(subfolder)])
        ]
        if fits:
            return f"Name the folder where the data begin: {', '.join(fits[:3])}."
    return ""


def _around(folder: Path) -> str:
    """Return advice that names the data set around this folder, up to three levels above it, or ''."""
    folder = folder.absolute()
    for above in folder.parents[:3]:
        fits = [candidate.layout.name for candidate in _fitting(above) if folder.is_relative_to(candidate.root)]
        if fits:
            return f"Name the folder where the data begin: {above} ({fits[0]})."
    return ""


def _named(layout: Layout, folder: Path) -> LayoutRoot:
    root = layout.find(folder)
    if root is not None:
        return LayoutRoot(layout, root)
    fits = [candidate.name for candidate in LAYOUTS.values() if candidate.find(folder) is not None]
    raise DataError(
        f"{folder} is not of layout {layout.name}" + (f", but of layout {fits[0]}" if fits else ""),
        fix=f"Name it {fits[0]}:{folder}" if fits else "Check the path, or restore what is missing.",
        rule=f"A folder of layout {layout.name} has {layout.requirement}.",
    )
