"""`kdcache evaluate` of the files that `kdcache export-pseudo-labels` wrote."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

from rich.markup import escape

from kdcache_cli.console import OUT, figure_table, progress_bar

if TYPE_CHECKING:  # the verbs import what they need: --help must not wait for torch
    from kdcache.data import Fold
    from kdcache.teacher.audit.pseudo_quality import PseudoQuality


def is_pseudo_labels(folder: Path) -> bool:
    """Whether a folder holds exported pseudo labels."""
    return (folder / "pseudo-labels.json").is_file()


def evaluate_pseudo_labels(
    folder: Path,
    data: list[str],
    split: list[str] | None,
    part: "Fold | None",
    *,
    others: dict[str, bool],
    json_file: Path | None,
    markdown: Path | None,
    listing: Path | None,
) -> None:
    """Judge the pseudo labels in a folder by a data set, print the figures and write them.

    Args:
        others: whether flags are given that are for models, by name.
    """
    from kdcache.data import fold_alone, open_split
    from kdcache.data.layouts.scan import folders_in
    from kdcache.errors import RecipeError
    from kdcache.metrics import iou_listing, markdown_table
    from kdcache.teacher.audit.pseudo_quality import LABELS, judge_pseudo_labels

    splits = split or folders_in(folder / LABELS)
    if wrong := [name for name, is_set in others.items() if is_set]:
        raise RecipeError(
            "pseudo labels in a folder are judged as they are: only --data, --split, --fold and the files are set",
            received=f"{', '.join(wrong)} with {folder}",
            remedy=f"leave out {', '.join(wrong)}",
        )
    if len(data) != 1 or len(splits) != 1:
        raise RecipeError(
            "pseudo labels are judged by one split of one data set",
            received=f"{len(data)} data sets, splits {', '.join(splits) or 'none'}, for {folder}",
            remedy="give one --data, and one --split that is a folder in labels/",
        )
    source = open_split(data[0], splits[0])
    if part is not None:
        source = fold_alone(source, *part)
    with progress_bar() as bar:
        task = bar.add_task("judging", total=len(source), note="")
        quality, images = judge_pseudo_labels(
            folder, source, lambda done, total: bar.update(task, completed=done, total=total)
        )
    header, rows = _table(quality)
    table = figure_table(*header, title=f"Pseudo labels of {images} labelled images of {len(source)}")
    for cells in rows:
        table.add_row(*cells)
    OUT.print(table)
    json_path, markdown_path = (
        path or folder / f"quality-{splits[0]}.{end}" for path, end in ((json_file, "json"), (markdown, "md"))
    )
    content = {"pseudo_labels": str(folder), "data": data[0], "split": splits[0], "images": images}
    content["fold"] = None if part is None else str(part)
    json_path.write_text(json.dumps({**content, **quality.to_json()}, indent=1) + "\n", encoding="utf-8")
    markdown_path.write_text(f"# {folder} on {data[0]}\n\n{markdown_table(header, rows)}", encoding="utf-8")
    if listing is not None:
        listing.write_text(iou_listing(quality.metrics), encoding="utf-8")
    written = [path for path in (json_path, markdown_path, listing) if path is not None]
    OUT.print(f"written: {escape(', '.join(map(str, written)))}", highlight=False)


def _table(quality: "PseudoQuality") -> tuple[list[str], list[list[str]]]:
    from kdcache.metrics import percent

    columns = (quality.kept, quality.precision, quality.metrics.iou)
    rows = [[name, *map(percent, row)] for name, *row in zip(quality.metrics.class_names, *columns, strict=True)]
    rows.append(["all", *map(percent, (quality.total_kept, quality.metrics.aacc, quality.metrics.miou))])
    return ["class", "kept of its labels %", "right %", "IoU of what is kept %"], rows
