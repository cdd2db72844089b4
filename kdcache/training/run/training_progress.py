"""The progress of a training on the console: a bar, notes, a line per validation."""

from rich.progress import Progress, TaskID

from kdcache.metrics import DepthMetrics, Metrics
from kdcache.training import Observer
from kdcache.training.feature_validation import FeatureScore


class TrainingProgress(Observer):
    """Shows a bar with losses and time left, and a line per validation."""

    def __init__(self, bar: Progress, title: str) -> None:
        self._bar = bar
        self._title = title
        self._task: TaskID | None = None
        self._scores: dict[str, str] = {}

    def started(self, *, step: int, iterations: int, parameters: int) -> None:
        """Add the bar, and print the number of parameters and iterations."""
        self._task = self._bar.add_task(self._title, total=iterations, completed=step, note="")
        self._bar.console.print(
            f"{self._title}: {parameters / 1e6:.2f} M parameters, iterations {step} to {iterations}", markup=False
        )

    def note(self, text: str) -> None:
        """Print a note above the bar."""
        self._bar.console.print(f"note: {text}", markup=False)

    def advanced(self, step: int) -> None:
        """Move the bar to a step."""
        assert self._task is not None
        self._bar.update(self._task, completed=step)

    def stepped(self, step: int, values: dict[str, float]) -> None:
        """Show loss, terms, speed and waiting time next to the bar."""
        assert self._task is not None
        terms = " ".join(f"{name} {values[name]:.3f}" for name in self._terms(values))
        speed = f"{values['images_per_second']:.1f} img/s, {100 * values['wait_share']:.0f} % waiting"
        self._bar.update(self._task, completed=step, note=self._note(f"loss {values['loss']:.3f} {terms} {speed}"))

    def _note(self, text: str) -> str:
        """Return the scores of the last validation, then a text: a narrow terminal cuts what stands last."""
        return f"{', '.join(f'{name} {score}' for name, score in self._scores.items())} {text}".strip()

    @staticmethod
    def _terms(values: dict[str, float]) -> list[str]:
        """Return the losses to show: none for cross-entropy only, and one per stream for several streams."""
        if streams := [name for name in values if name.endswith("/loss")]:
            return streams
        beside = ("loss", "lr", "images_per_second", "wait_share", "weak_view_seconds")
        terms = [name for name, value in values.items() if name not in beside and value]
        return terms if len(terms) > 1 else []

    def gradients(self, step: int, norms: dict[str, float]) -> None:
        """Print the gradient norms."""
        shown = ", ".join(f"{name} {norm:.3g}" for name, norm in norms.items())
        self._bar.console.print(f"  gradient norms at {step}: {shown}", markup=False)

    def balanced(self, step: int, tasks: dict[str, dict[str, float]]) -> None:
        """Print each task's gradient norm and ratio, if they were measured."""
        shown = [f"{task} {own['norm']:.3g} ({own['ratio']:.2g} times)" for task, own in tasks.items() if "norm" in own]
        if shown:
            self._bar.console.print(f"  gradient norms of the tasks at {step}: {', '.join(shown)}", markup=False)

    def validating(self, done: int, total: int) -> None:
        """Show the number of validated images next to the bar."""
        assert self._task is not None
        self._bar.update(self._task, note=self._note(f"validating {done}/{total}"))

    def validated(self, step: int, metrics: Metrics, best: bool) -> None:
        """Print the mIoU of a validation."""
        assert self._task is not None
        self._scores["mIoU"] = f"{100 * metrics.miou:.2f}"
        self._bar.update(self._task, completed=step, note=self._note(""))
        self._bar.console.print(f"  iteration {step}: mIoU {self._scores['mIoU']}{' (best)' if best else ''}")

    def validated_depth(self, step: int, metrics: DepthMetrics) -> None:
        """Print the depth rmse of a validation."""
        self._scores["depth rmse"] = f"{metrics.rmse:.3g} m"
        self._bar.console.print(f"  iteration {step}: depth rmse {metrics.rmse:.3g} m, abs_rel {metrics.abs_rel:.3g}")

    def validated_ema_depth(self, step: int, metrics: DepthMetrics) -> None:
        """Print the depth rmse of the moving average."""
        self._bar.console.print(f"  iteration {step}: depth rmse {metrics.rmse:.3g} m of the EMA")

    def validated_features(self, step: int, score: FeatureScore) -> None:
        """Print the feature loss of a validation."""
        self._scores["feature loss"] = f"{score.loss:.4g}"
        self._bar.console.print(
            f"  iteration {step}: feature loss {score.loss:.4g} on {score.samples} held-out samples"
        )

    def validated_ema_features(self, step: int, score: FeatureScore) -> None:
        """Print the feature loss of the moving average."""
        self._bar.console.print(f"  iteration {step}: feature loss {score.loss:.4g} of the EMA")

    def validated_ema(self, step: int, metrics: Metrics, best: bool) -> None:
        """Print the mIoU of the moving average."""
        self._scores["EMA"] = f"{100 * metrics.miou:.2f}"
        self._bar.console.print(
            f"  iteration {step}: mIoU {100 * metrics.miou:.2f} of the EMA{' (best)' if best else ''}"
        )
