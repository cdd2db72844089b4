"""The loss of a step that learns from several streams, with a separate loss on each stream's rows.

    batches of the streams --one forward over all pixels--> outputs --rows of each--> its DistillLoss --weights--> sum

A batch of one stream is a `Batch`, and its loss a `DistillLoss`. With several streams, these classes replace them, with
the same methods.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from kdcache.distill.balance import Balance, FixedBalance, weigh_parts
from kdcache.distill.batch import Batch, Tensors
from kdcache.distill.counts import Counts, StreamCounts
from kdcache.distill.loss import DistillLoss
from kdcache.distill.outputs import Losses, unpacked
from kdcache.tasks import TASKS


@dataclass(frozen=True)
class StreamBatch(Tensors):
    """The batches of several streams, in order. A pytree. Each stream has the same number of rows at every step."""

    streams: tuple[Batch, ...]

    @property
    def pixels(self) -> Tensor:
        """The pixels of all streams (B, H, W, 3), copied into one tensor."""
        return torch.cat([batch.pixels for batch in self.streams if batch.pixels is not None])

    def __len__(self) -> int:
        return sum(map(len, self.streams))

    def rows(self, count: int, first: int = 0) -> "StreamBatch":
        """Return each stream's share of `count` samples from `first` on, at least one each."""
        whole = len(self)
        return self.each(lambda batch: batch.rows(max(1, len(batch) * count // whole), len(batch) * first // whole))

    def each(self, change: Callable[[Batch], Batch]) -> "StreamBatch":
        """Return the batches after applying `change` to each."""
        return StreamBatch(tuple(map(change, self.streams)))


class StreamLosses(NamedTuple):
    """The weighted sum of the streams' losses, which is the only one with a gradient, and each stream's losses.

    Attributes:
        tasks: the weighted sum of each task's terms over all streams, before the balance. Empty without one.
    """

    loss: Tensor
    streams: tuple[Losses, ...]
    tasks: tuple[Tensor, ...] = ()


class StreamLoss(nn.Module):
    """The weighted sum of the losses of several streams.

    Args:
        criteria: the loss of each stream.
        names: the streams' names, which precede their terms' names: `kitti/ce`.
        weights: at least 0. Each stream's loss has its own denominators, so its share of the batch is not a weight.
        balance: balances two tasks' losses, each the weighted sum over the streams with it. None adds up the streams.
    """

    def __init__(
        self,
        criteria: Sequence[DistillLoss],
        names: Sequence[str],
        weights: Sequence[float],
        balance: Balance | None = None,
    ) -> None:
        super().__init__()
        self.balance = balance
        self.streams = nn.ModuleList(criteria)
        self.stream_names = tuple(names)
        self.weights = tuple(weights)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the values after the loss in `StreamLosses` without tasks, each stream's own loss first."""
        return tuple(f"{stream}/{part}" for stream, criterion in self._named() for part in ("loss", *criterion.names))

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks that any stream of weight above 0 learns."""
        learnt = [task for _, weight, criterion in self._weighed() if weight > 0 for task in criterion.tasks]
        return tuple(task for task in TASKS if task in learnt)

    @property
    def part_tasks(self) -> dict[str, str]:
        """The task of each term of a stream, by its name."""
        named = ((stream, criterion.part_tasks) for stream, criterion in self._named())
        return {f"{stream}/{part}": task for stream, tasks in named for part, task in tasks.items()}

    @property
    def student_taps(self) -> tuple[str, ...]:
        """Names of the student's features that any stream reads."""
        return tuple(dict.fromkeys(tap for _, criterion in self._named() for tap in criterion.student_taps))

    @property
    def distill_weight_scale(self) -> Tensor | None:
        """The factor on the teacher terms' weights, or None if no stream has a schedule."""
        scales = (criterion.distill_weight_scale for _, criterion in self._named())
        return next((scale for scale in scales if scale is not None), None)

    def set_distill_weight_scale(self, scale: float) -> None:
        """Multiply the teacher terms of streams with a schedule by `scale` from now on."""
        for _, criterion in self._named():
            if criterion.distill_weight_scale is not None:
                criterion.set_distill_weight_scale(scale)

    def describe(self) -> list[str]:
        """Return descriptions of what the terms resize or project, each after the stream's name."""
        return [f"{stream}: {text}" for stream, criterion in self._named() for text in criterion.describe()]

    def share(self, gather: Callable[[Tensor], Tensor]) -> None:
        """Let terms that compare all samples of a stream read its rows of other processes."""
        for _, criterion in self._named():
            criterion.share(gather)

    def after_step(self, batch: StreamBatch) -> None:
        """Let each stream's loss remember its rows (see `DistillLoss.after_step`)."""
        for (_, criterion), own in zip(self._named(), batch.streams, strict=True):
            criterion.after_step(own)

    def counts(self, batch: StreamBatch) -> StreamCounts:
        """Return the denominators of each stream's loss. Raises: as `DistillLoss.counts`."""
        pairs = zip(self._named(), batch.streams, strict=True)
        return StreamCounts(tuple(criterion.counts(own) for (_, criterion), own in pairs))

    def forward(self, outputs: Any, batch: StreamBatch, counts: StreamCounts | None = None) -> StreamLosses:
        """Return the loss, and every stream's losses: all scalars, float32.

        `outputs` are the student's for the pixels of all streams, in order. `counts` has each stream's counts, as
        `DistillLoss` takes them.

        Raises: what `DistillLoss.forward` raises.
        """
        parted = self._parted(outputs, batch, counts)
        by_task, losses = zip(*(own.by_task(rows, part, count) for own, rows, part, count in parted), strict=True)
        of_streams = tuple(own._replace(loss=own.loss.detach()) for own in losses)
        if self.balance is None:
            weighted = [weight * own.loss for weight, own in zip(self.weights, losses, strict=True)]
            return StreamLosses(torch.stack(weighted).sum(), of_streams)
        fixed = isinstance(self.balance, FixedBalance)
        counted = None if fixed else self._counted(counts or self.counts(batch))
        balanced = {task: self._of_task(task, by_task) for task in self.balance.heads}
        loss = self.balance(balanced, counted)
        return StreamLosses(loss, of_streams, tuple(own.detach() for own in balanced.values()))

    def parts(self, outputs: Any, batch: StreamBatch, counts: StreamCounts | None = None) -> dict[str, Tensor]:
        """Return every stream's loss and active terms by name, weighted (also by the balance) and differentiable.

        Args, Raises: as `forward`.
        """
        parts: dict[str, Tensor] = {}
        parted = self._parted(outputs, batch, counts)
        for name, weight, (criterion, own, part, count) in zip(self.stream_names, self.weights, parted, strict=True):
            of_stream = {term: weight * value for term, value in criterion.parts(own, part, count).items()}
            if self.balance is not None:
                of_stream = weigh_parts(of_stream, criterion.part_tasks, self.balance)
            whole = {"loss": torch.stack(list(of_stream.values())).sum()} if of_stream else {}
            parts |= {f"{name}/{term}": value for term, value in (whole | of_stream).items()}
        return parts

    def _of_task(self, task: str, by_task: Sequence[Mapping[str, Tensor]]) -> Tensor:
        """Return the weighted sum of the losses of a task over the streams that have it."""
        weighted = [weight * own[task] for weight, own in zip(self.weights, by_task, strict=True) if task in own]
        return torch.stack(weighted).sum()

    def _counted(self, counts: StreamCounts) -> dict[str, Tensor]:
        """Return how much counts for each task over all streams of weight above 0, 0-dimensional."""
        counted: dict[str, Tensor] = {}
        for (_, weight, criterion), own in zip(self._weighed(), counts.streams, strict=True):
            for task, count in criterion.counted(own).items() if weight > 0 else ():
                counted[task] = counted[task] + count if task in counted else count
        return counted

    def _weighed(self) -> Iterator[tuple[str, float, DistillLoss]]:
        return zip(self.stream_names, self.weights, self.streams, strict=True)  # type: ignore[arg-type]

    def _named(self) -> Iterator[tuple[str, DistillLoss]]:
        return zip(self.stream_names, self.streams, strict=True)  # type: ignore[arg-type]

    def _parted(
        self, outputs: Any, batch: StreamBatch, counts: StreamCounts | None
    ) -> Iterator[tuple[DistillLoss, Any, Batch, Counts | None]]:
        """Yield the loss of each stream with its rows of the outputs, its batch and its denominators."""
        leaves, spec = pytree.tree_flatten(outputs)
        rows = list(map(len, batch.streams))
        # torch.split, whose backward is one concatenation: slices would each add to zeros of the whole.
        split = zip(*(leaf.split(rows) for leaf in leaves), strict=True)
        of_streams = [None] * len(rows) if counts is None else counts.streams
        unflat = (unpacked(pytree.tree_unflatten(own, spec)) for own in split)
        outputs_of = dict(zip(self.stream_names, unflat, strict=True))
        for (name, criterion), part, count in zip(self._named(), batch.streams, of_streams, strict=True):
            others = {other: of_other for other, of_other in outputs_of.items() if other != name}
            yield criterion, outputs_of[name]._replace(others=others), part, count


pytree.register_dataclass(StreamBatch)
Criterion = DistillLoss | StreamLoss
"""The loss of a training step: of one stream, or of several."""
AnyBatch = Batch | StreamBatch
"""What a training step learns from: rows of one stream, or of several."""
