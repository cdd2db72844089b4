"""`kdcache extend`: a larger store, in which nothing is taught twice."""

from pathlib import Path
from typing import Annotated

import typer

from kdcache.errors import RecipeError
from kdcache_cli import building, options
from kdcache_cli.cache import teach_and_tell
from kdcache_cli.console import ERRORS

_Option = typer.Option


def extend(
    old: Annotated[str, typer.Argument(metavar="OLD", help="A complete store, which is only read.")],
    data: options.Data,
    teacher: building.Teachers,
    out: building.Out,
    split: Annotated[str | None, _Option("--split", help="Which split of it (default: OLD's).")] = None,
    views: building.Views = None,
    view_seed: building.ViewSeed = None,
    view_scale: building.ViewScale = None,
    view_flip: building.ViewFlip = None,
    features: Annotated[
        str, building.store_option("--features", help="Comma-separated taps to store besides OLD's.")
    ] = "",
    statistics: building.Statistics = "",
    pixels: Annotated[str | None, building.store_option("--pixels", help="stored or source (default: as OLD).")] = None,
    codec: Annotated[
        str | None, building.store_option("--codec", help="default, small or none (default: OLD's).")
    ] = None,
    class_map: building.ClassMap = None,
    batch_size: Annotated[
        int | None, _Option("--batch-size", min=1, help="Images per forward (default: OLD's).")
    ] = None,
    shard_records: Annotated[
        int | None,
        building.store_option("--shard-records", min=1, max=65536, help="Records per shard file (default: OLD's)."),
    ] = None,
    render_threads: building.RenderThreads = None,
    worker: options.Worker = None,
    threads: options.Threads = 0,
    device: options.Device = "auto",
    cache_dir: options.CacheDir = None,
    cache_bytes: options.CacheBytes = None,
) -> None:
    """Build a store with more samples, views, taps or statistics than OLD has,
    without teaching again what OLD says.

    What is not given is as in OLD: sizes, classes kept, precision, normalisation,
    of several teachers their weights, augmentation and folds.
    Images are rendered and compared with OLD's checksums: what changed is taught
    anew, what is equal is taken over. A new tap sends every image through the
    teacher once more, but keeps OLD's targets. OLD is never written to;
    interrupted, the same command continues.

    [dim]kdcache extend camvid.zarr --data camvid-more --teacher runs/teacher --out camvid-more.zarr[/]
    [dim]kdcache extend camvid.zarr --data camvid --teacher runs/teacher --views 4 --out camvid-4.zarr[/]
    """
    import torch

    from kdcache.data import open_split
    from kdcache.store import open_cache, worker_of
    from kdcache.teacher import check_cross_fit, load_like, options_of
    from kdcache.train import pick_device

    if threads:
        torch.set_num_threads(threads)
    earlier = open_cache(options.open_place(old, cache_dir, cache_bytes))
    about = earlier.manifest
    _check_place(old, out)
    source = open_split(data, split or about.dataset.split)
    loaded = load_like(about.teacher, teacher, source.classes, class_map=class_map)
    if loaded.folds is not None:
        check_cross_fit(teacher, source)
    for note in loaded.notes:
        ERRORS.print(f"note: {note}", markup=False)
    changes = {
        "features": tuple(dict.fromkeys([*about.features, *building.comma_separated(features)])),
        "statistics": (*options_of(about).statistics, *building.comma_separated(statistics)),
        "pixels": None if pixels is None else options.one_of("--pixels", pixels, ("stored", "source")),
        "codec": None if codec is None else options.one_of("--codec", codec, ("default", "small", "none")),
        "batch_size": batch_size,
        "shard_records": shard_records,
        "render_threads": render_threads,
        "device": pick_device(device),
        **building.view_options(views, view_seed, view_scale, view_flip),
    }
    chosen = options_of(about, **{name: value for name, value in changes.items() if value is not None})
    teach_and_tell(source, loaded, out, chosen, worker_of(worker), earlier)


def _check_place(old: str, out: str) -> None:
    if old.rstrip("/") == out.rstrip("/") or ("://" not in old + out and Path(old).resolve() == Path(out).resolve()):
        raise RecipeError(
            "a store is extended into a new one",
            received=f"--out {out}, which is OLD itself",
            remedy="give a new folder or address with --out; OLD may be removed when it is complete",
        )
