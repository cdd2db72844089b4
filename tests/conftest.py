"""What every room's tests share: one thread, folders compared byte for byte, a disk that fills up."""

from __future__ import annotations

import collections
import functools
import gc
import importlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Callable, Generator, Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from types import ModuleType
from typing import Any

import hypothesis
import pytest
from compile_cache import cache_variables
from fork_server import ForkServer

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.update(cache_variables())

import torch

if not torch.cuda.is_available():
    # Triton reads it when it is imported, and many a library imports Triton: hence before every other import.
    os.environ["TRITON_INTERPRET"] = "1"

# CI judges every commit by the same cases, with the profile that hypothesis has for it; `.ci/run` sets the variable.
# Other runs draw anew, and a failure prints the line that repeats it. Time is no error: the machine may be busy.
_ANEW = {"derandomize": False, "print_blob": True, "deadline": None}
hypothesis.settings.register_profile("anew", hypothesis.settings.get_profile("default"), **_ANEW)
hypothesis.settings.load_profile("ci" if "CI" in os.environ else "anew")

Tree = dict[str, bytes]

_MEMORY = Path("/dev/shm")
_ALLOWED_SKIPS = Path(__file__).with_name("allowed-skips.toml")
_MEMORY_BYTES = 2**30  # a container's 64 MiB are too few


def pytest_configure(config: pytest.Config) -> None:
    """Temporary folders in memory where there is room: a store syncs every file, and a disk takes its time."""
    if config.option.basetemp is None and _MEMORY.is_dir() and shutil.disk_usage(_MEMORY).free > _MEMORY_BYTES:
        config.option.basetemp = tempfile.mkdtemp(prefix="kdcache-tests-", dir=_MEMORY)
        config.add_cleanup(lambda: shutil.rmtree(config.option.basetemp, ignore_errors=True))
    if "KDCACHE_CACHE_DIR" not in os.environ:  # the user's own cache folder is no place for tests; workers share this
        folder = os.environ["KDCACHE_CACHE_DIR"] = tempfile.mkdtemp(prefix="kdcache-tests-cache-")
        config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Let CI fail for every skip and expected failure of a test that allowed-skips.toml does not list."""
    report = yield
    _fail_unless_allowed(report)
    return report


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """Do the same for a file that is skipped as a whole."""
    report = yield
    _fail_unless_allowed(report)
    return report


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """With `-m slow`, import no file that marks nothing slow: importing all takes half a minute in every worker."""
    if config.option.markexpr != "slow" or not fnmatchcase(collection_path.name, "test_*.py"):
        return None
    files = [collection_path, *(folder / "conftest.py" for folder in collection_path.parents)]
    text = "".join(file.read_text(encoding="utf-8") for file in files if file.is_file())
    return None if re.search(r"mark\.slow", text) else True


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print how many cases were skipped, by reason, and which of these allowed-skips.toml lists."""
    reports = [report for kind in ("skipped", "xfailed") for report in terminalreporter.getreports(kind)]
    found = collections.Counter((_is_allowed(report), _reason(report)) for report in reports)
    if not found:
        return
    allowed = sum(count for (is_allowed, _), count in found.items() if is_allowed)
    others = found.total() - allowed
    terminalreporter.write_line(f"\nskipped: {allowed} allowed by {_ALLOWED_SKIPS.name}, {others} not listed there")
    for (is_allowed, reason), count in sorted(found.items(), key=lambda item: (item[0][0], -item[1], item[0][1])):
        terminalreporter.write_line(f"{count:6d}  {'' if is_allowed else 'NOT LISTED: '}{reason}")


def _reason(report: pytest.TestReport | pytest.CollectReport) -> str:
    expected_failure = getattr(report, "wasxfail", None)
    reason = str(report.longrepr[-1]) if isinstance(report.longrepr, tuple) else f"xfail: {expected_failure}"
    return reason.removeprefix("Skipped: ")


def _is_allowed(report: pytest.TestReport | pytest.CollectReport) -> bool:
    reason, test = _reason(report), report.nodeid.partition("[")[0]
    return any(fnmatchcase(reason, pattern) and test in tests for pattern, tests in _allowed().items())


@functools.cache
def _allowed() -> dict[str, set[str]]:
    content = tomllib.loads(_ALLOWED_SKIPS.read_text(encoding="utf-8"))
    return {reason: set(tests) for reason, tests in content.items()}


def _fail_unless_allowed(report: pytest.TestReport | pytest.CollectReport) -> None:
    if "CI" not in os.environ or not (report.skipped or hasattr(report, "wasxfail")) or _is_allowed(report):
        return
    reason, test = _reason(report), report.nodeid.partition("[")[0]
    report.outcome, report.longrepr = "failed", f"{test} is skipped and not in {_ALLOWED_SKIPS.name}: {reason}"


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module", autouse=True)
def _spare_the_collector() -> None:
    """Let the garbage collector pass over objects of earlier files, which took a tenth of the time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def tree() -> Callable[[Path], Tree]:
    """Every file below a folder with its bytes; empty for a folder that is not there."""
    return lambda top: {p.relative_to(top).as_posix(): p.read_bytes() for p in sorted(top.rglob("*")) if p.is_file()}


class SmallDisk:
    """A file system in memory that is `size_kib` large and can grow."""

    def __init__(self, path: Path, size_kib: int) -> None:
        self.path = path
        self._mount("-t", "tmpfs", "-o", f"size={size_kib}k", "tmpfs")

    def grow(self, size_kib: int) -> None:
        self._mount("-o", f"remount,size={size_kib}k")

    def _mount(self, *options: str) -> None:
        subprocess.run(["mount", *options, str(self.path)], check=True, capture_output=True)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], SmallDisk]]:
    """A function that mounts a small disk (KiB); unmounted at the end."""
    mounted = []

    def mount(size_kib: int) -> SmallDisk:
        if os.geteuid() != 0:
            pytest.skip("only root can mount a small tmpfs")
        path = tmp_path / f"disk{len(mounted)}"
        path.mkdir()
        try:
            disk = SmallDisk(path, size_kib)
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"tmpfs cannot be mounted here: {error}")
        mounted.append(path)
        return disk

    yield mount
    for path in mounted:
        subprocess.run(["umount", "-l", str(path)], check=True)


@pytest.fixture(scope="session")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkServer]:
    """Commands and programs in processes that import nothing: an import of torch and kdcache takes four seconds."""
    with ForkServer(tmp_path_factory.mktemp("forks"), HF_HUB_OFFLINE="1") as server:
        yield server


@pytest.fixture(scope="session")
def s3_server() -> Iterator[Any]:
    """An S3 server on loopback that counts what it is asked, and goes wrong on demand (tests/store/s3.py)."""
    from s3 import ObjectStore

    server = ObjectStore()
    with server.serving():
        yield server


@pytest.fixture
def s3(s3_server: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """The server, in the environment of this test. Copies go to a folder of the test's own."""
    s3_server.reset()
    s3_server.enter(monkeypatch, tmp_path / "copies")
    return s3_server


@pytest.fixture(scope="session")
def hub_server() -> Iterator[Any]:
    """The Hub's protocol on loopback (tests/sharing/hub_server.py)."""
    from hub_server import Hub

    server = Hub()
    with server.serving():
        yield server


@pytest.fixture
def hub(hub_server: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """The Hub, empty, as this test's own; files on their way go to a folder of the test's own."""
    hub_server.reset()
    hub_server.enter(monkeypatch, tmp_path)
    return hub_server


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], ModuleType]]:
    """Imports a script of benchmarks/ by its name; it and those that it imports are forgotten afterwards."""
    scripts = Path(__file__).parents[1] / "benchmarks"
    monkeypatch.syspath_prepend(str(scripts))
    yield importlib.import_module
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", None) or "").startswith(f"{scripts}/"):
            del sys.modules[name]
