"""The Typer app and its one door: errors become a panel and an exit code."""

import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import typer
from rich.panel import Panel
from rich.text import Text
from typer.core import TyperGroup

from kdcache.errors import KDCacheError
from kdcache_cli.console import ERRORS
from kdcache_cli.settings import build_flags
from kdcache_cli.torchrun import one_voice
from kdcache_cli.verbs import (
    bench_kernels,
    bench_loader,
    build_teacher_cache,
    compare,
    copy,
    data,
    demo,
    evaluate,
    export,
    export_pseudo_labels,
    extend,
    inspect,
    models,
    plan,
    predict,
    report,
    self_train,
    sweep,
    train_student,
    train_teacher,
    verify,
    visualise,
)


class _Verbs(TyperGroup):
    """The group of verbs, with a message about what Ctrl-C leaves behind; Typer itself prints none."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            ERRORS.print("\nInterrupted. What was finished is kept: run the same command again to go on.")
            raise typer.Exit(130) from None


app = typer.Typer(
    name="kdcache",
    cls=_Verbs,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Pay for the teacher once: run a segmentation teacher one time, keep its outputs in a Zarr store, "
    "train any number of students from it.\n\n"
    "The usual way: [bold]train-teacher[/], [bold]build-teacher-cache[/], [bold]train-student[/], "
    "[bold]evaluate[/]. New here? [bold]kdcache demo[/] does all of it in four minutes.",
)


@app.callback()
def _options(
    debug: bool = typer.Option(False, "--debug", help="Show the traceback of an error instead of a panel."),
    trust: bool = typer.Option(
        False, "--trust", help="Import the code that run folders and recipes from elsewhere name as their model."
    ),
) -> None:
    """Options of every verb; `main` reads them itself: they may stand anywhere, and parsing may fail."""


app.add_typer(data.app, name="data", rich_help_panel="Look")
app.command("models", rich_help_panel="Look")(models.models)
app.command("train-teacher", rich_help_panel="Work")(train_teacher.train_teacher)
app.command("plan", context_settings=build_flags.ALSO_SHORTER, rich_help_panel="Work")(plan.plan)
app.command("build-teacher-cache", context_settings=build_flags.ALSO_SHORTER, rich_help_panel="Work")(
    build_teacher_cache.build_teacher_cache
)
app.command("train-student", rich_help_panel="Work")(train_student.train_student)
app.command("sweep", rich_help_panel="Work")(sweep.sweep)
app.command("self-train", rich_help_panel="Work")(self_train.self_train)
app.command("evaluate", rich_help_panel="Work")(evaluate.evaluate)
app.command("extend", context_settings=build_flags.ALSO_SHORTER, rich_help_panel="Work")(extend.extend)
app.command("copy", rich_help_panel="Work")(copy.copy)
app.command("export-pseudo-labels", rich_help_panel="Work")(export_pseudo_labels.export_pseudo_labels)
app.command("compare", rich_help_panel="Look")(compare.compare)
app.command("visualise", rich_help_panel="Look")(visualise.visualise)
app.command("report", rich_help_panel="Look")(report.report)
app.command("export", rich_help_panel="Work")(export.export)
app.command("predict", rich_help_panel="Work")(predict.predict)
app.command("inspect", rich_help_panel="Look")(inspect.inspect)
app.command("verify", rich_help_panel="Look")(verify.verify)
app.command("bench-kernels", rich_help_panel="Look")(bench_kernels.bench_kernels)
app.command("bench-loader", rich_help_panel="Look")(bench_loader.bench_loader)
app.command("demo", rich_help_panel="Look")(demo.demo)


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line: 0 done, 1 a check failed, 2 wrong input, 130 interrupted.

    Args:
        args: the words after `kdcache`; default the process's own.
    """
    arguments = sys.argv[1:] if args is None else args
    # Allowed after the verb too, where people add them.
    words = [word for word in arguments if word not in ("--debug", "--trust")]
    debug = "--debug" in arguments
    try:
        with one_voice(), _trusting("--trust" in arguments):
            app(args=words)
    except KDCacheError as error:
        if debug:
            raise
        _show(error.rule, error.received, error.remedy)
        sys.exit(2)
    except Exception as error:
        if debug:
            raise
        rule, received, remedy = _foreign(error)
        _show(rule, received, remedy)
        sys.exit(2)


def _trusting(trust: bool) -> AbstractContextManager[None]:
    if not trust:
        return nullcontext()
    from kdcache.models.trust import trusting  # imports torch

    return trusting()


def _foreign(error: Exception) -> tuple[str, str, str]:
    """Rule, received, remedy of an error that is not kdcache's own; the kernels' errors carry theirs."""
    parts = [getattr(error, name, None) for name in ("rule", "received", "remedy")]
    if all(isinstance(part, str) for part in parts):
        return str(parts[0]), str(parts[1]), str(parts[2])
    if isinstance(error, PermissionError):
        return "files must be readable and folders writable", str(error), "check the permissions"
    return (
        "this should not have happened",
        f"{type(error).__name__}: {error}",
        "run again with --debug and report the traceback",
    )


def _show(rule: str, received: str, remedy: str) -> None:
    body = Text.assemble((rule, "bold"), "\n", ("received  ", "dim"), received, "\n", ("remedy    ", "dim"), remedy)
    ERRORS.print(Panel(body, title="error", title_align="left", border_style="red"))
