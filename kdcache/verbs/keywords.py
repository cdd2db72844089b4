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
"""A data set as an argument: a folder, a spec or a split."""


def keywords(*tables: type, but: tuple[str, ...] = ()) -> Callable[[Function], Function]:
    """Return a decorator that makes settings visible as keywords in the signature of a function with `**settings`.

    Args:
        tables: classes of settings. Each of their settings becomes a keyword with its default.
        but: names of settings that do not become keywords.
    """

    def decorate(function: Function) -> Function:
        written = signature(function)
        first = [parameter for parameter in written.parameters.values() if parameter.kind is not Parameter.VAR_KEYWORD]
        settings = [
            Parameter(name, Parameter.KEYWORD_ONLY, default=default_of(entry), annotation=_type(entry))
            for name, entry in entries(*tables).items()
            if name not in written.parameters and name not in but
        ]
        extended = written.replace(
            parameters=[*first, *sorted(settings, key=lambda parameter: parameter.default is not Parameter.empty)]
        )
        function.__signature__ = extended  # type: ignore[attr-defined]
        return function

    return decorate


def _type(entry: Entry) -> Any:
    """Return the type of a setting's values as a keyword."""
    return entry.type | None if entry.optional or entry.setting.automatic else entry.type


def default_of(entry: Entry) -> Any:
    """Return the default of the setting `entry` if it becomes a keyword argument of a Python function.

    It is None if the default depends on the data or the machine, and `inspect.Parameter.empty` for a required setting.
    """
    return Parameter.empty if entry.required else None if entry.setting.automatic else entry.default


def checked(function: Callable[..., Any], settings: Mapping[str, Any], *tables: type) -> dict[str, Any]:
    """Check the settings that a caller gave, and return name -> value of all settings, defaults included.

    Args:
        function: a function decorated by `keywords`.
        settings: name -> given value, typed or as text from the command line.
        tables: the classes of settings.
    Raises: RecipeError for the first invalid value.
    """
    table = entries(*tables)
    names = [parameter.name for parameter in signature(function).parameters.values() if parameter.name in table]
    defaults = {name: None if table[name].required else table[name].default for name in names}
    return defaults | read_values(settings, *tables)


def open_data(data: Data, split: str | None) -> Split:
    """Return a split of a data set. A `data` that is already a split is returned unchanged.

    `split` is the name of the split. None opens train.

    Raises: RecipeError if `split` is not the name of the given split; DataError if the data set cannot be opened.
    """
    if not isinstance(data, Split):
        return open_split(data, split or "train")
    check_split("data", data.split, split)
    return data


def check_split(name: str, own: str, given: str | None) -> None:
    """Check the name of a split, if a caller gives it in addition to the split itself.

    Args:
        name: the argument that holds the split, such as "data", for the message.
        own: the name of the split in this argument.
        given: the name that the caller gave. None passes.
    Raises: RecipeError if the names differ.
    """
    if given not in (None, own):
        raise RecipeError(
            f"{name} is split {own!r}, not {given!r}",
            fix="Leave the name of the split out, or give the data set's spec or folder.",
        )


def spec_of(data: Data, name: str) -> tuple[str, str | None]:
    """Return the name by which a training can open a data set again (a folder or spec), and the name of its split.

    The split's name is None if `data` is already a folder or spec. `name` is the argument's name, for the message.

    Raises: RecipeError for a split that cannot be opened again, because it is only a part of its data set.
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
