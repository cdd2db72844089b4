"""Functions that several scripts share: result files, errors, medians, a random cache and a student's step."""

import json
import os
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from kdcache.bench.header import header as bench_header
from kdcache.bench.timing import Spread, check_repeats
from kdcache.data import Split
from kdcache.distill import Criterion, DistillLoss
from kdcache.errors import KDCacheError, RecipeError
from kdcache.models import build_model
from kdcache.store import Cache
from kdcache.teacher import BuildOptions, Teacher, build_cache
from kdcache.training import make_config
from kdcache.training.run.metrics_log import environment
from kdcache.training.step.eager import EagerStep
from kdcache.training.step.optim import make_optimizer

RESULTS = Path(__file__).parent / "results"
MIX = "add rows to a file of another commit or machine"
"""Help of the flag `--mix`."""


def header(theme: str, also: Sequence[Any] = ()) -> dict[str, Any]:
    """Return the first keys of a result file: theme, command, machine and date. Paths are cut to their names.

    `also` are other commits and machines that rows of the file come from.
    """
    words = [os.path.basename(word) if os.path.isabs(word) else word for word in sys.argv[1:]]
    command = "python " + shlex.join([os.path.relpath(sys.argv[0]), *words])
    found = bench_header(theme, command, environment())
    return found | ({"also": list(also)} if also else {})


def run(main: Callable[[], None]) -> None:
    """Run the main function of a script. An error of kdcache ends it with exit code 2 and without a traceback."""
    try:
        main()
    except KDCacheError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def earlier(path: Path, theme: str, *, mix: bool = False) -> dict[str, Any]:
    """Return the content of a result file to which a command adds rows, or {} if the file does not exist.

    `mix` allows rows of another commit or machine, which the key `also` then names.

    Raises: RecipeError for another theme, or without `mix` for another commit or machine.
    """
    if not path.is_file():
        return {}
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        found = {key: content[key] for key in ("theme", "commit", "machine")}
    except (ValueError, KeyError, TypeError):
        raise RecipeError(f"Not a result file: {path}", fix="Name another --json.") from None
    here = header(theme)
    if found["theme"] != theme:
        fix = "Name another --json."
        raise RecipeError(f"Cannot add rows to {path}: it is a result of {found['theme']!r}, not of {theme!r}", fix=fix)
    pairs = {
        "commit": [str(of["commit"]).removesuffix("-dirty") for of in (found, here)],
        "machine": [of["machine"].get("cpu", "unknown") for of in (found, here)],
    }
    for what, (there, now) in pairs.items():
        if there != now and not mix:
            raise RecipeError(
                f"Cannot add rows to {path}: its {what} is {there}, and this one is {now}",
                fix=f"Name another --json, or add --mix to keep rows of both {what}s in one file.",
            )
    content.setdefault("also", [])
    if any(there != now for there, now in pairs.values()):
        content["also"].append({"commit": found["commit"], "cpu": pairs["machine"][0]})
    return content


def write(path: Path, result: dict[str, Any]) -> None:
    """Write a result as a JSON file in a folder that may be new, and print the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {path}")


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return the 20th, 50th and 80th percentile of repeated measurements. Raises: RecipeError for fewer than three."""
    check_repeats(len(values))
    found = Spread.of(values)
    return {"p20": found.p20, "p50": found.p50, "p80": found.p80}


def check_equal(what: str, values: Mapping[str, Any]) -> None:
    """Check that all values are equal. Raises: RecipeError that names each value.

    `values` maps the name of a contestant to its value. `what` names the value in the message.
    """
    if len(set(values.values())) > 1:
        each = ", ".join(f"{name} {value}" for name, value in values.items())
        raise RecipeError(f"Contestants have different {what}: {each}", fix=f"Give all of them the same {what}.")


def random_cache(split: Split, spec: str, folder: Path, options: BuildOptions) -> Path:
    """Build a cache with a teacher of random weights, to measure speed. Return its path."""
    torch.manual_seed(0)
    teacher = Teacher(build_model(spec, len(split.classes)).eval(), f"random {spec}")
    build_cache(split, teacher, folder, options)
    return folder


def student_step(
    cache: Cache,
    spec: str,
    device: torch.device,
    *,
    kl_weight: float = 1.0,
    impl: str = "auto",
    capturable: bool = False,
) -> EagerStep:
    """Return an eager step of `train-student --method kl` with new weights, which are always the same."""
    config = make_config(verb="train-student", model=spec, cache=str(cache.path), method="kl")
    torch.manual_seed(0)
    model = build_model(spec, cache.num_classes).to(device).train().to(memory_format=torch.channels_last)
    loss = DistillLoss(cache, kl_weight=kl_weight, impl=impl, align_corners=model.align_corners)
    optimizer = make_optimizer(model, config.optimizer, capturable=capturable)
    return EagerStep(model, Criterion([loss]).to(device), optimizer, device=device, bf16=device.type == "cuda")


def synchronise(device: torch.device) -> None:
    """Wait until a CUDA device is idle. Do nothing on other devices."""
    if device.type == "cuda":
        torch.cuda.synchronize()
