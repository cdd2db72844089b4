"""Settings as keywords of a function: their names and defaults in its signature, their values checked by the tables."""

import difflib
from collections.abc import Callable, Mapping
from dataclasses import MISSING
from functools import cache
from inspect import Parameter, signature
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from pydantic import BaseModel, ConfigDict, ValidationError, create_model

from kdcache.data import Split, open_split
from kdcache.errors import RecipeError
from kdcache.settings import Entry, entries
from kdcache.settings.removed import SETTINGS, removal
from kdcache.settings.setting import in_words

Function = TypeVar("Function", bound=Callable[..., Any])


def keywords(*tables: type, but: tuple[str, ...] = ()) -> Callable[[Function], Function]:
    """A decorator: the function's `**settings` are the settings of tables, with their defaults in its signature.

    Args:
        but: settings that are no keywords, beside those that the function has itself.
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
    """The type of a setting's values, without marks."""
    return entry.type | None if entry.optional or entry.setting.automatic else entry.type


def default_of(entry: Entry) -> Any:
    """The default of a setting as a keyword: None where it is chosen when the data and the machine are known."""
    return Parameter.empty if entry.required else None if entry.setting.automatic else entry.default


def checked(function: Callable[..., Any], settings: Mapping[str, Any], *tables: type) -> dict[str, Any]:
    """All settings of a function made by `keywords`, by name: the given ones as their tables have them, and defaults.

    Args:
        settings: values, typed or as one writes them on the command line.
    Raises: RecipeError for the first that is no setting, or has a value that it does not take.
    """
    table = entries(*tables)
    names = [one.name for one in signature(function).parameters.values() if one.name in table]
    if unknown := [name for name in settings if name not in names]:
        if (gone := removal(unknown[0], SETTINGS)) is not None:
            raise gone
        near = difflib.get_close_matches(unknown[0], signature(function).parameters, n=1)
        raise RecipeError(
            f"every keyword of kdcache.{function.__name__} is one of its settings",
            received=f"{unknown[0]}={settings[unknown[0]]!r}",
            remedy=f"did you mean {near[0]}=?" if near else f"help(kdcache.{function.__name__}) lists them",
        )
    given = {name: value for name, value in settings.items() if not (table[name].setting.automatic and value is None)}
    try:
        typed = _model(*tables)(**given)
    except ValidationError as error:
        raise _refused(error, given, *tables) from error
    return {name: getattr(typed, name) for name in names}


def open_data(data: str | Path | Split, split: str | None, name: str = "data") -> Split:
    """The split of a data set by its spec or folder; a split is taken as it is.

    Raises: RecipeError for what is no data, and for another name than the split has; as `open_split`.
    """
    if not isinstance(data, Split):
        return open_split(_place(data, name), split or "train")
    if split not in (None, data.split):
        raise RecipeError(
            "a split that is given has its own name",
            received=f"{name} is split {data.split!r} of {data.data}, and split {split!r} beside it",
            remedy="leave the name out, or give the data set's spec or folder",
        )
    return data


def spec_of(data: str | Path | Split, name: str) -> tuple[str, str | None]:
    """(Spec, name of the split) by which a training opens data again; the name is None where data is a spec.

    Raises: RecipeError for what is no data, and for a split that its spec does not name, such as a part of another one.
    """
    if not isinstance(data, Split):
        return _place(data, name), None
    if open_split(data.data, data.split).digest() != data.digest():
        raise RecipeError(
            "a training opens its data by the name that its recipe keeps",
            received=f"{name} is a part of {data.data}, split {data.split!r}, which that name does not have",
            remedy="give the whole, with limit_samples or fold; or make it one: kdcache.from_dataset(items, classes)",
        )
    return data.data, data.split


def _place(data: Any, name: str) -> str:
    """The folder or spec of data. Raises: RecipeError for anything else, such as somebody's data set."""
    if isinstance(data, str | Path):
        return str(data)
    kind = type(data)
    raise RecipeError(
        f"{name} is a folder or a spec, or a split: of kdcache.open_split, or kdcache.from_dataset",
        received=f"{kind.__module__}.{kind.__qualname__}",
        remedy="make a split of it: kdcache.from_dataset(dataset, classes=[...]); of a DataLoader, of its .dataset",
    )


@cache
def _hints(*tables: type) -> dict[str, Any]:
    return {name: hint for table in tables for name, hint in get_type_hints(table, include_extras=True).items()}


@cache
def _model(*tables: type) -> type[BaseModel]:
    """A model of all settings of tables, for its checks; what must be given is not asked for here."""
    hints, table = _hints(*tables), entries(*tables)
    fields: Any = {
        name: (hints[name], None if entry.default is MISSING else entry.default) for name, entry in table.items()
    }
    return create_model("Settings", __config__=ConfigDict(extra="forbid", arbitrary_types_allowed=True), **fields)


def _refused(error: ValidationError, given: Mapping[str, Any], *tables: type) -> RecipeError:
    """The error for the first setting whose value is wrong."""
    entry = entries(*tables)[str(error.errors()[0]["loc"][0])]
    spelling = entry.spelling
    rule = (
        spelling.rule if spelling is not None and spelling.rule else in_words(_model(*tables).model_fields[entry.name])
    )
    instance = spelling.example if spelling is not None else entry.default
    return RecipeError(
        f"{entry.name} is {rule}",
        received=f"{entry.name}={given.get(entry.name)!r}",
        remedy=f"for instance {entry.name}={instance!r}" if instance not in (None, (), "", MISSING) else "correct it",
    )
