"""The parts of a manifest: data set, view, heads, features, teacher, build, and what storing lost.

Every model here is strict and fails on unknown keys, because a manifest comes from elsewhere and a misread field would
silently train on wrong targets.
"""

import re
from collections import Counter
from collections.abc import Collection, Iterable
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator

from kdcache.heads import Parameterisation

MAX_RECORDS = 2**31
"""What a claim of more would ask of memory is an attack or an accident."""
MOST_SIDE, MOST_VIEWS = 65536, 4096
LEAST_ZOOM, MOST_ZOOM = 1 / 64, 1024
LEAST_HALF, MOST_HALF = 2**-4, 60000.0
MOST_SHOWN = 8
"""Items of a list or a table that a difference names one by one."""

# What becomes a path is one name of a folder below the store, or below what is exported from it. It is data from
# elsewhere: it leads nowhere else.
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.\-]*$", max_length=200)]
"""The pattern of the name of a head, a tap or a statistic: it is an array's folder."""
FolderName = Annotated[str, Field(pattern=r"^[^./\\\x00-\x1f\x7f-\x9f][^/\\\x00-\x1f\x7f-\x9f]*$", max_length=200)]
"""The pattern of the name of a split: it is a folder of the user's, in any language."""

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Count = Annotated[int, Field(ge=0, le=MAX_RECORDS)]
Channel = Annotated[int, Field(ge=0, le=255)]
Side = Annotated[int, Field(ge=1, le=MOST_SIDE)]
Size = tuple[Side, Side]


class Part(BaseModel):
    """Base of all parts of a manifest: frozen, strict, without unknown keys, NaN or infinity."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Dataset(Part):
    """The split that the teacher predicted. `ids_digest` identifies the ids, which are in samples/."""

    name: str
    split: FolderName
    samples: Count
    labelled: Count
    ids_digest: str
    class_names: Annotated[tuple[str, ...], Field(max_length=65535)]
    class_colours: tuple[tuple[Channel, Channel, Channel], ...]

    @model_validator(mode="after")
    def _every_class_has_a_name_of_its_own(self) -> "Dataset":
        repeated = [name for name, times in Counter(self.class_names).items() if times > 1 or not name.strip()]
        if repeated:
            raise ValueError(f"class_names has {short(repeated[0])!r} {self.class_names.count(repeated[0])} times")
        if len(self.class_colours) != len(self.class_names):
            raise ValueError(f"{len(self.class_colours)} class_colours for {len(self.class_names)} class_names")
        return self


class DepthLabels(Part):
    """The depth of a cache, from its labels or from a head in metres.

    Attributes:
        labelled: number of samples with a depth label.
        zoom: what a drawn view's zoom does to the labels: they are divided by it, or kept. Or no view is zoomed.
    """

    labelled: Count
    zoom: Literal["none", "divide", "keep"]


Zoom = Annotated[float, Field(ge=LEAST_ZOOM, le=MOST_ZOOM)]


class Drawn(Part):
    """How views are drawn. Each depends only on `seed`, the sample's id and the view's number.

    Attributes:
        scale: range of the uniform scale s. A view shows 1/s of the image's height and width. Below 1 it shows the
            whole image amid grey.
        flip: whether half of them are mirrored.
    """

    seed: Annotated[int, Field(ge=0, lt=2**63)]
    scale: tuple[Zoom, Zoom]
    flip: bool

    @model_validator(mode="after")
    def _scale_is_a_range(self) -> "Drawn":
        if self.scale[0] > self.scale[1]:
            raise ValueError(f"scale {self.scale[0]}:{self.scale[1]} is no range")
        return self


class View(Part):
    """How a sample is rendered to `size` (H, W).

    Attributes:
        kind: `full`: view 0 is the whole image resized, the others are drawn. `crop`: all are drawn, each a crop of
            `size` pixels out of the image at s times `image_size`.
        fit: how an image of another shape is fitted into `size` or `image_size`: squashed (the only way in the first
            caches), cropped, or padded with grey.
        teacher_size: (H, W) at which the teacher saw the same windows, if it differs from `size`.
    """

    kind: Literal["full", "crop"] = "full"
    size: Size
    image_size: Size | None = None
    teacher_size: Size | None = None
    views_per_sample: Annotated[int, Field(ge=1, le=MOST_VIEWS)] = 1
    drawn: Drawn | None = None
    pixels: Literal["stored", "source"]
    fit: Literal["squash", "crop", "pad"] = "squash"

    @model_validator(mode="after")
    def _views_after_the_first_are_drawn(self) -> "View":
        if (self.kind == "crop" or self.views_per_sample > 1) != (self.drawn is not None):
            raise ValueError(f"views_per_sample is {self.views_per_sample}, drawn is {short(self.drawn)}")
        if (self.kind == "crop") != (self.image_size is not None):
            raise ValueError(f"kind is {self.kind}, image_size is {self.image_size}")
        return self

    @property
    def share(self) -> tuple[float, float] | None:
        """The part of the image's height and width that a crop shows at scale 1."""
        if self.image_size is None:
            return None
        return self.size[0] / self.image_size[0], self.size[1] / self.image_size[1]

    @property
    def reaches_beyond(self) -> bool:
        """Whether a view may show grey beyond its image, where the teacher's terms do not count."""
        drawn = self.drawn is not None and max(self.share or (1.0, 1.0)) > self.drawn.scale[0]
        return drawn or self.fit == "pad"


class Head(Part):
    """One output of the teacher: `k` of `classes` logits kept on an (h, w) grid.

    Attributes:
        raw: the largest logit of every pixel is also kept. The stored logits are relative to it.
        resampled: the grid is coarser than the teacher's native one, and its probabilities were averaged.
    """

    kind: Literal["categorical"] = "categorical"
    classes: Annotated[int, Field(ge=1, le=65535)]
    k: Annotated[int, Field(ge=1, le=65535)]
    size: Size
    align_corners: bool
    raw: bool = False
    resampled: bool = False

    @model_validator(mode="after")
    def _k_within_classes(self) -> "Head":
        if self.k > self.classes:
            raise ValueError(f"k = {self.k} exceeds the {self.classes} classes")
        return self

    @property
    def dense(self) -> bool:
        """Whether the logits of all classes are kept."""
        return self.k == self.classes


class Regression(Part):
    """One numeric output of the teacher: `channels` values in `unit` on an (h, w) grid.

    Attributes:
        range: the least and the largest value, or None if there are no bounds.
        parameterisation: how the raw output gives the values (`kdcache.heads`). Maps are resized as raw output.
    """

    kind: Literal["regression"]
    channels: Annotated[int, Field(ge=1, le=65535)]
    size: Size
    align_corners: bool
    unit: Annotated[str, Field(min_length=1, max_length=64)]
    range: tuple[float, float] | None
    parameterisation: Parameterisation

    @model_validator(mode="after")
    def _range_is_one(self) -> "Regression":
        if self.range is not None and not self.range[0] < self.range[1]:
            raise ValueError(f"range {self.range[0]:g} to {self.range[1]:g} is none")
        return self

    @property
    def dtype(self) -> str:
        """`float16` if the range is far from float16's limits, 6e-5 and 65504, else `float32`."""
        largest = 0.0 if self.range is None else max(map(abs, self.range))
        return "float16" if LEAST_HALF <= largest <= MOST_HALF else "float32"


def _kind_of(head: Any) -> str:
    return str(head.get("kind", "categorical") if isinstance(head, dict) else getattr(head, "kind", None))


AnyHead = Annotated[
    Annotated[Head, Tag("categorical")] | Annotated[Regression, Tag("regression")], Discriminator(_kind_of)
]
"""A head of either kind; without `kind` it is categorical."""


class Feature(Part):
    """One tap: (channels, h, w) per record, in float16, or in bytes with scales."""

    channels: Annotated[int, Field(ge=1, le=1_000_000)]
    size: Size
    dtype: Literal["float16", "uint8"] = "float16"


class Statistic(Part):
    """A statistic of a tap's features, on its grid (h, w) `size`.

    Attributes:
        kind: `at`: sum of squares over the channels of `tap`, divided by the largest sum, (h, w) float16. `similarity`:
            cosines between its cells, uint8. Other kinds are in caches of earlier versions and are never read.
    """

    kind: Literal["at", "similarity", "confidence", "entropy", "agreement"]
    tap: Name | None = None
    size: Size


class Build(Part):
    """Choices that shape the bytes. They must not change when an interrupted build continues."""

    batch_size: Annotated[int, Field(ge=1)]
    shard_records: Annotated[int, Field(ge=1, le=65536)]
    device: str
    threads: int
    libraries: dict[str, str]


class Repair(Part):
    """Shards that were computed again with other versions than the rest, on pixels with the stored checksums.

    Attributes:
        created: when the repair began. created_by: the program, as in the manifest.
        device, libraries: the fields of `Build`.
    """

    created: str
    created_by: str
    device: str
    libraries: dict[str, str]
    shards: Annotated[tuple[Count, ...], Field(min_length=1)]

    def describe(self) -> str:
        """Describe the versions of the repair in one line."""
        return ", ".join([*(f"{name} {version}" for name, version in self.libraries.items()), f"on {self.device}"])


Nats = Annotated[float, Field(ge=0)]


class Fidelity(Part):
    """What storing loses on a few records: the stored target against the teacher's raw logits, at the view's size.

    Attributes:
        kl_t1, kl_t4: KL(teacher || stored) at T = 1 and 4, mean over the pixels. kl_t1_max: of the worst pixel, T = 1.
        argmax_agreement: share of pixels with the same best class.
    """

    records: Annotated[int, Field(ge=1, le=MAX_RECORDS)]
    kl_t1: Nats
    kl_t1_max: Nats
    kl_t4: Nats
    argmax_agreement: Annotated[float, Field(ge=0, le=1)]

    def describe(self) -> str:
        """Describe the loss in one line."""
        return (
            f"KL {self.kl_t1:.1e} nats at T = 1 (worst pixel {self.kl_t1_max:.1e}), {self.kl_t4:.1e} at T = 4; "
            f"argmax agreement {100 * self.argmax_agreement:.3f} %; on {self.records} records, at the view's size"
        )


_DIGEST = re.compile(r"\b([0-9a-f]{12})[0-9a-f]{20,}\b")


def part_differences(title: str, one: Part, other: Part, but: Collection[str] = ()) -> list[str]:
    """Describe the fields that differ between two parts of one type, as 'title.field: a against b', except `but`."""
    return [
        f"{title}.{field}: {unlike(getattr(one, field), getattr(other, field))}"
        for field in type(one).model_fields
        if field not in but and getattr(one, field) != getattr(other, field)
    ]


def unlike(one: Any, other: Any) -> str:
    """Return two unequal values as text for messages: whole, or only the items of nested values that differ."""
    if isinstance(one, Part) and isinstance(other, Part):
        one, other = one.model_dump(), other.model_dump()
    if isinstance(one, dict) and isinstance(other, dict):
        keys = [*one, *(key for key in other if key not in one)]
        return _items((key, one.get(key, "nothing"), other.get(key, "nothing")) for key in keys)
    if isinstance(one, tuple) and isinstance(other, tuple) and len(one) == len(other) > MOST_SHOWN:
        return _items((f"number {at}", *pair) for at, pair in enumerate(zip(one, other, strict=True)))
    return _DIGEST.sub(r"\1...", f"{one} against {other}")


def _items(items: Iterable[tuple[str, Any, Any]]) -> str:
    different = [f"{name} {unlike(one, other)}" for name, one, other in items if one != other]
    more = f" and {len(different) - MOST_SHOWN} more" if len(different) > MOST_SHOWN else ""
    return ", ".join(different[:MOST_SHOWN]) + more


def short(value: Any) -> str:
    """Return a value as text for messages, in at most 60 characters."""
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."
