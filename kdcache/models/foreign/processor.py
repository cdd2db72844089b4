"""What a network expects of its images, in addition to mean and standard deviation."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Self

Size = tuple[int, int]
"""(H, W) in pixels."""
PROBE_SIZE = (128, 128)
"""The size of the first image that a network gets. It is large enough for stride 32."""


@dataclass(frozen=True)
class Processor:
    """What a network expects of its images, in addition to mean and standard deviation.

    Attributes:
        multiple: height and width must be multiples of this number of pixels.
        fixed_size: the only (height, width) that the network takes, or None if it takes several sizes.
        native_size: the (height, width) of the network's training images, or None if unknown.
        pads: True if training images were padded to `native_size`, not squashed.
        channels: the order of colours that the first layer reads: `rgb` or `bgr`.
        positions: True if the network has position embeddings. Mirroring an image then does not just mirror its
            features.
        revision: the commit of the network's Hugging Face repository, or None if unknown.
    """

    multiple: int = 1
    fixed_size: Size | None = None
    native_size: Size | None = None
    pads: bool = False
    channels: str = "rgb"
    positions: bool = False
    revision: str | None = None

    def nearest(self, size: Size) -> Size:
        """Return the (height, width) that the network takes and that is nearest to `size`."""
        if self.fixed_size is not None:
            return self.fixed_size
        height, width = (max(1, round(side / self.multiple)) * self.multiple for side in size)
        return height, width

    @property
    def takes(self) -> str:
        """The sizes that the network takes, as the end of a sentence: `images whose sides are multiples of 32`."""
        if self.fixed_size is not None:
            return f"only images of {self.fixed_size[0]}x{self.fixed_size[1]}"
        return f"images whose sides are multiples of {self.multiple}"

    @classmethod
    def of_all(cls, processors: Iterable[Self]) -> "Processor":
        """Return the combined requirements of networks that get the same images. A single one is returned unchanged.

        `multiple` becomes the least common multiple, and `fixed_size` the first that is not None. `pads` and
        `positions` are True if one network has them. The other fields get their defaults.
        """
        first, *others = processors
        fixed = next((processor.fixed_size for processor in (first, *others) if processor.fixed_size is not None), None)
        return replace(
            first if not others else Processor(),
            multiple=math.lcm(*(processor.multiple for processor in (first, *others))),
            fixed_size=fixed,
            pads=any(processor.pads for processor in (first, *others)),
            positions=any(processor.positions for processor in (first, *others)),
        )
