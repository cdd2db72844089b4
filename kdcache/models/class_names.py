"""The class names stored with weights, and how they agree with the data's.

They are in the header of a safetensors file, in `meta.dataset_meta.classes` of a checkpoint of mmengine, in the
`id2label` of a config.json next to the weights, or in a run's model.json. Names that only number the classes (LABEL_0)
do not count.
"""

import ast
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from kdcache.errors import MismatchError
from kdcache.files import read_object

_KEYS = ("class_names", "classes", "id2label", "names", "categories")
_PARTS = ("meta", "dataset_meta", "hyper_parameters", "config")
"""Tables of a checkpoint that may hold class names."""
_BESIDE = ("config.json", "model.json")
_PLACEHOLDER = re.compile(r"(label|class|cls|category|id|c)?[\s_-]*\d+", re.IGNORECASE)
_SHOWN = 20


def names_in(content: object) -> tuple[str, ...]:
    """Return the class names in the content of a checkpoint, header or configuration, in the order of the class ids.

    Return () if there are none.
    """
    return next(_names_in(content), ())


def names_beside(weights: Path) -> tuple[str, ...]:
    """Return the class names, in the order of the class ids, from config.json or model.json next to a weights file.

    Return () if neither file has names.
    """
    return next((names for name in _BESIDE for names in _names_in(read_object(weights.parent / name))), ())


def compare_names(origin: str, theirs: Sequence[str], ours: Sequence[str]) -> str | None:
    """Compare two lists of class names: those stored with weights, and the data's.

    Case, spaces, `_` and `-` do not count.

    Args:
        origin: where the weights come from, for messages.
        theirs: the names stored with the weights, or () for none. A single name belongs to the second of two classes.
        ours: the names of the data's classes.
    Returns: a warning if the number of names differs, or if weights have names that the data lacks. None if all names
        are equal, or if there are none to compare.
    Raises: MismatchError if a class of the data has another number in the weights. Its fix has the class map to write.
    """
    theirs = _of_two(theirs, ours)
    if not theirs:
        return None
    if len(theirs) != len(ours):
        return f"{origin} comes with {len(theirs)} class names and predicts {len(ours)} classes: they are not compared"
    their_keys, our_keys = _keys(theirs), _keys(ours)
    differ = [n for n, (a, b) in enumerate(zip(their_keys, our_keys, strict=True)) if a and b and a != b]
    if not differ:
        return None
    both = f"{_listed(theirs, differ)} in the weights, {_listed(ours, differ)} in the data"
    moved = [number for number in differ if their_keys[number] in our_keys]
    if not moved:
        return (
            f"{origin} has other class names than the data: {both}. Each class is taken to be the one of its number. "
            f"If that is right, --class-map FILE with {class_map_text(theirs, ours, ours)} says so"
        )
    raise MismatchError(
        f"Classes in another order: class {moved[0]} is {theirs[moved[0]]} in {origin} and {ours[moved[0]]} in the "
        f"data. {both}",
        fix=f"Write {class_map_text(theirs, ours)} into a file and give it as --class-map FILE (build, plan, verify, "
        "evaluate), or list classes.txt in the order of the weights.",
    )


def known_names(theirs: Sequence[str], unnamed: Sequence[str]) -> tuple[str, ...]:
    """Return a name for each class: the name stored with weights, or else the name in `unnamed`.

    Args:
        theirs: the stored names, or (). If there are two classes and one name, it is the name of the second. With any
            other number of names than classes, or if two results would be equal, the result is `unnamed`.
        unnamed: for each class, the name to use in place of a stored name that only numbers it, such as LABEL_0.
    """
    theirs = _of_two(theirs, unnamed)
    named = [ours if _PLACEHOLDER.fullmatch(name) else name for name, ours in zip(theirs, unnamed, strict=False)]
    return tuple(named) if len(set(filter(None, named))) == len(theirs) == len(unnamed) else tuple(unnamed)


def class_map_text(theirs: Sequence[str], ours: Sequence[str], default: Sequence[str] = ()) -> str:
    """Return a class map as JSON: class id of the weights -> name of the data's class.

    Args:
        theirs: the class names of the weights.
        ours: the class names of the data.
        default: names by class id, for classes of the weights whose name the data does not have. Other such classes
            get "?". But if only one class of the weights and one of the data remain, they are mapped to each other.
    """
    by_key = {key: name for key, name in zip(_keys(ours), ours, strict=True) if key}
    keys = _keys(theirs)
    left = [name for key, name in by_key.items() if key not in keys]
    fallback = left[0] if len(left) == 1 and sum(key not in by_key for key in keys) == 1 else "?"
    table = {
        str(number): by_key.get(key or "", default[number] if number < len(default) else fallback)
        for number, key in enumerate(keys)
    }
    return json.dumps(table, ensure_ascii=False)


def _of_two(theirs: Sequence[str], ours: Sequence[str]) -> Sequence[str]:
    """Return the names of both classes if the network has one logit for two classes."""
    return ("0", *theirs) if len(theirs) == 1 and len(ours) == 2 else theirs


def _names_in(content: object) -> Iterator[tuple[str, ...]]:
    if not isinstance(content, Mapping):
        return
    lowered = {str(key).lower(): value for key, value in content.items()}
    for key in _KEYS:
        if (names := _sequence(lowered.get(key))) and not all(map(_PLACEHOLDER.fullmatch, names)):
            yield names
    for part in _PARTS:
        yield from _names_in(lowered.get(part))


def _sequence(value: Any) -> tuple[str, ...]:
    """Return names in the order of their ids from a list, a mapping of ids, or the text of one, else ()."""
    if isinstance(value, str):
        value = _parsed(value)
    if isinstance(value, Mapping):
        try:
            value = {int(key): name for key, name in value.items()}
        except (TypeError, ValueError):
            return ()
        if sorted(value) != list(range(len(value))):
            return ()
        value = [value[number] for number in range(len(value))]
    if not isinstance(value, Sequence) or not all(isinstance(name, str) and name.strip() for name in value):
        return ()
    return tuple(name.strip() for name in value)


def _parsed(text: str) -> object:
    for parse in (json.loads, ast.literal_eval):
        try:
            return parse(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            continue
    return text.split(",") if "," in text else None


def _keys(names: Sequence[str]) -> list[str | None]:
    """Return names in comparable form, None for placeholders. Names that would become equal stay unchanged."""
    known = [None if _PLACEHOLDER.fullmatch(name) else name for name in names]
    keys = [None if name is None else re.sub(r"[\s_-]+", "", name).casefold() for name in known]
    found = [key for key in keys if key is not None]
    return keys if len(set(found)) == len(found) else known


def _listed(names: Sequence[str], differ: Sequence[int]) -> str:
    if len(names) <= _SHOWN:
        return ", ".join(names)
    rest = ", ..." if len(differ) > _SHOWN else ""
    return ", ".join(f"{number} {names[number]}" for number in differ[:_SHOWN]) + rest
