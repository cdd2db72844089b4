"""The entries of a table of settings."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import MISSING, dataclass, field, fields
from functools import cache
from os import PathLike
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from annotated_types import Ge, Gt, Le, Lt, MinLen

T = TypeVar("T")

REQUIRED: Any = MISSING
"""The default of a required setting."""


@dataclass(frozen=True)
class Setting:
    """How the command line shows a setting.

    Attributes:
        help: its help text, one or two sentences.
        panel: the heading in the help that lists the flag. None is the first heading, `Options`.
        metavar: the placeholder for the value in the help. None uses the type.
        repeated: True if the flag may be given several times. The value collects all.
        automatic: True if there is no default, because the data and the machine determine it.
        ranged: True if the help shows the range of numbers, and the command line itself checks it.
        default_shown: True if the help shows the default.
        code: True if the value may name code to import. A recipe from elsewhere then needs --trust.
        words: values that a shell completes, if the type has no choices.
    """

    help: str
    panel: str | None = None
    metavar: str | None = None
    repeated: bool = False
    automatic: bool = False
    ranged: bool = False
    default_shown: bool = True
    code: bool = False
    words: tuple[str, ...] | Callable[[], Iterable[str]] | None = None


def setting(default: T, help: str, **shown: Any) -> T:
    """Return a dataclass field that declares a setting, with its default and its help.

    Args:
        default: the default, or REQUIRED for a setting without a default.
        help: the help text.
        shown: how the command line shows the setting: other fields of `Setting`, such as `metavar` or `panel`.
    """
    declared: Any = field(default=default, metadata={"setting": Setting(help, **shown)})
    return cast(T, declared)


@dataclass(frozen=True)
class Spelling:
    """How a value is written as text, for example a size as `288x384`. It annotates the type of a setting.

    Attributes:
        parse: returns the value of a text. It raises ValueError or RecipeError.
        rule: describes the text in errors, such as "HEIGHTxWIDTH in pixels". None if the type or `parse` describes it.
        example: a valid text.
        show: returns the text of a value for a recipe. None if a recipe holds the value itself.
        nothing: the text that stands for the value None. None if no text does.
        text_only: True if `parse` is called for texts only. Other values then pass unchanged.
    """

    parse: Callable[[Any], Any]
    rule: str | None
    example: str
    show: Callable[[Any], str] | None = None
    nothing: str | None = None
    text_only: bool = True

    def read(self, value: Any) -> Any:
        """Return the value that a text stands for.

        If `text_only` is False, values of other types are also parsed. Otherwise they are returned unchanged.

        Raises: ValueError or RecipeError for an invalid text.
        """
        return value if self.text_only and not isinstance(value, str) else self.parse(value)

    def __get_pydantic_core_schema__(self, source: Any, handler: Callable[[Any], Any]) -> Any:
        from pydantic_core import core_schema

        serializer = None if self.show is None else core_schema.plain_serializer_function_ser_schema(self.show)
        return core_schema.no_info_before_validator_function(self.read, handler(source), serialization=serializer)


@dataclass(frozen=True)
class Entry:
    """A setting, as a field of a dataclass declares it.

    Attributes:
        name: the field's name, such as `batch_size`.
        hint: the field's full annotation.
        type: the annotation without None and without `Annotated`. For choices it is `Literal[...]`.
        optional: True if the value may be None.
        default: the default, or `dataclasses.MISSING` if the setting is required.
        setting: how the command line shows it.
        spelling: how the value is written as text, or None.
        marks: all metadata of `Annotated` in the annotation, such as `Ge(0)`.
    """

    name: str
    hint: Any
    type: Any
    optional: bool
    default: Any
    setting: Setting
    spelling: Spelling | None
    marks: tuple[Any, ...]

    @property
    def flag(self) -> str:
        """The flag, such as `--batch-size`."""
        return "--" + self.name.replace("_", "-")

    @property
    def required(self) -> bool:
        """True if the setting has no default."""
        return self.default is MISSING

    @property
    def text(self) -> Any:
        """The default as a user would type it, such as `288x384`.

        None if the setting is required, may be repeated, or gets its default from data and machine (`automatic`). Also
        None if no text stands for the default None.
        """
        if self.setting.automatic or self.setting.repeated or self.required:
            return None
        if self.spelling is None:
            return self.default
        if self.default is None:
            return self.spelling.nothing
        return self.default if self.spelling.show is None else self.spelling.show(self.default)


@cache
def entries(*tables: type) -> dict[str, Entry]:
    """Return the settings that dataclasses declare, in order: name, such as `batch_size` -> entry.

    `tables` are the dataclasses. Fields that were not made by `setting` are left out.
    """
    found = {}
    for table in tables:
        hints = get_type_hints(table, include_extras=True)
        for declared in fields(table):
            kind, optional, marks = _bare(hints[declared.name])
            spelling = next((mark for mark in marks if isinstance(mark, Spelling)), None)
            if "setting" in declared.metadata:
                display = declared.metadata["setting"]
                found[declared.name] = Entry(
                    declared.name, hints[declared.name], kind, optional, declared.default, display, spelling, marks
                )
    return found


def names(*tables: type, panel: str | None) -> tuple[str, ...]:
    """Return the names of the settings that the help lists under the heading `panel`. None is the heading `Options`.

    `tables` are dataclasses that declare settings.
    """
    return tuple(name for name, entry in entries(*tables).items() if entry.setting.panel == panel)


def _bare(annotation: Any) -> tuple[Any, bool, tuple[Any, ...]]:
    """Return (type, True if the value may be None, all marks) of an annotation."""
    if get_origin(annotation) is Annotated:
        inner, *outer = get_args(annotation)
        kind, optional, marks = _bare(inner)
        return kind, optional, (*outer, *marks)
    if get_origin(annotation) in (Union, UnionType) and NoneType in get_args(annotation):
        parts = [part for part in get_args(annotation) if part is not NoneType]
        if len(parts) == 1:
            kind, _, marks = _bare(parts[0])
            return kind, True, marks
    return annotation, False, ()


def choices(kind: Any) -> tuple[str, ...] | None:
    """Return the words of a type `Literal[...]`, or None for another type."""
    return get_args(kind) if get_origin(kind) is Literal else None


_KINDS: dict[Any, str] = {
    **{int: "a whole number", float: "a number", bool: "true or false", str: "text"},
    **{Path: "a path", PathLike: "a path"},
}


def describe_values(kind: Any, bounds: Sequence[Any]) -> str:
    """Return the values of type `kind` in words, such as 'a whole number from 0 to 256' or 'one of adamw, adam, sgd'.

    `bounds` are ranges of annotated-types, such as `Ge(0)`.
    """
    if get_origin(kind) is Annotated:
        inner, *more = get_args(kind)
        return describe_values(inner, [*bounds, *more])
    if get_origin(kind) is Literal:
        return f"one of {', '.join(map(str, get_args(kind)))}"
    if get_origin(kind) in (Union, UnionType):
        *others, last = [describe_values(part, bounds) for part in get_args(kind) if part is not NoneType]
        return f"{', '.join(others)} or {last}" if others else last
    if get_origin(kind) is tuple:
        parts = get_args(kind)
        inner = describe_values(parts[0], ())
        return f"a list, each {inner}" if parts[-1] is ... else f"{len(parts)} values, each {inner}"
    if get_origin(kind) is Callable:
        return "a function"
    if get_args(kind) and issubclass(get_origin(kind), Iterable):
        return f"a list, each {describe_values(get_args(kind)[0], ())}"
    home = get_origin(kind) or kind
    return f"{_KINDS.get(home) or (f'a {home.__name__}' if isinstance(home, type) else 'a value')}{_range(bounds)}"


def _range(bounds: Sequence[Any]) -> str:
    """Return ' from 0 to below 1', ' above 0', ' from 1 on', ', not empty' or nothing."""
    flat = [mark for bound in bounds for mark in getattr(bound, "metadata", [bound])]
    if any(isinstance(bound, MinLen) for bound in flat):
        return ", not empty"
    low = next((f" from {bound.ge}" for bound in flat if isinstance(bound, Ge)), "")
    low = next((f" above {bound.gt}" for bound in flat if isinstance(bound, Gt)), low)
    high = next((f" to {bound.le}" for bound in flat if isinstance(bound, Le)), "")
    high = next((f" to below {bound.lt}" for bound in flat if isinstance(bound, Lt)), high)
    if low.startswith(" from") and not high:
        high = " on"
    return low + high
