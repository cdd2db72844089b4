"""What the parser of the command line refuses, as errors of kdcache."""

import difflib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer

from kdcache.errors import RecipeError
from kdcache.settings.removed import FLAGS, SETTINGS, VERBS, removal

_UsageError: Any = typer.BadParameter.__base__
"""The base of all that the parser refuses; Typer exports this one of its kinds."""


_NO_COMMAND = re.compile("No such command '([^']*)'")
_ANYWHERE = ("--quiet", "--debug", "--trust")


@contextmanager
def parse_errors(context: Any = None) -> Iterator[None]:
    """A context in which words that are no command raise a RecipeError.

    Args:
        context: of the parser; its verb is the one that an error is about which names none.
    """
    try:
        yield
    except _UsageError as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            raise
        verb = " ".join(["kdcache"] if context is None else [context.command_path, context.invoked_subcommand or ""])
        raise _restated(error, error.ctx.command_path if error.ctx else verb.rstrip()) from None


def _restated(error: Any, verb: str) -> RecipeError:
    kind, help_of = type(error).__name__, f"{verb} --help"
    if kind == "NoSuchOption":
        of_verb = f"{verb} {error.option_name}".removeprefix("kdcache ")
        if gone := removal(of_verb, FLAGS) or removal(error.option_name, SETTINGS):
            return gone
        flags = [flag for parameter in error.ctx.command.params for flag in parameter.opts]
        near = difflib.get_close_matches(error.option_name, [*flags, *_ANYWHERE], n=1, cutoff=0.7)
        return RecipeError(
            "a flag is one of its verb's",
            received=f"{verb} {error.option_name}",
            remedy=f"did you mean {near[0]}?" if near else f"leave it out: {help_of} lists those there are",
        )
    if kind == "MissingParameter":
        return RecipeError(
            "a verb is given all that it needs",
            received=f"{verb} without {_name(error.param)}",
            remedy=f"add it, as {help_of} shows",
        )
    if kind == "BadParameter" and error.param is not None:
        values = [str(each["input"]) for each in getattr(error.__cause__, "errors", list)()]
        return RecipeError(
            "a value is of the kind that its flag takes",
            received=f"{' '.join([verb, _name(error.param), *values])}: {error.message}",
            remedy=f"correct it, as {help_of} shows",
        )
    if word := _NO_COMMAND.match(error.message):
        gone = removal(f"{verb} {word[1]}".removeprefix("kdcache "), VERBS)
        if gone is not None:
            return gone
    message, _, near = error.format_message().partition(" Did you mean ")
    return RecipeError(
        "a command is a verb, its arguments and its flags",
        received=f"{verb}: {message}",
        remedy=f"did you mean {near}" if near else f"correct it, as {help_of} shows",
    )


def _name(parameter: Any) -> str:
    """A flag, or an argument as the help shows it."""
    first = str(parameter.opts[0])
    return first if first.startswith("-") else parameter.metavar or first.upper()
