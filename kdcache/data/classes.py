"""`classes.txt`: one class per line in the order of the ids, with an optional colour.

# name, then nothing, `r g b` or `#rrggbb`
road           128 64 128
traffic light  #faaa1e
void-ish       # a comment
void: 224 224 192    # no class: a colour that means void in labels of colours; may be repeated
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from kdcache.data.colour_codes import Colour, ColourCodes, shared_colours
from kdcache.data.sample import IGNORE_INDEX, ClassList, default_colours
from kdcache.errors import DataError

CLASSES_FILE = "classes.txt"
VOID = "void:"
"""What a line with a colour of void begins with."""

_LINE = re.compile(
    r"(?P<name>[^#]*?)"
    r"(?:\s+#(?P<hex>[0-9a-fA-F]{6})|(?:\s+(?P<r>\d+))(?:\s+(?P<g>\d+))(?:\s+(?P<b>\d+)))?"
    r"\s*(?:#.*)?"
)

Entry = tuple[str, Colour | None]


def read_classes(folder: Path) -> ClassList:
    """Read `classes.txt` of a data folder (names in the order of the ids).

    A class without a colour gets one that no other has.

    Raises: DataError when it is missing, empty, not text, or lists a name twice.
    """
    entries = [entry for entry in _entries(folder) if entry[0] != VOID]
    try:
        return ClassList(tuple(name for name, _ in entries), _complete([colour for _, colour in entries]))
    except DataError as error:
        raise error.restated(received=f"{error.received} in {folder / CLASSES_FILE}") from None


def read_colour_codes(folder: Path) -> ColourCodes | None:
    """The colours that labels in RGB may have; None where not every class has one of its own in `classes.txt`.

    Raises: DataError for a `classes.txt` that is none.
    """
    if not (folder / CLASSES_FILE).is_file():
        return None
    entries = _entries(folder)
    return colour_codes(
        [colour for name, colour in entries if name != VOID],
        [colour for name, colour in entries if name == VOID],
        str(folder / CLASSES_FILE),
    )


def colour_codes(classes: Sequence[Colour | None], void: Sequence[Colour | None], where: str) -> ColourCodes | None:
    """The class ids of the colours of classes, in the order of their ids, and of void; None where a class has none.

    Args:
        where: the file that lists them, for messages.
    Returns: None as well where two classes share a colour: nothing tells them apart.
    """
    colours = [colour for colour in classes if colour is not None]
    voids = [colour for colour in void if colour is not None]
    if len(colours) < len(classes) or shared_colours(colours) or set(voids) & set(colours):
        return None
    ids = {colour: number for number, colour in enumerate(colours)}
    return ColourCodes(ids | dict.fromkeys(voids, IGNORE_INDEX), where)


def write_classes(folder: Path, classes: ClassList) -> None:
    """Write `classes.txt`, which `read_classes` reads back."""
    lines = [f"{name} {r} {g} {b}\n" for name, (r, g, b) in zip(classes.names, classes.colours, strict=True)]
    (folder / CLASSES_FILE).write_text("".join(lines), encoding="utf-8")


def _entries(folder: Path) -> list[Entry]:
    """Names and colours, those of void too, in the order of the lines. Raises: DataError as `read_classes`."""
    path = folder / CLASSES_FILE
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"A data folder has a {CLASSES_FILE} in UTF-8.",
            received=f"{path} does not exist" if isinstance(error, FileNotFoundError) else f"{path}: {error}",
            remedy="Write one class name per line, in the order of the ids in the labels; `name r g b` where they hold "
            "colours.",
        ) from error
    parsed = [entry for number, line in enumerate(text.splitlines(), 1) if (entry := _parse(path, number, line))]
    if not parsed:
        raise DataError(
            f"A {CLASSES_FILE} lists 2 to 255 classes.",
            received=f"0 classes in {path}",
            remedy="Write one class name per line, in the order of the ids in the labels.",
        )
    return parsed


def _parse(path: Path, number: int, line: str) -> Entry | None:
    match = _LINE.fullmatch(line.strip())
    assert match, line  # every part is optional, so every line matches
    name = match["name"].strip()
    if not name:
        return None
    if match["hex"]:
        r, g, b = bytes.fromhex(match["hex"])
        return name, (r, g, b)
    if match["r"] is None:
        return name, None
    colour = int(match["r"]), int(match["g"]), int(match["b"])
    if max(colour) > 255:
        raise DataError(
            "Class colours are 0 to 255 per channel.",
            received=f"{line.strip()!r} in line {number} of {path}",
            remedy="Correct the three numbers after the name.",
        )
    return name, colour


def _complete(colours: list[Colour | None]) -> tuple[Colour, ...]:
    listed = [colour for colour in colours if colour is not None]
    made = iter(default_colours(len(colours), taken=listed))
    return tuple(colour if colour is not None else next(made) for colour in colours)
