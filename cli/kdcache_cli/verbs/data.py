"""`kdcache data ...`: checks and conversion of data sets."""

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from kdcache.progress import progress_of_stages
from kdcache_cli.console import OUT, histogram_table, warn

if TYPE_CHECKING:
    from kdcache.data import DepthReport, SplitReport

app = typer.Typer(no_args_is_help=True, help="Check and convert data sets.", rich_markup_mode="rich")


@app.command()
def check(
    data: Annotated[
        str,
        typer.Argument(help="Data folder, LAYOUT:DIR such as [bold]voc:DIR[/], or [bold]scenes[/]."),
    ],
    split: Annotated[list[str] | None, typer.Option("--split", help="Only this split; repeatable.")] = None,
    max_depth: Annotated[
        float | None,
        typer.Option("--max-depth", metavar="METRES", help="No depth may lie beyond; 80 for streets, 10 for rooms."),
    ] = None,
    sheet: Annotated[
        Path | None, typer.Option("--sheet", metavar="FILE", help="Write twelve samples with their labels as a PNG.")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the report here too.")] = None,
) -> None:
    """Read a data set once, and list its content and its problems.

    Lists the layout and how it was recognised, the classes with their share of pixels, unknown ids, sizes and a digest.
    For depth, it lists the range, the share of pixels with depth, a histogram, and values that cannot be metres.
    --sheet draws twelve samples with their labels. The last line is the command to run next.

    The exit code is 1 if a training would fail or learn nothing. Warnings point at likely mistakes.

    [dim]kdcache data check photos --sheet sheet.png[/]
    """
    from kdcache.data import check as check_data
    from kdcache.data.checks.next_step import next_step

    if sheet is not None:
        _write_sheet(data, split, sheet)
    with progress_of_stages() as update:
        report = check_data(
            data,
            split,
            max_depth=max_depth,
            progress=lambda name, done, total: update(f"reading {name}", done, total),
        )
    if json_file is not None:
        json_file.write_text(json.dumps(report.to_json(), indent=1) + "\n", encoding="utf-8")
    place = f" in {escape(report.folder)}" if report.folder else ""
    OUT.print(f"layout [bold]{report.layout}[/]{place}: {escape(report.why)}", highlight=False)
    for name, part in report.splits.items():
        _print_split(name, part, report.classes.names, report.numbers)
    for problem in report.problems:
        OUT.print(f"[red]problem[/] {escape(problem)}")
    for warning in report.warnings:
        OUT.print(f"[yellow]warning[/] {escape(warning)}")
    if not report.problems:
        OUT.print("no problem" if report.warnings else "[green]nothing wrong[/]")
    if sheet is not None:
        OUT.print(f"sheet: {sheet}", markup=False, highlight=False)
    OUT.print(f"next: {next_step(report)}", markup=False, highlight=False, soft_wrap=True)
    if report.problems:
        raise typer.Exit(1)


@app.command()
def convert(
    source: Annotated[str, typer.Argument(metavar="SRC", help="Data set of any layout, as for data check.")],
    out: Annotated[
        Path, typer.Argument(metavar="DST", help="Folder to write; an interrupted conversion is continued.")
    ],
    split: Annotated[
        list[str] | None,
        typer.Option("--split", help="Only this split; repeatable (default: train, val and test; without these, all)."),
    ] = None,
    binary: Annotated[bool, typer.Option("--binary", help="Masks of two classes: 0, and every other number.")] = False,
    bits: Annotated[
        int | None, typer.Option("--bits", metavar="N", help="Scale 16-bit images to 8 bits. N bits are in use.")
    ] = None,
    threads: Annotated[int, typer.Option("--threads", min=0, help="Working threads; 0: one per core, at most 8.")] = 0,
) -> None:
    """Write a data set of any layout as a folder with images/, labels/ and classes.txt.

    It also reads COCO's annotations, masks as on Kaggle, and the exports of CVAT, Label Studio, LabelMe, Roboflow and
    YOLO. Other verbs then use DST.

    Images are links to the files of SRC. On the same disk they are hard links, which stay if you delete SRC. If no
    link is possible, they are copies. Labels that already hold class ids are also links. Polygons, colours and other
    numbers become class ids.

    Unusable samples are left out. DST/converted/SPLIT.csv gives the reason. DST must be new, empty, or an earlier
    conversion of the same data.

    [dim]kdcache data convert coco:/data/coco coco-folder[/]
    [dim]kdcache data convert masks masks-folder --binary[/]
    [dim]kdcache data convert cvat-export photos[/]
    """
    from kdcache.data import convert as convert_data

    with progress_of_stages() as update:
        converted = convert_data(
            source,
            out,
            splits=split,
            binary=binary,
            bits=bits,
            threads=threads or None,
            progress=lambda name, done, total: update(f"converting {name}", done, total),
        )
    OUT.print(f"layout [bold]{converted.layout}[/]: {escape(converted.why)}", highlight=False)
    for name, part in converted.splits.items():
        written = f" ({_counts(part.links)}; labels: {_counts(part.labels)})" if part.written else ""
        OUT.print(
            f"[bold]{escape(name)}[/]: {part.written} images written{written}, {part.kept} kept, {len(part.dropped)} "
            "left out",
            highlight=False,
        )
        for item, why in list(part.dropped.items())[:3]:
            OUT.print(f"  left out {escape(item)}: {escape(why)}", highlight=False)
        if part.dropped:
            OUT.print(f"  all of them: {out}/converted/{name}.csv", markup=False, highlight=False)
        if part.one_class is not None:
            warn(
                f"the labels of {name} hold {part.one_class!r} and void alone, which teaches nothing: where they are "
                "masks of 0 and 255, add --binary and give a new folder"
            )
    if converted.unused:
        OUT.print(f"not converted: {', '.join(converted.unused)} (--split)", markup=False, highlight=False)
    OUT.print(
        f"next: kdcache data check {shlex.quote(str(out))} --sheet sheet.png",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


def _counts(kinds: Mapping[str, int]) -> str:
    """Return counts in words, for instance "3 hard links, 1 copy"."""
    plurals = {"copy": "copies"}
    return ", ".join(f"{n} {kind if n == 1 else plurals.get(kind, f'{kind}s')}" for kind, n in kinds.items()) or "none"


def _write_sheet(data: str, splits: list[str] | None, path: Path) -> None:
    from kdcache.data import list_splits, open_split
    from kdcache.data.checks.sheet import write_sheet

    names = splits or list_splits(data, exports=True)
    write_sheet([open_split(data, name, exports=True) for name in names], path)


def _print_split(name: str, part: "SplitReport", names: tuple[str, ...], numbers: Mapping[int, int]) -> None:
    sizes = sorted(part.sizes.items(), key=lambda item: -item[1])
    sizes_text = ", ".join(f"{count} of {size}" for size, count in sizes[:4])
    sizes_text += f" and {len(sizes) - 4} other sizes" if len(sizes) > 4 else ""
    kinds = f" ({', '.join(part.label_kinds)})" if part.label_kinds else ""
    deep = f", {part.depth.labelled} with depth" if part.depth.labelled else ""
    OUT.print(
        f"[bold]{escape(name)}[/]: {part.images} images, {part.labelled} labelled{kinds}{deep}; sizes {sizes_text}"
    )
    if part.digest:
        OUT.print(f"digest {part.digest[:16]}")
    if part.depth.labelled:
        _print_depth(part.depth)
    if not part.labelled:
        return
    shares, void = part.shares()
    table = Table("id", "class", "pixels %", box=None, header_style="dim")
    for index, (title, share) in enumerate(zip(names, shares, strict=True)):
        table.add_row(str(index), title, f"{100 * share:.2f}")
    table.add_row("255", "void", f"{100 * void:.2f}")
    OUT.print(table)
    if numbers:
        titles = [(n, f"{names[i]} {100 * shares[i]:.1f} %" if i < len(names) else "void") for n, i in numbers.items()]
        OUT.print("numbers in the labels: " + ", ".join(f"{n} = {escape(title)}" for n, title in sorted(titles)))


def _print_depth(depth: "DepthReport") -> None:
    if depth.least is None or depth.most is None:
        OUT.print("depth: no pixel has a known one")
        return
    share = f"{100 * depth.share:.1f} % of their pixels"
    OUT.print(f"depth: {depth.least:.2f} to {depth.most:.2f} m, known for {share}", highlight=False)
    ends = [f"to {edge:g}" for edge in depth.edges[1:]] + ["and more"]
    bins = [(f"{low:g} {end}", count) for low, end, count in zip(depth.edges, ends, depth.histogram, strict=True)]
    OUT.print(histogram_table("metres", bins))
