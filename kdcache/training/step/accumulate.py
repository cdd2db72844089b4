"""One optimizer step from several parts of a batch that is too large for memory.

The parts go through the model one after the other, and their gradients add up to the whole batch's. Averaging the
parts' means would be wrong: a part with few labelled pixels would count as much as one with many. So the denominators
of the loss are the whole batch's, as when several processes share one (ddp.py), and they are counted first:

    labels and targets of every part --criterion.counts--> counted pixels, their mean over the parts
    each part --model, criterion with those counts--> loss / parts --backward--> gradients, which add up

The settings exclude terms that are not means over samples (`sp`, `dist`). Samples are pasted into each other
(input/mix.py) within pairs, so within a part. Only BatchNorm differs: its statistics are a part's.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from kdcache.distill import Counts, Streams, average_counts, mean_counts, rows_of
from kdcache.training.step.eager import EagerStep, row
from kdcache.training.step.gradient_norms import Norms, add_gradients


class AccumulatedStep(EagerStep):
    """An eager step that runs each batch through the model in equal parts, to need less memory.

    The gradients of the parts are added, and the optimizer then takes one step. The loss equals the loss of the whole
    batch.

    Args:
        others, named: the arguments of `EagerStep`.
        parts: number of parts. It must divide every batch evenly. If samples are mixed in pairs, every part must have
            whole pairs.
    """

    def __init__(self, *others: Any, parts: int, **named: Any) -> None:
        super().__init__(*others, **named)
        self._parts = parts

    def __call__(self, batch: Streams) -> Tensor:
        """Learn from a batch in parts. Return loss, terms and tasks as one detached tensor: means over the parts."""
        return self._learn_parts(batch, None)

    def with_norms(self, batch: Streams) -> tuple[Tensor, Norms]:
        """Learn from a batch in parts. Return its n loss values as one detached tensor (n,), and the gradient norms.

        The values are means over the parts: the loss, then each term, then each task, as in `Losses`. The norms are of
        the gradients of the whole batch.
        """
        total: dict[str, list[Tensor | None]] = {}
        weights = {} if self.criterion.balance is None else self.criterion.balance.weights()
        losses = self._learn_parts(batch, total)
        return losses, self._norms(total.items())._replace(weights=weights)

    def held(self, batch: Streams) -> Streams:
        """Return the first part of a batch, as many samples as go through the model at once.

        The trainer uses it to find out which batch size fits into memory.
        """
        return self.part_of(batch, 0)

    def _learn_parts(self, batch: Streams, total: dict[str, list[Tensor | None]] | None) -> Tensor:
        """Take the step, and add each term's gradient to `total` unless `total` is None."""
        full_batch, criterion, rows = self.to_device(batch), self.criterion, []
        counts = self._shared_counts(full_batch)
        for number in range(self._parts):
            with self._alone() if number + 1 < self._parts else nullcontext():
                inputs = self.loss_inputs(self.part_of(full_batch, number), counts)
                if total is not None:
                    add_gradients(total, self._term_gradients(inputs), self._parts)
                losses = criterion(*inputs)
                torch.autograd.backward(losses.loss / self._parts)
            rows.append(row(losses))
        self._update()
        return torch.stack(rows).mean(0)

    def part_of(self, batch: Streams, number: int) -> Streams:
        """Return one of the equal parts into which a step cuts a batch, with the same share of every stream's samples.

        `number` counts the parts from 0.
        """
        size = sum(map(len, batch)) // self._parts
        return rows_of(batch, size, number * size)

    def _shared_counts(self, batch: Streams) -> tuple[Counts, ...]:
        """Return the denominators of every part's loss: the mean of the counts over the parts and over processes."""
        parts = [self.mixed(self.part_of(batch, number)) for number in range(self._parts)]
        counts = mean_counts([self.criterion.counts(part) for part in parts])
        return counts if self.average is None else average_counts(counts, self.average)

    def _alone(self) -> AbstractContextManager[Any]:
        """Keep gradients from being exchanged between processes, in a with block."""
        return self.network.no_sync() if isinstance(self.network, DistributedDataParallel) else nullcontext()
