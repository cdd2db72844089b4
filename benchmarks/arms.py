"""The arms that `effect.py` compares: data sets, teachers, caches of their targets, and trainings of a student.

Judges are whole sequences of CamVid: 0006R0 (101 frames of train) for everything that is chosen, val for the final
alone. Frames of a video resemble their neighbours, so nothing is trained on a frame of the sequence that judges it -
except on val: its sequence, 0016E5, lies in train before and after it, and the data set `apart` leaves it out.
"""

from dataclasses import dataclass
from typing import Any

JUDGE, OF_VAL = "0006R0", "0016E5"
BLOCKS = {
    # Contiguous frames by their place in a sequence of train, at least 60 frame numbers away from those of val.
    "46-a": ("0001TP", 8, 54), "46-b": ("0016E5", 20, 66), "46-c": ("0016E5", 120, 166),
    "92-a": ("0016E5", 0, 92), "92-b": ("0016E5", 46, 138), "92-c": ("0016E5", 90, 182),
}  # fmt: skip
MORE_BLOCKS = {
    # Of the label curve in `few_labels.py`. Both lie in 0016E5, as 46-b does, and as far from the frames of val.
    "23-b": ("0016E5", 31, 54), "184-a": ("0016E5", 0, 184),
}  # fmt: skip


@dataclass(frozen=True)
class Data:
    """A data set made of CamVid's frames.

    Attributes:
        without: the sequence that train leaves out, or "".
        judge: the training sequence that is used for validation, or "" for CamVid's own val.
        labels: the block of `BLOCKS` whose frames keep their labels, or "" for all.
        labelled_only: whether frames without a label are left out.
    """

    without: str = ""
    judge: str = ""
    labels: str = ""
    labelled_only: bool = False


DATA = {
    "dev": Data(JUDGE, JUDGE),
    "all": Data(),
    "apart": Data(OF_VAL),
    **{f"few-{block}": Data(JUDGE, JUDGE, block) for block in (*BLOCKS, *MORE_BLOCKS)},
    **{f"only-{block}": Data(JUDGE, JUDGE, block, labelled_only=True) for block in (*BLOCKS, *MORE_BLOCKS)},
}

LITE = "--model {here}/pretrained.py:%s --size %s --lr %s --iterations %d"
TEACHER = "--batch-size 8 --warmup 100 --class-weights sqrt --ema 0.999 --gradients-every 0"
TEACHERS = {
    # Flags of train-teacher by name. The data set is chosen where a teacher is used.
    "brief": LITE % ("lite0", "144x192", "1e-3", 250),
    "lite0": LITE % ("lite0", "144x192", "1e-3", 1000),
    "lite0-slow": LITE % ("lite0", "144x192", "1e-3 --lr-scale encoder=0.2", 1000),
    "lite0-large": LITE % ("lite0", "288x384", "1e-3", 2000),
    "lite2-large": LITE % ("lite2", "288x384", "1e-3", 1000),
    # Half as long as lite0-large, whose score at half time was within 0.5 of its last.
    "final": LITE % ("lite0", "288x384", "1e-3", 1000) + " --val-every 500",
    "few": LITE % ("lite0", "288x384", "1e-3", 300) + " --val-every 300",
    "few-random": LITE % ("lite0_random", "288x384", "1e-3", 300) + " --val-every 300",
    "brief-fold": LITE % ("lite0", "144x192", "1e-3", 250) + " --fold 0/5",
}
TAUGHT = (
    # Teachers that are rows of their own: stage, row, teacher and the data that it is trained and judged on.
    *(("E2", name, name, "dev") for name in ("lite0", "lite0-slow", "lite0-large", "lite2-large")),
    *(("E4", f"teacher, {block}", "few", f"only-{block}") for block in BLOCKS),
    *(("E6", f"teacher, {data}", "final", data) for data in ("all", "apart")),
)
COMBINED = {
    # Teachers read together, by name: runs as --teacher names them, and --tta.
    "lite0-large, EMA": (("lite0-large-dev-0@last-ema",), ""),
    "lite0-large, flip": (("lite0-large-dev-0@last",), "flip"),
    "lite0-large and lite2-large, flip": (("lite0-large-dev-0@last", "lite2-large-dev-0@last"), "flip"),
}


@dataclass(frozen=True)
class Store:
    """A cache of teachers' targets.

    Attributes:
        teachers: keys of `TEACHERS`.
        flags: flags of build-teacher-cache in addition to size and views.
        views: views of each image.
        trained_on: the data set that the teachers were trained on, or "" for the one that an arm names.
    """

    teachers: tuple[str, ...]
    flags: str = ""
    views: int = 4
    trained_on: str = ""


LARGE = "--teacher-size 288x384 --teacher-grid view"
STORES = {
    # For students that read no targets: every store of a size has the same pixels.
    "pixels": Store(("brief",), views=16, trained_on="dev"),
    "lite": Store(("lite0-large",), LARGE),
    "lite-16": Store(("lite0-large",), LARGE, views=16),
    "lite-16-raw": Store(("lite0-large",), f"{LARGE} --raw-logits", views=16),
    "final-16-raw": Store(("final",), f"{LARGE} --raw-logits", views=16),
    "few": Store(("few",), LARGE, views=4),
    "few-raw": Store(("few",), f"{LARGE} --raw-logits", views=4),
    "few-random": Store(("few-random",), LARGE, views=4),
    "few-large": Store(("few",), "--size 288x384", views=4),
    "pixels-large": Store(("brief",), "--size 288x384", views=16, trained_on="dev"),
    "fold": Store(("brief-fold",)),
    "taps": Store(("lite0-large",), f"{LARGE} --raw-logits --features encoder.blocks.4,encoder.blocks.6", views=4),
}
VIEWS = "--size 144x192 --view-scale 1:2"
STUDENT = (
    "--model kdcache:tiny --batch-size 8 --lr 6e-3 --warmup 100 --class-weights sqrt --ema 0.999 --gradients-every 0 "
    "--threads 1"
)
FOUR, ALL = "--augment replay --limit-views 4", "--augment replay"


@dataclass(frozen=True)
class Arm:
    """One way to train the student.

    Attributes:
        stage, name: the stage of the study, and the arm's name in it.
        store: a key of `STORES`, or "" to train from the files of the data set.
        flags: flags in addition to those of all students. {runs} is the folder of all runs.
        iterations: number of steps.
        seeds: the seeds to train.
        data: a key of `DATA`, for the cache and for validation.
        teacher_data: the data set that the cache's teachers were trained on, or "" for `data`.
        live: a key of `TEACHERS`, trained on `data`, that runs in every step, or "" to take targets from the cache.
    """

    stage: str
    name: str
    store: str
    flags: str
    iterations: int = 1500
    seeds: tuple[int, ...] = tuple(range(8))
    data: str = "dev"
    teacher_data: str = ""
    live: str = ""


PLAIN = "--method none"
CONTROLS = (
    Arm("E1", "plain, 4 views", "pixels", f"{PLAIN} {FOUR}"),
    Arm("E1", "dist of labels, 4 views", "pixels", f"--method dist --teacher labels {FOUR}"),
    Arm("E1", "plain, 16 views", "pixels", f"{PLAIN} {ALL}"),
    Arm("E1", "plain, files", "", ""),
    Arm("E1", "dice, 4 views", "pixels", f"--method dice {FOUR}"),
    Arm("E1", "lovasz, 4 views", "pixels", f"--method lovasz {FOUR}"),
    Arm("E1", "label smoothing 0.1, 4 views", "pixels", f"{PLAIN} --label-smoothing 0.1 {FOUR}"),
    Arm("E1", "dist of the teacher, 4 views", "lite", f"--method dist {FOUR}"),
    # Plain gains from more views: so may the others.
    Arm("E1", "dist of labels, 16 views", "pixels", f"--method dist --teacher labels {ALL}"),
    Arm("E1", "dist of the teacher, 16 views", "lite-16", f"--method dist {ALL}"),
)
PLATEAU = tuple(
    Arm("E3", f"plain, 16 views, {iterations} iterations", "pixels", f"{PLAIN} {ALL}", iterations, (0, 1))
    for iterations in (1500, 4500, 9000, 18000)
)

# Whether so few images want more iterations than all of them do.
LONGER = Arm("E4", "plain, 46-a, 9000 iterations", "pixels", f"{PLAIN} {ALL}", 9000, (0, 1, 2), "only-46-a")

# What the stages so far have chosen, for those that follow.
STRONGEST, LENGTH = ("pixels", f"{PLAIN} {ALL}"), 4500
FEW_WINNER, FEW_CONTROL = f"--method dist {FOUR}", f"--method dist --teacher labels {FOUR}"
WINNER, CONTROL = f"--method cwd {ALL}", f"--method cwd --teacher labels {ALL}"
FRESH = tuple(range(100, 108))


def few(block: str) -> tuple[Arm, ...]:
    """Return the students for the labels of a block: labels only, control, and distilled on all images."""
    only: dict[str, Any] = {"stage": "E4", "iterations": LENGTH, "seeds": (0, 1, 2), "data": f"only-{block}"}
    return (
        Arm(name=f"plain, {block}", store=STRONGEST[0], flags=STRONGEST[1], **only),
        Arm(name=f"control, {block}", store="pixels", flags=FEW_CONTROL, **only),
        Arm("E4", f"distilled, {block}", "few", FEW_WINNER, LENGTH, (0, 1, 2), f"few-{block}", f"only-{block}"),
    )


FEW = (
    *(arm for block in BLOCKS for arm in few(block)),
    Arm("E4", "plain, all labels", *STRONGEST, LENGTH, (0, 1, 2)),
    LONGER,
)
DEEP = "student_tap=stage4,teacher_tap=encoder.blocks.6"
OTHERS = tuple(
    Arm("E5", name, store, f"--method {flags}", LENGTH, (0, 1))
    for name, store, flags in (
        ("dist, 16 views", "lite-16", f"dist {ALL}"),
        ("dist of labels, 16 views", "pixels", f"dist --teacher labels {ALL}"),
        ("cwd, 16 views", "lite-16-raw", f"cwd {ALL}"),
        ("cwd of labels, 16 views", "pixels", f"cwd --teacher labels {ALL}"),
        ("dist", "taps", f"dist {FOUR}"),
        ("cosine", "taps", f"none --term cosine,{DEEP},standardise=channels {FOUR}"),
        ("hint", "taps", f"none --term hint,{DEEP},standardise=channels {FOUR}"),
        ("hint and dist", "taps", f"dist --term hint,{DEEP},standardise=channels {FOUR}"),
        ("kl, T = 1, CE 0.3", "taps", f"kl --temperature 1 --kl-weight 1 --ce-weight 0.3 {FOUR}"),
        ("cwd", "taps", f"cwd {FOUR}"),
        ("pseudo", "taps", f"pseudo {FOUR}"),
    )
)
# Trust is measured on a fold that the teacher and a plain run have not seen.
FOLD = f"--fold 0/5 {FOUR}"
TRUST = "--class-trust auto --trust-against {runs}/E5/plain-a-fold-left-out-0"
TRUSTED = (
    Arm("E5", "plain, a fold left out", "fold", f"{PLAIN} {FOLD}", seeds=(0,)),
    Arm("E5", "kl, a fold left out", "fold", f"--method kl {FOLD}", seeds=(0, 1, 2, 3)),
    Arm("E5", "kl trusted by class, a fold left out", "fold", f"--method kl {TRUST} {FOLD}", seeds=(0, 1, 2, 3)),
)
FINAL = tuple(
    Arm("E6", f"{name}, {data}", store, flags, LENGTH, FRESH, data)
    for data in ("all", "apart")
    for name, store, flags in (
        ("plain", *STRONGEST),
        ("control", "pixels", CONTROL),
        ("distilled", "final-16-raw", WINNER),
    )
)
LIVE = Arm("E6", "live, all", "final-16-raw", WINNER, LENGTH, FRESH[:3], "all", live="final")
ARMS = (*CONTROLS, *PLATEAU, *FEW, *OTHERS, *TRUSTED, *FINAL, LIVE)

# Arms whose difference answers a question, each with its baseline: by stage and name.
QUESTIONS = (
    *((f"E1 dist of the teacher, {views} views", f"E1 {baseline}, {views} views")
      for views in (4, 16) for baseline in ("plain", "dist of labels")),
    *((f"E1 dist of labels, {views} views", f"E1 plain, {views} views") for views in (4, 16)),
    *((f"E4 distilled, {block}", f"E4 {baseline}, {block}") for block in BLOCKS for baseline in ("plain", "control")),
    *((f"E6 {arm}, {data}", f"E6 {baseline}, {data}") for data in ("all", "apart")
      for arm, baseline in (("distilled", "plain"), ("distilled", "control"), ("control", "plain"))),
)  # fmt: skip
