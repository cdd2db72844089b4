"""The Typer app and its one door: errors become a panel and an exit code."""

import errno
import functools
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from importlib.metadata import version
from typing import Annotated, Any

import typer
from rich.panel import Panel
from rich.text import Text
from typer.core import TyperGroup

from kdcache.errors import KDCacheError
from kdcache_cli.console import ERRORS, data_warnings
from kdcache_cli.help import Verb, text
from kdcache_cli.parse_errors import parse_errors
from kdcache_cli.settings import build_flags
from kdcache_cli.settings.signature import show_plain_types
from kdcache_cli.torchrun import one_voice
from kdcache_cli.verbs import (
    bench_kernels,
    build_teacher_cache,
    compare,
    copy,
    data,
    demo,
    evaluate,
    export,
    export_pseudo_labels,
    inspect,
    models,
    plan,
    predict,
    report,
    sweep,
    train_student,
    train_teacher,
    verify,
)

_PANELS: dict[str, dict[str, Callable[..., None]]] = {
    "Start": {"demo": demo.demo, "models": models.models},
    "Data": {},
    "Teacher and cache": {
        "train-teacher": train_teacher.train_teacher,
        "plan": plan.plan,
        "build-teacher-cache": build_teacher_cache.build_teacher_cache,
        "inspect": inspect.inspect,
        "verify": verify.verify,
        "copy": copy.copy,
        "export-pseudo-labels": export_pseudo_labels.export_pseudo_labels,
    },
    "Train": {"train-student": train_student.train_student, "sweep": sweep.sweep},
    "Evaluate": {
        "evaluate": evaluate.evaluate,
        "compare": compare.compare,
        "report": report.report,
    },
    "Ship": {"export": export.export, "predict": predict.predict},
    "Bench": {"bench-kernels": bench_kernels.bench_kernels},
}
"""Verbs by the heading of the help that they stand under, in the order of work."""

_GROUPS = {"data": "Data"}
"""Groups of verbs, by the heading that they stand under."""

_ALSO_SHORTER = ("plan", "build-teacher-cache")


class _Verbs(TyperGroup):
    """The group of all verbs, listed in the order of work. It turns Ctrl-C and parse errors into kdcache's messages."""

    def make_context(self, *args: Any, **options: Any) -> Any:
        with parse_errors():
            return super().make_context(*args, **options)

    def list_commands(self, ctx: Any) -> list[str]:
        panels = {verb: list(_PANELS).index(panel) for panel, verbs in _PANELS.items() for verb in verbs}
        panels |= {group: list(_PANELS).index(panel) for group, panel in _GROUPS.items()}
        return sorted(super().list_commands(ctx), key=panels.__getitem__)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        command = super().get_command(ctx, cmd_name)
        for verb in () if command is None else (command, *getattr(command, "commands", {}).values()):
            show_plain_types(verb.get_params(ctx))
        return command

    def get_params(self, ctx: Any) -> Any:
        parameters = super().get_params(ctx)
        show_plain_types(parameters)
        return parameters

    def invoke(self, ctx: Any) -> Any:
        try:
            with parse_errors(ctx):
                return super().invoke(ctx)
        except KeyboardInterrupt:
            ERRORS.print("\nInterrupted. Finished work is kept: run the same command again to continue.")
            raise typer.Exit(130) from None


app = typer.Typer(
    name="kdcache",
    cls=_Verbs,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["--help", "-h"]},
    help="Pay for the teacher once: run a segmentation teacher one time, keep its outputs in a cache, "
    "and train any number of students from it.\n\n"
    "The usual way: [bold]train-teacher[/], [bold]build-teacher-cache[/], [bold]train-student[/], "
    "[bold]evaluate[/]. New here? [bold]kdcache demo[/] does all of it in three minutes.",
)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"kdcache {version('kdcache')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", help="Print results, warnings and errors: no progress and no notes.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error instead of a panel.")] = False,
    trust: Annotated[
        bool,
        typer.Option("--trust", help="Import model code that run folders and recipes from elsewhere name."),
    ] = False,
) -> None:
    """Declare the options that every verb takes. `main` reads them itself, because they may stand anywhere."""


app.add_typer(data.app, name="data", rich_help_panel=_GROUPS["data"])
for _panel, _verbs in _PANELS.items():
    for _name, _verb in _verbs.items():
        _settings = build_flags.ALSO_SHORTER if _name in _ALSO_SHORTER else None
        _text = text(_verb)
        _short = _text.partition("\n\n")[0]
        app.command(_name, cls=Verb, context_settings=_settings, rich_help_panel=_panel, help=_text, short_help=_short)(
            _verb
        )


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line and exit the process.

    The exit code is 0 for success, 1 if a check failed, 2 for wrong input, and 130 after Ctrl-C.

    Args:
        args: the words after `kdcache`. None takes `sys.argv[1:]`.
    """
    arguments = sys.argv[1:] if args is None else args
    # Allowed after the verb too, where people add them.
    words = [word for word in arguments if word not in ("--debug", "--trust", "--quiet")]
    debug = "--debug" in arguments
    ERRORS.quiet = "--quiet" in arguments
    try:
        with one_voice(), _trusting("--trust" in arguments), data_warnings():
            _command()(args=words, prog_name="kdcache")
    except Exception as error:
        if debug:
            raise
        show_error(_explained(error))
        sys.exit(2)
    finally:
        ERRORS.quiet = False


@functools.cache
def _command() -> Any:
    """Return the command of all verbs. Programs that run many command lines make it once."""
    return typer.main.get_command(app)


def _trusting(trust: bool) -> AbstractContextManager[None]:
    if not trust:
        return nullcontext()
    from kdcache.models.trust import trusting  # imports torch

    return trusting()


_OF_DISKS = {errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENAMETOOLONG, errno.ENOTDIR}


def _explained(error: Exception) -> Any:
    """Return an error with problem, fix and rule. An error of kdcache or the kernels is returned unchanged."""
    if all(isinstance(getattr(error, name, None), str) for name in ("problem", "fix", "rule")):
        return error
    if isinstance(error, PermissionError) or (isinstance(error, OSError) and error.errno in _OF_DISKS):
        return KDCacheError(
            f"Cannot read or write a file: {error}",
            fix="Check the path, its permissions, the disk's free space, and whether it is mounted for writing.",
        )
    if (fault := _fault_of_theirs(error)) is not None:
        return fault
    return KDCacheError(
        f"This should not have happened: {type(error).__name__}: {error}",
        fix="Run again with --debug, and report the traceback.",
        rule="It is a defect of kdcache, or of a library.",
    )


def _fault_of_theirs(error: Exception) -> KDCacheError | None:
    """Return an error about a network or other code of the user, or None if the error comes from kdcache's code."""
    if "torch" not in sys.modules:  # no code of theirs runs without
        return None
    from kdcache.faults import network_fault, user_place

    if (fault := network_fault(error)) is not None or not (place := user_place(error)):
        return fault
    return KDCacheError(
        f"Cannot run your own code{place}: {type(error).__name__}: {error}",
        fix="Correct it there. --debug shows the traceback.",
    )


def show_error(error: Any) -> None:
    """Print an error in a panel on stderr, also with --quiet.

    `error` has three texts: `problem` (what is wrong), `fix` (what the user can do), and `rule` (what must hold, may be
    empty).
    """
    lines = [("fix: ", error.fix), ("", Text(error.rule, "dim"))]
    parts = (part for name, text in lines if text for part in ("\n", (name, "dim"), text))
    body = Text.assemble((error.problem, "bold"), *parts)
    with ERRORS.heard():
        ERRORS.print(Panel.fit(body, title="error", title_align="left", border_style="red"))
