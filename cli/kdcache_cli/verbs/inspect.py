"""`kdcache inspect`: what a store is, and with --teacher-report an audit of its teacher."""

import json as json_module
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from kdcache.errors import RecipeError
from kdcache_cli.console import OUT, bytes_text
from kdcache_cli.settings import shared_flags

_Option = typer.Option


def inspect(
    store: Annotated[str, typer.Argument(help="A store, a folder or s3://BUCKET/PREFIX; with --card also a run.")],
    json: Annotated[bool, _Option("--json", help="Machine-readable.")] = False,
    card: Annotated[
        bool, _Option("--card", help="Print its card in Markdown: train from it, build it, cite it.")
    ] = False,
    teacher_report: Annotated[
        bool, _Option("--teacher-report", help="Audit the teacher by what the store holds; writes pictures.")
    ] = False,
    data: shared_flags.OptionalData = None,
    split: Annotated[str | None, _Option("--split", help="Which split of it (default: the store's).")] = None,
    out: Annotated[
        Path | None,
        _Option("--out", help="Folder of the report (default: STORE-report beside the cache)."),
    ] = None,
    cache_dir: shared_flags.CacheDir = None,
    cache_bytes: shared_flags.CacheBytes = None,
) -> None:
    """Show what a store is: from what, how big, complete or not, compression, top-k mass.

    With --teacher-report, audit its teacher on whole images at view size: IoU and
    accuracy per class, confusions, calibration, what thresholds of pseudo labels
    keep, what --top-k loses; of depth its errors, by distance too. Tables here;
    report.json and pictures in --out. Needs the labels: those in the store, or --data
    for a store built with --pixels source.

    With --card, a page in Markdown that goes with a store, or with a run: what it is, its
    digests, the commands that train from it and make it again, versions and seeds, an
    entry for a bibliography. The card of a data set on the Hub is the same page.

    [dim]kdcache inspect camvid.zarr[/]
    [dim]kdcache inspect runs/student --card > runs/student/README.md[/]
    [dim]kdcache inspect camvid.zarr --teacher-report --out camvid-report[/]
    """
    if not teacher_report:
        _refuse_alone({"--data": data, "--split": split, "--out": out})
    if card:
        _refuse_beside_card({"--json": json, "--teacher-report": teacher_report})
        _print_card(store, cache_dir, cache_bytes)
        return
    if teacher_report:
        from kdcache_cli.verbs.inspect_teacher import report_teacher

        report_teacher(shared_flags.open_place(store, cache_dir, cache_bytes), data, split, out, json)
        return
    from kdcache.run_folder import is_run
    from kdcache.store import inspect_store

    if is_run(Path(store)):
        raise RecipeError(
            "inspect shows what a store is, and with --card what a run is",
            received=f"{store}, a run, without --card",
            remedy="add --card; kdcache compare and report have its scores",
        )

    report = inspect_store(shared_flags.open_place(store, cache_dir, cache_bytes))
    if json:
        typer.echo(json_module.dumps(report.to_json(), indent=1))
        return
    facts = Table(box=None, show_header=False)
    facts.add_column(style="dim")
    for name, value in report.facts():
        facts.add_row(name, value)
    OUT.print(facts)
    table = Table("array", "record", "type", "on disk", "per record", "ratio", box=None, header_style="dim")
    for array in report.arrays:
        per_record = bytes_text(array.bytes_on_disk / max(report.records_written, 1))
        shape = "x".join(map(str, array.shape)) or "1"
        table.add_row(array.path, shape, array.dtype, bytes_text(array.bytes_on_disk), per_record, f"{array.ratio:.2f}")
    OUT.print(table)


def _print_card(store: str, cache_dir: str | None, cache_bytes: str | None) -> None:
    from kdcache.run_folder import Run, is_run
    from kdcache.sharing import run_card, store_card
    from kdcache.store import inspect_store

    run = Path(store)
    typer.echo(
        run_card(Run.open(run))
        if is_run(run)
        else store_card(inspect_store(shared_flags.open_place(store, cache_dir, cache_bytes))),
        nl=False,
    )


def _refuse_beside_card(flags: dict[str, bool]) -> None:
    if beside := [name for name, value in flags.items() if value]:
        raise RecipeError(f"Cannot use {', '.join(beside)} with --card", fix="Leave one of them out.")


def _refuse_alone(flags: dict[str, object]) -> None:
    if flags_alone := [name for name, value in flags.items() if value is not None]:
        raise RecipeError(f"Cannot use {', '.join(flags_alone)} without --teacher-report", fix="Add --teacher-report.")
