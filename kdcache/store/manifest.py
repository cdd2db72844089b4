"""The manifest: who made a store, from what and how. JSON in the attributes of the store's Zarr group."""

import json
import math
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from kdcache.errors import CorruptError, VersionError
from kdcache.store.parts import (
    Build,
    Count,
    Dataset,
    Feature,
    Fidelity,
    Fingerprint,
    Head,
    Part,
    Statistic,
    View,
    part_differences,
    short,
)

FORMAT_VERSION = 1
# What a claim of more would ask of memory is an attack or an accident.
MAX_SHARDS = 2**20
MAX_RECORD_BYTES = 2**28
"""Of a record in one array, decoded."""

Codec = Literal["default", "small", "none"]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.\-]*$", max_length=200)]


class Manifest(Part):
    """Everything about a store but its ids and arrays. Without `fidelity` nothing was measured."""

    format: Literal["kdcache"] = "kdcache"
    version: int = FORMAT_VERSION
    created: str
    created_by: str
    records: Count
    dataset: Dataset
    view: View
    heads: Annotated[dict[Name, Head], Field(max_length=256)]
    features: dict[Name, Feature] = Field(default_factory=dict, max_length=256)
    statistics: dict[Name, Statistic] = Field(default_factory=dict, max_length=256)
    teacher: Fingerprint
    build: Build
    codec: Codec = "default"
    fidelity: Fidelity | None = None

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

    @model_validator(mode="after")
    def _sizes_are_possible(self) -> "Manifest":
        if self.shards > MAX_SHARDS:
            raise ValueError(f"{self.shards} shards are more than {MAX_SHARDS}")
        parts: dict[str, tuple[int, ...]]
        parts = {f"heads.{name}": (2, max(head.k, 2), *head.size) for name, head in self.heads.items()}
        parts |= {f"features.{name}": (2, tap.channels, *tap.size) for name, tap in self.features.items()}
        parts |= {f"statistics.{name}": (2, *about.size) for name, about in self.statistics.items()}
        for name, sizes in {**parts, "view": (3, *self.view.size)}.items():
            if math.prod(sizes) > MAX_RECORD_BYTES:
                raise ValueError(f"{name}: a record of {math.prod(sizes)} bytes is larger than {MAX_RECORD_BYTES}")
        return self

    @property
    def shards(self) -> int:
        return -(-self.records // self.build.shard_records)

    def shard_range(self, shard: int) -> tuple[int, int]:
        """Records [first, last) of a shard; the last shard may be shorter."""
        first = shard * self.build.shard_records
        return first, min(first + self.build.shard_records, self.records)

    def record(self, sample: int, view: int = 0) -> int:
        """The record of a view: all views of a sample follow each other."""
        return sample * self.view.views_per_sample + view

    def shard_records(self, shard: int) -> int:
        """How many records a shard holds."""
        first, last = self.shard_range(shard)
        return last - first

    def differences(self, other: "Manifest") -> list[str]:
        """What keeps `other` from continuing this build, in words; time stamps and `fidelity` do not count."""
        found = self.teacher.differences(other.teacher)
        for part in ("dataset", "view", "build"):
            found += part_differences(part, getattr(self, part), getattr(other, part))
        for name in ("heads", "features", "statistics"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                found.append(f"{name}: {short(_plain(mine))} against {short(_plain(theirs))}")
        if self.codec != other.codec:
            found.append(f"codec: {self.codec} against {other.codec}")
        return found


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
