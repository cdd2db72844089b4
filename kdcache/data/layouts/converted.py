"""A folder that `data convert` wrote, and its source."""

from __future__ import annotations

from pathlib import Path

from kdcache.data.changes import digest_changes
from kdcache.data.contents import Contents, read_contents
from kdcache.data.layouts.file_split import file_split
from kdcache.data.layouts.registry import LAYOUTS, LayoutRoot
from kdcache.data.sample import Split
from kdcache.errors import DataError
from kdcache.files import read_object

SETTINGS = "converted.json"


class DataWarning(UserWarning):
    """A warning that a data set can be used, but may differ from what the user expects."""


def open_defective(place: LayoutRoot, name: str) -> tuple[Split, dict[str, str]]:
    """Open a split even if files are missing, ids are repeated, or labels have no image.

    `open_split` would raise an error.

    Args:
        place: the data set's layout and folder.
        name: the split's name.

    Returns: the split, and a dict of what was left out: file -> reason.
    """
    layout, root, images = place
    name = layout.split_named(root, name)
    scan = layout.scan(root, name, images)
    dropped = dict.fromkeys(scan.orphans, "no image has this label's name")
    dropped |= dict.fromkeys(scan.foreign, "a label is a PNG or TIFF")
    dropped |= {path: f"another image is {sample!r} already: {first}" for sample, first, path in scan.clashes}
    dropped |= dict.fromkeys(scan.missing, "it is called for, and not there")
    if scan.depth is not None:
        dropped |= dict.fromkeys(scan.depth.orphans, "no image has this depth's name")
    # One name, whatever folder the user is in: the private index of digests goes by it.
    return file_split(f"{layout.name}:{root.resolve()}", name, layout.classes(root), root, scan), dropped


def source_changes(folder: Path, split: str) -> str:
    """Describe in words how the source of a converted data set has changed since the conversion.

    Args:
        folder: the folder that `data convert` wrote.
        split: the split's name.

    Returns: a sentence, or '' if the source is unchanged or no longer exists, or if `folder` was not converted.
    """
    record = read_object(folder / SETTINGS)
    name, _, rest = str(record.get("source", "")).partition(":")
    path, _, images = rest.partition(",images=")
    root = (folder / path).resolve()
    before = record.get("splits", {}).get(split)
    if before is None or name not in LAYOUTS or not root.is_dir():
        return ""
    place = LayoutRoot(LAYOUTS[name], root, folder / images if images else None)
    try:
        changes = digest_changes(Contents.from_json(before), read_contents(open_defective(place, split)[0]))
        change = changes.describe()
    except DataError as error:
        change = error.problem
    if not change:
        return ""
    return f"{root} has changed since {folder} was converted from it: {change}. Convert it into a new folder"
