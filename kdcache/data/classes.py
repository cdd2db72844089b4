"""`classes.txt`: one class per line in the order of the ids, with an optional colour.

# name, then nothing, `r g b` or `#rrggbb`
road           128 64 128
traffic light  #faaa1e
void-ish       # a comment
"""

from __future__ import annotations

import re
from pathlib import Path

from kdcache.data.sample import ClassList, default_colours
from kdcache.errors import DataError

CLASSES_FILE = "classes.txt"

_LINE = re.compile(
    r"(?P<name>[^#]*?)"
    r"(?:\s+#(?P<hex>[0-9a-fA-F]{6})|(?:\s+(?P<r>\d+))(?:\s+(?P<g>\d+))(?:\s+(?P<b>\d+)))?"
    r"\s*(?:#.*)?"
)

Colour = tuple[int, int, int]


def read_classes(folder: Path) -> ClassList:
    """Read `classes.txt` of a data folder (names in the order of the ids).

    A class without a colour gets one that no other has.

    Raises: DataError when it is missing, empty, not text, or lists a name twice.
    """
    path = folder / CLASSES_FILE
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"A data folder has a {CLASSES_FILE} in UTF-8.",
            received=f"{path}: {error}",
            remedy="Write one class name per line, in the order of the ids in the labels.",
        ) from error
    parsed = [entry for number, line in enumerate(text.splitlines(), 1) if (entry := _parse(path, number, line))]
    if not parsed:
        raise DataError(
            f"A {CLASSES_FILE} lists 2 to 255 classes.",
            received=f"0 classes in {path}",
            remedy="Write one class name per line, in the order of the ids in the labels.",
        )
    try:
        return ClassList(tuple(name for name, _ in parsed), _complete([colour for _, colour in parsed]))
    except DataError as error:
        raise error.restated(received=f"{error.received} in {path}") from None


def write_classes(folder: Path, classes: ClassList) -> None:
    """Write `classes.txt`, which `read_classes` reads back."""
    lines = [f"{name} {r} {g} {b}\n" for name, (r, g, b) in zip(classes.names, classes.colours, strict=True)]
    (folder / CLASSES_FILE).write_text("".join(lines), encoding="utf-8")


def _parse(path: Path, number: int, line: str) -> tuple[str, Colour | None] | None:
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
