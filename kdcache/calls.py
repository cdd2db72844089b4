"""Check the arguments of calls from Python before anything runs, with errors that name keywords, not flags."""

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import wraps
from inspect import Parameter, signature
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from annotated_types import Ge, Gt, Le, Predicate

from kdcache.errors import KDCacheError, RecipeError
from kdcache.settings.setting import describe_values, entries
from kdcache.settings.training import TRAINING
from kdcache.settings.validate import ALL_FLAGS, check_names

_FLAG = re.compile(r"(?<![\w-])--(?P<no>no-)?(?P<flag>[a-z][a-z-]*)(?: (?P<value>[^\s;(][^\s;]*?)(?=[.,:)]*(?:\s|$)))?")
_COMMAND = re.compile(r"\bkdcache [a-z]")
_PLACEHOLDER = re.compile("[A-Z]+(x[A-Z]+)?")
_IN_PYTHON = {"from": "reuse", "json": "json_file"}
"""Flags whose keyword has another name."""
_TYPES: dict[Any, Any] = {int: Integral, float: Real, tuple: tuple | list}


@dataclass(frozen=True)
class Fix:
    """A mark for the type of an argument. `text` is the fix in the error for a value that does not have that type.

    `Annotated[int, Fix("Give a whole number.")]` is an example.
    """

    text: str


def called_from_python(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    """Wrap a function of kdcache so that its arguments are checked before it runs.

    The wrapper raises a KDCacheError for wrong arguments. In the text of every KDCacheError, it replaces flags of the
    command line by keywords of the function.

    Args:
        function: the function to wrap.
        name: its name in kdcache, such as `train` for `kdcache.train`.
    """
    parameters = signature(function).parameters

    @wraps(function)
    def call(*args: Any, **keywords: Any) -> Any:
        try:
            _check(function, parameters, args, keywords)
            return function(*args, **keywords)
        except KDCacheError as error:
            _name_keywords(error, name, parameters, keywords)
            raise

    call.__module__, call.__name__, call.__qualname__ = "kdcache", name, name
    return call


def _check(
    function: Callable[..., Any], parameters: Mapping[str, Parameter], args: tuple[Any, ...], keywords: dict[str, Any]
) -> None:
    """Check the names and types of arguments. Raises: RecipeError for the first that is wrong or missing."""
    check_names(keywords, parameters)
    unnamed = [parameter.name for parameter in parameters.values() if parameter.kind is Parameter.POSITIONAL_OR_KEYWORD]
    given = dict(zip(unnamed, args, strict=False))
    if len(args) > len(unnamed):
        raise RecipeError(f"Too many values without a name: {len(args)}", fix=f"Name all after {', '.join(unnamed)}.")
    if twice := given.keys() & keywords.keys():
        raise RecipeError(f"Two values of {' and '.join(map(_flag, twice))}", fix="Leave one of them out.")
    given |= keywords
    required = [parameter.name for parameter in parameters.values() if parameter.default is Parameter.empty]
    if missing := [name for name in required if name not in given]:
        raise RecipeError(
            f"Missing {', '.join(map(_flag, missing))}",
            fix=f"Add {'it' if len(missing) == 1 else 'them'}. {ALL_FLAGS}",
        )
    hints = get_type_hints(function, include_extras=True)
    for name, value in given.items():
        if name in hints and not _fits(value, hints[name]):
            fix = _fix_of(hints[name]) or f"Give {describe_values(hints[name], ())}."
            raise RecipeError(f"Invalid value of {_flag(name)}: {_shown(value)}", fix=fix)


def _fits(value: Any, hint: Any) -> bool:
    """Return True if a value has the type `hint` and is in its range. Elements of lists are also checked."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _fits(value, args[0]) and all(_within(value, mark) for mark in args[1:])
    if origin in (Union, UnionType):
        return any(_fits(value, part) for part in args)
    if origin is Literal:
        return isinstance(value, str) and value in args
    if hint is Any or hint is None or hint is NoneType:
        return hint is Any or value is None
    kind = origin or hint
    if not isinstance(value, _TYPES.get(kind, kind)) or (isinstance(value, bool) and kind in (int, float)):
        return False
    if issubclass(kind, Iterable) and args and isinstance(value, list | tuple | str):
        parts = [args[0]] * len(value) if kind is not tuple or args[-1] is ... else args
        return not isinstance(value, str) and len(parts) == len(value) and all(map(_fits, value, parts))
    return True


def _fix_of(hint: Any) -> str:
    """Return the text of the first `Fix` of a type, or ''."""
    texts = (mark.text for mark in getattr(hint, "__metadata__", ()) if isinstance(mark, Fix))
    return next((text for text in (*texts, *map(_fix_of, get_args(hint))) if text), "")


def _within(value: Any, mark: Any) -> bool:
    """Return False if a number is NaN or outside the range that a mark such as `Ge(0)` gives."""
    match mark:
        case Ge(ge):
            return bool(value >= ge)
        case Gt(gt):
            return bool(value > gt)
        case Le(le):
            return bool(value <= le)
        case Predicate(test):
            return bool(test(value))
    return True


def _shown(value: Any) -> str:
    """Return a short value as Python writes it. For a long one, return its type."""
    text = repr(value)
    return text if len(text) < 60 and "\n" not in text else f"a {type(value).__module__}.{type(value).__qualname__}"


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _name_keywords(
    error: KDCacheError, function: str, parameters: Mapping[str, Parameter], given: Collection[str]
) -> None:
    """Write the flags of an error as keywords of a function. Commands, which begin with `kdcache VERB`, stay."""

    def keyword(match: re.Match[str]) -> str:
        flag = match["flag"].rstrip("-")
        name = _IN_PYTHON.get(flag, flag).replace("-", "_")
        if name not in parameters and name not in given:
            return match[0]
        hint = parameters[name].annotation if name in parameters else None
        after = "" if match["value"] is None else f" {match['value']}"
        if hint is bool and not match.string.startswith("?", match.end()):
            return f"{name}={match['no'] is None}{after}"
        if after and (value := _written(match["value"], _words(hint) | _words_of(name))):
            return f"{name}={value}"
        return f"{name}={after}"

    def reworded(text: str) -> str:
        command = _COMMAND.search(text)
        end = len(text) if command is None else command.start()
        sentence = text[:end].replace(ALL_FLAGS, f"help(kdcache.{function}) lists all.")
        return _FLAG.sub(keyword, sentence) + text[end:]

    error.problem, error.fix, error.rule = map(reworded, (error.problem, error.fix, error.rule))
    error.args = (error.problem, error.fix, error.rule)


def _written(word: str, words: Collection[str]) -> str:
    """Return the word after a flag as a value in Python, or '' if the word belongs to the sentence."""
    if _PLACEHOLDER.fullmatch(word) or word[0] in "'\"" or re.fullmatch(r"-?[\d.]+(e-?\d+)?", word):
        return word
    return repr(word) if not word.isalpha() or word in {"none", "auto", "full", *words} else ""


def _words_of(name: str) -> set[str]:
    """Return the words that a setting of a training may begin with."""
    entry = entries(*TRAINING).get(name)
    words = None if entry is None else entry.setting.words
    return set((words() if callable(words) else words) or ())


def _words(hint: Any) -> set[str]:
    """Return the words of all `Literal[...]` in a type."""
    parts = get_args(hint)
    return {part for part in parts if isinstance(part, str)}.union(*(_words(p) for p in parts if get_origin(p)))
