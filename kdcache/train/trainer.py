"""One trainer for teachers and students: the loop, its checkpoints, its honesty about time."""

import math
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kdcache.distill import DistillLoss
from kdcache.errors import KDCacheError, ModelError
from kdcache.evaluate import Metrics
from kdcache.models import SegmentationModel
from kdcache.models.run import write_weights
from kdcache.store.durable import disk_space_errors
from kdcache.train.checkpoint import load_checkpoint, save_checkpoint
from kdcache.train.config import TrainConfig
from kdcache.train.dataset import Sample
from kdcache.train.loader import Draws, make_loader, next_batch
from kdcache.train.log import MetricsLog, Observer, write_json
from kdcache.train.schedule import Schedule, load_optimizer, make_optimizer
from kdcache.train.step import EagerStep, Step, choose_step, make_step, random_state, set_random_state


class Interrupted(Exception):  # noqa: N818 (not an error: the user asked for it)
    """The user asked to stop; the state at `step` is saved."""

    def __init__(self, step: int) -> None:
        super().__init__(f"stopped after {step} iterations")
        self.step = step


@dataclass
class _Progress:
    """What a checkpoint holds besides tensors' owners."""

    step: int = 0
    best_miou: float = -1.0
    best_step: int = 0
    seconds: float = 0.0
    waited: float = 0.0
    prepared: float = 0.0


class Trainer:
    """Trains `model` on `draws` until `config.iterations`.

    Args:
        criterion: gives loss, ce and kl from native-stride logits.
        validate: metrics of the model as it stands, or None to train without validation.
        run: an existing folder; receives checkpoint.pt, best/last.safetensors, metrics.jsonl, result.json.
    """

    def __init__(
        self,
        model: SegmentationModel,
        draws: Draws,
        criterion: DistillLoss,
        config: TrainConfig,
        run: Path,
        *,
        device: torch.device,
        validate: Callable[[SegmentationModel], Metrics] | None = None,
        observer: Observer | None = None,
    ) -> None:
        # Pixels come channels last: the weights in the same order spare a transposition at every layer.
        self.model = model.to(device).to(memory_format=torch.channels_last)
        self.draws = draws
        self.criterion = criterion.to(device)
        assert config.iterations is not None, "resolve the settings first"
        assert config.val_every is not None
        self.config = config
        self._iterations, self._val_every = config.iterations, config.val_every
        self.run = run
        self.device = device
        self.observer = observer or Observer()
        self._validate = validate
        self._kind = choose_step(config.step, device)
        self._optimizer = make_optimizer(self.model, config, capturable=self._kind == "graphed")
        self._schedule = Schedule(self._optimizer, config)
        self._eager = EagerStep(
            self.model,
            self.criterion,
            self._optimizer,
            device=device,
            bf16=config.amp == "bf16" or (config.amp == "auto" and device.type == "cuda"),
            clip_grad=config.clip_grad,
        )
        self._step: Step | None = None  # made from the first batch
        self._now = _Progress()
        self._unchecked: list[tuple[int, Tensor]] = []

    def train(self, *, resume: bool) -> dict[str, Any]:
        """Run to the end and return the content of result.json.

        Raises: ModelError when a loss is not finite; Interrupted after SIGINT or SIGTERM, with the state saved.
        """
        torch.manual_seed(self.config.seed)
        random = self._restore() if resume else None
        iterations, first = self._iterations, self._now.step
        log = MetricsLog(self.run, first)
        parameters = sum(p.numel() for p in self.model.parameters())
        self.observer.started(step=first, iterations=iterations, parameters=parameters)
        loader = make_loader(
            self.draws,
            first=first,
            last=iterations,
            batch_size=self.config.batch_size,
            workers=self.config.workers,
            pin_memory=self.device.type == "cuda",
        )
        batches = iter(loader)
        if random is not None:
            # After iter(): a DataLoader takes a number from this generator when it starts.
            set_random_state(self.device, random)
        self.model.train()
        try:
            with _stop_requests() as stop:
                for step in range(first, iterations):
                    self._one_step(step, batches, log)
                    interval = (step + 1) % self._val_every == 0 or step + 1 == iterations
                    if interval or stop.is_set():
                        self._check_finite()
                    if interval:
                        self._end_of_interval(log)
                    elif stop.is_set():
                        self._save()
                    if stop.is_set() and step + 1 < iterations:
                        raise Interrupted(step + 1)
        finally:
            log.close()
            if isinstance(batches, Generator):
                batches.close()  # and with it the threads that draw ahead
        return self._finish()

    def _one_step(self, step: int, batches: Iterator[Sample | KDCacheError], log: MetricsLog) -> None:
        config = self.config
        began = time.perf_counter()
        batch = next_batch(batches)
        waited = time.perf_counter() - began
        prepared = self._prepare(batch)
        norms = None
        if config.gradients_every and step % config.gradients_every == 0:
            losses, norms = self._eager.with_norms(batch)
        else:
            assert self._step is not None
            losses = self._step(batch)
        logged = (step + 1) % config.log_every == 0 or step + 1 == self._iterations
        self._unchecked.append((step, losses))
        # On a GPU a look at every loss would stall the queue: look when we log.
        values = self._check_finite() if logged or norms or self.device.type == "cpu" else []
        if norms:
            log.write("gradients", step + 1, norms)
            self.observer.gradients(step + 1, norms)
        lr = self._schedule.lr
        self._schedule.after_step()
        now = self._now
        now.step = step + 1
        now.seconds += time.perf_counter() - began - prepared
        now.waited += waited
        now.prepared += prepared
        if logged:
            speed = config.batch_size * now.step / now.seconds
            report = dict(zip(("loss", "ce", "kl"), values, strict=True))
            report |= {"lr": lr, "images_per_second": speed, "wait_share": now.waited / now.seconds}
            log.write("train", now.step, report)
            self.observer.stepped(now.step, report)

    def _prepare(self, batch: Sample) -> float:
        """Make the step from the first batch; returns the seconds that it took, which are no training."""
        if self._step is not None:
            return 0.0
        began = time.perf_counter()
        self._step = make_step(self._kind, self._eager, batch, self.observer.note)
        return time.perf_counter() - began

    def _check_finite(self) -> list[float]:
        """Look at the losses since the last look; returns the newest as (loss, ce, kl)."""
        if not self._unchecked:
            return []
        rows = torch.stack([row for _, row in self._unchecked]).tolist()
        for (step, _), row in zip(self._unchecked, rows, strict=True):
            if not all(map(math.isfinite, row)):
                parts = dict(zip(("loss", "ce", "kl"), row, strict=True))
                terms = [name for name in ("ce", "kl") if not math.isfinite(parts[name])] or ["loss"]
                ids = self.draws.sample_ids(step, self.config.batch_size)
                raise ModelError(
                    "a loss must stay finite",
                    received=f"term {' and '.join(terms)} is {parts[terms[0]]} at iteration {step + 1}, "
                    f"records {', '.join(ids)}",
                    remedy="lower --lr, set --clip-grad 1, add --warmup, or look at those records; "
                    "the last checkpoint is untouched",
                )
        self._unchecked.clear()
        return list(rows[-1])

    def _end_of_interval(self, log: MetricsLog) -> None:
        """Validate, keep the best, save."""
        if self._validate is not None:
            metrics = self._validate(self.model)
            best = metrics.miou > self._now.best_miou
            if best:
                self._now.best_miou, self._now.best_step = metrics.miou, self._now.step
                self._write_weights("best")
            self._schedule.after_validation(metrics.miou)
            log.write("validation", self._now.step, metrics.to_json())
            self.observer.validated(self._now.step, metrics, best)
        self._save()

    def _write_weights(self, which: str) -> None:
        with disk_space_errors(self.run):
            write_weights(self.run, which, self.model)

    def _save(self) -> None:
        state = {
            "model": self.model.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "schedule": self._schedule.state_dict(),
            "progress": vars(self._now),
            "random": random_state(self.device),
        }
        save_checkpoint(self.run, state)

    def _restore(self) -> dict[str, Tensor] | None:
        state = load_checkpoint(self.run, self.device)
        if state is None:
            return None
        try:
            self.model.load_state_dict(state["model"])
        except RuntimeError as error:
            raise ModelError(
                "a run resumes with the model it was begun with",
                received=f"{self.config.model} has other tensors than the checkpoint in {self.run}",
                remedy="restore the model's code, or give another --out",
            ) from error
        load_optimizer(self._optimizer, state["optimizer"])
        self._schedule.load_state_dict(state["schedule"])
        self._now = _Progress(**state["progress"])
        random: dict[str, Tensor] = state["random"]
        return random

    def _finish(self) -> dict[str, Any]:
        now = self._now
        self._write_weights("last")
        if not now.best_step:  # nothing validated, or nothing that could be scored
            self._write_weights("best")
        result = {
            "iterations": now.step,
            "best_miou": now.best_miou if now.best_step else None,
            "best_step": now.best_step or now.step,
            "seconds": round(now.seconds, 3),
            "images_per_second": round(self.config.batch_size * now.step / max(now.seconds, 1e-9), 3),
            "wait_share": round(now.waited / max(now.seconds, 1e-9), 4),
            "prepared_seconds": round(now.prepared, 3),
        }
        write_json(self.run / "result.json", result)
        return result


@contextmanager
def _stop_requests() -> Iterator[threading.Event]:
    """SIGINT and SIGTERM ask for a stop between two steps; a second SIGINT stops at once."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def ask(number: int, _: object) -> None:
        if stop.is_set():
            signal.signal(signal.SIGINT, signal.default_int_handler)
            raise KeyboardInterrupt
        stop.set()

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
