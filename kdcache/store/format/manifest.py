"""The manifest: a cache's description, as JSON in the attributes of its Zarr group."""

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Annotated, Any, Final, Literal

from pydantic import Field, ValidationError, model_validator

from kdcache.display import size_text
from kdcache.errors import CorruptError, StoreError, VersionError
from kdcache.store.format import manifest_models as parts
from kdcache.store.format.damage import AGAIN, damaged_metadata
from kdcache.store.format.eight_bits import FeatureFidelity, pairs
from kdcache.store.format.teacher_models import Fingerprint
from kdcache.tasks import SEGMENTATION

FORMAT_VERSION: Final = 3
"""The version of every cache that is built now: its records hold digests of image and labels."""
# A manifest that claims more would exhaust the memory: it is an attack or an accident.
MAX_SHARDS = 2**20
MAX_RECORD_BYTES = 2**28
"""The maximum uncompressed size of a record in one array, in bytes."""

Codec = Literal["default", "small", "none"]
_NAMES = ("name",)
"""Fields of the data set that may differ: a folder may be renamed."""


class Manifest(parts.Part):
    """A cache's description: its teacher, data set, views, heads and arrays, and how it was built.

    Attributes:
        format: always "kdcache".
        version: version of the cache format, 1 to 3.
        created: time of the first build, in ISO 8601.
        created_by: program and version, such as "kdcache 0.1.0".
        records: total number of records.
        dataset: the split that the teacher predicted.
        depth: the depth labels, or None if the cache has neither depth labels nor a head in metres.
        view: how views are rendered.
        heads: head name -> stored output of the teacher.
        features: tap name -> shape and dtype of the stored features.
        statistics: name, such as `at.stage4` -> small map computed from a tap.
        teacher: the identity of the teacher.
        build: settings and environment of the build.
        codec: how arrays are compressed.
        fidelity: the error of the stored logits, or None if it was not measured.
        feature_fidelity: tap name -> the error of storing it in 8 bits. Empty if it was not measured.
        repairs: shards that were computed again with other library versions than `build` lists.
    """

    format: Literal["kdcache"] = "kdcache"
    version: Literal[1, 2, 3] = FORMAT_VERSION
    created: str
    created_by: str
    records: parts.Count
    dataset: parts.Dataset
    depth: parts.DepthLabels | None = None
    view: parts.View
    heads: Annotated[dict[parts.Name, parts.AnyHead], Field(max_length=256)]
    features: dict[parts.Name, parts.Feature] = Field(default_factory=dict, max_length=256)
    statistics: dict[parts.Name, parts.Statistic] = Field(default_factory=dict, max_length=256)
    teacher: Fingerprint
    build: parts.Build
    codec: Codec = "default"
    fidelity: parts.Fidelity | None = None
    feature_fidelity: dict[parts.Name, FeatureFidelity] = Field(default_factory=dict, max_length=256)
    repairs: Annotated[tuple[parts.Repair, ...], Field(max_length=4096)] = ()

    @model_validator(mode="after")
    def _parts_fit_together(self) -> "Manifest":
        if not self.records_contents and self.version != _first_version(self.heads, depth=self.depth is not None):
            depth = "" if self.depth is None else " and depth"
            raise ValueError(f"heads has {', '.join(self.heads) or 'none'}{depth} in version {self.version}")
        if self.depth is not None and self.depth.labelled > self.dataset.samples:
            raise ValueError(f"depth.labelled is {self.depth.labelled} of {self.dataset.samples} samples")
        for name, head in self.heads.items():
            if isinstance(head, parts.Head) != (name == SEGMENTATION):
                raise ValueError(f"heads.{name} is {head.kind}")
        segmentation, names = self.segmentation, len(self.dataset.class_names)
        if segmentation is not None and segmentation.classes != names:
            raise ValueError(f"the head has {segmentation.classes} classes, class_names has {names}")
        if self.records != self.dataset.samples * self.view.views_per_sample:
            raise ValueError("records is not samples times views_per_sample")
        if self.shards > MAX_SHARDS:
            raise ValueError(f"{self.shards} shards are more than {MAX_SHARDS}")
        sizes: dict[str, tuple[int, ...]]
        sizes = {f"heads.{name}": (2, max(head.k, 2), *head.size) for name, head in self.categorical.items()}
        sizes |= {f"heads.{name}": (4, head.channels, *head.size) for name, head in self.regressions.items()}
        sizes |= {f"features.{name}": (2, tap.channels, *tap.size) for name, tap in self.features.items()}
        sizes |= {f"statistics.{name}": _bytes_of(statistic) for name, statistic in self.statistics.items()}
        depth_labels = self.depth is not None and self.depth.labelled
        for name, size in {**sizes, "view": (4 if depth_labels else 3, *self.view.size)}.items():
            if math.prod(size) > MAX_RECORD_BYTES:
                raise ValueError(f"{name}: a record of {math.prod(size)} bytes is larger than {MAX_RECORD_BYTES}")
        for name, statistic in self.statistics.items():
            if statistic.kind == "similarity" and not pairs(statistic.size):
                raise ValueError(f"statistics.{name} compares the cells of a map of one cell")
        for name, tap in self.features.items():
            if tap.dtype == "uint8" and not self.records_contents:
                raise ValueError(f"features.{name} is uint8 in version {self.version}")
        return self

    @property
    def records_contents(self) -> bool:
        """True if the cache holds digests of each record's image and labels, so that changed data can be detected."""
        return self.version >= 3

    @property
    def segmentation(self) -> parts.Head | None:
        """The segmentation head, or None if the cache does not have one."""
        return self.categorical.get(SEGMENTATION)

    @property
    def categorical(self) -> dict[str, parts.Head]:
        """The heads with classes, by head name."""
        return {name: head for name, head in self.heads.items() if isinstance(head, parts.Head)}

    @property
    def regressions(self) -> dict[str, parts.Regression]:
        """The entries of the numeric heads, such as depth: name of the head -> entry."""
        return {name: head for name, head in self.heads.items() if isinstance(head, parts.Regression)}

    @property
    def facts(self) -> dict[str, str]:
        """A short description for display: topic (data, samples, views, heads, features, teacher) -> text."""
        heads = []
        for name, head in self.heads.items():
            kept = f", {head.k} of {head.classes} classes" if isinstance(head, parts.Head) else f" in {head.unit}"
            heads.append(f"{name} {size_text(head.size)}{kept}")
        return {
            "data": f"{self.dataset.name}, split {self.dataset.split}",
            "samples": f"{self.dataset.samples:,}, {self.dataset.labelled:,} labelled",
            "views": f"{self.view.views_per_sample} of {size_text(self.view.size)}, pixels {self.view.pixels}",
            "heads": "; ".join(heads) or "none",
            **({"features": ", ".join(self.features)} if self.features else {}),
            "teacher": self.teacher.spec,
        }

    @property
    def shards(self) -> int:
        """The number of shards of each array."""
        return -(-self.records // self.build.shard_records)

    def shard_range(self, shard: int) -> tuple[int, int]:
        """Return (first, end): the shard holds the records from `first` up to, but not including, `end`."""
        first = shard * self.build.shard_records
        return first, min(first + self.build.shard_records, self.records)

    def record(self, sample: int, view: int = 0) -> int:
        """Return the record number of a view.

        `sample` is the sample's index, and `view` is the view's number within that sample. A sample's views are
        consecutive.
        """
        return sample * self.view.views_per_sample + view

    def shard_records(self, shard: int) -> int:
        """Return the number of records in shard number `shard`. The last shard may have fewer."""
        first, last = self.shard_range(shard)
        return last - first

    def differences(self, other: "Manifest") -> list[str]:
        """Return one text for each difference that prevents a build with the manifest `other` from continuing this one.

        Empty if it can continue. Times, measured errors and repairs are not compared.
        """
        differences = [f"teacher.{text}" for text in self.teacher.differences(other.teacher)]
        if self.depth != other.depth:
            differences.append(f"depth: {self.depth} against {other.depth}")
        for part in ("dataset", "view", "build"):
            differences += parts.part_differences(part, getattr(self, part), getattr(other, part), but=_NAMES)
        for name in ("heads", "features", "statistics", "codec"):
            mine, others = getattr(self, name), getattr(other, name)
            if mine != others:
                differences.append(f"{name}: {parts.unlike(mine, others)}")
        return differences

    @property
    def earlier_statistics(self) -> str:
        """The names of statistics that only earlier kdcache versions computed, comma-separated, or ''."""
        return ", ".join(name for name, statistic in self.statistics.items() if not statistic.tap)

    def settings(self) -> dict[str, Any]:
        """Return the build settings that made this cache: name of the `BuildOptions` field -> value.

        `view_seed`, `view_scale` and `view_flip` are missing if the cache has only whole images.
        """
        drawn, head = self.view.drawn, self.segmentation
        return {
            "size": self.view.image_size or self.view.size,
            "fit": self.view.fit,
            "crop": None if self.view.image_size is None else self.view.size,
            "views": self.view.views_per_sample,
            **({} if drawn is None else {"view_seed": drawn.seed, "view_scale": drawn.scale, "view_flip": drawn.flip}),
            "depth_zoom": "none" if self.depth is None else self.depth.zoom,
            "teacher_size": self.view.teacher_size,
            "teacher_grid": "view" if head is not None and head.resampled else "own",
            "precision": self.teacher.precision,
            "heads": tuple(self.heads),
            "features_only": not self.heads,
            "top_k": None if head is None else head.k,
            "raw_logits": head is not None and head.raw,
            "features": tuple(self.features),
            "feature_dtype": "uint8" if any(tap.dtype == "uint8" for tap in self.features.values()) else "fp16",
            "statistics": tuple(
                f"{statistic.kind}:{statistic.tap}" for statistic in self.statistics.values() if statistic.tap
            ),
            "pixels": self.view.pixels,
            "codec": self.codec,
            "shard_records": self.build.shard_records,
            "batch_size": self.build.batch_size,
        }

    def to_json(self) -> dict[str, Any]:
        """Return the manifest as JSON values, as stored in the Zarr attribute `kdcache`.

        Empty fields that older versions do not know are left out.
        """
        unused: dict[str, Any] = {
            name: True for name in ("repairs", "depth", "feature_fidelity") if not getattr(self, name)
        }
        unused["features"] = {tap: {"dtype"} for tap, feature in self.features.items() if feature.dtype == "float16"}
        unused |= {
            "teacher": {name for name in ("parents", "probe_size", "processor") if not getattr(self.teacher, name)}
        }
        unused |= {"view": {"fit"}} if self.view.fit == "squash" else {}
        return self.model_dump(mode="json", exclude=unused)

    def with_environment(self, of: "Manifest") -> "Manifest":
        """Return this manifest with the library versions and the device of the manifest `of`."""
        same = {"libraries": of.build.libraries, "device": of.build.device}
        return self.model_copy(update={"build": self.build.model_copy(update=same)})


def _bytes_of(statistic: parts.Statistic) -> tuple[int, ...]:
    """Return integers whose product is the bytes of one record of a statistic."""
    return (pairs(statistic.size),) if statistic.kind == "similarity" else (2, *statistic.size)


def _first_version(heads: Mapping[str, parts.Head | parts.Regression], *, depth: bool) -> int:
    """Return the version, 1 or 2, that a cache with these heads had before records had digests."""
    return 1 if set(heads) == {SEGMENTATION} and not depth else 2


def parse_manifest(attributes: Any, where: str) -> Manifest:
    """Return the manifest in the attributes of a cache's Zarr group, after checking it.

    Args:
        attributes: the parsed JSON attributes.
        where: the file's name for error messages.
    Raises: VersionError for a format that this version cannot read; CorruptError if there is no valid manifest.
    """
    content = attributes.get("kdcache") if isinstance(attributes, dict) else None
    version = content.get("version") if isinstance(content, dict) else None
    if not isinstance(content, dict) or content.get("format") != "kdcache":
        raise CorruptError(
            f"Not a cache: {where} has no kdcache manifest",
            fix="Give the folder that build-teacher-cache wrote (its --out).",
        )
    if version not in range(1, FORMAT_VERSION + 1):
        raise VersionError(
            f"{where} has format {version!r}, but this version of kdcache reads cache formats 1 to {FORMAT_VERSION}",
            fix="Use the kdcache that wrote it (`created_by` in its zarr.json). If this version wrote it, the file is "
            f"damaged. {AGAIN}: it fixes the file.",
        )
    try:
        # JSON has lists where the models have tuples: validate as JSON, not as Python objects.
        return Manifest.model_validate_json(json.dumps(content))
    except ValidationError as error:
        raise damaged_metadata(where, f"malformed {_first_fault(error)}") from error


@contextmanager
def well_formed_parts() -> Iterator[None]:
    """Turn a pydantic ValidationError inside the with block into a StoreError that names the invalid manifest field.

    Raises: StoreError.
    """
    try:
        yield
    except ValidationError as error:
        raise StoreError(
            f"Cannot write the manifest: {_first_fault(error)}",
            fix="Give the split's folder or the tap another name, or correct the value.",
        ) from error


def _first_fault(error: ValidationError) -> str:
    first = error.errors()[0]
    steps = [str(step) for step in first["loc"]]
    if steps[:1] == ["heads"] and len(steps) > 2:
        del steps[2]  # the kind, by which pydantic tells the heads apart
    place = ".".join(steps) or "manifest"
    return f"{place}: {first['msg']}" + (
        f", not {parts.short(repr(value))}" if isinstance(value := first["input"], str) else ""
    )
