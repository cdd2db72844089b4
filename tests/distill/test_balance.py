"""The balance of tasks beside its formulas, and in a training loop written by hand."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from kdcache.distill import FixedBalance, UncertaintyBalance
from kdcache.errors import RecipeError

FORMS = {"segmentation": "classes", "depth": "absolute", "height": "squared"}


def formula(form: str, loss: float, s: float) -> float:
    """Kendall's, in sigma: sigma^2 = exp(s), and b = exp(s) of a Laplacian."""
    if form == "absolute":
        b = math.exp(s)
        return loss / b + math.log(b)
    sigma = math.sqrt(math.exp(s))
    return loss / ((2 if form == "squared" else 1) * sigma**2) + math.log(sigma)


def balance_at(values: dict[str, float]) -> UncertaintyBalance:
    balance = UncertaintyBalance(FORMS).double()  # type: ignore[arg-type]
    with torch.no_grad():
        for head, s in values.items():
            balance.log_variance[head].fill_(s)
    return balance


@settings(deadline=None, max_examples=40)
@given(st.tuples(*[st.floats(0, 1e3)] * 3), st.tuples(*[st.floats(-5, 5)] * 3))
def test_losses_are_weighed_as_the_paper_writes_it(losses: tuple[float, ...], learnt: tuple[float, ...]) -> None:
    balance = balance_at(dict(zip(FORMS, learnt, strict=True)))
    expected = math.fsum(map(formula, FORMS.values(), losses, learnt))
    given_losses = {head: torch.tensor(loss, dtype=torch.float64) for head, loss in zip(FORMS, losses, strict=True)}
    assert balance(given_losses).item() == pytest.approx(expected, rel=1e-12, abs=1e-12)


def test_gradients_are_those_of_the_formula() -> None:
    balance = balance_at({"segmentation": 0.3, "depth": -1.0, "height": 2.0})
    losses = torch.tensor([1.5, 0.2, 7.0], dtype=torch.float64, requires_grad=True)
    own = tuple(balance.parameters())

    def loss(values: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = balance(dict(zip(FORMS, values, strict=True)))
        return result

    assert torch.autograd.gradcheck(loss, (losses, *own))
    (gradient,) = torch.autograd.grad(loss(losses), losses)
    assert gradient.tolist() == pytest.approx(list(balance.weights().values()))


def test_a_head_that_counts_nothing_is_left_out_with_its_variance() -> None:
    balance = balance_at({})
    losses = {head: torch.tensor(2.0 if head != "depth" else 0.0).double() for head in FORMS}
    counted = {head: torch.tensor(3.0 if head != "depth" else 0.0) for head in FORMS}
    balance(losses, counted).backward()
    assert balance.log_variance["depth"].grad == 0
    assert balance.log_variance["segmentation"].grad == pytest.approx(0.5 - 2.0)
    assert balance(losses, counted).item() == pytest.approx(3.0)


def train(steps: int, checkpoint: Path | None = None, resume: Path | None = None) -> tuple[nn.Module, nn.Module]:
    """A network of two heads that learns numbers in metres and in thousandths, a task of noise 4 and one of 0.5."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(256, 4, generator=generator)
    noise = torch.randn(256, 2, generator=generator) * torch.tensor([4.0, 0.5])
    y = x @ torch.tensor([[1.0, 2.0], [0.5, -1.0], [0.0, 1.0], [2.0, 0.0]]) + noise
    torch.manual_seed(1)
    network, balance = nn.Linear(4, 2), UncertaintyBalance({"coarse": "squared", "fine": "squared"})
    optimizer = torch.optim.AdamW(
        [{"params": network.parameters()}, {"params": balance.parameters(), "weight_decay": 0.0}], lr=0.05
    )
    first = 0
    if resume is not None:
        state = torch.load(resume, weights_only=True)
        first = state["step"]
        for part, name in ((network, "network"), (balance, "balance"), (optimizer, "optimizer")):
            part.load_state_dict(state[name])  # type: ignore[attr-defined]
    for step in range(first, steps):
        error = (network(x) - y).square().mean(0)
        optimizer.zero_grad()
        balance({"coarse": error[0], "fine": error[1]}).backward()
        optimizer.step()
        if checkpoint is not None and step + 1 == steps:
            parts = {"network": network, "balance": balance, "optimizer": optimizer}
            torch.save({"step": steps} | {name: part.state_dict() for name, part in parts.items()}, checkpoint)
    return network, balance


def test_a_training_learns_the_noise_of_each_head() -> None:
    """At the end each variance is the head's own squared error, as the maximum of the likelihood has it."""
    _, balance = train(600)
    learnt = {head: s.exp().item() for head, s in balance.log_variance.items()}  # type: ignore[operator, union-attr]
    assert learnt["coarse"] == pytest.approx(16, rel=0.25)
    assert learnt["fine"] == pytest.approx(0.25, rel=0.25)


def test_a_training_resumes_to_the_bit(tmp_path: Path) -> None:
    train(5, checkpoint=tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert set(state["balance"]) == {"log_variance.coarse", "log_variance.fine"}
    for whole, resumed in zip(train(9), train(9, resume=tmp_path / "state.pt"), strict=True):
        for name, value in whole.state_dict().items():
            assert torch.equal(value, resumed.state_dict()[name])


def test_fixed_weights_add_up() -> None:
    losses = {"depth": torch.tensor(4.0, requires_grad=True), "segmentation": torch.tensor(1.0, requires_grad=True)}
    balance = FixedBalance({"segmentation": 0.5, "depth": 0.25})
    loss = balance(losses)
    assert loss.item() == 1.5
    loss.backward()
    assert {head: x.grad.item() for head, x in losses.items() if x.grad is not None} == balance.weights()
    assert not list(balance.parameters())


def test_bad_balances_are_refused() -> None:
    with pytest.raises(RecipeError, match="finite number"):
        FixedBalance({"depth": math.nan})
    with pytest.raises(RecipeError, match="finite number"):
        FixedBalance({})
    with pytest.raises(RecipeError, match="forms of losses: depth cubed"):
        UncertaintyBalance({"depth": "cubed"})  # type: ignore[dict-item]
    for balance in (FixedBalance({"depth": 1.0}), UncertaintyBalance({"depth": "absolute"})):
        with pytest.raises(RecipeError, match=r"losses of segmentation: the balance is made for depth"):
            balance({"segmentation": torch.ones(())})
