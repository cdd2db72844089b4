"""Statistics of a split's depth labels: their range, known pixels, a histogram, and defects."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from kdcache.data.layouts.depth import DEPTH_FILE, impossible_depth
from kdcache.data.layouts.file_split import describe_some
from kdcache.data.sample import Depth

EDGES = (0.0, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0)
"""Where the histogram's bins begin, in metres; the last is open."""

LEAST_SHARE = 0.001
"""Share of pixels with a known depth below which a split is warned of; of a LiDAR's single scan it is about 0.05."""

LEAST_METRES = 0.1
"""Where nothing is farther, numbers were divided once too often, or are relative."""


@dataclass
class DepthReport:
    """The depth labels of a split, and their defects.

    Attributes:
        labelled: number of samples with a depth label.
        pixels: number of pixels in all readable labels.
        known: number of these pixels with a depth above 0.
        least: the smallest depth in metres, or None if no depth is known.
        most: the largest depth in metres, or None if no depth is known.
        edges: lower edges of the histogram's bins in metres. The last bin is open.
        histogram: number of known pixels in each bin.
        max_depth: the largest depth in metres that counts as possible. None allows any depth.
        impossible: sample id -> why its depths cannot be in metres, for example because they are negative.
        beyond: sample id -> number of pixels beyond `max_depth`.
        mismatched: sample id -> both sizes in words, if label and image differ in size.
        without_image: depth files that belong to no image, or to an image that has another depth file.
    """

    labelled: int = 0
    pixels: int = 0
    known: int = 0
    least: float | None = None
    most: float | None = None
    edges: list[float] = field(default_factory=lambda: list(EDGES))
    histogram: list[int] = field(default_factory=lambda: [0] * len(EDGES))
    max_depth: float | None = None
    impossible: dict[str, str] = field(default_factory=dict)
    beyond: dict[str, int] = field(default_factory=dict)
    mismatched: dict[str, str] = field(default_factory=dict)
    without_image: list[str] = field(default_factory=list)

    @property
    def share(self) -> float:
        """The share of pixels with a known depth, 0 to 1. A report without pixels has 0."""
        return self.known / max(self.pixels, 1)

    def add(self, sample: str, depth: DepthCounts) -> None:
        """Add the counts of one sample's depth label to this report. `sample` is the sample's id."""
        self.pixels += depth.pixels
        self.known += sum(depth.histogram)
        self.histogram = [total + count for total, count in zip(self.histogram, depth.histogram, strict=True)]
        if depth.most is not None and depth.least is not None:
            self.least = depth.least if self.least is None else min(self.least, depth.least)
            self.most = depth.most if self.most is None else max(self.most, depth.most)
        if depth.impossible:
            self.impossible[sample] = depth.impossible
        if depth.beyond:
            self.beyond[sample] = depth.beyond

    def problems(self, split: str) -> list[str]:
        """Return one sentence for each kind of defect, with the number of cases, examples and a fix.

        `split` is the split's name.
        """
        why = next(iter(self.impossible.values()), "")
        kinds = (
            (
                self.without_image,
                "depth files belong to no image, or to one that has another",
                "give each its image's path, with its own suffix, or remove it",
            ),
            (list(self.mismatched), "depth labels have another size than their image", "resize them (nearest)"),
            (
                list(self.impossible),
                f"depth labels cannot be metres ({why})",
                f"name the unit, and what means unknown, in {DEPTH_FILE} (layout folder), or correct the files",
            ),
            (
                list(self.beyond),
                f"depth labels reach beyond {self.max_depth:g} m ({sum(self.beyond.values())} pixels)"
                if self.max_depth is not None
                else "",
                "name a larger --max-depth, or mark those pixels as unknown (0)",
            ),
        )
        return [
            f"{split}: {len(names)} {defect}: {describe_some(names)}; {remedy}"
            for names, defect, remedy in kinds
            if names
        ]

    def warnings(self, split: str) -> list[str]:
        """Return sentences about valid depth that is rarely intended. `split` is the split's name.

        There are two: under 0.1 % of the pixels have a known depth, or no depth is 0.1 m or more.
        """
        doubts = []
        if self.known and self.share < LEAST_SHARE:
            doubts.append(
                f"{split}: {100 * self.share:.3f} % of the pixels have a known depth: too few to learn much from; "
                "check that the files are those of these images"
            )
        if self.most is not None and self.most < LEAST_METRES and not self.impossible:
            doubts.append(
                f"{split}: no depth is beyond {self.most:g} m: were the numbers divided once too often, or are they "
                f"relative? Depth is in metres; {DEPTH_FILE} names the unit (layout folder)"
            )
        return doubts


@dataclass(frozen=True)
class DepthCounts:
    """The pixel counts of one depth label.

    Attributes:
        pixels: number of pixels.
        histogram: number of known pixels in each bin of `DepthReport.edges`.
        least: the smallest depth in metres, or None if no depth is known.
        most: the largest depth in metres, or None if no depth is known.
        impossible: why the depths cannot be in metres, or ''.
        beyond: number of pixels that are deeper than the argument `max_depth` of `of`, or 0 if that is None.
    """

    pixels: int
    histogram: list[int]
    least: float | None
    most: float | None
    impossible: str
    beyond: int

    @classmethod
    def of(cls, depth: Depth, max_depth: float | None) -> DepthCounts:
        """Count the pixels of a depth label: all pixels, those in each bin of the histogram, and those too deep.

        Args:
            depth: float32 (H, W) in metres, NaN for unknown. A depth of 0 or below also counts as unknown.
            max_depth: the largest possible depth in metres. Deeper pixels are the count `beyond`, and all other fields
                include them. None allows any depth.
        """
        known = depth[depth > 0]
        return cls(
            depth.size,
            np.histogram(known, (*EDGES, math.inf))[0].tolist(),
            float(known.min()) if known.size else None,
            float(known.max()) if known.size else None,
            impossible_depth(depth),
            0 if max_depth is None else int(np.count_nonzero(known > max_depth)),
        )
