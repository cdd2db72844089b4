"""The ways to run a step of training.

| --step | what runs | before the first step |
| --- | --- | --- |
| eager | PyTorch, one operation after the other | nothing |
| compiled | forward and loss as one program, their backward as another (`torch.compile`) | compiling |
| graphed | all of that, recorded as one CUDA graph and replayed (cuda_graph.py) | compiling and recording |

They compute the same up to the rounding of fused operations. Compiling takes 20 s to a minute and saves passes over
memory. A graph saves the launches: the step of kdcache:tiny has a few hundred, and a GPU waits for them.
Preparing tries the step on the first batch and restores everything that it changed, so a run resumes bitwise in each
way. A step that cannot be compiled or recorded runs in the next simpler way, after a line with the reason.

A compiled step follows a model that behaves differently from step to step by running that step eagerly. A graph
always replays what it recorded. Such a model needs `--step eager`.
"""

import re
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from kdcache.distill import KernelError, Losses, Streams, pixels_of
from kdcache.errors import KDCacheError, RecipeError
from kdcache.training.step.eager import EagerStep, Step

BACKEND = "inductor"
SHOWN = 160
"""Characters of a foreign error message that a note repeats at most."""


def choose_step(name: str, device: torch.device, processes: int = 1) -> str:
    """Return how steps run: `eager`, `compiled` or `graphed`.

    Args:
        name: the value of `--step`: one of the three, or `auto`.
        device: the device of the training. `auto` takes `graphed` on a GPU and `eager` on a CPU.
        processes: the number of processes. Several processes run eager steps.
    Raises: RecipeError for `graphed` without CUDA, and for `compiled` or `graphed` in several processes.
    """
    if processes > 1:
        if name in ("compiled", "graphed"):
            raise RecipeError(
                f"Cannot use --step {name} with {processes} processes: they exchange tensors between eager operations",
                fix="Leave --step out, or use one process.",
            )
        return "eager"
    if name == "graphed" and device.type != "cuda":
        raise RecipeError(
            f"Cannot use --step graphed on the device {device.type}: it records a CUDA graph",
            fix="Leave --step out, or use --step compiled.",
        )
    if name == "auto":
        return "graphed" if device.type == "cuda" else "eager"
    return name


class CompiledStep:
    """A step whose forward and backward are compiled for the shapes of `batch`. Batches of other shapes run eagerly.

    Calling it with a batch takes one training step. It returns a detached tensor (n,): the batch's loss, terms and task
    losses, in the order of `Losses`.

    Args:
        eager: the step to compile.
        batch: a batch with the shapes of all batches.
    Raises: the compiler's error, if the model cannot be traced as a whole or would be compiled again at every step.
    """

    def __init__(self, eager: EagerStep, batch: Streams) -> None:
        def forward(batch: Streams) -> Losses:
            return eager.forward(batch)

        # The compiler keeps its programs, and counts them against a limit, by code object: each run has its own.
        forward.__code__ = forward.__code__.replace()
        self._eager = eager
        self._compiled = torch.compile(forward, fullgraph=True, dynamic=False, backend=BACKEND)
        on_device = eager.to_device(batch)
        eager.model.normalise(pixels_of(on_device))  # copies its constants to the device: not a part of the program
        with eager.rehearsal():
            torch.autograd.backward(self._compiled(on_device).loss)
            with torch.compiler.set_stance("fail_on_recompile"):
                torch.autograd.backward(self._compiled(on_device).loss)

    def __call__(self, batch: Streams) -> Tensor:
        """Take a training step with the compiled forward and backward. Return the batch's losses, as `eager.row` does.

        They are one detached tensor (n,): the loss, the terms and the task losses.
        """
        return self._eager.learn(self.forward(self._eager.to_device(batch)))

    def forward(self, batch: Streams) -> Losses:
        """Return the losses of a batch, which must be on the model's device.

        A batch with the shapes that the step was compiled for runs compiled, any other batch eagerly.
        """
        with torch.compiler.set_stance("eager_on_recompile"):
            return self._compiled(batch)


def make_step(kind: str, eager: EagerStep, batch: Streams, note: Callable[[str], None]) -> Step:
    """Return a step of the given kind, or of the next simpler kind if that one fails.

    A compiled or graphed step is tried before it is returned. The trial changes neither model nor optimizer.

    Args:
        kind: `eager`, `compiled` or `graphed`, from simple to fast.
        eager: the eager step.
        batch: the first batch. All batches have its shapes.
        note: is called with the seconds of preparation, and with the reason if a kind failed.
    Raises: KDCacheError or KernelError for a wrong batch.
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
    result: Step = step
    if kind == "graphed":
        from kdcache.training.step.cuda_graph import GraphedStep

        try:
            result = GraphedStep(eager, step.forward, batch)
        except (KDCacheError, KernelError):
            raise
        except Exception as error:
            note(f"--step graphed: the step is not recorded as a CUDA graph, it is launched anew ({_reason(error)})")
    if result is not eager:
        note(f"--step {kind}: prepared in {time.perf_counter() - began:.1f} s")
    return result


def _reason(error: Exception) -> str:
    """Return the first line of another library's error, and the line of the model's code that the compiler names."""
    lines = [line for line in str(error).splitlines() if line.strip() and not line.endswith("raised:")]
    text = f"{type(error).__name__}: {lines[0].strip() if lines else 'without a message'}"
    text = text if len(text) <= SHOWN else text[: SHOWN - 3] + "..."
    _, _, trace = str(error).partition("from user code:")
    places = re.findall(r'File "(.+)", line (\d+)', trace)
    return f"{text}, at {Path(places[-1][0]).name}:{places[-1][1]}" if places else text
