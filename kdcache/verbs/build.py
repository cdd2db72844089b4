"""`kdcache.build_cache`: a teacher's pass over a data set, into a store."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from kdcache.data import Fit, Split, choose_fit
from kdcache.errors import RecipeError
from kdcache.heads import SEGMENTATION
from kdcache.models import Tta, not_logits
from kdcache.progress import note_line, progress_bar
from kdcache.settings import entries, read
from kdcache.settings.building import BuildSettings, TeacherSettings
from kdcache.settings.engine import EngineSettings
from kdcache.settings.shared import FitChoice, ImageSettings, MachineSettings
from kdcache.store import Worker, read_manifest, store_exists, worker_of
from kdcache.teacher import BuildOptions, BuildResult, Teacher, check_cross_fit, load_teacher, load_teachers
from kdcache.teacher import build_cache as build
from kdcache.training import pick_device
from kdcache.verbs.arguments import checked, keywords, open_data

if TYPE_CHECKING:
    from kdcache.teacher.build.ray_engine import Parts, RayEngine

TABLES = (ImageSettings, TeacherSettings, BuildSettings, MachineSettings, EngineSettings)
Origin = str | Path | nn.Module | Teacher


@keywords(*TABLES)
def build_cache(
    data: str | Path | Split,
    teacher: Origin | Sequence[str],
    out: str | Path,
    *,
    split: str | None = None,
    worker: str | None = None,
    take_over: bool = False,
    progress: bool = True,
    **settings: Any,
) -> BuildResult:
    """Run a teacher over a split once and keep its outputs, as `kdcache build-teacher-cache` does.

        result = kdcache.build_cache("camvid", "runs/teacher", "camvid.zarr")
        result = kdcache.build_cache(split, my_module, "mine.zarr", size=(288, 384), views=4)

    Interrupted, the same call continues; a finished store is checked and left as it is. With engine="ray" the actors of
    a Ray cluster teach the shards; data and teacher in memory are pickled, and each actor gets a copy.

    Args:
        data: folder or spec of a data set, or a split: of `open_split`, or `from_dataset`.
        teacher: a run folder, SPEC@FILE and the like, or several as an ensemble; a module; or what `load_teacher` made.
        out: the store, a folder or s3://BUCKET/PREFIX.
        split: which split of the data, default train.
        worker: "I/N" is this process's part of a build that several share; "auto" as a scheduler numbers it.
        take_over: writes the missing shards of the other workers, too.
        progress: shows a bar, or lines where there is no terminal.
        settings: as the flags of the verb, with their defaults: `help(kdcache.build_cache)` lists them. Sizes are
            (H, W), or texts such as "288x384".
    Raises: KDCacheError of every kind.
    """
    chosen = checked(build_cache, settings, *TABLES)
    part = worker_of(worker, take_over)
    parts = partial(_prepare, data, split, teacher, chosen, out)
    engine = engine_of(read(EngineSettings, chosen), partial(parts, print), part)
    with progress_bar(progress) as bar:
        source, loaded, options = parts(
            lambda note: bar.console.print(note_line(note), markup=False, soft_wrap=True),
        )
        task = bar.add_task(part.describe("teacher's pass"), total=None, note="")
        return build(
            source,
            loaded,
            out,
            options,
            lambda done, total: bar.update(task, completed=done, total=total),
            part,
            engine=engine,
        )


def _prepare(
    data: str | Path | Split,
    split: str | None,
    teacher: Origin | Sequence[str],
    settings: Mapping[str, Any],
    out: str | Path,
    note: Callable[[str], None],
) -> tuple[Split, Teacher, BuildOptions]:
    return plan_build(open_data(data, split), teacher, settings, out, note)


def engine_of(settings: EngineSettings, parts: "Parts", part: Worker) -> "RayEngine | None":
    """The engine of a build, None for this process alone.

    Args:
        parts: as of `RayEngine`. part: this process's, which is all of it under Ray.
    Raises: RecipeError for settings of another engine; as `RayEngine`.
    """
    if not settings.is_ray:
        return None
    if part.count > 1:
        raise RecipeError(
            "--engine ray hands out shards itself",
            received=f"worker {part.index} of {part.count}, by --worker or RANK and WORLD_SIZE",
            remedy="leave them out; --actors says how many work",
        )
    from kdcache.teacher.build.ray_engine import RayEngine

    return RayEngine(parts, settings.actors, settings.num_gpus, settings.address)


def plan_build(
    source: Split,
    teacher: Origin | Sequence[str],
    settings: Mapping[str, Any],
    out: str | Path | None,
    note: Callable[[str], None],
) -> tuple[Split, Teacher, BuildOptions]:
    """The split, the teacher and the options of a build; sets torch's threads.

    Args:
        settings: values by name, of the tables of teachers, images, builds and the machine.
        out: the store, which keeps its fit where it was begun before; None for none.
        note: is called with what the user should know.
    Raises: RecipeError without a size, where the teachers have none of their own; as `load_teachers`.
    """
    if settings["threads"]:
        torch.set_num_threads(settings["threads"])
    device = pick_device(settings["device"])
    options = {name: settings[name] for name in entries(BuildSettings) if settings.get(name) is not None}
    options |= {name: settings[name] for name in ("top_k",) if name in settings}  # None measures how many it takes
    classified = not settings["features_only"] and (not settings["heads"] or SEGMENTATION in settings["heads"])
    loaded = _load(source, teacher, settings, classified)
    size = settings["size"] or loaded.size
    if size is None:
        raise RecipeError(
            "teachers that are no run of kdcache, or runs of several sizes, need the size of their images",
            received="no --size",
            remedy="add --size HxW, for instance --size 288x384; in Python size=(288, 384)",
        )
    fit, reason = _fit(settings["fit"], source, size, out, loaded.fit)
    for text in (*loaded.notes, *([reason] if reason else [])):
        note(text)
    if classified and (finding := not_logits(loaded.model, settings["teacher_size"] or size)) and not finding.certain:
        note(f"warning: {loaded.origin} {finding.text}: {finding.remedy}")
    return source, loaded, BuildOptions(size=size, fit=fit, device=device, **options)


def _fit(
    choice: FitChoice, source: Split, size: tuple[int, int], out: str | Path | None, learnt: Fit
) -> tuple[Fit, str | None]:
    """The fit of the settings, else that of a store that was begun, else by the images' shapes, with a note.

    Args:
        learnt: the teacher's: of images of several shapes it sees crops if it learnt from crops.
    """
    if choice != "auto":
        return choice, None
    if out is not None and store_exists(out):
        return read_manifest(out).view.fit, None
    fit, reason = choose_fit(source, size)
    if fit == "pad" and learnt == "crop":
        return (
            learnt,
            "images are cropped, as the teacher learnt them (--fit crop); --fit pad or squash for the other ways",
        )
    return fit, reason


def _load(source: Split, teacher: Origin | Sequence[str], settings: Mapping[str, Any], classified: bool) -> Teacher:
    """The teacher of a build: as it is when it was loaded, else one or several by where they come from."""
    of_one = {name: settings[name] for name in ("class_map", "mean", "std")}
    of_several = {name: settings[name] for name in ("teacher_weights", "tta", "folds", "folds_by")}
    if isinstance(teacher, Teacher | nn.Module):
        held = "a teacher that was loaded" if isinstance(teacher, Teacher) else "a module"
        beside = of_several | (of_one if isinstance(teacher, Teacher) else {})
        if set_anyway := [name for name, value in beside.items() if value is not None]:
            raise RecipeError(
                f"{held} is used as it is",
                entry="loaded teacher is used as it is",
                received=", ".join(f"{name}={beside[name]!r}" for name in set_anyway),
                remedy="leave them out; load_teacher takes class_map, mean and std, and runs or SPEC@FILE the others",
            )
        if isinstance(teacher, Teacher):
            return teacher
        return load_teacher(teacher, source, classified=classified, **of_one)
    origins = [str(teacher)] if isinstance(teacher, str | Path) else [str(one) for one in teacher]
    loaded = load_teachers(
        origins,
        source.classes,
        weights=settings["teacher_weights"],
        tta=None if settings["tta"] is None else Tta.parse(settings["tta"]),
        folds=settings["folds"],
        folds_by=settings["folds_by"],
        classified=classified,
        **of_one,
    )
    if settings["folds"] is not None:
        check_cross_fit(origins, source, settings["folds_by"])
    return loaded
