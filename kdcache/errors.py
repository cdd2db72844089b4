"""The errors that a user of kdcache can meet.

    KDCacheError
    ├── StoreError          something about a cache
    │   ├── IncompleteError     it is not finished
    │   ├── CorruptError        its bytes are not what was written
    │   ├── MismatchError       it was made from something else
    │   └── VersionError        it has a format this version does not read
    ├── DataError           images, labels, class lists, data folders
    ├── RecipeError         flags, recipe files, run folders
    └── ModelError          model specs, weights, teachers, non-finite losses

Each names the problem and the fix. The command line prints them in one panel and exits with 2.
"""

import difflib
import logging
import re
from collections.abc import Iterable
from typing import Self

_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")


def plain_text(text: str) -> str:
    """Return a string from elsewhere (a name, a path, an error) without control characters or text direction marks.

    Line ends and tabs stay.
    """
    return _CONTROLS.sub("", text)


def one_line(text: str) -> str:
    """Return a string on one line and without control characters, for names in tables, panels and logs."""
    return plain_text(text).replace("\n", " ").replace("\t", " ")


class _PlainLines(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = one_line(record.getMessage()), ()
        return True


def plain_logger(name: str) -> logging.Logger:
    """Return the logger `name`, with a filter that makes each message one line without control characters."""
    logger = logging.getLogger(name)
    logger.addFilter(_PlainLines(name))
    return logger


class KDCacheError(Exception):
    """Base of every error that kdcache raises on purpose.

    >>> import kdcache
    >>> try:
    ...     kdcache.open_cache("nope.zarr")
    ... except kdcache.KDCacheError as error:
    ...     print(error.problem)
    Cache not found: nope.zarr

    Args:
        problem: what is wrong, with its value, in one sentence.
        fix: what the user can do about it, in the imperative.
        rule: what must hold, if it adds something.
    """

    def __init__(self, problem: str, *, fix: str, rule: str = "") -> None:
        self.problem, self.fix, self.rule = map(plain_text, (problem, fix, rule))
        super().__init__(self.problem, self.fix, self.rule)

    def __str__(self) -> str:
        return "\n  ".join(part for part in (self.problem, f"fix: {self.fix}", self.rule) if part)

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.problem, self.fix, self.rule)

    def within(self, place: str, *, fix: str | None = None) -> Self:
        """Return a copy of this error whose problem begins with `place`, such as a file or a stream, and a colon.

        If `fix` is given, it replaces the error's fix.
        """
        return type(self)(f"{place}: {self.problem}", fix=self.fix if fix is None else fix, rule=self.rule)


def _rebuild(kind: type[KDCacheError], problem: str, fix: str, rule: str) -> KDCacheError:
    """Let an error cross a process boundary (a DataLoader worker) with its parts."""
    return kind(problem, fix=fix, rule=rule)


def suggest(word: str, names: Iterable[str], otherwise: str = "", *, cutoff: float = 0.6) -> str:
    """Return "Did you mean NAME?" with the name closest to a misspelt word, or `otherwise` if none is close.

    Args:
        word: the misspelt word. Upper and lower case count as equal.
        names: the correct names.
        otherwise: the text if no name is close.
        cutoff: how similar a close name must be, from 0 to 1, as in `difflib`.
    """
    by_lower = {name.lower(): name for name in names}
    near = difflib.get_close_matches(word.lower(), by_lower, n=1, cutoff=cutoff)
    return f"Did you mean {by_lower[near[0]]}?" if near else otherwise


class StoreError(KDCacheError):
    """A cache is wrong: missing, incomplete, damaged, of another format, or not made for its purpose."""


class IncompleteError(StoreError):
    """A cache is incomplete, because its build was interrupted or is still running."""


class CorruptError(StoreError):
    """A cache is damaged: its files do not hold the bytes that were written."""


class MismatchError(StoreError):
    """A cache, a run and a data set do not belong together, for example because their classes differ."""


class VersionError(StoreError):
    """A cache has a format that this version of kdcache cannot read."""


class DataError(KDCacheError):
    """Images, labels, a class list or a data folder are wrong."""


class RecipeError(KDCacheError):
    """Flags, a recipe file or a run folder are wrong."""


class ModelError(KDCacheError):
    """A model spec, a model's weights or a model's output are wrong."""
