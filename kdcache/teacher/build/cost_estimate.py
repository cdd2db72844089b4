"""Estimate a build's cost: bytes, files and time of a setting and similar ones, from a few real records.

A small cache of those records is actually built in a temporary folder, and written again for every other k and codec.
Its cost per record is the large one's, because chunks hold one record each. On CamVid at 144x192, 16 of 367 images
predicted the bytes to 0.2 %, with 4 views, a tap and codec small to 0.5 %, and the number of files exactly. Bytes of
token similarities vary more between images, by 10 %: 16 images predicted them to 1.7 %, 32 to 0.1 %.
"""

import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import torch

from kdcache.data import Split
from kdcache.models import build_model
from kdcache.store import Codec, Manifest
from kdcache.store.format.eight_bits import StoredAs
from kdcache.store.format.schema import metadata_keys
from kdcache.teacher.build.manifest import plan_manifest
from kdcache.teacher.build.options import BuildOptions
from kdcache.teacher.build.probe import TeacherProbe
from kdcache.teacher.build.trial_store import Progress, Seconds, Sizes, Trial
from kdcache.teacher.load.forward import place
from kdcache.teacher.load.load import Teacher

RECORDS = 32
_KS = (2, 4, 8, 16, 32, 64)
_CODECS: tuple[Codec, ...] = ("default", "small", "none")
_SEAL = 3  # ledger.jsonl, complete.json and the spare of the manifest


@dataclass(frozen=True)
class Setting:
    """The choices that determine a build's cost.

    Attributes:
        k: number of stored classes, or None without a segmentation head.
        codec: how arrays are compressed: `default`, `small` or `none`.
        views: number of views per sample.
        features: names of the stored taps.
        pixels: `stored` if images and labels are in the cache, otherwise `source`.
        feature_dtype: data type of stored features, `fp16` or `uint8`.
    """

    k: int | None
    codec: Codec
    views: int
    features: tuple[str, ...]
    pixels: Literal["stored", "source"]
    feature_dtype: StoredAs = "fp16"

    def flags(self, other: "Setting") -> str:
        """Return this setting's flags that differ from `other`, as text such as "--top-k 8 --codec small"."""
        mine, others = asdict(self), asdict(other)
        names = {"k": "top-k", "feature_dtype": "feature-dtype"}
        changed = {names.get(name, name): value for name, value in mine.items() if value != others[name]}
        return " ".join(f"--{name} {_typed(value)}" for name, value in changed.items())


@dataclass(frozen=True)
class Cost:
    """The estimated cost of a build.

    Attributes:
        setting: the choices of the build.
        sizes: path of each array -> bytes on disk per record.
        records: number of records.
        files: number of files of the cache.
        seconds: duration of the teacher's pass.
    """

    setting: Setting
    sizes: Sizes
    records: int
    files: int
    seconds: float

    @property
    def bytes_per_record(self) -> float:
        """The size of all arrays on disk, in bytes per record."""
        return sum(self.sizes.values())

    @property
    def bytes(self) -> int:
        """The size of the whole cache on disk, in bytes."""
        return round(self.records * self.bytes_per_record)


@dataclass(frozen=True)
class Estimate:
    """The estimated cost of a build, and of similar builds that differ in one choice.

    Attributes:
        chosen: the cost with the chosen options.
        neighbours: the costs of similar builds.
        seconds: seconds per record with the chosen options, by stage.
        taught: number of records on which the teacher ran for this estimate.
        samples: number of samples in the split.
        classes: number of classes of the segmentation head, or 0.
        error: relative standard error of the estimated bytes per record.
    """

    chosen: Cost
    neighbours: tuple[Cost, ...]
    seconds: Seconds
    taught: int
    samples: int
    classes: int
    error: float = 0.0

    @property
    def payback_epochs(self) -> float:
        """The number of epochs after which the cache, including its build, takes less time than a live teacher.

        It may be infinite. An epoch visits each sample once.
        """
        saved = self.samples * (self.seconds.teach - self.seconds.read)
        return self.chosen.seconds / saved if saved > 0 else float("inf")

    def training_seconds(self, epochs: int, student: float = 0.0) -> tuple[float, float]:
        """Return a training's seconds with a live teacher, and its seconds with the cache, including the build.

        Args:
            epochs: number of epochs.
            student: seconds per image of the student's forward and backward pass.
        """
        images = epochs * self.samples
        return images * (student + self.seconds.teach), self.chosen.seconds + images * (student + self.seconds.read)

    def to_json(self) -> dict[str, Any]:
        """Return the estimate as JSON values. `payback_epochs` is null if the cache never breaks even."""
        payback = self.payback_epochs
        return {
            "taught": self.taught,
            "samples": self.samples,
            "classes": self.classes,
            "bytes_error": self.error,
            "seconds_per_record": asdict(self.seconds),
            "payback_epochs": None if payback == float("inf") else payback,
            "chosen": _cost_json(self.chosen),
            "neighbours": [_cost_json(cost) for cost in self.neighbours],
        }


def student_seconds(spec: str, classes: int, options: BuildOptions) -> float:
    """Measure a student's forward and backward pass, and return the seconds per image.

    Args:
        spec: model spec of the student, such as `kdcache:tiny`.
        classes: number of classes.
        options: the options of the build, which give the view size, the batch size and the device.
    Raises: ModelError for an invalid spec.
    """
    height, width = options.size if options.crop is None else options.crop
    model = build_model(spec, classes).to(options.device).train()
    pixels = torch.zeros(options.batch_size, height, width, 3, dtype=torch.uint8, device=options.device)
    for _ in range(2):  # the first time is slower than all others
        began = time.perf_counter()
        model(model.normalise(pixels)).logits.square().mean().backward()  # type: ignore[no-untyped-call]
        if options.device.type == "cuda":
            torch.cuda.synchronize(options.device)
    return (time.perf_counter() - began) / options.batch_size


def estimate(
    split: Split, teacher: Teacher, options: BuildOptions, *, records: int = RECORDS, progress: Progress | None = None
) -> Estimate:
    """Estimate a build's cost from a small temporary cache of a few samples.

    Args:
        split: the data set of the build.
        teacher: the teacher of the build.
        options: the options of the build.
        records: number of samples in the small cache, at most all.
        progress: called with (description of the step, steps done, total steps).
    Raises: KDCacheError, as `build_cache`.
    """
    options = replace(options, fidelity=False)
    place(teacher.model, options.device)
    probe = TeacherProbe(split, teacher, options)
    manifest = plan_manifest(probe)  # which refuses what cannot be, and chooses k
    with tempfile.TemporaryDirectory(prefix="kdcache-plan-") as folder:
        trial = Trial(probe, records, Path(folder), progress or (lambda *_: None))
        head = manifest.segmentation
        k, classes = (None, 0) if head is None else (head.k, head.classes)
        chosen_setting = Setting(
            k, options.codec, options.views, tuple(options.features), options.pixels, options.feature_dtype
        )
        seconds = trial.seconds(chosen_setting.k, chosen_setting.codec, chosen_setting.feature_dtype)
        similar = [
            setting
            for setting in _neighbours(chosen_setting, classes, trial.taps)
            if manifest.heads or setting.features or manifest.statistics
        ]
        settings = dict.fromkeys([chosen_setting, *similar])
        costs = [_cost(trial, setting, manifest, seconds.build) for setting in settings]
        error = trial.error(costs[0].sizes, chosen_setting.k, chosen_setting.codec, chosen_setting.feature_dtype)
    return Estimate(costs[0], tuple(costs[1:]), seconds, trial.taught, len(split), classes, error)


def _neighbours(setting: Setting, classes: int, taps: Sequence[str]) -> Iterator[Setting]:
    """Yield settings that differ from `setting` in one choice."""
    if setting.k is not None:
        ks = [k for k in (*_KS, classes) if k <= classes]
        smaller, larger = [k for k in ks if k < setting.k], [k for k in ks if k > setting.k]
        for k in dict.fromkeys([*smaller[-2:], *larger[:1], classes]):
            yield replace(setting, k=k)
    for codec in _CODECS:
        yield replace(setting, codec=codec)
    for views in (1, 4, 16) if setting.views == 1 else (1, max(2, setting.views // 2), 2 * setting.views):
        yield replace(setting, views=views)
    if setting.features:
        yield replace(setting, feature_dtype="uint8" if setting.feature_dtype == "fp16" else "fp16")
    yield replace(setting, features=(), feature_dtype="fp16")
    for tap in taps:
        if tap not in setting.features:
            yield replace(setting, features=(*setting.features, tap))
    yield replace(setting, pixels="source" if setting.pixels == "stored" else "stored")


def _cost(trial: Trial, setting: Setting, manifest: Manifest, seconds: float) -> Cost:
    """Return the cost of a setting, given the manifest with the chosen options and the seconds per record."""
    sizes = trial.sizes(setting.k, setting.codec, setting.views, setting.features, setting.feature_dtype)
    if setting.pixels == "source":
        sizes = {path: size for path, size in sizes.items() if not path.startswith(("pixels/", "labels/"))}
    records = manifest.dataset.samples * setting.views
    shards = -(-records // manifest.build.shard_records)
    files = shards * (len(sizes) + 1) + _metadata_files(manifest, sizes) + _SEAL
    return Cost(setting, sizes, records, files, records * seconds)


def _metadata_files(manifest: Manifest, sizes: Sizes) -> int:
    """Return the number of files of a cache other than shards and ledger: sample ids, and every zarr.json."""
    common = [key for key in metadata_keys(manifest) if key.startswith("samples/")]
    nodes = {str(node) for path in sizes for node in (PurePosixPath(path), *PurePosixPath(path).parents)}
    return len(common) + len(nodes)


def _typed(value: object) -> str:
    if isinstance(value, tuple):
        return ",".join(map(str, value)) or "''"
    return str(value)


def _cost_json(cost: Cost) -> dict[str, Any]:
    return {
        **asdict(cost.setting),
        "bytes": cost.bytes,
        "bytes_per_record": round(cost.bytes_per_record),
        "array_bytes_per_record": {path: round(size) for path, size in cost.sizes.items()},
        "records": cost.records,
        "files": cost.files,
        "seconds": cost.seconds,
    }
