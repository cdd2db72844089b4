"""`kdcache.train`: a training into a run folder."""

from pathlib import Path
from typing import Annotated, Any

from kdcache.calls import Fix
from kdcache.data.memory.opened import is_memory
from kdcache.progress import progress_bar
from kdcache.run_folder import Run
from kdcache.settings.preset import read_preset
from kdcache.settings.training import TRAINING
from kdcache.training import make_config, pick_device
from kdcache.training import train as run_training
from kdcache.training.distributed import default_workers
from kdcache.training.run.training_progress import TrainingProgress
from kdcache.verbs.keywords import Data, check_split, keywords, spec_of

Model = Annotated[
    str,
    Fix(
        "Give model='path/to/file.py:function', a function of num_classes that returns the module. Or train the module "
        "in your own loop with DistillLoss (docs: Use your own training loop)."
    ),
]


@keywords(*TRAINING, but=("verb",))
def train(
    out: str | Path,
    *,
    model: Model,
    data: Data | None = None,
    val: Data | None = None,
    preset: str | None = None,
    resume: bool = False,
    progress: bool = True,
    **settings: Any,
) -> Run:
    """Train a student from a cache, or a model on labels only, as `kdcache train-student` and `train-teacher` do.

    >>> import kdcache
    >>> options = {"iterations": 2, "batch_size": 2, "progress": False}
    >>> run = kdcache.train("runs/new", model="kdcache:tiny", cache="streets.zarr", val="streets", **options)
    >>> run.recipe["iterations"]
    2

    With the setting `cache`, or a stream that has a cache, it trains a student. Otherwise it trains a teacher.

    Args:
        out: the run folder. It must be new or empty, or with `resume` an earlier run.
        model: a model spec, such as "kdcache:tiny" or "path/to/file.py:function".
        data: the training data: folder or spec of a data set, or a split from `open_split` or `from_dataset`. None
            takes the data of the settings `cache` or `stream`.
        val: the validation data, in the same form. Default: without a cache, the split val of a `data` on disk.
            Otherwise there is no validation.
        preset: name of a set of settings, such as "few-labels". Explicit `settings` have priority. None uses none.
        resume: continue the run in `out` from its last checkpoint.
        progress: show a progress bar, or lines without a terminal.
        settings: the other flags of these commands, with the same defaults. `help(kdcache.train)` lists them. Sizes are
            (H, W), or texts such as "288x384".
    Returns: the run: its folder, recipe, model and result.
    Raises: KDCacheError, the base class of all errors of kdcache; Interrupted if the user stops the training, which
        `resume=True` then continues.
    """
    streams = settings.get("stream")
    taught = settings.get("cache") is not None or (isinstance(streams, list | tuple) and any(map(_has_store, streams)))
    verb = "train-student" if taught else "train-teacher"
    places = _places(data, val, settings)
    if not taught and val is None and data is not None and not is_memory(places["data"]):
        places["val"] = places["data"]
    given = {name: str(value) if isinstance(value, Path) else value for name, value in settings.items()}
    base = {} if preset is None else read_preset(preset)
    merged = {**base, "model": model, **given, **places}
    if merged.get("workers") is None:
        merged["workers"] = default_workers(pick_device(str(merged.get("device") or "auto")))
    config = make_config(given=given, **{**merged, "verb": verb})
    with progress_bar(progress) as bar:
        run_training(config, out, resume=resume, observer=TrainingProgress(bar, verb))
    return Run.open(out)


def _places(data: Data | None, val: Data | None, settings: dict[str, Any]) -> dict[str, Any]:
    """Return the specs of training and validation data, and the names of their splits, by setting.

    Raises: RecipeError for a split that cannot be opened again, or a split name that contradicts the split.
    """
    places: dict[str, Any] = {}
    for name, split_name, value in (("data", "split", data), ("val", "val_split", val)):
        if value is None:
            continue
        places[name], own_split = spec_of(value, name)
        if own_split is None:
            continue
        check_split(name, own_split, settings.get(split_name))
        places[split_name] = own_split
    return places


def _has_store(stream: Any) -> bool:
    """Return True if a stream, given as a dict or as text, reads a cache."""
    return "cache" in stream if isinstance(stream, dict) else "cache=" in str(stream)
