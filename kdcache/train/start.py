"""From settings to a trained run: what `train-teacher` and `train-student` do."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kdcache.data import Augmentation, ClassList, Split, class_weights, open_split, prefetch
from kdcache.distill import DistillLoss, choose_implementation
from kdcache.errors import DataError, MismatchError, RecipeError
from kdcache.evaluate import Metrics
from kdcache.evaluate.run import count_pixels
from kdcache.models import SegmentationModel, build_model
from kdcache.models.run import DESCRIPTION, RunModel, read_run_model, write_run_model
from kdcache.store import Cache, open_cache
from kdcache.store.durable import disk_space_errors
from kdcache.train.ahead import check_room
from kdcache.train.config import RECIPE, TrainConfig, read_config
from kdcache.train.dataset import CacheDataset, DrawnDataset, LabelledDataset
from kdcache.train.distributed import World, pick_device, processes
from kdcache.train.loader import Draws
from kdcache.train.log import Observer, environment, write_json
from kdcache.train.order import choose_shuffle
from kdcache.train.resident import keep_records
from kdcache.train.step import choose_step
from kdcache.train.trainer import Trainer

RECIPE_PARTIAL = f".{RECIPE}.partial"
# What may change between a run's start and its resumption without changing what it learns.
FREE_ON_RESUME = {
    "workers",
    "threads",
    "log_every",
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


def train(
    config: TrainConfig, out: str | Path, *, resume: bool = False, observer: Observer | None = None
) -> dict[str, Any]:
    """Train as `config` says into the folder `out`; returns the content of its result.json.

    A student (`config.cache` set) is trained from the store alone: no teacher is imported, loaded or run. Every process
    that torchrun starts calls this, with the same arguments; all return or raise the same.

    Args:
        resume: go on from the last checkpoint of the same settings; from the beginning when there is none.
    Raises: KDCacheError of every kind, before anything is written when the settings are at fault;
        Interrupted when the user stops it.
    """
    with processes() as world:
        watching = observer if observer is not None and world.first else Observer()
        trainer = _make_trainer(config, Path(out), world, watching, resume=resume)
        with _deterministic(trainer.device):
            return trainer.train(resume=resume)


def _make_trainer(config: TrainConfig, run: Path, world: World, observer: Observer, *, resume: bool) -> Trainer:
    """Check everything, then begin the run folder."""
    with world.together():
        world.check_batch_size(config.batch_size)
        device = pick_device(config.device, world)
        choose_step(config.step, device, world.size)
        choose_implementation(config.impl, device, torch.float32)
        if config.threads:
            torch.set_num_threads(config.threads)
        dataset, classes, cache = _open_dataset(config)
        config = config.resolved(len(dataset), dataset.size, choose_shuffle(config.shuffle, dataset))
        if world.first:
            _check_folder(config, run, resume, _trained_on(dataset, cache))
        val = _open_validation(config, classes)
        # Seeded before the weights are drawn: the same seed gives the same initialisation with and without a teacher,
        # and on every process.
        torch.manual_seed(config.seed)
        model = build_model(config.model, len(classes), weights=config.init, strict_head=False)
        criterion = _criterion(config, model, dataset, cache)
        keep_records(dataset, config.resident, device, workers=config.workers, note=observer.note)
        check_room(dataset, config.shuffle, observer.note)
    with world.together():
        if world.first:
            _write_beginning(config, run, model, classes, _trained_on(dataset, cache), world.size)
        for text in _notes(config, model, cache):
            observer.note(text)
        return Trainer(
            model,
            Draws(dataset, config.seed, config.shuffle),
            criterion,
            config,
            run,
            device=device,
            validate=None if val is None else _validator(val, config, device, observer, world),
            observer=observer,
            world=world,
        )


def _notes(config: TrainConfig, model: SegmentationModel, cache: Cache | None) -> Iterator[str]:
    """What initialisation left out, and what warp works on."""
    report = model.load_report
    if report is not None and report.reinitialised:
        yield f"--init leaves at random: {', '.join(report.reinitialised)}"
    if report is not None and report.unused_auxiliary:
        yield f"--init does not use auxiliary heads: {', '.join(report.unused_auxiliary)}"
    views = 1 if cache is None else cache.manifest.view.views_per_sample
    if views > 1:
        rest = "an epoch shows one of each sample" if config.augment == "replay" else "only the whole images are used"
        yield f"the store has {views} views of a sample; with --augment {config.augment} {rest}"
    if cache is not None and config.augment == "warp":
        source = "enlarges the stored views" if cache.pixels_stored else "crops the images of the data set"
        yield f"augmentation warp {source}, and moves the targets alike"


@contextmanager
def _deterministic(device: torch.device) -> Iterator[None]:
    """On a CPU a run repeats to the bit; the setting is the process's own, so it is put back."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(before or device.type == "cpu")
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def label_counts(cache: Cache) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Pixels per class (C,) over the labels that a store keeps, of whole images: crops would count some twice."""
    path = "labels/segmentation"
    whole = range(0, len(cache), cache.manifest.view.views_per_sample)
    rows = prefetch(lambda record: cache.read(record, [path])[path], whole, threads=2, ahead=8)
    return _count(rows, cache.num_classes)


def _split_counts(split: Split) -> np.ndarray[Any, np.dtype[np.int64]]:
    indices = [index for index in range(len(split)) if split.has_label(index)]
    labels = prefetch(split.label, indices, threads=2, ahead=8)
    return _count((label for label in labels if label is not None), len(split.classes))


def _count(labels: Iterable[np.ndarray[Any, Any]], classes: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    counts = np.zeros(256, np.int64)
    for label in labels:
        counts += np.bincount(label.reshape(-1), minlength=256)
    return counts[:classes]


def _open_dataset(config: TrainConfig) -> tuple[DrawnDataset, ClassList, Cache | None]:
    augmentation = (
        Augmentation(scale=config.scale, flip=config.flip, jitter=config.jitter)
        if config.augment != "none"
        else Augmentation.off()
    )
    if config.cache is None:
        assert config.data is not None
        split = open_split(config.data, config.split)
        if config.size is None:
            raise RecipeError(
                "training from a data folder needs the size of its pixels",
                received="no --size",
                remedy="add --size HxW, for instance --size 288x384",
            )
        labelled = LabelledDataset(split, config.size, augmentation)
        if len(labelled) == 0:
            raise DataError(
                "training needs labelled images",
                received=f"{config.data}, split {config.split!r}: none of {len(split)} images has a label",
                remedy="give a labelled split with --split",
            )
        return labelled, split.classes, None
    cache = open_cache(config.cache, cache_dir=config.cache_dir, cache_bytes=config.cache_bytes)
    cache.check_files()
    source = open_split(config.data, config.split) if config.data and not cache.pixels_stored else None
    dataset = CacheDataset(
        cache,
        augment=config.augment,
        size=config.size,
        targets=config.method != "none",
        split=source,
        augmentation=augmentation,
    )
    about = cache.manifest.dataset
    return dataset, ClassList(about.class_names, about.class_colours), cache


def _open_validation(config: TrainConfig, classes: ClassList) -> Split | None:
    if config.val is None:
        return None
    split = open_split(config.val, config.val_split)
    if split.classes.names != classes.names:
        raise MismatchError(
            "training and validation have the same classes in the same order",
            received=f"{', '.join(split.classes.names)} in {config.val} against {', '.join(classes.names)}",
            remedy="give the validation data of the same class list",
        )
    return split


def _validator(val: Split, config: TrainConfig, device: torch.device, observer: Observer, world: World) -> Any:
    """Each process validates its part of the samples; pixels are counted, so that all know the very same score."""

    def validate(model: SegmentationModel) -> Metrics:
        assert config.size is not None
        with world.together():
            confusion = count_pixels(
                model,
                val,
                config.size,
                device=device,
                batch_size=config.batch_size // world.size,
                progress=observer.validating,
                part=(world.rank, world.size),
            )
        confusion.counts = world.total(confusion.counts)
        return confusion.metrics()

    return validate


def _criterion(
    config: TrainConfig, model: SegmentationModel, dataset: DrawnDataset, cache: Cache | None
) -> DistillLoss:
    weights = None
    if config.class_weights != "none":
        if isinstance(dataset, CacheDataset) and dataset.split is None:
            counts = label_counts(dataset.cache)
        else:
            split = dataset.split  # type: ignore[attr-defined]
            counts = _split_counts(split)
        weights = torch.as_tensor(class_weights(counts, config.class_weights), dtype=torch.float32)
    return DistillLoss(
        cache,
        ce_weight=config.ce_weight,
        kl_weight=config.kl_weight if config.method == "kl" else 0.0,
        temperature=config.temperature,
        class_weight=weights,
        distill_void=config.distill_void,
        align_corners=model.align_corners,
        impl=config.impl,
    )


def _check_folder(config: TrainConfig, run: Path, resume: bool, trained_on: str) -> None:
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
    if (run / DESCRIPTION).is_file() and read_run_model(run).trained_on not in ("", trained_on):
        changed.append("another store or data set than it was begun with")
    if changed:
        raise RecipeError(
            "a run resumes with the settings it was begun with",
            received=", ".join(changed),
            remedy="repeat the first command and add --resume, or give another --out",
        )


def _trained_on(dataset: DrawnDataset, cache: Cache | None) -> str:
    """What identifies the samples of a run: the seal of its store, or the ids and classes of its data."""
    if cache is None:
        assert isinstance(dataset, LabelledDataset)
        return f"data {dataset.split.digest()}"
    assert cache.ledger is not None
    return f"store {cache.ledger.completion.ledger_sha256}"


def _write_beginning(
    config: TrainConfig, run: Path, model: SegmentationModel, classes: ClassList, trained_on: str, processes: int
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
            trained_on=trained_on,
        )
        write_run_model(run, about)
        write_json(run / "environment.json", environment() | {"processes": processes})
