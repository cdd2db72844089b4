"""Pseudo labels of the weak view: forwards in training, without gradient, by the student or its moving average.

    batch.weak (pixels before the jitter) --network in eval mode--> logits --best class, probability--> batch.pseudo

They are made before a step, from its initial weights. The step itself (eager, compiled or a CUDA graph) reads them like
labels. In eval mode (running statistics, no dropout) an image's pseudo labels do not depend on the rest of the batch,
so processes and `--accumulate` change nothing. Every network runs one forward per step over the rows of all streams
that learn from it, or one for each part of a batch.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from kdcache.distill import Criterion, Streams
from kdcache.distill.batch import PseudoLabels
from kdcache.distill.terms import labellers, pseudo_labels
from kdcache.models import SegmentationModel
from kdcache.training.step.ema import ModelEma


class WeakView:
    """Predicts pseudo labels on the weak views of a batch.

    Calling it with the batches of all streams returns them on the device, with pseudo labels and without weak views.

    Args:
        model: the student.
        ema: the moving average of its weights. None if no loss term uses it.
        criterion: the loss, whose terms decide which network predicts: `student` or `ema`.
        device: where the model is.
        bf16: True runs the model under autocast to bfloat16.
        parts: number of parts in which the samples go through the model.
        impl: the implementation of the kernels: `auto`, `triton`, `numba` or `reference`.

    Attributes:
        forwards: number of forward passes so far.
    """

    def __init__(
        self,
        model: SegmentationModel,
        ema: ModelEma | None,
        criterion: Criterion,
        *,
        device: torch.device,
        bf16: bool = False,
        parts: int = 1,
        impl: str = "auto",
    ) -> None:
        self._model, self._ema, self._device = model, ema, device
        self._bf16, self._parts, self._impl = bf16, parts, impl
        self._wanted = list(map(labellers, criterion.losses))
        self.forwards = 0
        self._seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @property
    def needed(self) -> bool:
        """True if any stream learns from pseudo labels of its weak views."""
        return any(self._wanted)

    @property
    def seconds(self) -> float:
        """The time of all forward passes for pseudo labels, in seconds. On a GPU this waits for the last pass."""
        for begin, end in self._events:
            end.synchronize()
            self._seconds += begin.elapsed_time(end) / 1000
        self._events.clear()
        return self._seconds

    def __call__(self, streams: Streams) -> Streams:
        """Return the batch on the device, with `pseudo` filled in and `weak` removed.

        Unchanged if nothing is needed.
        """
        if not self.needed:
            return streams
        streams = tuple(batch.to(self._device, non_blocking=True) for batch in streams)
        with self._timed():
            labels = self._made(streams)
        return tuple(replace(batch, weak=None, pseudo=pseudo) for batch, pseudo in zip(streams, labels, strict=True))

    def _made(self, streams: Streams) -> list[dict[str, PseudoLabels]]:
        """Return for each stream: `student` or `ema` -> the pseudo labels that it predicts."""
        by_stream: list[dict[str, PseudoLabels]] = [{} for _ in streams]
        for by in dict.fromkeys(by for networks in self._wanted for by in networks):
            mine = [number for number, networks in enumerate(self._wanted) if by in networks]
            weak = {number: pixels for number in mine if (pixels := streams[number].weak) is not None}
            labels = self._predict(torch.cat(list(weak.values())), by)
            for number, label, confidence in zip(
                weak, *(part.split(list(map(len, weak.values()))) for part in pytree.tree_leaves(labels)), strict=True
            ):
                by_stream[number][by] = PseudoLabels(label, confidence)
        return by_stream

    @torch.no_grad()
    def _predict(self, pixels: Tensor, by: str) -> PseudoLabels:
        was_training = self._model.training
        with nullcontext() if by == "student" or self._ema is None else self._ema.in_place():
            try:
                self._model.eval()
                parts = [self._forward(part) for part in pixels.chunk(self._parts)]
            finally:
                self._model.train(was_training)
        labels: PseudoLabels = pytree.tree_map(lambda *each: torch.cat(each), *parts)
        return labels

    def _forward(self, pixels: Tensor) -> PseudoLabels:
        self.forwards += 1
        x_B3HW = self._model.normalise(pixels)
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._bf16):
            logits = self._model(x_B3HW).logits
        size = (pixels.shape[1], pixels.shape[2])
        return pseudo_labels(logits, size, align_corners=self._model.align_corners, impl=self._impl)

    @contextmanager
    def _timed(self) -> Iterator[None]:
        if self._device.type != "cuda":
            began = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - began
            return
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        yield
        end.record()
        self._events.append((begin, end))
