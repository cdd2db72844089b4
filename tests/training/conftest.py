"""Small stores, small runs, and a process that trains in children which may be killed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import default_collate

from kdcache.data import open_split
from kdcache.distill import Criterion, DistillLoss, Streams
from kdcache.models import build_model
from kdcache.store import Cache, open_cache
from kdcache.teacher import BuildOptions, Teacher, build_cache
from kdcache.training import CacheDataset, Observer, TrainConfig, make_config
from kdcache.training.api import make_trainer
from kdcache.training.distributed import World
from kdcache.training.input.loader import Draws
from kdcache.training.step.eager import EagerStep
from kdcache.training.step.optim import make_optimizer
from kdcache.training.trainer import Trainer

SCENES = "scenes:32x48,train=6,val=3"
HALVES = "scenes:32x48,train=6,val=3,depth=exact,tasks=halves"
SIZE = (32, 48)
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}


@pytest.fixture(scope="session")
def scenes() -> str:
    """Six training and three validation images of 32 x 48."""
    return SCENES


@pytest.fixture(scope="session")
def make_cache(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Builds a store and returns its path; by default of `scenes`, at 32 x 48, by a random but decided teacher."""

    def make(data: str = SCENES, split: str = "train", model: torch.nn.Module | None = None, **options: Any) -> Path:
        samples = open_split(data, split)
        if model is None:
            torch.manual_seed(11)
            model = build_model("kdcache:tiny", len(samples.classes))
            with torch.no_grad():
                model.classifier.weight.mul_(60)
        path = tmp_path_factory.mktemp("store") / "cache.zarr"
        build = {"size": SIZE, "views": 1, "batch_size": 4, "shard_records": 4, **options}
        build_cache(samples, Teacher(model.eval(), "test"), path, BuildOptions(**build))
        return path

    return make


@pytest.fixture(scope="session")
def cache_path(make_cache: Callable[..., Path]) -> Path:
    """A dense store of `scenes` with its pixels."""
    return make_cache()


@pytest.fixture(scope="session")
def cache(cache_path: Path) -> Cache:
    return open_cache(cache_path)


@pytest.fixture(scope="session")
def source_path(make_cache: Callable[..., Path]) -> Path:
    """A top-3 store of `scenes` without pixels."""
    return make_cache(top_k=3, pixels="source")


@pytest.fixture(scope="session")
def depth_teacher() -> torch.nn.Module:
    """A random teacher of classes and of metres, both of which differ from cell to cell."""
    torch.manual_seed(12)
    model = build_model("kdcache:hydra,as=exp,max=80", 7)
    with torch.no_grad():
        model.get_parameter("depth_output.weight").normal_(std=0.5)
    return model


@pytest.fixture(scope="session")
def depth_paths(make_cache: Callable[..., Path], depth_teacher: torch.nn.Module) -> dict[str, Path]:
    """Stores of both heads, of scenes with labels of either task: with their pixels, without, and of several views."""
    ways: dict[str, dict[str, Any]] = {
        "stored": {"views": 2},
        "source": {"views": 2, "pixels": "source"},
        "zoomed": {"views": 3, "view_scale": (1.5, 2.0), "depth_zoom": "divide"},
    }
    return {name: make_cache(HALVES, model=depth_teacher, **options) for name, options in ways.items()}


@pytest.fixture
def settings() -> dict[str, Any]:
    """Of a short run on labels alone; update it as needed."""
    return {
        "verb": "train-teacher",
        "model": "kdcache:tiny",
        "data": SCENES,
        "val": SCENES,
        "size": "32x48",
        "iterations": 6,
        "val_every": 3,
        "log_every": 1,
        "batch_size": 2,
        "class_weights": "none",
        "device": "cpu",
    }


@pytest.fixture
def student(cache_path: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Of a short distillation from a store."""
    changed = {"verb": "train-student", "data": None, "size": None, "cache": str(cache_path), "method": "kl"}
    return settings | changed


@pytest.fixture
def config(settings: dict[str, Any]) -> Callable[..., TrainConfig]:
    """The short run's settings with some changed."""
    return lambda **changes: make_config(**(settings | changes))


@pytest.fixture
def begin(student: dict[str, Any], tmp_path: Path) -> Callable[..., Trainer]:
    """The trainer that a short distillation with some settings changed would run."""

    def make(**changes: Any) -> Trainer:
        config = make_config(**(student | {"val": None, "augment": "none"} | changes))
        return make_trainer(config, tmp_path / "run", World(), Observer(), resume=False)

    return make


@pytest.fixture(scope="session")
def batches(cache: Cache) -> list[Streams]:
    """Six batches of two records of a single stream."""
    draws = Draws(CacheDataset(cache), 0)
    return [(default_collate([draws[2 * number], draws[2 * number + 1]]),) for number in range(6)]


@pytest.fixture
def eager_step(cache: Cache, config: Callable[..., TrainConfig]) -> Callable[..., EagerStep]:
    """A fresh step of a store, the same each time: eager_step(model spec, device, settings of a run)."""

    def make(spec: str = "kdcache:tiny", device: str = "cpu", *, capturable: bool = False, **changes: Any) -> EagerStep:
        run_config, place = config(**{"lr": 0.01, **changes}), torch.device(device)
        torch.manual_seed(3)
        model = build_model(spec, cache.num_classes).to(place).train().to(memory_format=torch.channels_last)
        optimizer = make_optimizer(model, run_config.optimizer, capturable=capturable)
        criterion, clip_grad = Criterion([DistillLoss(cache)]), run_config.optimizer.clip_grad
        return EagerStep(model, criterion, optimizer, device=place, clip_grad=clip_grad)

    return make


class Backend:
    """A compiler that compiles nothing, and counts: tracing is what most tests are about."""

    def __init__(self) -> None:
        self.programs = 0

    def __call__(self, program: torch.fx.GraphModule, _: object) -> Callable[..., Any]:
        self.programs += 1
        return program.forward


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> Backend:
    """Traced programs run as they are; the machine's compiler is left to the slow tests."""
    fake = Backend()
    monkeypatch.setattr("kdcache.training.step.compiled.BACKEND", fake)
    return fake


@pytest.fixture
def read_metrics() -> Callable[..., list[dict[str, Any]]]:
    """Lines of a run's metrics.jsonl, of one kind if asked. Strict JSON: NaN is refused."""

    def refuse(word: str) -> Any:
        raise AssertionError(f"{word} is no JSON")

    def read(run: Path, kind: str | None = None) -> list[dict[str, Any]]:
        lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line, parse_constant=refuse) for line in lines]
        return [row for row in rows if kind in (None, row["kind"])]

    return read


@pytest.fixture(scope="session")
def python() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs code in a fresh interpreter with one thread, warnings being errors."""

    def run(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, *_WARNINGS, "-c", code, *arguments]
        return subprocess.run(
            command, env=os.environ | ONE_THREAD, capture_output=True, text=True, timeout=120, check=False
        )

    return run


_WARNINGS = ["-W", "error", "-W", "ignore:This DataLoader will create:UserWarning"]
"""Errors, but for torch's advice on a machine with few CPUs, as in pyproject.toml."""
_NURSERY = """
import json, os, sys, traceback
from warm_training import warm_up
from kdcache.training import Interrupted, make_config, train

warm_up()  # seconds, which no training then pays again
for line in sys.stdin:
    job = json.loads(line)
    pid = os.fork()
    if pid == 0:
        os.setpgid(0, 0)
        code = 0
        try:
            train(make_config(**job["settings"]), job["out"], resume=job["resume"])
        except Interrupted as stop:
            code = 130
        except BaseException:
            traceback.print_exc()
            code = 1
        os._exit(code)
    print(pid, flush=True)
    _, status = os.waitpid(pid, 0)
    print(os.waitstatus_to_exitcode(status), flush=True)
"""


class Nursery:
    """A process that has everything imported and forks a child for each training: quick to start, real to kill."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, *_WARNINGS, "-c", _NURSERY],
            cwd=Path(__file__).parents[1],  # where warm_training.py is
            env=os.environ | ONE_THREAD,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._running = False

    def start(self, settings: dict[str, Any], out: Path, *, resume: bool = False) -> int:
        """Begin a training; returns its process id, which leads a process group of its own."""
        assert self._process.stdin is not None
        if self._running:  # a test failed before it waited: the next line is an exit code, no process id
            self.wait()
        self._process.stdin.write(json.dumps({"settings": settings, "out": str(out), "resume": resume}) + "\n")
        self._process.stdin.flush()
        self._running = True
        return self._line()

    def wait(self) -> int:
        """Exit code of the training; -9 after SIGKILL."""
        self._running = False
        return self._line()

    def kill_at_checkpoint(self, settings: dict[str, Any], out: Path) -> None:
        """Begin a training and kill it once it has written a checkpoint; it may have ended by then."""
        pid = self.start(settings, out)
        for _ in range(4000):
            if (out / "checkpoint.pt").is_file():
                break
            time.sleep(0.005)
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        assert self.wait() in (-signal.SIGKILL, 0)

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(30)
        self._process.stdout.close()

    def _line(self) -> int:
        assert self._process.stdout is not None
        return int(self._process.stdout.readline())


@pytest.fixture(scope="session")
def nursery() -> Iterator[Nursery]:
    """Starts trainings in processes of their own."""
    if not hasattr(os, "fork"):
        pytest.skip("needs fork")
    nursery = Nursery()
    yield nursery
    nursery.close()


@pytest.fixture
def copy_run(tmp_path: Path) -> Callable[[Path], Path]:
    """A copy of a run that a test may spoil."""

    def copy(run: Path) -> Path:
        return Path(shutil.copytree(run, tmp_path / f"copy-of-{run.name}"))

    return copy


_DROPOUT = """
from torch import nn

def build(num_classes=7):
    return nn.Sequential(
        nn.Conv2d(3, 12, 5, 4, 2), nn.BatchNorm2d(12), nn.ReLU(), nn.Dropout(0.4), nn.Conv2d(12, num_classes, 1)
    )
"""

_NAN = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.body = nn.Conv2d(3, num_classes, 3, 4, 1)
        self.calls = 0

    def forward(self, x):
        self.calls += self.training
        y = self.body(x)
        return y * torch.nan if self.calls == 3 else y

def build(num_classes=7):
    return Net(num_classes)
"""

_HUNGRY = """
import os
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, num_classes, error):
        super().__init__()
        self.body = nn.Conv2d(3, num_classes, 3, 4, 1)
        self.error = error

    def forward(self, x):
        limit = int(os.environ["LIMIT" if self.training else "LIMIT_EVAL"])
        if len(x) > limit:
            raise self.error
        return self.body(x)

def cuda(num_classes=7):
    text = "CUDA out of memory. Tried to allocate 20.50 GiB. GPU 0 has a total capacity of 79.11 GiB, 3 MiB is free"
    return Net(num_classes, torch.OutOfMemoryError(text))

def host(num_classes=7):
    return Net(num_classes, MemoryError())

def allocator(num_classes=7):
    text = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 8589934592 bytes. Error code 12"
    return Net(num_classes, RuntimeError(text))

def other(num_classes=7):
    return Net(num_classes, RuntimeError("a fault of the model's own"))
"""

_TIED = """
from torch import nn

class Net(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, 4, 1)
        self.left, self.right = nn.Conv2d(8, num_classes, 1), nn.Conv2d(8, num_classes, 1)
        self.right.weight = self.left.weight

    def forward(self, x):
        y = self.first(x).relu()
        return self.left(y) + self.right(-y)

def build(num_classes=7):
    return Net(num_classes)
"""


@pytest.fixture(scope="session")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Spec of a model of one's own: `dropout`, `nan` (in the third training step), `tied` weights, or `hungry`, which
    runs out of memory beyond LIMIT (LIMIT_EVAL) samples, as its function says.
    """
    folder = tmp_path_factory.mktemp("models")
    for name, code in {"dropout": _DROPOUT, "nan": _NAN, "tied": _TIED, "hungry": _HUNGRY}.items():
        (folder / f"{name}.py").write_text(code)
    return lambda name, function="build": f"{folder / name}.py:{function}"
