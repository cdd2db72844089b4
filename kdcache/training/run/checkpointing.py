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
"""The name, in addition to the tasks, of the validation by feature loss."""


@dataclass(frozen=True)
class Judge:
    """The number that chooses a task's best weights, such as mIoU for segmentation.

    Attributes:
        prefix: the text before the number's name in logs, such as `depth_`.
        score: the name of the number, an attribute of `Score`, such as `miou`.
        less: True if a smaller number is better.
    """

    prefix: str
    score: str
    less: bool

    def value(self, score: Score) -> float:
        """Return the task's number in `score`, negated if smaller is better. The largest value is always the best."""
        value = float(getattr(score, self.score))
        return -value if self.less else value

    def figure(self, value: float) -> dict[str, float]:
        """Return the task's best number under its key in result.json, such as {"best_miou": 0.42}.

        `value` is the best result of `Judge.value`. If that method negated it, the original sign is restored.
        """
        return {f"best_{self.prefix}{self.score}": -value if self.less else value}


JUDGES = {
    task.name: Judge("" if task.name == SEGMENTATION else f"{task.name}_", task.score, task.less)
    for task in TASKS.values()
} | {FEATURES: Judge("feature_", "loss", less=True)}


@dataclass
class Progress:
    """The plain numbers of a checkpoint.

    Attributes:
        step: number of finished steps.
        best_score: the best validation so far, where higher is better: mIoU, or without it a negated error or feature
            loss.
        best_step: the step of the best validation.
        ema_best_score: the same as `best_score`, for the moving average of the weights.
        ema_best_step: the step of the average's best validation.
        seconds: seconds of training.
        cpu_seconds: CPU seconds of the steps, of all threads of this process.
        waited: the part of `seconds` that was spent waiting for data.
        prepared: seconds of preparing a step, which do not count as training.
        unjudged: True if the validation after the last step is still to be done, because a damaged sample stopped it.
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
    """Saves and restores the state of a training in its folder. Also writes best and last weights, and result.json.

    All processes must call each method. Only the first process writes.

    Args:
        run: the run's folder.
        config: the training's settings.
        step: the step with model, loss and optimizer.
        schedule: the learning-rate schedule.
        world: the processes that train together.
        ema: the moving average of the model's weights, or None.
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
        """Continue from the checkpoint in the run's folder, if there is one.

        Returns: this process's saved `random_state`. None if there is no checkpoint, or if it was saved by so few
            processes that it has no state for this one.
        Raises: ModelError if the checkpoint is of another model. RecipeError if it cannot be read.
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
        """Save the model's weights as the best ones if `score` is above all earlier scores. Return True if so.

        True for `ema` saves the moving average of the weights instead. Its scores are compared only with each other.
        """
        now = self.now
        if not score > (now.ema_best_score if ema else now.best_score):
            return False
        if ema:
            now.ema_best_score, now.ema_best_step = score, now.step
        else:
            now.best_score, now.best_step = score, now.step
        self._write_weights("best", ema=ema)
        return True

    def _write_weights(self, name: str, *, ema: bool = False) -> None:
        """Write the weights as `best` or `last`. With `ema`, write their moving average."""
        averages = self._ema.in_place() if ema and self._ema is not None else nullcontext()
        with self._world.together(), disk_space_errors(self._run):
            if self._world.first:
                with averages:
                    write_weights(self._run, f"{name}-ema" if ema else name, self._model)

    def save(self) -> None:
        """Replace the checkpoint by the current state."""
        state_here, *others = self._world.gather(random_state(self._device))
        with self._world.together():
            if self._world.first:
                state = {
                    "model": self._model.state_dict(),
                    "criterion": self._criterion.state_dict(),
                    "optimizer": self._optimizer.state_dict(),
                    "schedule": self._schedule.state_dict(),
                    "progress": vars(self.now),
                    "random": {**state_here, "others": others} if others else state_here,
                }
                if self._ema is not None:
                    state[EMA] = self._ema.state_dict()
                save_checkpoint(self._run, state)

    def keep(self) -> None:
        """Keep the checkpoint that was just saved as `checkpoints/step-NNNNNN.pt`. Later saves do not replace it.

        With several processes, only the first writes it.
        """
        with self._world.together():
            if self._world.first:
                keep_checkpoint(self._run, self.now.step)

    def finish(self, judged: str = SEGMENTATION) -> dict[str, Any]:
        """Write the last weights and result.json, and return the content of result.json.

        `judged` says which score chose the best weights: a task's name for its score, or `FEATURES` for the feature
        loss.
        """
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
