"""The files that a run writes while it trains, and resumes from: weights, checkpoints, the result."""

import math
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from kdcache.distill import Criterion
from kdcache.errors import ModelError, RecipeError
from kdcache.models import SegmentationModel
from kdcache.models.run import write_weights
from kdcache.run_folder import RESULT
from kdcache.store.backend.durable import disk_space_errors
from kdcache.tasks import SEGMENTATION, TASKS
from kdcache.training.config import TrainConfig
from kdcache.training.distributed import World
from kdcache.training.run.checkpoint_file import EMA, keep_checkpoint, load_checkpoint, save_checkpoint
from kdcache.training.run.metrics_log import Score, write_json
from kdcache.training.step.eager import EagerStep, random_state
from kdcache.training.step.ema import ModelEma
from kdcache.training.step.optim import Schedule, load_optimizer

FEATURES = "features"
"""What judges a training without labels."""


@dataclass(frozen=True)
class Judge:
    """What chooses the best weights.

    Attributes:
        prefix: the beginning of its names in logs. score: the figure that chooses. less: whether less is better.
    """

    prefix: str
    score: str
    less: bool

    def value(self, score: Score) -> float:
        """Return the figure that chooses, with the sign that makes the largest the best."""
        value = float(getattr(score, self.score))
        return -value if self.less else value

    def figure(self, value: float) -> dict[str, float]:
        """Reverse `value`. Return the figure by its name in result.json."""
        return {f"best_{self.prefix}{self.score}": -value if self.less else value}


JUDGES = {
    task.name: Judge("" if task.name == SEGMENTATION else f"{task.name}_", task.score, task.less)
    for task in TASKS.values()
} | {FEATURES: Judge("feature_", "loss", less=True)}


@dataclass
class Progress:
    """The plain values of a checkpoint, stored with the states of model, loss, optimizer and schedule.

    Attributes:
        seconds: seconds of training.
        cpu_seconds: CPU time of the steps, of all threads of this process.
        best_score: the value of the judge: mIoU, or without it a negative error, as rmse or the loss of features.
        waited: part of `seconds` spent waiting for data.
        prepared: seconds of preparing a step, which do not count as training.
        unjudged: whether the validation of the last step is still due because a damaged sample stopped it.
    """

    step: int = 0
    best_score: float = -math.inf
    best_step: int = 0
    ema_best_score: float = -math.inf
    ema_best_step: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    waited: float = 0.0
    prepared: float = 0.0
    unjudged: bool = False


class RunState:
    """The owners of everything that a checkpoint holds, and its folder.

    Args:
        step: owner of the model, loss and optimizer.
        ema: moving average of the model, or None.
        world: all processes call every method. The first one writes.
    """

    def __init__(
        self,
        run: Path,
        config: TrainConfig,
        step: EagerStep,
        schedule: Schedule,
        world: World,
        ema: ModelEma | None = None,
    ) -> None:
        self._run = run
        self._config = config
        self._model: SegmentationModel = step.model
        self._criterion: Criterion = step.criterion
        self._optimizer = step.optimizer
        self._device = step.device
        self._schedule = schedule
        self._ema = ema
        self._world = world
        self.now = Progress()

    def restore(self) -> dict[str, Tensor] | None:
        """Continue from the checkpoint. Return this rank's random state, or None if it was not saved.

        Raises: ModelError if the checkpoint is of another model; RecipeError if it cannot be read.
        """
        state = load_checkpoint(self._run, self._device)
        if state is None:
            return None
        try:
            self._model.load_state_dict(state["model"])
            self._criterion.load_state_dict(state["criterion"])
        except RuntimeError as error:
            raise ModelError(
                f"Cannot resume: {self._config.run.model} has other tensors than the checkpoint in {self._run}",
                fix="Restore the model's code, or give another --out.",
            ) from error
        load_optimizer(self._optimizer, state["optimizer"])
        self._schedule.load_state_dict(state["schedule"])
        if self._ema is not None:
            self._ema.load_state_dict(state[EMA])
        self.now = Progress(**state["progress"])
        states = [state["random"], *state["random"].get("others", [])]
        return states[self._world.rank] if self._world.rank < len(states) else None

    def check_same(self) -> None:
        """Raise RecipeError if the processes would continue from different steps."""
        steps = self._world.gather(self.now.step)
        if len(set(steps)) > 1:
            raise RecipeError(
                f"The processes begin at different checkpoints: at the steps {', '.join(map(str, steps))}",
                fix=f"Let every machine see the folder {self._run}, under this path.",
            )

    def keep_best(self, score: float, *, ema: bool = False) -> bool:
        """Save the weights as the best, and return True, if no earlier score is higher. `ema` has its own best."""
        now = self.now
        if not score > (now.ema_best_score if ema else now.best_score):
            return False
        if ema:
            now.ema_best_score, now.ema_best_step = score, now.step
        else:
            now.best_score, now.best_step = score, now.step
        self._write_weights("best", ema=ema)
        return True

    def _write_weights(self, which: str, *, ema: bool = False) -> None:
        """Write the weights of `which` (best or last), or with `ema` their moving average."""
        averages = self._ema.in_place() if ema and self._ema is not None else nullcontext()
        with self._world.together(), disk_space_errors(self._run):
            if self._world.first:
                with averages:
                    write_weights(self._run, f"{which}-ema" if ema else which, self._model)

    def save(self) -> None:
        """Replace the checkpoint."""
        own, *others = self._world.gather(random_state(self._device))
        with self._world.together():
            if self._world.first:
                state = {
                    "model": self._model.state_dict(),
                    "criterion": self._criterion.state_dict(),
                    "optimizer": self._optimizer.state_dict(),
                    "schedule": self._schedule.state_dict(),
                    "progress": vars(self.now),
                    "random": {**own, "others": others} if others else own,
                }
                if self._ema is not None:
                    state[EMA] = self._ema.state_dict()
                save_checkpoint(self._run, state)

    def keep(self) -> None:
        """Keep the checkpoint that was just saved under a permanent name."""
        with self._world.together():
            if self._world.first:
                keep_checkpoint(self._run, self.now.step)

    def finish(self, judged: str = SEGMENTATION) -> dict[str, Any]:
        """Write the last weights and result.json, and return its content. `judged`: the task (or FEATURES) of best."""
        now = self.now
        self._write_weights("last")
        if not now.best_step:  # nothing validated, or nothing that could be scored
            self._write_weights("best")
        result = {
            "iterations": now.step,
            "best_miou": None,
            "best_step": now.best_step or now.step,
            "seconds": round(now.seconds, 3),
            "cpu_seconds": round(now.cpu_seconds, 3),
            "images_per_second": round(self._config.optimizer.batch_size * now.step / max(now.seconds, 1e-9), 3),
            "wait_share": round(now.waited / max(now.seconds, 1e-9), 4),
            "prepared_seconds": round(now.prepared, 3),
        }
        result |= JUDGES[judged].figure(now.best_score) if now.best_step else {}
        if self._ema is not None:
            ema = JUDGES[judged].figure(now.ema_best_score) if now.ema_best_step else {}
            result |= {f"ema_{name}": value for name, value in ema.items()}
            self._write_weights("last", ema=True)
            if not now.ema_best_step:
                self._write_weights("best", ema=True)
            result.setdefault("ema_best_miou", None)
            result["ema_best_step"] = now.ema_best_step or now.step
        with self._world.together(), disk_space_errors(self._run):
            if self._world.first:
                write_json(self._run / RESULT, result)
        return result
