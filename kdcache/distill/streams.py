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
    """The weighted sum of the losses of several streams, or of one.

    Args:
        losses: the loss of each stream.
        names: the streams' names, which precede their terms' names: `kitti/ce`.
        weights: at least 0. Each stream's loss has its own denominators, so its share of the batch is not a weight.
        balance: balances the losses of two tasks, each summed over streams by weight. None adds up the streams.
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
        """The loss of each stream."""
        return list(self.streams)  # type: ignore[arg-type]

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the terms, in the order of `Losses.terms`, the loss of a named stream before its terms."""
        own = ((stream, [*(["loss"] if stream else []), *loss.names]) for stream, loss in self._named())
        return tuple(term_name(stream, name) for stream, names in own for name in names)

    @property
    def part_tasks(self) -> dict[str, str]:
        """The task of each term of a stream, by its name."""
        named = ((stream, loss.part_tasks) for stream, loss in self._named())
        return {term_name(stream, part): task for stream, tasks in named for part, task in tasks.items()}

    @property
    def student_taps(self) -> tuple[str, ...]:
        """Names of the student's features that any stream reads."""
        return tuple(dict.fromkeys(tap for loss in self.losses for tap in loss.student_taps))

    def set_distill_weight_scale(self, scale: float) -> None:
        """Multiply the teacher terms of streams with a schedule by `scale` from now on."""
        for loss in self.losses:
            if loss.distill_weight_scale is not None:
                loss.set_distill_weight_scale(scale)

    def describe(self) -> list[str]:
        """Return what each stream's terms resize or project, with its name. It is complete after the first batch."""
        texts = ((name, term.describe()) for name, loss in self._named() for term in loss.terms)
        return [f"{name}: {text}" if name else text for name, text in texts if text]

    def share(self, gather: Callable[[Tensor], Tensor]) -> None:
        """Let terms that compare all samples of a stream read all processes' rows, in order, by `gather`."""
        for term in (term for loss in self.losses for term in loss.terms):
            term.gather = gather

    def after_step(self, streams: Streams) -> None:
        """Let each stream's loss remember its rows (see `DistillLoss.after_step`)."""
        for loss, batch in zip(self.losses, streams, strict=True):
            loss.after_step(batch)

    def counts(self, streams: Streams) -> tuple[Counts, ...]:
        """Return the denominators of each stream's loss. Raises: as `DistillLoss.counts`."""
        return tuple(loss.counts(batch) for loss, batch in zip(self.losses, streams, strict=True))

    def forward(self, outputs: Any, streams: Streams, counts: tuple[Counts, ...] | None = None) -> Losses:
        """Return the loss, and every stream's terms: all scalars, float32.

        `outputs` are the student's for the pixels of all streams, in order. `counts` has each stream's counts, as
        `DistillLoss` takes them.

        Raises: what `DistillLoss.forward` raises.
        """
        by_task: list[dict[str, Tensor]] = []
        terms: dict[str, Tensor] = {}
        for name, loss, rows, batch, count in self._parted(outputs, streams, counts):
            of_tasks, of_terms = loss.by_task(rows, batch, count)
            by_task.append(of_tasks)
            whole = {"loss": total(of_tasks).detach()} if name else {}
            terms |= {term_name(name, term): value for term, value in (whole | of_terms).items()}
        if self.balance is None:
            weighted = [weight * total(own) for weight, own in zip(self.weights, by_task, strict=True)]
            return Losses(torch.stack(weighted).sum(), terms)
        counted = self._counted(counts or self.counts(streams)) if self.balance.reads_counts else None
        balanced = {task: self._of_task(task, by_task) for task in self.balance.heads}
        loss = self.balance(balanced, counted)
        return Losses(loss, terms, {task: own.detach() for task, own in balanced.items()})

    def parts(self, outputs: Any, streams: Streams, counts: tuple[Counts, ...] | None = None) -> dict[str, Tensor]:
        """Return active terms by name, weighted (also by the balance) and differentiable, for gradient norms.

        Named streams have their whole loss before their terms. Args, Raises: as `forward`.
        """
        parts: dict[str, Tensor] = {}
        parted = self._parted(outputs, streams, counts)
        for weight, (name, loss, rows, batch, count) in zip(self.weights, parted, strict=True):
            of_stream = {term: weight * value for term, value in loss.parts(rows, batch, count).items()}
            if self.balance is not None:
                of_stream = weigh_parts(of_stream, loss.part_tasks, self.balance)
            whole = {"loss": torch.stack(list(of_stream.values())).sum()} if name and of_stream else {}
            parts |= {term_name(name, term): value for term, value in (whole | of_stream).items()}
        return parts

    def _of_task(self, task: str, by_task: Sequence[Mapping[str, Tensor]]) -> Tensor:
        """Return the weighted sum of the losses of a task over the streams that have it."""
        weighted = [weight * own[task] for weight, own in zip(self.weights, by_task, strict=True) if task in own]
        return torch.stack(weighted).sum()

    def _counted(self, counts: tuple[Counts, ...]) -> dict[str, Tensor]:
        """Return how much counts for each task over all streams of weight above 0, 0-dimensional."""
        counted: dict[str, Tensor] = {}
        for loss, weight, own in zip(self.losses, self.weights, counts, strict=True):
            for task, count in loss.counted(own).items() if weight > 0 else ():
                counted[task] = counted[task] + count if task in counted else count
        return counted

    def _named(self) -> Iterator[tuple[str, DistillLoss]]:
        return zip(self.stream_names, self.losses, strict=True)

    def _parted(
        self, outputs: Any, streams: Streams, counts: tuple[Counts, ...] | None
    ) -> Iterator[tuple[str, DistillLoss, StudentOutputs, Batch, Counts | None]]:
        """Yield the name and loss of each stream, its rows of the outputs, its batch and its denominators."""
        of_streams = dict(zip(self.stream_names, _split(outputs, list(map(len, streams))), strict=True))
        shared = [None] * len(streams) if counts is None else counts
        for (name, loss), batch, count in zip(self._named(), streams, shared, strict=True):
            others = {other: of_other for other, of_other in of_streams.items() if other != name}
            yield name, loss, of_streams[name]._replace(others=others), batch, count


def term_name(stream: str, term: str) -> str:
    """Return the name of a stream's term in a log: kitti/ce, or ce of the stream without a name."""
    return f"{stream}/{term}" if stream else term


def _split(outputs: Any, rows: Sequence[int]) -> list[StudentOutputs]:
    """Return the outputs for the rows of each stream."""
    if len(rows) == 1:
        return [unpacked(outputs)]
    leaves, spec = pytree.tree_flatten(outputs)
    # torch.split, whose backward is one concatenation: slices would each add to zeros of the whole.
    split = zip(*(leaf.split(rows) for leaf in leaves), strict=True)
    return [unpacked(pytree.tree_unflatten(own, spec)) for own in split]


def _read_unnamed(criterion: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Rename the tensors of a checkpoint of before, whose only stream was the whole loss: further.0 was its own."""
    for name in [name for name in state if name.startswith(prefix)]:
        own = name.removeprefix(prefix)
        if not own.startswith(("streams.", "balance.")):
            state[f"{prefix}streams.0.{own}"] = state.pop(name)
