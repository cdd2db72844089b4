"""`kdcache export-pseudo-labels`: the teacher's confident predictions as label files."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from kdcache_cli.console import OUT, figure_table
from kdcache_cli.settings import shared_flags

if TYPE_CHECKING:  # the verbs import what they need: --help must not wait for torch
    from kdcache.teacher.audit.pseudo_labels import Exported

_Option = typer.Option
_LITTLE = 0.5
"""The share of the pixels below which labels are few."""


def export_pseudo_labels(
    cache: Annotated[str, typer.Argument(metavar="CACHE", help="A cache: a folder or s3://BUCKET/PREFIX.")],
    out: Annotated[Path, _Option("--out", help="Data folder to write; an interrupted export is continued.")],
    threshold: Annotated[
        float | None, _Option("--threshold", help="Keep pixels whose probability is at least this, in (0, 1).")
    ] = None,
    quantile: Annotated[
        float | None, _Option("--quantile", help="Keep this share of every class, its surest pixels, in (0, 1).")
    ] = None,
    images: Annotated[bool, _Option("--images", help="Also write the images at view size.")] = False,
    data: shared_flags.OptionalData = None,
    split: Annotated[str | None, _Option("--split", help="The split of --data (default: the cache's).")] = None,
    json_file: Annotated[Path | None, _Option("--json", help="Write the coverage table here too.")] = None,
    cache_dir: shared_flags.CacheDir = None,
    cache_bytes: shared_flags.CacheBytes = None,
) -> None:
    """Write the teacher's classes as labels: PNG files of class ids, 255 where the teacher is not confident.

    Writes OUT/labels/SPLIT/ID.png for each sample at view size, and OUT/classes.txt.
    The files hold class ids and show the classes' colours.

    With one --threshold for all classes, classes that the teacher is unsure of get few
    pixels. --quantile keeps a share of each class instead. It may keep more, because
    pixels with equal confidence stay together. To choose a threshold, see kdcache
    inspect --teacher-report. The table shows the share of pixels that were kept. If the
    cache has labels, it also shows the share that is right.

    [dim]kdcache export-pseudo-labels camvid.zarr --out camvid-pseudo --threshold 0.7[/]
    [dim]kdcache export-pseudo-labels street.zarr --out street-pseudo --quantile 0.5 --images[/]
    """
    from kdcache.metrics import percent
    from kdcache.teacher.audit.audit import coverage_json
    from kdcache.verbs import export_pseudo_labels as export

    exported = export(
        cache,
        out,
        threshold=threshold,
        quantile=quantile,
        images=images,
        data=data,
        split=split,
        cache_dir=cache_dir,
        cache_bytes=cache_bytes,
    )
    _print(exported)
    if threshold is not None and exported.coverage.total_share < _LITTLE:
        OUT.print(
            f"[yellow]the teacher is sure of {percent(exported.coverage.total_share)} % of the pixels: --threshold "
            f"{exported.half:.2g} would keep half, --quantile 0.5 half of every class[/]"
        )
    earlier = f" ({exported.kept} from before)" if exported.kept else ""
    OUT.print(f"[bold]{escape(str(out))}[/]: {exported.written} label files written{earlier}")
    if json_file is not None:
        header = {"store": cache, "threshold": threshold, "quantile": quantile}
        content = {**header, **coverage_json(exported.class_names, exported.coverage)}
        json_file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _print(exported: "Exported") -> None:
    from kdcache.metrics import percent

    table = figure_table("class", "confidence from", "pixels kept", "of class %", "right %")
    coverage = exported.coverage
    rows = zip(
        exported.class_names, coverage.thresholds, coverage.selected, coverage.shares, coverage.precision, strict=True
    )
    for name, least, pixels, share, right in rows:
        table.add_row(name, f"{least:.4g}", f"{pixels:,}", percent(share), percent(right))
    table.add_section()
    total = (f"{sum(coverage.selected):,}", percent(coverage.total_share), percent(coverage.total_precision))
    table.add_row("all", "", *total)
    OUT.print(table)
