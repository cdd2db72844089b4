"""Cases of the benchmark: computation, shapes, and their names on the command line.

Legend: B batch, C classes, k kept classes, H W label size, h w logits' own size.
"""

import math
import re
from collections.abc import Collection
from dataclasses import dataclass, replace

import torch

from kdcache.errors import RecipeError, suggest

MOST_DENSE = 32
"""Classes up to which a cache keeps all of them."""
KEPT = 8
"""Classes kept above."""

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Kind:
    """What one step of a benchmark computes.

    Attributes:
        about: a line for the help text of the command.
        loss: a key of `losses.LOSSES`: "distill" (CE + KL) or "dist" (the relation loss).
        trained: True uses class weights in CE, and counts void pixels also in KL. False uses no class weights, and
            counts only labelled pixels in both terms.
        drawn: True for a random window and flip per image, as with `--augment warp`. False for whole views.
        threshold: the least confidence of the teacher at which a pixel counts in the KL, 0 to 1, or None to count all.
            The confidence is computed in every step.
    """

    about: str
    loss: str = "distill"
    trained: bool = True
    drawn: bool = False
    threshold: float | None = None

    @property
    def on_cells(self) -> bool:
        """True if the loss compares student and teacher on the target's cells instead of every label pixel."""
        return self.loss != "distill"


KINDS = {
    "plain": Kind("cross-entropy and KL on labelled pixels", trained=False),
    "trained": Kind("class weights, and void pixels that the teacher teaches, of views that are replayed"),
    "warp": Kind("the same, through a window and a flip per image", drawn=True),
    "gate": Kind("as trained, where the teacher's confidence is at least 0.7", threshold=0.7),
    "dist": Kind("the loss of relations alone, of views that are replayed", loss="dist"),
    "dist-warp": Kind("the same, through a window and a flip per image", loss="dist", drawn=True),
}
"""What --case chooses from."""


@dataclass(frozen=True)
class Shape:
    """The shape of a batch of label images and the stride of the logits, written BxCxHxW/STRIDE: "16x21x512x512/4"."""

    batch: int
    num_classes: int
    height: int
    width: int
    stride: int

    @property
    def size(self) -> tuple[int, int]:
        """The label size (H, W) in pixels."""
        return self.height, self.width

    @property
    def native(self) -> tuple[int, int]:
        """The size (h, w) of the logits: the label size divided by the stride, rounded up."""
        return math.ceil(self.height / self.stride), math.ceil(self.width / self.stride)

    @property
    def ignore_index(self) -> int:
        """The label of void pixels: 255, or -1 if 255 is a class id."""
        return 255 if self.num_classes <= 255 else -1

    @property
    def divides(self) -> bool:
        """True if the stride divides the label's height and width."""
        return self.height % self.stride == 0 and self.width % self.stride == 0

    @property
    def class_pixels(self) -> int:
        """B * C * H * W, the number of elements of class scores at label size, which kdcache's rivals store."""
        return self.batch * self.num_classes * self.height * self.width

    def __str__(self) -> str:
        return f"{self.batch}x{self.num_classes}x{self.height}x{self.width}/{self.stride}"


def _parse(text: str) -> Shape:
    match = re.fullmatch(r"(\d+)x(\d+)x(\d+)x(\d+)/(\d+)", text.strip().lower())
    numbers = [int(group) for group in match.groups()] if match else []
    if not numbers or min(numbers) < 1:
        raise RecipeError(
            f"Invalid shape in --shapes: {text!r}",
            fix=suggest(
                text,
                PRESETS,
                f"Use BxCxHxW/STRIDE at label size, for example 16x21x512x512/4, or: {', '.join(PRESETS)}",
            ),
        )
    return Shape(*numbers)


PRESETS: dict[str, tuple[Shape, ...]] = {
    "voc": (Shape(16, 21, 512, 512, 4),),
    "ade": (Shape(16, 150, 512, 512, 4),),
    "cityscapes": (Shape(8, 19, 768, 768, 4),),
    "stride8": (Shape(16, 21, 512, 512, 8),),
    "binary": (Shape(16, 2, 512, 512, 4),),
    "single": (Shape(1, 21, 512, 512, 4),),
    "camvid": (Shape(4, 11, 288, 288, 4),),
    "cpu": (Shape(4, 11, 288, 288, 4), Shape(2, 21, 512, 512, 4), Shape(1, 150, 512, 512, 4)),
}
PRESETS["cuda"] = sum((PRESETS[name] for name in ("voc", "ade", "cityscapes", "stride8", "binary", "single")), ())
"""Named lists of shapes; `cuda` and `cpu` are the defaults of their devices."""


def parse_shapes(text: str) -> tuple[Shape, ...]:
    """Parse a comma-separated list of shapes and names of presets, such as "4x11x288x288/4,voc".

    Repetitions are dropped.

    Raises: RecipeError naming the part that is neither a shape nor a preset.
    """
    parts = [part.strip() for part in text.split(",") if part.strip()]
    shapes = [shape for part in parts for shape in (PRESETS.get(part) or (_parse(part),))]
    return tuple(dict.fromkeys(shapes or [_parse(text)]))


def parse_names(text: str, flag: str, allowed: Collection[str]) -> tuple[str, ...]:
    """Parse a comma-separated list of names into a tuple without repetitions. Case and spaces are ignored.

    Args:
        text: the list, such as "eager,compile".
        flag: the flag's name, for the error message.
        allowed: the known names.
    Raises: RecipeError naming the flag and the nearest known name, for an unknown name.
    """
    names = [part.strip().lower() for part in text.split(",") if part.strip()]
    for name in names:
        if name not in allowed:
            raise RecipeError(
                f"Unknown name in {flag}: {name!r}", fix=suggest(name, allowed, f"Choose from: {', '.join(allowed)}")
            )
    return tuple(dict.fromkeys(names))


@dataclass(frozen=True)
class Case:
    """One case of a benchmark. Its values are plain, so that it can go to another process as JSON.

    Attributes:
        shape: the batch of label images.
        dtype: a name of DTYPES, the dtype of the student's logits.
        temperature: T.
        kept: number of classes that the target keeps per pixel, or None for a cache's default.
        kind: what one step computes, a name of KINDS.
    """

    shape: Shape
    dtype: str = "fp32"
    temperature: float = 2.0
    kept: int | None = None
    kind: str = "plain"

    @property
    def k(self) -> int:
        """The number of classes that the target keeps per pixel.

        It is `kept`, at most C. If `kept` is None, it is all C classes if C is at most 32, else 8, as in a cache.
        """
        C = self.shape.num_classes
        if self.kept is None:
            return C if C <= MOST_DENSE else KEPT
        return min(self.kept, C)

    def tiny(self) -> "Case":
        """Return this case with a single image of 4 by 4 logits."""
        side = 4 * self.shape.stride
        return replace(self, shape=Shape(1, self.shape.num_classes, side, side, self.shape.stride))

    def __str__(self) -> str:
        return f"{self.kind} {self.shape} {self.dtype} T={self.temperature:g} k={self.k}"
