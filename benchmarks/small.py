"""Time a call of the losses on small problems: of two checkouts and of eager PyTorch, in one run.

Each checkout has a process, and they take turns. Times are processor times on one thread in microseconds, best of all
calls: the forward, and forward and backward. Eager is `kdcache.bench.kernels.losses` of AFTER, so both checkouts have
the same rival. Images of one pixel are a batch of rows there. In each process, kdcache and eager alternate call by
call.

    python benchmarks/small.py ../before . --json benchmarks/results/kernels-cpu-small.json
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

SHAPES = (
    *("1x3x32x32/4", "1x11x24x24/4", "1x11x96x96/4", "1x11x384x384/4", "1x1000x16x16/1", "1x1000x64x64/4"),
    *("4x1000x7x7/1", "4x1000x28x28/4", "256x1000x1x1/1", "32x10x1x1/1"),
)
"""Labels and stride. The last two are images of one pixel."""
RELATIONS = ("1x3x32x32/4", "1x11x96x96/4", "1x11x384x384/4")
KEPT = {"256x1000x1x1/1": 16}
"""Classes that a target keeps, if a cache would keep others."""
ROUNDS, SECONDS = 6, 0.15
"""Turns of a checkout, and about how long each contestant is called in a turn."""


def steps() -> dict[str, dict[str, Callable[[], Any]]]:
    """Return the timed steps of each case: kdcache forward, kdcache forward and backward, and eager PyTorch."""
    import torch

    from kdcache.bench.kernels.inputs import make_inputs
    from kdcache.bench.kernels.losses import loss_of, targets_of
    from kdcache.bench.kernels.shapes import Case, parse_shapes

    def gradient(loss: Callable[[], Any], leaf: Any) -> Any:
        return torch.autograd.grad(loss(), leaf)[0]

    found: dict[str, dict[str, Callable[[], Any]]] = {}
    torch.set_num_threads(1)
    for kind, shapes in (("plain", SHAPES), ("dist", RELATIONS)):
        for name in shapes:
            case = Case(parse_shapes(name)[0], kind=kind, kept=KEPT.get(name))
            inputs = make_inputs(case, torch.device("cpu"))
            ours = partial(loss_of(case).ours, case, inputs, "auto")
            eager = partial(loss_of(case).eager, inputs.student, targets_of(case, inputs))
            both = {"both": partial(gradient, ours, inputs.student), "eager": partial(gradient, eager, inputs.student)}
            found[str(case)] = {"forward": ours, **both}
    return found


def work() -> None:
    """Time all steps for each line of standard input, and answer with a line of JSON."""
    found = steps()
    for contestants in found.values():
        for step in contestants.values():
            step()
    for _ in sys.stdin:
        times = {case: best(timed) for case, timed in found.items()}
        print(json.dumps(times), flush=True)


def best(timed: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """Return the shortest time of each step in microseconds. The steps alternate, so all meet the same machine."""
    least, end = dict.fromkeys(timed, float("inf")), time.monotonic() + SECONDS * len(timed)
    while time.monotonic() < end:
        for name, step in timed.items():
            began = time.process_time()
            step()
            least[name] = min(least[name], time.process_time() - began)
    return {name: 1e6 * seconds for name, seconds in least.items()}


def add(rows: dict[str, dict[str, float]], name: str, found: dict[str, dict[str, float]]) -> None:
    """Keep the shortest of each time in microseconds. Both checkouts share the times of eager PyTorch.

    Raises: SystemExit if the checkout has other cases than the rows.
    """
    if rows and set(rows) != set(found):
        sys.exit(f"error: {name} has other cases: {', '.join(sorted(set(rows) ^ set(found)))}")
    for case, times in found.items():
        row = rows.setdefault(case, {})
        for key, value in times.items():
            place = "eager" if key == "eager" else f"{name}_{key}"
            row[place] = round(min(row.get(place, value), value), 1)


def ratios(row: dict[str, float]) -> dict[str, float]:
    """Return the time of eager PyTorch divided by the time of each checkout, forward and backward."""
    return {f"eager_over_{name}": round(row["eager"] / row[f"{name}_both"], 2) for name in ("before", "after")}


def main() -> None:
    """Time both checkouts in worker processes that take turns, print the table, and write the result file."""
    if sys.argv[1:] == ["--worker"]:
        return work()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    workers = {}
    for name, checkout in (("before", arguments.before), ("after", arguments.after)):
        # Only the kernels are the checkout's: cases and rivals are those of AFTER.
        path = os.pathsep.join(str(x.resolve()) for x in (checkout / "kernels", arguments.after))
        command = [sys.executable, __file__, "--worker"]
        environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        workers[name] = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
    rows: dict[str, dict[str, float]] = {}
    for _ in range(ROUNDS):
        for name, worker in workers.items():
            assert worker.stdin is not None
            assert worker.stdout is not None
            print(file=worker.stdin, flush=True)
            add(rows, name, json.loads(worker.stdout.readline()))
    for worker in workers.values():
        worker.communicate()
    for case, row in rows.items():
        row |= ratios(row)
        print(f"{case:36}", *(f"{key} {value:.6g}" for key, value in row.items()), sep="  ")
    if arguments.json is not None:
        from common import header, write

        write(arguments.json, {**header("small kernels"), "microseconds": rows})
    return None


if __name__ == "__main__":
    main()
