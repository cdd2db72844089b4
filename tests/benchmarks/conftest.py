"""What the tests of the scripts share: a small cache, a run folder, paces, a clock that only the work moves."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from kdcache.bench.timing import Spread
from kdcache.data import open_split
from kdcache.models import build_model
from kdcache.models.run import write_run_model, write_weights
from kdcache.run_folder import RunModel
from kdcache.teacher import BuildOptions, build_cache, load_teacher

SCENES = "scenes:32x48,train=8,val=2"


@pytest.fixture(scope="session")
def scenes() -> str:
    """Procedural images of 32x48, eight for training and two to judge."""
    return SCENES


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """A function that makes the folder of a run of kdcache:tiny: random weights of a seed, with large logits."""
    classes, top = open_split(SCENES, "train").classes, tmp_path_factory.mktemp("runs")

    def make(seed: int) -> Path:
        folder = top / str(seed)
        if not folder.exists():
            folder.mkdir()
            torch.manual_seed(seed)
            model = build_model("kdcache:tiny", len(classes)).eval()
            with torch.no_grad():
                list(model.parameters())[-2].mul_(10)
            stats = {"mean": (0.4, 0.4, 0.4), "std": (0.3, 0.3, 0.3)}
            names = {"class_names": classes.names, "class_colours": classes.colours}
            write_run_model(folder, RunModel(spec="kdcache:tiny", size=(32, 48), trained_on="scenes", **names, **stats))
            write_weights(folder, "best", model)
            (folder / "recipe.toml").write_text('model = "kdcache:tiny"\n', encoding="utf-8")
        return folder

    return make


@pytest.fixture(scope="session")
def teacher_run(runs: Callable[[int], Path]) -> Path:
    """The run of the teacher of `store`."""
    return runs(5)


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory, teacher_run: Path) -> Path:
    """A dense cache of the scenes."""
    split = open_split(SCENES, "train")
    path = tmp_path_factory.mktemp("scripts") / "cache.zarr"
    options = BuildOptions(size=(32, 48), views=1, batch_size=4, shard_records=4)
    build_cache(split, load_teacher(str(teacher_run), split.classes), path, options)
    return path


class Clock:
    """Stands for the module `time`: work and waiting move it, and nothing else."""

    def __init__(self) -> None:
        self.seconds = 100.0

    def work(self, milliseconds: float) -> None:
        self.seconds += milliseconds / 1e3

    def perf_counter(self) -> float:
        return self.seconds

    monotonic = process_time = time = perf_counter

    def sleep(self, seconds: float) -> None:
        self.seconds += seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def pace(script: Callable[[str], ModuleType]) -> Callable[..., Any]:
    """A function that makes a pace of milliseconds by the clock, and of CPU."""
    turns = script("turns")

    def make(*ms: float, cpu: tuple[float, ...] | None = None) -> Any:
        return turns.Pace(Spread.of(ms), None if cpu is None else Spread.of(cpu))

    return make


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """A function that runs a script's `main` in this process with some words, and returns its exit code."""

    def run(module: ModuleType, *words: object) -> int:
        monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, words)])
        try:
            module.main()
        except SystemExit as ended:
            return int(ended.code or 0)
        return 0

    return run


@pytest.fixture
def options() -> Callable[..., Any]:
    """A function that makes a script's parsed arguments."""
    return SimpleNamespace
