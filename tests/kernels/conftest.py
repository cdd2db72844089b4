"""Shared by the kernel tests: the devices they run on and the implementations that must agree.

Without a GPU, the Triton kernels run in Triton's interpreter: the same code, some thousand times slower. It is chosen
by an environment variable, in the conftest of all tests.
"""

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest
import torch

import kdcache_kernels

CUDA = torch.cuda.is_available()
HAS_CUDA = pytest.mark.skipif(CUDA, reason="the interpreter is for machines without a GPU")


class Backend(NamedTuple):
    """An implementation on a device."""

    impl: str
    device: torch.device

    @property
    def interpreted(self) -> bool:
        return self.impl == "triton" and self.device.type == "cpu"


BACKENDS = [
    pytest.param(("reference", "cpu"), id="reference-cpu"),
    pytest.param(("numba", "cpu"), id="numba-cpu"),
    pytest.param(("torch", "cpu"), id="torch-cpu"),
    *(
        [pytest.param((impl, "cuda"), id=f"{impl}-cuda") for impl in ("reference", "triton")]
        if CUDA
        else [pytest.param(("triton", "cpu"), id="triton-interpreted", marks=pytest.mark.slow)]
    ),
]
"""Those of this machine."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test of every backend runs on the backend's device, another one that asks for a device on every device.

    The family torch has one operation, the loss, so tests of other operations are not made for it.
    """
    if "backend" in metafunc.fixturenames:
        own = [one for one in BACKENDS if "distill_loss" in metafunc.fixturenames or one.id != "torch-cpu"]
        metafunc.parametrize("backend", own, indirect=True)
    elif "device" in metafunc.fixturenames:
        metafunc.parametrize("device", ["cpu", "cuda"] if CUDA else ["cpu"], indirect=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips the cases that no backend computes, and those that the interpreter would be too slow for."""
    for item in items:
        if isinstance(item, pytest.Function) and (reason := _why_not_computed(item)):
            item.add_marker(pytest.mark.skip(reason=reason))


def _why_not_computed(item: pytest.Function) -> str:
    """Return the reason, which allowed-skips.toml lists, or "" for a case that the backend computes."""
    params = item.callspec.params if hasattr(item, "callspec") else {}
    backend, dtype = params.get("backend"), params.get("dtype")
    if backend is None:
        return ""
    if backend[0] == "reference":
        return "the reference is no fused operator" if item.get_closest_marker("fused") is not None else ""
    if dtype == torch.float64:
        return "the reference alone computes in float64"
    if backend != ("triton", "cpu"):
        return ""
    if dtype == torch.bfloat16:
        return "Triton's interpreter truncates bfloat16"
    if item.get_closest_marker("native"):
        return "smaller tests stand in for it in Triton's interpreter"
    allowed = [pair for mark in item.iter_markers("interpreted") for pair in mark.kwargs.items()]
    fast = all(params[name] in values for name, values in allowed)
    return "" if fast else "Triton's interpreter is too slow for this case"


@pytest.fixture(scope="session", autouse=True)
def _quick_interpreter() -> Iterator[None]:
    if CUDA:
        yield
        return
    from quick_interpreter import quick_interpreter  # a GPU has the compiler

    with quick_interpreter():
        yield


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> Backend:
    impl, device = request.param
    return Backend(impl, torch.device(device))


@pytest.fixture
def device(request: pytest.FixtureRequest) -> torch.device:
    if hasattr(request, "param"):
        return torch.device(request.param)
    value: Backend = request.getfixturevalue("backend")
    return value.device


@pytest.fixture
def distill_loss(backend: Backend) -> Callable[..., kdcache_kernels.LossParts]:
    """`kdcache_kernels.distill_loss` by the backend under test."""

    @functools.wraps(kdcache_kernels.distill_loss)
    def call(logits: torch.Tensor, *args: object, **options: object) -> kdcache_kernels.LossParts:
        return kdcache_kernels.distill_loss(logits, *args, impl=backend.impl, **options)

    return call
