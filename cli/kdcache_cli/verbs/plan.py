"""`kdcache plan`: what a build will cost, before it."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kdcache.settings.building import BUILD
from kdcache_cli.console import ERRORS, OUT, bytes_text, figure_table
from kdcache_cli.help import common
from kdcache_cli.settings import build_flags
from kdcache_cli.settings.signature import takes

if TYPE_CHECKING:  # the verbs import what they need: --help must not wait for torch
    from kdcache.teacher.build.cost_estimate import Estimate
    from kdcache.teacher.build.disk import Bound, DiskRate

_Option = typer.Option
_EXACT = 0.005  # of two standard errors, 1 %
ADVICE = (
    "[dim]Before you build: on CamVid, a cache of all images helped most with few labels. With 46 labels and a teacher "
    "that began from ImageNet, it gained 2 to 13 points of mIoU over labels only. With a label on every image, it "
    "gained less than seeds differ. The student's --lr was worth 7 points. Tune --lr first, then compare with the "
    "control (docs: Compare runs).[/]"
)


@common(*build_flags.COMMON, "student", "epochs", "json_file")
@takes(
    *BUILD,
    order=(
        *("data", "teacher", "split", "size", "fit", *build_flags.ORDER, "threads", "device"),
        *("out", "measure_disk", "records", "student", "epochs", "json_file"),
    ),
)
def plan(
    settings: dict[str, Any],
    out: Annotated[str, _Option("--out", help="Where the cache would go (default: here).")] = ".",
    measure_disk: Annotated[
        bool, _Option("--measure-disk", help="Measure --out's disk: write at most 2 GB, delete it.")
    ] = False,
    records: Annotated[
        int, _Option("--records", min=8, max=256, help="Records that the estimate is measured on.")
    ] = 32,
    student: Annotated[str | None, _Option("--student", help="Model whose training is estimated too.")] = None,
    epochs: Annotated[int, _Option("--epochs", min=1, help="Epochs of that training.")] = 100,
    json_file: Annotated[Path | None, _Option("--json", help="Write the figures here too.")] = None,
) -> None:
    """Estimate the cost of build-teacher-cache: bytes, files, hours, and the epochs until it breaks even.

    Takes the flags of build-teacher-cache. Its help explains them. The teacher runs on a
    few images that are evenly spread over the data. They go into a small temporary
    cache. kdcache scales its size and time to all images. The second table shows
    settings that differ from yours in one flag.

    [dim]kdcache plan --data camvid --teacher runs/teacher --out camvid.zarr[/]
    [dim]kdcache plan --data ade20k --teacher runs/b5 --views 4 --student kdcache:tiny --epochs 50[/]
    """
    from kdcache.verbs import plan as plan_build

    data, teacher = settings.pop("data"), settings.pop("teacher")
    planned = plan_build(
        data,
        teacher,
        out=out,
        measure_disk=measure_disk,
        records=records,
        student=student,
        epochs=epochs,
        **settings,
    )
    _print_settings(planned.estimate)
    _print_time(planned.estimate)
    if planned.disk is not None and planned.bound is not None:
        _print_disk(planned.disk, planned.bound)
    if planned.student is not None:
        _print_training(planned.estimate, planned.student, planned.student_seconds, epochs)
    _print_room(planned.estimate, planned.free, out)
    OUT.print(ADVICE)
    if json_file is not None:
        content = {"data": data, "teachers": teacher, **planned.to_json()}
        json_file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _print_settings(estimate: "Estimate") -> None:
    planned = estimate.chosen
    share = "all" if planned.setting.k == estimate.classes else f"the top {planned.setting.k} of"
    off = ""
    if estimate.error > _EXACT:
        off = f". These differ, so the bytes may be off by {200 * estimate.error:.1f} %. --records N measures more"
    kept = "" if planned.setting.k is None else f", keeping {share} {estimate.classes} classes"
    OUT.print(
        f"[bold]{bytes_text(planned.bytes)}[/] in {planned.files:,} files, {planned.records:,} records of "
        f"{bytes_text(planned.bytes_per_record)}{kept}; the teacher's pass takes "
        f"[bold]{_time(planned.seconds)}[/] on this machine. From {estimate.taught} records{off}."
    )
    table = figure_table("array", "per record", "in all")
    for path, size in planned.sizes.items():
        if not path.startswith("records/"):
            table.add_row(path, bytes_text(size), bytes_text(size * planned.records))
    OUT.print()
    OUT.print(table)
    table = figure_table("otherwise", "per record", "in all", "times", "files", "pass")
    for cost in estimate.neighbours:
        ratio = f"{cost.bytes / planned.bytes:.2f}"
        flags = cost.setting.flags(planned.setting)
        table.add_row(
            flags,
            bytes_text(cost.bytes_per_record),
            bytes_text(cost.bytes),
            ratio,
            f"{cost.files:,}",
            _time(cost.seconds),
        )
    OUT.print()
    OUT.print(table)


def _print_time(estimate: "Estimate") -> None:
    each = estimate.seconds
    stages = {"rendering": each.render, "the teacher": each.teach, "writing": each.write}
    OUT.print(
        f"\nA record takes {_time(each.build)} of the pass. On its own: "
        + ", ".join(f"{name} {_time(value)}" for name, value in stages.items())
        + f"; a student reads its target in {_time(each.read)}."
    )
    if estimate.payback_epochs == float("inf"):
        OUT.print(
            "[yellow]Reading a target takes as long as running this teacher: the cache saves memory, but no time.[/]"
        )
        return
    epochs = f"{estimate.payback_epochs:.1f}"
    OUT.print(f"Against a teacher in every step, the cache breaks even after [bold]{epochs}[/] epochs of students.")


def _print_disk(disk: "DiskRate", bound: "Bound") -> None:
    first, last = (f"{bytes_text(rate)}/s" for rate in (disk.first, disk.last))
    took = f"{bytes_text(disk.bytes)} in {_time(disk.seconds)}"
    each = ", ".join(f"{name} {_time(seconds)}" for name, seconds in bound.seconds.items())
    OUT.print(
        f"The disk of {disk.folder} took {took}: {first} at first, {last} at the end. What bounds the build: "
        f"[bold]{bound.name}[/]. A record takes: {each}.",
        highlight=False,
    )
    if disk.slows_down:
        OUT.print(
            f"[yellow]warning: this disk is {disk.first / disk.last:.1f} times slower once its write cache is full. "
            f"Expect {_time(bound.build_seconds)} for the pass, or name a faster disk with --out.[/]",
            highlight=False,
        )


def _print_training(estimate: "Estimate", student: str, learning: float, epochs: int) -> None:
    live, cached = estimate.training_seconds(epochs, learning)
    OUT.print(
        f"{epochs} epochs of {student} ({_time(learning)} an image, forward and backward): {_time(live)} with the "
        f"teacher in every step, {_time(cached)} from the cache with its build: {live / cached:.1f} times as fast. "
        f"Every further student: {_time(cached - estimate.chosen.seconds)}."
    )


def _print_room(estimate: "Estimate", free: int | None, out: str) -> None:
    if free is None:
        OUT.print(f"The free space at {out} is unknown.", markup=False)
    elif estimate.chosen.bytes <= free:
        OUT.print(f"{bytes_text(free)} are free where it would go.")
    else:
        ERRORS.print(
            f"[bold red]It will not fit[/]: {bytes_text(estimate.chosen.bytes)} are needed, {bytes_text(free)} are "
            f"free at {out}. Take a smaller setting of the table, or another disk with --out."
        )


def _time(seconds: float) -> str:
    for unit, length in (("d", 86400.0), ("h", 3600.0), ("min", 60.0), ("s", 1.0), ("ms", 1e-3)):
        if seconds >= length:
            return f"{seconds / length:.1f} {unit}"
    return f"{1e6 * seconds:.0f} us"
