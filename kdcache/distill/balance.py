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
        weights: head -> the weight of its loss, finite and at least 0.

    Attributes:
        reads_counts: False, because `forward` ignores `counted`, the denominators of the losses.
    Raises: RecipeError for any other weight, and if there is no head.
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
        """Return the weight of each head's loss, as a dict: head -> Python float."""
        return self._weights

    def weights(self) -> dict[str, float]:
        """Return the weight of each head's loss, as a dict: head -> Python float."""
        return dict(self._weights)

    def forward(self, losses: Mapping[str, Tensor], counted: Mapping[str, Tensor] | None = None) -> Tensor:
        """Return the weighted sum of the heads' losses, a 0-dimensional tensor.

        Args:
            losses: head -> its loss, 0-dimensional.
            counted: ignored, because a head without a counted pixel has the loss 0.
        Raises: RecipeError if `losses` does not have exactly the heads that the balance was made for.
        """
        _check_heads(losses, self.heads)
        return torch.stack([self._weights[head] * losses[head] for head in self.heads]).sum()


class UncertaintyBalance(nn.Module):
    """The sum of the heads' losses, each with a learnt weight.

    With s = `log_variance.<head>`, a head adds exp(-s) * loss + s / 2. For the form `squared`, exp(-s) is halved, and
    for `absolute`, s is added instead of s / 2. These parameters start at 0. Save them in the checkpoint. Give them to
    the optimizer without weight decay, which pulls s to 0.

    Args:
        forms: head -> the form of its loss: `classes` for cross-entropy, `squared` for squared errors, `absolute` for
            depth terms.

    Attributes:
        reads_counts: True, because `forward` reads `counted`, the denominators of the losses.
    Raises: RecipeError for an unknown form, and if there is no head.
    Source: Kendall, Gal and Cipolla 2018, arXiv 1705.07115.
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
        """Return the current weight of each head's loss, as a dict: head -> 0-dimensional tensor.

        The weight is exp(-s), or exp(-s) / 2 for a head of the form `squared`. s is the head's learnt log variance.
        """
        return {head: self._factor(head) * (-self.log_variance[head]).exp() for head in self.heads}

    def weights(self) -> dict[str, float]:
        """Return the current weight of each head's loss, as a dict: head -> Python float. This waits for the device."""
        return {head: float(factor) for head, factor in self.factors().items()}

    def forward(self, losses: Mapping[str, Tensor], counted: Mapping[str, Tensor] | None = None) -> Tensor:
        """Return the balanced sum of the heads' losses, 0-dimensional, with gradients to losses and log variances.

        Args:
            losses: head -> its loss, 0-dimensional.
            counted: head -> the denominator of its loss, such as the number of counted pixels, 0-dimensional. If a
                batch is divided (processes, accumulation), give the sum or mean over all parts. A head with 0 is left
                out. None keeps all heads.
        Raises: RecipeError if `losses` does not have exactly the heads that the balance was made for.
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
    """Return each loss term times its task's weight, as a dict: name of the term -> 0-dimensional tensor.

    Gradients reach only the terms, not the weights.

    Args:
        parts: name of a term -> its loss, 0-dimensional.
        tasks: name of a term -> its task, `segmentation` or `depth`.
        balance: gives the weight of each task.
    """
    factors = balance.factors()
    return {name: factors[tasks[name]] * part for name, part in parts.items()}


def _check_heads(losses: Mapping[str, Tensor], heads: tuple[str, ...]) -> None:
    if set(losses) != set(heads):
        raise RecipeError(
            f"Cannot balance losses of {', '.join(losses) or 'none'}: the balance is made for {', '.join(heads)}",
            fix="Balance the heads that are trained.",
        )
