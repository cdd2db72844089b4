"""Tables that several verbs share."""

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge

from kdcache.settings.setting import Setting
from kdcache.settings.spelling import Bytes, Count, Size

FOLDS_BY = (
    "Keep whole sequences, such as videos, in a fold: a regular expression whose first group (or whole match) in a "
    "sample's id names its sequence, e.g. '^(.+)_'."
)
Weights = Literal["best", "last", "best-ema", "last-ema"]


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """The data that a verb works on."""

    data: Annotated[
        str,
        Setting(
            "Data folder: your own, CamVid, VOC, Cityscapes, GTA5 or ADE20K (found by what lies in it, or named as in "
            "[bold]voc:DIR[/]); or [bold]scenes[/] for the built-in procedural set."
        ),
    ]


@dataclass(frozen=True, kw_only=True)
class SourceSettings:
    """The data of a store that may hold no pixels."""

    data: Annotated[str | None, Setting("Data folder; needed for a store built with --pixels source.")] = None


@dataclass(frozen=True, kw_only=True)
class ImageSettings:
    """Which images of the data, and how large: `size` is (H, W) in pixels."""

    split: Annotated[str, Setting("Which split of it.")] = "train"
    size: Annotated[Size | None, Setting("Height and width of the pixels, e.g. 288x384.", metavar="HxW")] = None


@dataclass(frozen=True, kw_only=True)
class MachineSettings:
    """Device and CPU threads of a verb."""

    threads: Annotated[int, Ge(0), Setting("CPU threads; 0 lets torch choose.")] = 0
    device: Annotated[str, Setting("auto, cpu or cuda.")] = "auto"


@dataclass(frozen=True, kw_only=True)
class CopySettings:
    """The folder for copies of a remote store's shards, and its room in bytes."""

    cache_dir: Annotated[
        str | None,
        Setting(
            "Where copies of a remote store's shards are kept (default: $KDCACHE_CACHE_DIR, or kdcache in your cache "
            "folder)."
        ),
    ] = None
    cache_bytes: Annotated[
        Bytes | None,
        Setting(
            "How much they may take, e.g. 50GiB or 200MB; what was not used for longest makes room (default: half of "
            "what is free there).",
            metavar="SIZE",
        ),
    ] = None


@dataclass(frozen=True, kw_only=True)
class JudgeSettings:
    """How runs are evaluated and timed."""

    weights: Annotated[
        Weights,
        Setting("Weights of a run: best or last; of one with --ema also best-ema or last-ema."),
    ] = "best"
    batch_size: Annotated[Count, Setting("Images per forward pass.", ranged=True)] = 8
    repeats: Annotated[int, Ge(0), Setting("Timed calls per model; 0 times none.", ranged=True)] = 50
    fresh: Annotated[bool, Setting("Evaluate again what was evaluated before.")] = False


@dataclass(frozen=True, kw_only=True)
class CompareSettings:
    """The data that runs are compared on, and what they are measured against."""

    data: Annotated[str | None, Setting("Data to judge on (default: what the runs' recipes validate on).")] = None
    split: Annotated[str | None, Setting("Which split of it (default: theirs, or val).")] = None
    teacher: Annotated[str | None, Setting("A run or SPEC@FILE, shown apart.", metavar="RUN")] = None
    baseline: Annotated[
        str | None,
        Setting(
            "A row, or a run of it, to measure against (default: the same model with --method none).", metavar="NAME"
        ),
    ] = None
    ignore: Annotated[
        tuple[str, ...],
        Setting("A setting, besides seed and fold, that does not separate rows.", metavar="KEY", repeated=True),
    ] = ()
    own_fold: Annotated[bool, Setting("Judge each run on the fold of the split that its --fold left out.")] = False
    smoke: Annotated[bool, Setting("Print above everything that the runs are no result, as of sweep --smoke.")] = False
