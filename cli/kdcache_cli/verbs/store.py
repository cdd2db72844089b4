"""`kdcache inspect`, `verify`, `copy`: a store that is there."""

import json as json_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from kdcache.errors import RecipeError
from kdcache.settings.shared import MachineSettings
from kdcache_cli.console import OUT, bytes_text, progress_bar
from kdcache_cli.settings import shared_flags

if TYPE_CHECKING:  # the verbs import what they need: --help must not wait for zarr
    from kdcache.store import Cache

_Option = typer.Option


def inspect(
    store: Annotated[str, typer.Argument(help="A store, a folder or s3://BUCKET/PREFIX.")],
    json: Annotated[bool, _Option("--json", help="Machine-readable.")] = False,
    teacher_report: Annotated[
        bool, _Option("--teacher-report", help="Audit the teacher by what the store holds; writes pictures.")
    ] = False,
    data: shared_flags.OptionalData = None,
    split: Annotated[str | None, _Option("--split", help="Which split of it (default: the store's).")] = None,
    out: Annotated[
        Path | None,
        _Option(
            "--out", help="Where the report goes (default: STORE-report beside the store; for a remote one, here)."
        ),
    ] = None,
    worst: Annotated[
        int, _Option("--worst", min=0, max=1000, help="Pictures of so many images where the teacher loses most.")
    ] = 10,
    cache_dir: shared_flags.CacheDir = None,
    cache_bytes: shared_flags.CacheBytes = None,
) -> None:
    """Say what a store is: from what, how big, complete or not, compression, top-k
    mass.

    With --teacher-report, say what its teacher is worth, on whole images at view
    size: IoU and accuracy per class, which classes it confuses, whether it is as
    sure as it is right, what pseudo labels of it would keep, what --top-k would
    cost. Tables here; report.json and pictures in --out. Needs the labels: those
    in the store, or --data for a store built with --pixels source.

    [dim]kdcache inspect camvid.zarr[/]
    [dim]kdcache inspect camvid.zarr --teacher-report --out camvid-report[/]
    """
    if teacher_report:
        from kdcache_cli.verbs.inspect_teacher import report_teacher

        report_teacher(shared_flags.open_place(store, cache_dir, cache_bytes), data, split, out, worst, json)
        return
    _refuse_alone({"--data": data, "--split": split, "--out": out})
    from kdcache.store import inspect_store

    report = inspect_store(shared_flags.open_place(store, cache_dir, cache_bytes))
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


def _refuse_alone(flags: dict[str, object]) -> None:
    if given := [name for name, value in flags.items() if value is not None]:
        raise RecipeError(
            "some flags of inspect belong to --teacher-report",
            received=f"{', '.join(given)} without it",
            remedy="add --teacher-report",
        )


def verify(
    store: Annotated[str, typer.Argument(help="A store, a folder or s3://BUCKET/PREFIX.")],
    teacher: Annotated[
        list[str] | None,
        _Option("--teacher", help="Run it again on a sample of records. Of several, give all, in their order."),
    ] = None,
    records: Annotated[int, _Option("--records", min=1, help="How many records to run it on.")] = 16,
    seal: Annotated[
        str | None,
        _Option("--seal", metavar="DIGEST", help="What the seal's digest must be, as it was published elsewhere."),
    ] = None,
    data: shared_flags.OptionalData = None,
    split: Annotated[str | None, _Option("--split", help="Which split of it (default: the store's).")] = None,
    class_map: Annotated[Path | None, _Option("--class-map", help="As at the build.")] = None,
    device: shared_flags.Device = MachineSettings.device,
    cache_dir: shared_flags.CacheDir = None,
    cache_bytes: shared_flags.CacheBytes = None,
) -> None:
    """Check every byte of a store; with --teacher, also that it holds what that
    teacher says.

    Who may write to a store can change a file and the digests with it. Against
    that, publish the seal's digest, which this verb prints, in another place, and
    give it with --seal.

    Exits with 1 when a file is damaged or the teacher is another, with 2 when the
    seal is not the one that was published.
    """
    from kdcache.data import ClassList
    from kdcache.store import Records, read_manifest, verify_files
    from kdcache.teacher import compare_teacher, load_like
    from kdcache.train import pick_device

    place = shared_flags.open_place(store, cache_dir, cache_bytes)
    with progress_bar() as bar:
        task = bar.add_task("checking files", total=None, note="")
        report = verify_files(place, lambda done, total: bar.update(task, completed=done, total=total), seal=seal)
    OUT.print(f"{report.files} files, {bytes_text(report.bytes)} of shards: ", end="")
    OUT.print("[green]as written[/]" if not report.damaged else f"[red]{len(report.damaged)} damaged[/]")
    for name in report.damaged:
        OUT.print(f"  [red]damaged[/] {escape(place.describe(name))}")
    if report.damaged:
        OUT.print(report.remedy)
        raise typer.Exit(1)
    OUT.print(f"seal {report.seal}" + (", as published" if seal else ""), highlight=False, soft_wrap=True)
    if not teacher:
        return
    manifest = read_manifest(place)
    dataset = manifest.dataset
    classes = ClassList(dataset.class_names, dataset.class_colours)
    loaded = load_like(manifest.teacher, teacher, classes, class_map=class_map)
    agreement = compare_teacher(Records.open(place, data, split), loaded, pick_device(device), records)
    for line in agreement.fingerprint:
        OUT.print(f"  [red]another teacher[/] {escape(line)}")
    for name in agreement.drifted:
        OUT.print(f"  [red]drifted pixels[/] {escape(name)}")
    OUT.print(
        f"{agreement.records} records against the teacher: argmax agreement {100 * agreement.argmax:.3f} %, "
        f"KL {agreement.kl:.2e} nats, largest logit error {agreement.largest_error:.2e}"
    )
    OUT.print("[green]the store holds what this teacher says[/]" if agreement.ok else "[red]it does not[/]")
    if not agreement.ok:
        raise typer.Exit(1)


def copy(
    source: Annotated[
        str, typer.Argument(metavar="SOURCE", help="A complete store, a folder or s3://BUCKET/PREFIX (gs://, az://).")
    ],
    destination: Annotated[
        str, typer.Argument(metavar="DESTINATION", help="Where to: a new folder or address, or a copy to go on with.")
    ],
    codec: Annotated[
        str | None, _Option("--codec", help="default, small or none, as at the build (default: the source's).")
    ] = None,
    shard_records: Annotated[
        int | None, _Option("--shard-records", min=1, max=65536, help="Records per shard file (default: the source's).")
    ] = None,
    samples: Annotated[
        int | None, _Option("--samples", min=1, help="Only so many samples, evenly spread over the source.")
    ] = None,
    ids: Annotated[
        Path | None, _Option("--ids", help="Only the samples whose ids this file lists, one a line.")
    ] = None,
    features: Annotated[
        str | None, _Option("--features", help="Only these taps, comma-separated; '' for none (default: all).")
    ] = None,
    pixels: Annotated[
        str | None, _Option("--pixels", help="source: without images and labels, which the data set gives then.")
    ] = None,
    worker: shared_flags.Worker = None,
    cache_dir: shared_flags.CacheDir = None,
    cache_bytes: shared_flags.CacheBytes = None,
) -> None:
    """Copy a store, to another disk or object store, into another codec or other
    shards, in part.

    What stays as it is, is copied byte for byte, and every file is compared with
    its digest: fast, and exact. Interrupted, the same command continues; a
    finished copy is checked and left as it is. --codec small rounds targets, and
    the copy says what that loses; nothing brings back what was rounded.

    [dim]kdcache copy camvid.zarr s3://bucket/camvid.zarr[/]
    [dim]kdcache copy ade20k.zarr ade20k-small.zarr --codec small[/]
    [dim]kdcache copy ade20k.zarr tenth.zarr --samples 2000 --features ''[/]
    """
    from kdcache.store import CopyChanges, copy_store, open_cache, store_exists, summarise, worker_of
    from kdcache.store.copy import rounds

    cache = open_cache(shared_flags.open_place(source, cache_dir, cache_bytes))
    changes = CopyChanges(
        codec=None if codec is None else shared_flags.one_of("--codec", codec, ("default", "small", "none")),  # type: ignore[arg-type]
        shard_records=shard_records,
        samples=_samples(cache, samples, ids),
        features=None if features is None else tuple(tap for tap in features.split(",") if tap),
        pixels=None if pixels is None else shared_flags.one_of("--pixels", pixels, ("stored", "source")),  # type: ignore[arg-type]
    )
    fidelity = None
    if rounds(cache.manifest, changes.codec) and not store_exists(destination):  # a copy that was begun has its figures
        from kdcache.teacher import copied_fidelity  # which imports torch

        fidelity = copied_fidelity(cache, changes.codec)
    part = worker_of(worker)
    with progress_bar() as bar:
        task = bar.add_task(part.describe("copying"), total=None, note="")
        result = copy_store(
            cache,
            destination,
            changes,
            fidelity=fidelity,
            worker=part,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    if not result.complete:
        OUT.print(
            f"[bold]{escape(destination)}[/]: {part.describe('done')}; "
            "the copy is finished by the worker that ends last"
        )
        return
    report = summarise(open_cache(shared_flags.open_place(destination, cache_dir, cache_bytes)))
    kept = f" ({result.kept} were there)" if result.kept else ""
    speed = f" in {result.seconds:.1f} s, {result.records / result.seconds:.0f} records/s" if result.records else ""
    OUT.print(
        f"[bold]{escape(destination)}[/]: {result.manifest.records} records{kept}{speed}; "
        f"{bytes_text(report.bytes_on_disk)}, the source has {bytes_text(summarise(cache).bytes_on_disk)}"
    )
    if result.manifest.fidelity is not None:
        OUT.print(
            f"what codec {result.manifest.codec} stored, beside the teacher: {result.manifest.fidelity.describe()}"
        )
    elif cache.manifest.fidelity is not None:
        OUT.print("what is lost beside the teacher is not known: the source itself keeps less than the teacher said")


def _samples(cache: "Cache", count: int | None, ids: Path | None) -> list[int] | None:
    from kdcache.store import samples_of_ids, spread_samples

    if count is not None and ids is not None:
        raise RecipeError(
            "a part of a store is so many samples, or those of a list",
            received=f"--samples {count} and --ids {ids}",
            remedy="give one of them",
        )
    if count is not None:
        return spread_samples(cache, count)
    if ids is None:
        return None
    try:
        lines = ids.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(
            "--ids is a text file with one id per line", received=f"{ids}: {error}", remedy="check the path"
        ) from error
    return samples_of_ids(cache, [line.strip() for line in lines if line.strip()])
