"""CI skips the tests of one committed list, and fails for any other skip."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

HERE = Path(__file__).parent
SKIPS = """
import pytest

def test_listed():
    pytest.skip("no GPU")

@pytest.mark.parametrize("value", [1, 2])
@pytest.mark.skipif(True, reason="zarr 9.9 lacks it")
def test_listed_with_any_version(value): ...

def test_another_reason():
    pytest.skip("no network")

@pytest.fixture
def browser():
    pytest.skip("no browser")

def test_in_a_fixture(browser): ...

@pytest.mark.xfail(reason="broken")
def test_expected_to_fail():
    raise AssertionError
"""
LIST = """
"no GPU" = ["test_skips.py::test_listed", "test_skips.py::test_another_reason"]
"zarr * lacks it" = ["test_skips.py::test_listed_with_any_version"]
"""
TORCH = """
class cuda:
    is_available = staticmethod(bool)

set_num_threads = print
"""
"""All of torch that conftest.py needs, because importing torch takes seconds."""
COUNTED = [
    "skipped: 3 allowed by allowed-skips.toml, 4 not listed there",
    "     1  NOT LISTED: no browser",
    "     1  NOT LISTED: no network",
    "     1  NOT LISTED: xfail: broken",
    "     2  zarr 9.9 lacks it",
    "     1  no GPU",
]
FAILURES = [
    "test_skips.py::test_another_reason is skipped and not in allowed-skips.toml: no network",
    "test_skips.py::test_expected_to_fail is skipped and not in allowed-skips.toml: xfail: broken",
    "test_skips.py::test_in_a_fixture is skipped and not in allowed-skips.toml: no browser",
    "test_whole.py is skipped and not in allowed-skips.toml: could not import 'no_such_module'",
]


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder of tests with this project's conftest.py and a list of two reasons."""
    for name in ("conftest.py", "compile_cache.py", "fork_server.py"):
        shutil.copy(HERE / name, tmp_path)
    (tmp_path / "allowed-skips.toml").write_text(LIST)
    (tmp_path / "torch.py").write_text(TORCH)
    (tmp_path / "test_skips.py").write_text(SKIPS)
    (tmp_path / "test_whole.py").write_text("import pytest\npytest.importorskip('no_such_module')\n")
    return tmp_path


@pytest.mark.parametrize("more", [(), ("-n", "1")], ids=["one process", "xdist"])
def test_a_skip_that_is_not_listed_fails_in_ci(project: Path, more: tuple[str, ...]) -> None:
    ended = run(project, *more, CI="1")
    assert ended.returncode == 1
    told = sorted(set(re.findall(r"^test_\S+ is skipped and not in .*", ended.stdout, re.MULTILINE)))
    assert [line.partition(":  ")[0].partition(": No module")[0] for line in told] == FAILURES
    assert "3 skipped" in ended.stdout


def test_elsewhere_every_skip_passes_and_is_counted(project: Path) -> None:
    ended = run(project)
    assert ended.returncode == 0
    assert "6 skipped, 1 xfailed" in ended.stdout
    told = ended.stdout.splitlines()
    assert [line for line in told if line in COUNTED] == COUNTED
    assert sum("NOT LISTED" in line for line in told) == 4


def test_the_list_names_tests_that_there_are() -> None:
    for tests in tomllib.loads((HERE / "allowed-skips.toml").read_text()).values():
        for file, _, name in (test.partition("::") for test in tests):
            assert f"def {name}(" in (HERE.parent / file).read_text()


def run(project: Path, *more: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the tests of a folder, with `CI` as named alone."""
    inherited = {name: value for name, value in os.environ.items() if name != "CI" and "PYTEST" not in name}
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--continue-on-collection-errors", *more]
    return subprocess.run(
        words, cwd=project, env={**inherited, **environment}, text=True, capture_output=True, timeout=200, check=False
    )
