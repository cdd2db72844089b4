"""Settings as keywords of a function: their names and defaults in its signature, their values checked by the tables."""

from collections.abc import Callable, Mapping
from inspect import Parameter, signature
from pathlib import Path
from typing import Any, TypeVar

from kdcache.data import Split, open_split
from kdcache.errors import RecipeError
from kdcache.settings import Entry, entries, read_values
from kdcache.settings.validate import check_names, wording_of

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
    wording = wording_of(function.__name__)
    check_names(settings, [*signature(function).parameters], wording)
    defaults = {name: None if table[name].required else table[name].default for name in names}
    return defaults | read_values(settings, *tables, wording=wording)


def open_data(data: str | Path | Split, split: str | None, name: str = "data") -> Split:
    """The split of a data set by its spec or folder; a split is taken as it is.

    Raises: RecipeError for what is no data, and for another name than the split has; as `open_split`.
    """
    if not isinstance(data, Split):
        return open_split(_place(data, name), split or "train")
    check_split(name, data.split, split)
    return data


def check_split(name: str, own: str, given: str | None) -> None:
    """Check the name that is given next to a split. Raises: RecipeError for another name than it has."""
    if given not in (None, own):
        raise RecipeError(
            f"{name} is split {own!r}, not {given!r}",
            fix="Leave the name of the split out, or give the data set's spec or folder.",
        )


def spec_of(data: str | Path | Split, name: str) -> tuple[str, str | None]:
    """(Spec, name of the split) by which a training opens data again; the name is None where data is a spec.

    Raises: RecipeError for what is no data, and for a split that its spec does not name, such as a part of another one.
    """
    if not isinstance(data, Split):
        return _place(data, name), None
    if open_split(data.data, data.split).digest() != data.digest():
        raise RecipeError(
            f"Cannot open {name} again by its name: it is only a part of {data.data}, split {data.split!r}",
            fix="Give all of it, with limit_samples or fold. Or make it a data set: kdcache.from_dataset(items, "
            "classes)",
        )
    return data.data, data.split


def _place(data: Any, name: str) -> str:
    """The folder or spec of data. Raises: RecipeError for anything else, such as somebody's data set."""
    if isinstance(data, str | Path):
        return str(data)
    kind = type(data)
    raise RecipeError(
        f"Cannot use a {kind.__module__}.{kind.__qualname__} as {name}",
        fix="Give a folder, a spec, or a split: kdcache.from_dataset(dataset, classes=[...]). Of a DataLoader, give "
        "its .dataset.",
    )
