"""Evaluations that are kept beside the weights, and used again while weights and data are the same.

Every kind of evaluation has a file of its own (`evaluation-*.json` in the run's folder), with everything that its
numbers depend on. It counts when the SHA-256 of the weights, that of the data (every image and label of the split), the
model, the size that it sees, the size at which it is judged and the class map are those of today; then it is as good as
a new pass. Beside it lies an `.npz` of the same name with the counts of every image (`ids`, `hits` and `unions`, a row
per image and a column per class), whose SHA-256 it has; without that file the evaluation is made anew.
"""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from kdcache.analysis.runs import Entry
from kdcache.data import Fold, Split, prefetch
from kdcache.data.files import file_digest
from kdcache.errors import ModelError
from kdcache.files import read_object, replacing, write_whole
from kdcache.metrics.confusion import ImageCounts, Metrics
from kdcache.metrics.evaluate import Progress, evaluate_model
from kdcache.metrics.oom import is_out_of_memory
from kdcache.models.run import split_spec
from kdcache.run_folder import Run, RunModel
from kdcache.settings.shared import JudgeSettings


@dataclass(frozen=True)
class Judging:
    """How runs are evaluated.

    Attributes:
        which: weights of a run, such as `best`.
        size: (H, W) that the models see; None is that of each run.
        fresh: evaluate also what is kept.
    """

    which: str = JudgeSettings.weights
    size: tuple[int, int] | None = None
    batch_size: int = JudgeSettings.batch_size
    device: str = "cpu"
    fresh: bool = False


@dataclass(frozen=True)
class Evaluation:
    """Metrics of one run; `reused` when an earlier pass had them; `note` when they could not be kept."""

    metrics: Metrics
    reused: bool
    note: str | None = None


def data_digest(split: Split, threads: int = 2) -> str:
    """SHA-256 over class names, ids, and the contents of every labelled image and its label; reads them all."""
    labelled = [index for index in range(len(split)) if split.has_label(index)]
    digest = hashlib.sha256(split.digest().encode())
    for image, label in prefetch(split.content_digests, labelled, threads=threads, ahead=16):
        digest.update(f"{image} {label}\n".encode())
    return digest.hexdigest()


def evaluate_run(
    entry: Entry,
    split: Split,
    digest: str,
    judging: Judging,
    progress: Progress | None = None,
    fold: Fold | None = None,
) -> Evaluation:
    """Metrics of a run, or of SPEC@FILE, on a split, from an earlier evaluation where that is the same.

    Args:
        digest: `data_digest` of the split.
        fold: the fold that the split is of another one.
    Raises: MismatchError for other classes; DataError without labels; ModelError when memory does not suffice.
    """
    run = entry.run
    if run is None:
        return Evaluation(_evaluate(entry, split, judging, progress), reused=False)
    description = run.model
    description.check_classes(split.classes.names, f"{split.data}, split {split.split!r}")
    which, weights = weights_of(run, judging.which)
    record = Record.of(description, weights, split, digest, judging.size or description.size, which=which, fold=fold)
    metrics = None if judging.fresh else _kept(run.folder, record.identity, split.classes.names)
    if metrics is not None:
        return Evaluation(metrics, reused=True)
    metrics = _evaluate(entry, split, judging, progress)
    note = keep(record, run.folder, entry.text, metrics, own_size=record.size == description.size)
    return Evaluation(metrics, reused=False, note=note)


IMAGES = ".npz"
"""The suffix of the counts of every image, beside an evaluation."""
_NAMES = ("weights", "data", "split", "fold")
"""Entries of a record in JSON that may differ between equal evaluations."""


@dataclass(frozen=True)
class Record:
    """Everything that the numbers of an evaluation depend on.

    Attributes:
        which: weights of a run, such as `best`; None for other weights.
        fold: the fold of the split that was judged; None for all of it.
        weights_sha256: None for weights that no file holds.
        size: (H, W) that the model sees. at_size: whether labels were resized to it, which is no published mIoU.
        class_map_sha256: digest of the map from its classes to those of the data.
    """

    which: str | None
    data: str
    split: str
    fold: Fold | None
    spec: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    weights_sha256: str | None
    data_sha256: str
    size: tuple[int, int]
    at_size: bool = False
    class_map_sha256: str | None = None

    @classmethod
    def of(
        cls,
        description: RunModel,
        weights: Path | None,
        split: Split,
        digest: str,
        size: tuple[int, int],
        *,
        which: str | None,
        fold: Fold | None = None,
        at_size: bool = False,
        class_map: Path | None = None,
    ) -> "Record":
        """The record of an evaluation; files are read for their digests."""
        return cls(
            which,
            split.data,
            split.split,
            fold,
            description.spec,
            description.mean,
            description.std,
            None if weights is None else file_digest(weights),
            digest,
            size,
            at_size,
            None if class_map is None else file_digest(class_map),
        )

    @property
    def identity(self) -> dict[str, Any]:
        """The fields that must be equal for numbers to count as those of a new pass; names may differ."""
        return {key: value for key, value in self.to_json().items() if key not in _NAMES}

    def to_json(self) -> dict[str, Any]:
        fields: dict[str, Any] = json.loads(json.dumps(asdict(self)))  # its tuples are lists, as in a file
        fold = None if self.fold is None else str(self.fold)
        return {"weights": fields.pop("which"), **fields, "fold": fold}

    def name(self, *, own_size: bool) -> str:
        """The name of its file, without an ending; each kind has its own.

        Args:
            own_size: whether the model sees images at the size that it was trained at.
        """
        parts = [f"evaluation-{self.split}"]
        if self.fold is not None:
            parts += [f"fold-{self.fold.number}-of-{self.fold.folds}"]
            parts += [] if self.fold.by is None else [f"by-{hashlib.sha256(self.fold.by.encode()).hexdigest()[:8]}"]
        parts += [self.which] if self.which not in (None, "best") else []
        parts += [] if own_size else [f"{self.size[0]}x{self.size[1]}"]
        parts += ["at-size"] if self.at_size else []
        parts += [] if self.class_map_sha256 is None else [f"map-{self.class_map_sha256[:8]}"]
        return "-".join(parts)


def keep(record: Record, folder: Path, run: str, metrics: Metrics, *, own_size: bool = True) -> str | None:
    """Write an evaluation into a folder, whole or not at all, over the last of its kind; a note if that cannot be.

    Args:
        run: its name as the user wrote it.
    """
    path = folder / f"{file_name(record, folder, run, own_size=own_size)}.json"
    try:
        write_evaluation(record, path, run, metrics)
    except OSError as error:  # it costs the next pass, no more
        return f"the evaluation of {folder} could not be kept there ({error.strerror})"
    return None


def file_name(record: Record, folder: Path, run: str, *, own_size: bool = True) -> str:
    """The file of an evaluation, without an ending: its kind's name; beside a file of other data or weights.

    What has changed in its place is evaluated anew and replaced: the same data's labels, a run's own weights.
    """
    name = record.name(own_size=own_size)
    earlier = read_object(folder / f"{name}.json")
    other_data = earlier.get("data_sha256") != record.data_sha256 and earlier.get("data") != record.data
    # SPEC@FILE has no other identity than its name, and no size of its own.
    other_model = record.which is None and (earlier.get("run"), earlier.get("size")) != (run, list(record.size))
    if earlier and (other_data or other_model):
        digest = hashlib.sha256(json.dumps([record.identity, record.data, run]).encode()).hexdigest()
        name += f"-{digest[:8]}"
    return name


def weights_of(run: Run | str, which: str) -> tuple[str | None, Path | None]:
    """The weights of a run, `which` unless others were named with it: their name and their file.

    Of SPEC@FILE the name is None; of the library's own, so is the file.
    """
    parts = split_spec(run) if isinstance(run, str) else None
    if parts is not None:
        return None, Path(parts[1]) if Path(parts[1]).is_file() else None
    run = Run.open(run) if isinstance(run, str) else run
    return run.which or which, run.weights(which)


def write_evaluation(record: Record, path: Path, run: str, metrics: Metrics) -> None:
    """Write an evaluation, each file whole or not at all. Raises: OSError."""
    images = None
    if metrics.images is not None:
        with replacing(path.with_suffix(IMAGES)) as partial:
            _write_images(partial, metrics.images)
        images = file_digest(path.with_suffix(IMAGES))
    content = {"run": run, **record.to_json(), "images_sha256": images, **metrics.to_json()}
    write_whole(path, json.dumps(content, indent=1) + "\n")


def _write_images(path: Path, images: ImageCounts) -> None:
    with path.open("wb") as file:  # given a name, numpy would add a suffix
        hits, unions = images.hits.astype(np.uint32), images.unions.astype(np.uint32)
        np.savez_compressed(file, ids=np.array(images.ids), hits=hits, unions=unions)


def _read_images(path: Path, sha256: str) -> ImageCounts:
    """Read the counts beside an evaluation. Raises: OSError, ValueError, KeyError when they are not those."""
    if not path.is_file() or file_digest(path) != sha256:
        raise ValueError(f"{path} is of another evaluation")
    with np.load(path) as content:
        hits, unions = (content[name].astype(np.int64) for name in ("hits", "unions"))
        return ImageCounts(tuple(content["ids"].tolist()), hits, unions)


def _evaluate(entry: Entry, split: Split, judging: Judging, progress: Progress | None) -> Metrics:
    model, description = entry.load(split.classes, judging.which, judging.size)
    with memory_errors(judging.device, judging.batch_size):
        return evaluate_model(
            model.to(judging.device),
            split,
            description.size,
            device=judging.device,
            batch_size=judging.batch_size,
            progress=progress,
        )


def metrics_of(content: Mapping[str, Any]) -> Metrics:
    """The metrics that `Metrics.to_json` described. Raises: KeyError, TypeError for other content."""
    classes = content["classes"]
    return Metrics(
        class_names=tuple(str(row["name"]) for row in classes),
        iou=tuple(_number(row["iou"]) for row in classes),
        acc=tuple(_number(row["acc"]) for row in classes),
        label_pixels=tuple(int(row["label_pixels"]) for row in classes),
        miou=_number(content["miou"]),
        macc=_number(content["macc"]),
        aacc=_number(content["aacc"]),
    )


@contextmanager
def memory_errors(device: str, batch_size: int) -> Iterator[None]:
    """A context that names the remedy when a batch does not fit into memory. Raises: ModelError."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        words = str(error)
        less = f"--batch-size {batch_size // 2}" if batch_size > 1 else "a smaller --size, or --device cpu"
        raise ModelError(
            "a batch of the evaluation must fit into memory",
            received=f"{batch_size} images at a time on {device}: {words.splitlines()[0] if words else 'no memory'}",
            remedy=f"use {less}",
        ) from error


def _kept(folder: Path, identity: Mapping[str, Any], class_names: tuple[str, ...]) -> Metrics | None:
    for path in sorted(folder.glob("evaluation-*.json")):
        content = read_object(path)
        try:
            if all(content[key] == value for key, value in identity.items()):
                metrics = metrics_of(content)
                if metrics.class_names == class_names:
                    return replace(metrics, images=_read_images(path.with_suffix(IMAGES), content["images_sha256"]))
        except (OSError, ValueError, KeyError, TypeError):  # another file, or one of another version
            continue
    return None


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)
