"""The parts of a build: its data set, its teacher and its options, from settings or an earlier cache."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from kdcache.data import Fit, Split, choose_fit
from kdcache.errors import RecipeError
from kdcache.models import EnsembleModel, Tta, not_logits
from kdcache.settings import entries
from kdcache.settings.building import BuildSettings
from kdcache.settings.shared import FitChoice
from kdcache.store import (
    Cache,
    begun_manifest,
    data_changes,
    open_cache,
)
from kdcache.tasks import SEGMENTATION
from kdcache.teacher import (
    BuildOptions,
    Teacher,
    check_cross_fit,
    load_like,
    load_teacher,
    load_teachers,
    options_of,
)
from kdcache.teacher.build.manifest import libraries
from kdcache.teacher.build.render import split_like, stored_split
from kdcache.teacher.load.ensemble import check_computable
from kdcache.training import pick_device
from kdcache.verbs.keywords import Data, open_data

if TYPE_CHECKING:
    pass

Origin = str | Path | nn.Module | Teacher
Note = Callable[[str], None]
OF_LIKE = ("size", "fit", "crop", "views", "view_seed", "view_scale", "view_flip", "shard_records")
"""Settings that a cache copies from the cache whose views it repeats."""
OF_REUSED = (
    *("size", "fit", "crop", "teacher_weights", "tta", "folds", "folds_by", "teacher_size", "teacher_grid"),
    *("mean", "std", "precision", "top_k", "heads", "features_only", "raw_logits"),
)
"""Settings that a cache copies from the cache whose targets it reuses."""


def check_views(settings: Mapping[str, Any]) -> None:
    """Raise RecipeError if `crop` is set although the views are whole images (`views="full"`).

    `settings` maps names of settings to values.
    """
    if settings.get("views") == "full" and settings.get("crop") is not None:
        raise RecipeError(
            f"Cannot use --crop {_shown(settings['crop'])} with --views full: they are the whole images",
            fix="Leave --crop out, or give a number of views, for example --views 4",
        )


def prepare(
    data: Data,
    split: str | None,
    teacher: Origin | Sequence[str],
    settings: Mapping[str, Any],
    out: str | Path,
    note: Note,
) -> tuple[Split, Teacher, BuildOptions]:
    """Open the data set, load the teacher, and return the split, the teacher and the options of a build.

    Args:
        data: folder or spec of a data set, or a split.
        split: name of the split, or None for train.
        teacher: a run folder, SPEC@FILE, a module, a loaded teacher, or a sequence of runs and SPEC@FILE.
        settings: name -> value of all settings of the build.
        out: the cache to build.
        note: called with each text that the user should see.
    Raises: RecipeError for settings that do not fit together; the errors of `load_teachers` and `open_split`.
    """
    return plan_build(open_data(data, split), teacher, settings, out, note)


def plan_reuse(
    reuse: str | Path | Cache,
    data: Data,
    split: str | None,
    teacher: Origin | Sequence[str],
    given: Mapping[str, Any],
    out: str | Path,
    note: Note,
) -> tuple[Split, Teacher, BuildOptions, Cache]:
    """Return the split, the teacher and the options of a build that copies targets, and the earlier cache.

    Args:
        reuse: the earlier cache.
        data: folder or spec of a data set, or a split.
        split: name of the split. Default: the earlier cache's split.
        teacher: a run folder, SPEC@FILE, a module or a `Teacher`. Several run folders or specs are an ensemble.
        given: name -> value of the settings that the user gave. Other settings are those of the earlier cache.
        out: the cache to build.
        note: called with each text that the user should see.
    Raises: RecipeError for settings that the earlier cache determines, or if `out` is the earlier cache. Another
        KDCacheError if the earlier cache, the data or the teacher cannot be opened, or if they do not fit together.
    """
    if fixed := [name for name in OF_REUSED if name in given]:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in fixed)
        raise RecipeError(
            f"Cannot change {flags} with --from {_place(reuse)}: its targets do not fit",
            fix="Leave these out, or leave --from out to compute all targets again.",
        )
    if given.get("threads"):
        torch.set_num_threads(given["threads"])
    earlier = reuse if isinstance(reuse, Cache) else open_cache(reuse)
    _check_apart(earlier, out)
    manifest = earlier.manifest
    source = open_data(data, split or (None if isinstance(data, Split) else manifest.dataset.split))
    classified, class_map = manifest.segmentation is not None, given.get("class_map")
    if isinstance(teacher, Teacher):
        loaded = teacher
    elif isinstance(teacher, nn.Module):
        loaded = load_teacher(
            teacher,
            source,
            classified=classified,
            class_map=class_map,
            mean=manifest.teacher.mean,
            std=manifest.teacher.std,
        )
    else:
        origins = _origins(teacher)
        loaded = load_like(manifest.teacher, origins, source.classes, class_map=class_map, classified=classified)
        if loaded.folds is not None:
            check_cross_fit(origins, source, loaded.folds_by)
    for text in (*loaded.notes, *reuse_notes(earlier, source)):
        note(text)
    changes = {name: given[name] for name in entries(BuildSettings) if given.get(name) is not None}
    changes["features"] = tuple(dict.fromkeys([*manifest.features, *changes.get("features", ())]))
    changes["statistics"] = (*options_of(manifest).statistics, *changes.get("statistics", ()))
    options = options_of(manifest, **changes, device=pick_device(given.get("device", "auto")))
    return source, loaded, options, earlier


def plan_like(
    like: str | Path | Cache,
    data: Data | None,
    split: str | None,
    teacher: Origin | Sequence[str],
    settings: Mapping[str, Any],
    given: Mapping[str, Any],
    out: str | Path,
    note: Note,
) -> tuple[Split, Teacher, BuildOptions]:
    """Return the split, the teacher and the options of a build that repeats the views of an existing cache.

    Args:
        like: the existing cache.
        data: folder or spec of a data set, or a split. None uses the pixels that the existing cache stores.
        split: name of the split. Default: the existing cache's split.
        teacher: a run folder, SPEC@FILE, a module, or the result of `load_teacher`. Several run folders or specs are an
            ensemble.
        settings: name -> value of all settings of the build, defaults included.
        given: name -> value of the settings that the user gave. The build stores pixels only if they have
            `pixels="stored"`.
        out: the cache to build.
        note: called with each text that the user should see.
    Raises: RecipeError if a given setting of the views differs from the existing cache's, or for a fault in the other
        settings. MismatchError for other samples. Also the errors of opening the cache and the teacher.
    """
    cache = like if isinstance(like, Cache) else open_cache(like)
    _check_apart(cache, out, "--like")
    of_cache, manifest = cache.manifest.settings(), cache.manifest
    fixed = {name: of_cache.get(name) for name in OF_LIKE}
    if manifest.depth is not None:
        fixed["depth_zoom"] = manifest.depth.zoom
    if data is None:
        fixed["split"] = manifest.dataset.split
        if (teacher_size := settings["teacher_size"]) not in (None, manifest.view.size):
            raise RecipeError(
                f"Cannot show the teacher pixels of {_shown(teacher_size)}: {cache.place} stores them at "
                f"{_shown(manifest.view.size)}",
                fix=f"Add --data (the folder of {manifest.dataset.name!r}), or leave --teacher-size out.",
            )
    typed = {**given, **({} if split is None else {"split": split})}
    if changed := [name for name, value in fixed.items() if name in typed and typed[name] != value]:
        texts = [f"--{n.replace('_', '-')} {_shown(typed[n])} (there {_shown(fixed[n])})" for n in changed]
        raise RecipeError(
            f"Cannot change the views of {cache.place} with --like: {', '.join(texts)}",
            fix="Leave these flags out: --like copies them.",
        )
    fixed = {name: value for name, value in fixed.items() if value is not None}
    if data is None:
        source = stored_split(cache)
    else:
        source = split_like(cache, open_data(data, split or manifest.dataset.split))
    pixels = given.get("pixels", "source")
    return plan_build(source, teacher, {**settings, **fixed, "pixels": pixels}, out, note)


def check_source(data: Any, reuse: Any, like: Any) -> None:
    """Check that a build has a source of views: a data set, or a cache whose views are repeated.

    Args:
        data: the data set, or None.
        reuse: an earlier cache whose targets are kept (`--from`), or None.
        like: a cache whose views are repeated for another teacher (`--like`), or None.

    Raises: RecipeError without `data` and `like`, or with both `reuse` and `like`.
    """
    if reuse is not None and like is not None:
        raise RecipeError(
            f"Use either --from {_place(reuse)} or --like {_place(like)}, not both",
            fix="Use --from to keep the targets of the same teacher, or --like to repeat the views for another one.",
        )
    if data is None and like is None:
        raise RecipeError(
            "Missing --data",
            fix="Add --data DIR, or --like CACHE to use the pixels that another cache stores. In Python, "
            "kdcache.from_dataset makes a split of your own data.",
        )


def _place(cache: str | Path | Cache) -> str:
    return str(cache.place if isinstance(cache, Cache) else cache)


def _shown(value: Any) -> str:
    """Return a setting's value as text, in the form in which users type it."""
    if not isinstance(value, tuple):
        return str(value).lower()
    return ("x" if isinstance(value[0], int) else ":").join(f"{side:g}" for side in value)


def reuse_notes(earlier: Cache, source: Split) -> Iterator[str]:
    """Yield texts about what a build that reuses the targets of the cache `earlier` cannot simply copy.

    They name changes of the data set `source` since then, and statistics that only the earlier cache has. They also
    name a changed version of the library that decodes images.
    """
    renewed = data_changes(earlier, source)
    yield from renewed.notes()
    if renewed:
        yield (
            f"since {earlier.place} was built: {renewed.describe()}. Labels are rendered again, and the teacher runs "
            "on changed images"
        )
    if left := earlier.manifest.earlier_statistics:
        yield f"{earlier.place} keeps its {left}: the new cache has maps of at:TAP only"
    before, now = earlier.manifest.build.libraries.get("pillow"), libraries()["pillow"]
    if before != now:
        yield (
            f"{earlier.place} was built with pillow {before}, and this is pillow {now}: the teacher runs again on "
            "images that render otherwise"
        )


def _check_apart(earlier: Cache, out: str | Path, flag: str = "--from") -> None:
    old, new = str(earlier.place), str(out)
    same = "://" not in old + new and Path(old).resolve() == Path(new).resolve()
    if same or old.rstrip("/") == new.rstrip("/"):
        raise RecipeError(
            f"Cannot build {new} from itself: --from {old} --out {new}",
            fix="Give a new folder or address with --out. You can remove the old one when the new one is complete.",
        )


def plan_build(
    source: Split,
    teacher: Origin | Sequence[str],
    settings: Mapping[str, Any],
    out: str | Path | None,
    note: Note,
) -> tuple[Split, Teacher, BuildOptions]:
    """Load the teacher of a build, and return `source`, the teacher and the options.

    Also sets torch's number of threads, if `settings` has one.

    Args:
        source: the split.
        teacher: a run folder, SPEC@FILE, a module or a `Teacher`. Several run folders or specs are an ensemble.
        settings: name -> value of all settings of the build.
        out: the cache to build, or None. If the setting `fit` is "auto", an already begun cache decides it.
        note: called with each text that the user should see.
    Raises: RecipeError if neither the settings nor the teacher give a size, or for settings that do not fit together.
        ModelError or MismatchError for a teacher that cannot be loaded, or does not fit the data.
    """
    if out is not None and (begun := begun_manifest(out)) is not None:
        check_computable(begun.teacher)
    if settings["threads"]:
        torch.set_num_threads(settings["threads"])
    device = pick_device(settings["device"])
    options = {name: settings[name] for name in entries(BuildSettings) if settings.get(name) is not None}
    options |= {name: settings[name] for name in ("top_k",) if name in settings}  # None measures how many it takes
    classified = not settings["features_only"] and (not settings["heads"] or SEGMENTATION in settings["heads"])
    loaded = _load(source, teacher, settings, classified)
    _check_one_network(loaded, settings)
    size = settings["size"] or loaded.size
    if size is None:
        raise RecipeError(
            f"Missing --size: {loaded.origin} does not name the size of its images",
            fix="Add --size HxW, for example --size 288x384",
        )
    fit, reason = _fit(settings["fit"], source, size, out, loaded.fit)
    for text in (*loaded.notes, *([reason] if reason else [])):
        note(text)
    if classified and (finding := not_logits(loaded.model, settings["teacher_size"] or size)) and not finding.certain:
        note(f"warning: {loaded.origin} {finding.text}: {finding.fix}")
    return source, loaded, BuildOptions(size=size, fit=fit, device=device, **options)


def _check_one_network(loaded: Teacher, settings: Mapping[str, Any]) -> None:
    """Raise RecipeError for features of an ensemble, because only the first member's features would be stored."""
    model, features = loaded.model, settings["features"]
    if features and loaded.folds is None and isinstance(model, EnsembleModel) and len(model.parts) > 1:
        raise RecipeError(
            f"Cannot store --features {','.join(features)} of {len(model.parts)} teachers in one cache: "
            f"{loaded.origin}",
            fix="Build a cache for each: give --teacher once. To average the classes of several, leave --features out.",
        )


def _fit(
    choice: FitChoice, source: Split, size: tuple[int, int], out: str | Path | None, learnt: Fit
) -> tuple[Fit, str | None]:
    """Return how images of another shape are fitted, and a note for the user or None.

    The order is: the setting, an already begun cache, the images' shapes. `learnt` is the fit of the teacher's
    training.
    """
    if choice != "auto":
        return choice, None
    if out is not None and (begun := begun_manifest(out)) is not None:
        return begun.view.fit, None
    fit, reason = choose_fit(source, size)
    if fit == "pad" and learnt == "crop":
        return (
            learnt,
            "images are cropped, as the teacher learnt them (--fit crop); --fit pad or squash for the other ways",
        )
    return fit, reason


def _load(source: Split, teacher: Origin | Sequence[str], settings: Mapping[str, Any], classified: bool) -> Teacher:
    """Return the teacher of a build. A teacher that is already loaded is returned unchanged."""
    of_one = {name: settings[name] for name in ("class_map", "mean", "std")}
    of_several = {name: settings[name] for name in ("teacher_weights", "tta", "folds", "folds_by")}
    if isinstance(teacher, Teacher | nn.Module):
        held = "a teacher that was loaded" if isinstance(teacher, Teacher) else "a module"
        unused = of_several | (of_one if isinstance(teacher, Teacher) else {})
        if set_anyway := [name for name, value in unused.items() if value is not None]:
            raise RecipeError(
                f"Cannot use {', '.join(f'{name}={unused[name]!r}' for name in set_anyway)} with {held}",
                fix="Leave them out. load_teacher takes class_map, mean and std, and runs or SPEC@FILE take the "
                "others.",
            )
        if isinstance(teacher, Teacher):
            return teacher
        return load_teacher(teacher, source, classified=classified, **of_one)
    origins = _origins(teacher)
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


def _origins(teacher: str | Path | Sequence[str]) -> list[str]:
    origins = [str(teacher)] if isinstance(teacher, str | Path) else [str(origin) for origin in teacher]
    if not origins:
        raise RecipeError("Missing --teacher", fix="Give a run, SPEC@FILE or SPEC@default.")
    return origins
