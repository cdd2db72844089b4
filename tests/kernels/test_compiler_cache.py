"""What `torch.compile` keeps on disk: a backward that another version of the operators left behind is never run."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import kdcache_kernels

PROGRAM = """
import torch
from torch._dynamo.utils import counters
from kdcache_kernels import distill_loss

generator = torch.Generator().manual_seed(0)
student = torch.randn(1, 3, 4, 4, generator=generator, requires_grad=True)
labels = torch.randint(0, 3, (1, 8, 8), generator=generator, dtype=torch.uint8)
torch.compile(lambda student: distill_loss(student, labels).loss, fullgraph=True)(student).backward()
print(counters["aot_autograd"]["autograd_cache_hit"], student.grad.abs().sum().item() > 0)
"""


@pytest.mark.slow
def test_a_compiled_backward_of_another_version_is_compiled_anew(tmp_path: Path) -> None:
    before = tmp_path / "before"
    shutil.copytree(Path(kdcache_kernels.__file__).parent, before / "kdcache_kernels")
    for path in (before / "kdcache_kernels").rglob("*.py"):  # its backward calls an operator that is gone by now
        path.write_text(path.read_text().replace("kdcache::scale_gradient", "kdcache::scale_gradient_before"))

    def run(package: Path) -> str:
        environment = os.environ | {"PYTHONPATH": str(package), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
        ended = subprocess.run(
            [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, timeout=200
        )
        assert ended.returncode == 0, ended.stderr
        return ended.stdout.strip()

    assert run(before) == "0 True"
    assert run(before) == "1 True", "the cache serves the version that filled it"
    assert run(Path(kdcache_kernels.__file__).parents[1]) == "0 True"
