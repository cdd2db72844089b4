"""Shared by the kernel tests: the devices they run on and the implementations that must agree.

Without a GPU, the Triton kernels run in Triton's interpreter: the same code, some thousand times slower. It is chosen
by an environment variable, in the conftest of all tests.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch

import kdcache_kernels

NO_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
HAS_CUDA = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for machines without a GPU")


MOST_INTERPRETED = 2000
"""Classes times label pixels beyond which a test takes half a minute and more in the interpreter."""


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
    pytest.param(("triton", "cpu"), id="triton-interpreted", marks=[HAS_CUDA, pytest.mark.slow]),
    pytest.param(("reference", "cuda"), id="reference-cuda", marks=NO_CUDA),
    pytest.param(("triton", "cuda"), id="triton-cuda", marks=NO_CUDA),
]


DEVICES = ["cpu", pytest.param("cuda", marks=NO_CUDA)]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test of every backend runs on the backend's device, another one that asks for a device on every device."""
    if "backend" in metafunc.fixturenames:
        metafunc.parametrize("backend", BACKENDS, indirect=True)
    elif "device" in metafunc.fixturenames:
        metafunc.parametrize("device", DEVICES, indirect=True)


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> Backend:
    impl, device = request.param
    return Backend(impl, torch.device(device))


@pytest.fixture
def device(request: pytest.FixtureRequest) -> torch.device:
    if hasattr(request, "param"):
        return torch.device(request.param)
    found: Backend = request.getfixturevalue("backend")
    return found.device


@pytest.fixture
def distill_loss(backend: Backend) -> Callable[..., kdcache_kernels.LossParts]:
    """`kdcache_kernels.distill_loss` by the backend under test; float64 is the reference's alone."""

    @functools.wraps(kdcache_kernels.distill_loss)
    def call(logits: torch.Tensor, *args: object, **options: object) -> kdcache_kernels.LossParts:
        if backend.impl != "reference" and logits.dtype == torch.float64:
            pytest.skip("float64 is computed by the reference alone")
        if backend.interpreted and logits.dtype == torch.bfloat16:
            pytest.skip("Triton's interpreter truncates bfloat16")
        labels = args[0] if args else options.get("labels_BHW")
        pixels = labels.numel() if isinstance(labels, torch.Tensor) else 0
        if backend.interpreted and pixels * logits.shape[1] > MOST_INTERPRETED:
            pytest.skip("the Triton tests have smaller cases of this for the interpreter")
        return kdcache_kernels.distill_loss(logits, *args, impl=backend.impl, **options)

    return call
