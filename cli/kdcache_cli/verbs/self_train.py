"""`kdcache self-train`: rounds of teacher, store and student on images without labels."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kdcache.errors import RecipeError
from kdcache_cli.settings import shared_flags
from kdcache_cli.verbs.sweep import do_sweep, flags_of

if TYPE_CHECKING:
    from kdcache.sweep.recipe import Arm

_Option = typer.Option


def self_train(
    context: typer.Context,
    source: Annotated[
        str | None, _Option("--source", metavar="DATA", help="Images with labels: a data folder, or LAYOUT:DIR.")
    ] = None,
    target: Annotated[
        str | None,
        _Option(
            "--target",
            metavar="DATA",
            help="Images that the rounds label. No label of its train split is learnt from; its val split judges.",
        ),
    ] = None,
    out: Annotated[
        Path | None, _Option("--out", help="Where everything goes; a command that was stopped goes on.")
    ] = None,
    teacher: Annotated[
        str | None,
        _Option(
            "--teacher",
            metavar="RUN",
            help="The first round's teacher: a run, SPEC@FILE or SPEC@default (default: one is trained on --source).",
        ),
    ] = None,
    rounds: Annotated[
        int, _Option("--rounds", help="How often a student is taught, 1 to 99; each teaches the next.")
    ] = 3,
    pseudo_labels: Annotated[
        str,
        _Option(
            "--pseudo-labels",
            metavar="RULE",
            help="What a student learns from the target: the surest share of each class, by round (0.2,0.25,0.3); all "
            "pixels above a confidence (confidence:0.9); or soft, the probabilities of all.",
        ),
    ] = "0.2,0.25,0.3",
    init: Annotated[
        str, _Option("--init", metavar="RULE", help="Each student begins from scratch, or with the last one's weights.")
    ] = "scratch",
    model: Annotated[
        str | None, _Option("--model", help="Architecture of the students (default: kdcache:tiny); see kdcache models.")
    ] = None,
    size: Annotated[
        str | None, _Option("--size", metavar="HxW", help="Height and width of all pixels (default: 288x384).")
    ] = None,
    iterations: Annotated[
        int | None, _Option("--iterations", min=1, help="Steps of each student (default: 4000).")
    ] = None,
    audit: Annotated[
        bool, _Option("--audit/--no-audit", help="Judge each round's teacher by labels of the target's train split.")
    ] = True,
    seeds: Annotated[
        str, _Option("--seeds", metavar="A,B,C", help="Seeds of the students; each has rounds of its own.")
    ] = "0",
    smoke: Annotated[
        bool, _Option("--smoke", help="Small, on procedural scenes of two styles: minutes, every output.")
    ] = False,
    changes: Annotated[
        list[str] | None,
        _Option("--set", metavar="TABLE.KEY=VALUE", help="Change the recipe self-train, e.g. student.ema=0.99."),
    ] = None,
    parallel: Annotated[int, _Option("--parallel", min=1, help="Runs side by side, each a process.")] = 1,
    dry_run: Annotated[bool, _Option("--dry-run", help="Show the commands and do nothing.")] = False,
) -> None:
    """Teach students on images without labels, round by round: teacher, store, student, which teaches the next.

    Every step is a command of kdcache; --dry-run shows them. Ends with a table of the rounds beside a student
    of the source alone, pictures and a page.

    [dim]kdcache self-train --source gta5:GTA5 --target cityscapes:CITY --size 512x1024 --out st[/]

    [dim]kdcache self-train --smoke --out try[/]
    """
    from kdcache.sweep import plan_sweep, read_recipe

    if out is None:
        raise RecipeError("self-training has a folder", received="no --out", remedy="add --out DIR")
    if not 1 <= rounds <= 99:
        raise RecipeError(
            "--rounds is a whole number from 1 to 99",
            received=str(rounds),
            remedy="use --rounds 1 for one student of the first teacher, or more: each teaches the next",
        )
    data = {name: value for name, value in (("source", source), ("target", target)) if value is not None}
    if not smoke and (lacking := [f"--{name}" for name in ("source", "target") if name not in data]):
        raise RecipeError(
            "self-training has images with labels, and images that it labels itself",
            received=f"no {' and no '.join(lacking)}",
            remedy=f"add {lacking[0]} DATA, or try it with --smoke first",
        )
    own = _changes(pseudo_labels, init, size, audit)
    read = read_recipe("self-train", smoke=smoke, changes=[*own, *(changes or ())])
    student = {"model": model, "iterations": iterations}
    planned = plan_sweep(
        replace(
            read,
            arms=tuple(_with_rounds(arm, rounds) for arm in read.arms),
            seeds=shared_flags.parse_numbers(seeds, "--seeds"),
            teacher=read.teacher if teacher is None else {"spec": teacher},
            student={**read.student, **{key: value for key, value in student.items() if value is not None}},
        ),
        None,
        out,
        flags_of(context.find_root().command),
        data,
    )
    typed = (*(change.partition("=")[2] for change in changes or ()), model or "", teacher or "")
    do_sweep(planned, context.find_root().command, ("self-train", *typed), parallel, dry_run)


def _with_rounds(arm: "Arm", rounds: int) -> "Arm":
    return replace(arm, flags={**arm.flags, "rounds": rounds}) if "rounds" in arm.flags else arm


def _changes(pseudo_labels: str, init: str, size: str | None, audit: bool) -> Iterator[str]:
    """What the flags change in the recipe, as --set has it. Raises: RecipeError for a rule that there is not."""
    yield f"rounds.init={init}"
    yield f"rounds.audit={str(audit).lower()}"
    if size is not None:
        yield from (f"{table}.size={size}" for table in ("teacher", "store", "student"))
    kind, _, least = pseudo_labels.partition(":")
    if pseudo_labels == "soft":
        yield from ("stream.target.method=kl", "stream.target.term=[]")
    elif kind == "confidence" and _is_share(least):
        yield from (f"stream.target.term=[{{kind='pseudo', threshold={least}}}]", "rounds.quantile=''")
    elif all(map(_is_share, pseudo_labels.split(","))):
        yield f"rounds.quantile=[{pseudo_labels}]"
    else:
        raise RecipeError(
            "--pseudo-labels is shares of each class by round, confidence:X or soft",
            received=repr(pseudo_labels),
            remedy="give numbers between 0 and 1, for instance 0.2,0.25,0.3 or confidence:0.9",
        )


def _is_share(text: str) -> bool:
    try:
        return 0 < float(text) < 1
    except ValueError:
        return False
