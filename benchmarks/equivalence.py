"""Does a student learn the same from the fused loss as from the reference?

Trains the same student, with the settings of benchmarks/camvid.sh, from the same weights with `--impl auto` and
`--impl reference`, then the reference again from weights that are moved by one rounding each, and checks that
the first 20 losses agree within 1e-4, and that the final mIoU of the fused run lies inside the range of the perturbed
reference runs. Exits with 1 when it does not.

    python benchmarks/equivalence.py --cache camvid.zarr --val camvid --json benchmarks/results/equivalence-cpu.json
"""

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from common import check_equal, header, write
from common import run as run_script
from kdcache.bench.timing import check_repeats
from kdcache.models import build_model
from kdcache.run_folder import Run
from kdcache.store import open_cache
from kdcache.training import make_config, train

FIRST = 20
TOLERANCE = 1e-4


def perturbed(model: torch.nn.Module, seed: int) -> dict[str, torch.Tensor]:
    """Return the weights, each moved to one of its two neighbours in float32. Seed 0 returns them unchanged."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, tensor in model.state_dict().items():
        state[name] = tensor.clone()
        if seed and tensor.is_floating_point():
            up = torch.rand(tensor.shape, generator=generator) < 0.5
            state[name] = torch.nextafter(tensor, torch.where(up, torch.inf, -torch.inf))
    return state


def run(arguments: argparse.Namespace, folder: Path, impl: str, seed: int) -> dict[str, Any]:
    """Train once. Return the first losses and the final mIoU in percent."""
    torch.manual_seed(arguments.seed)
    model = build_model(arguments.model, open_cache(arguments.cache).num_classes)
    weights = folder / f"weights-{seed}.safetensors"
    save_file(perturbed(model, seed), weights)
    out = folder / f"{impl}-{seed}"
    config = make_config(
        verb="train-student",
        model=arguments.model,
        cache=arguments.cache,
        val=arguments.val,
        method="kl",
        init=str(weights),
        impl=impl,
        step="eager",
        iterations=arguments.iterations,
        val_every=arguments.iterations,
        log_every=1,
        batch_size=8,
        lr=2e-3,
        warmup=100,
        class_weights="sqrt",
        seed=arguments.seed,
        device=arguments.device,
    )
    train(config, out)
    lines = Run.open(out).metrics or []
    losses = [line["loss"] for line in lines if line["kind"] == "train"][:FIRST]
    miou = [line["miou"] for line in lines if line["kind"] == "validation"][-1]
    print(f"{impl:10s} weights {seed}: losses {losses[0]:.6f} .. {losses[-1]:.6f}, mIoU {100 * miou:.3f}", flush=True)
    return {"impl": impl, "weights": seed, "losses": losses, "miou": 100 * miou}


def main() -> None:
    """Train with the fused loss, the reference and perturbed references, and write how far they differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", required=True)
    parser.add_argument("--val", required=True)
    parser.add_argument("--model", default="kdcache:tiny")
    parser.add_argument("--iterations", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--runs", type=int, default=5, help="perturbed reference runs")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    check_repeats(arguments.runs, "--runs")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        fused = run(arguments, folder, "auto", 0)
        plain = run(arguments, folder, "reference", 0)
        others = [run(arguments, folder, "reference", seed) for seed in range(1, arguments.runs + 1)]
    found = verdict(fused, plain, others)
    apart, (low, high) = found["largest_difference"], found["miou_range"]
    print(f"first {FIRST} losses: at most {apart:.1e} apart (bound {TOLERANCE:.0e})")
    where = "inside" if found["inside"] else "outside"
    print(f"mIoU {fused['miou']:.3f}, perturbed reference runs {low:.3f} to {high:.3f}: {where}")
    if arguments.json:
        write(arguments.json, {**header("equivalence"), **found, "rows": [fused, plain, *others]})
    sys.exit(not is_met(found))


def verdict(fused: dict[str, Any], plain: dict[str, Any], others: list[dict[str, Any]]) -> dict[str, Any]:
    """Return how far the losses of the fused run are from the reference's, and whether its mIoU fits `others`.

    Raises: RecipeError for runs of different lengths.
    """
    check_equal("numbers of losses", {row["impl"]: len(row["losses"]) for row in (fused, plain)})
    apart = float(np.abs(np.subtract(fused["losses"], plain["losses"])).max())  # NaN if any is
    low, high = (pick(row["miou"] for row in others) for pick in (min, max))
    inside = low <= fused["miou"] <= high
    return {"largest_difference": apart, "bound": TOLERANCE, "miou_range": [low, high], "inside": inside}


def is_met(found: dict[str, Any]) -> bool:
    """Return whether the fused run learnt as much as the reference. NaN counts as a difference that is too large."""
    return bool(found["inside"] and found["largest_difference"] <= TOLERANCE)


if __name__ == "__main__":
    run_script(main)
