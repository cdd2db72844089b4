"""Builds by the actors of a real Ray cluster on this machine: whoever dies, the store is one process's."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import kdcache
from kdcache.data import open_split
from kdcache.errors import RecipeError, StoreError
from kdcache.store import open_cache

pytestmark = pytest.mark.slow
ray = pytest.importorskip("ray")
Build = tuple[list[object], dict[str, bytes]]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A head without room and two nodes of a core each; what was removed is added again."""
    from ray.cluster_utils import Cluster

    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    for _ in range(2):
        cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    yield cluster
    cluster.shutdown()


@pytest.fixture
def start(build: Build, fork: Callable[..., subprocess.Popen[str]], cluster: Any, tmp_path: Path):
    """start() begins or continues the build of s.zarr by two actors."""

    def begin() -> subprocess.Popen[str]:
        words = [*build[0], "--out", tmp_path / "s.zarr", "--engine", "ray", "--actors", 2]
        return fork(*words, "--address", cluster.address)

    return begin


def wait_for_shards(store: Path, count: int, driver: subprocess.Popen[str], limit_s: float = 200) -> None:
    end = time.monotonic() + limit_s
    while len(list(store.glob("ledger/*.json"))) < count:
        assert driver.poll() is None, driver.communicate()
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.001)


def processes(title: bytes = b"ray::ShardTeacher") -> list[int]:
    """Process numbers of the actors or tasks that run, by the title that Ray gives them."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if path.read_bytes().startswith(title):
                found.append(int(path.parent.name))
        except OSError:  # it has ended
            continue
    return found


def finish(driver: subprocess.Popen[str]) -> str:
    out, err = driver.communicate(timeout=280)
    assert driver.returncode == 0, err
    return out


def test_an_actor_is_killed(build, start, tree, unstamped, tmp_path: Path) -> None:
    driver = start()
    wait_for_shards(tmp_path / "s.zarr", 1, driver)
    os.kill(processes()[0], signal.SIGKILL)
    out = finish(driver)
    assert "records" in out
    assert unstamped(tree(tmp_path / "s.zarr")) == build[1]


def test_a_node_is_lost_and_another_added(build, start, cluster, tree, unstamped, tmp_path: Path) -> None:
    driver = start()
    wait_for_shards(tmp_path / "s.zarr", 1, driver)
    cluster.remove_node(cluster.list_all_nodes()[-1], allow_graceful=False)
    cluster.add_node(num_cpus=1)
    finish(driver)
    assert unstamped(tree(tmp_path / "s.zarr")) == build[1]


def test_the_driver_is_killed_and_the_same_command_goes_on(build, start, tree, unstamped, tmp_path: Path) -> None:
    driver = start()
    wait_for_shards(tmp_path / "s.zarr", 2, driver)
    driver.kill()
    driver.communicate()
    assert "from before" in finish(start())
    assert unstamped(tree(tmp_path / "s.zarr")) == build[1]


def test_a_job_of_a_sweep_is_killed(cluster, cli, fork, tmp_path: Path) -> None:
    recipe = tmp_path / "mine.toml"
    recipe.write_text(
        'title = "mine"\n[data]\npath = "scenes:32x48,train=8,val=4"\n'
        '[teacher]\nmodel = "kdcache:base"\nsize = "32x48"\niterations = 2\nbatch-size = 4\n'
        '[student]\nmodel = "kdcache:tiny"\niterations = 80\nbatch-size = 4\nval-every = 10\n'
        '[[arm]]\nname = "plain"\nmethod = "none"\n[[arm]]\nname = "taught"\nmethod = "kl"\n[show]\nnum = 1\n',
        encoding="utf-8",
    )
    local = cli("sweep", recipe, "--out", tmp_path / "local")
    assert local.code == 0, local.err
    out = tmp_path / "out"
    words = ["sweep", recipe, "--out", out, "--parallel", 2, "--engine", "ray", "--address", cluster.address]
    driver = fork(*words)
    end = time.monotonic() + 250
    while not list(out.glob("*/*/checkpoint.pt")):
        assert driver.poll() is None, driver.communicate()
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.01)
    os.kill(processes(b"ray::_do")[0], signal.SIGKILL)
    finish(driver)
    assert (out / "report.html").is_file()
    weights = sorted(path.relative_to(out) for path in out.glob("*/*/last.safetensors"))
    assert len(weights) == 3
    for path in weights:
        assert (out / path).read_bytes() == (tmp_path / "local" / path).read_bytes(), path


def test_a_node_without_the_data_is_named(made: Path, cluster, cli, tmp_path: Path) -> None:
    """The folder of the data is gone when the actors look for it: as on a node that does not have that disk."""
    (tmp_path / "data").symlink_to(made / "data")
    words = ["build-teacher-cache", "--data", tmp_path / "data", "--teacher", made / "teacher", "--threads", 1]
    lost = tmp_path / "s.zarr"

    def begin_and_lose(*arguments: Any, **named: Any) -> Any:
        (tmp_path / "data").unlink()
        return shards(*arguments, **named)

    engine = import_module("kdcache.teacher.build.ray_engine").RayEngine
    shards = engine.shards
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "shards", begin_and_lose)
        ended = cli(*words, "--out", lost, "--engine", "ray", "--actors", 1, "--address", cluster.address)
    assert ended.code == 2
    assert "Cannot compute shards on node" in ended.err
    assert str(tmp_path / "data") in ended.err.replace("\n", "")
    assert not open_or_none(lost)


def test_an_extended_store_is_one_process_s(made: Path, cluster, cli, tree, unstamped, tmp_path: Path) -> None:
    """Its records are counted as there, the damaged ones of the earlier store too."""
    old = shutil.copytree(made / "store.zarr", tmp_path / "old.zarr")
    damaged = next(path for path in sorted(old.glob("targets/*/values/c/0/*/*/*")) if path.is_file())
    content = bytearray(damaged.read_bytes())
    content[100] ^= 1
    damaged.write_bytes(content)
    words = ["build-teacher-cache", "--from", old, "--data", made / "data", "--teacher", made / "teacher"]
    words += ["--views", 2, "--threads", 1, "--shard-records", 2]
    ends = [
        cli(*words, "--out", tmp_path / "one.zarr"),
        cli(*words, "--out", tmp_path / "ray.zarr", "--engine", "ray", "--actors", 2, "--address", cluster.address),
    ]
    assert [ended.code for ended in ends] == [0, 0], ends[1].err
    counts = [re.search(r"\(\d+ computed, \d+ copied\)", ended.out) for ended in ends]
    assert counts[0] is not None
    assert counts[1] is not None
    assert counts[0][0] == counts[1][0]
    assert all("records of the earlier cache are damaged" in ended.out for ended in ends)
    assert unstamped(tree(tmp_path / "ray.zarr")) == unstamped(tree(tmp_path / "one.zarr"))


class Items(torch.utils.data.Dataset[Any]):
    """Images in memory; `lost` cannot be pickled."""

    def __init__(self, lost: object = None) -> None:
        self.scenes, self.lost = open_split("scenes:32x48,train=6,val=2", "train"), lost

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, index: int) -> Any:
        return self.scenes.image(index), self.scenes.label(index)


def test_python_with_data_and_a_teacher_in_memory(cluster, tree, unstamped, tmp_path: Path) -> None:
    data = kdcache.from_dataset(Items(), open_split("scenes", "train").classes.names)
    torch.manual_seed(5)
    module = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.ReLU(), nn.Conv2d(8, 7, 1))
    settings: dict[str, Any] = {"size": (32, 48), "views": 2, "shard_records": 2, "threads": 1, "progress": False}
    kdcache.build_cache(data, module, tmp_path / "one.zarr", **settings)
    result = kdcache.build_cache(
        data, module, tmp_path / "ray.zarr", engine="ray", actors=2, address=cluster.address, **settings
    )
    assert (result.complete, result.records) == (True, 12)
    assert unstamped(tree(tmp_path / "ray.zarr")) == unstamped(tree(tmp_path / "one.zarr"))


def test_what_cannot_be_pickled_is_refused(tmp_path: Path) -> None:
    data = kdcache.from_dataset(Items(threading.Lock()), open_split("scenes", "train").classes.names)
    with pytest.raises(RecipeError, match="lock") as refused:
        kdcache.build_cache(data, nn.Conv2d(3, 7, 4, 4), tmp_path / "s.zarr", engine="ray", size=(32, 48))
    assert "Cannot send the data" in refused.value.problem
    assert not (tmp_path / "s.zarr").exists()


@pytest.mark.parametrize(
    ("settings", "received"),
    [
        ({"actors": 2}, "actors=2"),
        ({"engine": "ray", "worker": "0/2"}, "worker 0 of 2"),
        ({"engine": "spark"}, "engine=: 'spark'"),
    ],
)
def test_wrong_settings_in_python(settings: dict[str, Any], received: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as refused:
        kdcache.build_cache("scenes", "runs/none", tmp_path / "s.zarr", **settings)
    assert received in str(refused.value)


class _Elsewhere:
    """An object of a module that the nodes do not have."""

    def __reduce__(self) -> Any:
        return import_module, ("kdcache_of_the_driver_alone",)


def test_a_node_without_a_module_is_named(cluster, tmp_path: Path) -> None:
    """An actor that cannot even start would otherwise be started again without end."""
    teacher = nn.Conv2d(3, 7, 4, 4)
    teacher.elsewhere = _Elsewhere()  # type: ignore[assignment]
    settings: dict[str, Any] = {"size": (32, 48), "threads": 1, "progress": False, "address": cluster.address}
    with pytest.raises(StoreError, match="kdcache_of_the_driver_alone") as refused:
        kdcache.build_cache("scenes:32x48,train=6,val=2", teacher, tmp_path / "s.zarr", engine="ray", **settings)
    assert re.match(r"Cannot start actors on node [\d.]+: ", refused.value.problem)


def test_an_actor_larger_than_every_node_is_refused(cluster, tmp_path: Path) -> None:
    """The two nodes have a core each: an actor of two would wait for ever."""
    settings: dict[str, Any] = {"size": (32, 48), "threads": 2, "progress": False, "address": cluster.address}
    with pytest.raises(RecipeError, match="No node has room for an actor"):
        kdcache.build_cache(
            "scenes:32x48,train=6,val=2", nn.Conv2d(3, 7, 4, 4), tmp_path / "s.zarr", engine="ray", **settings
        )


def open_or_none(store: Path) -> bool:
    try:
        open_cache(store)
    except Exception:
        return False
    return True


@pytest.mark.parametrize(
    ("words", "received"),
    [
        (["--actors", 2], "--actors 2"),
        (["--engine", "ray", "--worker", "0/2"], "worker 0 of 2"),
        (["--engine", "ray", "--address", "127.0.0.1:1"], "127.0.0.1:1"),
        (["--engine", "ray", "--num-gpus", 64], "64 GPU"),
        (["--engine", "ray", "--address", "nowhere"], "nowhere"),
    ],
)
def test_wrong_flags(made: Path, cli, tmp_path: Path, words: list[object], received: str) -> None:
    common = ["build-teacher-cache", "--data", made / "data", "--teacher", made / "teacher", "--threads", 1]
    ended = cli(*common, "--out", tmp_path / "s.zarr", *words)
    assert ended.code == 2, ended.out
    assert received in ended.err
    assert not (tmp_path / "s.zarr").exists()


def test_an_address_goes_before_the_one_of_the_environment(
    made: Path, cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """RAY_ADDRESS is for commands that name no address, or auto, as `ray.init` has it."""
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    common = ["build-teacher-cache", "--data", made / "data", "--teacher", made / "teacher", "--threads", 1]
    for words, received in (
        ([], "127.0.0.1:1"),
        (["--address", "auto"], "127.0.0.1:1"),
        (["--address", "no:2"], "no:2"),
    ):
        ended = cli(*common, "--out", tmp_path / "s.zarr", "--engine", "ray", *words)
        assert ended.code == 2, ended.out
        assert received in ended.err
