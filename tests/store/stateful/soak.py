"""The model of a cache's life for long. `scripts/soak` runs this file.

Each seed draws lives of a cache (tests/store/stateful): builds, kills, damage, repairs, changes of the data. With
--faults the disk fails at times, and so does the object store. The next seed begins where the one before ended, so a
run of seed S covers S, S+1, ... A violation is printed with its steps. `scripts/soak --seed N --seeds 1` repeats it.
Exits with 1 if there is one.
"""

import argparse
import contextlib
import json
import os
import shlex
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis.stateful import run_state_machine_as_test
from s3 import ObjectStore
from stateful.machine import CacheLife, CacheLifeWithFaults

from common import header, write

LIVES, STEPS = 6, 40
"""Lives of a seed, and the most steps of a life. Another number would draw other lives from the same seed."""


def main() -> None:
    parser = argparse.ArgumentParser(
        "scripts/soak", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=1.0, help="Stop before the first seed after this time.")
    parser.add_argument("--seed", type=int, default=0, help="The first seed.")
    parser.add_argument("--seeds", type=int, help="Stop after so many seeds, whatever the time.")
    parser.add_argument("--faults", action="store_true", help="Let writes to the disk and requests to S3 fail.")
    parser.add_argument("--out", type=Path, help="Write the result to this file, as JSON.")
    options = parser.parse_args()
    torch.set_num_threads(1)
    life = CacheLifeWithFaults if options.faults else CacheLife
    began, now, violations = time.monotonic(), options.seed, list[dict[str, Any]]()
    life.server = ObjectStore()
    result = _result(options, life, now, began, violations)
    with contextlib.suppress(KeyboardInterrupt), life.server.serving():
        while _more(options, now, began):
            violation = live(life, now)
            now += 1
            if violation is not None:
                violations.append(violation)
                steps = "\n  ".join(violation["steps"])
                print(f"seed {violation['seed']}: {violation['error']}\n  {steps}", flush=True)
            result = _result(options, life, now, began, violations)
            if options.out is not None:  # after each seed: a soak that is stopped has a result
                write(options.out, result)
    print(json.dumps({key: value for key, value in result.items() if key != "violations"}, indent=1))
    print(
        f"{result['seeds']} seeds, {result['steps']} steps, {result['repaired']} repairs, {len(violations)} violations"
    )
    sys.exit(1 if violations else 0)


def _result(
    options: argparse.Namespace, life: type[CacheLife], now: int, began: float, violations: list[dict[str, Any]]
) -> dict[str, Any]:
    """Return the result file's content after all seeds before `now`."""
    counts = Counter(sorted(life.total.elements()))
    kinds = ("disk ", "s3 ")
    return {
        **header("a cache's life against a plain model"),
        "command": shlex.join(
            ["scripts/soak", *(os.path.basename(w) if os.path.isabs(w) else w for w in sys.argv[1:])]
        ),
        "faults": {kind: count for kind, count in counts.items() if kind.startswith(kinds)},
        "minutes": round((time.monotonic() - began) / 60, 2),
        "first_seed": options.seed,
        "seeds": now - options.seed,
        **{"steps": 0, "repaired": 0, "killed": 0},
        **{what: count for what, count in counts.items() if not what.startswith(kinds)},
        "violations": violations,
    }


def _more(options: argparse.Namespace, now: int, began: float) -> bool:
    if options.seeds is not None:
        return now - options.seed < int(options.seeds)
    return time.monotonic() - began < options.minutes * 60


def live(life: type[CacheLife], number: int) -> dict[str, Any] | None:
    """Run the lives of one seed. Returns its violation, a crash included; None without one."""
    seed(number)(life)
    try:
        run_state_machine_as_test(
            life,
            settings=settings(
                max_examples=LIVES,
                stateful_step_count=STEPS,
                phases=[Phase.generate],
                deadline=None,
                database=None,
                derandomize=False,
                suppress_health_check=list(HealthCheck),
            ),
        )
    except Exception as error:
        parts = _parts(error)
        notes = [note for part in parts for note in getattr(part, "__notes__", [])]
        steps = [line for note in notes for line in note.splitlines() if line != "state.count()"]
        told = "; in it ".join(f"{type(part).__name__}: {part}" for part in parts)
        return {"seed": number, "error": told, "steps": steps}
    return None


def _parts(error: BaseException) -> list[BaseException]:
    """Return an error and those inside it. Hypothesis groups two failures, and a failure that did not repeat."""
    within = error.exceptions if isinstance(error, BaseExceptionGroup) else ()
    return [error, *(part for inner in within for part in _parts(inner))]


if __name__ == "__main__":
    main()
