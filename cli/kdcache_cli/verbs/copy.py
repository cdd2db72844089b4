"""`kdcache copy`: a store into another place, codec or part."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from kdcache.errors import RecipeError
from kdcache.settings import entries, read_value
from kdcache.settings.building import BuildSettings
from kdcache_cli.console import ERRORS, OUT, bytes_text, progress_bar
from kdcache_cli.settings import shared_flags

if TYPE_CHECKING:  # the verbs import what they need: --help must not wait for zarr
    from kdcache.sharing import HubAddress
    from kdcache.store import Cache, CopyChanges, Fidelity

_Option = typer.Option


def copy(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="A complete store: a folder, s3://BUCKET/PREFIX (gs://, az://) or hf://datasets/USER/NAME.",
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
        int | None, _Option("--samples", min=1, help="Only so many samples, evenly spread over the source.")
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
    """Copy a store, to another disk, object store or the Hub, into another codec or
    other shards, in part.

    What stays as it is, is copied byte for byte, and every file is compared with
    its digest: fast, and exact. Interrupted, the same command continues; a
    finished copy is checked and left as it is. --codec small rounds targets, and
    the copy prints what that loses; nothing brings back what was rounded.

    On the Hub a store is a data set of its own, with a card. It needs the extra
    hub of kdcache, and a token to push (HF_TOKEN, or hf auth login).

    [dim]kdcache copy camvid.zarr s3://bucket/camvid.zarr[/]
    [dim]kdcache copy ade20k.zarr ade20k-small.zarr --codec small[/]
    [dim]kdcache copy ade20k.zarr tenth.zarr --samples 2000 --features ''[/]
    [dim]kdcache copy camvid.zarr hf://datasets/me/camvid --license cc-by-4.0[/]
    [dim]kdcache copy hf://datasets/me/camvid camvid.zarr[/]
    """
    from kdcache.sharing import hub_address, opened
    from kdcache.store import CopyChanges, spread_samples

    folder, room = shared_flags.copies(cache_dir, cache_bytes)
    address = hub_address(destination)
    _check_flags(address, licence, private, worker, take_over)
    choices = entries(BuildSettings)
    with opened(source, cache_dir=folder, cache_bytes=room, progress=not ERRORS.quiet) as cache:
        changes = CopyChanges(
            codec=None if codec is None else read_value(choices["codec"], codec),
            shard_records=shard_records,
            samples=None if samples is None else spread_samples(cache, samples),
            features=None if features is None else tuple(tap for tap in features.split(",") if tap),
            feature_dtype=None if feature_dtype is None else read_value(choices["feature_dtype"], feature_dtype),
            pixels=None if pixels is None else read_value(choices["pixels"], pixels),
        )
        if address is None:
            _copy(cache, destination, changes, worker, take_over, cache_dir, cache_bytes)
        else:
            _push(cache, address, changes, licence, private, folder)


def _check_flags(
    address: "HubAddress | None", licence: str | None, private: bool, worker: str | None, take_over: bool
) -> None:
    """Refuse flags that belong to another kind of place."""
    on_hub = {"--license": licence is not None, "--private": private}
    elsewhere = {"--worker": worker is not None, "--take-over": take_over}
    wrong = [flag for flag, present in (on_hub if address is None else elsewhere).items() if present]
    if wrong:
        raise RecipeError(
            "--license and --private are of copies onto the Hub, --worker and --take-over of any others",
            received=f"{', '.join(wrong)} and a copy {'to another place' if address is None else 'onto the Hub'}",
            remedy=f"leave {' and '.join(wrong)} out",
        )


def _copy(
    cache: "Cache",
    destination: str,
    changes: "CopyChanges",
    worker: str | None,
    take_over: bool,
    cache_dir: str | None,
    cache_bytes: str | None,
) -> None:
    """Copy to a folder or an object store, and print what came of it."""
    from kdcache.store import copy_store, open_cache, store_exists, summarise, worker_of
    from kdcache.store.format.eight_bits import describe

    begun = store_exists(destination)  # a copy that was begun has its figures
    part = worker_of(worker, take_over)
    with progress_bar() as bar:
        task = bar.add_task(part.describe("copying"), total=None, note="")
        result = copy_store(
            cache,
            destination,
            changes,
            fidelity=None if begun else _fidelity(cache, changes),
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
    earlier = f" ({result.skipped} were there)" if result.skipped else ""
    speed = f" in {result.seconds:.1f} s, {result.records / result.seconds:.0f} records/s" if result.records else ""
    OUT.print(
        f"[bold]{escape(destination)}[/]: {result.manifest.records} records{earlier}{speed}; "
        f"{bytes_text(report.bytes_on_disk)}, the source has {bytes_text(summarise(cache).bytes_on_disk)}"
    )
    if result.manifest.fidelity is not None:
        OUT.print(
            f"what codec {result.manifest.codec} stored, beside the teacher: {result.manifest.fidelity.describe()}"
        )
    elif cache.manifest.fidelity is not None:
        OUT.print("what is lost beside the teacher is not known: the source itself has lost some of the targets")
    for line in describe(
        result.manifest.features, result.manifest.feature_fidelity, wanted=changes.feature_dtype or "fp16"
    ):
        OUT.print(f"features: {line}", markup=False)


def _push(
    cache: "Cache",
    address: "HubAddress",
    changes: "CopyChanges",
    licence: str | None,
    private: bool,
    cache_dir: Path | None,
) -> None:
    """Copy onto the Hub, and print what came of it."""
    from kdcache.sharing import push_store

    pushed = push_store(
        cache,
        address,
        changes,
        licence=licence,
        private=private,
        fidelity=_fidelity(cache, changes),
        cache_dir=cache_dir,
        progress=not ERRORS.quiet,
    )
    earlier = f" ({pushed.files - pushed.sent} were there)" if pushed.sent < pushed.files else ""
    OUT.print(f"[bold]{escape(str(address))}[/]: {pushed.files} files{earlier}, pixels {changes.pixels or 'source'}")
    OUT.print(f"seal {pushed.seal}", highlight=False, soft_wrap=True)


def _fidelity(cache: "Cache", changes: "CopyChanges") -> "Fidelity | None":
    """What a copy that rounds loses; None for any other."""
    from kdcache.store.copy import rounds

    if not rounds(cache.manifest, changes.codec):
        return None
    from kdcache.teacher import copied_fidelity  # which imports torch

    return copied_fidelity(cache, changes.codec)
