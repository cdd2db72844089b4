"""Run a training from its settings, for `train-teacher` and `train-student`."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from kdcache.data import Fit, Split
from kdcache.distill import Criterion, DistillLoss, choose_implementation
from kdcache.distill.terms import labellers
from kdcache.errors import DataError, RecipeError
from kdcache.metrics.confusion import ConfusionMatrix
from kdcache.metrics.evaluate import Progress, accumulate, check_tasks, count_pixels
from kdcache.metrics.evaluators import NUMERIC_EVALUATORS
from kdcache.metrics.predictions import Inference
from kdcache.metrics.sliding import Framing
from kdcache.metrics.timing import is_out_of_memory
from kdcache.models import SegmentationModel
from kdcache.run_folder import RECIPE
from kdcache.run_samples import SAMPLES
from kdcache.store import JoinedCache
from kdcache.store.backend.durable import disk_space_errors
from kdcache.tasks import SEGMENTATION, numeric
from kdcache.training.checks import (
    check_adversaries,
    check_auxiliary,
    check_flip,
    check_processes,
    check_supervised,
    idle_everywhere,
    idle_notes,
    idle_settings,
    warmup_notes,
)
from kdcache.training.config import TrainConfig, read_config
from kdcache.training.criterion import make_criterion, needed_arrays, rare_order
from kdcache.training.distributed import World, pick_device, processes
from kdcache.training.feature_validation import FeatureJudge
from kdcache.training.input.cache_dataset import CacheDataset
from kdcache.training.input.loader import Draws
from kdcache.training.input.residency import keep_records
from kdcache.training.input.sampler import choose_labelled_share, choose_shuffle
from kdcache.training.input.shard_prefetch import check_room
from kdcache.training.input.streams import StreamDraws, stream_seed
from kdcache.training.leakage import check_teacher
from kdcache.training.numeric_labels import check_first, check_labels
from kdcache.training.pseudo_labels import collapse_note, pseudo_notes
from kdcache.training.run.beginning import begin_model, model_notes
from kdcache.training.run.checkpoint_file import FILE as CHECKPOINT
from kdcache.training.run.checkpointing import FEATURES
from kdcache.training.run.folder import (
    check_folder,
    hold_folder,
    identity_of,
    labels_of,
    write_beginning,
)
from kdcache.training.run.lock import RunLock
from kdcache.training.run.metrics_log import Observer, Observers, Score
from kdcache.training.run.sample_panels import sample_panels
from kdcache.training.run.trackers import Loggers, check_loggers
from kdcache.training.sources import (
    Source,
    check_pasting,
    check_validation,
    judged_by_its_own,
    open_sources,
    open_validation,
    read_samples,
    share_classes,
    shared_with_judge,
    taught_tasks,
)
from kdcache.training.step.batch_fit import largest_fitting, memory_error, memory_errors, requested_memory
from kdcache.training.step.compiled import choose_step
from kdcache.training.term_setting import make_balance
from kdcache.training.trainer import Trainer


def train(
    config: TrainConfig, out: str | Path, *, resume: bool = False, observer: Observer | None = None
) -> dict[str, Any]:
    """Run the training of `config` in the folder `out`, and return the content of its result.json.

    A student learns from the cache only: no teacher is imported, loaded or run. With torchrun, every process calls this
    function with the same arguments, and all return or raise the same.

    Args:
        config: all settings.
        out: the run's folder. It must be new or empty, or hold the run to resume.
        resume: True continues from the last checkpoint in `out`. Without a checkpoint the training begins at step 0.
        observer: is told of the training's progress.
    Raises: KDCacheError for a wrong setting (before anything is written), damaged data or a failed training.
        Interrupted if the user stops the training.
    """
    with memory_errors(config), disk_space_errors(out), processes() as world, RunLock(Path(out)) as lock:
        watching = observer if observer is not None and world.first else Observer()
        return _train(config, Path(out), world, watching, resume, lock)


def _train(
    config: TrainConfig, out: Path, world: World, observer: Observer, resume: bool, lock: RunLock
) -> dict[str, Any]:
    """Train among the processes of `world`, and let go of the trainer: it holds the process group, which ends next."""
    trainer = make_trainer(config, out, world, observer, resume=resume, lock=lock)
    with _deterministic(trainer.device):
        try:
            return trainer.train(resume=resume)
        except DataError:  # the data must be repaired: what they hold now is not to be compared with
            (out / SAMPLES).unlink(missing_ok=True)
            raise


def make_trainer(
    config: TrainConfig, run: Path, world: World, observer: Observer, *, resume: bool, lock: RunLock | None = None
) -> Trainer:
    """Check all settings and data, create the run folder, and return the trainer.

    Args:
        config: all settings.
        run: the run's folder.
        world: the processes that train together.
        observer: is told notes for the user.
        resume: True continues from the last checkpoint in `run`.
        lock: the lock of `run`. This call takes it, before it writes anything. None takes no lock.
    Raises: KDCacheError for wrong settings or data.
    """
    with world.together():
        if not config.data.stream:  # whose rows are checked each
            world.check_batch_size(
                config.optimizer.batch_size, 1 if config.augmentation.mix is None else 2, config.optimizer.accumulate
            )
        for stream in config.streams:
            check_processes(stream.config, world.size)
        check_supervised(config)
        check_adversaries(config)
        check_auxiliary(config)
        check_loggers(config.run.log)
        device = pick_device(config.machine.device, world)
        choose_step(config.machine.step, device, world.size)
        choose_implementation(config.machine.impl, device, torch.float32)
        if config.machine.threads:
            torch.set_num_threads(config.machine.threads)
        if resume and config.data.fit == "auto" and (run / RECIPE).is_file():
            config = config.changed(fit=read_config(run).data.fit)
        sources = open_sources(config, world.size * config.optimizer.accumulate, observer.note)
        datasets = [source.dataset for source in sources]
        for source in sources:
            with source.named():
                _note_all(_check_seen(source), source.note(observer.note))
        val = open_validation(config)
        classes = share_classes(sources, None if val is None else val.classes)
        check_pasting(sources)
        for source in sources:
            with source.named():
                notes = pseudo_notes(source.config, source.dataset, pasted=source.pasted is not None)
                _note_all(notes, source.note(observer.note))
                _note_collapse(source, sources, observer)
        idle = idle_everywhere(config, [idle_settings(source.given, source.cache) for source in sources])
        _note_all(idle_notes(config, idle), observer.note)
        config = replace(_resolve(config, sources, observer), untaken=frozenset(idle))
        identity = identity_of(datasets)
        samples = read_samples(datasets, val) if world.first else None
        if samples is not None:
            check_folder(config, run, resume, identity, samples, labels_of(datasets))
            if run.is_dir() and lock is not None:  # soon: what follows takes time and is for nothing
                lock.take()
        if val is not None:
            check_validation(config, classes, val)
        # Seeded before the weights are drawn: the same seed gives the same initialisation with and without a teacher,
        # and on every process.
        torch.manual_seed(config.optimizer.seed)
        model = begin_model(config, len(classes), taught_tasks(sources))
        for source in sources:
            model.check_size(source.dataset.size)
        judged = () if val is None else _judged(model, val, config)
        if val is not None:
            for task in numeric(judged):
                check_first(val, task)
        criterion = _combined([_criterion(source, model, device, observer) for source in sources], sources, config)
        for source in sources:
            with source.named():
                note = source.note(observer.note)
                workers = config.machine.workers
                keep_records(
                    source.dataset, config.machine.resident, device, workers=workers, among=len(sources), note=note
                )
                check_room(source.dataset, source.config.data.shuffle, note)
        streams = [
            _draws(source, stream_seed(config.optimizer.seed, number), observer)
            for number, source in enumerate(sources)
        ]
    with world.together():
        if world.first:
            hold_folder(config, run, resume, identity, lock)
            write_beginning(config, run, model, datasets, world.size, samples)
            if resume and not (run / CHECKPOINT).is_file():
                observer.note(f"{run} holds no checkpoint: the training begins at its first step")
        _note_all(model_notes(config, model, classes.names), observer.note)
        _note_all(warmup_notes(config), observer.note)
        warning = None if samples is None else judged_by_its_own(samples)
        if warning is not None:
            observer.note(warning)
        for source in sources:
            notes = _notes(source, None if warning is not None else val)
            _note_all(notes, source.note(observer.note))
        watching = observer
        if config.run.log and world.first:
            size = config.data.size
            panels = None if val is None or size is None else sample_panels(model, val, size, device, _fit(config))
            watching = Observers([observer, Loggers(config.run.log, run, config.recipe, observer.note, panels)])
        return Trainer(
            model,
            streams,
            criterion,
            config,
            run,
            device=device,
            validate=_validators(judged, val, config, device, observer, world)
            or _feature_judge(config, sources[0], criterion, device, world),
            observer=watching,
            world=world,
        )


def _note_all(texts: Iterable[str], note: Callable[[str], None]) -> None:
    for text in texts:
        note(text)


def _note_collapse(source: Source, sources: Sequence[Source], observer: Observer) -> None:
    """Note if a teacher predicts only few of the classes on images without labels."""
    labelled = [stream_source.dataset for stream_source in sources if stream_source.learns_classes_from_labels]
    if source.dataset not in labelled:
        text = collapse_note(source.config, source.dataset, labelled)
        _note_all([text] if text else [], source.note(observer.note))


def _resolve(config: TrainConfig, sources: Sequence[Source], observer: Observer) -> TrainConfig:
    """Fill in the settings that depend on the data, for each stream and for the training.

    An epoch of a training with streams shows every sample of every stream at least once.
    """
    for source in sources:
        settings, dataset = source.config, source.dataset
        with source.named():
            shuffle = choose_shuffle(_shuffle(settings), dataset)
        share = choose_labelled_share(settings.data.labelled_share, dataset.label_flags)
        if settings.data.labelled_share is not None and share is None:
            source.note(observer.note)("--labelled-share has no effect: all samples have a label, or none has")
        source.config = settings.resolved(len(dataset), dataset.size, shuffle, share)
    if not config.data.stream:
        return sources[0].config
    config = config.changed(fit=sources[0].config.data.fit)
    # An epoch takes as many batches as the stream that takes most.
    samples = max(math.ceil(len(source.dataset) * config.optimizer.batch_size / source.rows) for source in sources)
    resolved = config.resolved(samples, sources[0].dataset.size, config.data.shuffle)
    return resolved.with_streams([source.config for source in sources])


def _shuffle(config: TrainConfig) -> str:
    """Return the order of samples in an epoch. Raises: RecipeError for an order that does not fit the sampling."""
    if config.data.sampling == "even":
        return config.data.shuffle
    if config.data.shuffle == "window":
        raise RecipeError(
            f"Cannot use --sampling {config.data.sampling} with --shuffle window: it takes samples from any shard at "
            "any time",
            fix="Leave one of them out.",
        )
    return "full"


def _criterion(source: Source, model: SegmentationModel, device: torch.device, observer: Observer) -> DistillLoss:
    """Return the loss of a stream, and make its dataset yield what the loss reads."""
    with source.named():
        source.dataset.extras = needed_arrays(source.config, source.cache, model)
        for part in () if source.cache is None else source.cache.parts:
            check_flip(source.given, part.manifest.teacher.processor)
        pasted = None if source.pasted is None else source.pasted.dataset
        criterion = make_criterion(source.config, model, source.dataset, device, source.note(observer.note), pasted)
        source.dataset.weak = bool(labellers(criterion))
        for task in numeric(source.config.label_tasks):
            check_labels(source.dataset, task, model.regressions[task])
        return criterion


def _combined(losses: Sequence[DistillLoss], sources: Sequence[Source], config: TrainConfig) -> Criterion:
    """Return the loss of all streams, with the balance of segmentation and depth."""
    balance = make_balance(config.loss.balance, config.loss.task_weight, config.tasks)
    streams = [source.stream for source in sources]
    return Criterion(losses, [stream.name for stream in streams], [stream.weight for stream in streams], balance)


def _draws(source: Source, seed: int, observer: Observer) -> StreamDraws:
    settings = source.config
    with source.named():
        rare = rare_order(settings, source.dataset, seed, source.note(observer.note))
    draws = Draws(source.dataset, seed, settings.data.shuffle, settings.data.labelled_share, rare)
    return StreamDraws(source.stream.name, draws, source.rows)


def _check_seen(source: Source) -> list[str]:
    """Return notes about labels or folds that a stream's teacher may have seen. Raises: as `check_teacher`."""
    parts = () if source.cache is None else source.cache.parts
    return [note for part in parts for note in check_teacher(part, source.config, source.dataset.labels_used)]


def _notes(source: Source, val: Split | None) -> Iterator[str]:
    """Yield notes about a stream: its part of a batch, the share of labels, unused caches and views, augmentation."""
    config, dataset, cache = source.config, source.dataset, source.cache
    if source.stream.name:
        yield (
            f"{source.rows} of {config.optimizer.batch_size} samples in every batch, from {len(dataset)} samples, "
            f"weight {source.stream.weight:g}"
        )
    if source.rows > len(dataset):
        yield (
            f"--batch-size {config.optimizer.batch_size} is more than the {len(dataset)} samples: every batch takes "
            f"each about {source.rows / len(dataset):.2g} times"
        )
    flags = dataset.label_flags
    if (share := config.data.labelled_share) is not None and flags is not None:
        yield (
            f"{flags.sum()} of {len(dataset)} samples have a label; {100 * share:.3g} % of every batch "
            "are taken from these (--labelled-share)"
        )
    if (limit := config.data.limit_labels) is not None and config.reads_targets and flags is not None and flags.all():
        yield (
            f"warning: --limit-labels {limit:g} uses the labels of all {len(dataset)} samples, so no image is left to "
            "distil without its label. Fix: give fewer labels, or build the cache of more images"
        )
    for name in cache.unread(dataset.paths) if isinstance(cache, JoinedCache) else ():
        yield f"no term reads the joined cache {name}"
    views = 1 if cache is None else cache.manifest.view.views_per_sample
    if views > 1:
        rest = (
            "an epoch shows one of each sample"
            if config.augmentation.augment == "replay"
            else "only the whole images are used"
        )
        yield f"the cache has {views} views of a sample; with --augment {config.augmentation.augment} {rest}"
    if cache is not None and config.augmentation.augment == "warp":
        changed = "enlarges the stored views" if cache.pixels_stored else "crops the images of the data set"
        yield f"--augment warp {changed}, and moves the targets with them"
    if (text := shared_with_judge(config, dataset, val)) is not None:
        yield text


@contextmanager
def _deterministic(device: torch.device) -> Iterator[None]:
    """Use deterministic algorithms on a CPU in a with block, so a run repeats bit for bit."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(before or device.type == "cpu")
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def _judged(model: SegmentationModel, val: Split, config: TrainConfig) -> tuple[str, ...]:
    """Return the tasks to validate: the learnt tasks with labels in `val`, or else all tasks of model and data.

    Raises: DataError if there are none.
    """
    judged = check_tasks(model, val)
    return tuple(task for task in judged if task in config.tasks) or judged


def _fit(config: TrainConfig) -> Fit:
    """Return how images are fitted into the size, once the data have been opened."""
    return "squash" if config.data.fit == "auto" else config.data.fit


def _validators(
    judged: Sequence[str],
    val: Split | None,
    config: TrainConfig,
    device: torch.device,
    observer: Observer,
    world: World,
) -> dict[str, Callable[[SegmentationModel], Score]]:
    """Return task -> a function that validates a model."""
    if val is None:
        return {}
    numbers = {task: _numeric_validator(task, val, config, device, world) for task in numeric(judged)}
    classes = {SEGMENTATION: make_validator(val, config, device, observer, world)} if SEGMENTATION in judged else {}
    return classes | numbers


def _numeric_validator(
    task: str, val: Split, config: TrainConfig, device: torch.device, world: World
) -> Callable[[SegmentationModel], Score]:
    """Return a function that validates a task such as depth. Each process takes a part of the samples."""
    labelled = val.labelled(task)

    def validate(model: SegmentationModel) -> Score:
        assert config.data.size is not None
        with world.together():
            found = accumulate(
                model,
                val,
                labelled[world.rank :: world.size],
                Inference(config.data.size, device, batch_size=1, threads=0, framing=Framing(_fit(config))),
                (task,),
            )
        merged: Score = NUMERIC_EVALUATORS[task].merged(world.gather(found[task]))
        return merged

    return validate


def _feature_judge(
    config: TrainConfig, source: Source, criterion: Criterion, device: torch.device, world: World
) -> dict[str, Callable[[SegmentationModel], Score]]:
    """Return the validation by feature loss of `--val-share`, or an empty dict without it."""
    if config.data.val_share is None:
        return {}
    assert isinstance(source.dataset, CacheDataset)
    loss = criterion.losses[0]
    return {FEATURES: FeatureJudge(source.dataset, loss, config.optimizer.batch_size, device, world)}


def make_validator(val: Split, config: TrainConfig, device: torch.device, observer: Observer, world: World) -> Any:
    """Return a function that validates a model's segmentation: model -> `Score`.

    Each process validates a part of the samples, and the pixel counts are summed over the processes. Batches are as
    large as those that go through the model in training. If memory runs out, the function raises ModelError with the
    batch sizes that fit.

    Args:
        val: the validation data.
        config: the training's settings, with the image size filled in.
        device: where the model is.
        observer: is told how many images were validated.
        world: the processes that train together.
    """
    at_once = config.optimizer.batch_size // (world.size * config.optimizer.accumulate)
    together = 1 if config.augmentation.mix is None else 2

    def count(
        model: SegmentationModel, at_once: int, part: tuple[int, int], progress: Progress | None = None
    ) -> ConfusionMatrix:
        assert config.data.size is not None
        return count_pixels(
            model,
            val,
            Inference(config.data.size, device, batch_size=at_once, framing=Framing(_fit(config))),
            part=part,
            progress=progress,
        )

    def count_mine(model: SegmentationModel) -> ConfusionMatrix:
        try:
            return count(model, at_once, (world.rank, world.size), observer.validating)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            requested = requested_memory(error)

        def attempt(size: int) -> None:
            count(model, size, (0, max(1, len(val) // size)))  # about so many images, evenly spread

        # Here, where the handler no longer holds what was made; each process on its own, for none waits for another.
        raise memory_error(config, device, requested, largest_fitting(attempt, at_once, device, together), world.size)

    def validate(model: SegmentationModel) -> Score:
        with world.together():
            confusion = count_mine(model)
        confusion.counts = world.total(confusion.counts)
        return confusion.metrics()

    return validate
