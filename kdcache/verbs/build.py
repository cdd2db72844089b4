"""`kdcache.build_cache`: a teacher's pass over a data set, into a cache."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdcache.data import Split
from kdcache.errors import RecipeError
from kdcache.metrics import at_chance
from kdcache.progress import progress_bar, progress_of, say, warn
from kdcache.settings import read
from kdcache.settings.building import BuildSettings, TeacherSettings
from kdcache.settings.engine import EngineSettings
from kdcache.settings.shared import ImageSettings, MachineSettings
from kdcache.store import (
    Cache,
    JoinedCache,
    Records,
    StoreSummary,
    Worker,
    open_cache,
    summarise,
    worker_of,
)
from kdcache.store.format.eight_bits import StoredAs
from kdcache.teacher import (
    BuildResult,
    score_cache,
)
from kdcache.teacher import build_cache as build
from kdcache.teacher.audit.verify import Score
from kdcache.teacher.build.render import LikeSplit
from kdcache.verbs.build_parts import Note, Origin, check_source, check_views, plan_like, plan_reuse, prepare
from kdcache.verbs.keywords import Data, checked, keywords

if TYPE_CHECKING:
    from kdcache.teacher.build.ray_engine import Parts, RayEngine

TABLES = (ImageSettings, TeacherSettings, BuildSettings, MachineSettings, EngineSettings)


@dataclass(frozen=True, repr=False)
class Built(BuildResult):
    """The result of `kdcache.build_cache`: a `BuildResult` with further fields.

    Attributes:
        worker: this process's part of the build.
        feature_dtype: the requested data type of features.
        summary: the cache's summary. None until the cache is complete.
        score: the score of the cached targets against labels. None without a segmentation head or labels.
        of: "labels" if the score is on whole images, or "first crops" if it is on the first crop of each sample.
    """

    worker: Worker = Worker()
    feature_dtype: StoredAs = BuildSettings.feature_dtype
    summary: StoreSummary | None = None
    score: Score | None = None
    of: str = "labels"


@keywords(*TABLES)
def build_cache(
    data: Data | None,
    teacher: Origin | Sequence[str],
    out: str | Path,
    *,
    split: str | None = None,
    reuse: str | Path | Cache | None = None,
    like: str | Path | Cache | None = None,
    worker: str | None = None,
    take_over: bool = False,
    progress: bool = True,
    **settings: Any,
) -> Built:
    """Run a teacher over a split once and store its outputs, as `kdcache build-teacher-cache` does.

    >>> import kdcache
    >>> built = kdcache.build_cache("streets", "runs/teacher", "new.zarr", split="val", progress=False)
    >>> built.records, built.complete
    (16, True)

    After an interruption, the same call continues. A finished cache is checked and left unchanged.

    Args:
        data: folder or spec of a data set, or a split from `open_split` or `from_dataset`. None uses the pixels that
            the cache `like` stores.
        teacher: a run folder, SPEC@FILE, a module, or the result of `load_teacher`. Several run folders or specs are an
            ensemble.
        out: the cache: a folder or s3://BUCKET/PREFIX.
        split: name of the split. Default: train, or with `reuse` the split of that cache.
        reuse: an earlier, complete cache (`--from`). Its targets are copied for views with unchanged pixels, and its
            settings are the defaults. It is not modified. None copies no targets.
        like: a complete cache whose views the new cache repeats (`--like`), so that `train` can join both caches.
            None makes views by the settings.
        worker: "I/N" makes this process worker I of N. "auto" reads both numbers from a job scheduler. None is a
            single worker, unless torchrun started the process.
        take_over: also write the missing shards of the other workers.
        progress: show a progress bar, or lines without a terminal.
        settings: the other flags of `kdcache build-teacher-cache`, with the same defaults. `help(kdcache.build_cache)`
            lists them. With engine="ray", a Ray cluster computes the shards.
    Raises: KDCacheError, the base class of all errors of kdcache.
    """
    check_views(settings)
    values = checked(build_cache, settings, *TABLES)
    part = worker_of(worker, take_over)
    typed = {name: values[name] for name in settings}
    check_source(data, reuse, like)
    parts: Callable[[Note], Any]
    if like is not None:
        parts = partial(plan_like, like, data, split, teacher, values, typed, out)
    else:
        assert data is not None
        parts = partial(prepare, data, split, teacher, values, out)
        if reuse is not None:
            parts = partial(plan_reuse, reuse, data, split, teacher, typed, out)
    engine = engine_of(read(EngineSettings, values), partial(parts, print), part)
    source, loaded, options, *earlier = parts(lambda text: say(text, shown=progress))
    with progress_bar(progress) as bar:
        result = build(
            source,
            loaded,
            out,
            options,
            progress_of(bar, part.describe("teacher's pass")),
            part,
            reuse=earlier[0] if earlier else None,
            engine=engine,
        )
    built = Built(**vars(result), worker=part, feature_dtype=options.feature_dtype)
    return _scored(built, source, out) if result.complete else built


def _scored(built: Built, source: Split, out: str | Path) -> Built:
    """Return the result with the summary of the complete cache and the teacher's score.

    Warn about a useless teacher.
    """
    cache = open_cache(out)
    built = replace(built, summary=summarise(cache))
    if cache.manifest.segmentation is None:
        return built
    like = JoinedCache({"": source.like, "out": cache}) if isinstance(source, LikeSplit) and source.stored else None
    score = score_cache(Records(cache, source) if like is None else Records(like))  # which has pixels and labels
    if score is not None and (nothing := at_chance(score.metrics)) is not None:
        warn(
            f"the teacher {nothing}. It has nothing to teach: check its weights, --class-map, --mean and --std, or "
            "train it longer"
        )
    elif score is not None and score.doubt is not None:
        warn(f"the teacher {score.doubt}")
    return replace(built, score=score, of="first crops" if cache.manifest.view.kind == "crop" else "labels")


def engine_of(settings: EngineSettings, parts: "Parts", part: Worker) -> "RayEngine | None":
    """Return the Ray engine of a build, or None if this process computes the shards.

    Args:
        settings: the settings of the engine.
        parts: a function that returns the split, the teacher and the options, called in each Ray actor.
        part: this process's part of a shared build. With Ray it must be the whole build.
    Raises: RecipeError if settings of Ray are given without `--engine ray`. With it, RecipeError if the build is
        shared, if Ray is not installed, or if `parts` cannot be pickled.
    """
    if not settings.is_ray:
        return None
    if part.count > 1:
        raise RecipeError(
            f"Cannot use --engine ray in worker {part.index} of {part.count} (--worker, or RANK and WORLD_SIZE)",
            fix="Leave them out: Ray hands out the shards, and --actors says how many work.",
        )
    from kdcache.teacher.build.ray_engine import RayEngine

    return RayEngine(parts, settings.actors, settings.num_gpus, settings.address)
