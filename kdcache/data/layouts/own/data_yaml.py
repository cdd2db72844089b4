"""The data yaml of Ultralytics' semantic segmentation and depth: `ultralytics:data.yaml`, a file and not a folder.

    path: /data/streets             default: the yaml's folder
    train: images/train             a folder, a list of paths in a .txt, or several of these
    val: images/val
    masks_dir: masks                images/train/a.jpg has masks/train/a.png: class ids, 255 = void
    names: {0: road, 1: car}        a single name: 0 is the background, and 1 that class
    label_mapping: {7: 0, 255: ignore_label}

Without `masks_dir`, images/train/a.jpg may have a depth/train/a.npy in metres, or a.png in 1/depth_scale metres.
Source: https://docs.ultralytics.com/datasets/semantic
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from kdcache.data.layouts.base import Layout
from kdcache.data.layouts.depth import DepthScan, DepthUnit
from kdcache.data.layouts.exports.yolo import class_names, read_yaml
from kdcache.data.layouts.label_ids import LabelIds, id_table
from kdcache.data.layouts.scan import Scan, composed, is_picture, names_below, read_list
from kdcache.data.sample import ClassList, Depth
from kdcache.errors import DataError
from kdcache.tasks import IGNORE_INDEX

SUFFIXES = (".yaml", ".yml")
SPLITS = ("train", "val", "validation", "test")
BACKGROUND = "background"
_IMAGES, _DEPTHS = "images", "depth"
_MILLIMETRES = 1000.0


@dataclass(frozen=True)
class _MetresOf:
    """A reader of depth files: floats are metres, and integers of a PNG are divided by `scale`."""

    scale: float

    def __call__(self, path: Path) -> Depth:
        """Return a file's depth in metres, float32 (H, W). Raises: DataError for a file that cannot be read."""
        return DepthUnit(self.scale if path.suffix == ".png" else None)(path)


class DataYaml(Layout):
    """The layout of Ultralytics' data.yaml. The methods' `root` is the YAML file itself, not a folder."""

    name: ClassVar[str] = "ultralytics"
    looks_for: ClassVar[str] = "data.yaml with train, val, masks_dir and names"
    split_is: ClassVar[str] = f"a key of the yaml: {', '.join(SPLITS)}"
    pairing: ClassVar[str] = "A mask has the path of its image, with masks_dir for images, and the suffix .png."
    of_file: ClassVar[bool] = True

    def find(self, folder: Path) -> Path | None:
        """Return `folder` unchanged if it is a YAML file, or None if it is not."""
        return folder if self.matches(folder) else None

    def matches(self, root: Path) -> bool:
        """Return whether `root` is a file that ends with .yaml or .yml."""
        return root.suffix in SUFFIXES and root.is_file()

    def splits(self, root: Path) -> list[str]:
        """Return the sorted names of the splits that are keys of the YAML file `root`: train, val, validation, test."""
        return sorted(name for name in SPLITS if _read(root).get(name))

    def lists_classes(self, root: Path) -> bool:
        """Return False, because the class names come from `names` in the YAML file and never from a `classes.txt`."""
        return False

    def why(self, root: Path) -> str:
        """Return a phrase for messages: the name of the YAML file `root`, its splits, and that it lists the classes."""
        return f"{root.name} with {', '.join(self.splits(root))}; its names"

    def _classes(self, root: Path) -> ClassList:
        content = _read(root)
        if "masks_dir" not in content:
            return ClassList(())
        names = class_names(root, content)
        if list(names) != list(range(len(names))):
            raise DataError(
                f"Cannot use the names of {root}: their numbers are {', '.join(map(str, names))}",
                fix="Number the names from 0 without a gap.",
            )
        return ClassList((BACKGROUND, *names.values()) if len(names) == 1 else tuple(names.values()))

    def _scan(self, root: Path, split: str) -> Scan:
        content = _read(root)
        images, place = _images(root, content, split), str(content[split])
        masks = {} if "masks_dir" not in content else _beside(images, str(content["masks_dir"]), (".png",))
        depths = _beside(images, _DEPTHS, (".png", ".npy")) if not masks else {}
        if not masks and "masks_dir" in content:
            raise DataError(
                f"No masks of {split} for {root}: masks_dir is {content['masks_dir']}, and the first image is "
                f"{next(iter(images.values()), 'missing')}",
                fix=f"Put them where the path of each image has /{content['masks_dir']}/ for /{_IMAGES}/, as PNG. For "
                "images without labels name their folder: images:FOLDER.",
            )
        if not masks and not depths:
            raise DataError(
                f"No masks in {root}: it has no masks_dir, so its labels are polygons",
                fix=f"Convert the polygons, then use the new folder: kdcache data convert yolo:{_base(root, content)} "
                "FOLDER. If there are masks, add masks_dir.",
            )
        depth = DepthScan(depths, _DEPTHS, _MetresOf(float(content.get("depth_scale") or _MILLIMETRES)))
        return Scan(images, masks, _label_ids(root, content), place, place, depth=depth if depths else None)


def _read(root: Path) -> dict[str, Any]:
    content = read_yaml(root)
    if not isinstance(content, dict):
        raise DataError(f"Cannot read {root}: it holds {type(content).__name__}, no keys", fix="Write train: and val:.")
    return content


def _base(root: Path, content: Mapping[str, Any]) -> Path:
    """Return the folder that the YAML file's paths are relative to. Raises: DataError if it does not exist."""
    named = Path(str(content.get("path") or root.parent)).expanduser()
    places = [named] if named.is_absolute() else [root.parent / named, named]
    found = next((place for place in places if place.is_dir()), None)
    if found is None:
        raise DataError(
            f"Data folder not found: path {named} in {root}",
            fix="Write an absolute path. Ultralytics takes others to be below its own datasets_dir.",
        )
    return found.absolute()


def _images(root: Path, content: Mapping[str, Any], split: str) -> dict[str, str]:
    """Return sample id -> absolute image path, sorted by id. Raises: DataError if a folder or list does not exist."""
    base, given = _base(root, content), content[split]
    places = [base / str(place) for place in (given if isinstance(given, list) else [given])]
    images: dict[str, str] = {}
    for place in places:
        found = list(_in_place(root, place))
        top = place if len(places) == 1 and place.is_dir() else base
        for path in found:
            below = path.relative_to(top) if path.is_relative_to(top) else path
            images[composed(below.with_suffix("").as_posix().lstrip("/"))] = path.as_posix()
    return dict(sorted(images.items()))


def _in_place(root: Path, place: Path) -> Iterator[Path]:
    """Yield the images in a folder, or the images that a list names. Raises: DataError if `place` is neither."""
    if place.is_dir():
        yield from (place / name for name in names_below(place).values())
    elif place.suffix == ".txt" and place.is_file():
        lines = (" ".join(words) for _, words in read_list(place))
        yield from (place.parent / line for line in lines if is_picture(Path(line).name))
    else:
        raise DataError(
            f"Images not found: {place}, named in {root}", fix="Correct path, train and val in that file, or move it."
        )


def _beside(images: Mapping[str, str], folder: str, suffixes: tuple[str, ...]) -> dict[str, str]:
    """Return sample id -> label file, for the images that have one.

    A label's path is its image's path with `folder` instead of the last part `images`, and one of the suffixes.
    """
    files = {}
    for sample, image in images.items():
        before, _, after = image.rpartition(f"/{_IMAGES}/")
        paths = (Path(f"{before}/{folder}/{after}").with_suffix(suffix) for suffix in suffixes)
        if path := next((path for path in paths if path.is_file()), None):
            files[sample] = path.as_posix()
    return files


def _label_ids(root: Path, content: Mapping[str, Any]) -> LabelIds:
    """Return how to map the numbers in masks to class ids. Raises: DataError for an invalid label_mapping."""
    mapping = content.get("label_mapping") or {}
    try:
        given = {int(k): IGNORE_INDEX if v in (None, "ignore_label") else int(v) for k, v in dict(mapping).items()}
    except (TypeError, ValueError) as error:
        raise DataError(f"Cannot use label_mapping of {root}: {error}", fix="Write NUMBER: CLASS ID.") from error
    numbers = {number: given.get(number, number) for number in range(256)}
    rule = f"Masks hold the numbers of names, 0 to {{last}}, or {IGNORE_INDEX} (void)."
    return LabelIds(rule, "Correct names or label_mapping in the yaml.", id_table(numbers) if given else None)
