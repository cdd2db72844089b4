"""Run the jobs of a sweep. Finished jobs are not repeated, and interrupted ones continue.

One process runs them in order. `parallel` runs several at once, each as soon as its dependencies are done.
"""

import hashlib
import json
import shlex
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path

import tomli_w

from kdcache.bounded import parse_toml, read_text
from kdcache.errors import KDCacheError, RecipeError
from kdcache.files import is_partial, write_whole
from kdcache.sweep.curve import write_curve
from kdcache.sweep.inputs import INPUTS, Inputs, without_folders
from kdcache.sweep.plan import COMPARISON, Job, Sweep
from kdcache.sweep.summary import write_details

RECORD = "sweep.toml"
LOGS = "logs"
"""The folder for the output of jobs that run side by side."""
_LAST_LINES = 15
"""The number of lines of a job's log that an error shows."""

Runner = Callable[[Job], None]
"""Runs the command of a job. It raises an exception if the command fails."""


class Watcher:
    """Receives the progress of a sweep. Override the methods that you need. By default they do nothing."""

    def started(self, job: Job, number: int, total: int) -> None:
        """Handle the start of a job, which is number `number` of `total` jobs, counted from 1."""

    def kept(self, job: Job, number: int, total: int) -> None:
        """Handle a job that is skipped, because it is already done. It is job `number` of `total`, counted from 1."""

    def finished(self, job: Job, number: int, total: int, seconds: float) -> None:
        """Handle the end of a job that ran for `seconds`. It is job number `number` of `total`, counted from 1."""


def run_jobs(
    sweep: Sweep,
    runner: Runner,
    *,
    parallel: int = 1,
    watcher: Watcher | None = None,
) -> None:
    """Run all jobs of a sweep that are not done yet.

    Args:
        sweep: the planned sweep.
        runner: called with each job, to run its command. It raises an exception if the command fails. With several jobs
            at once it is called from several threads.
        parallel: number of jobs to run at once.
        watcher: receives the progress.
    Raises: any exception of `runner`, after the running jobs have ended; RecipeError if the sweep's folder holds
        another sweep or other files; MismatchError if a data set has changed since the sweep was first run.
    """
    _record(sweep)
    watching, inputs = watcher or Watcher(), Inputs(sweep)
    if parallel == 1:
        for number, job in enumerate(sweep.jobs, 1):
            _do(sweep, job, number, runner, watching, inputs)
    else:
        _SideBySide(sweep, runner, watching, inputs).run(parallel)
    write_details(sweep)


def _do(sweep: Sweep, job: Job, number: int, runner: Runner, watcher: Watcher, inputs: Inputs) -> None:
    total = len(sweep.jobs)
    if inputs.are_done(job):
        watcher.kept(job, number, total)
        return
    began = time.monotonic()
    watcher.started(job, number, total)
    digest = inputs.digest(job)
    runner(job)
    if job.name == COMPARISON:  # the page shows it
        write_curve(sweep.recipe, sweep.out)
    if job.done is not None:
        inputs.record(job, digest)
    watcher.finished(job, number, total, time.monotonic() - began)


class _SideBySide:
    """Runs several jobs at once. A job starts as soon as the jobs that it needs are done."""

    def __init__(self, sweep: Sweep, runner: Runner, watcher: Watcher, inputs: Inputs) -> None:
        self._sweep, self._runner, self._watcher, self._inputs = sweep, runner, watcher, inputs
        self._waiting = list(sweep.jobs)
        self._ended: set[str] = set()

    def run(self, parallel: int) -> None:
        under_way: dict[Future[None], Job] = {}
        with ThreadPoolExecutor(parallel) as pool:
            while self._waiting or under_way:
                for job in [job for job in self._waiting if self._ready(job)][: parallel - len(under_way)]:
                    self._waiting.remove(job)
                    under_way[pool.submit(self._one, job)] = job
                ended, _ = wait(under_way, return_when=FIRST_COMPLETED)
                for future in ended:
                    job = under_way.pop(future)
                    if (error := future.exception()) is not None:
                        self._waiting.clear()  # what is under way may end
                        wait(under_way)
                        raise error
                    self._ended.add(job.name)

    def _one(self, job: Job) -> None:
        _do(self._sweep, job, self._sweep.jobs.index(job) + 1, self._runner, self._watcher, self._inputs)

    def _ready(self, job: Job) -> bool:
        return self._ended.issuperset(job.needs)


def _record(sweep: Sweep) -> None:
    """Write the sweep's jobs into its folder, or check that the folder belongs to the same sweep."""
    path = sweep.out / RECORD
    jobs = {job.name: shlex.join(job.words) for job in sweep.jobs if job.done is not None}
    if path.exists():
        before = _recorded(path)
        if _without_folders(before) != _without_folders(jobs):
            raise RecipeError(
                f"Cannot continue the sweep in {sweep.out}: {_first_difference(before, jobs)}",
                fix="Repeat the first command, or give another --out",
            )
        return
    begun = (sweep.out / INPUTS).is_file()  # its record was lost
    if sweep.out.is_dir() and not begun and not all(map(is_partial, sweep.out.iterdir())):
        raise RecipeError(f"Cannot write a sweep here: {sweep.out} holds something else", fix="Give another --out")
    sweep.out.mkdir(parents=True, exist_ok=True)
    record = {"recipe": sweep.recipe.name, "title": sweep.recipe.title, "digest": _digest(jobs), "jobs": jobs}
    write_whole(path, tomli_w.dumps(record))


def _digest(jobs: dict[str, str]) -> str:
    """Return the SHA-256 of the jobs in sweep.toml, to detect damage."""
    return hashlib.sha256(json.dumps(jobs, sort_keys=True).encode()).hexdigest()


def _recorded(path: Path) -> dict[str, str]:
    """Return the jobs in a sweep's folder, by name. Raises: RecipeError for a damaged file."""
    try:
        record = parse_toml(read_text(path))
        jobs = {str(name): str(words) for name, words in record["jobs"].items()}
        if record.get("digest", _digest(jobs)) != _digest(jobs):  # earlier versions wrote none
            raise ValueError("its digest is another one")
        _without_folders(jobs)
        return jobs
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RecipeError(
            f"Cannot read {path}: {type(error).__name__}: {error}",
            fix=f"Delete it, and repeat the first command, which writes it again: rm {shlex.quote(str(path))}",
        ) from error


def _without_folders(jobs: dict[str, str]) -> dict[str, list[str]]:
    return {name: without_folders(shlex.split(words)) for name, words in jobs.items()}


def _first_difference(before: dict[str, str], now: dict[str, str]) -> str:
    """Return a text about the first job that is new, gone, or has other flags."""
    for name in [*now, *before]:
        if name not in before or name not in now:
            return f"{name!r} is {'new' if name in now else 'gone'}"
        old, new = shlex.split(before[name]), shlex.split(now[name])
        if old != new:
            flags = [_flags_of(words) for words in (new, old)]
            changed = [part for part in flags[0] if part not in flags[1]]
            return f"{name!r} with {', '.join(changed) or 'fewer flags'} (was {shlex.join(old)})"
    return "the jobs are in another order"


def _flags_of(words: Sequence[str]) -> list[str]:
    """Return each flag with its value, as typed on the command line."""
    return [part.strip() for part in " ".join(words).split(" --")]


def failed(job: Job, how: str, log: Path) -> KDCacheError:
    """Return the error for a job whose process failed. It shows the last lines of the log file `log`.

    `how` says how the process ended, such as "code 1".
    """
    last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-_LAST_LINES:]
    return KDCacheError(
        f"The job {job.name} ended with {how}:\n" + "\n".join(last),
        fix=f"See {log}, then repeat the sweep, which continues with what is not done.",
    )
