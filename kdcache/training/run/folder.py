"""The folder of a run (new, empty, or the run to resume), and its files from before the first step."""

import difflib
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kdcache.data import changed_data, open_split
from kdcache.display import bare
from kdcache.errors import RecipeError
from kdcache.files import clear_partials, is_partial, moved_away, write_whole
from kdcache.locks import is_lock
from kdcache.models import SegmentationModel
from kdcache.models.run import describe_weights, write_run_model
from kdcache.models.weights import DEPTH_HEAD
from kdcache.run_folder import (
    ENVIRONMENT,
    LOCAL,
    METRICS,
    MODEL,
    RECIPE,
    Run,
    RunModel,
    RunStream,
    train_again,
    write_local,
)
from kdcache.run_samples import SAMPLES, RunSamples
from kdcache.settings import entries
from kdcache.settings.shared import CopySettings, SourceSettings
from kdcache.settings.term import untaken
from kdcache.settings.training import Machine
from kdcache.store.backend.durable import disk_space_errors
from kdcache.store.format.flags import pack_flags
from kdcache.tasks import DEPTH, SEGMENTATION
from kdcache.training.config import TrainConfig, read_config
from kdcache.training.input.dataset import DrawnDataset
from kdcache.training.run.checkpoint_file import KEPT
from kdcache.training.run.lock import LOCK, RunLock
from kdcache.training.run.metrics_log import environment, write_json

BEGINNING = {RECIPE, MODEL, ENVIRONMENT, METRICS, LOCAL, SAMPLES}
EVENTS = "events.out.tfevents."  # of tensorboard
# What may change between a run's start and its resumption without changing what it learns.
PLACES = {*entries(SourceSettings, CopySettings), "cache", "val"}
EXECUTION = {*entries(Machine), "name", "log", "log_every", "keep_every"}
FREE_ON_RESUME = PLACES | EXECUTION


def identity_of(datasets: Sequence[DrawnDataset]) -> str:
    """Return text that identifies a training's samples: the `identity` of its dataset, or a digest of several.

    `datasets` has the samples of each stream, in order.
    """
    identities = [dataset.identity for dataset in datasets]
    if len(identities) == 1:
        return identities[0]
    return f"streams {hashlib.sha256(json.dumps(identities).encode()).hexdigest()}"


def check_folder(
    config: TrainConfig,
    run: Path,
    resume: bool,
    identity: str,
    samples: RunSamples | None = None,
    labels: str | None = None,
) -> None:
    """Check that a training may use the folder `run`.

    A new training may use a folder that is missing or empty, or whose run has no checkpoint yet. A resumed training
    needs the same settings and data as the folder's run.

    Args:
        config: the training's settings.
        run: the folder.
        resume: True to resume the folder's run.
        identity: the text from `identity_of` that identifies the training's samples.
        samples: digests of the samples, which a resumed run must match. None skips this check.
        labels: the text from `labels_of`: which samples' labels are used. A resumed run must match it. None skips this
            check.
    Raises: RecipeError for a folder that the training may not use. MismatchError if the data changed.
    """
    if resume and not run.exists() and not _torchrun_restarts():
        raise RecipeError(
            f"Cannot resume {run}: it does not exist{_near(run)}",
            fix="Correct --out, or leave --resume out to begin a run there.",
        )
    if not run.exists() or (run.is_dir() and all(map(_means_nothing, run.iterdir()))):
        return
    if not (run / RECIPE).is_file():
        if resume and (run / MODEL).is_file():
            raise RecipeError(f"Cannot resume {run}: {run / RECIPE} is missing", fix=train_again(run))
        raise RecipeError(
            f"Cannot train into {run}: it holds something else",
            fix=f"Give another --out. If this was a run, move it away: {moved_away(run)}",
        )
    untrained = _is_untrained(run)
    if not resume and untrained:
        return
    if not resume:
        raise RecipeError(
            f"Cannot train into {run}: it holds a run already",
            fix="Add --resume to go on with it, or give another --out.",
        )
    before = read_config(run)
    now, then = config.settings, before.settings
    idle = {*untaken(now, config.taken | before.taken), *config.untaken}
    changed = [
        f"--{name.replace('_', '-')} {now[name]} (was {then[name]})"
        for name in now
        if name not in {*FREE_ON_RESUME, *idle} and _fixed(now, name) != _fixed(then, name)
    ]
    # Folders may move, what is in them may not change.
    if (config.data.val is None) != (before.data.val is None):
        changed.append(f"--val {config.data.val} (was {before.data.val})")
    if not changed and samples is not None:
        check_samples(run, samples)
    model = Run.open(run).model if (run / MODEL).is_file() else None
    if model is not None and model.trained_on not in ("", identity):
        changed.append("another cache or data set than it was begun with")
    elif model is not None and labels is not None and model.labels not in (None, labels):
        changed.append("the labels of other samples than it was begun with")
    if changed:
        raise RecipeError(
            f"Cannot resume with other settings: {', '.join(changed)}",
            fix="Repeat the first command and add --resume, or give another --out. Or move this run away and train it "
            f"again: {moved_away(run)}" + ("; or leave --resume out: nothing was learnt yet" if untrained else ""),
        )


def check_samples(run: Path, samples: RunSamples) -> None:
    """Raise MismatchError that names the changed samples, if a resumed run's data changed since it began."""
    before = RunSamples.read(run)
    if before is not None and (changes := before.changes(samples)):
        fix = (
            "restore the data set, or begin another run with a new --out. If you only saved its files in another "
            f"format, delete {run / SAMPLES}, which has digests of the files"
        )
        raise changed_data(run, changes, None, fix)


def _torchrun_restarts() -> bool:
    """Return True if torchrun restarts this command after a crash, so that one command begins and resumes a run."""
    return os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0"


def _fixed(settings: Mapping[str, Any], name: str) -> Any:
    """Return the part of a setting that must not change on resuming: streams without places, files without folders."""
    value = settings[name]
    if name in ("model", "init") and value is not None:
        return bare(str(value))
    return [{k: v for k, v in table.items() if k not in PLACES} for table in value] if name == "stream" else value


def _means_nothing(path: Path) -> bool:
    """Return True if a path was left over by a run that was killed before it began."""
    return is_lock(path, LOCK) or is_partial(path)


def _is_untrained(run: Path) -> bool:
    """Return True if a run ended before its first checkpoint, so it has only its first files and its log."""
    return (run / MODEL).is_file() and all(
        path.name in BEGINNING or path.name.startswith(EVENTS) or _means_nothing(path) for path in run.iterdir()
    )


def _near(run: Path) -> str:
    """Return text that names runs next to `run` with similar names, or ''."""
    beside = [path.parent.name for path in run.parent.glob(f"*/{RECIPE}")]
    near = difflib.get_close_matches(run.name, beside, n=3)
    return f"; there is {' and '.join(str(run.parent / name) for name in near)}" if near else ""


def hold_folder(config: TrainConfig, run: Path, resume: bool, identity: str, lock: RunLock | None) -> None:
    """Create the folder and take its lock. Then check that no other command has begun a run there.

    Args:
        config: the training's settings.
        run: the folder.
        resume: True to resume the folder's run.
        identity: the result of `identity_of` for the training's samples.
        lock: the lock that this call takes, or None for no lock.
    Raises: RecipeError if the folder is in use or holds another run.
    """
    with disk_space_errors(run):
        run.mkdir(parents=True, exist_ok=True)
    if lock is not None:
        lock.take()
    check_folder(config, run, resume, identity)


def untrained_heads(model: SegmentationModel, tasks: Sequence[str], init: str | Path | None = None) -> tuple[str, ...]:
    """Return the names of the model's heads that start with random weights and are not trained.

    Args:
        model: the model, with its initial weights.
        tasks: the tasks, `segmentation` or `depth`, whose heads are trained. Empty if only features are learnt.
        init: the file or run that the initial weights come from, or None. A head that was still untrained there counts
            as random.
    """
    report = model.load_report
    begun = None if init is None else describe_weights(init)
    before = () if begun is None else begun.untrained
    at_random = {SEGMENTATION: model.classifier_keys, DEPTH: (DEPTH_HEAD,)}
    return tuple(
        head
        for head in model.head_kinds
        if head in at_random and head not in tasks
        if report is None or head in before or any(name.startswith(at_random[head]) for name in report.reinitialised)
    )


def write_beginning(
    config: TrainConfig,
    run: Path,
    model: SegmentationModel,
    datasets: Sequence[DrawnDataset],
    processes: int,
    samples: RunSamples | None,
) -> None:
    """Write the files of a run that exist before its first step: recipe, model description, samples and environment.

    Args:
        config: the training's settings.
        run: the folder.
        model: the model to train.
        datasets: the samples of each stream.
        processes: the number of processes.
        samples: digests of the samples, or None to write none.
    """
    assert config.data.size is not None
    classes = datasets[0].classes
    with disk_space_errors(run):
        clear_partials(run)
        clear_partials(run / KEPT)
        # First and whole: its presence marks the folder as a run, which may be resumed whatever else is missing.
        write_whole(run / RECIPE, config.to_toml())
        write_local(run, model.deployed.spec, config.recipe)
        run_model = RunModel(
            spec=model.deployed.spec,
            class_names=classes.names,
            class_colours=classes.colours,
            size=config.data.size,
            fit="squash" if config.data.fit == "auto" else config.data.fit,
            mean=model.mean,
            std=model.std,
            trained_on=identity_of(datasets),
            labels=labels_of(datasets),
            heads=model.regressions,
            untrained=model.untrained,
            streams=_streams(config, datasets) if len(datasets) > 1 else (),
            stores=_stores(config, datasets),
            validated_on="" if config.data.val is None else open_split(config.data.val, config.data.val_split).digest(),
        )
        write_run_model(run, run_model)
        if samples is not None:
            samples.write(run)
        write_json(run / ENVIRONMENT, environment() | {"processes": processes})


def labels_of(datasets: Sequence[DrawnDataset]) -> str | None:
    """Return which samples' labels a training uses, for its run folder: a flag per sample, as text of `pack_flags`.

    `datasets` has the samples of each stream. The result is None for several streams.
    """
    return pack_flags(datasets[0].labels_used) if len(datasets) == 1 else None


def _stores(config: TrainConfig, datasets: Sequence[DrawnDataset]) -> tuple[str, ...]:
    """Return the seals of the caches whose targets the run learns from, without repetitions."""
    seals = dict[str, None]()
    for stream, dataset in zip(config.streams, datasets, strict=True):
        if stream.weight > 0 and stream.config.reads_targets and dataset.cache is not None:
            sealed = (part.ledger for part in dataset.cache.parts)
            seals |= {ledger.completion.digest: None for ledger in sealed if ledger is not None}
    return tuple(seals)


def _streams(config: TrainConfig, datasets: Sequence[DrawnDataset]) -> tuple[RunStream, ...]:
    """Return a record of the labels and targets that the run learns from, for each stream."""
    recorded = []
    for stream, dataset in zip(config.streams, datasets, strict=True):
        settings, learns = stream.config, stream.weight > 0
        labels = dataset.labels_used & (learns and settings.learns_labels)
        taught = learns and settings.reads_targets
        recorded.append(RunStream(ids_digest=dataset.ids_digest, labels=pack_flags(labels), taught=taught))
    return tuple(recorded)
