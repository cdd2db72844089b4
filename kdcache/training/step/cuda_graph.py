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
    """A step recorded for the shapes of `batch`. Batches of other shapes run eagerly.

    Args:
        eager: the step, with a capturable optimizer.
        forward: its forward, eager or compiled.
    Raises: RuntimeError if the step waits for the device, or does anything else that a graph cannot hold.
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
        """Copy a batch into the graph's inputs, replay it and return the losses."""
        if not _fits(batch, self._inputs):
            return self._eager(batch)
        with torch.cuda.device(self._eager.device):
            self._fill(batch)  # mostly from a slot on the device (device_prefetch.py)
            self._replay()
            return self._losses.clone()  # the next replay overwrites them

    def _fill(self, batch: Streams) -> None:
        for own, rows in zip(self._inputs, batch, strict=True):
            own.copy_from(rows)


def warm_up(run: Callable[[], Tensor]) -> None:
    """Run a few times on a side stream, the last time with waiting for the device forbidden.

    It is better to find a wait here than while recording, because an interrupted recording is hard to recover from.
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
    """Record a step without running it. Return the replay function, and the result that every replay overwrites."""
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
    """Return whether a batch has the shapes and types that the graph reads."""
    pairs = zip(tensors_of(batch), tensors_of(static), strict=True)
    return all(part.shape == own.shape and part.dtype == own.dtype for part, own in pairs)


@contextmanager
def refused_synchronisation() -> Iterator[None]:
    """Make operations that wait for the device raise a RuntimeError, in a with block."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def _renew_generator(device: torch.device) -> None:
    """Give the device's generator a new state.

    After an interrupted recording the generator still counts as recorded, and would never draw again.
    """
    index = torch.cuda.current_device() if device.index is None else device.index
    fresh = torch.Generator(device=device)
    torch.cuda.default_generators[index].graphsafe_set_state(fresh.graphsafe_get_state())
