"""The progress of a training on the console: a bar, notes, a line per validation."""

from collections.abc import Callable
from typing import Any

from rich.progress import Progress, TaskID

from kdcache.progress import say
from kdcache.tasks import DEPTH, SEGMENTATION
from kdcache.training import Observer
from kdcache.training.run.checkpointing import FEATURES
from kdcache.training.run.metrics_log import Score


class TrainingProgress(Observer):
    """Shows a training on the console: a progress bar with losses and time left, and a line for each validation.

    Args:
        bar: the console's progress display, to which the training adds its bar.
        title: the text before the bar.
    """

    def __init__(self, bar: Progress, title: str) -> None:
        self._bar = bar
        self._title = title
        self._task: TaskID | None = None
        self._scores: dict[str, str] = {}

    def started(self, *, step: int, iterations: int, parameters: int) -> None:
        """Show the progress bar, and print the number of parameters and the steps that this call of the training takes.

        Args:
            step: number of steps that are already done, 0 for a new training.
            iterations: number of steps of the whole training.
            parameters: number of parameters of the model.
        """
        self._task = self._bar.add_task(self._title, total=iterations, completed=step, note="")
        self._bar.console.print(
            f"{self._title}: {parameters / 1e6:.2f} M parameters, iterations {step} to {iterations}", markup=False
        )

    def note(self, text: str) -> None:
        """Print a note above the bar, or a warning if the text begins with `warning: `, also without a bar."""
        say(text, shown=not self._bar.console.quiet)

    def advanced(self, step: int) -> None:
        """Show on the progress bar that `step` steps are done."""
        assert self._task is not None
        self._bar.update(self._task, completed=step)

    def stepped(self, step: int, values: dict[str, float]) -> None:
        """Show next to the bar, from `values`: loss, loss terms, images per second and share of time spent waiting."""
        assert self._task is not None
        terms = " ".join(f"{name} {values[name]:.3f}" for name in self._terms(values))
        speed = f"{values['images_per_second']:.1f} img/s, {100 * values['wait_share']:.0f} % waiting"
        self._bar.update(self._task, completed=step, note=self._note(f"loss {values['loss']:.3f} {terms} {speed}"))

    def _note(self, text: str) -> str:
        """Return the scores of the last validation, then the text, because a narrow terminal cuts the end."""
        return f"{', '.join(f'{name} {score}' for name, score in self._scores.items())} {text}".strip()

    @staticmethod
    def _terms(values: dict[str, float]) -> list[str]:
        """Return the names of the losses to show: none for cross-entropy only, one per stream for several streams."""
        if streams := [name for name in values if name.endswith("/loss")]:
            return streams
        beside = ("loss", "lr", "images_per_second", "wait_share", "weak_view_seconds")
        terms = [name for name, value in values.items() if name not in beside and value]
        return terms if len(terms) > 1 else []

    def gradients(self, step: int, norms: dict[str, float]) -> None:
        """Print the gradient norm of each loss term at optimizer step `step`. `norms` has name of a term -> norm."""
        texts = ", ".join(f"{name} {norm:.3g}" for name, norm in norms.items())
        self._bar.console.print(f"  gradient norms at {step}: {texts}", markup=False)

    def balanced(self, step: int, tasks: dict[str, dict[str, float]]) -> None:
        """Print the gradient norm of each of two tasks, and its ratio to the other task's norm, if they were measured.

        `tasks` maps a task to its values, in which `norm` and `ratio` were measured at optimizer step `step`.
        """
        texts = [
            f"{task} {values['norm']:.3g} ({values['ratio']:.2g} times)"
            for task, values in tasks.items()
            if "norm" in values
        ]
        if texts:
            self._bar.console.print(f"  gradient norms of the tasks at {step}: {', '.join(texts)}", markup=False)

    def validating(self, done: int, total: int) -> None:
        """Show next to the bar that `done` of `total` images are validated."""
        assert self._task is not None
        self._bar.update(self._task, note=self._note(f"validating {done}/{total}"))

    def validated(self, step: int, task: str, score: Score, *, best: bool, ema: bool) -> None:
        """Print the score of a validation, and show it next to the bar.

        Args:
            step: number of finished steps.
            task: the task that was validated.
            score: the score. Its name and unit depend on the task.
            best: True for the best score so far. For segmentation, the printed line says so.
            ema: True for the score of the averaged weights. Next to the bar, it is shown only for segmentation.
        """
        name, value, more = _SHOWN[task](score)
        mark = " (best)" if best and task == SEGMENTATION else ""
        if not ema:
            self._scores[name] = value
        elif task == SEGMENTATION:
            self._scores["EMA"] = value
        if not ema and self._task is not None:
            self._bar.update(self._task, completed=step, note=self._note(""))
        self._bar.console.print(f"  iteration {step}: {name} {value}{' of the EMA' if ema else more}{mark}")


_SHOWN: dict[str, Callable[[Any], tuple[str, str, str]]] = {
    SEGMENTATION: lambda score: ("mIoU", f"{100 * score.miou:.2f}", ""),
    DEPTH: lambda score: ("depth rmse", f"{score.rmse:.3g} m", f", abs_rel {score.abs_rel:.3g}"),
    FEATURES: lambda score: ("feature loss", f"{score.loss:.4g}", f" on {score.samples} held-out samples"),
}
"""The name of a score, its text, and what follows it."""
