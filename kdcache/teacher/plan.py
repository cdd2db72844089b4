"""What a build will write, known before its first shard: sizes from one forward pass, the rest from a few records."""

import datetime
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Literal

import torch

from kdcache.data import Split, Window, render
from kdcache.errors import ModelError, RecipeError
from kdcache.models import NativeOutput
from kdcache.store import Codec, Fidelity, Manifest
from kdcache.store.manifest import Build, Dataset, Drawn, Feature, Head, View
from kdcache.teacher.fidelity import measure_fidelity
from kdcache.teacher.fingerprint import fingerprint
from kdcache.teacher.forward import Precision, not_finite, out_of_memory, teach
from kdcache.teacher.source import Teacher
from kdcache_kernels import choose_k

SAMPLE_RECORDS = 16  # of the real teacher, on which `--top-k auto` and the fidelity are measured


@dataclass(frozen=True)
class BuildOptions:
    """Choices of a build.

    Attributes:
        size: (H, W). top_k: keeps that many classes, None measures how many it takes.
        views: of each sample: the whole image, and views - 1 that are drawn.
        view_scale: range of the zoom of drawn views, from 1; view_flip: whether half of them are mirrored.
        fidelity: measure what storing loses; the figures go into the manifest, nothing else depends on them.
    """

    size: tuple[int, int]
    top_k: int | None = None
    features: Sequence[str] = ()
    views: int = 1
    view_seed: int = 0
    view_scale: tuple[float, float] = (1.0, 2.0)
    view_flip: bool = True
    pixels: Literal["stored", "source"] = "stored"
    codec: Codec = "default"
    fidelity: bool = True
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
    k, fidelity = _kept_and_fidelity(split, teacher, options, classes)
    head = Head(
        classes=classes,
        k=k,
        size=(height, width),
        align_corners=teacher.model.align_corners,
    )
    features = {tap: Feature(channels=f.shape[1], size=(f.shape[2], f.shape[3])) for tap, f in output.features.items()}
    return Manifest(
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        created_by=f"kdcache {_version('kdcache')}",
        records=len(split) * options.views,
        dataset=Dataset(
            name=Path(split.data).resolve().name,  # not the path: it is nobody else's business, and may change
            split=split.split,
            samples=len(split),
            labelled=sum(split.has_label(index) for index in range(len(split))),
            ids_digest=split.digest(),
            class_names=split.classes.names,
            class_colours=split.classes.colours,
        ),
        view=_view(options),
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
        codec=options.codec,
        fidelity=fidelity,
    )


def _view(options: BuildOptions) -> View:
    low, high = options.view_scale
    if options.views < 1 or options.view_seed < 0 or not 1 <= low <= high <= 1024:
        raise RecipeError(
            "a sample has at least one view, and those that are drawn show a part of it: 1 <= LOW <= HIGH",
            received=f"{options.views} views, scale {low:g}:{high:g}, seed {options.view_seed}",
            remedy="for instance --views 4 --view-scale 1:2",
        )
    drawn = Drawn(seed=options.view_seed, scale=(low, high), flip=options.view_flip) if options.views > 1 else None
    return View(size=options.size, views_per_sample=options.views, drawn=drawn, pixels=options.pixels)


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


def _kept_and_fidelity(
    split: Split, teacher: Teacher, options: BuildOptions, classes: int
) -> tuple[int, Fidelity | None]:
    """Classes to keep, and what is lost by keeping only them. The sample goes through the teacher once for both."""
    if options.top_k is not None and not 1 <= options.top_k <= classes:
        raise RecipeError(
            f"--top-k is auto or from 1 to the number of classes, {classes}",
            received=str(options.top_k),
            remedy="use --top-k auto, which measures how many classes it takes",
        )
    align_corners = teacher.model.align_corners
    sample: Iterable[torch.Tensor] = _sampled_logits(split, teacher, options)
    k = options.top_k or classes
    if options.top_k is None and classes > 32:
        sample = [logits.cpu() for logits in sample]
        k = choose_k(torch.stack(sample), options.size, classes, align_corners=align_corners)[0]
    if not options.fidelity:
        return k, None
    on_device = (logits.to(options.device) for logits in sample)
    return k, measure_fidelity(on_device, k, options.codec, options.size, align_corners=align_corners)


def _sampled_logits(split: Split, teacher: Teacher, options: BuildOptions) -> Iterator[torch.Tensor]:
    """Raw logits (C, h, w) of up to SAMPLE_RECORDS records, evenly spread over the split."""
    records = torch.linspace(0, len(split) - 1, min(SAMPLE_RECORDS, len(split)), dtype=torch.float64)
    for batch in torch.split(records.round().int(), options.batch_size):
        logits, _ = _teach_records(split, teacher, options, batch.tolist(), ())
        for record, raw in zip(batch.tolist(), logits, strict=True):
            if not raw.amax(0).isfinite().all():
                raise not_finite("the logits", record, split.ids[record])
            yield raw


def _teach_records(
    split: Split, teacher: Teacher, options: BuildOptions, records: Sequence[int], taps: Sequence[str]
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    images = [split.image(index) for index in records]
    rendered = [
        torch.from_numpy(render(i, None, Window.full(*i.shape[:2]), flip=False, size=options.size)[0]) for i in images
    ]
    try:
        return teach(teacher.model, torch.stack(rendered), taps, options.precision, options.device)
    except torch.OutOfMemoryError as error:
        raise out_of_memory(options.batch_size, error) from error


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
