"""The errors a user of kdcache can meet.

    KDCacheError
    ├── StoreError          something about a store
    │   ├── IncompleteError     it is half built
    │   ├── CorruptError        its bytes are not what was written
    │   ├── MismatchError       it was made from something else
    │   └── VersionError        it has a format this version does not read
    ├── DataError           images, labels, class lists, data folders
    ├── RecipeError         flags, recipe files, run folders
    └── ModelError          model specs, weights, teachers, non-finite losses

Each names the rule, what was received and the remedy. The command line prints them in one panel and exits with 2.
"""

import logging
import re
from typing import Self

_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")


def plain_text(text: str) -> str:
    """A string from elsewhere (a name, a path, somebody's error) without what commands a terminal or turns text round.

    Line ends and tabs stay.
    """
    return _CONTROLS.sub("", text)


def one_line(text: str) -> str:
    """A string as `plain_text` in one line: a name in a table, a panel or a log makes no line of its own."""
    return plain_text(text).replace("\n", " ").replace("\t", " ")


class _PlainLines(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = one_line(record.getMessage()), ()
        return True


def plain_logger(name: str) -> logging.Logger:
    """A logger of kdcache: text from elsewhere in its messages makes no line of its own and commands no terminal."""
    logger = logging.getLogger(name)
    logger.addFilter(_PlainLines(name))
    return logger


class KDCacheError(Exception):
    """Base of every error that kdcache raises on purpose.

    Args:
        rule: what must hold, in one sentence.
        received: what was found instead.
        remedy: what the user can do about it.
    """

    def __init__(self, rule: str, *, received: str, remedy: str) -> None:
        self.rule, self.received, self.remedy = map(plain_text, (rule, received, remedy))
        super().__init__(self.rule, self.received, self.remedy)

    def __str__(self) -> str:
        return f"{self.rule}\n  received: {self.received}\n  remedy:   {self.remedy}"

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.rule, self.received, self.remedy)

    def restated(self, *, received: str, remedy: str | None = None) -> Self:
        """Return the same error about something received elsewhere, with another remedy if one is given."""
        return type(self)(self.rule, received=received, remedy=self.remedy if remedy is None else remedy)


def _rebuild(kind: type[KDCacheError], rule: str, received: str, remedy: str) -> KDCacheError:
    """Let an error cross a process boundary (a DataLoader worker) with its parts."""
    return kind(rule, received=received, remedy=remedy)


class StoreError(KDCacheError):
    """Something about a store is wrong."""


class IncompleteError(StoreError):
    """The store is half built."""


class CorruptError(StoreError):
    """The store's bytes are not what was written."""


class MismatchError(StoreError):
    """The store was made from something else."""


class VersionError(StoreError):
    """The store has a format that this version does not read."""


class DataError(KDCacheError):
    """Images, labels, class lists or a data folder are wrong."""


class RecipeError(KDCacheError):
    """Flags, a recipe file or a run folder are wrong."""


class ModelError(KDCacheError):
    """A model spec, its weights or its output are wrong."""
