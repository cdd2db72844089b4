"""An exponential moving average (EMA) of a model's weights, which often scores better than the weights themselves.

After optimizer step n, counted from 1: average = d(n) * average + (1 - d(n)) * weights, with the decay
d(n) = min(decay, (1 + n) / (10 + n)). This is the warm-up of TensorFlow's `ExponentialMovingAverage`: the average
covers the last 9th of the steps until it is as long as `decay` says (0.999 from step 8,991 on), so the initial weights
do not dominate short trainings.

Parameters and floating-point buffers are averaged, including BatchNorm's running statistics, as in timm's `ModelEmaV3`
and EMAN (Cai et al. 2021, arXiv 2101.08482): statistics of the newest weights would not fit averaged ones.
Integer buffers, such as BatchNorm's count of batches, are copied.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class ModelEma:
    """An exponential moving average (EMA) of a model's weights, on the model's device. It begins as a copy of them.

    The model is neither copied nor wrapped. So hooks work, and the tensors that a CUDA graph or DDP uses stay in place.

    Args:
        model: on its device. From now on its parameters and buffers must be changed in place, not replaced.
        decay: above 0 and below 1. In early steps the decay is smaller (see `decay_at`).
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._decay = decay
        self._weights: dict[str, Tensor] = model.state_dict()
        self._averages = {name: weights.detach().clone() for name, weights in self._weights.items()}
        self._averaged = [name for name, weights in self._weights.items() if weights.is_floating_point()]
        self._copied = [name for name in self._weights if name not in self._averaged]

    def decay_at(self, step: int) -> float:
        """Return the decay of the update after optimizer step `step`, counted from 1.

        It is min(decay, (1 + step) / (10 + step)), so the initial weights do not dominate short trainings.
        """
        return min(self._decay, (1 + step) / (10 + step))

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move each averaged weight towards the model's by the share 1 - `decay_at(step)` of their difference.

        Call it after each optimizer step. `step` is the number of that step, from 1. Early steps move the average more.
        Tensors other than floats are copied.
        """
        torch._foreach_lerp_(*self._pairs(self._averaged), 1 - self.decay_at(step))
        if self._copied:
            torch._foreach_copy_(*self._pairs(self._copied))

    def state_dict(self) -> dict[str, Tensor]:
        """Return the averaged weights, by the names of the model's state dict.

        The next update changes these tensors.
        """
        return self._averages

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Replace the averaged weights by those in `state`, with the names and shapes of the model's state dict."""
        for name, average in self._averages.items():
            average.copy_(state[name])

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Give the model the averaged weights in a with block. Afterwards, its own weights are restored exactly."""
        weights_before = {name: weights.clone() for name, weights in self._weights.items()}
        self._fill(self._averages)
        try:
            yield
        finally:
            self._fill(weights_before)

    @torch.no_grad()
    def _fill(self, state: Mapping[str, Tensor]) -> None:
        """Copy the tensors of `state` into the model."""
        torch._foreach_copy_(list(self._weights.values()), list(state.values()))

    def _pairs(self, names: list[str]) -> tuple[list[Tensor], list[Tensor]]:
        return [self._averages[name] for name in names], [self._weights[name] for name in names]
