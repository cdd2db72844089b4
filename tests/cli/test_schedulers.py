"""The job files in examples/: what a scheduler reads of them, and the commands that they start."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import yaml
from fork_server import ForkServer
from typer.testing import CliRunner

from kdcache.store import open_cache, worker_of
from kdcache_cli.app import app

FOLDER = Path(__file__).parents[2] / "examples"
SLURM, KUBERNETES = FOLDER / "build_array.sbatch", FOLDER / "build_job.yaml"


def test_the_slurm_array_counts_its_tasks_from_0() -> None:
    directives = [line.split()[1] for line in SLURM.read_text().splitlines() if line.startswith("#SBATCH ")]
    assert directives
    options = dict(directive.removeprefix("--").partition("=")[::2] for directive in directives)
    assert options["array"].startswith("0-")
    assert "requeue" in options
    # Slurm reads directives up to the first command.
    lines = SLURM.read_text().splitlines()
    commands = [at for at, line in enumerate(lines) if line and not line.startswith("#")]
    assert max(at for at, line in enumerate(lines) if line.startswith("#SBATCH")) < commands[0]


@pytest.mark.slow
def test_tasks_of_the_slurm_array_build_a_store(world: Path, forks: ForkServer, tmp_path: Path) -> None:
    """By the script itself, as bash runs it."""
    out = tmp_path / "store.zarr"
    tool = tmp_path / "bin" / "kdcache"
    tool.parent.mkdir()
    tool.write_text(f'#!/bin/sh\nexec {forks.program} "$@" --shard-records 1 --views 1\n')
    tool.chmod(0o755)
    for task in range(2):
        variables = {"SLURM_ARRAY_TASK_ID": task, "SLURM_ARRAY_TASK_COUNT": 2, "SLURM_ARRAY_TASK_MIN": 0}
        own = {"DATA": world / "data", "TEACHER": world / "teacher", "OUT": out, **variables}
        environment = os.environ | {name: str(value) for name, value in own.items()}
        environment["PATH"] = f"{tool.parent}:{environment['PATH']}"
        ended = subprocess.run(["bash", SLURM], env=environment, capture_output=True, text=True, timeout=300)
        assert ended.returncode == 0, ended.stderr
        assert (f"worker {task} of 2" in ended.stdout) == (task == 0)
    assert open_cache(out).manifest.shards > 1


def test_pods_of_the_kubernetes_job_number_their_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    job = yaml.safe_load(KUBERNETES.read_text())
    assert (job["apiVersion"], job["kind"]) == ("batch/v1", "Job")
    spec = job["spec"]
    assert spec["completionMode"] == "Indexed"
    (container,) = spec["template"]["spec"]["containers"]
    tool, verb, *words = container["command"]
    assert tool == "kdcache"
    options = dict(word.removeprefix("--").partition("=")[::2] for word in words)
    monkeypatch.setenv("JOB_COMPLETION_INDEX", str(spec["completions"] - 1))
    worker = worker_of(options["worker"])
    assert (worker.index + 1, worker.count) == (spec["completions"], spec["completions"])
    help_text = CliRunner().invoke(app, [verb, "--help-all"], env={"COLUMNS": "200"}).output
    assert all(f"--{option}" in help_text for option in options)
