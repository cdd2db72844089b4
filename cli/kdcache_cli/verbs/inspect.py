"""`kdcache inspect`: the facts of a cache, and with --teacher-report an audit of its teacher."""

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
    cache: Annotated[
        str, typer.Argument(metavar="CACHE", help="A cache: a folder or s3://BUCKET/PREFIX. With --card also a run.")
    ],
    json: Annotated[bool, _Option("--json", help="Machine-readable.")] = False,
    card: Annotated[
        bool, _Option("--card", help="Print its card in Markdown: train from it, build it, cite it.")
    ] = False,
    teacher_report: Annotated[
        bool, _Option("--teacher-report", help="Audit the teacher from the cached targets, with pictures.")
    ] = False,
    data: shared_flags.OptionalData = None,
    split: Annotated[str | None, _Option("--split", help="The split of --data (default: the cache's).")] = None,
    out: Annotated[
        Path | None,
        _Option("--out", help="Folder of the report (default: CACHE-report next to the cache)."),
    ] = None,
    cache_dir: shared_flags.CacheDir = None,
    cache_bytes: shared_flags.CacheBytes = None,
) -> None:
    """Show a cache's source, size, state, compression, and the probability that top-k keeps.

    --teacher-report audits the teacher on whole images at view size. It prints IoU and
    accuracy per class, confusions and calibration. It also shows the pixels that each
    threshold of pseudo labels keeps, and the error of smaller --top-k. For depth, it
    prints the errors, also by distance. report.json and pictures go to --out. The audit
    needs labels. A cache that was built with --pixels source has none: name its data set
    with --data.

    --card prints a page in Markdown about a cache or a run. It has the digests, the
    commands that train from it and build it again, versions, seeds, and a citation. It
    is also the card of a data set on the Hub.

    [dim]kdcache inspect camvid.zarr[/]
    [dim]kdcache inspect runs/student --card > runs/student/README.md[/]
    [dim]kdcache inspect camvid.zarr --teacher-report --out camvid-report[/]
    """
    from kdcache import verbs

    if not teacher_report:
        _refuse_alone({"--data": data, "--split": split, "--out": out})
    if card:
        _refuse_beside_card({"--json": json, "--teacher-report": teacher_report})
        typer.echo(verbs.card(cache, cache_dir=cache_dir, cache_bytes=cache_bytes), nl=False)
        return
    if teacher_report:
        from kdcache_cli.verbs.inspect_teacher import print_audit

        audited = verbs.audit(cache, data=data, split=split, out=out, cache_dir=cache_dir, cache_bytes=cache_bytes)
        print_audit(audited, json)
        return
    report = verbs.inspect(cache, cache_dir=cache_dir, cache_bytes=cache_bytes)
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


def _refuse_beside_card(flags: dict[str, bool]) -> None:
    if beside := [name for name, value in flags.items() if value]:
        raise RecipeError(f"Cannot use {', '.join(beside)} with --card", fix="Leave one of them out.")


def _refuse_alone(flags: dict[str, object]) -> None:
    if flags_alone := [name for name, value in flags.items() if value is not None]:
        raise RecipeError(f"Cannot use {', '.join(flags_alone)} without --teacher-report", fix="Add --teacher-report.")
