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
"""The default of a setting that must be given."""


@dataclass(frozen=True)
class Setting:
    """A setting as the command line shows it.

    Attributes:
        help: one or two sentences.
        panel: heading of the help that lists the flag. None is the first, `Options`.
        metavar: placeholder of the value in the help. None is the type.
        repeated: the flag may be given several times, each time with one entry of the value.
        automatic: the flag has no default. Its value is chosen when the data and the machine are known.
        ranged: the help shows the range of the type, which the command line checks by itself.
        default_shown: the help shows the default.
        code: the value may name code to import, which a recipe from elsewhere must not do without --trust.
        words: what a shell completes the value with, if the type has no choices.
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
    """Return a field of a table with a default. `help` and `shown` are attributes of `Setting`."""
    made: Any = field(default=default, metadata={"setting": Setting(help, **shown)})
    return cast(T, made)


@dataclass(frozen=True)
class Spelling:
    """How a value is written as text. It is a mark in the annotation of a type, which pydantic applies.

    Attributes:
        parse: makes the value from a text. Raises ValueError or RecipeError.
        rule: what the text is, as in "--size is HEIGHTxWIDTH in pixels", or None if the type or `parse` has the rule.
        example: a valid text.
        show: makes the text of a value, or None if a recipe holds the value itself.
        nothing: the text that stands for None.
        text_only: `parse` is called only for texts, else for any value.
    """

    parse: Callable[[Any], Any]
    rule: str | None
    example: str
    show: Callable[[Any], str] | None = None
    nothing: str | None = None
    text_only: bool = True

    def read(self, value: Any) -> Any:
        """Return the value of a text, or of another value. Raises: as `parse`."""
        return value if self.text_only and not isinstance(value, str) else self.parse(value)

    def __get_pydantic_core_schema__(self, source: Any, handler: Callable[[Any], Any]) -> Any:
        from pydantic_core import core_schema

        shown = None if self.show is None else core_schema.plain_serializer_function_ser_schema(self.show)
        return core_schema.no_info_before_validator_function(self.read, handler(source), serialization=shown)


@dataclass(frozen=True)
class Entry:
    """One setting of a table.

    Attributes:
        hint: the whole annotation.
        type: the type without marks and without None. For choices, `Literal[...]`.
        optional: the value may be None.
        default: `dataclasses.MISSING` if the setting is required.
        marks: everything else in the annotation, such as ranges of annotated-types.
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
        """The name of the flag, such as `--batch-size`."""
        return "--" + self.name.replace("_", "-")

    @property
    def required(self) -> bool:
        """Whether the setting has no default."""
        return self.default is MISSING

    @property
    def text(self) -> Any:
        """The default as a user would type it, or None if it cannot be typed."""
        if self.setting.automatic or self.setting.repeated or self.required:
            return None
        if self.spelling is None:
            return self.default
        if self.default is None:
            return self.spelling.nothing
        return self.default if self.spelling.show is None else self.spelling.show(self.default)


@cache
def entries(*tables: type) -> dict[str, Entry]:
    """Return the settings of tables by name, in order, without fields that have no `Setting`."""
    made = {}
    for table in tables:
        hints = get_type_hints(table, include_extras=True)
        for own in fields(table):
            kind, optional, marks = _bare(hints[own.name])
            spelling = next((mark for mark in marks if isinstance(mark, Spelling)), None)
            if "setting" in own.metadata:
                shown = own.metadata["setting"]
                made[own.name] = Entry(own.name, hints[own.name], kind, optional, own.default, shown, spelling, marks)
    return made


def names(*tables: type, panel: str | None) -> tuple[str, ...]:
    """Return the names of the settings under one panel of the help."""
    return tuple(name for name, entry in entries(*tables).items() if entry.setting.panel == panel)


def _bare(annotation: Any) -> tuple[Any, bool, tuple[Any, ...]]:
    """Return (Type, whether None is one of its values, marks at any depth) of an annotation."""
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
    """Return the words of `Literal[...]`, or None for another type."""
    return get_args(kind) if get_origin(kind) is Literal else None


_KINDS: dict[Any, str] = {
    **{int: "a whole number", float: "a number", bool: "true or false", str: "text"},
    **{Path: "a path", PathLike: "a path"},
}


def describe_values(kind: Any, bounds: Sequence[Any]) -> str:
    """Describe the values of a type: 'a whole number from 0 to 256', 'one of adamw, adam, sgd'.

    `bounds` are marks of annotated-types.
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
    flat = [one for bound in bounds for one in getattr(bound, "metadata", [bound])]
    if any(isinstance(bound, MinLen) for bound in flat):
        return ", not empty"
    low = next((f" from {bound.ge}" for bound in flat if isinstance(bound, Ge)), "")
    low = next((f" above {bound.gt}" for bound in flat if isinstance(bound, Gt)), low)
    high = next((f" to {bound.le}" for bound in flat if isinstance(bound, Le)), "")
    high = next((f" to below {bound.lt}" for bound in flat if isinstance(bound, Lt)), high)
    return low + (high or " on" * low.startswith(" from"))
