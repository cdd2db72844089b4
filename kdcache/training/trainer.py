"""One trainer for teachers and students: the loop, its checkpoints, its times."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kdcache.distill import Criterion, Streams, rows_of
from kdcache.errors import KDCacheError
from kdcache.faults import network_fault
from kdcache.metrics import Metrics
from kdcache.metrics.timing import is_out_of_memory
from kdcache.models import SegmentationModel
from kdcache.settings.parse import warmup_steps
from kdcache.tasks import SEGMENTATION
from kdcache.training.config import TrainConfig
from kdcache.training.distributed import World
from kdcache.training.input.loader import next_batch
from kdcache.training.input.mix import Mix, Paste, Pastes
from kdcache.training.input.streams import StreamDraws, feed_streams
from kdcache.training.interrupt import Interrupted, stop_requests
from kdcache.training.run.checkpointing import JUDGES, RunState
from kdcache.training.run.metrics_log import MetricsLog, Observer, Score
from kdcache.training.run.monitor import Watch, measures_norms, outcome
from kdcache.training.step.accumulate import AccumulatedStep
from kdcache.training.step.batch_fit import largest_fitting, memory_error, requested_memory
from kdcache.training.step.compiled import choose_step, make_step
from kdcache.training.step.ddp import distribute
from kdcache.training.step.eager import EagerStep, Step, set_random_state
from kdcache.training.step.ema import ModelEma
from kdcache.training.step.gradient_norms import Norms, task_lines
from kdcache.training.step.optim import Schedule, distill_weight_scale, make_optimizer
from kdcache.training.step.weak_view import WeakView


class Trainer:
    """Trains a model for `config.optimizer.iterations` steps, and writes the run folder.

    Args:
        model: the model to train.
        streams: the data source of each stream, in the order of the criterion's streams.
        criterion: the loss.
        config: settings from `TrainConfig.resolved`, in which the number of steps and the image size are set.
        run: an existing folder, for checkpoint.pt, best/last[-ema].safetensors, metrics.jsonl and result.json.
        device: where the model is trained.
        validate: task -> a function that returns a model's score. The key `FEATURES` is for a score of the feature loss
            instead. The score of the first entry chooses the best weights. None validates nothing.
        observer: is told of the training's progress. None reports it nowhere.
        world: the processes that train together, each with its part of every batch. Process 0 writes the run. None is
            this process alone.

    Attributes:
        eager: the eager step. Compiled and graphed steps are made from it.
    """

    def __init__(
        self,
        model: SegmentationModel,
        streams: Sequence[StreamDraws],
        criterion: Criterion,
        config: TrainConfig,
        run: Path,
        *,
        device: torch.device,
        validate: Mapping[str, Callable[[SegmentationModel], Score]] | None = None,
        observer: Observer | None = None,
        world: World | None = None,
    ) -> None:
        # Pixels come channels last: the weights in the same order spare a transposition at every layer.
        self.model = model.to(device).to(memory_format=torch.channels_last)
        self.streams = tuple(streams)
        self.criterion = criterion.to(device)
        settings = config.optimizer
        assert settings.iterations is not None, "resolve the settings first"
        assert config.run.val_every is not None
        self.config = config
        self._iterations, self._val_every = settings.iterations, config.run.val_every
        self.run = run
        self.device = device
        self.observer = observer or Observer()
        self._validate = dict(validate or {})
        self._world = world or World()
        self._kind = choose_step(config.machine.step, device, self._world.size)
        if settings.accumulate > 1 and self._kind != "eager":
            self.observer.note(f"--accumulate learns from the parts of a batch in eager steps, not {self._kind}")
            self._kind = "eager"
        bf16 = settings.amp == "bf16" or (settings.amp == "auto" and device.type == "cuda")
        optimizer = make_optimizer(self.model, settings, self.criterion, capturable=self._kind == "graphed")
        self._schedule = Schedule(optimizer, settings)
        make_eager = EagerStep if settings.accumulate == 1 else partial(AccumulatedStep, parts=settings.accumulate)
        self.eager = make_eager(
            self.model,
            self.criterion,
            optimizer,
            device=device,
            bf16=bf16,
            clip_grad=settings.clip_grad,
            mix=_pasting(config, self.criterion),
        )
        self._ema = None if settings.ema is None else ModelEma(self.model, settings.ema)
        self.weak_view = WeakView(
            self.model,
            self._ema,
            self.criterion,
            device=device,
            bf16=bf16,
            parts=settings.accumulate,
            impl=config.machine.impl,
        )
        self._state = RunState(run, config, self.eager, self._schedule, self._world, self._ema)
        self._tasks = () if criterion.balance is None else criterion.balance.heads
        names = ("loss", *criterion.names, *self._tasks)
        self.watch = Watch(names, self._world, self._sample_ids, criterion.part_tasks)
        self._step: Step | None = None  # made from the first batch
        self._log: MetricsLog | None = None  # of the first process
        self._described = False
        self._first = 0  # the step that this process began with

    def _sample_ids(self, step: int) -> list[str]:
        return [sample for stream in self.streams for sample in stream.sample_ids(step)]

    def use(self, step: EagerStep) -> None:
        """Replace the eager step by `step`, a variant with the same model, loss and optimizer."""
        self.eager = step

    def train(self, *, resume: bool) -> dict[str, Any]:
        """Train to the end, and return the content of result.json.

        `resume` continues from the checkpoint in the run folder, if there is one.

        Raises: ModelError if a loss is not finite or a batch does not fit into memory. Interrupted after SIGINT or
            SIGTERM, with the state saved.
        """
        world = self._world
        with world.together():
            random = self._state.restore() if resume else None
            iterations, first, keep_every = self._iterations, self._state.now.step, self.config.run.keep_every
            self._first = first
            assert not isinstance(keep_every, str), "resolve the settings first"
            self._log = MetricsLog(self.run, first) if world.first else None
        self._state.check_same()
        parameters = sum(p.numel() for p in self.model.parameters())
        self.observer.started(step=first, iterations=iterations, parameters=parameters)
        torch.manual_seed(world.seed(self.config.optimizer.seed, first))  # whatever an observer has drawn
        batches = feed_streams(
            self.streams,
            self.device,
            first=first,
            last=iterations,
            workers=self.config.machine.workers,
            rank=world.rank,
            world=world.size,
        )
        if random is not None:
            # After feed_streams(): a DataLoader takes a number from this generator when it starts.
            set_random_state(self.device, random)
        self.model.train()
        completed = False
        try:
            if self._state.now.unjudged:
                self._end_of_interval()
            with stop_requests() as stop:
                for step in range(first, iterations):
                    stopping = self.one_step(step, batches, stop.is_set())
                    interval = (step + 1) % self._val_every == 0 or step + 1 == iterations
                    if world.size == 1:  # no agreement is needed: a request during this very step counts, too
                        stopping = stop.is_set()
                    keeping = keep_every is not None and (step + 1) % keep_every == 0
                    if interval or stopping or keeping:
                        self.watch.check_finite()
                    if interval:
                        self._end_of_interval()
                    elif stopping or keeping:
                        self._state.save()
                    if keeping:
                        self._state.keep()
                    if stopping and step + 1 < iterations:
                        raise Interrupted(step + 1)
            completed = True
        finally:
            if self._log is not None:
                self._log.close()
            batches.close()  # and with it the threads that draw ahead
            self.observer.ended(completed=completed)
        self._note_cost(self._state.now.step - first)
        return self._state.finish(self._judged)

    @property
    def _judged(self) -> str:
        """The task, or `FEATURES`, whose score chooses the best weights."""
        return next(iter(self._validate), SEGMENTATION)

    def one_step(self, step: int, batches: Iterator[Streams | KDCacheError], stop: bool) -> bool:
        """Take one step of training. Return True if training should stop after the step.

        The result is True if any process was asked to stop before the step.

        Args:
            step: number of the step, from 0.
            batches: yields the loader's batches, or for a damaged sample a KDCacheError, which this method raises.
            stop: True if this process was asked to stop.
        """
        config = self.config
        began, cpu_began = time.perf_counter(), time.process_time()
        try:
            with self._world.together(stop=stop) as agreed:
                batch = next_batch(batches)
        except KDCacheError:  # of a damaged sample: no step that was taken is lost
            if step > self._first:
                self.watch.check_finite()
                self._state.save()
            raise
        waited = time.perf_counter() - began
        prepared, losses, norms = self._learn(step, batch)
        self.criterion.after_step(batch)
        if self._ema is not None:
            self._ema.update(step + 1)
        self._describe()
        logged = (step + 1) % config.run.log_every == 0 or step + 1 == self._iterations
        self.watch.add(step, losses)
        # On a GPU reading every loss would stall the queue: losses are read when they are logged.
        reading = logged or norms is not None or self.device.type == "cpu"
        values = self.watch.check_finite() if reading else []
        if norms is not None:
            self._write_norms(step, norms, dict(zip(self.watch.names, values, strict=True)))
        lr = self._schedule.lr
        self._schedule.after_step()
        now = self._state.now
        now.step = step + 1
        now.seconds += time.perf_counter() - began - prepared
        now.cpu_seconds += time.process_time() - cpu_began
        now.waited += waited
        now.prepared += prepared
        self.observer.advanced(now.step)
        if logged:
            speed = config.optimizer.batch_size * now.step / now.seconds
            report = dict(zip(self.watch.names, values, strict=True))
            _note_all(self.watch.won(report), self.observer.note)
            _note_all(self.watch.unsure(report, last=now.step == self._iterations), self.observer.note)
            report |= {"lr": lr, "images_per_second": speed, "wait_share": now.waited / now.seconds}
            if self.weak_view.needed:
                report["weak_view_seconds"] = self.weak_view.seconds / (now.step - self._first)
            self._report(report)
        return agreed.stop

    def _note_cost(self, steps: int) -> None:
        """Note how long the forwards on weak views took, in the steps of this process."""
        if self.weak_view.needed and steps > 0:
            now = self._state.now
            weak_s, step_s = self.weak_view.seconds / steps, now.seconds / now.step
            self.observer.note(
                f"{self.weak_view.forwards} forwards in training on weak views, without gradient, took {weak_s:.2g} of "
                f"{step_s:.2g} s a step: {100 * weak_s / step_s:.0f} %"
            )

    def _report(self, values: dict[str, float]) -> None:
        """Log a step's values, and the losses and weights of balanced tasks."""
        step, balance = self._state.now.step, self.criterion.balance
        weights = {} if balance is None else balance.weights()
        tasks = {task: {"loss": values.pop(task), "weight": weight} for task, weight in weights.items()}
        self._write_line("train", step, values | ({"tasks": tasks} if tasks else {}))
        self.observer.stepped(step, values)
        if tasks:
            self.observer.balanced(step, tasks)

    def _write_norms(self, step: int, norms: Norms, losses: Mapping[str, float]) -> None:
        """Log the gradient norms of a step, and note terms and tasks with a very small or very large gradient."""
        tasks = task_lines(losses, norms)
        if norms.terms:
            self._write_line("gradients", step + 1, norms.terms | ({"tasks": tasks} if tasks else {}))
            self.observer.gradients(step + 1, norms.terms)
        if tasks:
            self.observer.balanced(step + 1, tasks)
        if step + 1 >= warmup_steps(self.config.loss.distill_schedule):  # until then weights are small on purpose
            _note_all(self.watch.lopsided(step, norms.terms), self.observer.note)
            _note_all(self.watch.starving(tasks), self.observer.note)

    def _learn(self, step: int, batch: Streams) -> tuple[float, Tensor, Norms | None]:
        """Learn from a batch. Return the seconds of preparation, the losses, and gradient norms if they are due."""
        measured = measures_norms(step, self.config.run.gradients_every)
        try:
            labelled = self.weak_view(batch)
            prepared = self._prepare(labelled)
            schedule = self.config.loss.distill_schedule
            self.criterion.set_distill_weight_scale(distill_weight_scale(schedule, step, self._iterations))
            if measured:
                return prepared, *self.eager.with_norms(labelled)
            assert self._step is not None
            return prepared, self._step(labelled), None
        except Exception as error:
            if not is_out_of_memory(error) and (fault := network_fault(error)) is not None:
                raise fault from error
            # Several processes wait for each other: one alone cannot try what fits.
            if self._world.size > 1 or not is_out_of_memory(error):
                raise
            requested = requested_memory(error)
        # Here, where the handler no longer holds what the step had made.
        self._step = None
        held, together = self.eager.held(batch), 1 if self.config.augmentation.mix is None else 2
        fits = largest_fitting(
            lambda size: self.eager.attempt(self.weak_view(rows_of(held, size)), measured),
            sum(map(len, held)),
            self.device,
            together,
        )
        raise memory_error(self.config, self.device, requested, fits)

    def _describe(self) -> None:
        """Note once what the terms resize or project."""
        if not self._described:
            self._described = True
            for text in self.criterion.describe():
                self.observer.note(text)

    def _prepare(self, batch: Streams) -> float:
        """Make the step from the first batch, and return the seconds that this took. They do not count as training."""
        if self._step is not None:
            return 0.0
        began = time.perf_counter()
        if self._world.size > 1:
            distribute(self.eager, batch, self._world)
        self._step = make_step(self._kind, self.eager, batch, self.observer.note)
        return time.perf_counter() - began

    def _end_of_interval(self) -> None:
        """Validate and save. If a sample cannot be read, save first. Then the resumed run validates."""
        now = self._state.now
        now.unjudged = True
        try:
            self._judge()
        except KDCacheError:
            self._state.save()
            raise
        now.unjudged = False
        self._state.save()

    def _judge(self) -> None:
        """Validate the weights and their moving average, and keep the best of each.

        The learning rate of `plateau` follows the weights, so a training is the same with and without an average.
        Everything is measured before anything changes.
        """
        if not self._validate:
            return
        step, judged, averaged = self._state.now.step, self._judged, dict[str, Score]()
        scores = {name: validate(self.model) for name, validate in self._validate.items()}
        if self._ema is not None:
            with self._ema.in_place():
                averaged = {name: validate(self.model) for name, validate in self._validate.items()}
        value = JUDGES[judged].value(scores[judged])
        best = self._state.keep_best(value)
        self._schedule.after_validation(value)
        ema_best = bool(averaged) and self._state.keep_best(JUDGES[judged].value(averaged[judged]), ema=True)
        line = dict[str, Any]()
        for name in scores:
            for whose, found in (("", scores), ("ema_", averaged)):
                values = found[name].to_json() if name in found else {}
                line |= {f"{whose}{JUDGES[name].prefix}{key}": value for key, value in values.items()}
        self._write_line("validation", step, line)
        for found, is_best, ema in ((scores, best, False), (averaged, ema_best, True)):
            for name, score in found.items():
                self.observer.validated(step, name, score, best=is_best and name == judged, ema=ema)
        metrics = scores.get(SEGMENTATION)
        if step == self._iterations and isinstance(metrics, Metrics) and (text := outcome(metrics)) is not None:
            self.observer.note(text)

    def _write_line(self, kind: str, step: int, values: dict[str, Any]) -> None:
        if self._log is not None:
            self._log.write(kind, step, values)


def _note_all(texts: Iterable[str], note: Callable[[str], None]) -> None:
    for text in texts:
        note(text)


def _pasting(config: TrainConfig, criterion: Criterion) -> Callable[[Streams], Streams] | None:
    """Return the function that pastes between samples of a batch, or None if nothing is pasted."""
    if config.augmentation.mix is not None:
        return Mix(config.augmentation.mix)
    names = [stream.name for stream in config.streams]
    pastes = []
    for number, stream in enumerate(config.streams):
        if stream.paste is not None and stream.paste_from is not None:
            source = names.index(stream.paste_from)
            forms = (criterion.losses[place].targets for place in (number, source))
            pastes.append(Paste(number, source, Mix(stream.paste), *forms))
    return Pastes(pastes) if pastes else None
