"""Does LightlyTrain's `distillationv3` get the same gradient from stored features?

LightlyTrain's own training step runs on the same images and student, with four teachers: live; live, rounded to
float16; read from a cache of float16 features; read from a cache of bytes. A fifth reads the features of other images,
as a control. Mixing of inputs is off, since no cache can have the features of mixtures. Teachers have random weights.

LightlyTrain is AGPL and has its own environment: `scripts/test-clients lightly_train` makes it.

    pip install -r clients/lightly_train/requirements.txt
    python benchmarks/lightly_client.py --json benchmarks/results/lightly-client-cpu.json
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import torch
from lightly_train._methods.distillationv3.distillationv3 import (
    DistillationV3,
    DistillationV3AdamWArgs,
    DistillationV3Args,
)
from lightly_train._models.embedding_model import EmbeddingModel
from lightly_train._models.model_wrapper import ForwardFeaturesOutput, ForwardPoolOutput
from lightly_train._models.package_helpers import get_wrapped_model
from PIL import Image
from torch import Tensor, nn
from transformers import Dinov2Config, Dinov2Model

import kdcache
from common import header, write

TEACHERS = {  # channels, blocks, heads, side of the images
    "tiny": (48, 3, 4, 112),
    "vit-s": (384, 12, 6, 224),
}
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PATCH, BATCH, QUEUE = 14, 8, 16
Features = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Normalised images (B, 3, H, W) -> map (B, c, h, w), summary (B, c)."""


class Wrapper(nn.Module):
    """A teacher behind LightlyTrain's interface `ModelWrapper`."""

    def __init__(self, channels: int, features: Features) -> None:
        super().__init__()
        self.channels, self.features = channels, features

    def feature_dim(self) -> int:
        """Return the number of channels, as LightlyTrain asks for it."""
        return self.channels

    def get_model(self) -> nn.Module:
        """Return the network that LightlyTrain would export: this one."""
        return self

    def forward_features(self, x: Tensor) -> ForwardFeaturesOutput:
        """Return the feature map and the pooled vector under LightlyTrain's names."""
        maps_Bchw, summary_Bc = self.features(x)
        return {"features": maps_Bchw, "cls_token": summary_Bc}

    def forward_pool(self, x: ForwardFeaturesOutput) -> ForwardPoolOutput:
        """Return the pooled vector (B, C) as LightlyTrain's pooled features (B, C, 1, 1)."""
        return {"pooled_features": x["cls_token"][..., None, None]}


class Unmixed(DistillationV3):
    """The method without mixing the images of a batch."""

    @staticmethod
    def _mixup_data(x: Tensor) -> Tensor:
        return x


def method(channels: int, features: Features) -> DistillationV3:
    """Return LightlyTrain's method with a ResNet-18 as the student, the same weights each time."""
    torch.manual_seed(1)
    student = get_wrapped_model("torchvision/resnet18", num_input_channels=3, load_weights=False)
    return Unmixed(
        method_args=DistillationV3Args(teacher=Wrapper(channels, features), queue_size=QUEUE),
        optimizer_args=DistillationV3AdamWArgs(),
        embedding_model=EmbeddingModel(student),
        global_batch_size=BATCH,
        num_input_channels=3,
    ).train()


def normalised(batch: kdcache.Batch) -> Tensor:
    """Return a batch's pixels as the networks' input: float32 (B, 3, H, W) by ImageNet's mean and deviation."""
    pixels_B3HW = cast(Tensor, batch.pixels).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    return (pixels_B3HW - mean) / std


def stored(batch: kdcache.Batch) -> tuple[Tensor, Tensor]:
    """Return the feature map and the pooled vector of a cached batch as float tensors."""
    return batch.numbers["features/last"].float(), batch.numbers["features/summary"].float().flatten(1)


def gradients(batches: list[kdcache.Batch], channels: int, features: Features) -> Iterator[tuple[Tensor, float]]:
    """Yield the student's gradient and the loss for each batch. The method's queue fills from batch to batch."""
    learner = method(channels, features)
    for number, batch in enumerate(batches):
        learner.zero_grad()
        loss = learner.training_step_impl({"views": [normalised(batch)], "filename": []}, number).loss
        loss.backward()
        found = [p.grad.flatten() for p in learner.parameters() if p.grad is not None]
        yield torch.cat(found).double(), loss.item()


def error(measured: list[tuple[Tensor, float]], exact: list[tuple[Tensor, float]]) -> dict[str, float]:
    """Return the largest relative error of gradients and of losses over all batches, compared with the exact ones."""
    pairs = list(zip(measured, exact, strict=True))
    return {
        "gradient": float(f"{max(float((a - b).norm() / b.norm()) for (a, _), (b, _) in pairs):.3g}"),
        "loss": float(f"{max(abs(a / b - 1) for (_, a), (_, b) in pairs):.3g}"),
    }


def measure(name: str, images: int, work: Path) -> dict[str, Any]:
    """Build two caches of a teacher with the command line, and compare the gradients."""
    channels, blocks, heads, side = TEACHERS[name]
    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=channels,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        image_size=side,
        patch_size=PATCH,
        initializer_range=0.1,  # tokens that differ
    )
    teacher = Dinov2Model(config).eval()
    teacher.save_pretrained(work / "teacher")
    scenes = kdcache.open_split(f"scenes:{side}x{side},train={images},val=1", "train")
    (work / "images").mkdir(parents=True)
    for number in range(images):
        Image.fromarray(scenes.image(number)).save(work / "images" / f"{number:03d}.png")
    batches = {dtype: build(work, dtype, side) for dtype in ("fp16", "uint8")}

    @torch.no_grad()
    def live(x: Tensor) -> tuple[Tensor, Tensor]:
        answer = teacher(x)
        tokens_Bnc = answer.last_hidden_state[:, 1:]
        return tokens_Bnc.mT.unflatten(2, (side // PATCH, -1)), answer.pooler_output

    def rounded(x: Tensor) -> tuple[Tensor, Tensor]:
        maps_Bchw, summary_Bc = live(x)
        return maps_Bchw.half().float(), summary_Bc.half().float()

    def read(dtype: str, first: int = 0) -> Features:
        order = iter([*batches[dtype][first:], *batches[dtype][:first]])
        return lambda _: stored(next(order))

    teachers = {"rounded": rounded, "fp16": read("fp16"), "uint8": read("uint8"), "other images": read("fp16", first=1)}
    inputs = batches["fp16"]
    exact = list(gradients(inputs, channels, live))
    found = {kind: list(gradients(inputs, channels, features)) for kind, features in teachers.items()}
    return {
        "images": images,
        "channels": channels,
        "tokens": (side // PATCH) ** 2,
        "losses": [round(loss, 5) for _, loss in exact],
        "error_of_live": {kind: error(gradient, exact) for kind, gradient in found.items()},
        "error_of_rounded": {"fp16": error(found["fp16"], found["rounded"])},
    }


def build(work: Path, dtype: str, side: int) -> list[kdcache.Batch]:
    """Build a cache of a teacher's features, and return its batches in order."""
    out = work / f"{dtype}.zarr"
    command = [sys.executable, "-m", "kdcache_cli", "build-teacher-cache", "--data", f"images:{work / 'images'}"]
    command += ["--teacher", f"hf:{work / 'teacher'}", "--features-only", "--features", "last,summary"]
    command += ["--feature-dtype", dtype, "--size", f"{side}x{side}", "--views", "1", "--out", str(out)]
    subprocess.run(command, check=True)
    taps = ["features/last", "features/summary", *(["scales/last"] if dtype == "uint8" else [])]
    data = kdcache.CacheDataset(kdcache.open_cache(out), augment="none", extras=taps)
    return list(torch.utils.data.DataLoader(data, batch_size=BATCH))


def main() -> None:
    """Compare the gradients with each teacher, print them, and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--teachers", nargs="+", default=[*TEACHERS], choices=TEACHERS)
    parser.add_argument("--count", type=int, default=32)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows = {}
    for name in arguments.teachers:
        with tempfile.TemporaryDirectory() as work:
            rows[name] = measure(name, arguments.count, Path(work))
        print(name, json.dumps(rows[name]), flush=True)
    if arguments.json is not None:
        packages = {name: version(name) for name in ("lightly-train", "transformers")}
        write(arguments.json, {**header("lightly-client"), "clients": packages, "teachers": rows})


if __name__ == "__main__":
    main()
