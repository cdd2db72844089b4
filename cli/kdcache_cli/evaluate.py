"""`kdcache evaluate`: a trained model on labelled images."""

import json as json_module
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from kdcache_cli import options
from kdcache_cli.console import OUT, progress_bar


def evaluate(
    run: Annotated[
        str,
        typer.Argument(
            metavar="RUN", help="A run folder, SPEC@FILE (weights trained elsewhere) or SPEC@default (downloads)."
        ),
    ],
    data: options.Data,
    split: options.Split = "val",
    fold: Annotated[
        str | None,
        typer.Option("--fold", metavar="I/K", help="Only fold I, from 0, of K: what train --fold I/K left out."),
    ] = None,
    weights: Annotated[str, typer.Option("--weights", help="Of a run: best or last.")] = "best",
    class_map: Annotated[
        Path | None, typer.Option("--class-map", help="Which class of the data each class of the model becomes.")
    ] = None,
    size: options.Size = None,
    at_size: Annotated[
        bool, typer.Option("--at-size", help="Compare at the run's size instead of the labels' own.")
    ] = False,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Images per forward pass.")] = 8,
    threads: options.Threads = 0,
    device: options.Device = "auto",
    json_file: Annotated[
        Path | None, typer.Option("--json", help="(default: evaluation-SPLIT.json in the run, else here)")
    ] = None,
    markdown: Annotated[
        Path | None, typer.Option("--markdown", help="(default: evaluation-SPLIT.md in the run, else here)")
    ] = None,
) -> None:
    """mIoU, mAcc, aAcc and IoU per class, by mmsegmentation's convention.

    One confusion matrix over the split, void left out, at the labels' own size.
    A run's tables are written into its folder; those of SPEC@FILE into the current
    one.

    [dim]kdcache evaluate runs/student --data camvid[/]
    [dim]kdcache evaluate segformer:b2@weights.safetensors --data camvid --size 288x384[/]
    """
    import torch

    from kdcache.data import fold_alone, open_split, parse_fold
    from kdcache.evaluate import class_rows, evaluate_model, metrics_markdown, percent
    from kdcache.models.run import open_model, split_spec
    from kdcache.train import pick_device

    if threads:
        torch.set_num_threads(threads)
    chosen = options.one_of("--weights", weights, ("best", "last"))
    source = open_split(data, split)
    model, about = open_model(run, source.classes, options.parse_size(size), chosen, class_map=class_map)
    about.check_classes(source.classes.names, data)
    name = split
    if fold is not None:
        source, name = fold_alone(source, *parse_fold(fold)), f"{split}-fold-{fold.replace('/', '-of-')}"
    where = pick_device(device)
    with progress_bar() as bar:
        task = bar.add_task("evaluating", total=len(source), note="")
        metrics = evaluate_model(
            model.to(where),
            source,
            about.size,
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
    alone = split_spec(run) is not None
    about_json = {
        "run": run,
        "weights": None if alone else weights,
        "data": data,
        "split": split,
        "fold": fold,
        "size": list(about.size),
    }
    folder = Path() if alone else Path(run)
    json_path = json_file or folder / f"evaluation-{name}.json"
    json_path.write_text(json_module.dumps({**about_json, **metrics.to_json()}, indent=1) + "\n", encoding="utf-8")
    markdown_path = markdown or folder / f"evaluation-{name}.md"
    markdown_path.write_text(metrics_markdown(f"{run} on {data}, {name}", metrics), encoding="utf-8")
    if alone:
        OUT.print(f"written: {json_path}, {markdown_path}", highlight=False)
