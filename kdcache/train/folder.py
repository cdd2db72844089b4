"""The folder of a run: new, empty, or the very run that goes on; and what is written before its first step."""

from pathlib import Path

from kdcache.data import ClassList
from kdcache.errors import RecipeError
from kdcache.models import SegmentationModel
from kdcache.models.run import DESCRIPTION, RunModel, read_run_model, write_run_model
from kdcache.store import Cache
from kdcache.store.durable import disk_space_errors
from kdcache.train.config import RECIPE, TrainConfig, read_config
from kdcache.train.dataset import DrawnDataset, LabelledDataset
from kdcache.train.log import environment, write_json

RECIPE_PARTIAL = f".{RECIPE}.partial"
# What may change between a run's start and its resumption without changing what it learns.
FREE_ON_RESUME = {
    "name",
    "workers",
    "threads",
    "log",
    "log_every",
    "keep_every",
    "device",
    "step",
    "impl",
    "resident",
    "data",
    "val",
    "cache",
    "cache_dir",
    "cache_bytes",
}


def check_folder(config: TrainConfig, run: Path, resume: bool, identity: str) -> None:
    """The run folder is new or empty, or holds this very run and may be resumed."""
    if not run.exists() or (run.is_dir() and all(path.name == RECIPE_PARTIAL for path in run.iterdir())):
        return
    if not (run / RECIPE).is_file():
        raise RecipeError(
            "--out is a new or empty folder, or a run to resume",
            received=f"{run} holds something else",
            remedy="give another --out",
        )
    if not resume:
        raise RecipeError(
            "a run is not overwritten",
            received=f"{run} holds a run already",
            remedy="add --resume to go on with it, or give another --out",
        )
    before = read_config(run)
    changed = [
        f"--{name.replace('_', '-')} {getattr(config, name)} (was {getattr(before, name)})"
        for name in TrainConfig.model_fields
        if name not in FREE_ON_RESUME and getattr(config, name) != getattr(before, name)
    ]
    # Folders may move, what is in them may not change.
    if (config.val is None) != (before.val is None):
        changed.append(f"--val {config.val} (was {before.val})")
    if (run / DESCRIPTION).is_file() and read_run_model(run).trained_on not in ("", identity):
        changed.append("another store or data set than it was begun with")
    if changed:
        raise RecipeError(
            "a run resumes with the settings it was begun with",
            received=", ".join(changed),
            remedy="repeat the first command and add --resume, or give another --out",
        )


def trained_on(dataset: DrawnDataset, cache: Cache | None) -> str:
    """What identifies the samples of a run: the seal of its store, or the ids and classes of its data."""
    if cache is None:
        assert isinstance(dataset, LabelledDataset)
        return f"data {dataset.split.digest()}"
    assert cache.ledger is not None
    return f"store {cache.ledger.completion.ledger_sha256}"


def write_beginning(
    config: TrainConfig, run: Path, model: SegmentationModel, classes: ClassList, identity: str, processes: int
) -> None:
    """What a reader of the folder needs, before the first step."""
    assert config.size is not None
    with disk_space_errors(run):
        run.mkdir(parents=True, exist_ok=True)
        # First and whole: its presence says that the folder is a run, which may be resumed whatever else is missing.
        (run / RECIPE_PARTIAL).write_text(config.to_toml(), encoding="utf-8")
        (run / RECIPE_PARTIAL).replace(run / RECIPE)
        about = RunModel(
            spec=config.model,
            class_names=classes.names,
            class_colours=classes.colours,
            size=config.size,
            mean=model.mean,
            std=model.std,
            trained_on=identity,
        )
        write_run_model(run, about)
        write_json(run / "environment.json", environment() | {"processes": processes})
