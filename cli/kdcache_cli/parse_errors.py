"""What the parser of the command line refuses, as errors of kdcache."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer
from annotated_types import Ge, Le

from kdcache.errors import RecipeError, suggest
from kdcache.settings.removed import FLAGS, SETTINGS, VERBS, removal
from kdcache.settings.setting import describe_values

_UsageError: Any = typer.BadParameter.__base__
"""The base of all that the parser refuses; Typer exports this one of its kinds."""


_NO_COMMAND = re.compile("No such command '([^']*)'")
_EXTRA = re.compile(r"Got unexpected extra argument(?:s|\(s\))? \((.*)\)")
_ANYWHERE = ("--quiet", "--debug", "--trust")


@contextmanager
def parse_errors(context: Any = None) -> Iterator[None]:
    """Turn parse errors of the command line into a RecipeError, in a with block.

    Args:
        context: Typer's context. The message names the verb of this context, unless the parse error has its own
            context. None names only `kdcache`.
    """
    try:
        yield
    except _UsageError as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            raise
        verb = " ".join(["kdcache"] if context is None else [context.command_path, context.invoked_subcommand or ""])
        raise _explained(error, error.ctx.command_path if error.ctx else verb.rstrip()) from None


def _explained(error: Any, verb: str) -> RecipeError:
    kind, advice = type(error).__name__, f"See {verb} --help"
    if kind == "NoSuchOption":
        of_verb = f"{verb} {error.option_name}".removeprefix("kdcache ")
        if gone := removal(of_verb, FLAGS) or removal(error.option_name, SETTINGS):
            return gone
        flags = [flag for parameter in error.ctx.command.params for flag in parameter.opts]
        return RecipeError(
            f"Unknown flag {error.option_name}",
            fix=suggest(error.option_name, [*flags, *_ANYWHERE], f"Leave it out. {advice}", cutoff=0.7),
        )
    if kind == "MissingParameter":
        return RecipeError(f"Missing {_name(error.param)}", fix=f"Add it. {advice}")
    if kind == "BadParameter" and error.param is not None:
        values = [repr(each["input"]) for each in getattr(error.__cause__, "errors", list)()]
        problem = ", ".join(values) or error.message.rstrip(".")
        fix = f"Give {_values_of(error.param)}." if values else "Correct it."
        return RecipeError(f"Invalid value of {_name(error.param)}: {problem}", fix=f"{fix} {advice}")
    if kind == "BadOptionUsage":
        flag = error.option_name
        if "requires" not in error.message:
            return RecipeError(f"{flag} takes no value", fix=f"Write {flag} alone. {advice}")
        return RecipeError(f"Missing value of {flag}", fix=f"Add it after {flag}. {advice}")
    if word := _NO_COMMAND.match(error.message):
        gone = removal(f"{verb} {word[1]}".removeprefix("kdcache "), VERBS)
        verbs = error.ctx.command.list_commands(error.ctx)
        return gone or RecipeError(f"Unknown command {word[1]}", fix=suggest(word[1], verbs, f"Correct it. {advice}"))
    if extra := _EXTRA.match(error.message):
        return RecipeError(f"Unexpected argument {extra[1]}", fix=f"Leave it out, or quote it. {advice}")
    return RecipeError(f"Cannot run {verb}: {error.format_message().rstrip('.')}", fix=f"Correct it. {advice}")


def _values_of(parameter: Any) -> str:
    """Return the values that a flag or an argument takes, in words."""
    ends = ((Ge, parameter.min), (Le, parameter.max))
    return describe_values(parameter.type_descriptor.annotation, [mark(end) for mark, end in ends if end is not None])


def _name(parameter: Any) -> str:
    """Return the name of a flag or an argument, as in the help."""
    first = str(parameter.opts[0])
    return first if first.startswith("-") else parameter.metavar or first.upper()
