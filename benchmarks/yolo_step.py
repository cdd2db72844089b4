"""What does a training step of yolo26n-sem cost from a cache, in Ultralytics' own loop, and with a live teacher?

Contestants take turns in one run, with the same pixels from the same loader:

    plain   Ultralytics' step: its loss on labels with the auxiliary head, clipping, AdamW, and its moving average
    none    kdcache's step on labels only kl      kdcache's step with targets from the cache live    kdcache's step with
    a forward pass of yolo26s-sem

Weights are random: predictions do not matter to the clock. The package has its own environment: see
clients/ultralytics. The first figure of a step is the clock's, the second the CPU time of this process alone.

    pip install -r clients/ultralytics/requirements.txt
    python benchmarks/yolo_step.py --json benchmarks/results/yolo-step-cpu.json
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from ultralytics.cfg import get_cfg
from ultralytics.nn.tasks import SemanticSegmentationModel
from ultralytics.utils.torch_utils import ModelEMA

from common import header, run, write
from kdcache.bench.timing import check_repeats
from kdcache.distill import SEGMENTATION, Streams
from kdcache.store import Cache, open_cache
from step import Learner, batches, learner, make_store
from turns import Pace, in_turn

DATA, SIZE, BATCH = "scenes:192x256,train=16,val=1", (192, 256), 8
MOST_NORM = 10.0
"""Ultralytics clips gradients at it."""


def plain(cache: Cache, arguments: argparse.Namespace) -> Learner:
    """Return a learner that takes Ultralytics' own steps."""
    source = batches(cache, "none", arguments)
    torch.manual_seed(0)
    network = SemanticSegmentationModel("yolo26n-sem.yaml", nc=cache.num_classes, verbose=False)
    network.args = get_cfg()
    network = network.train().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    average = ModelEMA(network)

    def step(streams: Streams) -> Tensor:
        (batch,) = streams
        assert batch.pixels is not None
        image = batch.pixels.permute(0, 3, 1, 2).float() / 255
        loss, _ = network.loss({"img": image, "semantic_mask": batch.labels[SEGMENTATION].to(torch.int32)})
        loss.sum().backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), max_norm=MOST_NORM)
        optimizer.step()
        optimizer.zero_grad()
        average.update(network)
        return loss.detach()

    size = (arguments.batch_size, *arguments.size, 3)
    return Learner(step, source, size, torch.device(arguments.device))


def result(paces: dict[str, Pace]) -> dict[str, Any]:
    """Return milliseconds per step, and ratios of the median CPU times of this process."""
    cpu = {kind: pace.cpu.p50 for kind, pace in paces.items() if pace.cpu is not None}
    for kind, pace in paces.items():
        print(
            f"{kind}: {pace.time.p50:.0f} ms a step, {cpu[kind]:.0f} ms of CPU, {cpu[kind] / cpu['plain']:.3f} of plain"
        )
    return {
        "ms_per_step": {kind: vars(pace.time) for kind, pace in paces.items()},
        "cpu_ms_per_step": {kind: vars(pace.cpu) for kind, pace in paces.items() if pace.cpu is not None},
        "kl_over_plain": round(cpu["kl"] / cpu["plain"], 3),
        "kl_over_none": round(cpu["kl"] / cpu["none"], 3),
        "live_over_kl": round(cpu["live"] / cpu["kl"], 3),
    }


def main() -> None:
    """Time the steps in turns, print their ratios, and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=2, help="of a turn")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    check_repeats(arguments.repeats)
    torch.set_num_threads(1)
    fixed = {"data": DATA, "size": SIZE, "batch_size": BATCH, "workers": 0, "device": "cpu"}
    models = {"student": "ultralytics:yolo26n-sem", "teacher": "ultralytics:yolo26s-sem"}
    settings = argparse.Namespace(**fixed, **models)
    with tempfile.TemporaryDirectory() as work:
        store = make_store(settings, Path(work, "store.zarr"))
        learners = {kind: learner(open_cache(store), kind, settings) for kind in ("none", "kl", "live")}
        learners["plain"] = plain(open_cache(store), settings)
        paces = in_turn([of.contestant(kind, arguments.steps) for kind, of in learners.items()], arguments.repeats)
    results = result(paces)
    if arguments.json is not None:
        write(arguments.json, {**header("yolo-step"), **fixed, **models, **results})


if __name__ == "__main__":
    run(main)
