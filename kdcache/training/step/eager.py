"""One optimizer step (forward, loss, backward, clipping, optimizer) as PyTorch runs it. See also compiled.py."""

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from kdcache.distill import Counts, Criterion, Losses, Streams, average_counts, pixels_of
from kdcache.distill.terms import discriminator_parameters
from kdcache.models import Outputs, SegmentationModel
from kdcache.training.step.gradient_norms import Gradient, Norms, TaskGradients, l2_norm

Step = Callable[[Streams], Tensor]
"""Learns from a batch of the loader; returns its loss and the parts of it on the device, detached and its own."""


class LossInputs(NamedTuple):
    """The arguments of the loss, in its order."""

    outputs: Outputs
    batch: Streams
    counts: tuple[Counts, ...] | None


class EagerStep:
    """The step as PyTorch runs it, operation by operation.

    Args:
        model, criterion: on `device`. Both may have parameters.
        optimizer: the optimizer of their parameters.
        bf16: whether the model runs under autocast.
        clip_grad: largest norm of the gradient. 0 does not clip.
        mix: pastes between the samples of a batch, within streams or between them, or None.

    Attributes:
        network: the module that runs forward: the model, or a wrapper that shares its gradients between processes.
        average: mean of a tensor over the processes, or None for a single process.
    """

    def __init__(
        self,
        model: SegmentationModel,
        criterion: Criterion,
        optimizer: torch.optim.Optimizer,
        *,
        device: torch.device,
        bf16: bool = False,
        clip_grad: float = 0.0,
        mix: Callable[[Streams], Streams] | None = None,
    ) -> None:
        self.model = model
        self.network: nn.Module = model
        self.average: Callable[[Tensor], Tensor] | None = None
        self.criterion = criterion
        self.optimizer = optimizer
        self.device = device
        self._taps = criterion.student_taps
        self._bf16 = bf16
        self._clip_grad = clip_grad
        self._mix = mix
        apart = set(map(id, discriminator_parameters(criterion)))
        parameters = [*model.parameters(), *criterion.parameters()]
        self._student_parameters = [parameter for parameter in parameters if id(parameter) not in apart]

    def __call__(self, batch: Streams) -> Tensor:
        """Learn from a batch, and return the losses."""
        return self.learn(self.forward(self.to_device(batch)))

    def with_norms(self, batch: Streams) -> tuple[Tensor, Norms]:
        """Take a step, and return its losses and the norms of the gradients of all weighted terms and tasks."""
        inputs = self.loss_inputs(self.to_device(batch))
        norms = self._norms(self._term_gradients(inputs))
        return self.learn(self.criterion(*inputs)), norms

    def _term_gradients(self, inputs: LossInputs) -> Iterator[tuple[str, Gradient]]:
        """Yield each weighted term's gradients over the model's parameters, and keep the graph."""
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        for name, term in self.criterion.parts(*inputs).items():
            yield name, torch.autograd.grad(term, parameters, retain_graph=True, allow_unused=True)

    def _norms(self, gradients: Iterable[tuple[str, Gradient]]) -> Norms:
        """Return the norms of the terms' gradients, and of their sum over each task."""
        tasks, terms = TaskGradients(self.criterion), dict[str, float]()
        for name, gradient in gradients:
            terms[name] = l2_norm(gradient, self.average)
            tasks.add(name, gradient)
        return tasks.norms(terms, lambda gradient: l2_norm(gradient, self.average))

    def to_device(self, batch: Streams) -> Streams:
        """Copy a batch to the step's device."""
        return tuple(rows.to(self.device, non_blocking=True) for rows in batch)

    def forward(self, batch: Streams) -> Losses:
        """Return the losses of a batch on the device. The first is differentiable."""
        losses: Losses = self.criterion(*self.loss_inputs(batch))
        return losses

    def loss_inputs(self, batch: Streams, counts: tuple[Counts, ...] | None = None) -> LossInputs:
        """Return the inputs of the loss: the model's outputs, and the batch to compare them with.

        `counts` are the denominators of the larger batch that this is a part of, or None for a whole batch.
        """
        batch = self.mixed(batch)
        x_B3HW = self.model.normalise(pixels_of(batch))
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self._bf16):
            outputs = self.network(x_B3HW, self._taps)
        return LossInputs(outputs, batch, self._counts(batch) if counts is None else counts)

    def _counts(self, batch: Streams) -> tuple[Counts, ...] | None:
        """Return the loss's denominators if several processes share a batch, or None if the loss counts itself."""
        return None if self.average is None else average_counts(self.criterion.counts(batch), self.average)

    def mixed(self, batch: Streams) -> Streams:
        """Return the batch after pasting."""
        return batch if self._mix is None else self._mix(batch)

    def held(self, batch: Streams) -> Streams:
        """Return the part of a batch that goes through the model at once, here all of it."""
        return batch

    def learn(self, losses: Losses) -> Tensor:
        """Run backward and the optimizer's step, clear the gradients and return `row(losses)`."""
        torch.autograd.backward(losses.loss)
        self._update()
        return row(losses)

    def _update(self) -> None:
        """Average, clip and apply the gradients, then clear them."""
        if self.average is not None:
            for parameter in self.criterion.parameters():  # the model's are averaged by what shares it
                if parameter.grad is not None:
                    parameter.grad = self.average(parameter.grad)
        if self._clip_grad > 0:
            torch.nn.utils.clip_grad_norm_(self._student_parameters, self._clip_grad)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def attempt(self, batch: Streams, norms: bool) -> None:
        """Rehearse a step on a batch that goes through the model at once, to see whether it fits into memory."""
        with self.rehearsal():
            inputs = self.loss_inputs(self.to_device(batch))
            if norms:
                list(self._term_gradients(inputs))
            self.learn(self.criterion(*inputs))

    @contextmanager
    def rehearsal(self) -> Iterator[None]:
        """Restore parameters, buffers, optimizer and random numbers after steps in a with block.

        Optimizer state that did not exist before stays as zeros, at the address that a graph records. A first update
        from zeros equals one from nothing (Adam, and SGD without dampening).
        """
        tensors = [*self.model.parameters(), *self.model.buffers(), *self.criterion.parameters()]
        values_before = [tensor.detach().clone() for tensor in tensors]
        moments = {
            parameter: {name: value.clone() for name, value in state.items() if isinstance(value, Tensor)}
            for parameter, state in self.optimizer.state.items()
        }
        random = random_state(self.device)
        try:
            with warnings.catch_warnings():
                # Advice of compiler, optimizer and debugger about their own use.
                warnings.filterwarnings("ignore", module=r"torch\.")
                warnings.filterwarnings("ignore", message=".*capturable=True")
                warnings.filterwarnings("ignore", message="Synchronization debug mode")
                yield
        finally:
            self.optimizer.zero_grad(set_to_none=True)
            with torch.no_grad():
                for tensor, before in zip(tensors, values_before, strict=True):
                    tensor.copy_(before)
                for parameter, state in self.optimizer.state.items():
                    for name, value in state.items():
                        if isinstance(value, Tensor):
                            moment = moments.get(parameter, {}).get(name)
                            value.zero_() if moment is None else value.copy_(moment)
            set_random_state(self.device, random)


def row(losses: Losses) -> Tensor:
    """Stack the loss and its parts, detached, into one tensor (1 + names,), in the order of the criterion's names."""
    return torch.stack([part.detach() for part in pytree.tree_leaves(losses)])


def random_state(device: torch.device) -> dict[str, Tensor]:
    """Return the states of the generators that a model draws from. Dropout draws from the device's."""
    state = {"cpu": torch.get_rng_state()}
    return state | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def set_random_state(device: torch.device, state: dict[str, Tensor]) -> None:
    """Restore the generators from a `random_state`, also one of another device."""
    torch.set_rng_state(state["cpu"].cpu())
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)
