"""What a build will write, known before its first shard: sizes from one forward pass, the rest from a few records."""

import datetime
import sys
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

import torch

from kdcache.data import Split
from kdcache.errors import ModelError, RecipeError
from kdcache.models import PROBABILITIES, returns_probabilities
from kdcache.store import Fidelity, Manifest
from kdcache.store.format.manifest import well_formed_parts
from kdcache.store.format.manifest_models import Build, Dataset, Feature, Head
from kdcache.teacher.build.fidelity import measure_fidelity
from kdcache.teacher.build.options import BuildOptions, view_of
from kdcache.teacher.build.probe import Asking
from kdcache.teacher.build.statistics import statistics_of
from kdcache.teacher.load.fingerprint import fingerprint
from kdcache.teacher.load.load import Teacher
from kdcache_kernels import choose_k

SAMPLE_RECORDS = 16  # of the real teacher, on which `--top-k auto` and the fidelity are measured


@well_formed_parts()
def plan_manifest(split: Split, teacher: Teacher, options: BuildOptions) -> Manifest:
    """The manifest of the store that a build would write.

    The teacher must be on the options' device already.
    Raises: RecipeError for a k or a size that cannot be; ModelError for unknown taps; StoreError for a split or a tap
        whose name is none of a folder.
    """
    view = view_of(options)
    _check_logits(teacher)
    asking = Asking(split, teacher, view, options)
    output = asking.probe()
    classes, height, width = output.logits.shape[1:]
    k, fidelity = _kept_and_fidelity(asking, options, classes)
    head = Head(
        classes=classes,
        k=k,
        size=(height, width),
        align_corners=teacher.model.align_corners,
        raw=options.raw_logits,
        resampled=asking.grid is not None,
    )
    features = {tap: _feature(said) for tap, said in output.features.items()}
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
        view=view,
        heads={"segmentation": head},
        features={tap: features[tap] for tap in options.features},
        statistics=statistics_of(options.statistics, head.size, output.features),
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


def _check_logits(teacher: Teacher) -> None:
    """Refuse probabilities: the softmax of them is nearly flat, whatever the teacher sees."""
    if returns_probabilities(teacher.model):
        raise ModelError(
            "a teacher gives logits, of which a store keeps what their softmax needs",
            received=f"{teacher.origin} {PROBABILITIES}",
            remedy="return what comes before the softmax, or its logarithm (torch.log(p.clamp(min=1e-12)))",
        )


def _kept_and_fidelity(asking: Asking, options: BuildOptions, classes: int) -> tuple[int, Fidelity | None]:
    """Classes to keep, and what is lost by keeping only them. The sample goes through the teacher once for both."""
    if options.top_k is not None and not 1 <= options.top_k <= classes:
        raise RecipeError(
            f"--top-k is auto or from 1 to the number of classes, {classes}",
            received=str(options.top_k),
            remedy="use --top-k auto, which measures how many classes it takes",
        )
    there = len(asking.split)
    samples = torch.linspace(0, there - 1, min(SAMPLE_RECORDS, there), dtype=torch.float64).round().int().tolist()
    align_corners, size = asking.teacher.model.align_corners, options.crop or options.size
    sample: Iterable[torch.Tensor] = asking.logits(samples)
    k = options.top_k or classes
    if options.top_k is None and classes > 32:
        sample = [logits.cpu() for logits in sample]
        k = choose_k(torch.stack(sample), size, classes, align_corners=align_corners)[0]
    if not options.fidelity:
        return k, None
    on_device = (logits.to(options.device) for logits in sample)
    return k, measure_fidelity(on_device, k, options.codec, size, align_corners=align_corners)


def _feature(said_Bchw: torch.Tensor) -> Feature:
    return Feature(channels=said_Bchw.shape[1], size=(said_Bchw.shape[2], said_Bchw.shape[3]))


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
