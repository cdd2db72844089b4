"""Tables that several verbs share."""

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge

from kdcache.settings.parse import Bytes, Count, Size
from kdcache.settings.setting import REQUIRED, setting

FOLDS_BY = (
    "Keep whole sequences, such as videos, in a fold: a regular expression whose first group (or whole match) in a "
    "sample's id names its sequence, e.g. '^(.+)_'."
)
Weights = Literal["best", "last", "best-ema", "last-ema"]
FitChoice = Literal["auto", "squash", "crop", "pad"]
Crop = Literal["none", "garg"]
"""The part of a label of depth that is judged."""


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """The data that a verb works on."""

    data: str = setting(
        REQUIRED,
        "Data folder: your own (images/ and labels/, or as mmseg, Kaggle and COCO have it), CamVid, VOC, Cityscapes, "
        "GTA5, ADE20K, KITTI or NYU (found by what lies in it, or named as in [bold]voc:DIR[/]); or [bold]scenes[/] "
        "for the built-in procedural set.",
    )


@dataclass(frozen=True, kw_only=True)
class SourceSettings:
    """The data of a store that may hold no pixels."""

    data: str | None = setting(None, "Data folder; needed for a store built with --pixels source.")


@dataclass(frozen=True, kw_only=True)
class ImageSettings:
    """Which images of the data, how large, and how they are fitted into that: `size` is (H, W) in pixels."""

    split: str = setting("train", "Which split of it.")
    size: Size | None = setting(None, "Height and width of the pixels, e.g. 288x384.", metavar="HxW")
    fit: FitChoice = setting(
        "auto",
        "Images of another shape than --size are squashed into it, cropped to its shape, or padded, with a margin that "
        "teaches nothing. auto: as the store or run at hand; new ones pad where shapes differ by more than 5 %.",
    )


@dataclass(frozen=True, kw_only=True)
class MachineSettings:
    """Device and CPU threads of a verb."""

    threads: Annotated[int, Ge(0)] = setting(0, "CPU threads; 0 lets torch choose.")
    device: str = setting("auto", "auto, cpu or cuda.", metavar="auto|cpu|cuda", words=("auto", "cpu", "cuda"))


@dataclass(frozen=True, kw_only=True)
class CopySettings:
    """The folder for copies of a remote store's shards, and its room in bytes."""

    cache_dir: str | None = setting(
        None,
        "Where copies of a remote store's shards are kept (default: $KDCACHE_CACHE_DIR, or kdcache in your cache "
        "folder).",
    )
    cache_bytes: Bytes | None = setting(
        None,
        "How much they may take, e.g. 50GiB or 200MB; what was not used for longest makes room (default: half of "
        "what is free there).",
        metavar="SIZE",
    )


@dataclass(frozen=True, kw_only=True)
class JudgeSettings:
    """How runs are evaluated and timed."""

    weights: Weights = setting("best", "Weights of a run: best or last; of one with --ema also best-ema or last-ema.")
    window: Size | None = setting(
        None,
        "Slide a window of so many pixels over the image, at its own size or at --size, and average the logits.",
        metavar="HxW",
    )
    stride: Size | None = setting(None, "From a window to the next (default: two thirds of --window).", metavar="HxW")
    batch_size: Count = setting(8, "Images per forward pass.", ranged=True)
    repeats: Annotated[int, Ge(0)] = setting(50, "Timed calls per model; 0 times none.", ranged=True)
    fresh: bool = setting(False, "Evaluate and time again what was evaluated and timed before.")


@dataclass(frozen=True, kw_only=True)
class DepthSettings:
    """Which pixels of a label of depth are judged."""

    min_depth: float = setting(1e-3, "Labels of depth up to it do not count.", metavar="METRES")
    max_depth: float | None = setting(
        None,
        "Labels of depth from it on do not count, and predictions are clipped to it (default: the model's own "
        "maximum, or 80).",
        metavar="METRES",
    )
    depth_crop: Crop = setting("none", "none, or garg: judge inside Garg's crop alone, as is the custom on KITTI.")


@dataclass(frozen=True, kw_only=True)
class CompareSettings:
    """The data that runs are compared on, and what they are measured against."""

    data: str | None = setting(
        None,
        "Data to judge on (default: what the runs' recipes validate on). Without --split it is where that data set "
        "is now, and another one is refused.",
    )
    split: str | None = setting(None, "Which split of it (default: theirs, or val).")
    teacher: str | None = setting(None, "A run or SPEC@FILE, shown apart.", metavar="RUN")
    baseline: str | None = setting(
        None, "A row, or a run of it, to measure against (default: the same model with --method none).", metavar="NAME"
    )
    blocks_by: str | None = setting(
        None,
        "Take the interval over images from whole sequences, such as videos, whose frames are alike: a regular "
        "expression whose first group (or whole match) in a sample's id names its sequence, e.g. '^(.+)_'.",
        metavar="PATTERN",
    )
    own_fold: bool = setting(False, "Judge each run on the fold of the split that its --fold left out.")
    smoke: bool = setting(False, "Print above everything that the runs are no result, as of sweep --smoke.")
