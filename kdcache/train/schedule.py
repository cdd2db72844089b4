"""Optimizers and learning-rate schedules."""

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau

from kdcache.train.config import TrainConfig


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW, Adam or SGD; biases and normalisation weights are not decayed."""
    decayed = [p for p in model.parameters() if p.requires_grad and p.ndim > 1]
    plain = [p for p in model.parameters() if p.requires_grad and p.ndim <= 1]
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum)
    if config.optimizer == "adam":
        return torch.optim.Adam(groups, lr=config.lr)
    return torch.optim.AdamW(groups, lr=config.lr)


class Schedule:
    """The learning rate: per step (`poly`, `constant`, both with warm-up), or after a validation (`plateau`).

    poly: lr * (1 - step/iterations)^power. plateau: halved when validation mIoU has not risen for 5 validations.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, config: TrainConfig) -> None:
        assert config.iterations is not None, "resolve the settings first"
        self._optimizer = optimizer
        self._warmup, self._power, self._iterations = config.warmup, config.power, config.iterations
        self._poly = config.schedule == "poly"
        self._per_step = LambdaLR(optimizer, self._factor) if config.schedule != "plateau" else None
        self._plateau = (
            ReduceLROnPlateau(optimizer, mode="max", factor=0.5, patience=5) if config.schedule == "plateau" else None
        )

    @property
    def lr(self) -> float:
        return float(self._optimizer.param_groups[0]["lr"])

    def after_step(self) -> None:
        if self._per_step is not None:
            self._per_step.step()

    def after_validation(self, miou: float) -> None:
        if self._plateau is not None:
            self._plateau.step(miou)

    def state_dict(self) -> dict[str, object]:
        """Plain values only, so that a checkpoint loads without pickle."""
        if self._plateau is not None:
            return dict(self._plateau.state_dict())
        assert self._per_step is not None
        return {"last_epoch": self._per_step.last_epoch}

    def load_state_dict(self, state: dict[str, object]) -> None:
        if self._plateau is not None:
            self._plateau.load_state_dict(state)
        else:
            assert self._per_step is not None
            self._per_step.load_state_dict({**self._per_step.state_dict(), **state})

    def _factor(self, step: int) -> float:
        if step < self._warmup:
            return (step + 1) / self._warmup
        return max(0.0, 1.0 - step / self._iterations) ** self._power if self._poly else 1.0
