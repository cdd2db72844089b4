"""The one validator of settings: flags, keys of recipes, keywords of Python, and options of terms."""

from collections.abc import Collection, Mapping
from dataclasses import MISSING, dataclass
from functools import cache
from typing import Any, TypeVar

from kdcache.errors import RecipeError, suggest
from kdcache.settings.removed import SETTINGS, removal
from kdcache.settings.setting import Entry, choices, describe_values, entries

Table = TypeVar("Table")


ALL_FLAGS = "--help-all lists all flags."
"""The advice that says where all settings are listed."""


@dataclass(frozen=True)
class Wording:
    """The way in which errors write a setting: two patterns, such as `{flag}` and `{flag} {value}`.

    For the setting `batch_size`, `{name}` stands for `batch_size` and `{flag}` for `--batch-size`.

    Attributes:
        name: the pattern for a setting without its value.
        typed: the pattern for a setting with its value. `{value}` stands for the value.
    """

    name: str
    typed: str

    def setting(self, name: str) -> str:
        """Return the text for a setting without its value, for example `--size`. `name` has underscores."""
        return self.name.format(name=name, flag=_flag(name))

    def given(self, name: str, value: Any) -> str:
        """Return the text for a setting with its value, for example `--size 3`. `name` has underscores."""
        return self.typed.format(name=name, flag=_flag(name), value=value)


FLAGS = Wording("{flag}", "{flag} {value}")


def read(table: type[Table], settings: Mapping[str, Any], wording: Wording = FLAGS) -> Table:
    """Return a table (a dataclass of settings) with checked values.

    Args:
        table: the dataclass.
        settings: name with underscores -> value. Missing ones get the table's default, and unknown ones are ignored.
        wording: how errors write a setting.
    Raises: RecipeError for the first wrong value.
    """
    return table(**read_values(settings, table, wording=wording))


def read_values(settings: Mapping[str, Any], *tables: type, wording: Wording = FLAGS) -> dict[str, Any]:
    """Return the checked values of settings: name -> value. No default is filled in for a missing setting.

    Args:
        settings: name with underscores -> value.
        tables: the dataclasses that declare settings. Other names in `settings` are ignored.
        wording: how errors write a setting.
    Raises: RecipeError for the first wrong value.
    """
    mine = {name: entry for name, entry in entries(*tables).items() if name in settings}
    return {
        name: read_value(entry, settings[name], wording)
        for name, entry in mine.items()
        if settings[name] is not None or not entry.setting.automatic
    }


def read_value(entry: Entry, value: Any, wording: Wording = FLAGS, *, strict: bool = False) -> Any:
    """Return the checked value of a setting.

    Args:
        entry: the setting.
        value: its value, as text or in its own type.
        wording: how the error writes the setting: as a flag or as a keyword of a function, for example.
        strict: True does not accept a text for a number.
    Raises: RecipeError, which describes the values that the setting takes.
    """
    spelling = entry.spelling
    try:
        read = value if spelling is None or value is None else spelling.read(value)
        return None if read is None and entry.optional else _adapter(entry.hint).validate_python(read, strict=strict)
    except (TypeError, ValueError) as error:
        raise _invalid(entry, value, wording) from error


def dump_values(values: Mapping[str, Any], *tables: type) -> dict[str, Any]:
    """Return the values of settings as recipes hold them: name -> TOML value. For example (288, 384) becomes '288x384'.

    Args:
        values: name with underscores -> value. The names do not change.
        tables: the dataclasses that declare the settings.
    """
    table = entries(*tables)
    return {name: _adapter(table[name].hint).dump_python(value, mode="json") for name, value in values.items()}


def check_names(given: Collection[str], names: Collection[str]) -> None:
    """Check that all given settings are known. Names have underscores.

    Raises: RecipeError for an unknown setting, with its replacement or the nearest name.
    """
    for name in given:
        if name in names:
            continue
        if (gone := removal(_flag(name), SETTINGS)) is not None:
            raise gone
        raise RecipeError(
            f"Unknown setting {_flag(name)}",
            fix=suggest(_flag(name), map(_flag, names), f"Leave it out. {ALL_FLAGS}"),
        )


def _invalid(entry: Entry, value: Any, wording: Wording) -> RecipeError:
    """Return the error for a value that a setting does not take."""
    rule, example = describe_values(entry.type, entry.marks), entry.default
    words = choices(entry.type) or ()
    if entry.spelling is not None:
        rule, example = entry.spelling.rule or rule, entry.spelling.example
    elif words:
        example = words[0]
    example_text = None if example in (None, (), "", MISSING) else wording.given(entry.name, example)
    near = suggest(str(value), words)
    end = f"for example {example_text}" if example_text else "or leave it out."
    return RecipeError(
        f"Invalid value of {wording.setting(entry.name)}: {_quoted(value)}",
        fix=f"{near} Give {rule}." if near else f"Give {rule}, {end}",
    )


def _quoted(value: Any) -> str:
    """Return a value for an error. Values of a repeated flag are separated by commas."""
    several = isinstance(value, list | tuple) and value and all(isinstance(part, str) for part in value)
    return ", ".join(map(repr, value)) if several else repr(value)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


@cache
def _adapter(hint: Any) -> Any:
    from pydantic import ConfigDict, TypeAdapter  # the command line starts without it

    return TypeAdapter(hint, config=ConfigDict(arbitrary_types_allowed=True))
