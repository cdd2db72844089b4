"""Changes of a data set against the verbs that have data and something made from it: the table, and what does a cell.

A row is a change after everything was made. A column is a verb. A cell says what the verb then does:

    noticed         it prints the sample, class, teacher or library that changed. If it fails, no file is another one
    harmless        it succeeds, and prints what it prints without a change (and a note on the same content)
    not applicable  it does not read what changed
"""

from __future__ import annotations

import contextlib
import io
import shutil
import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from PIL import Image, ImageOps

from kdcache.errors import KDCacheError
from kdcache.sweep import Job, Watcher, plan_sweep, read_recipe, run_jobs
from kdcache.training import Interrupted, Observer, make_config, train
from kdcache_cli.app import app, main
from kdcache_cli.console import ERRORS, OUT
from kdcache_cli.verbs.sweep import flags_of

NOTICED, HARMLESS, NOT_APPLICABLE = WORDS = ("noticed", "harmless", "not applicable")
N, H, X = WORDS

COLUMNS = (
    "build again (finished)",
    "build continued (half built)",
    "repair (a shard lost)",
    "train-teacher --resume",
    "train-student --data (pixels stored)",
    "train-student --data (pixels source)",
    "train-student --val of the same data",
    "train-student --resume",
    "verify --data",
    "extend",
    "sweep again",
    "compare",
    "evaluate",
)
MATRIX: Mapping[str, tuple[str, ...]] = {
    # again, continued, repair, teacher, stored, source, val, resume, verify, extend, sweep, compare, evaluate
    "nothing": (H, H, H, H, H, H, H, H, H, H, H, H, H),
    "label corrected": (N, N, N, N, N, N, N, N, N, N, N, H, H),
    "masks swapped": (N, N, N, N, N, N, N, N, N, N, N, H, H),
    "image replaced": (N, N, N, N, N, N, N, N, N, N, N, H, H),
    "sample added": (N, N, N, N, N, N, N, N, N, N, N, H, H),
    "sample removed": (N, N, N, N, N, N, N, N, N, N, N, H, H),
    "id renamed": (N, N, N, N, N, N, N, N, N, N, N, H, H),
    "class renamed": (N, N, N, N, N, N, N, N, N, N, N, N, N),
    "classes reordered": (N, N, N, N, N, N, N, N, N, N, N, N, N),
    "class added": (N, N, N, N, N, N, N, N, N, N, N, N, N),
    # Runs and sweeps have digests of files only, so they cannot tell another file from another content.
    "label format changed": (H, H, H, N, H, H, H, H, H, H, N, H, H),
    "same content in another file": (H, H, H, N, H, H, H, H, H, H, N, H, H),
    "folder renamed": (H, H, H, H, H, H, H, H, H, H, H, H, H),
    "teacher retrained": (N, N, N, X, X, X, X, X, X, N, N, X, X),
    "library upgraded": (H, N, N, H, H, N, H, H, H, N, H, H, H),
    "val changed": (H, H, H, N, H, H, H, N, H, H, N, N, N),
    "val sample added": (H, H, H, N, H, H, H, N, H, H, N, N, H),
    "val in another file": (H, H, H, N, H, H, H, N, H, H, N, N, N),
    "val holds copies of training images": (H, H, H, N, N, N, N, N, H, H, N, N, N),
}

DATA = Path("D")
CLASSES = "road 10 10 10\ncar 200 0 0\nsky 0 0 200\n"
MACHINE = "--device cpu --threads 1"
TEACHER = f"train-teacher --model kdcache:tiny --size 32x48 --iterations 2 --val-every 2 --batch-size 2 {MACHINE}"
BUILD = f"build-teacher-cache --teacher t --views 1 --shard-records 3 {MACHINE}"
STUDENT = f"train-student --model kdcache:tiny --method kl --iterations 2 --val-every 2 --batch-size 2 {MACHINE}"
LOST = Path("L.zarr/targets/segmentation/values/c/1/0/0/0")
RECIPE = """
title = "x"
[teacher]
model = "kdcache:tiny"
size = "32x48"
iterations = 2
[store]
views = 1
[student]
model = "kdcache:tiny"
iterations = 2
[[arm]]
name = "kl"
method = "kl"
[show]
num = 1
"""


@dataclass(frozen=True)
class Ended:
    """How a verb ended: its exit code, and all that it printed."""

    code: int
    text: str


@dataclass(frozen=True)
class Verb:
    """A column.

    Attributes:
        run: does it, in the folder of the world, with the data set's folder.
        needs: what it reads besides the data set.
        code: exit code of a cell that is noticed, unless the row says otherwise.
    """

    run: Callable[[Path], Ended]
    needs: tuple[str, ...]
    code: int


@dataclass(frozen=True)
class Change:
    """A row.

    Attributes:
        make: changes a world, in its folder. Returns the data set's folder, or None if it stays where it is.
        names: what a verb prints that notices it, a pattern.
        codes: exit codes by column, if they are not the column's.
    """

    make: Callable[[pytest.MonkeyPatch], Path | None]
    names: str = "nothing"
    codes: Mapping[str, int] = field(default_factory=dict)


def kdcache(text: str) -> Ended:
    """Run the command line in this process, on lines that are long enough to break no message."""
    out = io.StringIO()
    widths, deterministic = (OUT.width, ERRORS.width), torch.are_deterministic_algorithms_enabled()
    OUT.width = ERRORS.width = 1000
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out), pytest.raises(SystemExit) as ended:
            main(text.split())
    finally:
        OUT.width, ERRORS.width = widths
        torch.use_deterministic_algorithms(deterministic)
    return Ended(int(ended.value.code or 0), out.getvalue())


def sweep(data: Path) -> Ended:
    """Do a sweep but for its tables, and print the jobs that were done."""
    done = list[str]()

    class Watching(Watcher):
        def finished(self, job: Job, number: int, total: int, seconds: float) -> None:
            done.append(job.name)

    def run(job: Job) -> None:
        ended = kdcache(" ".join(job.next_words))
        if ended.code:
            problem, _, fix = ended.text.rpartition("fix: ")
            raise KDCacheError(f"{job.name} failed: {problem}", fix=fix)

    planned = plan_sweep(read_recipe("sweep.toml"), str(data), Path("sw"), flags_of(typer.main.get_command(app)))
    planned = replace(planned, jobs=tuple(job for job in planned.jobs if job.done is not None))
    try:
        run_jobs(planned, run, watcher=Watching())
    except KDCacheError as error:
        return Ended(2, str(error))
    return Ended(0, f"done: {', '.join(done)}")


VERBS: Mapping[str, Verb] = {
    "build again (finished)": Verb(lambda data: kdcache(f"{BUILD} --data {data} --out P.zarr"), ("t", "P.zarr"), 2),
    "build continued (half built)": Verb(
        lambda data: kdcache(f"{BUILD} --data {data} --out H.zarr"), ("t", "H.zarr"), 2
    ),
    "repair (a shard lost)": Verb(lambda data: kdcache(f"{BUILD} --data {data} --out L.zarr"), ("t", "L.zarr"), 2),
    "train-teacher --resume": Verb(
        lambda data: kdcache(f"{TEACHER} --data {data} --val {data} --out t-half --resume"), ("t-half",), 2
    ),
    "train-student --data (pixels stored)": Verb(
        lambda data: kdcache(f"{STUDENT} --cache P.zarr --data {data} --val {data} --out new"), ("P.zarr",), 2
    ),
    "train-student --data (pixels source)": Verb(
        lambda data: kdcache(f"{STUDENT} --cache S.zarr --data {data} --val {data} --out new"), ("S.zarr",), 2
    ),
    "train-student --val of the same data": Verb(
        lambda data: kdcache(f"{STUDENT} --cache P.zarr --val {data} --out new"), ("P.zarr",), 0
    ),
    "train-student --resume": Verb(
        lambda data: kdcache(f"{STUDENT} --cache P.zarr --val {data} --out r-half --resume"), ("P.zarr", "r-half"), 0
    ),
    "verify --data": Verb(lambda data: kdcache(f"verify P.zarr --data {data}"), ("P.zarr",), 1),
    "extend": Verb(
        lambda data: kdcache(f"build-teacher-cache --from P.zarr --data {data} --teacher t --out new.zarr {MACHINE}"),
        ("t", "P.zarr"),
        0,
    ),
    "sweep again": Verb(sweep, ("sw", "sweep.toml"), 2),
    "compare": Verb(lambda data: kdcache(f"compare r --data {data} --repeats 0"), ("r",), 0),
    "evaluate": Verb(lambda data: kdcache(f"evaluate r --data {data} --device cpu"), ("r",), 0),
}


def make_data() -> None:
    """Make a data set of 8 + 3 images, and a recipe of a sweep, in the working folder."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 3)):
        for number in range(count):
            label = rng.integers(0, 3, (4, 6)).repeat(8, 0).repeat(8, 1).astype(np.uint8)
            noise = rng.integers(0, 255, label.shape)
            image = np.stack([label * 60 + 20, 255 - label * 60, noise], -1).astype(np.uint8)
            for kind, array in (("images", image), ("labels", label)):
                path = DATA / kind / split / f"s{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(array).save(path)
    (DATA / "classes.txt").write_text(CLASSES)
    Path("sweep.toml").write_text(RECIPE)


def make_world() -> None:
    """Make a data set and everything that the verbs make of it, in the working folder."""
    make_data()
    for command in (
        f"{TEACHER} --data D --val D --out t",
        f"{TEACHER} --data D --val D --seed 1 --out t-other",
        f"{BUILD} --data D --out P.zarr",
        f"{BUILD} --data D --pixels source --out S.zarr",
        f"{BUILD} --data D --worker 1/2 --out H.zarr",
        f"{STUDENT} --cache P.zarr --val D --out r",
    ):
        ended = kdcache(command)
        assert ended.code == 0, ended.text
    shutil.copytree("P.zarr", "L.zarr")
    LOST.unlink()
    half_trained("t-half", verb="train-teacher", data="D", size=(32, 48))
    half_trained("r-half", verb="train-student", cache="P.zarr", method="kl")
    assert sweep(DATA).code == 0


def half_trained(run: str, **own: object) -> None:
    """Begin a training, and interrupt it after its first step."""
    settings = {
        "model": "kdcache:tiny",
        "iterations": 2,
        "val_every": 2,
        "batch_size": 2,
        "val": "D",
        "device": "cpu",
        "threads": 1,
        **own,
    }

    class Stopping(Observer):
        def advanced(self, step: int) -> None:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(Interrupted):
        train(make_config(**settings), run, observer=Stopping())


def _image(sample: str) -> Path:
    return DATA / "images" / f"{sample}.png"


def _label(sample: str) -> Path:
    return DATA / "labels" / f"{sample}.png"


def _corrected(sample: str) -> None:
    Image.fromarray((np.array(Image.open(_label(sample))) + 1) % 3).save(_label(sample))


def _encoded_again(sample: str) -> None:
    for path in (_image(sample), _label(sample)):
        before = path.read_bytes()
        Image.open(path).save(path, compress_level=0)
        assert path.read_bytes() != before


def _copied(source: str, target: str) -> None:
    shutil.copy(_image(source), _image(target))
    shutil.copy(_label(source), _label(target))


def nothing(_: pytest.MonkeyPatch) -> None:
    pass


def label_corrected(_: pytest.MonkeyPatch) -> None:
    _corrected("train/s3")


def masks_swapped(_: pytest.MonkeyPatch) -> None:
    first, second = _label("train/s4"), _label("train/s5")
    content = first.read_bytes()
    shutil.copy(second, first)
    second.write_bytes(content)


def image_replaced(_: pytest.MonkeyPatch) -> None:
    Image.fromarray(255 - np.array(Image.open(_image("train/s3")))).save(_image("train/s3"))


def sample_added(_: pytest.MonkeyPatch) -> None:
    _copied("train/s1", "train/s9")


def sample_removed(_: pytest.MonkeyPatch) -> None:
    _image("train/s7").unlink()
    _label("train/s7").unlink()


def id_renamed(_: pytest.MonkeyPatch) -> None:
    _image("train/s3").rename(_image("train/z3"))
    _label("train/s3").rename(_label("train/z3"))


def class_renamed(_: pytest.MonkeyPatch) -> None:
    (DATA / "classes.txt").write_text(CLASSES.replace("car", "truck"))


def classes_reordered(_: pytest.MonkeyPatch) -> None:
    road, car, sky = CLASSES.splitlines()
    (DATA / "classes.txt").write_text(f"{road}\n{sky}\n{car}\n")


def class_added(_: pytest.MonkeyPatch) -> None:
    (DATA / "classes.txt").write_text(f"{CLASSES}tree 0 200 0\n")


def label_format_changed(_: pytest.MonkeyPatch) -> None:
    for number in range(8):
        path = _label(f"train/s{number}")
        ids = np.array(Image.open(path))
        if number % 2:
            path.unlink()
            Image.fromarray(ids).save(path.with_suffix(".tif"))
        else:
            palette = Image.fromarray(ids, "P")
            palette.putpalette([10, 10, 10, 200, 0, 0, 0, 0, 200])
            palette.save(path)


def same_content(_: pytest.MonkeyPatch) -> None:
    _encoded_again("train/s3")


def folder_renamed(_: pytest.MonkeyPatch) -> Path:
    return DATA.rename("D2")


def teacher_retrained(_: pytest.MonkeyPatch) -> None:
    for teacher in (Path("t"), Path("sw/teachers/teacher")):
        if teacher.exists():
            shutil.rmtree(teacher)
            shutil.copytree("t-other", teacher)


def library_upgraded(patch: pytest.MonkeyPatch) -> None:
    """Let another Pillow decode each image otherwise by one grey level, from equal files."""
    turned, version = ImageOps.exif_transpose, metadata.version

    def otherwise(image: Image.Image, *, in_place: bool) -> None:
        turned(image, in_place=in_place)
        if image.mode == "RGB":
            image.paste(Image.fromarray(np.asarray(image) ^ np.uint8(1)))

    patch.setattr(ImageOps, "exif_transpose", otherwise)
    patch.setattr(metadata, "version", lambda name: "99.1" if name == "pillow" else version(name))


def val_changed(_: pytest.MonkeyPatch) -> None:
    _corrected("val/s1")


def val_sample_added(_: pytest.MonkeyPatch) -> None:
    _copied("val/s2", "val/s9")


def val_encoded_again(_: pytest.MonkeyPatch) -> None:
    _encoded_again("val/s1")


def val_copied(_: pytest.MonkeyPatch) -> None:
    _copied("train/s3", "val/s1")


_ALL_FAIL = {name: 2 for name in COLUMNS if name != "verify --data"}
_VAL_FAILS = {"train-student --resume": 2}
_VAL_WARNS = {"train-student --data (pixels stored)": 0, "train-student --data (pixels source)": 0}
CHANGES: Mapping[str, Change] = {
    "nothing": Change(nothing),
    "label corrected": Change(label_corrected, r"1 label differs \('s3'\)"),
    "masks swapped": Change(masks_swapped, r"2 labels differ \('s4', 's5'\)"),
    "image replaced": Change(image_replaced, r"1 image differs \('s3'\)"),
    "sample added": Change(sample_added, r"1 sample was added \('s9'\)"),
    "sample removed": Change(sample_removed, r"1 sample was removed \('s7'\)"),
    "id renamed": Change(id_renamed, r"'z3'.*'s3'|'s3'.*'z3'"),
    "class renamed": Change(class_renamed, "truck", _ALL_FAIL),
    "classes reordered": Change(classes_reordered, "road, sky, car", _ALL_FAIL),
    "class added": Change(class_added, "tree", _ALL_FAIL),
    "label format changed": Change(label_format_changed, "'s0', 's1', 's2' and 5 more"),
    "same content in another file": Change(same_content, "'s3'"),
    "folder renamed": Change(folder_renamed),
    "teacher retrained": Change(teacher_retrained, r"teacher\.weights", {"extend": 2}),
    "library upgraded": Change(library_upgraded, "pillow|'s[0-7]'"),
    "val changed": Change(val_changed, r"1 label differs \('s1'\)", _VAL_FAILS),
    "val sample added": Change(val_sample_added, r"1 sample was added \('s9'\)", _VAL_FAILS | {"compare": 2}),
    "val in another file": Change(val_encoded_again, "'s1'", _VAL_FAILS),
    "val holds copies of training images": Change(val_copied, "'s1'", _VAL_FAILS | _VAL_WARNS),
}
