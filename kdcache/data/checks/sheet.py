"""A sheet of samples with labels drawn over the images, which reveals a wrong layout or class list."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from kdcache.data.sample import ClassList, Pixels, Split
from kdcache.errors import DataError, RecipeError
from kdcache.files import replacing
from kdcache.tasks import DEPTH, IGNORE_INDEX

SAMPLES, COLUMNS = 12, 4
TILE = (240, 320)
"""(H, W) that an image is fitted into."""
CAPTION, MARGIN, SWATCH = 18, 6, 12
OPACITY = 0.55
VOID_LEVEL = 0.35
"""What is left of the brightness of void pixels."""
PAPER, INK = (255, 255, 255), (40, 40, 40)


def write_sheet(splits: Sequence[Split], path: Path, samples: int = SAMPLES) -> list[str]:
    """Write a PNG of samples with their labels, evenly spread over the labelled ones (or all, without labels).

    Void is darkened, and the classes present are named below. Samples with only depth show the depth, near is bright.
    Each split gets its share of the samples.

    Returns: SPLIT/ID of the samples on the sheet.
    Raises: RecipeError for a path that does not end in .png, or in a missing folder.
    """
    if path.suffix.lower() != ".png" or not path.absolute().parent.is_dir():
        raise RecipeError(
            f"Invalid value of --sheet: {str(path)!r}",
            fix="Give a PNG file in a folder that exists, for example --sheet sheet.png",
        )
    places = _spread(splits, samples)
    font = ImageFont.load_default(size=13)
    rows = -(-len(places) // COLUMNS)
    height, width = TILE[0] + CAPTION + MARGIN, TILE[1] + MARGIN
    seen = np.zeros(256, np.int64)
    tiles = [_tile(split, index, seen) for split, index in places]
    classes = next((split.classes for split in splits if len(split.classes)), ClassList(()))
    legend = _legend(classes, seen)
    lines, per_line = _legend_lines(legend, COLUMNS * width)
    sheet = Image.new("RGB", (COLUMNS * width + MARGIN, rows * height + MARGIN + lines * (CAPTION + 2)), PAPER)
    drawing = ImageDraw.Draw(sheet)
    for number, ((split, index), tile) in enumerate(zip(places, tiles, strict=True)):
        x, y = MARGIN + number % COLUMNS * width, MARGIN + number // COLUMNS * height
        sheet.paste(tile, (x + (TILE[1] - tile.width) // 2, y + (TILE[0] - tile.height) // 2))
        drawing.text((x, y + TILE[0] + 1), _short(f"{split.split}/{split.ids[index]}", 44), INK, font)
    for number, (name, colour) in enumerate(legend):
        x, y = MARGIN + number % per_line * (COLUMNS * width // per_line), rows * height + number // per_line * CAPTION
        drawing.rectangle((x, y + 2, x + SWATCH, y + 2 + SWATCH), colour, INK)
        drawing.text((x + SWATCH + 5, y), _short(name, 24), INK, font)
    with replacing(path) as partial:
        sheet.save(partial, format="PNG")
    return [f"{split.split}/{split.ids[index]}" for split, index in places]


def overlay(image_HW3: Pixels, label_HW: Pixels, classes: ClassList, opacity: float = OPACITY) -> Pixels:
    """Return an image with its label's colours over it. Void is darkened, and unknown ids are white."""
    table = np.full((256, 3), 255.0)
    table[: len(classes)] = classes.colours
    mixed = (1 - opacity) * image_HW3 + opacity * table[label_HW]
    void = label_HW == IGNORE_INDEX
    mixed[void] = VOID_LEVEL * image_HW3[void]
    pixels: Pixels = np.rint(mixed).astype(np.uint8)
    return pixels


def _spread(splits: Sequence[Split], samples: int) -> list[tuple[Split, int]]:
    """Return (split, number) of samples, evenly spread over the labelled ones, equally many per split if possible."""
    labelled = [[i for i in range(len(split)) if split.has_label(i) or split.has_label(i, DEPTH)] for split in splits]
    numbers = labelled if any(labelled) else [list(range(len(split))) for split in splits]
    counts = [0] * len(splits)
    for done, at in enumerate(sorted(range(len(splits)), key=lambda at: len(numbers[at]))):
        counts[at] = min((samples - sum(counts)) // (len(splits) - done), len(numbers[at]))
    return [
        (split, of[at * len(of) // count])
        for split, of, count in zip(splits, numbers, counts, strict=True)
        for at in range(count)
    ]


def _tile(split: Split, index: int, seen: np.ndarray) -> Image.Image:
    """Return a sample scaled to a tile, or a grey tile with the error. Counts its classes in `seen`."""
    try:
        image = split.image(index)
        scale = min(TILE[0] / image.shape[0], TILE[1] / image.shape[1])
        size = max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale))
        small = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BOX))
        label = split.raw_label(index)
        if label is not None:
            # The label is stretched to its image where sizes differ: the sheet shows how.
            ids = np.asarray(Image.fromarray(label).resize(size, Image.Resampling.NEAREST))
            seen += np.bincount(ids.reshape(-1), minlength=256)
            return Image.fromarray(overlay(small, ids, split.classes))
        metres = split.raw_label(index, DEPTH)
        if metres is not None:
            return Image.fromarray(_near_is_bright(metres)).resize(size, Image.Resampling.NEAREST)
        return Image.fromarray(small)
    except DataError as error:
        tile = Image.new("RGB", (TILE[1], TILE[0]), (200, 200, 200))
        text = _short(error.problem, 40)
        ImageDraw.Draw(tile).text((8, TILE[0] // 2), text, (160, 0, 0), ImageFont.load_default(size=13))
        return tile


def _near_is_bright(metres: np.ndarray) -> Pixels:
    known = np.isfinite(metres) & (metres > 0)
    nearness = np.zeros(metres.shape)
    nearness[known] = 1 / metres[known]
    levels: Pixels = np.rint(255 * nearness / max(float(nearness.max()), 1e-12)).astype(np.uint8)
    return levels


def _legend(classes: ClassList, seen: np.ndarray) -> list[tuple[str, tuple[int, int, int]]]:
    """Return names and colours of the classes on the sheet, void and ids of no class."""
    shown = [(f"{i} {name}", classes.colours[i]) for i, name in enumerate(classes.names) if seen[i]]
    strays = [str(i) for i in range(len(classes), IGNORE_INDEX) if seen[i]]
    shown += [(f"no class: {', '.join(strays)}", (255, 255, 255))] if strays else []
    return [*shown, *([("255 void (darkened)", (90, 90, 90))] if seen[IGNORE_INDEX] else [])]


def _legend_lines(legend: Sequence[object], width: int) -> tuple[int, int]:
    """Return (Lines, entries of a line) of the legend."""
    per_line = max(1, width // 190)
    return -(-len(legend) // per_line), per_line


def _short(text: str, most: int) -> str:
    return text if len(text) <= most else f"...{text[3 - most :]}"
