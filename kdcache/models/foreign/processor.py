"""What a network expects of its images, in addition to mean and standard deviation."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Self

Size = tuple[int, int]
"""(H, W) in pixels."""
PROBE_SIZE = (128, 128)
"""The first image that a network is shown: deep enough for stride 32 and a few cells."""


@dataclass(frozen=True)
class Processor:
    """The images that a network takes.

    Attributes:
        multiple: both sides are multiples of it, such as the patch of a transformer.
        fixed_size: the only (H, W) that the network takes, or None.
        native_size: (H, W) of its training, if known.
        pads: whether its training images were padded to that size, so squashed images are new to it.
        channels: the order of colours that its first layer reads.
        positions: whether it has position embeddings, so features of a mirrored image are not mirrored features.
        revision: the hub commit of its files, or None for a folder.
    """

    multiple: int = 1
    fixed_size: Size | None = None
    native_size: Size | None = None
    pads: bool = False
    channels: str = "rgb"
    positions: bool = False
    revision: str | None = None

    def nearest(self, size: Size) -> Size:
        """Return the (H, W) nearest to `size` that the network takes."""
        if self.fixed_size is not None:
            return self.fixed_size
        height, width = (max(1, round(side / self.multiple)) * self.multiple for side in size)
        return height, width

    @property
    def takes(self) -> str:
        """The sizes that it takes, in words."""
        if self.fixed_size is not None:
            return f"only images of {self.fixed_size[0]}x{self.fixed_size[1]}"
        return f"images whose sides are multiples of {self.multiple}"

    @classmethod
    def of_all(cls, processors: Iterable[Self]) -> "Processor":
        """Return the requirements of several networks that see the same images."""
        first, *others = processors
        fixed = next((one.fixed_size for one in (first, *others) if one.fixed_size is not None), None)
        return replace(
            first if not others else Processor(),
            multiple=math.lcm(*(one.multiple for one in (first, *others))),
            fixed_size=fixed,
            pads=any(one.pads for one in (first, *others)),
            positions=any(one.positions for one in (first, *others)),
        )
