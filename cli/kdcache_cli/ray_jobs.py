"""The jobs of a sweep on a Ray cluster: each in a process of its own, wherever there is room.

The sweep deals them out as it does to its own processes (run.py); a job whose process or node dies is begun again
elsewhere by Ray, and goes on from its last checkpoint. All nodes see the data and the sweep's folder by the same paths.
"""

import os
import runpy
import socket
import sys
from pathlib import Path
from typing import Any

from kdcache.errors import KDCacheError, RecipeError, StoreError
from kdcache.models.trust import is_trusting
from kdcache.sweep.plan import Job, Sweep, folder_name
from kdcache.sweep.run import LOGS, failed

MOST_DEATHS = 5
"""The number of times that a job is started again after its process died."""


class RayRunner:
    """A callable that runs one job of a sweep on a Ray cluster, and returns None when the job has ended.

    To run several jobs at the same time, call it from several threads.

    Args:
        ray: the module `ray`, as `kdcache.ray_cluster.cluster` yields it.
        sweep: the sweep, whose folder gets the logs.
        parallel: the number of threads that call it. Each job gets an equal share of the cluster's CPUs, on one node.
        num_gpus: the GPUs of each job. With 0.5, two jobs share a GPU.
    Raises: RecipeError if no node has enough CPUs and GPUs for a job.
    """

    def __init__(self, ray: Any, sweep: Sweep, parallel: int, num_gpus: float) -> None:
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        cpus, gpus = ([node.get(kind, 0) for node in nodes] for kind in ("CPU", "GPU"))
        share = max(1, min(int(sum(cpus) // parallel), int(max(cpus))))
        if max(cpus) < 1 or max(gpus) < num_gpus:
            raise RecipeError(
                f"No node of the cluster has room for a job: a CPU and --num-gpus {num_gpus:g}, of at most "
                f"{max(cpus):g} CPU and {max(gpus):g} GPU",
                fix="Lower --num-gpus, or add nodes to the cluster.",
            )
        self._ray, self._logs = ray, sweep.out.absolute() / LOGS
        options = {"num_cpus": share, "num_gpus": num_gpus, "max_calls": 1, "max_retries": MOST_DEATHS}
        self._job = ray.remote(**options)(_do)
        self._trust = ["--trust"] if is_trusting() else []

    def __call__(self, job: Job) -> None:
        """Run a job on the cluster and wait for it. Raises: the job's error, or KDCacheError if its process failed."""
        self._logs.mkdir(parents=True, exist_ok=True)
        log = self._logs / f"{folder_name(job.name)}.log"
        try:
            code = self._ray.get(self._job.remote(job, self._trust, os.getcwd(), str(log)))
        except self._ray.exceptions.RayTaskError as error:
            raise error.cause if isinstance(error.cause, KDCacheError) else error from None
        except self._ray.exceptions.WorkerCrashedError as error:
            raise failed(job, f"its process died {MOST_DEATHS + 1} times", log) from error
        if code:
            raise failed(job, f"code {code}", log)


def _do(job: Job, trust: list[str], folder: str, log: str) -> int:
    """Run a job in this process, with its output in the file `log`, and return its exit code.

    `trust` is ["--trust"] if this flag was given, else [].
    """
    try:
        os.chdir(folder)
        file = Path(log).open("a", encoding="utf-8")  # noqa: SIM115 - the process ends with the job
    except OSError as error:
        raise StoreError(
            f"Cannot see the sweep's folder on node {socket.gethostname()}: {error}",
            fix="Put the data and the folder of the sweep on a disk that all nodes share, under the same paths.",
        ) from error
    for descriptor in (1, 2):
        os.dup2(file.fileno(), descriptor)
    sys.argv = ["kdcache", *trust, *job.next_words]  # asked here: one that died before goes on
    try:
        runpy.run_module("kdcache_cli", run_name="__main__")
    except SystemExit as ended:
        return int(ended.code or 0)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0
