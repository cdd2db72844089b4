"""The step as a CUDA graph: recorded once, then replayed by a single launch.

This follows the PyTorch notes on CUDA graphs, "whole-network capture": warm up on a side stream, record on another, and
replay with new content in the same tensors. Everything that changes from step to step therefore lives in device
tensors: the batch, the learning rate and step count of a capturable optimizer, the offset of the random generator
(which torch advances at each replay). Gradients and activations live in the graph's memory. Parameters, buffers and
moments belong to the model and the optimizer, so validations, checkpoints and eager steps in between see their current
values.
"""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from kdcache.distill import Losses, Streams
from kdcache.distill.batch import tensors_of
from kdcache.training.step.eager import EagerStep

WARM_UP = 3
"""Steps before recording: kernels are compiled and loaded, library handles and optimizer state are made."""


class GraphedStep:
    """A step that is recorded as a CUDA graph for the shapes of `batch`. Batches of other shapes run eagerly.

    Calling it with a batch learns from the batch. It returns the loss, the terms and the tasks' losses as one detached
    tensor (n,), in the order of `Losses`.

    Args:
        eager: the step, whose optimizer is capturable.
        forward: the step's forward, eager or compiled.
        batch: a batch with the shapes of all batches.
    Raises: RuntimeError if the step waits for the device, or does anything else that a graph cannot record.
    """

    def __init__(self, eager: EagerStep, forward: Callable[[Streams], Losses], batch: Streams) -> None:
        self._eager = eager
        with torch.cuda.device(eager.device), eager.rehearsal():
            # The very tensors that the graph reads.
            self._inputs = tuple(rows.empty_like(eager.device) for rows in batch)
            self._fill(batch)

            def run() -> Tensor:
                return eager.learn(forward(self._inputs))

            # Nodes of an earlier backward that a cycle keeps alive would pull the parameters' gradients to its stream.
            gc.collect()
            warm_up(run)
            self._replay, self._losses = record(run, eager.device)

    def __call__(self, batch: Streams) -> Tensor:
        """Copy a batch into the graph's inputs, replay the graph, and return the batch's losses, a tensor (n,)."""
        if not _fits(batch, self._inputs):
            return self._eager(batch)
        with torch.cuda.device(self._eager.device):
            self._fill(batch)  # mostly from a slot on the device (device_prefetch.py)
            self._replay()
            return self._losses.clone()  # the next replay overwrites them

    def _fill(self, batch: Streams) -> None:
        for inputs, rows in zip(self._inputs, batch, strict=True):
            inputs.copy_from(rows)


def warm_up(run: Callable[[], Tensor]) -> None:
    """Call `run` four times on a side stream. In the last call, waiting for the device raises an error.

    A wait is found here and not during the recording, because an interrupted recording is hard to recover from.

    Raises: RuntimeError if the last call waits for the device.
    """
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    try:
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                run()
            with refused_synchronisation():
                run()
    finally:
        torch.cuda.current_stream().wait_stream(side)


def record(run: Callable[[], Tensor], device: torch.device) -> tuple[Callable[[], None], Tensor]:
    """Record a step as a CUDA graph, without running it.

    Args:
        run: takes a step and returns its losses.
        device: the CUDA device.
    Returns: a function that replays the graph, and the tensor into which every replay writes its losses.
    """
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()  # type: ignore[no-untyped-call]
    gc.collect()
    try:
        # thread_local: the loader's thread pins memory meanwhile, which would break a global recording off.
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            result = run()
    except Exception:
        _renew_generator(device)
        raise
    return graph.replay, result


def _fits(batch: Streams, static: Streams) -> bool:
    """Return True if a batch has the shapes and dtypes that the graph reads."""
    pairs = zip(tensors_of(batch), tensors_of(static), strict=True)
    return all(part.shape == recorded.shape and part.dtype == recorded.dtype for part, recorded in pairs)


@contextmanager
def refused_synchronisation() -> Iterator[None]:
    """Make operations that wait for the GPU raise a RuntimeError, in a with block."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def _renew_generator(device: torch.device) -> None:
    """Give the device's random generator a new state.

    After an interrupted recording the generator would never draw again, because it still counts as recorded.
    """
    index = torch.cuda.current_device() if device.index is None else device.index
    fresh = torch.Generator(device=device)
    torch.cuda.default_generators[index].graphsafe_set_state(fresh.graphsafe_get_state())
