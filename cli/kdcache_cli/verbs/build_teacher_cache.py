"""`kdcache build-teacher-cache`: the teacher's pass, or the part of it that an earlier cache lacks."""

from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from kdcache.progress import note_line, progress_bar
from kdcache.settings import entries, read, read_values
from kdcache.settings.building import BUILD
from kdcache.settings.engine import EngineSettings
from kdcache.settings.shared import DataSettings
from kdcache_cli.console import ERRORS, OUT, bytes_text, warn
from kdcache_cli.help import common
from kdcache_cli.settings import build_flags, shared_flags
from kdcache_cli.settings.signature import given, takes

if TYPE_CHECKING:  # the verbs import what they need: --help must not wait for torch
    from kdcache.data import Split
    from kdcache.store import Cache
    from kdcache.teacher import BuildOptions, Teacher
    from kdcache.teacher.audit.verify import Score
    from kdcache.teacher.build.ray_engine import Parts


@common(*build_flags.COMMON, "reuse", "like", "worker")
@takes(
    *(*BUILD, EngineSettings),
    unset=("data",),
    order=(
        *("context", "data", "teacher", "out", "reuse", "like", "split", "size", "fit", *build_flags.ORDER),
        *("worker", "take_over", *entries(EngineSettings), "threads", "device"),
    ),
)
def build_teacher_cache(
    settings: dict[str, Any],
    context: typer.Context,
    out: build_flags.Out,
    reuse: Annotated[
        str | None,
        typer.Option("--from", metavar="OLD", help="Copy targets of this cache; other flags default to its settings."),
    ] = None,
    like: Annotated[
        str | None,
        typer.Option("--like", metavar="CACHE", help="Repeat the views of this cache, for a training that joins both."),
    ] = None,
    worker: shared_flags.Worker = None,
    take_over: shared_flags.TakeOver = False,
) -> None:
    """Run a teacher over a split once and keep its outputs.

    Interrupted, the same command continues; a finished store is checked and left
    as it is. Started several times on one disk, the processes share the work. On
    an object store, or to divide it beforehand, number them with --worker;
    torchrun does so by itself, and a scheduler with --worker auto. The last one
    finishes the store; shards of a worker that died are written by the same
    command with its number, or by any other with --take-over.

    --from OLD builds a new cache with more samples, views, taps or statistics, or
    after labels have changed. Images that render as in OLD keep its targets. The
    teacher runs on the others. A new tap sends every image through the teacher
    once more. OLD is only read.

    --like CACHE builds the cache of another teacher for the same views, so that
    train-student can join both. Without --data the teacher sees the pixels that
    CACHE stores. The new cache stores none.

    [dim]kdcache build-teacher-cache --data camvid --teacher runs/teacher --out camvid.zarr[/]
    [dim]kdcache build-teacher-cache ... --teacher runs/a --teacher runs/b --tta flip --teacher-size 576x768[/]
    [dim]kdcache build-teacher-cache ... --views 8 --crop 288x288 --view-scale 0.5:2[/]
    [dim]kdcache build-teacher-cache --from camvid.zarr --data camvid --teacher runs/teacher --out new.zarr[/]
    [dim]kdcache build-teacher-cache --like camvid.zarr --teacher hf:facebook/dinov2-base ... --out dino.zarr[/]
    [dim]torchrun --nproc-per-node 8 -m kdcache_cli build-teacher-cache --data ... --out s3://bucket/camvid.zarr[/]
    """
    from kdcache.verbs.build import check_source

    check_source(settings["data"], reuse, like)
    parts: Parts = partial(build_flags.prepare, settings, out)
    if like is not None:
        parts = partial(_prepare_like, like, settings, given(settings, context), out)
    if reuse is not None:
        parts = partial(_prepare_reuse, reuse, given(settings, context), settings["teacher"], out)
    _run_build(parts, settings, out, worker, take_over)


def _prepare_reuse(
    reuse: str, typed: dict[str, Any], teacher: tuple[str, ...], out: str
) -> "tuple[Split, Teacher, BuildOptions, Cache]":
    """Return what a build consists of that copies targets of a cache.

    Args:
        typed: the settings that were given.
    """
    from kdcache.verbs.build import plan_reuse

    values = read_values(typed, *BUILD)
    notes = partial(ERRORS.print, markup=False)
    return plan_reuse(
        reuse, typed["data"], typed.get("split"), teacher, values, out, lambda text: notes(note_line(text))
    )


def _prepare_like(
    like: str, settings: dict[str, Any], typed: dict[str, Any], out: str
) -> "tuple[Split, Teacher, BuildOptions]":
    """Return what a build consists of that repeats the views of a cache.

    Args:
        typed: the settings that were given.
    """
    from kdcache.verbs.build import plan_like

    values, notes = (
        read_values(settings, *(table for table in BUILD if table is not DataSettings)),
        partial(ERRORS.print, markup=False),
    )
    given_values = read_values({name: value for name, value in typed.items() if name != "data"}, *BUILD)
    return plan_like(
        like,
        settings["data"],
        typed.get("split"),
        settings["teacher"],
        values,
        given_values,
        out,
        lambda text: notes(note_line(text)),
    )


def _run_build(parts: "Parts", settings: dict[str, Any], out: str, worker: str | None, take_over: bool) -> None:
    """Run the teacher's pass with its progress, and print its result.

    Args:
        parts: as of `RayEngine`. settings: with those of the engine.
    """
    from kdcache.store import JoinedCache, Records, open_cache, summarise, worker_of
    from kdcache.store.format.eight_bits import describe
    from kdcache.teacher import build_cache, score_cache
    from kdcache.teacher.build.render import StoredViews
    from kdcache.verbs.build import engine_of

    part = worker_of(worker, take_over)
    engine = engine_of(read(EngineSettings, settings), parts, part)
    source, teacher, build_options, *old = parts()
    reuse = old[0] if old else None
    with progress_bar() as bar:
        task = bar.add_task(part.describe("teacher's pass"), total=None, note="")
        result = build_cache(
            source,
            teacher,
            out,
            build_options,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
            worker=part,
            reuse=reuse,
            engine=engine,
        )
    if result.damaged:
        OUT.print(f"{result.damaged} records of the earlier store are damaged: their targets were computed again")
    if result.repair is not None:
        OUT.print(
            f"shards {', '.join(map(str, result.repair.shards))} were damaged and computed again with "
            f"{result.repair.describe()}: their pixels and the teacher's outputs are those of the first build, and "
            "the manifest's `repairs` records it"
        )
    taken = f" ({result.records:,} taught, {result.reused:,} taken over)" if reuse is not None else ""
    if not result.complete:
        OUT.print(
            f"[bold]{escape(str(out))}[/]: {part.describe('done')}{taken}; "
            "the store is finished by the worker that ends last"
        )
        return
    cache = open_cache(out)
    summary = summarise(cache)
    earlier = f" ({result.kept} were there)" if result.kept else ""
    speed = f" in {result.seconds:.1f} s" if result.records or result.reused else ""
    speed += f", {result.images_per_second:.1f} images/s" if result.records else ""
    OUT.print(f"[bold]{escape(str(out))}[/]: {len(cache)} records{earlier}{taken}{speed}")
    OUT.print(
        f"{bytes_text(summary.bytes_on_disk)} on disk, {bytes_text(summary.bytes_per_record)} per record, "
        f"of which targets {bytes_text(summary.target_bytes_per_record)}"
        + (
            f"; full-resolution fp16 logits would be {bytes_text(summary.full_resolution_bytes)} per record, "
            f"{summary.saving:.1f} times the targets"
            if summary.manifest.heads
            else ""
        )
    )
    if summary.manifest.fidelity is not None:
        OUT.print(
            f"what codec {summary.manifest.codec} stored, beside the teacher: {summary.manifest.fidelity.describe()}"
        )
    for line in describe(
        summary.manifest.features, summary.manifest.feature_fidelity, wanted=build_options.feature_dtype
    ):
        OUT.print(f"features: {line}", markup=False)
    if summary.manifest.segmentation is None:
        return
    like = JoinedCache({"": source.like, "out": cache}) if isinstance(source, StoredViews) else None
    records = Records(cache, source) if like is None else Records(like)  # which has pixels and labels
    _print_score(score_cache(records), "first crops" if cache.manifest.view.kind == "crop" else "labels")


def _print_score(score: "Score | None", of: str) -> None:
    from kdcache.metrics import at_chance, percent

    if score is None:
        OUT.print("no labels: the teacher's mIoU is unknown")
        return
    metrics = score.metrics
    OUT.print(
        f"the teacher on these {of}, read back from the store: mIoU {percent(metrics.miou)}, "
        f"aAcc {percent(metrics.aacc)}, mean top probability {score.confidence:.3f}"
    )
    if (nothing := at_chance(metrics)) is not None:
        warn(
            f"the teacher {nothing}. It has nothing to teach: check its weights, --class-map, --mean and --std, or "
            "train it longer"
        )
    elif score.doubt is not None:
        warn(f"the teacher {score.doubt}")
