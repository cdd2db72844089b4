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
    """The arguments of a `Criterion`.

    Attributes:
        outputs: the model's outputs for the pixels of all streams.
        batch: the batch of each stream.
        counts: the denominators of each stream's loss. None lets the loss compute them.
    """

    outputs: Outputs
    batch: Streams
    counts: tuple[Counts, ...] | None


class EagerStep:
    """A training step (forward, loss, backward, optimizer), run by PyTorch one operation at a time.

    Call it with the batches of all streams. It learns from them and returns a detached tensor (n,): the loss, then the
    value of each loss term, then of each task.

    Args:
        model: the model, on `device`.
        criterion: the loss, on `device`. It may have parameters.
        optimizer: the optimizer of the model's and the loss's parameters.
        device: the device of the training.
        bf16: True runs the model under autocast to bfloat16.
        clip_grad: largest L2 norm of the gradient. 0 does not clip.
        mix: a function that pastes between the samples of a batch. None pastes nothing.

    Attributes:
        network: the module that runs forward: the model, or its DistributedDataParallel wrapper.
        average: a function that returns a tensor's mean over the processes. None for a single process.
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
        """Learn from a batch. Return the loss, the terms and the tasks as one detached tensor (n,)."""
        return self.learn(self.forward(self.to_device(batch)))

    def with_norms(self, batch: Streams) -> tuple[Tensor, Norms]:
        """Learn from a batch. Return its n loss values as one detached tensor (n,), and the gradient norms.

        The values are the loss, then each term, then each task, as in `Losses`. The norms are of the gradients of each
        weighted term, and of each task.
        """
        inputs = self.loss_inputs(self.to_device(batch))
        norms = self._norms(self._term_gradients(inputs))
        return self.learn(self.criterion(*inputs)), norms

    def _term_gradients(self, inputs: LossInputs) -> Iterator[tuple[str, Gradient]]:
        """Yield name and gradients of each weighted term, over the model's parameters."""
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        for name, term in self.criterion.parts(*inputs).items():
            yield name, torch.autograd.grad(term, parameters, retain_graph=True, allow_unused=True)

    def _norms(self, gradients: Iterable[tuple[str, Gradient]]) -> Norms:
        """Return the norms of the terms' gradients, and of each task's summed gradient."""
        tasks, terms = TaskGradients(self.criterion), dict[str, float]()
        for name, gradient in gradients:
            terms[name] = l2_norm(gradient, self.average)
            tasks.add(name, gradient)
        return tasks.norms(terms, lambda gradient: l2_norm(gradient, self.average))

    def to_device(self, batch: Streams) -> Streams:
        """Return the batch on the step's device."""
        return tuple(rows.to(self.device, non_blocking=True) for rows in batch)

    def forward(self, batch: Streams) -> Losses:
        """Return the losses of a batch, which must be on the step's device. Only the field `loss` has a gradient."""
        losses: Losses = self.criterion(*self.loss_inputs(batch))
        return losses

    def loss_inputs(self, batch: Streams, counts: tuple[Counts, ...] | None = None) -> LossInputs:
        """Run the model on a batch, and return the inputs of the loss.

        `counts` are the denominators of each stream's loss, if the batch is a part of a larger batch. None counts this
        batch, over all processes.
        """
        batch = self.mixed(batch)
        x_B3HW = self.model.normalise(pixels_of(batch))
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self._bf16):
            outputs = self.network(x_B3HW, self._taps)
        return LossInputs(outputs, batch, self._counts(batch) if counts is None else counts)

    def _counts(self, batch: Streams) -> tuple[Counts, ...] | None:
        """Return the denominators of the loss, averaged over processes, or None for a single process."""
        return None if self.average is None else average_counts(self.criterion.counts(batch), self.average)

    def mixed(self, batch: Streams) -> Streams:
        """Return the batch after pixels were pasted between its samples, or unchanged without `--mix` and `paste`."""
        return batch if self._mix is None else self._mix(batch)

    def held(self, batch: Streams) -> Streams:
        """Return the part of a batch that goes through the model at once. Here this is the whole batch."""
        return batch

    def learn(self, losses: Losses) -> Tensor:
        """Run the backward pass and the optimizer's step, and clear the gradients.

        `losses` is the result of `forward`. Return its n values as one detached tensor (n,): the loss, the terms, the
        tasks.
        """
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
        """Take a step on `batch`, to see whether it fits into memory, and then undo the step.

        With `norms` of True, it also computes the gradient of each loss term, which needs more memory.

        Raises: PyTorch's out-of-memory error if the batch does not fit.
        """
        with self.rehearsal():
            inputs = self.loss_inputs(self.to_device(batch))
            if norms:
                list(self._term_gradients(inputs))
            self.learn(self.criterion(*inputs))

    @contextmanager
    def rehearsal(self) -> Iterator[None]:
        """Undo all steps of a with block: restore parameters, buffers, optimizer state and random numbers.

        Optimizer state that did not exist before stays as zeros, at the address that a CUDA graph records. A first
        update from zeros equals a first update without state (Adam, and SGD without dampening).
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
    """Return all numbers of a loss as one detached tensor (n,): `loss`, then the values of `terms`, then of `tasks`."""
    return torch.stack([part.detach() for part in pytree.tree_leaves(losses)])


def random_state(device: torch.device) -> dict[str, Tensor]:
    """Return the states of PyTorch's random generators, uint8 tensors: `cpu`, and for a CUDA device also `cuda`."""
    state = {"cpu": torch.get_rng_state()}
    return state | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def set_random_state(device: torch.device, state: dict[str, Tensor]) -> None:
    """Set PyTorch's random generators to the states from `random_state`, which may come from another device."""
    torch.set_rng_state(state["cpu"].cpu())
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)
