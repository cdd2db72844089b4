"""The loss of a training step: the weighted sum of the losses of its streams, each on the stream's own rows.

    rows of the streams --one forward over all pixels--> outputs --rows of each--> its DistillLoss --weights--> sum

A training without streams has one, whose name is empty. Its terms are named without a stream.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from kdcache.distill.balance import Balance, weigh_parts
from kdcache.distill.batch import Batch, Streams
from kdcache.distill.counts import Counts
from kdcache.distill.loss import DistillLoss, total
from kdcache.distill.outputs import Losses, StudentOutputs, unpacked

UNNAMED = ("",)


class Criterion(nn.Module):
    """The loss of a training: the weighted sum of its streams' losses.

    Args:
        losses: the loss of each stream.
        names: the streams' names, which go before their terms' names: `kitti/ce`. A single stream may have the name "".
        weights: the weight of each stream's loss, at least 0. A stream's loss is a mean over its own samples, so its
            share of the batch does not act as a weight.
        balance: the balance of segmentation and depth losses. None adds the weighted losses of the streams.
    """

    def __init__(
        self,
        losses: Sequence[DistillLoss],
        names: Sequence[str] = UNNAMED,
        weights: Sequence[float] = (1.0,),
        balance: Balance | None = None,
    ) -> None:
        super().__init__()
        self.stream_names, self.weights = tuple(names), tuple(weights)
        # Checkpoints number the parameters: the balance comes first if streams have names, and else last.
        if self.stream_names != UNNAMED:
            self.balance = balance
        self.streams = nn.ModuleList(losses)
        self.balance = balance
        self.register_load_state_dict_pre_hook(_read_unnamed)  # type: ignore[no-untyped-call]

    @property
    def losses(self) -> list[DistillLoss]:
        """The loss module of each stream, in the order of the streams."""
        return list(self.streams)  # type: ignore[arg-type]

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all terms, in the order of `Losses.terms`, such as `kitti/loss`, `kitti/ce`, `kitti/kl`.

        `kitti/loss` is the weighted sum of the stream `kitti`.
        """
        by_stream = ((stream, [*(["loss"] if stream else []), *loss.names]) for stream, loss in self._named())
        return tuple(term_name(stream, name) for stream, names in by_stream for name in names)

    @property
    def part_tasks(self) -> dict[str, str]:
        """The task of each term, as a dict such as `kitti/ce` -> `segmentation`."""
        named = ((stream, loss.part_tasks) for stream, loss in self._named())
        return {term_name(stream, part): task for stream, tasks in named for part, task in tasks.items()}

    @property
    def student_taps(self) -> tuple[str, ...]:
        """Names of the student's features that any stream reads."""
        return tuple(dict.fromkeys(tap for loss in self.losses for tap in loss.student_taps))

    def set_distill_weight_scale(self, scale: float) -> None:
        """Set the factor on the weights of all teacher terms, in the streams with a `distill_schedule`.

        `scale` replaces the factor of an earlier call. Before the first call, the factor is 1.
        """
        for loss in self.losses:
            if loss.distill_weight_scale is not None:
                loss.set_distill_weight_scale(scale)

    def describe(self) -> list[str]:
        """Return a line of text for each loss term that resizes or projects the student's outputs.

        The list is complete after the first batch.
        """
        texts = ((name, term.describe()) for name, loss in self._named() for term in loss.terms)
        return [f"{name}: {text}" if name else text for name, text in texts if text]

    def share(self, gather: Callable[[Tensor], Tensor]) -> None:
        """Set the function with which terms that compare samples, such as `queue`, collect tensors of all processes.

        `gather` takes this process's tensor (N, ...), with a row for each of N things to compare. It returns the
        concatenation over the processes along this axis, in the order of ranks.
        """
        for term in (term for loss in self.losses for term in loss.terms):
            term.gather = gather

    def after_step(self, streams: Streams) -> None:
        """Let terms with a memory, such as `queue`, store their streams' batches. Call it after the optimizer's step.

        `streams` has a batch for each of `losses`.
        """
        for loss, batch in zip(self.losses, streams, strict=True):
            loss.after_step(batch)

    def counts(self, streams: Streams) -> tuple[Counts, ...]:
        """Return the denominators of each stream's loss, in the order of the streams.

        Raises: RecipeError or DataError if a stream's batch lacks something that a term reads.
        """
        return tuple(loss.counts(batch) for loss, batch in zip(self.losses, streams, strict=True))

    def forward(self, outputs: Any, streams: Streams, counts: tuple[Counts, ...] | None = None) -> Losses:
        """Return the loss of a batch over all streams, and every stream's terms: all 0-dimensional, float32.

        Args:
            outputs: the student's outputs for the pixels of all streams, one stream after another: `Outputs`, or only a
                tensor of logits.
            streams: the batch of each stream.
            counts: the denominators to divide each stream's loss by. None uses the batches' own.
        Raises: RecipeError if a batch lacks something that a term reads. DataError if a batch has no labels, or labels
            that do not fit.
        """
        by_task: list[dict[str, Tensor]] = []
        terms: dict[str, Tensor] = {}
        for name, loss, rows, batch, count in self._parted(outputs, streams, counts):
            of_tasks, of_terms = loss.by_task(rows, batch, count)
            by_task.append(of_tasks)
            stream_loss = {"loss": total(of_tasks).detach()} if name else {}
            terms |= {term_name(name, term): value for term, value in (stream_loss | of_terms).items()}
        if self.balance is None:
            weighted = [weight * total(task_losses) for weight, task_losses in zip(self.weights, by_task, strict=True)]
            return Losses(torch.stack(weighted).sum(), terms)
        counted = self._counted(counts or self.counts(streams)) if self.balance.reads_counts else None
        balanced = {task: self._of_task(task, by_task) for task in self.balance.heads}
        loss = self.balance(balanced, counted)
        return Losses(loss, terms, {task: value.detach() for task, value in balanced.items()})

    def parts(self, outputs: Any, streams: Streams, counts: tuple[Counts, ...] | None = None) -> dict[str, Tensor]:
        """Return the weighted loss of each active term: name, such as `kl` -> 0-dimensional tensor with a gradient.

        Use it to measure the gradient of each term. The weights include the weight of the stream and the balance. With
        named streams, names are `kitti/kl` and so on, and `kitti/loss` is the sum of the stream's weighted terms.

        Args:
            outputs: the student's outputs for the pixels of all streams, one stream after another.
            streams: the batch of each stream.
            counts: the denominators of each stream's loss. None uses the batches' own.
        Raises: RecipeError or DataError as `DistillLoss.forward`.
        """
        parts: dict[str, Tensor] = {}
        parted = self._parted(outputs, streams, counts)
        for weight, (name, loss, rows, batch, count) in zip(self.weights, parted, strict=True):
            of_stream = {term: weight * value for term, value in loss.parts(rows, batch, count).items()}
            if self.balance is not None:
                of_stream = weigh_parts(of_stream, loss.part_tasks, self.balance)
            stream_loss = {"loss": torch.stack(list(of_stream.values())).sum()} if name and of_stream else {}
            parts |= {term_name(name, term): value for term, value in (stream_loss | of_stream).items()}
        return parts

    def _of_task(self, task: str, by_task: Sequence[Mapping[str, Tensor]]) -> Tensor:
        """Return the weighted sum of a task's losses over the streams that have the task."""
        weighted = [
            weight * losses[task] for weight, losses in zip(self.weights, by_task, strict=True) if task in losses
        ]
        return torch.stack(weighted).sum()

    def _counted(self, counts: tuple[Counts, ...]) -> dict[str, Tensor]:
        """Return task -> how much it counts over all streams of weight above 0, 0-dimensional."""
        counted: dict[str, Tensor] = {}
        for loss, weight, stream_counts in zip(self.losses, self.weights, counts, strict=True):
            for task, count in loss.counted(stream_counts).items() if weight > 0 else ():
                counted[task] = counted[task] + count if task in counted else count
        return counted

    def _named(self) -> Iterator[tuple[str, DistillLoss]]:
        return zip(self.stream_names, self.losses, strict=True)

    def _parted(
        self, outputs: Any, streams: Streams, counts: tuple[Counts, ...] | None
    ) -> Iterator[tuple[str, DistillLoss, StudentOutputs, Batch, Counts | None]]:
        """Yield for each stream its name, its loss, its rows of the outputs, its batch and its denominators."""
        of_streams = dict(zip(self.stream_names, _split(outputs, list(map(len, streams))), strict=True))
        shared = [None] * len(streams) if counts is None else counts
        for (name, loss), batch, count in zip(self._named(), streams, shared, strict=True):
            others = {stream: stream_outputs for stream, stream_outputs in of_streams.items() if stream != name}
            yield name, loss, of_streams[name]._replace(others=others), batch, count


def term_name(stream: str, term: str) -> str:
    """Return the name of a stream's term in a log: `kitti/ce`, or `ce` if the stream's name is empty."""
    return f"{stream}/{term}" if stream else term


def _split(outputs: Any, rows: Sequence[int]) -> list[StudentOutputs]:
    """Return the outputs for the rows of each stream."""
    if len(rows) == 1:
        return [unpacked(outputs)]
    leaves, spec = pytree.tree_flatten(outputs)
    # torch.split, whose backward is one concatenation: slices would each add to zeros of the whole.
    split = zip(*(leaf.split(rows) for leaf in leaves), strict=True)
    return [unpacked(pytree.tree_unflatten(stream_leaves, spec)) for stream_leaves in split]


def _read_unnamed(criterion: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Rename the tensors of an older checkpoint, which had no streams: `further.0` becomes `streams.0.further.0`."""
    for name in [name for name in state if name.startswith(prefix)]:
        old_name = name.removeprefix(prefix)
        if not old_name.startswith(("streams.", "balance.")):
            state[f"{prefix}streams.0.{old_name}"] = state.pop(name)
