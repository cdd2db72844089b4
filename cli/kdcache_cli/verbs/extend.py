"""`kdcache extend`: a larger store, in which no target is computed twice."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kdcache.errors import RecipeError
from kdcache.settings import entries, read, read_values
from kdcache.settings.building import BUILD, BuildSettings, TeacherSettings
from kdcache.settings.engine import EngineSettings
from kdcache.settings.shared import CopySettings, MachineSettings
from kdcache_cli.console import ERRORS
from kdcache_cli.settings import build_flags, shared_flags
from kdcache_cli.settings.signature import takes
from kdcache_cli.verbs.build_teacher_cache import run_build

if TYPE_CHECKING:  # the verbs import what they need: --help must not wait for torch
    from kdcache.data import Split
    from kdcache.store import Cache
    from kdcache.teacher import BuildOptions, Teacher

_LIKE_OLD = {
    "split": {"help": "Which split of it (default: OLD's)."},
    "features": {"help": "Comma-separated taps to store besides OLD's."},
    "pixels": {"help": "stored or source (default: as OLD)."},
    "codec": {"help": "default, small or none (default: OLD's)."},
    "batch_size": {"help": "Images per forward (default: OLD's)."},
    "shard_records": {"help": "Records per shard file (default: OLD's)."},
}


@takes(
    *(*BUILD, EngineSettings, CopySettings),
    order=(
        *("old", "data", "teacher", "out", "split", "views", "view_seed", "view_scale", "view_flip", "depth_zoom"),
        *("features", "statistics", "pixels", "codec", "shard_records", "class_map", "batch_size", "render_threads"),
        *("worker", "take_over", *entries(EngineSettings), "threads", "device", "cache_dir", "cache_bytes"),
    ),
    unset=("split", *entries(BuildSettings)),
    wording=_LIKE_OLD,
)
def extend(
    settings: dict[str, Any],
    old: Annotated[str, typer.Argument(metavar="OLD", help="A complete store, which is only read.")],
    out: build_flags.Out,
    worker: shared_flags.Worker = None,
    take_over: shared_flags.TakeOver = False,
) -> None:
    """Build a store with more samples, views, taps or statistics than OLD has,
    without computing OLD's targets again.

    What is not given is as in OLD: sizes, classes kept, precision, normalisation,
    of several teachers their weights, augmentation and folds.
    Images are rendered and compared with OLD's checksums: what changed is computed
    anew, what is equal is taken over. A new tap sends every image through the
    teacher once more, but keeps OLD's targets. OLD is never written to;
    interrupted, the same command continues.

    [dim]kdcache extend camvid.zarr --data camvid-more --teacher runs/teacher --out camvid-more.zarr[/]
    [dim]kdcache extend camvid.zarr --data camvid --teacher runs/teacher --views 4 --out camvid-4.zarr[/]
    """
    _check_place(old, out)
    run_build(partial(_prepare, settings, old), settings, out, worker, take_over)


def _prepare(settings: Mapping[str, Any], old: str) -> "tuple[Split, Teacher, BuildOptions, Cache]":
    """The split, the teacher and the options of a build, and the store that it takes over."""
    import torch

    from kdcache.data import open_split
    from kdcache.store import data_changes, open_cache
    from kdcache.teacher import check_cross_fit, load_like, options_of
    from kdcache.teacher.build.manifest import libraries
    from kdcache.training import pick_device

    machine, teacher = read(MachineSettings, settings), read(TeacherSettings, settings)
    if machine.threads:
        torch.set_num_threads(machine.threads)
    earlier = open_cache(shared_flags.open_place(old, settings["cache_dir"], settings["cache_bytes"]))
    manifest = earlier.manifest
    source = open_split(settings["data"], settings["split"] or manifest.dataset.split)
    loaded = load_like(
        manifest.teacher,
        teacher.teacher,
        source.classes,
        class_map=teacher.class_map,
        classified=manifest.segmentation is not None,
    )
    if loaded.folds is not None:
        check_cross_fit(teacher.teacher, source, loaded.folds_by)
    renewed = data_changes(earlier, source)
    notes = [*loaded.notes, *renewed.notes()]
    if renewed:
        notes.append(
            f"since {old} was built: {renewed.describe()}. Labels are rendered again, and the teacher runs on changed "
            "images"
        )
    before, now = manifest.build.libraries.get("pillow"), libraries()["pillow"]
    if before != now:
        notes.append(
            f"{old} was built with pillow {before}, and this is pillow {now}: the teacher runs again on images that "
            "render otherwise"
        )
    for note in notes:
        ERRORS.print(f"note: {note}", markup=False)
    changes = {name: value for name, value in read_values(BuildSettings, settings).items() if value is not None}
    changes["features"] = tuple(dict.fromkeys([*manifest.features, *changes.get("features", ())]))
    changes["statistics"] = (*options_of(manifest).statistics, *changes.get("statistics", ()))
    return source, loaded, options_of(manifest, **changes, device=pick_device(machine.device)), earlier


def _check_place(old: str, out: str) -> None:
    if old.rstrip("/") == out.rstrip("/") or ("://" not in old + out and Path(old).resolve() == Path(out).resolve()):
        raise RecipeError(
            "a store is extended into a new one",
            received=f"--out {out}, which is OLD itself",
            remedy="give a new folder or address with --out; OLD may be removed when it is complete",
        )
