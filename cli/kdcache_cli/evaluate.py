"""`kdcache evaluate`: a run on labelled images."""

import json as json_module
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from kdcache_cli import options
from kdcache_cli.console import OUT, progress_bar


def evaluate(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    data: options.Data,
    split: options.Split = "val",
    fold: Annotated[
        str | None,
        typer.Option("--fold", metavar="I/K", help="Only fold I, from 0, of K: what train --fold I/K left out."),
    ] = None,
    weights: Annotated[str, typer.Option("--weights", help="best or last.")] = "best",
    size: options.Size = None,
    at_size: Annotated[
        bool, typer.Option("--at-size", help="Compare at the run's size instead of the labels' own.")
    ] = False,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Images per forward pass.")] = 8,
    threads: options.Threads = 0,
    device: options.Device = "auto",
    json_file: Annotated[Path | None, typer.Option("--json", help="(default: RUN/evaluation-SPLIT.json)")] = None,
    markdown: Annotated[Path | None, typer.Option("--markdown", help="(default: RUN/evaluation-SPLIT.md)")] = None,
) -> None:
    """mIoU, mAcc, aAcc and IoU per class, by mmsegmentation's convention.

    One confusion matrix over the split, void left out, at the labels' own size.
    """
    import torch

    from kdcache.data import fold_alone, open_split, parse_fold
    from kdcache.evaluate import class_rows, evaluate_model, metrics_markdown, percent
    from kdcache.models.run import load_run
    from kdcache.train import pick_device

    if threads:
        torch.set_num_threads(threads)
    model, about = load_run(run, weights)
    source = open_split(data, split)
    about.check_classes(source.classes.names, data)
    name = split
    if fold is not None:
        source, name = fold_alone(source, *parse_fold(fold)), f"{split}-fold-{fold.replace('/', '-of-')}"
    chosen = options.parse_size(size) or about.size
    where = pick_device(device)
    with progress_bar() as bar:
        task = bar.add_task("evaluating", total=len(source), note="")
        metrics = evaluate_model(
            model.to(where),
            source,
            chosen,
            device=where,
            batch_size=batch_size,
            at_size=at_size,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    table = Table("class", "IoU %", "Acc %", "pixels %", box=None, header_style="dim")
    for column in table.columns[1:]:
        column.justify = "right"
    for row in class_rows(metrics):
        table.add_row(*row)
    OUT.print(table)
    OUT.print(f"[bold]mIoU {percent(metrics.miou)}[/]  mAcc {percent(metrics.macc)}  aAcc {percent(metrics.aacc)}")
    about_json = {"run": str(run), "weights": weights, "data": data, "split": split, "fold": fold, "size": list(chosen)}
    json_path = json_file or run / f"evaluation-{name}.json"
    json_path.write_text(json_module.dumps({**about_json, **metrics.to_json()}, indent=1) + "\n", encoding="utf-8")
    markdown_path = markdown or run / f"evaluation-{name}.md"
    markdown_path.write_text(metrics_markdown(f"{run} on {data}, {name}", metrics), encoding="utf-8")
