"""`kdcache.compare`: runs side by side."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from kdcache.analysis.compare import CompareOptions
from kdcache.analysis.compare import compare as compare_runs
from kdcache.analysis.comparison import Comparison
from kdcache.analysis.stored_evaluations import EvalSettings
from kdcache.progress import progress_of_steps
from kdcache.run_folder import Run
from kdcache.settings import read
from kdcache.settings.shared import CompareSettings, DepthSettings, ImageSettings, JudgeSettings, MachineSettings
from kdcache.training import pick_device
from kdcache.verbs.keywords import Data, checked, keywords, spec_of

TABLES = (ImageSettings, CompareSettings, JudgeSettings, DepthSettings, MachineSettings)


@keywords(*TABLES)
def compare(
    runs: str | Path | Run | Sequence[str | Path | Run],
    *,
    data: Data | None = None,
    split: str | None = None,
    teacher: str | Path | Run | None = None,
    progress: bool = True,
    **settings: Any,
) -> Comparison:
    """Compare the scores and costs of runs with a baseline, as `kdcache compare` does.

    >>> import kdcache
    >>> comparison = kdcache.compare(["runs/student"], teacher="runs/teacher", repeats=0, progress=False)
    >>> [row.name for row in comparison.rows]
    ['student', 'teacher']

    Runs that differ only in seed and fold are compared as one method. Evaluations and timings are stored in the run
    folders, and reused until the weights, the data or the machine change.

    Args:
        runs: run folders, folders with runs, RUN@best-ema, or SPEC@FILE.
        data: the data set. Default: the validation data in the runs' recipes.
        split: name of its split. Default: the validation split in the runs' recipes.
        teacher: a run or SPEC@FILE, shown in its own row, outside the ranking. None shows no teacher.
        progress: show a progress bar, or lines without a terminal.
        settings: the other flags of `kdcache compare`, with the same defaults. `help(kdcache.compare)` lists them.
    Raises: KDCacheError, the base class of all errors of kdcache.
    """
    values = checked(compare, settings, *TABLES) | {"teacher": None if teacher is None else str(teacher)}
    texts, place, split = places_of(runs, data, split)
    with progress_of_steps("comparing", progress) as report:
        return compare_runs(texts, place, split, options_of(values), report)


def places_of(
    runs: str | Path | Run | Sequence[str | Path | Run], data: Data | None, split: str | None
) -> tuple[list[str], str | None, str | None]:
    """Return three arguments of `compare` as texts: the runs, the data set's spec, and the split's name.

    The spec is None if `data` is None. If `split` is None and `data` is an open split, the name is the open split's.

    Raises: RecipeError for a split that is only a part of its data set.
    """
    texts = [str(runs)] if isinstance(runs, str | Path | Run) else [str(run) for run in runs]
    if data is None:
        return texts, None, split
    place, own_split = spec_of(data, "data")
    return texts, place, split or own_split


def judging_of(settings: Mapping[str, Any]) -> EvalSettings:
    """Return the settings of an evaluation. Also set torch's number of threads to the setting `threads`, unless 0.

    `settings` has the flags of `kdcache compare` about evaluation, such as `batch_size`: name -> value.

    Raises: RecipeError for an invalid value.
    """
    judge, depth = read(JudgeSettings, settings), read(DepthSettings, settings)
    images = read(ImageSettings, {"size": settings["size"], "fit": settings["fit"]})
    if settings["threads"]:
        torch.set_num_threads(settings["threads"])
    device = pick_device(settings["device"])
    judging = EvalSettings(
        *(judge.weights, images.size, judge.batch_size, str(device), judge.fresh, depth),
        fit=images.fit,
        window=judge.window,
        stride=judge.stride,
    )
    judging.framing()  # refuses windows and strides that do not go together before anything is opened
    return judging


def options_of(settings: Mapping[str, Any]) -> CompareOptions:
    """Return the options of a comparison. Also set torch's number of threads to the setting `threads`, unless 0.

    `settings` has all flags of `kdcache compare`: name -> value.

    Raises: RecipeError for an invalid value.
    """
    rows = read(CompareSettings, settings)
    return CompareOptions(
        judging_of(settings),
        rows.teacher,
        rows.baseline,
        rows.blocks_by,
        rows.own_fold,
        settings["repeats"],
        rows.smoke,
    )
