"""What `torch.compile` keeps on disk: a backward that another version of the operators left behind is never run."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import kdcache_kernels

PROGRAM = """
import os, sys
import torch
import torch._inductor.compile_fx  # once for all forks
from torch._dynamo.utils import counters

def step():
    from kdcache_kernels import distill_loss, library
    module_of = library.module_of
    library.module_of = lambda family, name: module_of("torch", name)  # numba would compile for seconds
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(1, 3, 4, 4, generator=generator, requires_grad=True)
    labels = torch.randint(0, 3, (1, 8, 8), generator=generator, dtype=torch.uint8)
    torch.compile(lambda student: distill_loss(student, labels).loss, fullgraph=True)(student).backward()
    print(counters["aot_autograd"]["autograd_cache_hit"], student.grad.abs().sum().item() > 0)

for package in sys.argv[1:]:
    if not (process := os.fork()):
        sys.path.insert(0, package)
        step()
        sys.exit()
    assert os.waitpid(process, 0)[1] == 0, package
"""
"""One step in a process for each of the folders that it is given, from which it imports the package."""


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_compiled_backward_of_another_version_is_compiled_anew(tmp_path: Path) -> None:
    before = tmp_path / "before"
    shutil.copytree(Path(kdcache_kernels.__file__).parent, before / "kdcache_kernels")
    for path in (before / "kdcache_kernels").rglob("*.py"):  # its backward calls an operator that is gone by now
        path.write_text(path.read_text().replace("kdcache::scale_gradient", "kdcache::scale_gradient_before"))
    variables = {
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"),
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
        "TORCHINDUCTOR_VEC_ISA_OK": "0",  # torch would compile a program for each kind of vectors, and its own headers
        "TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS": "0",
    }
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM, before, before, Path(kdcache_kernels.__file__).parents[1]],
        env=os.environ | variables,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert ended.returncode == 0, ended.stderr
    first, again, other = ended.stdout.splitlines()
    assert first == "0 True"
    assert again == "1 True", "the cache serves the version that filled it"
    assert other == "0 True"
