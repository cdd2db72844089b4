"""One process at a time: by flock, and by a lease on file systems that do not have it."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kdcache import locks
from kdcache.locks import Lock

WITHOUT = ("ENOSYS", "ENOLCK", "EOPNOTSUPP")
WITHOUT_FLOCK = """
import errno, fcntl, os
def without(*_): raise OSError(errno.{kind}, os.strerror(errno.{kind}))
fcntl.flock = without
"""
HOLD = """
import sys, time
from pathlib import Path
from kdcache.locks import Lock
lock = Lock(Path(sys.argv[1]))
lock.acquire()
print("held", flush=True)
time.sleep(600)
"""
COUNT = """
import sys
from pathlib import Path
from kdcache.locks import Lock
count = Path(sys.argv[2])
for _ in range(30):
    with Lock(Path(sys.argv[1])):
        count.write_text(str(int(count.read_text()) + 1))
"""


@pytest.fixture(params=["flock", *WITHOUT])
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How this process and those of `start` lock: with flock, or without it for one of several reasons."""
    if request.param != "flock":

        def without(*_: object) -> None:
            code = getattr(errno, request.param)
            raise OSError(code, os.strerror(code))

        monkeypatch.setattr(fcntl, "flock", without)
    return str(request.param)


@pytest.fixture(params=["file", "folder"])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return tmp_path / "shard.lock" if request.param == "file" else tmp_path


def start(code: str, kind: str, *words: object) -> subprocess.Popen[str]:
    code = ("" if kind == "flock" else WITHOUT_FLOCK.format(kind=kind)) + code
    return subprocess.Popen([sys.executable, "-W", "error", "-c", code, *map(str, words)], stdout=-1, text=True)


def test_one_at_a_time_and_nothing_is_left(kind: str, path: Path, tmp_path: Path) -> None:
    first, second = Lock(path), Lock(path)
    assert first.acquire(wait=False)
    assert not second.acquire(wait=False)
    first.release()
    assert second.acquire(wait=False)
    second.release()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["flock", "ENOSYS"], indirect=True)
def test_processes_wait_for_each_other(kind: str, path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    count = tmp_path_factory.mktemp("count") / "count"
    count.write_text("0")
    counting = [start(COUNT, kind, path, count) for _ in range(3)]
    assert [(process.communicate()[0], process.returncode) for process in counting] == [("", 0)] * 3
    assert count.read_text() == "90"


def test_the_lock_of_a_killed_process_is_taken_over(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "shard.lock"
    holder = start(HOLD, kind, path)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    lock = Lock(path)
    assert not lock.acquire(wait=False)
    assert f"process {holder.pid} on " in lock.owner
    os.kill(holder.pid, signal.SIGKILL)
    holder.communicate()
    assert lock.acquire(wait=False)
    lock.release()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["ENOSYS"], indirect=True)
def test_the_lease_of_another_machine_is_taken_over_when_it_is_silent(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stopped process that gives another host's name is one of which nothing is known but its silence."""
    monkeypatch.setattr(locks, "STALE_S", 1)
    elsewhere = "import socket, kdcache.locks\nsocket.gethostname = lambda: 'elsewhere'\nkdcache.locks.STALE_S = 1\n"
    path = tmp_path / "shard.lock"
    holder = start(elsewhere + HOLD, kind, path)
    assert holder.stdout is not None
    holder.stdout.readline()
    lock = Lock(path)
    until = time.monotonic() + 3
    while time.monotonic() < until:
        assert not lock.acquire(wait=False)  # it gives signs of life
        time.sleep(0.1)
    assert lock.owner == f"process {holder.pid} on elsewhere"
    os.kill(holder.pid, signal.SIGSTOP)
    assert lock.outlive()
    os.kill(holder.pid, signal.SIGKILL)
    holder.communicate()
    lock.release()
    assert list(tmp_path.iterdir()) == []


def test_other_errors_pass(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Lock(tmp_path / "absent" / "shard.lock").acquire()
