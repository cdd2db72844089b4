"""Optimizers and learning-rate schedules.

The schedules know their rate as a number of the host and write it into the optimizer. Those of torch read it back from
there, which for a rate on the device (as a CUDA graph needs it) would wait for the device at every step.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from kdcache.train.config import TrainConfig

PATIENCE = 5
"""Validations without a better score before `plateau` halves the rate."""
BETTER = 1e-4
"""The relative gain over the best score that counts as better."""


def make_optimizer(model: nn.Module, config: TrainConfig, *, capturable: bool = False) -> torch.optim.Optimizer:
    """Make AdamW, Adam or SGD; biases and normalisation weights are not decayed.

    Args:
        capturable: for a CUDA graph: rate and step count are tensors beside the parameters, which a replay reads, and
            the update is torch's fused kernel (its other SGD reads the rate back to the host).
    """
    decayed = [p for p in model.parameters() if p.requires_grad and p.ndim > 1]
    plain = [p for p in model.parameters() if p.requires_grad and p.ndim <= 1]
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    options: dict[str, Any] = {"lr": config.lr}
    if capturable:
        device = next(model.parameters()).device
        options = {"lr": torch.tensor(config.lr, dtype=torch.float32, device=device), "fused": True}
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, momentum=config.momentum, **options)
    kind = torch.optim.Adam if config.optimizer == "adam" else torch.optim.AdamW
    return kind(groups, capturable=capturable, **options)


def load_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Load moments and step counts, saved on any device by any kind of step; the optimizer's options stay."""
    groups = [
        {**own, "params": saved["params"]}
        for own, saved in zip(optimizer.param_groups, state["param_groups"], strict=True)
    ]
    optimizer.load_state_dict({"state": state["state"], "param_groups": groups})
    for group in optimizer.param_groups:
        if not group.get("capturable"):
            for parameter in group["params"]:
                moments = optimizer.state.get(parameter, {})
                if "step" in moments:  # counted on the host: elsewhere every update would wait for it
                    moments["step"] = moments["step"].cpu()


def distill_weight_scale(config: TrainConfig, step: int) -> float:
    """The factor, 0 to 1, on the weights of the teacher's terms at a step.

    `constant` is 1 throughout; `fade` falls on a line from 1 to 0 (Clark et al. 2019, arXiv 1907.04829, section 3.3:
    teacher annealing).
    """
    assert config.iterations is not None, "resolve the settings first"
    return 1.0 if config.distill_schedule == "constant" else max(0.0, 1.0 - step / config.iterations)


class Schedule:
    """The learning rate: per step (`poly`, `constant`, both with warm-up), or after a validation (`plateau`).

    poly: lr * (1 - step/iterations)^power. plateau: halved when validation mIoU has not risen for 5 validations.

    Attributes:
        lr: learning rate of the next step.
    """

    lr: float

    def __init__(self, optimizer: torch.optim.Optimizer, config: TrainConfig) -> None:
        assert config.iterations is not None, "resolve the settings first"
        self._optimizer = optimizer
        self._highest, self._kind = config.lr, config.schedule
        self._warmup, self._power, self._iterations = config.warmup, config.power, config.iterations
        self._step, self._best, self._stalled = 0, -float("inf"), 0
        self._set(config.lr * self._factor(0))

    def after_step(self) -> None:
        if self._kind != "plateau":
            self._step += 1
            self._set(self._highest * self._factor(self._step))

    def after_validation(self, miou: float) -> None:
        if self._kind != "plateau":
            return
        if miou > self._best * (1 + BETTER):
            self._best, self._stalled = miou, 0
        else:
            self._stalled += 1
        if self._stalled > PATIENCE:
            self._stalled = 0
            self._set(self.lr / 2)

    def state_dict(self) -> dict[str, float]:
        """The state as plain values only, so that a checkpoint loads without pickle."""
        if self._kind == "plateau":
            return {"best": self._best, "num_bad_epochs": self._stalled, "lr": self.lr}
        return {"last_epoch": self._step}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state_dict` of the same kind of schedule."""
        if self._kind == "plateau":
            self._best, self._stalled = state["best"], state["num_bad_epochs"]
            self._set(state["lr"])
        else:
            self._step = state["last_epoch"]
            self._set(self._highest * self._factor(self._step))

    def _factor(self, step: int) -> float:
        if self._kind == "plateau":
            return 1.0
        if step < self._warmup:
            return (step + 1) / self._warmup
        return max(0.0, 1.0 - step / self._iterations) ** self._power if self._kind == "poly" else 1.0

    def _set(self, lr: float) -> None:
        self.lr = lr
        for group in self._optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(lr)  # in place: a CUDA graph reads this very tensor
            else:
                group["lr"] = lr
