"""What `effect.py` compares: data sets, teachers, stores of their targets, and ways to train a student from them.

Judges are whole sequences of CamVid: 0006R0 (101 frames of train) for everything that is chosen, val for the final
alone. Frames of a video resemble their neighbours, so nothing is trained on a frame of the sequence that judges it -
except on val: its sequence, 0016E5, lies in train before and after it, and the data set `apart` leaves it out.
"""

from dataclasses import dataclass

JUDGE, OF_VAL = "0006R0", "0016E5"
BLOCKS = {
    # Contiguous frames by their place in a sequence of train, at least 60 frame numbers away from those of val.
    "46-a": ("0001TP", 8, 54), "46-b": ("0016E5", 20, 66), "46-c": ("0016E5", 120, 166),
    "92-a": ("0016E5", 0, 92), "92-b": ("0016E5", 46, 138), "92-c": ("0016E5", 90, 182),
}  # fmt: skip


@dataclass(frozen=True)
class Data:
    """A data set made of CamVid's frames.

    Attributes:
        without: the sequence that train leaves out; "" for none.
        judge: the sequence of train that is judged on; "" for CamVid's own val.
        labels: block of `BLOCKS` whose frames alone keep their label; "" for all.
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
    **{f"few-{block}": Data(JUDGE, JUDGE, block) for block in BLOCKS},
    **{f"only-{block}": Data(JUDGE, JUDGE, block, labelled_only=True) for block in BLOCKS},
}

LITE = "--model {here}/pretrained.py:%s --size %s --lr %s --iterations %d"
TEACHER = "--batch-size 8 --warmup 100 --class-weights sqrt --ema 0.999 --gradients-every 0"
TEACHERS = {
    # Flags of train-teacher by name. The data set is chosen where a teacher is used.
    "base": "--model kdcache:base --size 144x192 --lr 2e-3 --iterations 4000",
    "brief": LITE % ("lite0", "144x192", "1e-3", 250),
    "lite0": LITE % ("lite0", "144x192", "1e-3", 2000),
    "lite0-slow": LITE % ("lite0", "144x192", "1e-3 --lr-scale encoder=0.2", 2000),
    "lite0-large": LITE % ("lite0", "288x384", "1e-3", 2000),
    "lite2-large": LITE % ("lite2", "288x384", "1e-3", 2000),
}


@dataclass(frozen=True)
class Store:
    """A store of teachers' targets: which teachers, and the flags of build-teacher-cache beside size and views."""

    teachers: tuple[str, ...]
    flags: str = ""
    views: int = 16


LARGE = "--teacher-size 288x384 --teacher-grid view"
STORES = {
    "base": Store(("base",)),
    "pixels": Store(("brief",)),  # for students that read no targets: every store of a size has the same pixels
    "lite": Store(("lite0-large",), LARGE),
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
        store: a key of `STORES`; "" trains from the files of the data set.
        data: a key of `DATA`, of the store and of the judge.
        flags: beside those of all students.
        teacher_data: what the store's teachers were trained on; "" for `data`.
    """

    stage: str
    name: str
    store: str
    flags: str
    iterations: int = 1500
    seeds: tuple[int, ...] = tuple(range(8))
    data: str = "dev"
    teacher_data: str = ""


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
    Arm("E1", "dist of the teacher, 16 views", "lite", f"--method dist {ALL}"),
)
PLATEAU = tuple(
    Arm("E3", f"{name}, {iterations} iterations", store, flags, iterations, (0, 1))
    for iterations in (1500, 4500, 9000, 18000)
    for name, store, flags in (("plain, 16 views", "pixels", f"{PLAIN} {ALL}"), ("plain, files", "", ""))
)
ARMS = (*CONTROLS, *PLATEAU)
