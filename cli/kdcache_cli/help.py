"""The help of a verb: -h shows the flags that most people need, --help-all shows every flag."""

from collections.abc import Callable
from functools import wraps
from inspect import Parameter, signature
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

_ALL = "--help-all"


def common(*names: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Return a decorator that shortens a verb's help: -h shows only required flags and the flags of some parameters.

    `names` are these parameters. --help-all shows all flags.
    """

    def decorate(verb: Callable[..., None]) -> Callable[..., None]:
        called = signature(verb)
        unknown = set(names) - set(called.parameters)
        assert not unknown, f"no parameters of {verb.__name__}: {', '.join(sorted(unknown))}"
        added = Parameter("help_all", Parameter.KEYWORD_ONLY, default=False, annotation=_HelpAll)

        @wraps(verb)
        def run(*, help_all: bool = False, **flags: Any) -> None:
            verb(**flags)

        named = [parameter.replace(kind=Parameter.KEYWORD_ONLY) for parameter in called.parameters.values()]
        run.__signature__ = called.replace(parameters=[*named, added])  # type: ignore[attr-defined]
        run.__annotations__ = {**verb.__annotations__, "help_all": _HelpAll}
        run.common = frozenset({*names, "help_all"})  # type: ignore[attr-defined]
        return run

    return decorate


def text(verb: Callable[..., None]) -> str:
    """Return a verb's docstring as help text, in which each paragraph and each example is one line.

    So a terminal of any width can wrap it.
    """
    paragraphs = (verb.__doc__ or "").strip().split("\n\n")
    return "\n\n".join(_lines(part) if "[dim]" in part else " ".join(part.split()) for part in paragraphs)


def _lines(paragraph: str) -> str:
    return "\n".join(line.strip() for line in paragraph.splitlines())


class Verb(TyperCommand):
    """A Typer command with two helps: -h shows common flags, and --help-all shows all."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the help. Without --help-all, rare flags are left out, and the last line says how many."""
        common_flags: frozenset[str] = getattr(self.callback, "common", frozenset())
        parameters: list[Any] = list(self.params) if common_flags and not ctx.meta.get(_ALL) else []
        rare = [
            p for p in parameters if p.name not in common_flags and not p.required and not getattr(p, "hidden", False)
        ]
        self.epilog = f"{len(rare)} more flags: {ctx.command_path} {_ALL}" if rare else None
        for parameter in rare:
            parameter.hidden = True
        try:
            super().format_help(ctx, formatter)
        finally:
            for parameter in rare:
                parameter.hidden = False


def _show_all(ctx: typer.Context, asked: bool) -> None:
    if asked and not ctx.resilient_parsing:
        ctx.meta[_ALL] = True
        typer.echo(ctx.get_help())
        raise typer.Exit


_HelpAll = Annotated[bool, typer.Option(_ALL, help="Show every flag and exit.", is_eager=True, callback=_show_all)]
