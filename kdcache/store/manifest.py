"""The manifest: who made a store, from what and how. JSON in the attributes of the store's Zarr group.

Every model here is strict and refuses unknown keys: a manifest is data from elsewhere, and a field that
is misread teaches the wrong thing without a sound.
"""

import json
import math
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from kdcache.errors import CorruptError, VersionError

FORMAT_VERSION = 1
MAX_RECORDS = 2**31  # what a claim of more would ask of memory is an attack or an accident

Count = Annotated[int, Field(ge=0, le=MAX_RECORDS)]
Side = Annotated[int, Field(ge=1, le=65536)]
Size = tuple[Side, Side]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.\-]*$", max_length=200)]


class Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Dataset(Part):
    """The split that was taught on. `ids_digest` stands for the ids; they are in samples/."""

    name: str
    split: str
    samples: Count
    labelled: Count
    ids_digest: str
    class_names: Annotated[tuple[str, ...], Field(min_length=1, max_length=65535)]
    class_colours: tuple[tuple[int, int, int], ...]


class View(Part):
    """How a sample is rendered. `full` is the whole image resized to `size` (H, W)."""

    kind: Literal["full"] = "full"
    size: Size
    views_per_sample: Annotated[int, Field(ge=1, le=4096)] = 1
    pixels: Literal["stored", "source"]


class Head(Part):
    """One output of the teacher: `k` of `classes` logits kept on an (h, w) grid."""

    kind: Literal["categorical"] = "categorical"
    classes: Annotated[int, Field(ge=1, le=65535)]
    k: Annotated[int, Field(ge=1, le=65535)]
    size: Size
    align_corners: bool

    @model_validator(mode="after")
    def _k_within_classes(self) -> "Head":
        if self.k > self.classes:
            raise ValueError(f"k = {self.k} exceeds the {self.classes} classes")
        return self

    @property
    def dense(self) -> bool:
        return self.k == self.classes


class Feature(Part):
    """One tap: (channels, h, w) float16 per record."""

    channels: Annotated[int, Field(ge=1, le=1_000_000)]
    size: Size


class Fingerprint(Part):
    """What identifies a teacher. `probe` (raw logits on two fixed images, pooled) catches changed code."""

    spec: str
    weights: str
    precision: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    class_map: tuple[int, ...] | None = None
    probe: tuple[float, ...]

    def differences(self, other: "Fingerprint") -> list[str]:
        """What differs, in words. The probe may differ by 1 % of its largest value: hardware rounds."""
        found = [
            f"{name}: {_short(getattr(self, name))} against {_short(getattr(other, name))}"
            for name in ("spec", "weights", "precision", "mean", "std", "class_map")
            if getattr(self, name) != getattr(other, name)
        ]
        scale = max((abs(value) for value in self.probe if math.isfinite(value)), default=0.0)
        far = len(self.probe) != len(other.probe) or any(
            repr(a) != repr(b) and not abs(a - b) <= 0.01 * scale + 1e-4  # NaN is no less than anything
            for a, b in zip(self.probe, other.probe, strict=True)
        )
        if far:
            found.append("probe: the same weights give other logits on the two fixed images")
        return found


class Build(Part):
    """Choices that shape the bytes. They may not change when an interrupted build goes on."""

    batch_size: Annotated[int, Field(ge=1)]
    shard_records: Annotated[int, Field(ge=1, le=65536)]
    device: str
    threads: int
    libraries: dict[str, str]


class Manifest(Part):
    """Everything about a store but its ids and arrays."""

    format: Literal["kdcache"] = "kdcache"
    version: int = FORMAT_VERSION
    created: str
    created_by: str
    records: Count
    dataset: Dataset
    view: View
    heads: dict[Name, Head]
    features: dict[Name, Feature] = {}
    teacher: Fingerprint
    build: Build

    @model_validator(mode="after")
    def _has_the_head_that_is_read(self) -> "Manifest":
        if "segmentation" not in self.heads:
            raise ValueError("heads has no 'segmentation'")
        return self

    @model_validator(mode="after")
    def _records_are_views_of_samples(self) -> "Manifest":
        if self.records != self.dataset.samples * self.view.views_per_sample:
            raise ValueError("records is not samples times views_per_sample")
        return self

    @property
    def shards(self) -> int:
        return -(-self.records // self.build.shard_records)

    def shard_range(self, shard: int) -> tuple[int, int]:
        """Records [first, last) of a shard; the last shard may be shorter."""
        first = shard * self.build.shard_records
        return first, min(first + self.build.shard_records, self.records)

    def differences(self, other: "Manifest") -> list[str]:
        """What keeps `other` from continuing this build, in words; time stamps do not count."""
        found = self.teacher.differences(other.teacher)
        for part in ("dataset", "view", "build"):
            found += part_differences(part, getattr(self, part), getattr(other, part))
        for name in ("heads", "features"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                found.append(f"{name}: {_short(_plain(mine))} against {_short(_plain(theirs))}")
        return found


def part_differences(title: str, mine: Part, theirs: Part) -> list[str]:
    """Fields of two equal-typed parts that differ, as 'title.field: a against b'."""
    return [
        f"{title}.{field}: {_short(getattr(mine, field))} against {_short(getattr(theirs, field))}"
        for field in type(mine).model_fields
        if getattr(mine, field) != getattr(theirs, field)
    ]


def parse_manifest(attributes: Any, where: str) -> Manifest:
    """Check the group's attributes and return the manifest.

    Raises: VersionError for a format this version does not read; CorruptError for anything malformed.
    """
    content = attributes.get("kdcache") if isinstance(attributes, dict) else None
    version = content.get("version") if isinstance(content, dict) else None
    if not isinstance(content, dict) or content.get("format") != "kdcache":
        raise CorruptError(
            "a store is a Zarr group whose attributes hold a kdcache manifest",
            received=f"{where} has none",
            remedy="give the folder that build-teacher-cache wrote (its --out)",
        )
    if version != FORMAT_VERSION:
        raise VersionError(
            f"this version of kdcache reads store format {FORMAT_VERSION}",
            received=f"{where} has format {version!r}",
            remedy="use the kdcache that wrote it (`created_by` in its zarr.json), or build it again",
        )
    try:
        # JSON has lists where the models have tuples: validate as JSON, not as Python objects.
        return Manifest.model_validate_json(json.dumps(content))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(step) for step in first["loc"]) or "manifest"
        raise CorruptError(
            "every field of a manifest must be well formed",
            received=f"{where}: {place}: {first['msg']}",
            remedy="restore zarr.json from a copy, or build the store again",
        ) from error


def _plain(parts: dict[str, Part]) -> dict[str, Any]:
    return {name: part.model_dump() for name, part in parts.items()}


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."
