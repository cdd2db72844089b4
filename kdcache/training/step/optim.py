"""Optimizers and learning-rate schedules.

The schedules keep their rate as a host number and write it into the optimizer. Torch's schedules read it back, which
for a rate on the device (as a CUDA graph needs it) would wait for the device at every step.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from kdcache.distill.terms import discriminator_parameters
from kdcache.distill.terms.unlabelled.predictions import Discriminator
from kdcache.errors import RecipeError
from kdcache.settings.parse import lr_scales, warmup_steps
from kdcache.settings.training import Optimizer

PATIENCE = 5
"""Validations without a better score before `plateau` halves the rate."""
BETTER = 1e-4
"""The relative gain over the best score that counts as better."""
MOMENTUM, POWER = 0.9, 0.9
"""Momentum of SGD, and the exponent of `poly`."""


def make_optimizer(
    model: nn.Module, settings: Optimizer, criterion: nn.Module | None = None, *, capturable: bool = False
) -> torch.optim.Optimizer:
    """Make AdamW, Adam or SGD, without weight decay on biases and normalisation weights.

    Args:
        model: the model to train.
        settings: optimizer, learning rate, weight decay and factors on the rate.
        criterion: the loss. Its projections are trained without these factors on the rate, and its discriminators by
            Adam at their own rate. None trains only the model.
        capturable: True makes an optimizer for a CUDA graph: its rate and step count are tensors on the device, and its
            update is one fused kernel.
    Raises: RecipeError if a prefix in `lr_scale` begins no parameter's name, and for SGD with a discriminator.
    """
    device = next(model.parameters()).device
    groups: list[dict[str, Any]] = [
        {
            "params": parameters,
            "weight_decay": settings.weight_decay if decayed else 0.0,
            "lr": torch.tensor(settings.lr, dtype=torch.float32, device=device) if capturable else settings.lr,
            "lr_scale": scale,
        }
        for (scale, decayed), parameters in _by_scale(model, criterion, lr_scales(settings.lr_scale)).items()
    ]
    if adversaries := [] if criterion is None else discriminator_parameters(criterion):
        if settings.optimizer == "sgd":
            raise RecipeError(
                "Cannot use --optimizer sgd with a term adversarial: its discriminator is trained by Adam",
                fix="Use --optimizer adamw or adam.",
            )
        options_of_discriminator = {
            "params": adversaries,
            "lr_scale": Discriminator.RATE / settings.lr,
            "betas": Discriminator.BETAS,
        }
        groups.append({**groups[0], **options_of_discriminator, "weight_decay": 0.0})
    options: dict[str, Any] = {"fused": True} if capturable else {}
    if settings.optimizer == "sgd":
        return torch.optim.SGD(groups, momentum=MOMENTUM, **options)
    kind = torch.optim.Adam if settings.optimizer == "adam" else torch.optim.AdamW
    return kind(groups, capturable=capturable, **options)


def _by_scale(
    model: nn.Module, criterion: nn.Module | None, scales: Mapping[str, float]
) -> dict[tuple[float, bool], list[nn.Parameter]]:
    """Group the trained parameters by their factor on the learning rate, and by whether they have weight decay.

    Names are the model's state dict names, as in a file of weights.
    """
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {(1.0, True): [], (1.0, False): []}
    unused = set(scales)
    names = {id(tensor): name for name, tensor in model.state_dict(keep_vars=True).items()} if scales else {}
    apart = set() if criterion is None else set(map(id, discriminator_parameters(criterion)))
    for parameter in (*model.parameters(), *(criterion.parameters() if criterion is not None else ())):
        if parameter.requires_grad and id(parameter) not in apart:
            name = names.get(id(parameter), "")
            prefix = max((prefix for prefix in scales if name.startswith(prefix)), key=len, default="")
            unused.discard(prefix)
            groups.setdefault((scales.get(prefix, 1.0), parameter.ndim > 1), []).append(parameter)
    if unused:
        heads = sorted({name.partition(".")[0] for name in names.values()})
        raise RecipeError(
            f"No parameter begins with {sorted(unused)[0]!r}, as --lr-scale asks",
            fix=f"Use a prefix of a name, such as {next(iter(names.values()))}. Names begin with {', '.join(heads)}.",
        )
    return groups


def load_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Load the momentum and step counts of a saved state, from any device, into an optimizer.

    The optimizer keeps its options, such as the learning rate. `state` is the `state_dict` of an optimizer with the
    same parameters.
    """
    groups = [
        {**group, "params": saved["params"]}
        for group, saved in zip(optimizer.param_groups, state["param_groups"], strict=True)
    ]
    optimizer.load_state_dict({"state": state["state"], "param_groups": groups})
    for group in optimizer.param_groups:
        if not group.get("capturable"):
            for parameter in group["params"]:
                moments = optimizer.state.get(parameter, {})
                if "step" in moments:  # counted on the host: elsewhere every update would wait for it
                    moments["step"] = moments["step"].cpu()


def distill_weight_scale(schedule: str, step: int, iterations: int) -> float:
    """Return the factor, in 0..1, on the weights of the teacher's terms at a step.

    Args:
        schedule: `constant` is always 1. `fade` falls linearly from 1 at step 0 towards 0, which it would reach one
            step after the last (teacher annealing, Clark et al. 2019, arXiv 1907.04829, section 3.3). `warmup:N` rises
            linearly from 1/N at step 0 to 1 at step N - 1, and stays there.
        step: number of the step, from 0.
        iterations: number of steps of the training.
    """
    if schedule == "constant":
        return 1.0
    if schedule == "fade":
        return max(0.0, 1.0 - step / iterations)
    return min(1.0, (step + 1) / warmup_steps(schedule))


class Schedule:
    """Sets the optimizer's learning rate over the training.

    | schedule | learning rate |
    | --- | --- |
    | `poly` | lr * (1 - step / iterations)^0.9, after a linear warm-up |
    | `constant` | lr, after a linear warm-up |
    | `plateau` | lr, halved after more than 5 validations in a row without a better score |

    Args:
        optimizer: its parameter groups get the rate, times their `lr_scale`.
        settings: lr, schedule, warmup and iterations.

    Attributes:
        lr: learning rate of the next step.
    """

    lr: float

    def __init__(self, optimizer: torch.optim.Optimizer, settings: Optimizer) -> None:
        assert settings.iterations is not None, "resolve the settings first"
        self._optimizer = optimizer
        self._highest, self._kind = settings.lr, settings.schedule
        self._warmup, self._iterations = settings.warmup, settings.iterations
        self._step, self._best, self._stalled = 0, -float("inf"), 0
        self._set(settings.lr * self._factor(0))

    def after_step(self) -> None:
        """Set the learning rate of the next step. Call this after every step. The schedule `plateau` ignores it."""
        if self._kind != "plateau":
            self._step += 1
            self._set(self._highest * self._factor(self._step))

    def after_validation(self, score: float) -> None:
        """Tell the schedule `plateau` the score of a validation, so that it may halve the learning rate.

        A higher score is better. The other schedules ignore this call.
        """
        if self._kind != "plateau":
            return
        if score > self._best * (1 + BETTER if self._best > 0 else 1 - BETTER):
            self._best, self._stalled = score, 0
        else:
            self._stalled += 1
        if self._stalled > PATIENCE:
            self._stalled = 0
            self._set(self.lr / 2)

    def state_dict(self) -> dict[str, float]:
        """Return the state for a checkpoint as plain numbers, so that it can be loaded without pickle.

        `plateau` has `best`, `num_bad_epochs` and `lr`. The other schedules have `last_epoch`, the number of steps.
        """
        if self._kind == "plateau":
            return {"best": self._best, "num_bad_epochs": self._stalled, "lr": self.lr}
        return {"last_epoch": self._step}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from the `state_dict` of the same kind of schedule."""
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
        return max(0.0, 1.0 - step / self._iterations) ** POWER if self._kind == "poly" else 1.0

    def _set(self, lr: float) -> None:
        self.lr = lr
        for group in self._optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(lr * group["lr_scale"])  # in place: a CUDA graph reads this very tensor
            else:
                group["lr"] = lr * group["lr_scale"]
