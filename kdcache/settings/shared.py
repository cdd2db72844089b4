"""Tables that several verbs share."""

from dataclasses import dataclass
from functools import partial
from typing import Annotated, Literal

from annotated_types import Ge

from kdcache.settings.parse import Bytes, Count, Positive, Size
from kdcache.settings.setting import REQUIRED, setting

DATA = "Data"
MACHINE = "Machine"
_data = partial(setting, panel=DATA)
_machine = partial(setting, panel=MACHINE)

FOLDS_BY = "Keep sequences in one fold: a pattern for their names, as '^(.+)_'."
Weights = Literal["best", "last", "best-ema", "last-ema"]
FitChoice = Literal["auto", "squash", "crop", "pad"]
Crop = Literal["none", "garg"]
"""The part of a depth label on which predictions are evaluated."""


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """The setting `data`: the data set that a verb works on."""

    data: str = _data(
        REQUIRED,
        "Data folder, LAYOUT:DIR such as [bold]voc:DIR[/], or the built-in [bold]scenes[/].",
    )


@dataclass(frozen=True, kw_only=True)
class SourceSettings:
    """The setting `data` for a cache without stored images: the data set with the images."""

    data: str | None = _data(None, "Data folder, needed for a cache built with --pixels source.")


@dataclass(frozen=True, kw_only=True)
class ImageSettings:
    """Settings for images: the split, the size (height, width) in pixels, and how images are fitted to it."""

    split: str = _data("train", "Split of the data set, such as train or val.")
    size: Size | None = _data(None, "Height and width to which images are resized, e.g. 288x384.", metavar="HxW")
    fit: FitChoice = _data(
        "auto",
        "How images of another shape fit --size (auto: cache's, model's or pad).",
    )


@dataclass(frozen=True, kw_only=True)
class MachineSettings:
    """Settings for the device and the number of CPU threads."""

    threads: Annotated[int, Ge(0)] = _machine(0, "CPU threads; 0 lets torch choose.")
    device: str = _machine("auto", "auto, cpu or cuda.", metavar="auto|cpu|cuda", words=("auto", "cpu", "cuda"))


@dataclass(frozen=True, kw_only=True)
class CopySettings:
    """Settings for local copies of a remote cache's shards: the folder, and the most bytes that copies may take."""

    cache_dir: str | None = _machine(
        None,
        "Folder for local copies of a remote cache (default: $KDCACHE_CACHE_DIR).",
    )
    cache_bytes: Bytes | None = _machine(
        None,
        "Most bytes of local copies, e.g. 50GiB (default: half the free space).",
        metavar="SIZE",
    )


@dataclass(frozen=True, kw_only=True)
class JudgeSettings:
    """Settings for how runs are evaluated and how their speed is measured. Each field is a flag."""

    weights: Weights = setting("best", "A run's weights: best or last, after --ema also best-ema, last-ema.")
    window: Size | None = setting(
        None,
        "Slide a window of this size over the image, and average logits.",
        metavar="HxW",
    )
    stride: Size | None = setting(
        None, "Pixels between sliding windows (default: two thirds of --window).", metavar="HxW"
    )
    batch_size: Count = setting(8, "Images per forward pass.", ranged=True)
    repeats: Annotated[int, Ge(0)] = setting(50, "Timed forward passes per model; 0 measures no speed.", ranged=True)
    fresh: bool = setting(False, "Repeat evaluations and timings instead of reusing stored results.")


@dataclass(frozen=True, kw_only=True)
class DepthSettings:
    """Settings for the pixels of depth labels on which predictions are evaluated. Depths are in metres."""

    min_depth: Positive = setting(1e-3, "Ignore pixels whose labelled depth is not above this.", metavar="METRES")
    max_depth: Positive | None = setting(
        None,
        "Ignore deeper labels, clip predictions to it (default: model's maximum, or 80).",
        metavar="METRES",
    )
    depth_crop: Crop = setting("none", "Evaluate all pixels (none), or those inside Garg's crop for KITTI (garg).")


@dataclass(frozen=True, kw_only=True)
class CompareSettings:
    """Settings for a comparison of runs: the data, the teacher and the baseline. Each field is a flag."""

    data: str | None = setting(
        None,
        "Data to evaluate on (default: the validation data of the runs).",
    )
    split: str | None = setting(None, "Split to evaluate on (default: the runs' validation split, or val).")
    teacher: str | None = setting(None, "A run or SPEC@FILE with its own row, outside the ranking.", metavar="RUN")
    baseline: str | None = setting(
        None, "Row or run for differences (default: the same model with --method none).", metavar="NAME"
    )
    blocks_by: str | None = setting(
        None,
        "Resample sequences, not images: a pattern for their names, as '^(.+)_'.",
        metavar="PATTERN",
    )
    own_fold: bool = setting(False, "Evaluate each run on the fold that its training left out.")
    smoke: bool = setting(False, "Mark the output: the runs are too short to mean anything.")
