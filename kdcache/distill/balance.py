"""The balance of tasks: combine the losses of several heads into one.

| balance | loss |
| --- | --- |
| `fixed` | sum of w_i L_i, w_i given: 0.5 each of two |
| `uncertainty` | sum over the heads of L_i weighed by a learnt variance (below) |

`uncertainty` learns one number s_i per head together with the network. s_i is the logarithm of a variance (of a scale,
for an absolute error), so the weight exp(-s_i) is above 0 whatever is learnt:

| form | loss of a head | for |
| --- | --- | --- |
| `squared` | L exp(-s) / 2 + s / 2 | mean squared errors: a Gaussian of variance exp(s) |
| `absolute` | L exp(-s) + s | errors like L1, berHu, SILog: a Laplacian of scale exp(s) |
| `classes` | L exp(-s) + s / 2 | cross-entropy of logits divided by the variance, as the paper approximates it |

Each is minimal at s = log L, log L and log 2L. The loss may be negative, and only its gradient has a meaning. A loss of
0 has no minimum, so a head that counts no pixel in a batch is left out of it, with its s.

Source: Kendall, Gal and Cipolla 2018, arXiv 1705.07115, section 3.2; the absolute form is the same with a Laplacian.
"""

from collections.abc import Mapping
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from kdcache.errors import RecipeError

Form = Literal["squared", "absolute", "classes"]
BALANCES = ("fixed", "uncertainty")


class FixedBalance(nn.Module):
    """The weighted sum of the heads' losses.

    Args:
        weights: the weight of each head, finite and at least 0.
    Raises: RecipeError for another weight, or none.
    """

    reads_counts: ClassVar[bool] = False

    def __init__(self, weights: Mapping[str, float]) -> None:
        super().__init__()
        if not weights or not all(0 <= weight < float("inf") for weight in weights.values()):
            raise RecipeError(
                "Invalid weights of heads: "
                f"{', '.join(f'{head} {weight}' for head, weight in weights.items()) or 'none'}",
                fix="Give each head a finite number from 0 on, for example segmentation 0.5, depth 0.5",
            )
        self.heads = tuple(weights)
        self._weights = dict(weights)

    def factors(self) -> Mapping[str, Tensor | float]:
        """Return the weight of each head's loss on its gradient."""
        return self._weights

    def weights(self) -> dict[str, float]:
        """Return the weight of each head's loss as Python numbers."""
        return dict(self._weights)

    def forward(self, losses: Mapping[str, Tensor], counted: Mapping[str, Tensor] | None = None) -> Tensor:
        """Return the loss of all heads, given scalars by head.

        `counted` is ignored: a head without a counted pixel has the loss 0.

        Raises: RecipeError for other heads than those with a weight.
        """
        _check_heads(losses, self.heads)
        return torch.stack([self._weights[head] * losses[head] for head in self.heads]).sum()


class UncertaintyBalance(nn.Module):
    """The heads' losses, each weighed by a learnt variance.

    Give its parameters to the optimizer, without weight decay (which pulls every weight to 1), and to the checkpoint.
    They are in its state dict as `log_variance.<head>`, and start at 0.

    Args:
        forms: the form of each head's loss.
    Raises: RecipeError for an unknown form, or no head.
    """

    reads_counts: ClassVar[bool] = True

    def __init__(self, forms: Mapping[str, Form]) -> None:
        super().__init__()
        if not forms or any(form not in get_args(Form) for form in forms.values()):
            raise RecipeError(
                f"Invalid forms of losses: {', '.join(f'{head} {form}' for head, form in forms.items()) or 'none'}",
                fix="Give each head classes (cross-entropy), squared (squared errors) or absolute (the terms of "
                "depth).",
            )
        self.forms = dict(forms)
        self.heads = tuple(forms)
        self.log_variance = nn.ParameterDict({head: nn.Parameter(torch.zeros(())) for head in forms})

    @torch.no_grad()
    def factors(self) -> Mapping[str, Tensor | float]:
        """Return the 0-dimensional weight of each head's loss: exp(-s), half of it for a squared error."""
        return {head: self._factor(head) * (-self.log_variance[head]).exp() for head in self.heads}

    def weights(self) -> dict[str, float]:
        """Return the weight of each head's loss, read from the device."""
        return {head: float(factor) for head, factor in self.factors().items()}

    def forward(self, losses: Mapping[str, Tensor], counted: Mapping[str, Tensor] | None = None) -> Tensor:
        """Return the loss of all heads, with gradients to the losses and to the variances.

        Args:
            losses: scalars by head.
            counted: how many pixels (images, class weights) each head's loss covers, 0-dimensional, over all processes
                and parts. A head with 0 is left out. None is all heads.
        Raises: RecipeError for other heads than those with a form.
        """
        _check_heads(losses, self.heads)
        parts = []
        for head in self.heads:
            s = self.log_variance[head]
            part = self._factor(head) * losses[head] * (-s).exp() + (s if self.forms[head] == "absolute" else s / 2)
            parts.append(part if counted is None else part * (counted[head] > 0))
        return torch.stack(parts).sum()

    def _factor(self, head: str) -> float:
        return 0.5 if self.forms[head] == "squared" else 1.0


Balance = FixedBalance | UncertaintyBalance


def weigh_parts(parts: Mapping[str, Tensor], tasks: Mapping[str, str], balance: Balance) -> dict[str, Tensor]:
    """Multiply terms of a loss by the weight of their task in `tasks`. Gradients reach only the terms."""
    factors = balance.factors()
    return {name: factors[tasks[name]] * part for name, part in parts.items()}


def _check_heads(losses: Mapping[str, Tensor], heads: tuple[str, ...]) -> None:
    if set(losses) != set(heads):
        raise RecipeError(
            f"Cannot balance losses of {', '.join(losses) or 'none'}: the balance is made for {', '.join(heads)}",
            fix="Balance the heads that are trained.",
        )
