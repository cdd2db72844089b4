"""Checks of a training's numbers: losses must stay finite, and extreme gradients are worth a note."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from kdcache.errors import MismatchError, ModelError
from kdcache.metrics import Metrics, at_chance
from kdcache.run_folder import LITTLE, MUCH
from kdcache.store import Cache
from kdcache.tasks import numeric
from kdcache.training.distributed import World

MUCH_AT_FIRST = 100.0
"""What `MUCH` is at the first step: there `dist` at weight 1 is at 10 to 25, and later at 1 to 1.6."""
STARVING = 0.1
"""The norm of a task's gradient, beside the other task's, below which it starves, if it is so at two looks running."""
WON, WON_LOOKS = 0.01, 10
"""A discriminator has won whose loss was below the first at so many logged steps running: chance is log 2, or 1/4."""
UNSURE_LOOKS = 3
"""Logged steps running without a confident pixel that are worth a note."""
SOON = 100
"""The step of a second measurement, where norms have settled and little is lost yet."""

TARGET_VALUES = "targets/segmentation/values"
_LEAST_CLASSES = 4
_SURE, _SHARE_OF_SURE = 0.9, 0.01
_ROUNDING = 0.04
"""The rounding of five bits of mantissa, which codec small keeps, and of their mean."""


def measures_norms(step: int, every: int) -> bool:
    """Return True if gradient norms are measured at a step (from 0).

    That is at every multiple of `every`, and also at step 100 if `every` is above 100. With `every` of 0 they are
    never measured.
    """
    return every > 0 and (step % every == 0 or step == SOON < every)


def check_logits(cache: Cache, *, needed: bool = True) -> None:
    """Check that a cache's teacher returned logits and not probabilities, by its first record.

    Probabilities of a pixel sum to 1 and none is negative, which real logits with more than a few classes never
    satisfy.

    Args:
        cache: an open cache.
        needed: False accepts a cache without segmentation targets.
    Raises: MismatchError for probabilities. StoreError if segmentation targets are needed and missing.
    """
    if cache.manifest.segmentation is None and not needed:
        return
    if not cache.head.dense or cache.num_classes < _LEAST_CLASSES:
        return
    values_Chw = cache.read(0, [TARGET_VALUES])[TARGET_VALUES].astype(np.float64)
    largest_hw = (1 - values_Chw.sum(0)) / len(values_Chw)
    sharp = (values_Chw.min(0) < -_SURE).mean() > _SHARE_OF_SURE
    if sharp and (values_Chw + largest_hw >= -_ROUNDING).all():
        raise MismatchError(
            f"{cache.place} holds probabilities, not logits: of each pixel of its first record they sum to 1",
            fix="Build it again from a teacher that returns what comes before its softmax. Labels only can be learnt "
            "from this cache with --method none.",
        )


def outcome(metrics: Metrics) -> str | None:
    """Return a note if a trained model segments no better than a constant or random prediction, else None.

    `metrics` are the segmentation metrics of the training's last validation.
    """
    nothing = at_chance(metrics)
    if nothing is None:
        return None
    return f"at its end the model {nothing}: train longer, try another --lr, and check labels with kdcache data check"


class Watch:
    """Checks the losses of a training, and yields notes on terms that do not work as they should.

    Losses are checked several steps at once, because reading them at each step would stall a GPU.

    Args:
        names: names of the loss, its terms and tasks. The losses that each call of `add` gets have the same order.
        world: the processes that train together.
        sample_ids: returns the ids of a step's samples, with streams as `kitti:0001`.
        part_tasks: name of a loss term -> its task.
    """

    def __init__(
        self,
        names: Sequence[str],
        world: World,
        sample_ids: Callable[[int], Sequence[str]],
        part_tasks: Mapping[str, str] | None = None,
    ) -> None:
        self.names = names
        self._part_tasks = dict(part_tasks or {})
        self._starving = set[str]()
        self._looks = dict[str, int]()
        self._world = world
        self._sample_ids = sample_ids
        self._unchecked: list[tuple[int, Tensor]] = []
        self._noted = set[str]()

    def add(self, step: int, losses: Tensor) -> None:
        """Add the losses (n,) of a step, to check them later. They stay on their device.

        They are in the order of the `names` that the watch was made with.
        """
        self._unchecked.append((step, losses))

    def check_finite(self) -> list[float]:
        """Check all losses that `add` got since the last check. Return the losses of the newest step.

        They are in the order of `names`, and averaged over the processes. The list is empty without a new step.

        Raises: ModelError with the term, iteration and samples of a loss that is not finite.
        """
        if not self._unchecked:
            return []
        rows = self._world.mean(torch.stack([row for _, row in self._unchecked])).tolist()
        for (step, _), row in zip(self._unchecked, rows, strict=True):
            if not all(map(math.isfinite, row)):
                raise self._not_finite(step, dict(zip(self.names, row, strict=True)))
        self._unchecked.clear()
        return list(rows[-1])

    def _not_finite(self, step: int, values: Mapping[str, float]) -> ModelError:
        """Return the error for a loss that is not finite, with its terms and the samples of its batch."""
        wrong = [name for name, value in values.items() if not math.isfinite(value)]
        terms = [name for name in wrong if name in self._part_tasks]
        streams = {f"{stream}:" for stream, slash, _ in (name.rpartition("/") for name in terms) if slash}
        ids = [sample for sample in self._sample_ids(step) if not streams or sample.startswith(tuple(streams))]
        numbers = numeric(self._part_tasks[name] for name in terms)
        return ModelError(
            f"The loss is not finite: {' and '.join(map(self._term, terms)) or 'the loss'} is "
            f"{values[(terms or wrong)[0]]} at iteration {step + 1}, records {', '.join(ids)}",
            fix="Clip the gradient, --clip-grad 1. Then lower --lr, or add --warmup. Then look at "
            + (
                f"the {numbers[0]} of those records, its unit and range: kdcache data check"
                if numbers
                else "those records"
            )
            + ". The last checkpoint is untouched.",
        )

    def _term(self, name: str) -> str:
        """Return words for a loss term, its head and its stream."""
        stream, slash, term = name.rpartition("/")
        return f"term {term} of the head {self._part_tasks[name]}" + (f" in the stream {stream}" if slash else "")

    def starving(self, tasks: Mapping[str, Mapping[str, float]]) -> Iterator[str]:
        """Yield a note, once, for each task whose gradient was under a tenth of the other task's in two calls in a row.

        `tasks` has task -> its `weight`, gradient `norm` and `ratio` to the other task's norm.
        """
        for task, measured in tasks.items():
            if measured["weight"] == 0 or not measured["ratio"] < STARVING:
                self._starving.discard(task)
            elif task not in self._starving:
                self._starving.add(task)
            elif f"task {task}" not in self._noted:
                self._noted.add(f"task {task}")
                (other_task,) = (name for name in tasks if name != task)
                yield (
                    f"the head {task} hardly learns: at two measurements in a row, its gradient over the shared "
                    f"parameters was below {STARVING:g} times the gradient of {other_task}, now "
                    f"{measured['ratio']:.2g} times. {_evened(tasks)}"
                )

    def won(self, values: Mapping[str, float]) -> Iterator[str]:
        """Yield a note, once, for each discriminator whose loss was below 0.01 in the last 10 calls.

        A discriminator is a network that learns to tell two streams apart by the student's output. `values` maps
        the name of a loss term to its value.
        """
        for name, value in values.items():
            stream, slash, part = name.rpartition("/")
            kind, _, head = part.partition("_")[0].partition("-")
            if kind != "discriminator":
                continue
            self._looks[name] = self._looks.get(name, 0) + 1 if value < WON else 0
            if self._looks[name] >= WON_LOOKS and name not in self._noted:
                self._noted.add(name)
                yield (
                    f"the discriminator{f' of the {head} head' if head else ''}"
                    f"{f' of the stream {stream}' if slash else ''} is too strong: in {WON_LOOKS} log lines in a row "
                    f"its loss was below {WON:g}, now {value:.2g}. It tells the streams apart easily, so the student "
                    "learns little from it. Fix: raise the term's weight, or use loss=least-squares"
                )

    def unsure(self, values: Mapping[str, float], *, last: bool) -> Iterator[str]:
        """Yield a note, once, for each stream whose pseudo labels had no confident pixel in the last 3 calls.

        Args:
            values: name -> value of the losses in a log line. The share of confident pixels has a name such as
                `kitti/confident`.
            last: True for the training's last log line. One call without a confident pixel is then enough.
        """
        for name, value in values.items():
            stream, slash, part = name.rpartition("/")
            if part.partition("_")[0] != "confident":
                continue
            self._looks[name] = 0 if value > 0 else self._looks.get(name, 0) + 1
            none = self._looks[name] >= UNSURE_LOOKS or (last and self._looks[name] > 0)
            if none and name not in self._noted:
                self._noted.add(name)
                yield (
                    f"no pixel{f' of the stream {stream}' if slash else ''} is confident (log lines in a row: "
                    f"{self._looks[name]}), so consistency has no effect yet. Fix: train longer on labels, lower the "
                    "term's threshold, or use less jitter"
                )

    def lopsided(self, step: int, norms: dict[str, float]) -> Iterator[str]:
        """Yield a note, once, for each term whose gradient is very small or very large next to cross-entropy's.

        The norm is then less than 0.01 times or more than 10 times cross-entropy's. At step 0 the upper limit is 100. A
        stream's terms are compared with the stream's own cross-entropy. At step 0, terms without any gradient are
        skipped, because the queue of the term `queue` is still empty then.

        Args:
            step: number of the step, from 0.
            norms: name of a loss term -> the norm of its weighted gradient.
        """
        for name, norm in norms.items():
            if step == 0 and norm == 0:
                continue
            stream, slash, part = name.rpartition("/")
            ce = norms.get(f"{stream}{slash}ce", 0.0)
            share = norm / ce if ce and part not in ("ce", "loss") else 1.0
            if LITTLE <= share <= (MUCH_AT_FIRST if step == 0 else MUCH) or name in self._noted:
                continue
            self._noted.add(name)
            verdict = "hardly does anything" if share < LITTLE else "dominates the loss"
            yield f"{name} {verdict}: its gradient is {share:.2g} times that of cross-entropy. Fix: change its weight"


def _evened(tasks: Mapping[str, Mapping[str, float]]) -> str:
    """Return the fixed task weights with sum 1 that would give all tasks the same gradient norm, in words."""
    plain = {task: values["norm"] / values["weight"] for task, values in tasks.items() if values["weight"] > 0}
    silent = [task for task, norm in plain.items() if norm == 0]
    if silent:
        return f"No weight would balance them, because {' and '.join(silent)} has no gradient there"
    total = sum(1 / norm for norm in plain.values())
    flags = " ".join(f"--task-weight {task}={1 / norm / total:.2g}" for task, norm in plain.items())
    return f"Fix: balance them with {flags}"
