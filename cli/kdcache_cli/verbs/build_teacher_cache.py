"""`kdcache build-teacher-cache`: the teacher's pass, or the part of it that an earlier cache lacks."""

from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from kdcache.settings import entries
from kdcache.settings.building import BUILD
from kdcache.settings.engine import EngineSettings
from kdcache_cli.console import OUT, bytes_text
from kdcache_cli.help import common
from kdcache_cli.settings import build_flags, shared_flags
from kdcache_cli.settings.signature import given, takes

if TYPE_CHECKING:  # the verbs import what they need: --help must not wait for torch
    from kdcache.store import StoreSummary
    from kdcache.verbs.build import Built


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

    The same command continues an interrupted build. It checks a finished cache and does
    not change it.

    Several processes share the work if you start the command several times on one disk.
    For an object store, or to divide the work beforehand, number the processes with
    --worker. torchrun numbers them itself, and --worker auto takes a scheduler's
    numbers. The last process finishes the cache. If a worker died, run its command
    again, or add --take-over to another one.

    --from OLD builds a new cache with more samples, views, taps or statistics, or
    after labels have changed. Images that render as in OLD keep its targets. The
    teacher runs on the others. A new tap sends every image through the teacher
    again. OLD does not change.

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
    from kdcache.verbs import build_cache

    typed = given(settings, context)
    built = build_cache(
        typed.pop("data", None),
        typed.pop("teacher", None) or settings["teacher"],
        out,
        split=typed.pop("split", None),
        reuse=reuse,
        like=like,
        worker=worker,
        take_over=take_over,
        **typed,
    )
    if built.damaged:
        OUT.print(f"{built.damaged} records of the earlier cache are damaged: their targets were computed again")
    if built.repair is not None:
        OUT.print(
            f"shards {', '.join(map(str, built.repair.shards))} were damaged and computed again with "
            f"{built.repair.describe()}: their pixels and the teacher's outputs are those of the first build, and "
            "the manifest's `repairs` records it"
        )
    taken = f" ({built.records:,} computed, {built.reused:,} copied)" if reuse is not None else ""
    if built.summary is None:
        OUT.print(
            f"[bold]{escape(out)}[/]: {built.worker.describe('done')}{taken}; "
            "the worker that ends last finishes the cache"
        )
        return
    _print_cache(built, built.summary, taken)


def _print_cache(built: "Built", summary: "StoreSummary", taken: str) -> None:
    from kdcache.store.format.eight_bits import describe

    earlier = f" ({built.kept} from before)" if built.kept else ""
    speed = f" in {built.seconds:.1f} s" if built.records or built.reused else ""
    speed += f", {built.images_per_second:.1f} images/s" if built.records else ""
    OUT.print(f"[bold]{escape(built.out)}[/]: {summary.manifest.records} records{earlier}{taken}{speed}")
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
    manifest = summary.manifest
    if manifest.fidelity is not None:
        OUT.print(f"stored with codec {manifest.codec}, against the teacher: {manifest.fidelity.describe()}")
    for line in describe(manifest.features, manifest.feature_fidelity, wanted=built.feature_dtype):
        OUT.print(f"features: {line}", markup=False)
    if manifest.segmentation is not None:
        _print_score(built)


def _print_score(built: "Built") -> None:
    from kdcache.metrics import percent

    if built.score is None:
        OUT.print("no labels: the teacher's mIoU is unknown")
        return
    metrics = built.score.metrics
    OUT.print(
        f"the teacher on these {built.of}, read back from the cache: mIoU {percent(metrics.miou)}, "
        f"aAcc {percent(metrics.aacc)}, mean top probability {built.score.confidence:.3f}"
    )
