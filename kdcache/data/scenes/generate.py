"""`scenes`: a procedural data set without files, for tests, tutorials and a first run.

Its depth is exact, or a LiDAR's: `LINES` scan lines of `POINTS` points over the whole image, of which `LOST` are
missing, as if a surface returned nothing. Pixels and ids are the same with depth and without.

A sample is a pure function of (seed, split, index): workers, machines and reruns see the same pixels, and a larger
`train` extends a smaller one. Drawing takes a few milliseconds, so each process keeps its samples, up to `CACHE_BYTES`.
"""

from __future__ import annotations

import os
import re
import threading
import zlib
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from kdcache.data.classes import write_classes
from kdcache.data.layouts.own.folder import DEPTHS, IMAGES, LABELS
from kdcache.data.sample import Sample, Source, Split
from kdcache.data.scenes.street import CLASSES, draw_street
from kdcache.data.scenes.styles import STYLES
from kdcache.errors import DataError
from kdcache.tasks import DEPTH, SEGMENTATION

CACHE_BYTES = 512 * 2**20
"""Most memory that one process spends on drawn samples."""

LINES, POINTS, LOST = 32, 64, 0.15
"""Scan lines of sparse depth, points of a line, and the share of points that is missing."""

_UNLABELLED = "unlabelled"
_WORDS = {
    "depth": ("none", "exact", "sparse"),
    "tasks": ("both", "halves", "depth"),
    "style": tuple(STYLES),
}
"""Parts of a spec that are one of some words."""
_LEAST_SIDE, _MOST_SIDE = 16, 8192
_IMAGE, _LABEL, _DEPTH = range(3)
"""Places in the arrays of a drawn sample."""


def is_scenes(data: str) -> bool:
    """Return whether `data` names the built-in procedural data set, not a folder. "scenes" and "scenes:96x128" do."""
    return data == "scenes" or data.startswith("scenes:")


@dataclass(frozen=True)
class ScenesSpec:
    """The options of the procedural data set, as in "scenes:96x128,train=64". All are optional.

    Attributes:
        height: height of the images in pixels.
        width: width of the images in pixels.
        train: number of samples in split "train".
        val: number of samples in split "val".
        seed: another seed gives other images.
        unlabelled: number of samples in split "unlabelled", which has no labels. 0 means that this split does not
            exist.
        depth: "none", "exact", or "sparse" (LiDAR-like depth in train, exact depth in val).
        tasks: labels of train if there is depth. "both" gives each sample both labels. "halves" gives segmentation to
            even samples and depth to odd ones. "depth" gives depth only.
        style: "default", or "game" or "camera". These two are domains with the same classes, but other images.
    """

    height: int = 96
    width: int = 128
    train: int = 64
    val: int = 16
    seed: int = 0
    unlabelled: int = 0
    depth: str = "none"
    tasks: str = "both"
    style: str = "default"

    @classmethod
    def parse(cls, data: str) -> ScenesSpec:
        """Parse the spec of a procedural data set, such as "scenes" or "scenes:96x128,train=64,depth=exact".

        HxW sets height and width, and NAME=VALUE sets another field of this class. All parts are optional.

        Raises: DataError naming the part that is invalid.
        """
        values: dict[str, Any] = {}
        for part in filter(None, data.partition(":")[2].split(",")):
            size = re.fullmatch(r"(\d+)x(\d+)", part.strip())
            number = re.fullmatch(r"(train|val|seed|unlabelled)=(\d+)", part.strip())
            key, _, value = part.strip().partition("=")
            fields: dict[str, Any] = (
                dict(zip(("height", "width"), map(int, size.groups()), strict=True)) if size else {}
            )
            fields |= {number[1]: int(number[2])} if number else {}
            fields |= {key: value} if value in _WORDS.get(key, ()) else {}
            if not fields or values.keys() & fields.keys():
                raise _malformed(data, f"{part!r} {'twice' if fields else 'is no part of it'}")
            values |= fields
        spec = cls(**values)
        if not all(_LEAST_SIDE <= side <= _MOST_SIDE for side in (spec.height, spec.width)):
            raise _malformed(data, f"{spec.height}x{spec.width}, sides are {_LEAST_SIDE} to {_MOST_SIDE}")
        if "tasks" in values and spec.depth == "none":
            raise _malformed(data, f"tasks={spec.tasks} without depth=exact or depth=sparse")
        return spec

    def splits(self) -> list[str]:
        """Return the names of the splits that have samples, sorted."""
        return sorted(name for name in ("train", "val", _UNLABELLED) if self.samples(name))

    def samples(self, split: str) -> int:
        """Return the number of samples in a split, or 0 for an unknown split."""
        return {"train": self.train, "val": self.val, _UNLABELLED: self.unlabelled}.get(split, 0)

    def labels(self, split: str, number: int) -> list[tuple[str, int]]:
        """Return the labels that a sample has, as pairs (task, position).

        The position is the label's place in the tuple that `SceneCache.get` returns: 1 for segmentation, 2 for depth.

        Args:
            split: the split's name.
            number: the sample's position in the split, from 0.
        """
        labels = [(SEGMENTATION, _LABEL), (DEPTH, _DEPTH)]
        if split == _UNLABELLED:
            return []
        if self.depth == "none":
            return labels[:1]
        if split != "train" or self.tasks == "both":
            return labels
        return labels[:1] if self.tasks == "halves" and number % 2 == 0 else labels[1:]


@dataclass(frozen=True, slots=True, eq=False)
class SceneArray(Source[Any]):
    """A source of one array of a procedural sample.

    Attributes:
        spec: the options of the data set.
        split: the split's name.
        number: the sample's position in the split, from 0.
        place: 0 for the image, 1 for the segmentation label, 2 for depth.
    """

    spec: ScenesSpec
    split: str
    number: int
    place: int

    def read(self) -> Any:
        """Return a copy of the array: uint8 (H, W, 3) image, uint8 (H, W) label, or float32 (H, W) depth in metres.

        Sparse depth is NaN at most pixels.
        """
        array = SCENES.get(self.spec, self.split, self.number)[self.place].copy()
        if self.place == _DEPTH and self.spec.depth == "sparse" and self.split == "train":
            seed = [self.spec.seed, zlib.crc32(b"lidar"), self.number]
            array[~lidar_points(np.random.default_rng(seed), array.shape)] = np.nan
        return array

    def size(self) -> tuple[int, int]:
        """Return (height, width) in pixels, without drawing the sample."""
        return self.spec.height, self.spec.width


def open_scenes(data: str, split: str) -> Split:
    """Return one split of the procedural data set.

    Args:
        data: the spec, such as "scenes:96x128,train=64".
        split: "train", "val" or "unlabelled".
    Raises: DataError for an invalid spec, or a split without samples.
    """
    spec = ScenesSpec.parse(data)
    if split not in spec.splits():
        raise DataError(
            f"Unknown split {split!r} of {data!r}, which has {', '.join(spec.splits()) or 'none'}",
            fix=f"Name train, val or unlabelled, with samples, as in scenes:{_UNLABELLED}=32",
        )
    # Seed and style are part of the id: another one is other pictures, and the digest must differ.
    style = "" if spec.style == "default" else f"-{spec.style}"
    prefix = f"{spec.height}x{spec.width}-seed{spec.seed}{style}/{split}"
    samples = tuple(
        Sample(
            id=(name := f"{prefix}-{number:06d}"),
            image=SceneArray(spec, split, number, _IMAGE),
            labels={task: SceneArray(spec, split, number, place) for task, place in spec.labels(split, number)},
            origin=f"{data} {split} {name}",
        )
        for number in range(spec.samples(split))
    )
    return Split(data, split, CLASSES, samples)


def lidar_points(rng: np.random.Generator, size: tuple[int, ...]) -> npt.NDArray[np.bool_]:
    """Return which pixels a simulated LiDAR hits, bool (H, W).

    The points lie on evenly spaced rows, at equal distances from a random first column. About 15 % of the points are
    missing, at random.

    Args:
        rng: the only source of randomness.
        size: (H, W) in pixels.
    """
    pitch_y, pitch_x = max(size[0] // LINES, 1), max(size[1] // POINTS, 1)
    points = np.zeros(size, np.bool_)
    for row in range(pitch_y // 2, size[0], pitch_y):
        columns = np.arange(int(rng.integers(pitch_x)), size[1], pitch_x)
        points[row, columns[rng.random(len(columns)) >= LOST]] = True
    return points


def write_scenes(folder: str | os.PathLike[str], data: str = "scenes") -> Path:
    """Write the procedural data set as a folder with images/, labels/ and classes.txt. Return the folder.

    The folder is created if missing. Existing files with the same names are overwritten.

    Args:
        folder: the folder to write.
        data: the spec, such as "scenes:96x128,train=64".

    Raises: DataError for an invalid spec.
    """
    root = Path(folder)
    root.mkdir(parents=True, exist_ok=True)
    write_classes(root, CLASSES)
    for name in ScenesSpec.parse(data).splits():
        split = open_scenes(data, name)
        (root / IMAGES / name).mkdir(parents=True, exist_ok=True)
        for index, sample in enumerate(split.ids):
            stem = sample.rpartition("/")[2]
            Image.fromarray(split.image(index)).save(root / IMAGES / name / f"{stem}.png")
            label = split.label(index)
            if label is not None:
                (root / LABELS / name).mkdir(parents=True, exist_ok=True)
                Image.fromarray(label).save(root / LABELS / name / f"{stem}.png")
            depth = split.label(index, DEPTH)
            if depth is not None:
                (root / DEPTHS / name).mkdir(parents=True, exist_ok=True)
                np.save(root / DEPTHS / name / f"{stem}.npy", depth)
    return root


class SceneCache:
    """A thread-safe cache of drawn samples in memory. It drops the least recently used samples.

    Args:
        limit_bytes: the most memory for samples, in bytes.
    """

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.held_bytes = 0
        self.samples: OrderedDict[tuple[Any, ...], tuple[Any, ...]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, spec: ScenesSpec, split: str, index: int) -> tuple[Any, ...]:
        """Return a sample's arrays from memory. If they are not there, draw and keep them.

        Args:
            spec: the options of the data set.
            split: the split's name.
            index: the sample's position in the split, from 0.

        Returns: (image, label), or (image, label, depth) if the spec has depth. The image is uint8 (H, W, 3) RGB. The
            label is uint8 (H, W) class ids, 255 for void. Depth is float32 (H, W) metres, NaN in the sky.
        """
        depth = spec.depth != "none"
        key = (spec.height, spec.width, spec.seed, spec.style, depth, split, index)
        with self._lock:
            if key in self.samples:
                self.samples.move_to_end(key)
                return self.samples[key]
        # Drawn outside the lock; two threads may draw the same sample once each, to the same result.
        # A style has streets of its own, or two domains would show the same ones.
        name = split if spec.style == "default" else f"{split}-{spec.style}"
        rng = np.random.default_rng([spec.seed, zlib.crc32(name.encode()), index])
        sample = draw_street(rng, spec.height, spec.width, STYLES[spec.style])[: 3 if depth else 2]
        with self._lock:
            if key not in self.samples:
                self.samples[key] = sample
                self.held_bytes += sum(array.nbytes for array in sample)
            while self.held_bytes > self.limit_bytes and len(self.samples) > 1:
                _, oldest = self.samples.popitem(last=False)
                self.held_bytes -= sum(array.nbytes for array in oldest)
        return sample


SCENES = SceneCache(CACHE_BYTES)


def _malformed(data: str, what: str) -> DataError:
    return DataError(
        f"Cannot read {data!r}: {what}",
        fix="Write for example scenes:96x128,train=64,val=16. For a folder of that name, write ./scenes",
        rule="The form is scenes:HxW,train=N,val=N,seed=N,unlabelled=N,"
        + ",".join(f"{key}={'|'.join(words)}" for key, words in _WORDS.items())
        + ", each part optional.",
    )
