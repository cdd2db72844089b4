"""The machine code of the CPU kernels on disk: never old, and never a reason to fail."""

import ast
import importlib
import inspect
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import numba
import numpy as np
import pytest
from numba.core import caching
from numba.core.dispatcher import Dispatcher

import kdcache_kernels
from kdcache_kernels.cpu import math as numba_math

SOURCE = Path(kdcache_kernels.__file__).parent
FAMILY = sorted(
    ".".join(path.relative_to(SOURCE).with_suffix("").parts)
    for path in (SOURCE / "cpu").rglob("*.py")
    if path.stem != "__init__"
)
COPY = "copied_kernels"
PROBE = """
from .cpu.math import exp2, kernel
from .topk import LOGIT_LIMIT

@kernel
def probe(x):
    return LOGIT_LIMIT + exp2(x) - 1.0
"""


@pytest.fixture
def copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], ModuleType]]:
    """Import a module of a copy of the CPU kernels, anew at every call, as a new process would."""
    monkeypatch.delenv("NUMBA_CACHE_DIR", raising=False)
    monkeypatch.setattr(numba.config, "CACHE_DIR", "")
    monkeypatch.syspath_prepend(tmp_path)
    package = tmp_path / COPY
    shutil.copytree(SOURCE, package, ignore=shutil.ignore_patterns("__pycache__"))
    (package / "__init__.py").write_text("")  # the operators are registered once per process
    (package / "probe.py").write_text(PROBE)

    def forget() -> None:
        for name in [name for name in sys.modules if name.split(".")[0] == COPY]:
            del sys.modules[name]

    def fresh(name: str) -> ModuleType:
        forget()
        # Python's own cache goes by time and size, which a test changes too quickly.
        for path in package.rglob("__pycache__/*.pyc"):
            path.unlink()
        importlib.invalidate_caches()
        return importlib.import_module(f"{COPY}.{name}")

    yield fresh
    forget()


def filled(module: ModuleType) -> tuple[float, int]:
    """What a class that was not kept gets, and how often the cache on disk served."""
    shape = (1, 2, 3)
    values, out = np.zeros(shape, np.float32), np.empty((1, 4, 3), np.float32)
    indices = np.broadcast_to(np.arange(2, dtype=np.int32)[None, :, None], shape).copy()
    module.densify_tasks(0, 1, values, indices, np.zeros((1, 3), np.float32), 3, out)
    return float(out[0, 3, 0]), sum(module.densify_tasks.stats.cache_hits.values())


def probed(module: ModuleType) -> tuple[float, int]:
    """The same of the smallest kernel, which compiles in a second."""
    return module.probe(np.float32(0)), sum(module.probe.stats.cache_hits.values())


def edit(path: Path, old: str, new: str) -> None:
    """As an installer may do that gives every file one date: neither time nor size changes."""
    assert len(old) == len(new)
    before, text = path.stat(), path.read_text()
    assert text.count(old) == 1
    path.write_text(text.replace(old, new))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize(
    ("name", "call", "before", "after"),
    [
        ("probe", probed, 6e4, 6e4 + 1),
        pytest.param("cpu.topk", filled, 0, np.log(2), marks=pytest.mark.slow),
    ],
)
def test_an_edit_of_what_a_kernel_calls_is_seen(name, call, before, after, copied, tmp_path):
    assert call(copied(name)) == (pytest.approx(before, abs=1e-6), 0)
    assert call(copied(name)) == (pytest.approx(before, abs=1e-6), 1)
    edit(tmp_path / COPY / "cpu" / "math.py", "(1, 0.6931471825, ", "(2, 0.6931471825, ")  # doubles exp2(0)
    assert call(copied(name)) == (pytest.approx(after, abs=1e-6), 0)
    assert call(copied(name)) == (pytest.approx(after, abs=1e-6), 1)


def test_an_edit_of_a_constant_from_another_file_is_seen(copied, tmp_path):
    """`LOGIT_LIMIT` is compiled into the kernels."""
    assert probed(copied("probe")) == (6e4, 0)
    edit(tmp_path / COPY / "topk.py", "LOGIT_LIMIT = 6e4", "LOGIT_LIMIT = 5e4")
    assert probed(copied("probe")) == (5e4, 0)


def test_damaged_machine_code_is_compiled_again(copied, tmp_path):
    probed(copied("probe"))
    for pattern in ("*.nbi", "*.nbc"):
        (path,) = (tmp_path / COPY / "__pycache__").glob(f"probe.probe{pattern}")
        path.write_bytes(path.read_bytes()[:30])
        assert probed(copied("probe")) == (6e4, 0)
        assert probed(copied("probe")) == (6e4, 1)


def test_a_full_disk_costs_a_compilation(copied, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(caching.IndexDataCacheFile, "_save_data", full)
    for _ in range(2):
        assert probed(copied("probe")) == (6e4, 0)


def test_without_a_place_to_write_everything_is_compiled(copied, monkeypatch):
    """A read-only install and an unwritable home: numba has no locator then, and says so when a kernel is defined."""
    monkeypatch.setattr(caching.CacheImpl, "_locator_classes", [])
    with pytest.raises(RuntimeError, match="no locator available"):
        caching.FunctionCache(probed)
    assert probed(copied("probe")) == (6e4, 0)
    for name in FAMILY:
        copied(name)


@pytest.mark.parametrize("name", FAMILY)
def test_nothing_is_cached_but_by_the_projects_decorator(name):
    """numba's own `cache=True` watches one file, and fails where it can write nowhere."""
    module = importlib.import_module(f"kdcache_kernels.{name}")
    for node in ast.walk(ast.parse(inspect.getsource(module))):
        if isinstance(node, ast.Call):
            assert "cache" not in [keyword.arg for keyword in node.keywords], ast.unparse(node)
    for dispatcher in (member for member in vars(module).values() if isinstance(member, Dispatcher)):
        assert isinstance(dispatcher._cache, (numba_math.KernelCache, caching.NullCache))


def test_what_threads_run_is_cached():
    """Compiling takes seconds per signature: what `threads.run` is given would be compiled in every process."""
    kernels = set()
    for name in FAMILY:
        module = importlib.import_module(f"kdcache_kernels.{name}")
        for member in vars(module).values():
            if isinstance(member, Dispatcher) and inspect.signature(member.py_func).parameters.keys() >= {
                "first",
                "last",
            }:
                kernels.add(member.__name__)
                assert isinstance(member._cache, numba_math.KernelCache), member
    assert kernels == {
        *("cells", "pixels", "to_nodes", "from_nodes", "count_pixels", "count_rows"),
        *("pack_tasks", "densify_tasks", "argmax_tasks"),
        *("gather_cells", "relate", "weigh_rows", "learn"),
    }


LOSS = """
import hashlib, torch
from kdcache_kernels import PackedTarget, distill_loss, pack
from kdcache_kernels.cpu.loss import cells, pixels
for size in ((16, 24), (17, 23)):
    for temperature in (1.0, 2.0, 3.0):
        torch.manual_seed(0)
        student, teacher = torch.randn(2, 2, 5, 4, 6)
        target = PackedTarget(*pack(teacher, 5, impl="reference"), 5, size, False)
        labels = torch.randint(0, 5, (2, *size))
        student.requires_grad_()
        loss = distill_loss(student, labels, target, kl_weight=1.0, temperature=temperature, impl="numba").loss
        loss.backward()
        print(hashlib.sha256(student.grad.numpy().tobytes()).hexdigest(), loss.item().hex())
print([sum(kernel.stats.cache_hits.values()) > 0 for kernel in (cells, pixels)])
"""
TOP_K = """
import numba
from kdcache_kernels import target_argmax_confidence
from kdcache_kernels.cpu import topk
target = PackedTarget(*pack(teacher, 2, impl="numba"), 5, size)
target_argmax_confidence(target, size, impl="numba")
own = lambda: 0
print(topk.__file__, topk.pack_tasks.stats.cache_path, numba.njit(own) is own)
"""


def printed(code: str, folder: Path, variables: dict[str, str]) -> list[str]:
    """The lines that a program prints."""
    command = [sys.executable, "-B", "-c", code]
    done = subprocess.run(command, cwd=folder, env=os.environ | variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.splitlines()


@pytest.mark.slow
def test_a_read_only_install_where_numba_is_told_to_compile_nothing(tmp_path):
    """The kernels are compiled all the same, to the bits of code from the disk, while a user debugs his own functions.

    A file lies where numba would make its folder: nobody can write there, root included. Numba reads the variables
    when it is imported.
    """
    package = tmp_path / "kdcache_kernels"
    shutil.copytree(SOURCE, package, ignore=shutil.ignore_patterns("__pycache__"))
    for folder in (package, package / "cpu"):
        (folder / "__pycache__").write_text("")
    nowhere = dict.fromkeys(("HOME", "XDG_CACHE_HOME", "NUMBA_CACHE_DIR"), "/dev/null/nowhere")
    *compiled, hits, last = printed(LOSS + TOP_K, tmp_path, {**nowhere, "NUMBA_DISABLE_JIT": "1"})
    assert hits == "[False, False]"
    assert last.split() == [str(package / "cpu" / "topk.py"), "None", "True"]
    exec(LOSS, {})  # the code gets onto the disk, if it is not there
    *loaded, hits = printed(LOSS, SOURCE.parent, {})
    assert hits == "[True, True]"
    assert len(loaded) == 6
    assert compiled == loaded


def test_a_kernel_is_compiled_where_numba_is_told_not_to(copied, monkeypatch):
    monkeypatch.setattr(numba.config, "DISABLE_JIT", 1)
    assert probed(copied("probe")) == (6e4, 0)
    assert numba.njit(probed) is probed
