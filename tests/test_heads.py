"""What a head's raw output means, against formulas in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kdcache.heads import CategoricalHead, RegressionHead, head_kind, raw_of, values_of

RAW = st.floats(-60, 300)


def oracle(raw: float, parameterisation: str, max_depth: float | None) -> float:
    value = {"softplus": np.logaddexp(0, raw), "exp": math.exp(raw), "identity": raw}[parameterisation]
    return float(value) if max_depth is None else float(np.clip(value, -max_depth, max_depth))


@given(RAW, st.sampled_from(["softplus", "exp", "identity"]), st.sampled_from([None, 0.5, 80.0]))
def test_values_are_those_of_the_formula(raw, parameterisation, max_depth) -> None:
    for dtype, rtol in ((torch.float64, 1e-12), (torch.float32, 3e-5)):
        if dtype == torch.float32 and max_depth is None and raw > 80:  # the exponential leaves float32
            continue
        values = values_of(torch.tensor(raw, dtype=dtype), parameterisation, max_depth)
        assert values.dtype == dtype
        assert float(values) == pytest.approx(oracle(raw, parameterisation, max_depth), rel=rtol, abs=1e-12)


@given(st.floats(1e-3, 200), st.sampled_from(["softplus", "exp", "identity"]))
def test_the_raw_output_is_the_reverse(value, parameterisation) -> None:
    exact = torch.tensor(value, dtype=torch.float64)
    torch.testing.assert_close(values_of(raw_of(exact, parameterisation), parameterisation, None), exact)
    single = values_of(raw_of(exact.float(), parameterisation), parameterisation, None)
    torch.testing.assert_close(single, exact.float(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("parameterisation", ["softplus", "exp", "identity"])
def test_gradients_are_finite_and_pass_the_clip(parameterisation) -> None:
    raw = torch.tensor([-50.0, 0.0, 1.0, 500.0], requires_grad=True)
    values = values_of(raw, parameterisation, 80.0)
    values.sum().backward()
    assert torch.equal(values, values_of(raw.detach(), parameterisation, 80.0))
    assert raw.grad is not None
    assert raw.grad.isfinite().all()
    assert raw.grad[-1] == pytest.approx(80 if parameterisation == "exp" else 1)  # that of a value at the bound
    assert raw.grad[1] > 0
    inside = torch.linspace(-3, 3, 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: values_of(x, parameterisation, 80.0), inside)


def test_half_precision_is_widened() -> None:
    assert values_of(torch.ones(2, dtype=torch.bfloat16), "exp", None).dtype == torch.float32


@pytest.mark.parametrize(
    ("declaration", "channels", "head"),
    [
        ("categorical", 5, CategoricalHead(5)),
        ("regression", 1, RegressionHead()),
        ({"kind": "regression", "parameterisation": "exp", "max_depth": 10}, 1, RegressionHead(1, "m", "exp", 10)),
        (
            {"kind": "regression", "unit": "relative", "max_depth": None},
            2,
            RegressionHead(2, "relative", max_depth=None),
        ),
    ],
)
def test_a_head_is_what_is_declared(declaration, channels, head) -> None:
    assert head_kind(declaration, channels) == head


@pytest.mark.parametrize(
    ("declaration", "message"),
    [
        ("depth", "kind is categorical or regression"),
        (7, "kind is categorical or regression"),
        ({"parameterisation": "exp"}, "kind is categorical or regression"),
        ({"kind": "regression", "maximum": 3}, "maximum"),
        ({"kind": "regression", "channels": 2}, "2 channels are declared, 1 are returned"),
        ({"kind": "categorical", "classes": 4}, "4 channels are declared, 1 are returned"),
        ({"kind": "regression", "parameterisation": "relu"}, "one of softplus, exp, identity, not relu"),
        ({"kind": "regression", "max_depth": 0}, "above 0"),
        ({"kind": "regression", "max_depth": math.inf}, "finite"),
    ],
)
def test_a_declaration_that_makes_no_head_is_refused(declaration, message) -> None:
    with pytest.raises(ValueError, match=message):
        head_kind(declaration, 1)


def test_the_range_follows_from_the_parameterisation() -> None:
    assert RegressionHead(max_depth=10).range == (0, 10)
    assert RegressionHead(parameterisation="identity", max_depth=10).range == (-10, 10)
    assert RegressionHead(max_depth=None).range is None
