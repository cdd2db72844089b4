"""Where the tests keep what numba, Triton and torch.compile make of the sources, from run to run.

Without the folder a run compiles anew, which costs time alone.
"""

import hashlib
import os
import platform
import shutil
from importlib.metadata import version
from pathlib import Path

KEPT = 4
"""Most states of the sources whose code stays on the disk."""
_ROOT = Path(__file__).parents[1]


def compile_cache() -> Path:
    """Return the folder below ``KDCACHE_TEST_CACHE`` for this state of sources, libraries and processor.

    Default: ``~/.cache/kdcache-tests``. Removes the folders of older states beyond `KEPT`.
    """
    top = Path(os.environ.get("KDCACHE_TEST_CACHE") or Path.home() / ".cache/kdcache-tests")
    folder = top / _key()
    folder.mkdir(parents=True, exist_ok=True)
    os.utime(folder)
    states = sorted((path for path in top.iterdir() if path.is_dir()), key=lambda path: path.stat().st_mtime)
    for old in states[:-KEPT]:
        shutil.rmtree(old, ignore_errors=True)
    return folder


def cache_variables() -> dict[str, str]:
    """Return what numba and torch.compile read when they are imported; a variable that is set stays."""
    folders = {"NUMBA_CACHE_DIR": "numba", "TORCHINDUCTOR_CACHE_DIR": "inductor"}
    return {name: os.environ.get(name) or str(compile_cache() / folder) for name, folder in folders.items()}


def _key() -> str:
    digest = hashlib.sha256()
    for path in sorted([*_ROOT.glob("kernels/**/*.py"), *_ROOT.glob("kdcache/data/rendering/*.py")]):
        digest.update(path.read_bytes() + b"\0")
    versions = [version(name) for name in ("torch", "triton", "numba", "llvmlite")]
    digest.update(repr([platform.python_version(), platform.machine(), _processor(), *versions]).encode())
    return digest.hexdigest()[:16]


def _processor() -> str:
    """The model and the instructions of the CPU, for which numba compiles."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(sorted({line for line in lines if line.startswith(("model name", "flags"))}))
