"""A verb's signature, made from the settings of tables: Typer parses them, the verb receives them by name."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import MISSING, replace
from functools import wraps
from inspect import Parameter, Signature, signature
from typing import Annotated, Any

import typer
from annotated_types import Ge, Le

from kdcache.settings import Entry, entries
from kdcache.settings.setting import choices

Verb = Callable[..., None]
UNTYPED = "kdcache.untyped"
"""The key in a context's `meta` for settings that nobody typed, because a preset or a run's recipe has them."""
COPIED = "kdcache.copied"
"""The key in a context's `meta` for settings that come from a run's recipe."""


def takes(
    *tables: type,
    order: tuple[str, ...],
    required: Collection[str] = (),
    unset: Collection[str] = (),
    wording: Mapping[str, Mapping[str, Any]] | None = None,
) -> Callable[[Verb], Verb]:
    """Return a decorator that gives a verb a flag for each setting of some tables.

    The verb gets the settings in its first argument, a dictionary: name with underscores -> value.

    Args:
        *tables: dataclasses of settings.
        order: the names of all flags of the verb, as its help lists them. Settings that are not named get no flag. A
            parameter of the verb has priority over a setting of the same name.
        required: settings that this verb requires, although they have a default.
        unset: settings that are None if their flag is not given, instead of their default.
        wording: name of a setting -> attributes of its `Setting` that this verb changes.
    """

    def decorate(verb: Verb) -> Verb:
        others = dict(list(signature(verb).parameters.items())[1:])
        table_entries = {
            name: entry for name, entry in entries(*tables).items() if name in order and name not in others
        }
        for name, entry in table_entries.items():
            default = MISSING if name in required else None if name in unset else entry.default
            setting = replace(entry.setting, **(wording or {}).get(name, {}))
            table_entries[name] = replace(entry, default=default, setting=setting)
        parameters = [others[name] if name in others else parameter_of(table_entries[name]) for name in order]

        @wraps(verb)
        def run(**flags: Any) -> None:
            settings = {name: _value(entry, flags.pop(name)) for name, entry in table_entries.items()}
            verb(settings, **flags)

        by_name = [parameter.replace(kind=Parameter.KEYWORD_ONLY) for parameter in parameters]
        run.__signature__ = Signature(by_name)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return run

    return decorate


def given(settings: Mapping[str, Any], context: typer.Context) -> dict[str, Any]:
    """Return the settings that the user typed in the command or in a recipe file: name -> value.

    Defaults, presets and a run's own recipe do not count. `settings` are all settings of the verb, and `context` is
    Typer's context of the verb.
    """
    untyped = context.meta.get(UNTYPED, frozenset())
    sources = {name: context.get_parameter_source(name) for name in settings}
    return {
        name: settings[name]
        for name, source in sources.items()
        if source is not None and source.name != "DEFAULT" and not (source.name == "DEFAULT_MAP" and name in untyped)
    }


def copied(context: typer.Context) -> frozenset[str]:
    """Return the names of the settings whose values come from a run's own recipe (`--recipe RUN/recipe.toml`).

    `context` is Typer's context of the verb.
    """
    names: frozenset[str] = context.meta.get(COPIED, frozenset())
    sources = {name: context.get_parameter_source(name) for name in names}
    return frozenset(name for name, source in sources.items() if source is not None and source.name == "DEFAULT_MAP")


def parameter_of(entry: Entry) -> Parameter:
    """Return the parameter of a verb's Python function for the setting `entry`. Typer makes the flag from it."""
    return Parameter(
        entry.name,
        Parameter.KEYWORD_ONLY,
        default=Parameter.empty if entry.required else entry.text,
        annotation=Annotated[_type(entry), option(entry)],
    )


def flag(table: type, name: str) -> Any:
    """Return the Typer option for the setting `name` of a table (a dataclass of settings)."""
    return option(entries(table)[name])


def option(entry: Entry) -> Any:
    """Return the Typer option for a setting."""
    setting, words = entry.setting, choices(entry.type)
    offered = words or setting.words
    options: dict[str, Any] = dict(_range(entry)) if setting.ranged else {}
    if setting.code:
        options["callback"] = check_code
    return typer.Option(
        entry.flag + (f"/--no-{entry.flag[2:]}" if entry.type is bool and entry.default is not False else ""),
        help=setting.help,
        rich_help_panel=setting.panel,
        metavar=setting.metavar or ("|".join(words) if words else None),
        autocompletion=None if offered is None else _completer(offered),
        show_default=setting.default_shown,
        **options,
    )


def show_plain_types(parameters: Iterable[Any]) -> None:
    """Change how a command's help shows types: N, X, PATH or TEXT after a flag that takes a value, otherwise nothing.

    `parameters` are the parameters of a click command. Flags that have a metavar keep it.
    """
    for parameter in parameters:
        if parameter.param_type_name == "argument":
            parameter.display_type = lambda context: ""
        elif parameter.is_flag:
            parameter.metavar = ""
        elif parameter.metavar is None:
            kind = parameter.bare_type() if hasattr(parameter, "bare_type") else parameter.type.name
            starts = (("int", "N"), ("float", "X"), ("path", "PATH"))
            parameter.metavar = next((word for start, word in starts if kind.lower().startswith(start)), "TEXT")


def _completer(words: Iterable[str] | Callable[[], Iterable[str]]) -> Callable[[str], list[str]]:
    """Return a function that completes the last part of a value. The value may be a sum (kl+at) or a list (a,b)."""

    def complete(incomplete: str) -> list[str]:
        offered = words() if callable(words) else words
        begun = max(incomplete.rfind("+"), incomplete.rfind(",")) + 1
        return [incomplete[:begun] + word for word in offered if word.startswith(incomplete[begun:])]

    return complete


def check_code(context: typer.Context, parameter: typer.CallbackParam, spec: str) -> str:
    """Check that code named by a recipe is trusted, and return the spec. Typer calls this for flags that may name code.

    Code that the command line itself names is trusted. Raises: RecipeError for other code without --trust.
    """
    source = context.get_parameter_source(str(parameter.name))
    if source is not None and source.name == "DEFAULT_MAP":
        from kdcache.models.trust import check_trusted  # imports torch

        check_trusted(spec, str(context.params.get("recipe")))
    return spec


def _type(entry: Entry) -> Any:
    """Return the type that Typer checks: numbers and switches. For Typer, choices and sizes are text."""
    kind = entry.type
    if entry.setting.repeated:
        kind = list[str]
    elif entry.spelling is not None or choices(kind) is not None:
        kind = str
    return kind if entry.required or entry.text is not None else kind | None


def _range(entry: Entry) -> Iterator[tuple[str, Any]]:
    for mark in entry.marks:
        if isinstance(mark, Ge):
            yield "min", mark.ge
        if isinstance(mark, Le):
            yield "max", mark.le


def _value(entry: Entry, value: Any) -> Any:
    """Return the value of a setting from the value that Typer parsed. A repeated flag gives a tuple."""
    return tuple(value or ()) if entry.setting.repeated else value
