"""What a build will write, known before its first shard: sizes from one forward pass, k from a few records."""

import datetime
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Literal

import torch

from kdcache.data import Split, Window, render
from kdcache.errors import ModelError, RecipeError
from kdcache.models import NativeOutput
from kdcache.store import Manifest
from kdcache.store.manifest import Build, Dataset, Feature, Head, View
from kdcache.teacher.fingerprint import fingerprint
from kdcache.teacher.forward import Precision, teach
from kdcache.teacher.source import Teacher
from kdcache_kernels import choose_k

AUTO_RECORDS = 16  # records of the real teacher that `--top-k auto` measures


@dataclass(frozen=True)
class BuildOptions:
    """Choices of a build. `size` is (H, W); `top_k` keeps that many classes, None measures how many it takes."""

    size: tuple[int, int]
    top_k: int | None = None
    features: Sequence[str] = ()
    pixels: Literal["stored", "source"] = "stored"
    batch_size: int = 8
    shard_records: int = 64
    precision: Precision = "float32"
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    render_threads: int = field(default_factory=lambda: min(8, os.cpu_count() or 1))


def plan_manifest(split: Split, teacher: Teacher, options: BuildOptions) -> Manifest:
    """The manifest of the store that a build would write.

    The teacher must be on the options' device already.
    Raises: RecipeError for a k or a size that cannot be; ModelError for unknown taps.
    """
    output = _probe(split, teacher, options)
    classes, height, width = output.logits.shape[1:]
    head = Head(
        classes=classes,
        k=_number_kept(split, teacher, options, classes),
        size=(height, width),
        align_corners=teacher.model.align_corners,
    )
    features = {tap: Feature(channels=f.shape[1], size=(f.shape[2], f.shape[3])) for tap, f in output.features.items()}
    return Manifest(
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        created_by=f"kdcache {_version('kdcache')}",
        records=len(split),
        dataset=Dataset(
            name=Path(split.data).resolve().name,  # not the path: it is nobody else's business, and may change
            split=split.split,
            samples=len(split),
            labelled=sum(split.has_label(index) for index in range(len(split))),
            ids_digest=split.digest(),
            class_names=split.classes.names,
            class_colours=split.classes.colours,
        ),
        view=View(size=options.size, pixels=options.pixels),
        heads={"segmentation": head},
        features=features,
        teacher=fingerprint(teacher, options.precision, options.device),
        build=Build(
            batch_size=options.batch_size,
            shard_records=options.shard_records,
            device=_device_name(options.device),
            threads=torch.get_num_threads(),
            libraries={
                "python": ".".join(map(str, sys.version_info[:3])),
                **{name: _version(name) for name in ("torch", "pillow", "zarr", "numcodecs")},
            },
        ),
    )


def _probe(split: Split, teacher: Teacher, options: BuildOptions) -> NativeOutput:
    """What the teacher gives for the first image: shapes of everything."""
    teacher.model.check_taps(options.features)
    logits, features = _teach_records(split, teacher, options, [0], options.features)
    if logits.shape[1] != len(split.classes):
        raise ModelError(
            "a teacher gives one logit per class of the data set",
            received=f"{teacher.origin} gives {logits.shape[1]}, the data set has {len(split.classes)} classes",
            remedy="give --class-map FILE, or another teacher",
        )
    return NativeOutput(logits, features)


def _number_kept(split: Split, teacher: Teacher, options: BuildOptions, classes: int) -> int:
    if options.top_k is not None:
        if not 1 <= options.top_k <= classes:
            raise RecipeError(
                f"--top-k is auto or from 1 to the number of classes, {classes}",
                received=str(options.top_k),
                remedy="use --top-k auto, which measures how many classes it takes",
            )
        return options.top_k
    if classes <= 32:
        return classes
    spread = torch.linspace(0, len(split) - 1, min(AUTO_RECORDS, len(split))).round().int().tolist()
    logits = [_teach_records(split, teacher, options, [index], ())[0].cpu() for index in spread]
    return choose_k(torch.cat(logits), options.size, classes)[0]


def _teach_records(
    split: Split, teacher: Teacher, options: BuildOptions, records: Sequence[int], taps: Sequence[str]
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    images = [split.image(index) for index in records]
    rendered = [
        torch.from_numpy(render(i, None, Window.full(*i.shape[:2]), flip=False, size=options.size)[0]) for i in images
    ]
    return teach(teacher.model, torch.stack(rendered), taps, options.precision, options.device)


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
