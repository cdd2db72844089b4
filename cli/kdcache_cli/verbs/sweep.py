"""`kdcache sweep`: a recipe of many runs, with its table, pictures and page."""

import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from kdcache import settings
from kdcache.errors import RecipeError
from kdcache.settings.engine import EngineSettings
from kdcache_cli.console import ERRORS, OUT
from kdcache_cli.settings import shared_flags
from kdcache_cli.settings.signature import flag
from kdcache_cli.torchrun import numbered, shared_errors

if TYPE_CHECKING:
    from kdcache.sweep import Job, Sweep, Watcher
    from kdcache.sweep.run import Runner

_Option = typer.Option


def sweep(
    context: typer.Context,
    recipe: Annotated[
        str | None, typer.Argument(help="A shipped recipe or a TOML file. Without one, list them.")
    ] = None,
    data: Annotated[
        list[str] | None,
        _Option(
            "--data",
            metavar="[NAME=]DIR",
            help="Data folder or LAYOUT:DIR. For a recipe's streams: NAME=DIR, repeated.",
        ),
    ] = None,
    out: Annotated[
        Path | None, _Option("--out", help="Where everything goes; a sweep that was stopped goes on.")
    ] = None,
    smoke: Annotated[
        bool, _Option("--smoke", help="Small, on procedural scenes: minutes instead of days, every output.")
    ] = False,
    seeds: Annotated[str | None, _Option("--seeds", metavar="A,B,C", help="Seeds instead of the recipe's.")] = None,
    changes: Annotated[
        list[str] | None,
        _Option("--set", metavar="TABLE.KEY=VALUE", help="Change the recipe, e.g. student.iterations=1000."),
    ] = None,
    parallel: Annotated[int, _Option("--parallel", min=1, help="Runs side by side, each a process.")] = 1,
    dry_run: Annotated[bool, _Option("--dry-run", help="Show the commands and do nothing.")] = False,
    engine: Annotated[str, flag(EngineSettings, "engine")] = "local",
    num_gpus: Annotated[float, flag(EngineSettings, "num_gpus")] = 0.0,
    address: Annotated[str | None, flag(EngineSettings, "address")] = None,
) -> None:
    """Do all runs of a recipe: teachers, caches and students, then a table, pictures and a page.

    With --parallel, several runs share this machine, each on one of its GPUs. With
    --engine ray, each run goes to a node of a Ray cluster with --num-gpus free.

    [dim]kdcache sweep voc-compare --smoke --out try[/]

    [dim]kdcache sweep camvid-segformer --data CamVid --out s0 --set student.iterations=4000[/]
    """
    from kdcache.sweep import list_recipes, plan_sweep, read_recipe

    verbs = context.find_root().command
    engine_settings = settings.read(EngineSettings, {"engine": engine, "num_gpus": num_gpus, "address": address})
    if recipe is None:
        recipes = list_recipes()
        width = max(map(len, recipes))
        for name, title in recipes.items():
            OUT.print(f"[bold]{escape(name):<{width}}[/]  {escape(title)}", highlight=False)
        return
    if out is None:
        raise RecipeError("Missing --out", fix="Add --out DIR, the folder of the sweep.")
    read = read_recipe(recipe, smoke=smoke, changes=changes or ())
    if seeds is not None:
        read = replace(read, seeds=shared_flags.parse_numbers(seeds, "--seeds"))
    folder, sources = _data_of(data or [], [str(table["name"]) for table in read.stream])
    planned = plan_sweep(read, folder, out, flags_of(verbs), sources)
    if not engine_settings.is_ray:
        do_sweep(planned, verbs, recipe, parallel, dry_run)
        return
    from kdcache.ray_cluster import cluster
    from kdcache_cli.ray_jobs import RayRunner

    with nullcontext() if dry_run else cluster(address) as ray:
        runner = None if dry_run else RayRunner(ray, planned, parallel, num_gpus)
        do_sweep(planned, verbs, recipe, parallel, dry_run, runner)


def do_sweep(
    planned: "Sweep",
    verbs: Any,
    recipe: str,
    parallel: int,
    dry_run: bool,
    runner: "Runner | None" = None,
) -> None:
    """Run all jobs of a planned sweep, or print their commands.

    Args:
        planned: the sweep.
        verbs: the Typer group of all verbs.
        recipe: the recipe's name or file, for messages.
        parallel: the number of jobs at the same time.
        dry_run: True prints the commands only.
        runner: runs a job. None runs jobs in this process, or in `parallel` processes of this machine.
    """
    from kdcache.sweep import check_data, run_jobs

    if dry_run:
        for job in planned.jobs:
            OUT.print(f"[dim]# {escape(job.name)}[/]\nkdcache {escape(shlex.join(job.next_words))}", soft_wrap=True)
        return
    with shared_errors():
        _check_alone()
    _check_code(planned, recipe)
    check_data(planned)
    runner = runner or (InProcess(verbs) if parallel == 1 else Apart(planned, parallel))
    run_jobs(planned, runner, parallel=parallel, watcher=_watcher())
    _show(planned)


def _data_of(values: Sequence[str], streams: Sequence[str]) -> tuple[str | None, dict[str, str]]:
    """Return the data folder of --data (None without one), and the folders of streams by name.

    Raises: RecipeError if one is given twice.
    """
    named: dict[str, str] = {}
    folder = None
    for value in values:
        name, equals, rest = value.partition("=")
        of_stream = bool(equals) and name in streams
        if (name in named) if of_stream else (folder is not None):
            raise RecipeError(
                f"Cannot use several data sets: {' '.join(f'--data {text}' for text in values)}",
                fix="Leave one of them out."
                + (f" The streams are {', '.join(streams)}: --data {streams[0]}=DIR" if streams else ""),
            )
        if of_stream:
            named[name] = rest
        else:
            folder = value
    return folder, named


def _check_code(planned: "Sweep", recipe: str) -> None:
    """Check that --trust is given if a model is a function. Later jobs read its name from run folders."""
    from kdcache.models.run import split_spec
    from kdcache.models.trust import check_trusted, named_by

    spec = planned.recipe.teacher.get("spec")
    with named_by(recipe):
        weighted = None if spec is None else split_spec(str(spec))
    models = [] if weighted is None else [weighted[0]]
    models += [value for job in planned.jobs for flag, value in pairwise(job.words) if flag == "--model"]
    for model in dict.fromkeys(models):
        check_trusted(model, recipe)


def _check_alone() -> None:
    """Check that torchrun did not start several processes for the sweep. Raises: RecipeError."""
    rank, size = numbered()
    if size > 1:
        raise RecipeError(
            f"Cannot lead a sweep in process {rank} of {size}",
            fix="Start it once, with --parallel N, which takes all GPUs in turn. If RANK and WORLD_SIZE are left in "
            "the shell, unset them.",
        )


def flags_of(group: Any) -> dict[str, set[str]]:
    """Return the flags of each verb, without the leading dashes: verb -> flags such as `batch-size`.

    `group` is the Typer group of all verbs.
    """
    return {
        name: {text.lstrip("-") for option in verb.params for text in option.opts if text.startswith("--")}
        for name, verb in group.commands.items()
    }


class InProcess:
    """A callable that runs a job of a sweep in this process. Call it with the job. It returns None.

    `group` is the Typer group of all verbs.
    """

    def __init__(self, group: Any) -> None:
        self._group = group

    def __call__(self, job: "Job") -> None:
        """Run a job by calling its verb."""
        self._group(args=list(job.next_words), standalone_mode=False)


class Apart:
    """A callable: given a job of a sweep, it runs the job in a new process and waits until the process ends.

    It raises KDCacheError if the job fails. Each process gets an equal share of the CPU cores, and one GPU.

    Args:
        sweep: the sweep, whose folder gets the logs.
        parallel: the largest number of jobs that may run at the same time.
    """

    def __init__(self, sweep: "Sweep", parallel: int) -> None:
        from kdcache.models.trust import is_trusting
        from kdcache.sweep.run import LOGS

        self._logs = sweep.out / LOGS
        self._command = [sys.executable, "-m", "kdcache_cli", *(["--trust"] if is_trusting() else [])]
        self._environment = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // parallel)), **os.environ}
        places = [{"CUDA_VISIBLE_DEVICES": gpu} for gpu in _visible_gpus()] or [{}]
        self._free: SimpleQueue[dict[str, str]] = SimpleQueue()
        for number in range(parallel):
            self._free.put(places[number % len(places)])

    def __call__(self, job: "Job") -> None:
        """Run a job in a process and wait for it. Raises: KDCacheError, with the path of the job's log, if it fails."""
        from kdcache.sweep.plan import folder_name
        from kdcache.sweep.run import failed

        self._logs.mkdir(parents=True, exist_ok=True)
        log = self._logs / f"{folder_name(job.name)}.log"
        place = self._free.get()
        pinned = any(word.startswith("cuda:") for word in job.next_words)
        environment = self._environment if pinned else self._environment | place
        try:
            with log.open("w", encoding="utf-8") as file:
                done = subprocess.run(
                    [*self._command, *job.next_words], env=environment, stdout=file, stderr=file, check=False
                )
        finally:
            self._free.put(place)
        if done.returncode:
            raise failed(job, f"code {done.returncode}", log)


def _visible_gpus() -> list[str]:
    """Return the GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    import torch

    count = torch.cuda.device_count()
    return os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(count)))).split(",")[:count]


def _watcher() -> "Watcher":
    from kdcache.sweep import Watcher

    class Printing(Watcher):
        def started(self, job: "Job", number: int, total: int) -> None:
            ERRORS.print(f"\n[bold]{number}/{total}  {escape(job.name)}[/]")
            ERRORS.print(f"[dim]kdcache {escape(shlex.join(job.next_words))}[/]", soft_wrap=True)

        def kept(self, job: "Job", number: int, total: int) -> None:
            ERRORS.print(f"{number}/{total}  {escape(job.name)}: done before")

        def finished(self, job: "Job", number: int, total: int, seconds: float) -> None:
            ERRORS.print(f"{number}/{total}  {escape(job.name)}: {seconds:.0f} s")

    return Printing()


def _show(planned: "Sweep") -> None:
    for name in ("report.html", "comparison.md", "details.md", "kd_comparison_results.txt", "curve.png", "pictures"):
        if (planned.out / name).exists():
            OUT.print(f"  {planned.out / name}", markup=False, highlight=False)
