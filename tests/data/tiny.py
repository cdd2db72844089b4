"""Writes tiny data sets in each public layout: real files, with every number that a layout's labels may hold.

Loaded by path (`runpy`), because tests of other rooms use it too.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

SIZE = (32, 48)
NUMBERS = {
    "folder": (0, 1, 2, 255),
    "mmseg": (0, 1, 2, 255),
    "kaggle": (0, 1, 2, 255),
    "coco": (0, 1, 2, 3),
    "camvid": tuple(range(12)),
    "voc": (*range(21), 255),
    "cityscapes": tuple(range(34)),
    "gta5": tuple(range(35)),
    "ade20k": tuple(range(151)),
}
"""What label files hold, before any mapping."""

TRAIN, VAL = ("b", "a", "c.1"), ("d",)


def numbers(layout: str, name: str = "") -> np.ndarray:
    """A label of 32 x 48 with every number of the layout; others begin elsewhere."""
    start = zlib.crc32(name.encode()) % 7
    return np.resize(np.roll(NUMBERS[layout], start), SIZE).astype(np.uint8)


def save_image(path: Path, size: tuple[int, int] = SIZE) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(zlib.crc32(path.name.encode())).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def save_label(path: Path, ids: np.ndarray, palette: bool = False) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(ids)
    if palette:
        image.putpalette(np.random.default_rng(0).integers(0, 256, 768, dtype=np.uint8).tobytes())
        assert image.mode == "P"
    image.save(path)


def write_list(path: Path, lines: Sequence[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))


def write(layout: str, root: Path) -> Path:
    """A data set with the splits train (three samples) and val (one), begun in `root`; returns it."""
    root.mkdir(parents=True, exist_ok=True)
    for split, names in (("train", TRAIN), ("val", VAL)):
        _WRITERS[layout](root, split, names)
    return root


def _folder(root: Path, split: str, names: Sequence[str]) -> None:
    (root / "classes.txt").write_text("road\ncar\nsky\n")
    for name in names:
        save_image(root / f"images/{split}/{name}.jpg")
        save_label(root / f"labels/{split}/{name}.png", numbers("folder", name))


def _mmseg(root: Path, split: str, names: Sequence[str]) -> None:
    (root / "classes.txt").write_text("road\ncar\nsky\n")
    for name in names:
        save_image(root / f"img_dir/{split}/{name}.jpg")
        save_label(root / f"ann_dir/{split}/{name}.png", numbers("mmseg", name))


def _kaggle(root: Path, split: str, names: Sequence[str]) -> None:
    """Masks in the colours of the classes."""
    (root / "classes.txt").write_text("road 1 2 3\ncar 200 0 0\nsky 0 0 255\n")
    colours = np.zeros((256, 3), np.uint8)
    colours[:3] = (1, 2, 3), (200, 0, 0), (0, 0, 255)
    for name in names:
        save_image(root / f"{split}/images/{name}.jpg")
        save_label(root / f"{split}/masks/{name}_mask.png", colours[numbers("kaggle", name)])


def _coco(root: Path, split: str, names: Sequence[str]) -> None:
    """Objects of three categories as run lengths; `cloud` is not in classes.txt, so it is void."""
    (root / "classes.txt").write_text("background\nroad\ncar\n")
    images, annotations = [], []
    for number, name in enumerate(names):
        save_image(root / f"{split}2017/{name}.jpg")
        images.append({"id": number, "file_name": f"{name}.jpg", "height": SIZE[0], "width": SIZE[1]})
        for category in (1, 2, 3):
            flat = (numbers("coco", name) == category).reshape(-1, order="F")
            edges = np.flatnonzero(np.diff(np.concatenate([[False], flat, [not flat[-1]]]).astype(int)))
            counts = np.diff(np.concatenate([[0], edges])).tolist()
            annotations.append(
                {
                    "id": len(annotations),
                    "image_id": number,
                    "category_id": 10 * category,
                    "iscrowd": 0,
                    "segmentation": {"size": list(SIZE), "counts": counts},
                }
            )
    categories = [{"id": 10 * n, "name": name} for n, name in enumerate(("road", "car", "cloud"), 1)]
    path = root / f"annotations/instances_{split}2017.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))


def _camvid(root: Path, split: str, names: Sequence[str]) -> None:
    for name in names:
        save_image(root / f"{split}/{name}.png")
        save_label(root / f"{split}annot/{name}.png", numbers("camvid", name))
    write_list(
        root / f"{split}.txt", [f"/SegNet/CamVid/{split}/{n}.png /SegNet/CamVid/{split}annot/{n}.png" for n in names]
    )


def _voc(root: Path, split: str, names: Sequence[str]) -> None:
    lists = root / "ImageSets/Segmentation"
    for name in names:
        save_image(root / f"JPEGImages/{name}.jpg")
        save_label(root / f"SegmentationClass/{name}.png", numbers("voc", name), palette=True)
        save_label(root / f"SegmentationObject/{name}.png", numbers("voc", name), palette=True)
    save_image(root / "JPEGImages/in_no_list.jpg")
    write_list(lists / f"{split}.txt", names)
    both = [
        line for part in ("train", "val") if (lists / f"{part}.txt").exists() for line in _lines(lists / f"{part}.txt")
    ]
    write_list(lists / "trainval.txt", both)


def _cityscapes(root: Path, split: str, names: Sequence[str]) -> None:
    for name in names:
        city, stem = f"{split}stadt", f"{split}stadt_{name}"
        save_image(root / f"leftImg8bit/{split}/{city}/{stem}_leftImg8bit.png")
        fine = root / f"gtFine/{split}/{city}"
        save_label(fine / f"{stem}_gtFine_labelIds.png", numbers("cityscapes", name))
        save_image(fine / f"{stem}_gtFine_color.png")
        save_label(fine / f"{stem}_gtFine_instanceIds.png", np.full(SIZE, 26001, np.uint16))
        (fine / f"{stem}_gtFine_polygons.json").write_text(json.dumps({"objects": []}))


def _gta5(root: Path, split: str, names: Sequence[str]) -> None:
    for name in names:
        save_image(root / f"images/{name}.png")
        save_label(root / f"labels/{name}.png", numbers("gta5", name), palette=True)
    write_list(root / f"{split}.txt", [f"{name}.png" for name in names])


def _ade20k(root: Path, split: str, names: Sequence[str]) -> None:
    folder = {"train": "training", "val": "validation"}[split]
    for name in names:
        save_image(root / f"images/{folder}/ADE_{split}_{name}.jpg")
        save_label(root / f"annotations/{folder}/ADE_{split}_{name}.png", numbers("ade20k", name))
    rows = [
        f"{number}\t0.0100\t{9 * number}\t{number}\t{number % 2}\t{ade_name(number)}\t\t" for number in range(1, 151)
    ]
    write_list(root / "objectInfo150.txt", ["Idx\tRatio\tTrain\tVal\tStuff\tName", *rows])


def ade_name(number: int) -> str:
    """Some with synonyms; two whose first names are the same."""
    return {1: "wall", 2: "building, edifice", 3: "screen, silver screen", 4: "screen, crt"}.get(
        number, f"thing {number}"
    )


def _lines(path: Path) -> list[str]:
    return path.read_text().split()


_WRITERS = {
    "folder": _folder,
    "mmseg": _mmseg,
    "kaggle": _kaggle,
    "coco": _coco,
    "camvid": _camvid,
    "voc": _voc,
    "cityscapes": _cityscapes,
    "gta5": _gta5,
    "ade20k": _ade20k,
}
