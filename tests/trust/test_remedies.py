"""Every remedy that is printed leads back: the table of remedies.py row by row, and kills of real processes."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fork_server import ForkServer
from matrix import DATA, STUDENT, kdcache
from remedies import (
    CACHE,
    HALF,
    HARMLESS,
    OF_CACHES,
    REMEDIED,
    ROWS,
    RUN,
    SWEEP,
    Row,
    World,
    contents,
    do,
    flat,
    follow,
    in_tests,
    make_world,
    table,
)

QUICK = (
    Row(CACHE, OF_CACHES["zarr.json"], "deleted", "verify"),
    Row(CACHE, OF_CACHES["targets"], "flipped", "train-student"),
    Row(CACHE, OF_CACHES["ledger record"], "another cache's", "verify"),
    Row(CACHE, OF_CACHES["digests"], "emptied", "verify"),
    Row(CACHE, "zarr.json manifest.json complete.json", "deleted", "build again"),
    Row(RUN, "best.safetensors", "truncated", "evaluate"),
    Row(HALF, "checkpoint.pt", "flipped", "--resume, unfinished"),
    Row(HALF, "recipe.toml", "deleted", "--resume, unfinished"),
    Row(SWEEP, "inputs.json", "flipped", "sweep, its jobs"),
    Row(SWEEP, "sweep.toml", "truncated", "sweep, its jobs"),
)


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """An undisturbed world, never to be touched."""
    folder = tmp_path_factory.mktemp("remedies")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KDCACHE_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        patch.chdir(folder)
        make_world()
        yield folder


@pytest.fixture(scope="session")
def undisturbed(base: Path) -> World:
    return World(base)


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures are empty files: no row compares them."""

    def touch(_: object, path: Path, *__: object) -> list[Path]:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        return [path]

    for module in ("gallery", "visualise"):
        monkeypatch.setattr(f"kdcache.analysis.{module}.save_figure", touch)


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("row", QUICK, ids=str)
def test_a_remedy_leads_back(row: Row, undisturbed: World, tmp_path: Path) -> None:
    assert row in ROWS
    do(row, undisturbed, tmp_path / "world")


@pytest.mark.slow
@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("row", [row for row in ROWS if row not in QUICK and in_tests(row)], ids=str)
def test_every_remedy_leads_back(row: Row, undisturbed: World, tmp_path: Path) -> None:
    do(row, undisturbed, tmp_path / "world")


def test_a_dead_end_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The table would be worth nothing if any text would do."""
    monkeypatch.chdir(tmp_path)
    row = QUICK[0]
    with pytest.raises(AssertionError, match="a dead end"):
        follow(row, "error Damaged cache file P.zarr/x fix: Restore it from a copy.")
    (tmp_path / "r").mkdir()
    assert (
        follow(row, flat("│ Damaged run r │\n│ fix: Restore it, or move it away: mv r .r-before │")) == "mv r .r-before"
    )
    assert (tmp_path / ".r-before").is_dir()


def test_the_page_counts_every_row() -> None:
    rows = {row: (REMEDIED, "rm x") if row.how == "deleted" else (HARMLESS, "") for row in QUICK}
    lines = table(rows).splitlines()
    assert "| cache | 5 | 3 | 2 |" in lines
    assert "| all | 10 | 7 | 3 |" in lines
    assert "| run | `r/best.safetensors` | truncated | evaluate | nothing: harmless |" in lines


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str, Path], None]]:
    """killed(line, sign): run the command line in a process of its own, and kill it when a path is there."""

    def run(line: str, sign: Path) -> None:
        with subprocess.Popen([server.program, *line.split()], stdout=subprocess.PIPE) as process:
            while process.poll() is None and not sign.exists():
                time.sleep(0.002)
            process.kill()
            process.communicate()  # until the fork is gone
        assert process.returncode == -signal.SIGKILL, "it ended before it was killed"

    with ForkServer(tmp_path_factory.mktemp("forks"), OMP_NUM_THREADS="1") as server:
        yield run


@pytest.mark.slow
def test_a_training_goes_on_after_a_kill(
    base: Path, killed: Callable[[str, Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(World(base).copied("--resume", tmp_path / "world"))
    line = f"{STUDENT} --iterations 200 --val-every 20 --cache {CACHE} --val {DATA} --out".replace(
        "--iterations 2 ", ""
    )
    line = line.replace("--val-every 2 ", "")
    assert kdcache(f"{line} whole").code == 0
    killed(f"{line} killed", Path("killed/checkpoint.pt"))
    assert not Path("killed/result.json").exists()
    assert kdcache(f"{line} killed --resume").code == 0
    for name in ("best.safetensors", "last.safetensors"):
        assert Path("killed", name).read_bytes() == Path("whole", name).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("again", [False, True], ids=["first", "again"])
def test_a_sweep_goes_on_after_a_kill_during_its_pictures(
    again: bool, base: Path, killed: Callable[[str, Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether they are drawn for the first time, or over earlier ones."""
    monkeypatch.chdir(World(base).copied("sweep", tmp_path / "world"))
    pictures = Path(SWEEP) / "pictures"
    before, names = contents("sweep"), sorted(path.name for path in pictures.rglob("*.png"))
    if not again:
        for path in sorted(pictures.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        pictures.rmdir()
    killed(f"sweep sweep.toml --data {DATA} --out {SWEEP}", pictures.with_name(".pictures.partial"))
    assert pictures.exists() == again
    ended = kdcache(f"sweep sweep.toml --data {DATA} --out {SWEEP}")
    assert ended.code == 0, ended.text
    assert sorted(path.name for path in pictures.rglob("*.png")) == names
    assert not pictures.with_name(".pictures.partial").exists()
    assert contents("sweep") == before
