"""The streams of a training, each with complete settings."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from kdcache.errors import KDCacheError, RecipeError
from kdcache.settings import read
from kdcache.settings.methods import parse_method, parse_term
from kdcache.settings.streams import OVERRIDDEN, StreamSettings, parse_stream
from kdcache.settings.training import TRAINING
from kdcache.settings.validate import dump_values
from kdcache.training.input.mix import Mix


class _Settings(Protocol):
    @property
    def settings(self) -> dict[str, Any]: ...


Config = TypeVar("Config", bound=_Settings)
_WITHOUT_TEACHER = {
    "teacher": "store",
    "gate": "none",
    "class_trust": None,
    "trust_against": None,
    "class_balance": "none",
    "distill_schedule": "constant",
}
"""Settings that concern a teacher alone, as a stream without one has them whatever the training has."""

_WITHOUT_BALANCE = {"balance": "fixed", "task_weight": ()}
"""The balance of a stream, whose tasks are balanced with those of the others."""


def flag_of(name: str) -> str:
    """Return the flag of a setting, without dashes in front. It is also the recipe key: `val_every` -> `val-every`."""
    return name.replace("_", "-")


@dataclass(frozen=True)
class Stream(Generic[Config]):
    """A data source with its settings. It has a fixed share of every batch.

    Attributes:
        name: the stream's name, or "" in a training without streams.
        share: its share of every batch, in 0..1. Streams with None divide the rest evenly.
        weight: the weight of its loss.
        class_map: a file that maps each class of its labels to a class of the training, or None.
        paste: how another stream's samples are pasted into its samples, such as `classmix`, or None.
        paste_from: the name of that other stream, or None.
        config: all settings of the stream: its own, and the training's settings where it has none.
        table: the stream's table in a recipe: key -> value.
    """

    name: str
    share: float | None
    weight: float
    class_map: Path | None
    paste: str | None
    paste_from: str | None
    config: Config
    table: Mapping[str, Any]


def make_stream(
    training: Mapping[str, Any], table: Mapping[str, Any], make: Callable[[Mapping[str, Any]], Config]
) -> Stream[Config]:
    """Return the stream that a recipe's table describes. The table's settings replace the training's.

    If the table names a cache or data set, the training's cache and data set are ignored. If the stream has no teacher,
    settings that weigh targets are ignored.

    Args:
        training: the training's settings: name -> value.
        table: the stream's table: name -> value.
        make: checks settings and makes a config of them.
    Raises: KDCacheError that names the stream, for an invalid setting of the table or an error of `make`.
    """
    overrides = {key: value for key, value in table.items() if key in OVERRIDDEN}
    merged = {**training, "stream": (), **_WITHOUT_BALANCE, **overrides}
    if "cache" in overrides or "data" in overrides:
        merged |= {"cache": overrides.get("cache"), "data": overrides.get("data")}
    try:
        alone = read(StreamSettings, {key: value for key, value in table.items() if key not in OVERRIDDEN})
        config = make(_fitting(merged, overrides))
    except KDCacheError as error:
        raise in_stream(str(table.get("name")), error) from error
    kept = {key: config.settings[key] for key in {**overrides, "method": None}}
    written = dump_values(vars(alone) | kept, StreamSettings, *TRAINING)
    resolved = {flag_of(key): value for key, value in written.items() if value is not None}
    return Stream(**vars(alone), config=config, table=resolved)


def _fitting(merged: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a stream, without the training's teacher settings if the stream has no teacher."""
    settings = dict(merged)
    if settings.get("method", "auto") == "auto":
        if settings.get("cache"):
            return settings
        settings["method"] = "none"
    terms = [*parse_method(str(settings["method"])), *map(parse_term, settings.get("term", ()))]
    if any(term.reads_teacher for term in terms):
        return settings
    kept = {*overrides, "distill_schedule"} if any(term.labels_itself for term in terms) else overrides
    return settings | {key: value for key, value in _WITHOUT_TEACHER.items() if key not in kept}


def in_stream(name: str, error: KDCacheError) -> KDCacheError:
    """Return the error with the stream's name in its message, or unchanged if the name is empty."""
    if not name:
        return error
    return error.within(f"stream {name}")


def read_tables(values: Sequence[Any]) -> list[Mapping[str, Any]]:
    """Return the table (name -> value) of each stream, from texts such as `kitti,cache=kitti.zarr` or from tables.

    Raises: RecipeError for an invalid table, and for invalid or repeated names.
    """
    if not isinstance(values, list | tuple):
        raise RecipeError(f"Invalid value of --stream: {values!r}", fix="Give a list of NAME,cache=CACHE,share=0.5")
    tables = list(map(parse_stream, values))
    names = [table.get("name") if isinstance(table, Mapping) else None for table in tables]
    for name, table in zip(names, tables, strict=True):
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_.-]+", name) or names.count(name) > 1:
            raise RecipeError(
                f"The stream name {name!r} is used {names.count(name)} times"
                if isinstance(name, str)
                else f"Missing the name of the stream {table!r}",
                fix="Give each a name of letters, digits, dots and dashes, for example --stream "
                "kitti,cache=kitti.zarr,share=0.5",
            )
    return tables


def check_pastes(streams: Sequence[Stream[Any]], mix: str | None) -> None:
    """Check the settings `paste` and `paste_from` of all streams that have one of them.

    `paste` says how another stream's pixels are copied into the stream's samples, such as "classmix". `paste_from`
    names the other stream. `mix` is the value of `--mix`, or None.

    Raises: RecipeError if only one of `paste` and `paste_from` is given, or one is invalid. Also if `--mix` is given,
        or if the stream has a teacher term that does not work with pasted pixels.
    """
    names = [stream.name for stream in streams]
    for stream in streams:
        try:
            if stream.paste is not None or stream.paste_from is not None:
                _check_paste(stream, [name for name in names if name != stream.name], mix)
        except KDCacheError as error:
            raise in_stream(stream.name, error) from error


def _check_paste(stream: Stream[Any], others: Sequence[str], mix: str | None) -> None:
    paste, source = stream.paste, stream.paste_from
    if paste is None or source not in others:
        note_on_itself = ", which is itself" if source == stream.name else ""
        raise RecipeError(
            f"Use paste and paste-from together: paste is {paste or 'left out'}, and paste-from "
            f"{source or 'left out'}{note_on_itself}, beside the streams {', '.join(others) or '(none)'}",
            fix=f"Give both, for example paste=classmix,paste-from={others[0]}, or leave both out."
            if others
            else "Give the samples that are pasted as a --stream of their own, with labels.",
        )
    Mix(paste, "paste=")
    if mix is not None:
        raise RecipeError(
            f"Use either paste {paste} or --mix {mix}, not both: a pixel is pasted once", fix="Leave one of them out."
        )
    lost = [term.kind for term in stream.config.active if term.reads_teacher and not term.follows_paste]
    if lost:
        raise RecipeError(
            f"Cannot use paste {paste} with {', '.join(lost)}: they cannot follow pasted pixels",
            fix="Leave one of them out. kl, pseudo and consistency can follow.",
        )
