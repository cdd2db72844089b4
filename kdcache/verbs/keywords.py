"""Settings as keywords of a function: names and defaults in its signature, values checked by the tables."""

from collections.abc import Callable, Mapping
from inspect import Parameter, signature
from pathlib import Path
from typing import Annotated, Any, TypeVar

from kdcache.calls import Fix
from kdcache.data import Split, open_split
from kdcache.errors import RecipeError
from kdcache.settings import Entry, entries, read_values

Function = TypeVar("Function", bound=Callable[..., Any])
Data = Annotated[
    str | Path | Split,
    Fix(
        "Give a folder, a spec, or a split: kdcache.from_dataset(dataset, classes=[...]). Of a DataLoader, give its "
        ".dataset."
    ),
]
"""A data set, as a verb takes it."""


def keywords(*tables: type, but: tuple[str, ...] = ()) -> Callable[[Function], Function]:
    """Return a decorator that replaces `**settings` in a function's signature by the settings of tables.

    `but` names settings that are not keywords, in addition to the function's own parameters.
    """

    def decorate(function: Function) -> Function:
        own = signature(function)
        first = [parameter for parameter in own.parameters.values() if parameter.kind is not Parameter.VAR_KEYWORD]
        settings = [
            Parameter(name, Parameter.KEYWORD_ONLY, default=default_of(entry), annotation=_type(entry))
            for name, entry in entries(*tables).items()
            if name not in own.parameters and name not in but
        ]
        made = own.replace(parameters=[*first, *sorted(settings, key=lambda one: one.default is not Parameter.empty)])
        function.__signature__ = made  # type: ignore[attr-defined]
        return function

    return decorate


def _type(entry: Entry) -> Any:
    """Return the type of a setting's values, without marks."""
    return entry.type | None if entry.optional or entry.setting.automatic else entry.type


def default_of(entry: Entry) -> Any:
    """Return the default of a setting as a keyword, or None if it depends on the data and the machine."""
    return Parameter.empty if entry.required else None if entry.setting.automatic else entry.default


def checked(function: Callable[..., Any], settings: Mapping[str, Any], *tables: type) -> dict[str, Any]:
    """Return all settings of a function made by `keywords`, by name: checked given values, and defaults.

    `settings` are values, typed or written as on the command line.

    Raises: RecipeError for the first invalid value.
    """
    table = entries(*tables)
    names = [one.name for one in signature(function).parameters.values() if one.name in table]
    defaults = {name: None if table[name].required else table[name].default for name in names}
    return defaults | read_values(settings, *tables)


def open_data(data: Data, split: str | None) -> Split:
    """Return the split of a data set by its spec or folder. A split is returned unchanged.

    Raises: RecipeError for another name than the split has; as `open_split`.
    """
    if not isinstance(data, Split):
        return open_split(data, split or "train")
    check_split("data", data.split, split)
    return data


def check_split(name: str, own: str, given: str | None) -> None:
    """Check a split name given together with a split. Raises: RecipeError if they differ."""
    if given not in (None, own):
        raise RecipeError(
            f"{name} is split {own!r}, not {given!r}",
            fix="Leave the name of the split out, or give the data set's spec or folder.",
        )


def spec_of(data: Data, name: str) -> tuple[str, str | None]:
    """Return (spec, split name) for a training to open data again. The name is None if `data` is a spec.

    Raises: RecipeError for a split that its spec does not name, such as a part of another one.
    """
    if not isinstance(data, Split):
        return str(data), None
    if open_split(data.data, data.split).digest() != data.digest():
        raise RecipeError(
            f"Cannot open {name} again by its name: it is only a part of {data.data}, split {data.split!r}",
            fix="Give all of it, with limit_samples or fold. Or make it a data set: kdcache.from_dataset(items, "
            "classes)",
        )
    return data.data, data.split
