"""`kdcache copy`: a cache into another place, codec or part."""

from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from kdcache_cli.console import ERRORS, OUT, bytes_text
from kdcache_cli.settings import shared_flags

if TYPE_CHECKING:  # the verbs import what they need: --help must not wait for zarr
    from kdcache.store import CopyResult
    from kdcache.verbs.copy import Copied

_Option = typer.Option


def copy(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="A complete cache: a folder, s3://BUCKET/PREFIX (gs://, az://) or hf://datasets/USER/NAME.",
        ),
    ],
    destination: Annotated[
        str, typer.Argument(metavar="DESTINATION", help="New folder or address, or an unfinished copy.")
    ],
    codec: Annotated[
        str | None, _Option("--codec", help="default, small or none, as at the build (default: the source's).")
    ] = None,
    shard_records: Annotated[
        int | None, _Option("--shard-records", min=1, max=65536, help="Records per shard file (default: the source's).")
    ] = None,
    samples: Annotated[
        int | None, _Option("--samples", min=1, help="Only N samples, evenly spread over the source.")
    ] = None,
    features: Annotated[
        str | None, _Option("--features", help="Only these taps, comma-separated; '' for none (default: all).")
    ] = None,
    feature_dtype: Annotated[
        str | None, _Option("--feature-dtype", help="fp16 or uint8, as at the build (default: the source's).")
    ] = None,
    pixels: Annotated[
        str | None,
        _Option(
            "--pixels",
            help="source: leave out images and labels (default onto the Hub).",
        ),
    ] = None,
    licence: Annotated[
        str | None,
        _Option("--license", metavar="NAME", help="Licence of a cache on the Hub, by the Hub's name: cc-by-4.0."),
    ] = None,
    private: Annotated[bool, _Option("--private", help="Keep the repository on the Hub private.")] = False,
    worker: shared_flags.Worker = None,
    take_over: shared_flags.TakeOver = False,
    cache_dir: shared_flags.CacheDir = None,
    cache_bytes: shared_flags.CacheBytes = None,
) -> None:
    """Copy a cache to another disk, an object store or the Hub, also in part or with another codec.

    The copy takes unchanged arrays byte for byte and compares every file with its digest.
    The same command continues an interrupted copy. It checks a finished copy and does
    not change it. --codec small rounds targets for good, and prints the rounding error.

    On the Hub, a cache is a data set with a card. This needs the extra hub of kdcache.
    To push, it also needs a token (HF_TOKEN, or hf auth login).

    [dim]kdcache copy camvid.zarr s3://bucket/camvid.zarr[/]
    [dim]kdcache copy ade20k.zarr ade20k-small.zarr --codec small[/]
    [dim]kdcache copy ade20k.zarr tenth.zarr --samples 2000 --features ''[/]
    [dim]kdcache copy camvid.zarr hf://datasets/me/camvid --license cc-by-4.0[/]
    [dim]kdcache copy hf://datasets/me/camvid camvid.zarr[/]
    """
    from kdcache.verbs import copy as copy_cache

    done = copy_cache(
        source,
        destination,
        codec=codec,
        shard_records=shard_records,
        samples=samples,
        features=features,
        feature_dtype=feature_dtype,
        pixels=pixels,
        license=licence,
        private=private,
        worker=worker,
        take_over=take_over,
        cache_dir=cache_dir,
        cache_bytes=cache_bytes,
        progress=not ERRORS.quiet,
    )
    name = f"[bold]{escape(done.destination)}[/]"
    if (pushed := done.pushed) is not None:
        earlier = f" ({pushed.files - pushed.sent} from before)" if pushed.sent < pushed.files else ""
        OUT.print(f"{name}: {pushed.files} files{earlier}, pixels {done.changes.pixels or 'source'}")
        OUT.print(f"seal {pushed.seal}", highlight=False, soft_wrap=True)
    elif done.result is not None and done.result.complete:
        _print(done, done.result)
    else:
        OUT.print(f"{name}: {done.worker.describe('done')}; the worker that ends last finishes the copy")


def _print(done: "Copied", result: "CopyResult") -> None:
    from kdcache.store.format.eight_bits import describe

    earlier = f" ({result.skipped} from before)" if result.skipped else ""
    speed = f" in {result.seconds:.1f} s, {result.records / result.seconds:.0f} records/s" if result.records else ""
    OUT.print(
        f"[bold]{escape(done.destination)}[/]: {result.manifest.records} records{earlier}{speed}; "
        f"{bytes_text(done.bytes)}, the source has {bytes_text(done.source_bytes)}"
    )
    if result.manifest.fidelity is not None:
        OUT.print(
            f"stored with codec {result.manifest.codec}, against the teacher: {result.manifest.fidelity.describe()}"
        )
    elif done.source.fidelity is not None:
        OUT.print("the error against the teacher is unknown: the source already lost some of the targets")
    asked_dtype = done.changes.feature_dtype or "fp16"
    for line in describe(result.manifest.features, result.manifest.feature_fidelity, wanted=asked_dtype):
        OUT.print(f"features: {line}", markup=False)
