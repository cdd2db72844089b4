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

    With a cache it is `train-student`, without one `train-teacher`, which validates by default on the split val of
    `data`.
    A data set in memory has no other split, and is not validated without `val`.

    Args:
        out: the run folder: new, empty, or with `resume` the run itself.
        model: a model spec, such as kdcache:tiny or path/to/file.py:function.
        data: folder or spec of a data set, or a split: of `open_split`, or `from_dataset`.
        val: the validation data, in the same form.
        preset: a name for settings of a training, such as few-labels. `settings` have priority.
        resume: continue from the last checkpoint.
        progress: show a bar, or lines without a terminal.
        settings: as the flags of the verbs, with their defaults: `help(kdcache.train)` lists them. Sizes are (H, W), or
            texts such as "288x384".
    Returns: the run: its folder, recipe, model and result.
    Raises: KDCacheError of every kind; Interrupted if the user stops it. Then `resume=True` continues.
    """
    streams = settings.get("stream")
    taught = settings.get("cache") is not None or (isinstance(streams, list | tuple) and any(map(_has_store, streams)))
    verb = "train-student" if taught else "train-teacher"
    places = _places(data, val, settings)
    if not taught and val is None and data is not None and not is_memory(places["data"]):
        places["val"] = places["data"]
    given = {name: str(value) if isinstance(value, Path) else value for name, value in settings.items()}
    base = {} if preset is None else read_preset(preset)
    whole = {**base, "model": model, **given, **places}
    if whole.get("workers") is None:
        whole["workers"] = default_workers(pick_device(str(whole.get("device") or "auto")))
    config = make_config(given=given, **{**whole, "verb": verb})
    with progress_bar(progress) as bar:
        run_training(config, out, resume=resume, observer=TrainingProgress(bar, verb))
    return Run.open(out)


def _places(data: Data | None, val: Data | None, settings: dict[str, Any]) -> dict[str, Any]:
    """Return the specs of data and validation data, and the names of their splits if these come with them.

    Raises: RecipeError as `spec_of`, and for a split together with another name.
    """
    places: dict[str, Any] = {}
    for name, split_name, value in (("data", "split", data), ("val", "val_split", val)):
        if value is None:
            continue
        places[name], own = spec_of(value, name)
        if own is None:
            continue
        check_split(name, own, settings.get(split_name))
        places[split_name] = own
    return places


def _has_store(stream: Any) -> bool:
    """Return whether a stream, a table or a line, has a cache."""
    return "cache" in stream if isinstance(stream, dict) else "cache=" in str(stream)
