"""One optimizer step (forward, loss, backward, clipping, optimizer) and the ways to run it.

| --step | what runs | before the first step |
| --- | --- | --- |
| eager | PyTorch, one operation after the other | nothing |
| compiled | forward and loss as one program, their backward as another (`torch.compile`) | compiling |
| graphed | all of that, recorded as one CUDA graph and replayed (graph.py) | compiling and recording |

They compute the same up to the rounding of fused operations. Compiling takes 20 s to a minute and saves passes over
memory; a graph saves the launches, of which the step of kdcache:tiny has a few hundred and which a GPU waits for.
Preparing tries the step on the first batch and puts back everything that it changed, so that a run resumes bitwise
in each way. What cannot be compiled or recorded runs in the next simpler way, after a line that says why.

A compiled step follows a model that behaves differently from step to step by running that step eagerly; a graph
replays what it saw. Such a model needs `--step eager`.
"""

import re
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from kdcache.distill import DistillLoss, KernelError, Losses, Target
from kdcache.errors import KDCacheError, RecipeError
from kdcache.models import SegmentationModel
from kdcache.train.dataset import DICE
from kdcache.train.mix import Mix
from kdcache.train.sample import Sample

BACKEND = "inductor"
SHOWN = 160
"""Characters of a foreign error message that a note repeats at most."""

Step = Callable[[Sample], Tensor]
"""Learns from a batch of the loader; returns its loss and the parts of it on the device, detached and its own."""


def choose_step(name: str, device: torch.device, processes: int = 1) -> str:
    """The way that `--step` means on a device. Raises RecipeError for a graph where there is no CUDA."""
    if processes > 1:
        if name in ("compiled", "graphed"):
            raise RecipeError(
                "several processes train in eager steps, between whose operations they exchange what they know",
                received=f"--step {name} with {processes} processes",
                remedy="leave --step out, or use one process",
            )
        return "eager"
    if name == "graphed" and device.type != "cuda":
        raise RecipeError(
            "--step graphed records a CUDA graph, which takes a GPU",
            received=f"--step graphed on the device {device.type}",
            remedy="leave --step out, or use --step compiled",
        )
    if name == "auto":
        return "graphed" if device.type == "cuda" else "eager"
    return name


class Asked(NamedTuple):
    """The arguments of the loss, in its order."""

    logits: Tensor
    label: Tensor
    target: Target
    features: dict[str, Tensor]
    own: Tensor | None


class EagerStep:
    """The step as PyTorch runs it, operation by operation.

    Args:
        model, criterion: on `device`; both may have parameters.
        optimizer: of them.
        bf16: whether the model runs under autocast.
        clip_grad: largest norm of the gradient; 0 does not clip.
        mix: what is pasted between the samples of a batch.
    Attributes:
        network: what runs forward: the model, or what shares its gradients with other processes.
        average: mean of a tensor over the processes; None when there is one.
    """

    def __init__(
        self,
        model: SegmentationModel,
        criterion: DistillLoss,
        optimizer: torch.optim.Optimizer,
        *,
        device: torch.device,
        bf16: bool = False,
        clip_grad: float = 0.0,
        mix: Mix | None = None,
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

    def __call__(self, batch: Sample) -> Tensor:
        return self.learn(self.forward(self.to_device(batch)))

    def with_norms(self, batch: Sample) -> tuple[Tensor, dict[str, float]]:
        """The same step, and the L2 norm of each weighted term's gradient over the model's parameters."""
        given = self._asked(self.to_device(batch))
        norms = {name: self._norm(gradients) for name, gradients in self._term_gradients(given)}
        return self.learn(self.criterion(*given)), norms

    def _term_gradients(self, given: Asked) -> Iterator[tuple[str, list[Tensor]]]:
        """Of each weighted term over the model's parameters that it reaches; the graph stays."""
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        for name, term in self.criterion.parts(*given).items():
            gradients = torch.autograd.grad(term, parameters, retain_graph=True, allow_unused=True)
            yield name, [gradient for gradient in gradients if gradient is not None]

    def _norm(self, gradients: list[Tensor]) -> float:
        """Of a gradient, over all its parameters, averaged over the processes."""
        whole = [g if self.average is None else self.average(g) for g in gradients]
        squares = [g.float().square().sum() for g in whole]
        return float(torch.stack(squares).sum().sqrt()) if squares else 0.0

    def to_device(self, batch: Sample) -> Sample:
        return Sample(
            batch.pixels.to(self.device, non_blocking=True),
            batch.label.to(self.device, non_blocking=True),
            batch.target.to(self.device, non_blocking=True),
        )

    def forward(self, batch: Sample) -> Losses:
        """The differentiable loss of a batch on the device."""
        losses: Losses = self.criterion(*self._asked(batch))
        return losses

    def _asked(self, batch: Sample) -> Asked:
        """What the loss looks at: the model's answer, and what it is compared with."""
        pixels, label, own = self._mixed(batch)
        x_B3HW = self.model.normalise(pixels)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self._bf16):
            answer = self.network(x_B3HW, self._taps)
        return Asked(answer.logits, label, batch.target, answer.features, own)

    def _mixed(self, batch: Sample) -> tuple[Tensor, Tensor, Tensor | None]:
        """Pixels and label as they are learnt from, and which of them are a sample's own; None is all."""
        if self._mix is None:
            return batch.pixels, batch.label, None
        return self._mix(batch.pixels, batch.label, batch.target.extras[DICE])

    def held(self, batch: Sample) -> Sample:
        """What of a batch goes through the model at once: all of it."""
        return batch

    def learn(self, losses: Losses) -> Tensor:
        """Backward to optimizer; the gradients are gone afterwards."""
        torch.autograd.backward(losses.loss)
        self._update()
        return row(losses)

    def _update(self) -> None:
        """Learn from the gradients, which are gone afterwards."""
        parameters = [*self.model.parameters(), *self.criterion.parameters()]
        if self.average is not None:
            for parameter in self.criterion.parameters():  # the model's are averaged by what shares it
                if parameter.grad is not None:
                    parameter.grad = self.average(parameter.grad)
        if self._clip_grad > 0:
            torch.nn.utils.clip_grad_norm_(parameters, self._clip_grad)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def attempt(self, batch: Sample, norms: bool) -> None:
        """A step on what goes through the model at once, without a trace, to see whether it fits into memory."""
        with self.rehearsal():
            given = self._asked(self.to_device(batch))
            if norms:
                list(self._term_gradients(given))
            self.learn(self.criterion(*given))

    @contextmanager
    def rehearsal(self) -> Iterator[None]:
        """Steps inside leave no trace: parameters, buffers, optimizer and random numbers are put back.

        State that the optimizer did not have yet stays, as zeros at the address that a graph records: a first update
        from zeros is that from nothing (Adam, and SGD without dampening).
        """
        tensors = [*self.model.parameters(), *self.model.buffers(), *self.criterion.parameters()]
        kept = [tensor.detach().clone() for tensor in tensors]
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
                for tensor, before in zip(tensors, kept, strict=True):
                    tensor.copy_(before)
                for parameter, state in self.optimizer.state.items():
                    for name, value in state.items():
                        if isinstance(value, Tensor):
                            known = moments.get(parameter, {}).get(name)
                            value.zero_() if known is None else value.copy_(known)
            set_random_state(self.device, random)


class CompiledStep:
    """A step whose forward and backward are compiled for the shapes of `batch`; other shapes run eagerly.

    Raises: what the compiler raises for a model that it cannot trace as a whole, or would compile at every step.
    """

    def __init__(self, eager: EagerStep, batch: Sample) -> None:
        def forward(batch: Sample) -> Losses:
            return eager.forward(batch)

        # The compiler keeps its programs, and counts them against a limit, by code object: each run has its own.
        forward.__code__ = forward.__code__.replace()
        self._eager = eager
        self._compiled = torch.compile(forward, fullgraph=True, dynamic=False, backend=BACKEND)
        on_device = eager.to_device(batch)
        eager.model.normalise(on_device.pixels)  # copies its constants to the device: not a part of the program
        with eager.rehearsal():
            torch.autograd.backward(self._compiled(on_device).loss)
            with torch.compiler.set_stance("fail_on_recompile"):
                torch.autograd.backward(self._compiled(on_device).loss)

    def __call__(self, batch: Sample) -> Tensor:
        return self._eager.learn(self.forward(self._eager.to_device(batch)))

    def forward(self, batch: Sample) -> Losses:
        with torch.compiler.set_stance("eager_on_recompile"):
            return self._compiled(batch)


def make_step(kind: str, eager: EagerStep, batch: Sample, note: Callable[[str], None]) -> Step:
    """The step of a kind, tried on the first batch; or the next simpler one that runs.

    Args:
        kind: eager, compiled or graphed.
        batch: as the loader gives them all.
        note: is told what was made, how long it took, and what did not work.
    """
    if kind == "eager":
        return eager
    began = time.perf_counter()
    step: EagerStep | CompiledStep = eager
    try:
        step = CompiledStep(eager, batch)
    except (KDCacheError, KernelError):
        raise  # a fault of the batch
    except Exception as error:
        note(f"--step {kind}: the model is not compiled, its operations run one by one ({_reason(error)})")
    made: Step = step
    if kind == "graphed":
        from kdcache.train.graph import GraphedStep

        try:
            made = GraphedStep(eager, step.forward, batch)
        except (KDCacheError, KernelError):
            raise
        except Exception as error:
            note(f"--step graphed: the step is not recorded as a CUDA graph, it is launched anew ({_reason(error)})")
    if made is not eager:
        note(f"--step {kind}: prepared in {time.perf_counter() - began:.1f} s")
    return made


def row(losses: Losses) -> Tensor:
    """The loss and its parts, detached."""
    return torch.stack([part.detach() for part in (*losses[:3], *losses.terms)])


def random_state(device: torch.device) -> dict[str, Tensor]:
    """Of the generators that a model draws from: dropout takes the device's own."""
    state = {"cpu": torch.get_rng_state()}
    return state | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def set_random_state(device: torch.device, state: dict[str, Tensor]) -> None:
    """Put the generators back to a `random_state`, also one of another device."""
    torch.set_rng_state(state["cpu"].cpu())
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)


def _reason(error: Exception) -> str:
    """The first line of a foreign error, and the place in the model's code where the compiler says it."""
    lines = [line for line in str(error).splitlines() if line.strip() and not line.endswith("raised:")]
    text = f"{type(error).__name__}: {lines[0].strip() if lines else 'without a message'}"
    text = text if len(text) <= SHOWN else text[: SHOWN - 3] + "..."
    _, _, trace = str(error).partition("from user code:")
    places = re.findall(r'File "(.+)", line (\d+)', trace)
    return f"{text}, at {Path(places[-1][0]).name}:{places[-1][1]}" if places else text
