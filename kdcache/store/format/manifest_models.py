"""The parts of a manifest: data set, view, heads, features, teacher, build, and the loss of storing.

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
"""The maximum number of records. A manifest that claims more is an attack or an accident."""
MOST_SIDE, MOST_VIEWS = 65536, 4096
LEAST_ZOOM, MOST_ZOOM = 1 / 64, 1024
LEAST_HALF, MOST_HALF = 2**-4, 60000.0
MOST_SHOWN = 8
"""The maximum number of differing items that a message names."""

# Names become folders of a cache or of an export. They come from elsewhere, so they must not lead out of it.
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.\-]*$", max_length=200)]
"""The pattern of the name of a head, a tap or a statistic: it is an array's folder."""
FolderName = Annotated[str, Field(pattern=r"^[^./\\\x00-\x1f\x7f-\x9f][^/\\\x00-\x1f\x7f-\x9f]*$", max_length=200)]
"""The pattern of the name of a split: it is a folder of the user, in any language."""

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Count = Annotated[int, Field(ge=0, le=MAX_RECORDS)]
Channel = Annotated[int, Field(ge=0, le=255)]
Side = Annotated[int, Field(ge=1, le=MOST_SIDE)]
Size = tuple[Side, Side]


class Part(BaseModel):
    """Base class of the manifest's parts: immutable, strictly typed, without unknown keys, NaN or infinity."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Dataset(Part):
    """The split that the teacher predicted.

    Attributes:
        name: name of the data folder, without the folders above it.
        split: name of the split, such as `train`.
        samples: number of samples.
        labelled: number of samples with a segmentation label.
        ids_digest: digest of the sample ids and class names.
        class_names: names of the classes, in order.
        class_colours: RGB of each class, 0 to 255.
    """

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
    """The depth labels of a cache.

    Attributes:
        labelled: number of samples with a depth label.
        zoom: what happens to depth in a zoomed view: `divide` divides metres by the zoom, and `keep` leaves them
            unchanged. `none` means that no view is zoomed.
    """

    labelled: Count
    zoom: Literal["none", "divide", "keep"]


Zoom = Annotated[float, Field(ge=LEAST_ZOOM, le=MOST_ZOOM)]


class Drawn(Part):
    """The settings for drawing random crops. Each crop depends only on `seed`, the sample's id and the view's number.

    Attributes:
        seed: the random seed.
        scale: range of the zoom s, drawn uniformly. At zoom 1, a crop shows the whole image, or the part of it that
            `View.share` gives. At zoom s, it shows 1/s of that height and width. Grey surrounds the image if a crop
            reaches beyond it.
        flip: True if half of the crops are mirrored left to right.
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
    """The settings for rendering views from a sample's image.

    Attributes:
        kind: `full`: view 0 is the whole image, and further views are drawn crops. `crop`: all views are drawn crops.
        size: (H, W) of the views in pixels.
        image_size: (H, W) to which the whole image is resized at zoom 1 before crops are cut. None for `full`.
        teacher_size: (H, W) of the same views as rendered for the teacher, or None if it is `size`.
        views_per_sample: number of views per sample.
        drawn: how crops are drawn, or None if there are none.
        pixels: `stored` if images and labels are in the cache, `source` if they stay in the data set.
        fit: how images of another shape are fitted: squashed, cropped, or padded with grey.
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
        """The fractions (height, width) of the image that a crop shows at zoom 1, or None if `kind` is `full`."""
        if self.image_size is None:
            return None
        return self.size[0] / self.image_size[0], self.size[1] / self.image_size[1]

    @property
    def reaches_beyond(self) -> bool:
        """True if views may show grey outside their image. Teacher terms do not count these pixels."""
        drawn = self.drawn is not None and max(self.share or (1.0, 1.0)) > self.drawn.scale[0]
        return drawn or self.fit == "pad"


class Head(Part):
    """A stored segmentation output of the teacher: the `k` largest of `classes` logits, on a grid (h, w).

    Attributes:
        kind: always `categorical`. It tells this entry from a numeric one.
        size: the grid (h, w).
        align_corners: whether the teacher's resize from this grid to the image aligns corners.
        raw: True if each pixel's largest logit is also stored. The other logits are stored relative to it.
        resampled: True if probabilities were averaged onto this grid, which is coarser than the teacher's own.
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
        """True if the logits of all classes are stored."""
        return self.k == self.classes


class Regression(Part):
    """A stored numeric output of the teacher, such as depth: `channels` values on a grid (h, w).

    Attributes:
        kind: always `regression`. It tells this entry from a segmentation output.
        size: the grid (h, w).
        align_corners: whether the teacher's resize from this grid to the image aligns corners.
        unit: the values' unit, `m` for metres.
        range: (smallest, largest) possible value, or None if the values have no bounds.
        parameterisation: the function from the network's raw output to the values: `softplus`, `exp` or `identity`.
            Maps are resized before this function is applied.
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
        """The dtype of the stored values: `float16` or `float32`.

        It is `float16` if the largest magnitude in `range` is between 1/16 and 60,000.
        """
        largest = 0.0 if self.range is None else max(map(abs, self.range))
        return "float16" if LEAST_HALF <= largest <= MOST_HALF else "float32"


def _kind_of(head: Any) -> str:
    return str(head.get("kind", "categorical") if isinstance(head, dict) else getattr(head, "kind", None))


AnyHead = Annotated[
    Annotated[Head, Tag("categorical")] | Annotated[Regression, Tag("regression")], Discriminator(_kind_of)
]
"""A head of either kind. Without `kind` it is categorical."""


class Feature(Part):
    """The stored features of one tap: (channels, h, w) per record.

    Attributes:
        size: the grid (h, w).
        dtype: `float16`, or `uint8` with a scale for each record and channel.
    """

    channels: Annotated[int, Field(ge=1, le=1_000_000)]
    size: Size
    dtype: Literal["float16", "uint8"] = "float16"


class Statistic(Part):
    """A small map computed from a tap's features, stored for each record.

    Attributes:
        kind: `at` is attention: at each cell, the sum of squares over the channels, divided by the map's largest sum.
            It is float16 (h, w). `similarity` has the cosines between the features of all n (n - 1) / 2 pairs of the n
            cells, uint8. The other kinds come from earlier versions and are never read.
        tap: name of the tap. None for kinds of earlier versions.
        size: the tap's grid (h, w).
    """

    kind: Literal["at", "similarity", "confidence", "entropy", "agreement"]
    tap: Name | None = None
    size: Size


class Build(Part):
    """The build settings and the environment that determine a cache's exact bytes.

    They must stay the same when an interrupted build continues.

    Attributes:
        batch_size: number of images per forward pass of the teacher.
        shard_records: number of records in a shard.
        device: name of the GPU, or `cpu`.
        threads: number of torch's CPU threads.
        libraries: library name -> version.
    """

    batch_size: Annotated[int, Field(ge=1)]
    shard_records: Annotated[int, Field(ge=1, le=65536)]
    device: str
    threads: int
    libraries: dict[str, str]


class Repair(Part):
    """Shards that were computed again with other library versions or another device than the rest of the cache.

    Attributes:
        created: start time of the repair, in ISO 8601.
        created_by: program and version of the repair.
        device: the device that ran the teacher, such as `cpu`.
        libraries: library name -> version.
        shards: numbers of these shards.
    """

    created: str
    created_by: str
    device: str
    libraries: dict[str, str]
    shards: Annotated[tuple[Count, ...], Field(min_length=1)]

    def describe(self) -> str:
        """Return the library versions and the device of the repair as one line of text."""
        return ", ".join([*(f"{name} {version}" for name, version in self.libraries.items()), f"on {self.device}"])


Nats = Annotated[float, Field(ge=0)]


class Fidelity(Part):
    """The error of stored logits, measured on a few records.

    The stored logits and the teacher's raw logits are compared after upsampling to the view's size.

    Attributes:
        records: number of measured records.
        kl_t1: mean over pixels of KL(teacher || stored) in nats at temperature 1.
        kl_t1_max: the same KL of the worst pixel.
        kl_t4: mean KL at temperature 4.
        argmax_agreement: share of pixels with the same most likely class, 0 to 1.
    """

    records: Annotated[int, Field(ge=1, le=MAX_RECORDS)]
    kl_t1: Nats
    kl_t1_max: Nats
    kl_t4: Nats
    argmax_agreement: Annotated[float, Field(ge=0, le=1)]

    def describe(self) -> str:
        """Return the measured errors as one line of text."""
        return (
            f"KL {self.kl_t1:.1e} nats at T = 1 (worst pixel {self.kl_t1_max:.1e}), {self.kl_t4:.1e} at T = 4; "
            f"argmax agreement {100 * self.argmax_agreement:.3f} %; on {self.records} records, at the view's size"
        )


_DIGEST = re.compile(r"\b([0-9a-f]{12})[0-9a-f]{20,}\b")


def part_differences(title: str, one: Part, other: Part, but: Collection[str] = ()) -> list[str]:
    """Return a text such as "view.size: (48, 64) against (96, 128)" for each field that differs between two parts.

    Args:
        title: the text before the dot.
        one: a part of a manifest.
        other: a part of the same type.
        but: names of fields that are not compared.
    """
    return [
        f"{title}.{field}: {unlike(getattr(one, field), getattr(other, field))}"
        for field in type(one).model_fields
        if field not in but and getattr(one, field) != getattr(other, field)
    ]


def unlike(one: Any, other: Any) -> str:
    """Return the text "ONE against OTHER" for two unequal values, for messages.

    For dicts, parts of a manifest and long tuples, the text has only the items that differ.
    """
    if isinstance(one, Part) and isinstance(other, Part):
        one, other = one.model_dump(), other.model_dump()
    if isinstance(one, dict) and isinstance(other, dict):
        keys = [*one, *(key for key in other if key not in one)]
        return _items((key, one.get(key, "nothing"), other.get(key, "nothing")) for key in keys)
    if isinstance(one, tuple) and isinstance(other, tuple) and len(one) == len(other) > MOST_SHOWN:
        return _items((f"number {at}", *pair) for at, pair in enumerate(zip(one, other, strict=True)))
    return _DIGEST.sub(r"\1...", f"{one} against {other}")


def _items(items: Iterable[tuple[str, Any, Any]]) -> str:
    different = [f"{name} {unlike(left, right)}" for name, left, right in items if left != right]
    more = f" and {len(different) - MOST_SHOWN} more" if len(different) > MOST_SHOWN else ""
    return ", ".join(different[:MOST_SHOWN]) + more


def short(value: Any) -> str:
    """Return `str(value)`, cut to at most 60 characters, for messages."""
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."
