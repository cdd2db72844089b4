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
    """Write a PNG with samples of the splits and their labels, and a legend of the classes.

    The samples lie at equal distances among a split's labelled samples, or among all if no split has labels. Void
    pixels are darkened. In depth labels, near pixels are bright.

    Args:
        splits: the splits. Each gets the same number of samples if possible.
        path: the PNG file to write.
        samples: the number of samples on the sheet, over all splits.

    Returns: "SPLIT/ID" of each sample on the sheet.
    Raises: RecipeError for a path that does not end in .png, or a folder that does not exist.
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
    counts = np.zeros(256, np.int64)
    tiles = [_tile(split, index, counts) for split, index in places]
    classes = next((split.classes for split in splits if len(split.classes)), ClassList(()))
    legend = _legend(classes, counts)
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
    """Return an RGB image, uint8 (H, W, 3), with its label's class colours blended over it.

    Void pixels are darkened, and pixels with an unknown id are blended with white.

    Args:
        image_HW3: RGB image, uint8 (H, W, 3).
        label_HW: class ids, uint8 (H, W), 255 for void.
        classes: the colours of the class ids.
        opacity: the colours' share of the result, 0 to 1.
    """
    table = np.full((256, 3), 255.0)
    table[: len(classes)] = classes.colours
    mixed = (1 - opacity) * image_HW3 + opacity * table[label_HW]
    void = label_HW == IGNORE_INDEX
    mixed[void] = VOID_LEVEL * image_HW3[void]
    pixels: Pixels = np.rint(mixed).astype(np.uint8)
    return pixels


def _spread(splits: Sequence[Split], samples: int) -> list[tuple[Split, int]]:
    """Return (split, position) of samples, evenly spread over the labelled ones, equally many per split if possible."""
    labelled = [split.labelled() for split in splits]
    numbers = labelled if any(labelled) else [list(range(len(split))) for split in splits]
    counts = [0] * len(splits)
    for done, at in enumerate(sorted(range(len(splits)), key=lambda at: len(numbers[at]))):
        counts[at] = min((samples - sum(counts)) // (len(splits) - done), len(numbers[at]))
    return [
        (split, of[at * len(of) // count])
        for split, of, count in zip(splits, numbers, counts, strict=True)
        for at in range(count)
    ]


def _tile(split: Split, index: int, counts: np.ndarray) -> Image.Image:
    """Return a sample scaled to a tile, or a grey tile with the error. Add its label's pixels per id to `counts`."""
    try:
        image = split.image(index)
        scale = min(TILE[0] / image.shape[0], TILE[1] / image.shape[1])
        size = max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale))
        small = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BOX))
        label = split.raw_label(index)
        if label is not None:
            # The label is stretched to its image where sizes differ: the sheet shows how.
            ids = np.asarray(Image.fromarray(label).resize(size, Image.Resampling.NEAREST))
            counts += np.bincount(ids.reshape(-1), minlength=256)
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


def _legend(classes: ClassList, counts: np.ndarray) -> list[tuple[str, tuple[int, int, int]]]:
    """Return (name, colour) for each class on the sheet, and for void and unknown ids."""
    entries = [(f"{i} {name}", classes.colours[i]) for i, name in enumerate(classes.names) if counts[i]]
    strays = [str(i) for i in range(len(classes), IGNORE_INDEX) if counts[i]]
    entries += [(f"no class: {', '.join(strays)}", (255, 255, 255))] if strays else []
    return [*entries, *([("255 void (darkened)", (90, 90, 90))] if counts[IGNORE_INDEX] else [])]


def _legend_lines(legend: Sequence[object], width: int) -> tuple[int, int]:
    """Return the number of lines of the legend, and the number of entries per line."""
    per_line = max(1, width // 190)
    return -(-len(legend) // per_line), per_line


def _short(text: str, most: int) -> str:
    return text if len(text) <= most else f"...{text[3 - most :]}"
