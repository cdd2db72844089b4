"""Send a training's metrics to TensorBoard or Weights & Biases, in addition to metrics.jsonl.

| `--log` | where it goes | a resumed run |
| --- | --- | --- |
| tensorboard | event files in the run folder: `tensorboard --logdir runs` | continues from its checkpoint |
| wandb | by its environment; into RUN/wandb without a login | continues under the id in RUN/wandb-id.txt |

A run has the name of its folder. Its configuration is the recipe. Scalars are:

- `train/loss`, `train/<term>`, `train/lr`, `train/images_per_second`, `gradients/<term>`
- `val/miou`, `val/seg_miou` (the same number, for charts with another task), `val/acc` (of all pixels), `val/macc`,
  `val/iou/<class>`, `val/depth_rmse` and the other depth metrics, with `--val-share` `val/feature_loss`, and with
  `--ema` the same below `val_ema/`
- with two tasks, of each: `train/balance/<task>` (weight), `train/tasks/<task>` (loss), `train/gradients/<task>` (norm
  of its gradient), `train/ratio/<task>` (that norm relative to the other task's)

Every validation adds pictures of a few fixed validation samples, `samples/<sample>/<task>`: image, ground truth,
prediction, errors (`sample_panels.py`).

A failing logger does not stop the training: it is dropped after a note.
"""

import importlib.util
import math
import os
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from kdcache.display import public_values
from kdcache.errors import RecipeError
from kdcache.metrics import Metrics
from kdcache.metrics.evaluators import EVALUATORS
from kdcache.metrics.figures import Array
from kdcache.tasks import TASKS
from kdcache.training.feature_validation import FeatureScore
from kdcache.training.run.metrics_log import Observer, Score

PROJECT = "kdcache"
WANDB_ID = "wandb-id.txt"
SHOWN = 160
"""Characters of a foreign error message that a note repeats at most."""


def check_loggers(names: Sequence[str]) -> None:
    """Raise RecipeError if the package of a logger in `names` (`tensorboard` or `wandb`) is not installed."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise RecipeError(
                f"Missing the package {name} for --log {name}",
                fix=f"In a clone of kdcache: pip install '.[{name}]'. Or leave --log {name} out.",
            )


@dataclass(frozen=True)
class Beginning:
    """What a logger needs to know when a training begins.

    Attributes:
        run: the run's folder.
        recipe: the settings as plain values: name -> value.
        step: the number of finished steps, above 0 if the training resumes.
        note: is called with notes for the user.
    """

    run: Path
    recipe: Mapping[str, Any]
    step: int
    note: Callable[[str], None]

    @property
    def name(self) -> str:
        """The name of the run's folder."""
        return self.run.resolve().name


class Sink(Protocol):
    """The interface of a logger, which receives scalars and pictures."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Log the scalars of a step: name, such as `train/loss` -> number."""

    def draw(self, step: int, pictures: Mapping[str, Array]) -> None:
        """Log the pictures of a step: name, such as `samples/0001/depth` -> uint8 RGB (H, W, 3)."""

    def close(self, completed: bool) -> None:
        """End the log. `completed` is False if the training was stopped."""


class Loggers(Observer):
    """Sends a training's metrics to one or more loggers. A logger that fails is dropped, and the training continues.

    Args:
        names: the loggers: `tensorboard`, `wandb`. Their packages must be installed.
        run: the run's folder.
        recipe: the settings as plain values: name -> value. Folders of this machine are not sent.
        note: is called with errors.
        panels: returns pictures for a validation: name -> uint8 RGB (H, W, 3). None draws no pictures.
    """

    def __init__(
        self,
        names: Sequence[str],
        run: Path,
        recipe: Mapping[str, Any],
        note: Callable[[str], None],
        panels: Callable[[], Mapping[str, Array]] | None = None,
    ) -> None:
        self._names = tuple(names)
        self._panels = panels
        self._drawn_at: int | None = None
        self._run = run
        self._recipe = recipe
        self._note = note
        self._sinks: dict[str, Sink] = {}

    def started(self, *, step: int, iterations: int, parameters: int) -> None:
        """Open every logger, and give it the recipe, the number of the model's parameters and `step`.

        `step` is the number of finished steps, above 0 if the training resumes. `iterations` is not used.
        """
        recipe = {**public_values(self._recipe), "parameters": parameters}
        beginning = Beginning(self._run, recipe, step, self._note)
        for name in self._names:
            try:
                self._sinks[name] = SINKS[name](beginning)
            except Exception as error:
                self._failed(name, error)

    def stepped(self, step: int, values: dict[str, float]) -> None:
        """Send a step's values to every logger, each as `train/<name>`. NaN and infinite values are left out."""
        self._write(step, {f"train/{name}": value for name, value in values.items()})

    def gradients(self, step: int, norms: dict[str, float]) -> None:
        """Send a step's gradient norms, name of a loss term -> norm, as `gradients/<term>`."""
        self._write(step, {f"gradients/{name}": norm for name, norm in norms.items()})

    def balanced(self, step: int, tasks: dict[str, dict[str, float]]) -> None:
        """Send each task's loss and weight, or if gradient norms were measured, each task's norm and its ratio instead.

        The ratio is to the other task's norm. The names are `train/tasks/<task>` and `train/balance/<task>`, or
        `train/gradients/<task>` and `train/ratio/<task>`.

        Args:
            step: the optimizer step of the numbers.
            tasks: task -> `loss` and `weight`, and if they were measured also `norm` and `ratio`.
        """
        measured = all("norm" in values for values in tasks.values())
        rooms = {"gradients": "norm", "ratio": "ratio"} if measured else {"balance": "weight", "tasks": "loss"}
        self._write(
            step, {f"train/{room}/{task}": values[key] for room, key in rooms.items() for task, values in tasks.items()}
        )

    def validated(self, step: int, task: str, score: Score, *, best: bool, ema: bool) -> None:
        """Send a validation's score to every logger as `val/<name>`, or `val_ema/<name>` for the moving average.

        With a step's first score that is not of the moving average, also send pictures. The class's argument `panels`
        returns them.
        """
        place = "val_ema" if ema else "val"
        self._write(step, {f"{place}/{name}": value for name, value in _figures(task, score).items()})
        if task in TASKS and not ema:
            self._draw(step)

    def ended(self, *, completed: bool) -> None:
        """Close every logger, and tell each whether the training was completed."""
        self._each(lambda sink: sink.close(completed))
        self._sinks.clear()

    def _draw(self, step: int) -> None:
        """Send the pictures of a step, once, because a validation may be of two tasks."""
        if self._panels is None or self._drawn_at == step or not self._sinks:
            return
        self._drawn_at = step
        try:
            pictures = {f"samples/{name}": picture for name, picture in self._panels().items()}
        except Exception as error:
            self._panels = None
            self._note(f"no pictures of samples from now on: {_reason(error)}")
            return
        self._each(lambda sink: sink.draw(step, pictures))

    def _write(self, step: int, values: Mapping[str, float]) -> None:
        # What is not a number has no place in a plot: a class that does not occur.
        finite = {name: float(value) for name, value in values.items() if math.isfinite(value)}
        self._each(lambda sink: sink.write(step, finite))

    def _each(self, act: Callable[[Sink], None]) -> None:
        for name, sink in list(self._sinks.items()):
            try:
                act(sink)
            except Exception as error:
                del self._sinks[name]
                self._failed(name, error)

    def _failed(self, name: str, error: Exception) -> None:
        self._note(f"--log {name} failed and is left out from now on; metrics.jsonl continues ({_reason(error)})")


def _figures(task: str, score: Score) -> dict[str, float]:
    """Return the figures of a score, with the names that loggers show."""
    if isinstance(score, Metrics):
        classes = {f"iou/{name}": iou for name, iou in zip(score.class_names, score.iou, strict=True)}
        return {"miou": score.miou, "seg_miou": score.miou, "acc": score.aacc, "macc": score.macc} | classes
    if isinstance(score, FeatureScore):
        return {"feature_loss": score.loss}
    return {f"{task}_{name}": getattr(score, name) for name in EVALUATORS[task].figures}


def _reason(error: Exception) -> str:
    """Return another library's error in one short line."""
    return f"{type(error).__name__}: {(str(error) or 'without a message').splitlines()[0]}"[:SHOWN]


class TensorBoard:
    """A logger that writes TensorBoard event files into the run's folder.

    `beginning` has this folder, the recipe and the number of finished steps.
    """

    def __init__(self, beginning: Beginning) -> None:
        from torch.utils.tensorboard import SummaryWriter

        purge = beginning.step + 1 if beginning.step else None
        self._writer = SummaryWriter(str(beginning.run), purge_step=purge)
        lines = [f"    {name} = {value!r}" for name, value in beginning.recipe.items()]
        self._writer.add_text("recipe", "\n".join(lines), beginning.step)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Add the scalars of a step to the event file: name -> number."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def draw(self, step: int, pictures: Mapping[str, Array]) -> None:
        """Add the pictures of a step to the event file: name (`samples/<sample>/<task>`) -> uint8 RGB (H, W, 3)."""
        for name, picture in pictures.items():
            self._writer.add_image(name, picture, step, dataformats="HWC")

    def close(self, completed: bool) -> None:
        """Close the event file, whether the training completed or not."""
        self._writer.close()


class WandB:
    """A logger that writes to a run of Weights & Biases, in the project `kdcache` or WANDB_PROJECT.

    The run is uploaded if the user is logged in (`wandb login`, WANDB_API_KEY, WANDB_MODE). Otherwise it stays in the
    run's folder. Plots use `step` instead of wandb's own count, which cannot go back to a checkpoint. `beginning` has
    the folder, the recipe and the number of finished steps.
    """

    def __init__(self, beginning: Beginning) -> None:
        import wandb

        # Named even where the environment names it: wandb reads the environment once per process.
        mode: Any = os.environ.get("WANDB_MODE") or (None if wandb.login(prompt=False) else "offline")
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=beginning.name,
            id=_wandb_id(beginning.run),
            dir=str(beginning.run),
            config=dict(beginning.recipe),
            resume="allow",
            reinit="create_new",
            mode=mode,
            settings=wandb.Settings(console="off", silent=True),
        )
        self._run.define_metric("*", step_metric="step")
        if self._run.url:
            beginning.note(f"wandb: {self._run.url}")
        elif mode == "offline" and "WANDB_MODE" not in os.environ:
            beginning.note(
                f"wandb: nobody is logged in, so the run stays in {beginning.run}/wandb; wandb sync sends it"
            )

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Log scalars, name -> number, together with the step."""
        self._run.log({**values, "step": step})

    def draw(self, step: int, pictures: Mapping[str, Array]) -> None:
        """Log pictures, name -> uint8 RGB (H, W, 3), together with the step."""
        import wandb

        self._run.log({**{name: wandb.Image(picture) for name, picture in pictures.items()}, "step": step})

    def close(self, completed: bool) -> None:
        """Finish the wandb run, with exit code 0 if `completed`, else 1."""
        self._run.finish(exit_code=0 if completed else 1)


def _wandb_id(run: Path) -> str:
    """Return the id of the wandb run. It is made once, so a resumed training continues in the same wandb run."""
    path = run / WANDB_ID
    if not path.is_file():
        path.write_text(uuid.uuid4().hex[:12] + "\n", encoding="utf-8")
    return path.read_text(encoding="utf-8").strip()


SINKS: dict[str, Callable[[Beginning], Sink]] = {"tensorboard": TensorBoard, "wandb": WandB}
