"""Bytes and seconds of a ViT-S's features: as float16, as bytes, and as similarities between tokens.

Plans and builds three caches of the images of some splits, by a ViT-S/16 of timm with random weights. Pixels stay
outside.

    python benchmarks/feature_bytes.py --data camvid --json benchmarks/results/feature-bytes-cpu.json
"""

import argparse
import json
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import timm
import torch
from torch import Tensor, nn

from common import header, run, write
from kdcache.data import Split, open_split
from kdcache.data.concat import join
from kdcache.data.folds import excerpt
from kdcache.store import StoreSummary, evenly_spread, open_cache, summarise
from kdcache.teacher import BuildOptions, Teacher, build_cache, load_teacher
from kdcache.teacher.build.cost_estimate import Estimate, estimate

TAP, SIZE = "last", (224, 224)
JOBS: dict[str, dict[str, Any]] = {
    "fp16": {"features": (TAP,)},
    "uint8": {"features": (TAP,), "feature_dtype": "uint8"},
    "similarity": {"statistics": (f"similarity:{TAP}",)},
}


class Tokens(nn.Module):
    """A ViT-S/16 with random weights that returns its tokens and its class token."""

    kdcache_heads: ClassVar[dict[str, Any]] = {}

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.vit = timm.create_model("vit_small_patch16_224", pretrained=False, num_classes=0)

    def forward(self, image: Tensor) -> SimpleNamespace:
        """Return the ViT's tokens and its pooled output under the names that transformers gives them."""
        tokens = self.vit.forward_features(image)
        return SimpleNamespace(last_hidden_state=tokens, pooler_output=self.vit.forward_head(tokens))


def network(num_classes: int = 0) -> nn.Module:
    """Return the teacher for `--teacher feature_bytes:network@FILE`."""
    return Tokens()


def job(split: Split, teacher: Teacher, options: BuildOptions, out: Path) -> dict[str, Any]:
    """Compare the bytes that `kdcache plan` predicts for a cache with the bytes that a build writes."""
    plan = estimate(split, teacher, options)
    result = build_cache(split, teacher, out, options)
    return compare(plan, result.seconds, summarise(open_cache(out)))


def compare(plan: Estimate, seconds: float, summary: StoreSummary) -> dict[str, Any]:
    """Return planned and written bytes and seconds, and their ratio."""
    planned = plan.chosen
    lost = {tap: figures.model_dump() for tap, figures in summary.manifest.feature_fidelity.items()}
    return {
        "planned_bytes": planned.bytes,
        "bytes": summary.bytes_on_disk,
        "planned_records": plan.taught,
        "planned_standard_error": round(plan.error, 4),
        "planned_over_built": round(planned.bytes / summary.bytes_on_disk, 4),
        "bytes_per_record": round(summary.bytes_per_record),
        "planned_seconds": round(planned.seconds, 1),
        "seconds": round(seconds, 1),
        "arrays": {array.path: array.bytes_on_disk for array in summary.arrays},
        "fidelity": lost,
    }


def main() -> None:
    """Build a store with each form of the features, and write its bytes and seconds as the result file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--split", nargs="+", default=["train", "val"])
    parser.add_argument("--take", type=int, help="so many images, evenly spread (default: all)")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    split = join(arguments.data, [open_split(arguments.data, name) for name in arguments.split])
    samples = len(split)
    if arguments.take is not None:
        split = excerpt(split, evenly_spread(samples, arguments.take))
    teacher = load_teacher(Tokens(), split, classified=False)
    rows = {}
    with tempfile.TemporaryDirectory() as work:
        for name, choices in JOBS.items():
            options = BuildOptions(SIZE, views=1, features_only=True, pixels="source", **choices)
            rows[name] = job(split, teacher, options, Path(work, name))
            print(name, json.dumps(rows[name]), flush=True)
    if arguments.json is not None:
        content = {
            "images": len(split),
            "of": samples,
            "splits": arguments.split,
            "size": list(SIZE),
            "threads": torch.get_num_threads(),
            "jobs": rows,
        }
        write(arguments.json, {**header("feature-bytes"), **content})


if __name__ == "__main__":
    run(main)
