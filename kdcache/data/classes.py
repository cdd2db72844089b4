"""`classes.txt`: one class per line in the order of the ids, with an optional number and an optional colour.

# name, then nothing, `r g b` or `#rrggbb`
road           128 64 128
traffic light  #faaa1e
void-ish       # a comment
void: 224 224 192    # no class: a colour that means void in labels of colours; may be repeated
void: 0              # no class: a number that means void in labels; may be repeated. Classes take the numbers left

Labels may hold other numbers than the lines' own. Then every class has its number, in any of these ways:

3 road               # or `3: road`, `3, road`, `3) road`
car: 7 0 0 142       # or `car = 7`
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from kdcache.data.colour_codes import Colour, ColourCodes, shared_colours
from kdcache.data.sample import ClassList, default_colours
from kdcache.errors import DataError
from kdcache.tasks import IGNORE_INDEX

CLASSES_FILE = "classes.txt"
VOID_NAMES = ("void", "unlabelled", "unlabeled", "unknown", "ignore")
"""Names that mean no class where a line gives a number, or a colour after a colon; in lower case."""

_LINE = re.compile(
    r"(?P<name>[^#]*?)"
    r"(?:\s+#(?P<hex>[0-9a-fA-F]{6})|(?:\s+(?P<r>\d+))(?:\s+(?P<g>\d+))(?:\s+(?P<b>\d+)))?"
    r"\s*(?:#.*)?"
)
_NUMBER_FIRST = re.compile(r"(?P<number>-?\d+)(?:(?P<mark>\s*[,;:=|)]\s*|\.\s+)|\s+(?:-\s+)?)(?P<name>\S.*)")
_NUMBER_LAST = re.compile(r"(?P<name>.*\S)(?P<mark>\s*[:=]\s*)(?P<number>-?\d+)")
_VOID = re.compile(rf"(?P<name>{'|'.join(VOID_NAMES)})\s*[\s:=,;|]\s*(?P<number>-?\d+)", re.IGNORECASE)
_VOID_COLON = re.compile(rf"(?:{'|'.join(VOID_NAMES)})\s*[:=].*", re.IGNORECASE)


@dataclass(frozen=True)
class _Entry:
    """A line of `classes.txt`.

    Attributes:
        line: the line's number, from 1.
        text: the line without colour and comment.
        name: the class name.
        colour: the colour, or None.
        number: the number that the line gives, or None.
        marked: whether punctuation, such as a colon, separates the number from the name.
        void: whether the line defines void instead of a class.
    """

    line: int
    text: str
    name: str
    colour: Colour | None
    number: int | None = None
    marked: bool = False
    void: bool = False


@dataclass(frozen=True)
class _Listed:
    """The content of `classes.txt`.

    Attributes:
        classes: lines of classes, sorted by number.
        numbers: the number of each class.
        void: lines that define void.
        numbered: whether any line gives a number.
    """

    classes: tuple[_Entry, ...]
    numbers: tuple[int, ...]
    void: tuple[_Entry, ...]
    numbered: bool


def read_classes(folder: Path) -> ClassList:
    """Return the classes in the `classes.txt` of a data folder, in the order of their ids.

    If lines have numbers, the ids follow the order of the numbers. Classes without a colour get a unique one.

    Raises: DataError if the file is missing, empty or not text, repeats a name or number, or numbers only some classes.
    """
    listed = _read(folder).classes
    try:
        return ClassList(tuple(entry.name for entry in listed), _complete([entry.colour for entry in listed]))
    except DataError as error:
        raise error.within(str(folder / CLASSES_FILE)) from None


def read_numbers(folder: Path) -> dict[int, int] | None:
    """Return what `classes.txt` in a data folder defines: number in label files -> class id, or 255 for void.

    Return None if every number is a class id already, or if the folder does not have that file.

    Raises: DataError if the file is empty or malformed.
    """
    if not (folder / CLASSES_FILE).is_file():
        return None
    listed = _read(folder)
    numbers = {number: index for index, number in enumerate(listed.numbers)}
    numbers |= {entry.number: IGNORE_INDEX for entry in listed.void if entry.number not in (None, IGNORE_INDEX)}
    return None if all(number == index for number, index in numbers.items()) else numbers


def says_numbers(folder: Path) -> bool:
    """Return whether a data folder's `classes.txt` gives the number in label files of any class or of void.

    Return False without this file. Raises: DataError if the file is empty or malformed.
    """
    return (folder / CLASSES_FILE).is_file() and _read(folder).numbered


def read_colour_codes(folder: Path) -> ColourCodes | None:
    """Return the map from colours in RGB labels to classes, which `classes.txt` of a data folder defines.

    A colour maps to the number of its class. If the lines have no numbers, the classes get 0, 1, 2 and so on in the
    order of the lines. Numbers that mean void are skipped. Void colours map to 255.

    Return None if the file does not exist, or if a class has no unique colour.

    Raises: DataError if the file is empty or malformed.
    """
    if not (folder / CLASSES_FILE).is_file():
        return None
    listed = _read(folder)
    return colour_codes(
        [entry.colour for entry in listed.classes],
        [entry.colour for entry in listed.void],
        str(folder / CLASSES_FILE),
        listed.numbers,
    )


def colour_codes(
    classes: Sequence[Colour | None], void: Sequence[Colour | None], where: str, numbers: Sequence[int] | None = None
) -> ColourCodes | None:
    """Return the map from colours in RGB labels to class ids, or None if a class has no unique colour.

    Args:
        classes: the (r, g, b) of each class, in the order of the ids, or None for a class without a colour.
        void: colours that mean void. None entries are ignored.
        where: the file that lists the colours, for messages.
        numbers: replacements for the class ids, in the order of `classes`. None keeps the ids.
    """
    colours = [colour for colour in classes if colour is not None]
    voids = [colour for colour in void if colour is not None]
    if len(colours) < len(classes) or shared_colours(colours) or set(voids) & set(colours):
        return None
    ids = dict(zip(colours, range(len(colours)) if numbers is None else numbers, strict=True))
    return ColourCodes(ids | dict.fromkeys(voids, IGNORE_INDEX), where)


def write_classes(folder: Path, classes: ClassList) -> None:
    """Write the `classes.txt` of a data folder. `read_classes` returns the same classes."""
    lines = [f"{name} {r} {g} {b}" for name, (r, g, b) in zip(classes.names, classes.colours, strict=True)]
    if _names(lines) != classes.names:  # some begin or end with a number
        lines = [f"{number}: {line}" for number, line in enumerate(lines)]
    (folder / CLASSES_FILE).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def _names(lines: Sequence[str]) -> tuple[str, ...] | None:
    """Return the class names that `read_classes` would find in the lines, or None for invalid lines."""
    try:
        return tuple(entry.name for entry in _listed(_parsed(lines, Path()), Path()).classes)
    except DataError:
        return None


def _read(folder: Path) -> _Listed:
    """Return the content of a folder's `classes.txt`. Raises: DataError like `read_classes`."""
    path = folder / CLASSES_FILE
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"Cannot read {path}: {'it does not exist' if isinstance(error, FileNotFoundError) else error}",
            fix="Write one class name per line in UTF-8, in the order of the ids in the labels. Write `name r g b` if "
            "they hold colours.",
        ) from error
    listed = _listed(_parsed(unicodedata.normalize("NFC", text).splitlines(), path), path)
    if not listed.classes:
        raise DataError(
            f"No classes in {path}",
            fix="Write 2 to 255 class names, one per line, in the order of the ids in the labels.",
        )
    return listed


def _listed(entries: Sequence[_Entry], path: Path) -> _Listed:
    """Return the lines as classes with numbers. Raises: DataError for numbers outside 0 to 254, or repeated ones."""
    void = tuple(entry for entry in entries if entry.void)
    classes = [entry for entry in entries if not entry.void]
    counted = any(entry.number is None for entry in classes)
    if counted:
        marked = next((entry for entry in classes if entry.marked), None)
        if marked is not None:
            bare = next(entry for entry in classes if entry.number is None)
            raise DataError(
                f"Cannot number the classes of {path}: line {bare.line} ({bare.text!r}) has no number, but line "
                f"{marked.line} ({marked.text!r}) has",
                fix="Give a number to every class, or to none. Remove a header.",
            )
        taken = {entry.number for entry in void}
        free = iter([number for number in range(len(classes) + len(taken)) if number not in taken])
        classes = [replace(entry, name=_plain(entry), number=next(free)) for entry in classes]
    _check_numbers(classes, void, path)
    numbered = sorted((entry.number, place) for place, entry in enumerate(classes) if entry.number is not None)
    numbered_file = not counted or any(entry.number is not None for entry in void)
    return _Listed(
        tuple(classes[place] for _, place in numbered), tuple(number for number, _ in numbered), void, numbered_file
    )


def _check_numbers(classes: Iterable[_Entry], void: Iterable[_Entry], path: Path) -> None:
    entry_of: dict[int, _Entry] = {}
    for entry in (*classes, *void):
        if entry.number is None:
            continue
        first = entry_of.setdefault(entry.number, entry)
        last = IGNORE_INDEX if entry.void else IGNORE_INDEX - 1
        if not 0 <= entry.number <= last:
            fault = f"line {entry.line} has {entry.number}"
        elif first is not entry and not (first.void and entry.void):
            fault = f"lines {first.line} and {entry.line} have {entry.number}"
        else:
            continue
        raise DataError(
            f"Cannot number the classes of {path}: {fault} ({entry.text!r})",
            fix=f"Number each class once, from 0 to {IGNORE_INDEX - 1}. Write `void: NUMBER` for what is no class. "
            f"{IGNORE_INDEX} is void already.",
        )


def _plain(entry: _Entry) -> str:
    """Return a class's name in a file that does not number its classes.

    A number at the beginning is part of the name.
    """
    return entry.name if entry.number is None else entry.text


def _parsed(lines: Iterable[str], path: Path) -> list[_Entry]:
    return [entry for number, line in enumerate(lines, 1) if (entry := _parse(path, number, line)) is not None]


def _parse(path: Path, line: int, text: str) -> _Entry | None:
    match = _LINE.fullmatch(text.strip())
    assert match, text  # every part is optional, so every line matches
    words = match["name"].strip()
    if not words:
        return None
    colour: Colour | None = None
    if match["hex"]:
        r, g, b = bytes.fromhex(match["hex"])
        colour = r, g, b
    elif match["r"] is not None:
        colour = int(match["r"]), int(match["g"]), int(match["b"])
        if max(colour) > 255:
            raise DataError(
                f"Invalid colour in line {line} of {path}: {text.strip()!r}",
                fix="Give three numbers of 0 to 255 after the name.",
            )
    numbered = _VOID.fullmatch(words) or _NUMBER_FIRST.fullmatch(words) or _NUMBER_LAST.fullmatch(words)
    name = words if numbered is None else numbered["name"]
    bare = name.rstrip(" :=").lower()
    if numbered is not None:
        marked = "mark" in numbered.groupdict() and numbered["mark"] is not None
        return _Entry(line, words, name, colour, int(numbered["number"]), marked, bare in VOID_NAMES)
    if not _VOID_COLON.fullmatch(words):
        return _Entry(line, words, name, colour)
    if bare in VOID_NAMES and colour is not None:
        return _Entry(line, words, name, colour, void=True)
    raise DataError(
        f"Cannot read line {line} of {path}: {text.strip()!r} gives void no number and no colour",
        fix="Write `void: 0`, or `void: r g b` for labels in colours, one per line. Leave the colon out of a class's "
        "name.",
    )


def _complete(colours: list[Colour | None]) -> tuple[Colour, ...]:
    listed = [colour for colour in colours if colour is not None]
    defaults = iter(default_colours(len(colours), taken=listed))
    return tuple(colour if colour is not None else next(defaults) for colour in colours)
