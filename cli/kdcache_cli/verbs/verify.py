"""`kdcache verify`: every byte of a store, and its teacher."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from kdcache.settings.shared import MachineSettings
from kdcache_cli.console import OUT, bytes_text, progress_bar, warn
from kdcache_cli.settings import shared_flags

if TYPE_CHECKING:
    from kdcache.store.backend.base import Place

_Option = typer.Option


def verify(
    store: Annotated[str, typer.Argument(help="A store, a folder or s3://BUCKET/PREFIX.")],
    teacher: Annotated[
        list[str] | None,
        _Option("--teacher", help="Run the teacher again on some records. Repeat it for an ensemble."),
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
    """Check every byte of a cache. With --data, also that the data set is what it
    was built from. With --teacher, also that it holds that teacher's targets.

    Who may write to a store can change a file and the digests with it. Against
    that, publish the seal's digest, which this verb prints, in another place, and
    give it with --seal.

    Exits with 1 when a file is damaged, the data have changed or the teacher is
    another, with 2 when the seal is not the one that was published.
    """
    from kdcache.data import ClassList
    from kdcache.store import Records, read_manifest, verify_files
    from kdcache.store.format.eight_bits import describe
    from kdcache.teacher import compare_teacher, load_like
    from kdcache.training import pick_device

    place = shared_flags.open_place(store, cache_dir, cache_bytes)
    with progress_bar() as bar:
        task = bar.add_task("checking files", total=None, note="")
        report = verify_files(place, lambda done, total: bar.update(task, completed=done, total=total), seal=seal)
    OUT.print(f"{report.files} files, {bytes_text(report.bytes)} of shards: ", end="")
    OUT.print("[green]as written[/]" if not report.damaged else f"[red]{len(report.damaged)} damaged[/]")
    for name in report.damaged:
        OUT.print(f"  [red]damaged[/] {escape(place.describe(name))}")
    if report.damaged:
        OUT.print(report.fix)
        raise typer.Exit(1)
    OUT.print(f"seal {report.seal}" + (", as published" if seal else ""), highlight=False, soft_wrap=True)
    manifest = read_manifest(place)
    for line in describe(manifest.features, manifest.feature_fidelity):
        OUT.print(f"features at the build: {line}", markup=False)
    same_data = data is None or _check_data(place, data, split)
    if not teacher:
        if not same_data:
            raise typer.Exit(1)
        return
    dataset = manifest.dataset
    classes = ClassList(dataset.class_names, dataset.class_colours)
    classified = manifest.segmentation is not None
    loaded = load_like(manifest.teacher, teacher, classes, class_map=class_map, classified=classified)
    for note in loaded.notes:
        warn(note)
    agreement = compare_teacher(Records.open(place, data, split), loaded, pick_device(device), records)
    for line in agreement.fingerprint:
        OUT.print(f"  [red]another teacher[/] {escape(line)}")
    for name in agreement.drifted:
        OUT.print(f"  [red]drifted pixels[/] {escape(name)}")
    parts = [f"{path} off by at most {error:.1e} of its largest" for path, error in agreement.values.items()]
    if manifest.segmentation is not None:
        parts.insert(
            0,
            f"argmax agreement {100 * agreement.argmax:.3f} %, KL {agreement.kl:.2e} nats, largest logit error "
            f"{agreement.largest_error:.2e}",
        )
    OUT.print(f"{agreement.records} records against the teacher, at native stride: {'; '.join(parts)}")
    for line in describe(manifest.features, agreement.features):
        OUT.print(f"features against the teacher: {line}", markup=False)
    OUT.print(
        "[green]the store holds the targets of this teacher[/]"
        if agreement.ok
        else "[red]the store does not hold the targets of this teacher[/]"
    )
    if not (agreement.ok and same_data):
        raise typer.Exit(1)


def _check_data(place: "Place", data: str, split: str | None) -> bool:
    """Print whether a data set is what a cache was built from, and return it. Every file is read."""
    from kdcache.data import open_split
    from kdcache.store import data_changes, open_cache, renewal

    cache = open_cache(place)
    source = open_split(data, split or cache.manifest.dataset.split)
    with progress_bar() as bar:
        task = bar.add_task("comparing the data set", total=None, note="")
        changes = data_changes(
            cache, source, indexed=False, progress=lambda done, total: bar.update(task, completed=done, total=total)
        )
    for note in changes.notes():
        OUT.print(f"note: {note}", markup=False)
    if changes:
        OUT.print(f"[red]the data set has changed since the build:[/] {escape(changes.describe())}")
        OUT.print(f"to renew the cache: {renewal(cache.place, source.data)}", markup=False, soft_wrap=True)
    elif changes.recorded:
        OUT.print(f"[green]the data set is what the cache was built from:[/] {len(source)} samples compared")
    else:
        OUT.print(f"the {len(source)} sample ids and the classes are the cache's")
    return not changes
