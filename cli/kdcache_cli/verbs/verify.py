"""`kdcache verify`: every byte of a cache, and its teacher."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from kdcache.settings.shared import MachineSettings
from kdcache_cli.console import OUT, bytes_text
from kdcache_cli.settings import shared_flags

if TYPE_CHECKING:
    from kdcache.verbs.verify import Verified

_Option = typer.Option


def verify(
    cache: Annotated[str, typer.Argument(metavar="CACHE", help="A cache: a folder or s3://BUCKET/PREFIX.")],
    teacher: Annotated[
        list[str] | None,
        _Option("--teacher", help="Run the teacher again on some records. Repeat it for an ensemble."),
    ] = None,
    records: Annotated[int, _Option("--records", min=1, help="How many records to run it on.")] = 16,
    seal: Annotated[
        str | None,
        _Option("--seal", metavar="DIGEST", help="The seal's digest, as it was published elsewhere."),
    ] = None,
    data: shared_flags.OptionalData = None,
    split: Annotated[str | None, _Option("--split", help="The split of --data (default: the cache's).")] = None,
    class_map: Annotated[Path | None, _Option("--class-map", help="As at the build.")] = None,
    device: shared_flags.Device = MachineSettings.device,
    cache_dir: shared_flags.CacheDir = None,
    cache_bytes: shared_flags.CacheBytes = None,
) -> None:
    """Check every byte of a cache; with --data and --teacher, also its data set and targets.

    With --data, it checks that the data set is what the cache was built from. With
    --teacher, it checks that the cache holds that teacher's targets.

    Anyone who can write to a cache can change a file together with its digests. To
    notice this, publish the seal's digest, which this command prints, elsewhere.
    Give it with --seal.

    The exit code is 1 if a file is damaged, the data have changed, or the teacher is
    another one. It is 2 if the seal differs from --seal.
    """
    from kdcache.store.format.eight_bits import describe
    from kdcache.verbs import verify as verify_cache

    done = verify_cache(
        cache,
        teacher=teacher,
        records=records,
        seal=seal,
        data=data,
        split=split,
        class_map=class_map,
        device=device,
        cache_dir=cache_dir,
        cache_bytes=cache_bytes,
    )
    report = done.files
    OUT.print(f"{report.files} files, {bytes_text(report.bytes)} of shards: ", end="")
    OUT.print("[green]as written[/]" if not report.damaged else f"[red]{len(report.damaged)} damaged[/]")
    for name in report.damaged:
        OUT.print(f"  [red]damaged[/] {escape(done.place.describe(name))}")
    if done.manifest is None:
        OUT.print(report.fix)
        raise typer.Exit(1)
    OUT.print(f"seal {report.seal}" + (", as published" if seal else ""), highlight=False, soft_wrap=True)
    for line in describe(done.manifest.features, done.manifest.feature_fidelity):
        OUT.print(f"features at the build: {line}", markup=False)
    _print_data(done)
    _print_agreement(done)
    if not done:
        raise typer.Exit(1)


def _print_data(done: "Verified") -> None:
    from kdcache.store import renewal

    if (changes := done.changes) is None:
        return
    for note in changes.notes():
        OUT.print(f"note: {note}", markup=False)
    if changes:
        OUT.print(f"[red]the data set has changed since the build:[/] {escape(changes.describe())}")
        OUT.print(f"to renew the cache: {renewal(done.place, done.data)}", markup=False, soft_wrap=True)
    elif changes.recorded:
        OUT.print(f"[green]the data set is what the cache was built from:[/] {done.samples} samples compared")
    else:
        OUT.print(f"the {done.samples} sample ids and the classes are the cache's")


def _print_agreement(done: "Verified") -> None:
    from kdcache.store.format.eight_bits import describe

    agreement, manifest = done.agreement, done.manifest
    if agreement is None or manifest is None:
        return
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
        "[green]the cache holds the targets of this teacher[/]"
        if agreement.ok
        else "[red]the cache does not hold the targets of this teacher[/]"
    )
