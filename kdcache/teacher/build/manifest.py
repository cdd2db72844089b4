"""Plan a build's manifest before its first shard: sizes from one forward pass, the rest from a few records."""

import datetime
import sys
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

import torch

from kdcache.errors import ModelError, RecipeError
from kdcache.heads import RegressionHead
from kdcache.models import Outputs, not_logits
from kdcache.store import Fidelity, Manifest, evenly_spread
from kdcache.store.format.eight_bits import FeatureFidelity, Loss, check_cells, feature_dtype
from kdcache.store.format.manifest import well_formed_parts
from kdcache.store.format.manifest_models import Build, Dataset, DepthLabels, Feature, Head, Regression
from kdcache.store.subset import SAMPLE_RECORDS
from kdcache.tasks import DEPTH, SEGMENTATION
from kdcache.teacher.build.fidelity import measure_fidelity
from kdcache.teacher.build.probe import TeacherProbe
from kdcache.teacher.build.statistics import statistics_of
from kdcache.teacher.load.fingerprint import fingerprint
from kdcache.teacher.load.load import Teacher
from kdcache_kernels import choose_k


@well_formed_parts()
def plan_manifest(probe: TeacherProbe, *, fidelity: bool = True) -> Manifest:
    """Return the manifest of the cache that a build would write. The teacher runs on a few images for this.

    Args:
        probe: the split, the teacher and the options of the build. The teacher must be on the options' device.
        fidelity: False does not measure the errors that storing the logits causes, even if the options ask for it.
    Raises: RecipeError for an invalid number of classes to keep; ModelError for a teacher that does not return logits
        or does not fit the data set; StoreError for a split or tap whose name cannot be a folder name.
    """
    split, teacher, options = probe.split, probe.teacher, probe.options
    if SEGMENTATION in probe.heads:
        _check_logits(teacher, options.teacher_size or options.size)
    output = probe.probe()
    heads, figures = _heads(probe, output, fidelity=fidelity and options.fidelity)
    features, lost = _features(probe, output)
    return Manifest(
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        created_by=f"kdcache {version_of('kdcache')}",
        records=len(split) * options.views,
        dataset=Dataset(
            name=Path(split.data).resolve().name,  # not the path, which is private and may change
            split=split.split,
            samples=len(split),
            labelled=len(split.labelled(SEGMENTATION)),
            ids_digest=split.digest(),
            class_names=split.classes.names,
            class_colours=split.classes.colours,
        ),
        depth=_depth(probe),
        view=probe.view,
        heads=heads,
        features=features,
        statistics=statistics_of(options.statistics, output.features),
        teacher=fingerprint(teacher, options.precision, options.device),
        build=Build(
            batch_size=options.batch_size,
            shard_records=options.shard_records,
            device=device_name(options.device),
            threads=torch.get_num_threads(),
            libraries=libraries(),
        ),
        codec=options.codec,
        fidelity=figures,
        feature_fidelity=lost if options.fidelity else {},
    )


def _features(probe: TeacherProbe, output: Outputs) -> tuple[dict[str, Feature], dict[str, FeatureFidelity]]:
    """Return the manifest's entry for each tap, and for each tap in 8 bits what is lost.

    `output` is the result of `probe.probe()`.

    Raises: RecipeError if no tap is large enough for 8 bits; ModelError for NaN or infinite features.
    """
    shapes, requested = (
        {tap: output.features[tap].shape[1:] for tap in probe.options.features},
        probe.options.feature_dtype,
    )
    sizes = {tap: (h, w) for tap, (_, h, w) in shapes.items()}
    check_cells(requested, sizes)
    losses = {tap: Loss() for tap, size in sizes.items() if feature_dtype(requested, size) == "uint8"}
    for maps in probe.features(evenly_spread(len(probe.split), SAMPLE_RECORDS), tuple(losses)) if losses else ():
        for tap, loss in losses.items():
            loss.add(maps[tap])
    kept = {tap: loss for tap, loss in losses.items() if not loss.beyond}
    features = {
        tap: Feature(channels=shape[0], size=sizes[tap], dtype="uint8" if tap in kept else "float16")
        for tap, shape in shapes.items()
    }
    return features, {tap: loss.figures() for tap, loss in kept.items()}


def libraries() -> dict[str, str]:
    """Return the versions of Python and of the libraries that affect a record's bytes, by name."""
    python = ".".join(map(str, sys.version_info[:3]))
    return {"python": python, **{name: version_of(name) for name in ("torch", "pillow", "zarr", "numcodecs")}}


def _depth(probe: TeacherProbe) -> DepthLabels | None:
    """Return the manifest's entry for depth, or None if the cache has neither depth labels nor a head in metres."""
    if not probe.metres:
        return None
    drawn = probe.view.drawn
    zoomed = drawn is not None and drawn.scale != (1.0, 1.0)
    labelled = len(probe.split.labelled(DEPTH))
    return DepthLabels(labelled=labelled, zoom=probe.options.depth_zoom if zoomed else "none")


def _heads(
    probe: TeacherProbe, output: Outputs, *, fidelity: bool
) -> tuple[dict[str, Head | Regression], Fidelity | None]:
    """Return the manifest's entry for each head, and what storing segmentation loses.

    `output` is the result of `probe.probe()`.
    """
    model, heads, figures = probe.teacher.model, dict[str, Head | Regression](), None
    for name, value in output.heads.items():
        channels, height, width = value.shape[1:]
        kind = model.head_kinds[name]
        if isinstance(kind, RegressionHead):
            heads[name] = Regression(
                kind="regression",
                channels=channels,
                size=(height, width),
                align_corners=model.align_corners,
                unit=kind.unit,
                range=kind.range,
                parameterisation=kind.parameterisation,
            )
            continue
        k, figures = _top_k_and_fidelity(probe, channels, fidelity=fidelity)
        heads[name] = Head(
            classes=channels,
            k=k,
            size=(height, width),
            align_corners=model.align_corners,
            raw=probe.options.raw_logits,
            resampled=probe.grid is not None,
        )
    return heads, figures


def _check_logits(teacher: Teacher, size: tuple[int, int]) -> None:
    """Raise ModelError for outputs that are not logits: their softmax would be nearly flat."""
    finding = not_logits(teacher.model, size)
    if finding is not None and finding.certain:
        raise ModelError(f"The outputs of {teacher.origin} are not logits: the teacher {finding.text}", fix=finding.fix)


def _top_k_and_fidelity(probe: TeacherProbe, classes: int, *, fidelity: bool) -> tuple[int, Fidelity | None]:
    """Return the number of classes to keep, and what storing only them loses."""
    options = probe.options
    if options.top_k is not None and not 1 <= options.top_k <= classes:
        raise RecipeError(
            f"Invalid value of --top-k: {options.top_k}, with {classes} classes",
            fix="Use --top-k auto, which measures how many classes it takes, or a number from 1 to the number of "
            "classes.",
        )
    samples = evenly_spread(len(probe.split), SAMPLE_RECORDS)
    align_corners, size = probe.teacher.model.align_corners, options.crop or options.size
    sample: Iterable[torch.Tensor] = probe.logits(samples)
    k = options.top_k or classes
    if options.top_k is None and classes > 32:
        sample = [logits.cpu() for logits in sample]
        k = choose_k(torch.stack(sample), size, classes, align_corners=align_corners)[0]
    if not fidelity:
        return k, None
    on_device = (logits.to(options.device) for logits in sample)
    return k, measure_fidelity(on_device, k, options.codec, size, align_corners=align_corners)


def device_name(device: torch.device) -> str:
    """Return the model name of a GPU, or `cpu`."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def version_of(package: str) -> str:
    """Return the installed version of a package, or "not installed"."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
