"""The streams of a training: their tables and lines, and each stream's rows of a batch.

A stream is a table of a recipe, or a line of the command line as comma-separated values (RFC 4180: values with a comma
are in double quotes). Its keys are those of `StreamSettings`, and settings of the training:

    --stream 'kitti,cache=kitti.zarr,share=0.5,method=kl,"term=cosine,weight=0.1"'
"""

import csv
import io
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Gt, Le

from kdcache.errors import RecipeError, suggest
from kdcache.settings.parse import Weight
from kdcache.settings.removed import SETTINGS, removal
from kdcache.settings.setting import REQUIRED, entries, names, setting
from kdcache.settings.training import PART, TRAINING, Augmentation, Data, Loss

_MISSPELT = 0.82
"""From this similarity on, a word is a misspelt key. Below, it is the next part of a value with commas."""
_LARGEST = 4096
"""The largest batch that a fix names."""


@dataclass(frozen=True, kw_only=True)
class StreamSettings:
    """The settings that only a stream has. In addition, a stream can override many settings of the training."""

    name: str = setting(REQUIRED, "Name of the stream.")
    share: Annotated[float, Gt(0), Le(1)] | None = setting(
        None, "The stream's share of the samples in every batch (default: an equal part of the rest)."
    )
    weight: Weight = setting(1.0, "Weight of the stream's loss in the sum over all streams.")
    class_map: Path | None = setting(
        None, "A file with the class of the training that each of the stream's classes becomes."
    )
    paste: str | None = setting(
        None, "How samples of paste-from are pasted: cutmix or classmix. cutmix:0.5 pastes into half of the samples."
    )
    paste_from: str | None = setting(None, "Name of the other stream whose pixels are pasted into this stream.")


SOURCE = ("cache", "data", "split")
"""The settings for where a stream's samples come from."""
_WHOLE = ("balance", "task_weight", "distill_schedule", "val_fold", "mix")
"""Settings of the whole training that a stream cannot override."""
_OF_TERMS = ("weight", "temperature", "class_weights")
"""Settings that both a stream and a loss term have. After a term, it would not be clear which is meant."""
_OF_STREAMS = (*entries(Loss), *names(Data, panel=PART), *entries(Augmentation))
OVERRIDDEN = (
    *SOURCE,
    *(name for name in _OF_STREAMS if name not in _WHOLE),
)
"""The settings of a training that a stream can override."""


def parse_stream(value: Any) -> Any:
    """Return the settings of a stream as a dict: the setting's name with underscores -> its unchecked value.

    The setting `name` is the stream's name.

    Args:
        value: the text of a --stream flag, such as `kitti,cache=kitti.zarr,share=0.5`, or a stream's table in a recipe.
            Any other value is returned unchanged.
    Raises: RecipeError for a text that does not begin with the stream's name, and for unknown settings.
    """
    if isinstance(value, str):
        value = _of_line(value)
    if not isinstance(value, Mapping):
        return value
    table = {str(key).replace("-", "_"): entry for key, entry in value.items()}
    allowed = [*entries(StreamSettings), *OVERRIDDEN]
    for key in table:
        if key not in allowed:
            if (gone := removal(key, SETTINGS)) is not None:
                raise gone
            spelled, known = key.replace("_", "-"), sorted(name.replace("_", "-") for name in allowed)
            raise RecipeError(
                f"Unknown key {spelled!r} of {table.get('name', 'a stream')}",
                fix="Give it next to the streams: it is a setting of the whole training."
                if key in entries(*TRAINING)
                else suggest(spelled, known, f"Use one of {', '.join(known)}."),
            )
    return table


def to_line(table: Mapping[str, Any]) -> str:
    """Return the settings of a stream as the value of --stream: `kitti,cache=kitti.zarr,share=0.5`.

    `table` maps names, with dashes or underscores, to values. `parse_stream` reverses it.
    """
    fields = [str(table.get("name", ""))]
    for key, value in sorted(table.items(), key=lambda item: item[0] == "term"):
        if key == "name":
            continue
        entries_of_key = value if isinstance(value, list | tuple) else (value,)
        if key == "labels":  # tasks, as --labels has them
            entries_of_key = ("+".join(map(str, entries_of_key)),)
        for entry in entries_of_key:
            text = term_line(entry) if isinstance(entry, Mapping) else str(entry)
            fields.append(f"{key.replace('_', '-')}={text}")
    line = io.StringIO()
    csv.writer(line, lineterminator="").writerow(fields)
    return line.getvalue()


def term_line(table: Mapping[str, Any]) -> str:
    """Return a table `[[term]]` of a recipe as the value of --term: `cosine,weight=0.1`."""
    options = [f"{key.replace('-', '_')}={value}" for key, value in table.items() if key != "kind"]
    return ",".join([str(table.get("kind", "")), *options])


def shares_of(named: Mapping[str, float | None]) -> list[float]:
    """Return the share of each stream in a batch, in the given order. The shares sum to 1.

    Args:
        named: the name of each stream -> its share, a fraction above 0, or None. Streams with None divide the rest
            evenly.
    Raises: RecipeError if the shares do not sum to 1, or if they leave no rest for streams with None.
    """
    total = sum(share for share in named.values() if share is not None)
    open_streams = sum(share is None for share in named.values())
    rest = 1 - total
    if rest < -1e-6 or (open_streams and rest < 1e-6) or (not open_streams and abs(rest) > 1e-6):
        texts = [f"{name} {'no share' if share is None else f'{share:g}'}" for name, share in named.items()]
        raise RecipeError(
            f"The shares of all streams sum up to {total:g}, not 1: {', '.join(texts)}",
            fix="Correct them, or leave one out: streams without a share divide the rest.",
        )
    return [rest / open_streams if share is None else share for share in named.values()]


def rows_of(shares: Sequence[float], batch_size: int, together: int = 1) -> list[int]:
    """Return how many samples of a batch come from each stream. The numbers do not depend on the number of processes.

    Args:
        shares: the share of each stream. The shares sum to 1.
        batch_size: the number of samples in a batch.
        together: each number is a multiple of `together`: 2 if samples are pasted in pairs.
    """
    exact = [share * (batch_size // together) for share in shares]
    rows = [math.floor(units + 1e-9) for units in exact]
    order = sorted(range(len(rows)), key=lambda number: rows[number] - exact[number])
    for number in order[: batch_size // together - sum(rows)]:
        rows[number] += 1
    return [together * units for units in rows]


def check_rows(named: Mapping[str, float], batch_size: int, together: int = 1, parts: int = 1) -> list[int]:
    """Return how many samples of a batch come from each stream. Check that the batch can be divided evenly.

    Args:
        named: the name of each stream -> its share.
        batch_size: the number of samples in a batch.
        together: each number is a multiple of `together`: 2 if samples are pasted in pairs.
        parts: the number of equal parts of a batch: the number of processes times `--accumulate`.
    Raises: RecipeError, with the next larger batch size that works.
    """
    shares, unit = list(named.values()), together * parts

    def works(size: int) -> bool:
        return all(rows > 0 and rows % unit == 0 for rows in rows_of(shares, size, together))

    rows = rows_of(shares, batch_size, together)
    if sum(rows) == batch_size and works(batch_size):
        return rows
    sizes = range(-(-batch_size // unit) * unit, max(_LARGEST, 2 * batch_size) + 1, unit)
    size = next((size for size in sizes if works(size)), None)
    texts = [f"{name} {count} of {share:g}" for (name, share), count in zip(named.items(), rows, strict=True)]
    raise RecipeError(
        f"Cannot give every stream rows of --batch-size {batch_size}: the shares are {', '.join(texts)} rows"
        + (f", for {parts} processes and parts" if parts > 1 else "")
        + (f", {together} of which stay together" if together > 1 else ""),
        fix=f"Use --batch-size {size}, the next one that works, or other shares."
        if size is not None
        else "Give every stream a larger share.",
    )


def _check_quotes(options: Sequence[str]) -> None:
    """Raise a RecipeError for a value with commas that is not in quotes, if the next part of the line shows it."""
    known = [*entries(StreamSettings), *OVERRIDDEN, *entries(*TRAINING)]
    for option, following in itertools.pairwise(options):
        key, _, value = option.partition("=")
        name = following.partition("=")[0].strip().replace("-", "_")
        broken = not suggest(name, known, cutoff=_MISSPELT)
        complete = not value or "," in value or key not in ("data", "term")
        if not complete and (broken or (key == "term" and name in _OF_TERMS)):
            raise RecipeError(
                f"Missing quotes around a value with commas in --stream: {option},{following}",
                fix=f"""Write '"{option},{following}"' if both are one value."""
                + ("" if broken else f" Or put {following} before {option} if it belongs to the stream."),
            )


def _of_line(text: str) -> dict[str, Any]:
    first, *options = next(csv.reader([" ".join(text.splitlines())], skipinitialspace=True), []) or [""]
    if not first.strip() or "=" in first:
        raise RecipeError(
            f"Missing name in --stream {text!r}",
            fix="Write the name first, for example --stream kitti,cache=kitti.zarr,share=0.5",
        )
    _check_quotes(options)
    table: dict[str, Any] = {"name": first.strip()}
    for option in options:
        key, equals, value = option.partition("=")
        name = key.strip().replace("-", "_")
        if not equals or (name in table and name not in ("term", "cache")):
            raise RecipeError(
                f"Cannot read {option!r} in --stream {text!r}: it is not KEY=VALUE, or its key is there twice",
                fix="Put what holds a comma into double quotes: "
                """--stream 'kitti,cache=kitti.zarr,"term=cosine,weight=0.1"'""",
            )
        if name == "term":  # repeated as the flag is; an empty one stands for none
            table[name] = [*table.get(name, []), *([value] if value else [])]
        elif name == "cache" and name in table:  # repeated, too: the first of several is text
            first = table[name]
            table[name] = [*([first] if isinstance(first, str) else first), value.strip()]
        else:
            table[name] = value.strip()
    return table
