"""How each task is compared and drawn: one entry per task in `VIEWS`."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from kdcache.analysis.predict import overlay as blend
from kdcache.data import ClassList
from kdcache.metrics.depth_figures import UNKNOWN_RGB, DepthMap, absolute_error, bar_end
from kdcache.metrics.evaluators import EVALUATORS, Figure
from kdcache.metrics.figures import VOID_RGB, Array, colour_ids, error_colour, mark_wrong
from kdcache.tasks import DEPTH, IGNORE_INDEX, SEGMENTATION, TASKS

Picture = Array | DepthMap
Panel = tuple[str, Picture]
"""A picture, with its title."""
Legend = list[tuple[str, tuple[int, int, int]]]
"""Names and their colours."""


OPACITY = 0.55
"""Opacity of the colours of classes over an image."""


@dataclass(frozen=True, kw_only=True)
class TaskView(ABC):
    """How the scores of a task are shown in tables, and its maps in pictures. Each task has one subclass.

    Attributes:
        task: the task's name.
        score: the name of the task's score, such as "mIoU".
        called: the same name with an article.
        unit: the unit of the score as text.
        stem: the name of the score in file names.
        columns: names of the metrics in a table of scores, the score first.
        times: the factor from a score to the number that tables show: 100 for percent.
        short: the score's header in a small table, and the number of decimals there.
        distance: the unit of differences between scores.
        digits: the number of decimals of differences as text.
        headline: the first words of a title over a table of differences.
        no_label: the title of the panel of errors, if an image has no label.
        no_score: the text in place of the score, if an image has no label.
        prefix: text before the titles of panels, such as "depth, ".
        before: text before the titles of columns, such as "rmse ".
    """

    task: str
    score: str
    called: str
    unit: str
    stem: str
    columns: tuple[str, ...]
    times: int
    short: tuple[str, int]
    distance: str
    digits: int
    headline: str
    no_label: str
    no_score: str
    prefix: str = ""
    before: str = ""

    @property
    def figures(self) -> Mapping[str, Figure]:
        """How tables show each metric of the task: name -> `Figure`, with a column header and the value's format."""
        return EVALUATORS[self.task].figures

    @property
    def less(self) -> bool:
        """True if a smaller score is better."""
        return TASKS[self.task].less

    @property
    def words(self) -> str:
        """The unit of differences, with the score's name: "points of mIoU"."""
        return f"{self.distance} of {self.score}"

    @property
    def title(self) -> str:
        """The title of a table of differences between methods and their baseline."""
        return f"{self.headline}, {self.words}" + (" (less is better)" if self.less else "")

    def spans(self, seeds: str) -> str:
        """Return the explanation of a report's column of differences: the unit, the score and the interval.

        The text ends with `seeds`, a count in words such as "3 seeds". For metrics such as rmse, it ends with "less is
        better" instead.
        """
        return f"{self.words}, with their 95 % interval" + ("; less is better" if self.less else f" over {seeds}")

    def score_text(self, value: float) -> str:
        """Return a score as text without its unit: mIoU in percent, rmse in metres, and "-" for NaN."""
        return self.figures[TASKS[self.task].score].text(value)

    def gap_text(self, gap: float) -> str:
        """Return a difference of scores as text with its sign: mIoU 0.012 as "+1.20", in points, and rmse in metres."""
        return f"{self.times * gap:+.{self.digits}f}"

    def scale(self, maps: Iterable[Array]) -> float:
        """Return the largest value on the colour bar that several maps (H, W) share, or 1 if the task has no bar."""
        return 1.0

    def error_scale(self, pairs: Iterable[tuple[Array, Array]]) -> float:
        """Return the largest value on the colour bar that the error pictures of some samples share.

        For depth this is in metres. For segmentation it is 1, because pictures of classes have no colour bar.

        Args:
            pairs: (prediction, label) of each sample.
        """
        return 1.0

    def overlay(self, pixels: Array, answer: Array, classes: ClassList) -> list[Panel]:
        """Return panels, pairs (title, picture), of a prediction drawn over its image. Return [] for depth.

        Args:
            pixels: the image, uint8 (H, W, 3).
            answer: the prediction (H, W).
            classes: names and colours of the classes.
        """
        return []

    @abstractmethod
    def picture(self, values: Array, classes: ClassList, scale: float) -> Picture:
        """Return a map (H, W) of predictions or labels as a picture.

        `classes` has the colours of the classes. `scale` is the value at the end of the colour bar of depth.
        """

    @abstractmethod
    def error(
        self, pixels: Array, answer: Array, label: Array, classes: ClassList, scale: float | None = None
    ) -> Panel:
        """Return a panel of a prediction's errors: a pair (title, picture).

        Args:
            pixels: the image, uint8 (H, W, 3).
            answer: the prediction (H, W).
            label: the label (H, W).
            classes: names and colours of the classes.
            scale: the error at the end of the colour bar of depth. None takes a round value above most of these errors.
        """

    @abstractmethod
    def legend(self, maps: Sequence[Array], classes: ClassList, *, errors: bool) -> Legend:
        """Return names and colours for the values in maps (H, W).

        `classes` has the names and colours of the classes. `errors` says whether pictures of errors are also drawn.
        """


class _Segmentation(TaskView):
    def overlay(self, pixels: Array, answer: Array, classes: ClassList) -> list[Panel]:
        return [("overlay", blend(pixels, answer, classes, OPACITY))]

    def picture(self, values: Array, classes: ClassList, scale: float) -> Picture:
        return colour_ids(values, classes.colours)

    def error(
        self, pixels: Array, answer: Array, label: Array, classes: ClassList, scale: float | None = None
    ) -> Panel:
        return "errors", mark_wrong(pixels, label, answer, error_colour(classes.colours))

    def legend(self, maps: Sequence[Array], classes: ClassList, *, errors: bool) -> Legend:
        present = sorted({int(number) for ids in maps for number in np.unique(ids)} - {IGNORE_INDEX})
        entries: Legend = [(classes.names[number], classes.colours[number]) for number in present]
        entries.append(("void", VOID_RGB))
        return [*entries, ("wrong", error_colour(classes.colours))] if errors else entries


class _Depth(TaskView):
    def scale(self, maps: Iterable[Array]) -> float:
        return bar_end(maps)

    def error_scale(self, pairs: Iterable[tuple[Array, Array]]) -> float:
        return bar_end(absolute_error(answer, label) for answer, label in pairs)

    def picture(self, values: Array, classes: ClassList, scale: float) -> Picture:
        return DepthMap(values, scale)

    def error(
        self, pixels: Array, answer: Array, label: Array, classes: ClassList, scale: float | None = None
    ) -> Panel:
        error = absolute_error(answer, label)
        known = error[np.isfinite(error)]
        mean = f"mean {known.mean():.3g} m" if known.size else "no label"
        return f"absolute error: {mean}", DepthMap(error, bar_end([error]) if scale is None else scale, "error")

    def legend(self, maps: Sequence[Array], classes: ClassList, *, errors: bool) -> Legend:
        return [("unknown depth", UNKNOWN_RGB)]


VIEWS: Mapping[str, TaskView] = {
    view.task: view
    for view in (
        _Segmentation(
            task=SEGMENTATION,
            score="mIoU",
            called="a mIoU",
            unit="%",
            stem="iou",
            columns=("miou", "macc", "aacc"),
            times=100,
            short=("mIoU %", 1),
            distance="points",
            digits=2,
            headline="Distance to the baseline",
            no_label="no label",
            no_score="mIoU - %",
        ),
        _Depth(
            task=DEPTH,
            score="rmse",
            called="an rmse",
            unit="m",
            stem="rmse",
            columns=("rmse", "abs_rel", "delta1"),
            times=1,
            short=("depth rmse m", 3),
            distance="metres",
            digits=3,
            headline="Distance to the baseline in depth",
            no_label="no label of depth",
            no_score="depth",
            prefix="depth, ",
            before="rmse ",
        ),
    )
}
"""How each task is compared and drawn, in the order of `TASKS`."""
FURTHER = tuple(task for task in VIEWS if task != SEGMENTATION)
"""The tasks that have tables and pictures after those of segmentation."""
