"""Evaluations stored with the weights, and reused while weights and data are unchanged.

Every kind of evaluation has its own file (`evaluation-*.json` in the run's folder) with everything that its numbers
depend on: the SHA-256 of the weights and of the data (every image and label of the split), the model, the size that it
sees, the size at which it is judged, and the class map. If all of them are unchanged, it is as good as a new pass. Next
to it lies an `.npz` of the same name, with the numbers of every image. The JSON has its SHA-256. It holds counts of
segmentation (`ids`, `hits` and `unions`, a row per image, a column per class) and depth metrics (`depth_ids` and
`depth`, a column per metric). Without that file the run is evaluated again.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from kdcache.analysis.runs import Entry, check_classes
from kdcache.bounded import check_unpacked
from kdcache.data import ClassList, Contents, Fit, Fold, Split, place_key, prefetch, read_contents, remembered_digests
from kdcache.data.files import file_digest
from kdcache.display import public
from kdcache.errors import ModelError
from kdcache.files import read_object, replacing, write_whole
from kdcache.heads import RegressionHead
from kdcache.metrics.confusion import without_nan
from kdcache.metrics.data_sets import OnDataSet, common_classes, common_mious
from kdcache.metrics.depth import DepthRange
from kdcache.metrics.evaluate import Progress, TaskMetrics, evaluate_tasks
from kdcache.metrics.evaluators import EVALUATORS, metric_head
from kdcache.metrics.predictions import Inference
from kdcache.metrics.sliding import Framing
from kdcache.metrics.timing import is_out_of_memory
from kdcache.models import SegmentationModel
from kdcache.models.run import split_spec
from kdcache.models.weights import split_choice
from kdcache.run_folder import Run, RunModel
from kdcache.run_samples import judging_notes
from kdcache.settings.shared import DepthSettings, FitChoice, ImageSettings, JudgeSettings
from kdcache.tasks import in_metres


@dataclass(frozen=True)
class EvalSettings:
    """How runs are evaluated.

    Attributes:
        which: weights of a run, such as "best" or "last".
        size: (H, W) in pixels that the models see. None takes each run's size.
        batch_size: images per forward pass.
        device: such as "cpu" or "cuda".
        fresh: evaluate again instead of reusing stored evaluations.
        depth: the depth labels that count.
        fit: how an image of another shape fills `size`: squash, crop or pad. auto takes the fit of each run's training.
        window: (H, W) in pixels of the parts in which the models see an image. None is without windows.
        stride: (H, W) in pixels from one window to the next. None takes two thirds of the window.
    """

    which: str = JudgeSettings.weights
    size: tuple[int, int] | None = None
    batch_size: int = JudgeSettings.batch_size
    device: str = "cpu"
    fresh: bool = False
    depth: DepthSettings = field(default_factory=DepthSettings)
    fit: FitChoice = ImageSettings.fit
    window: tuple[int, int] | None = None
    stride: tuple[int, int] | None = None

    def framing(self, trained: Fit = "squash") -> Framing:
        """Return how an image is fitted to a model's input size, or cut into windows.

        `trained` is the fit of the model's training, for fit "auto". Raises: RecipeError for a stride without windows,
        or one that leaves gaps between windows.
        """
        images = ImageSettings(size=self.size, fit=self.fit)
        return Framing.of(images, JudgeSettings(window=self.window, stride=self.stride), trained)

    def load(self, entry: Entry, classes: ClassList) -> tuple[SegmentationModel, RunModel]:
        """Load the model of `entry`, a run or SPEC@FILE. Return the model and its description.

        The size in the description is the size that these settings choose. `classes` are the classes of the data.

        Raises: MismatchError for a model with other classes. RecipeError for a run without weights. ModelError for
            weights that do not fit.
        """
        return entry.load(classes, self.which, self.size or (self.window if entry.run is None else None))


@dataclass(frozen=True)
class Evaluation:
    """The result of evaluating one run on a split.

    Attributes:
        metrics: the metrics of each task.
        reused: whether the metrics come from a stored evaluation.
        notes: warnings for the reader, such as images that the run was trained on.
    """

    metrics: TaskMetrics
    reused: bool
    notes: tuple[str, ...] = ()


def data_digest(split: Split, threads: int = 2) -> str:
    """Return the SHA-256 of a split: class names, ids, and all labelled images and labels.

    Files that are unchanged since an earlier call are not read again. `threads` is the number of threads that read
    files.
    """
    digest = hashlib.sha256(split.digest().encode())
    with remembered_digests(split.data) as of_file:
        read = prefetch(
            lambda index: split.content_digests(index, of_file), split.labelled(), threads=threads, ahead=16
        )
        for contents in read:
            digest.update(f"{' '.join(map(str, contents))}\n".encode())
    return digest.hexdigest()


def evaluate_run(
    entry: Entry,
    split: Split,
    digest: str,
    judging: EvalSettings,
    progress: Progress | None = None,
    fold: Fold | None = None,
    contents: Callable[[Split], Contents] = read_contents,
) -> Evaluation:
    """Evaluate a run or SPEC@FILE on a split, or read its stored evaluation if nothing has changed.

    Args:
        entry: the run or SPEC@FILE.
        split: the samples.
        digest: the split's digest from `data_digest`. A stored evaluation must have the same.
        judging: how to evaluate.
        progress: called after each batch with (images done, images in total).
        fold: the fold that `split` is, if it is a part of another split, else None.
        contents: function that returns the digests of a split's images and labels.
    Raises: MismatchError if the run has other classes. DataError without labels. ModelError if memory is too small.
    """
    run = entry.run
    if run is None:
        return Evaluation(_evaluate(entry, split, judging, progress), reused=False)
    description = run.model
    check_classes(description, split.classes, f"{split.data}, split {split.split!r}")
    choice, weights = weights_of(run, judging.which)
    record = Record.of(
        description,
        weights,
        split,
        digest,
        judging.size or description.size,
        which=choice,
        fold=fold,
        depth=judged_range(description.judged_heads, split, judging.depth),
        framing=judging.framing(description.fit),
    )
    metrics = None if judging.fresh else kept_metrics(run.folder, record, split.classes.names)
    notes = judging_notes(run.folder, split, contents)
    if metrics is not None:
        return Evaluation(metrics, reused=True, notes=notes)
    metrics = _evaluate(entry, split, judging, progress)
    note = keep(record, run.folder, entry.text, metrics, own_size=record.size == description.size)
    return Evaluation(metrics, reused=False, notes=notes if note is None else (*notes, note))


IMAGES = ".npz"
"""The suffix of the counts of every image, beside an evaluation."""
_UNREADABLE = (OSError, ValueError, KeyError, TypeError, OverflowError, MemoryError)
"""Errors of reading another file, or one of another version."""
_NAMES = ("weights", "data", "place", "split", "fold")
"""Entries of a record in JSON that may differ between equal evaluations."""


@dataclass(frozen=True)
class Record:
    """The settings and digests on which an evaluation's metrics depend (not a record of a cache).

    Two evaluations with equal `identity` have equal metrics.

    Attributes:
        which: weights of a run, such as "best", or None for SPEC@FILE.
        data, split: the data set and its split.
        place: a digest of the path of the data set, because two folders may have the same name in `data`.
        fold: the fold of the split that was evaluated, or None for the whole split.
        spec, mean, std: the model's spec, and the mean and standard deviation that normalise its pixels.
        weights_sha256: digest of the file of weights, or None without a file.
        data_sha256: the `data_digest` of the split.
        size: (H, W) in pixels that the model sees.
        at_size: whether labels were resized to `size`. Scores then differ from published ones.
        class_map_sha256: digest of the class map, or None without one.
        depth: the depth labels that count, or None if depth is not evaluated.
        framing: how an image is fitted to `size`, or cut into windows. By default it is squashed.
    """

    which: str | None
    data: str
    place: str
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
    depth: DepthRange | None = None
    framing: Framing = Framing()

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
        depth: DepthRange | None = None,
        framing: Framing | None = None,
    ) -> "Record":
        """Return the record of an evaluation. It reads the files of weights and class map for their digests.

        Args:
            description: describes the model, as `Entry.load` returns it.
            weights: the file of weights, or None if the weights come from a library.
            split: the evaluated split.
            digest: the `data_digest` of `split`.
            size: (H, W) in pixels that the model sees.
            which: weights of a run, such as "best", or None for SPEC@FILE.
            fold: the evaluated fold of the split, or None for the whole split.
            at_size: whether labels are resized to `size`.
            class_map: the class map's file, or None without a class map.
            depth: the depth labels that count, or None if depth is not evaluated.
            framing: how images are fitted to `size`. None squashes them.
        """
        return cls(
            which,
            public(split.data),
            place_key(split.data),
            split.split,
            fold,
            public(description.spec),
            description.mean,
            description.std,
            None if weights is None else file_digest(weights),
            digest,
            size,
            at_size,
            None if class_map is None else file_digest(class_map),
            depth,
            framing or Framing(),
        )

    @property
    def identity(self) -> dict[str, Any]:
        """The part of `to_json` that decides whether stored metrics can be reused.

        They can if the stored and the wanted evaluation have equal identities. "weights",
        "data", "place", "split" and "fold" are left out, because digests identify the same things.
        """
        return {key: value for key, value in self.to_json().items() if key not in _NAMES}

    def to_json(self) -> dict[str, Any]:
        """Return the fields as the JSON values that an evaluation file has."""
        fields: dict[str, Any] = json.loads(json.dumps(asdict(self)))  # its tuples are lists, as in a file
        if self.depth is None:
            del fields["depth"]
        if self.framing == Framing():  # as in the first evaluations
            del fields["framing"]
        fold = None if self.fold is None else str(self.fold)
        return {"weights": fields.pop("which"), **fields, "fold": fold}

    def name(self, *, own_size: bool) -> str:
        """Return the name of the evaluation's file, without a suffix, such as "evaluation-val".

        `own_size` is True if the model sees images at the size of its training. False adds the size to the name.
        """
        parts = [f"evaluation-{self.split}"]
        if self.fold is not None:
            parts += [f"fold-{self.fold.number}-of-{self.fold.folds}"]
            parts += [] if self.fold.by is None else [f"by-{hashlib.sha256(self.fold.by.encode()).hexdigest()[:8]}"]
        parts += [self.which] if self.which not in (None, "best") else []
        parts += [] if own_size else [f"{self.size[0]}x{self.size[1]}"]
        parts += ["at-size"] if self.at_size else []
        parts += [] if self.framing.fit == "squash" else [self.framing.fit]
        if self.framing.window is not None:
            sizes = (self.framing.window, self.framing.steps)
            parts += ["window", *(f"{height}x{width}" for height, width in sizes)]
        parts += [] if self.class_map_sha256 is None else [f"map-{self.class_map_sha256[:8]}"]
        if self.depth not in (None, DepthRange()):
            parts.append(f"depth-{self.depth.min_depth:g}-{self.depth.max_depth:g}")
            parts += [] if self.depth.crop == "none" else [self.depth.crop]
        return "-".join(parts)


def keep(record: Record, folder: Path, run: str, metrics: TaskMetrics, *, own_size: bool = True) -> str | None:
    """Store an evaluation in a run's folder, and replace an earlier one with the same settings.

    Args:
        record: the settings of the evaluation.
        folder: the run's folder.
        run: the run's name as the user wrote it.
        metrics: the result.
        own_size: whether the model sees images at the size of its training. If not, the file's name has the size.
    Returns: a warning if the file cannot be written, else None.
    """
    path = folder / f"{file_name(record, folder, run, own_size=own_size)}.json"
    try:
        write_evaluation(record, path, run, metrics)
    except OSError as error:  # it costs the next pass, no more
        return f"the evaluation of {folder} could not be kept there ({error.strerror})"
    return None


def file_name(record: Record, folder: Path, run: str, *, own_size: bool = True) -> str:
    """Return the name for an evaluation's file in `folder`, without a suffix.

    It is `record.name`, with a digest if a file of that name is of another data set, SPEC@FILE or image size. `run` is
    the run or SPEC@FILE as the user wrote it. `own_size` is True if the model sees images at the size of its training.
    False adds the size to the name.
    """
    name = record.name(own_size=own_size)
    earlier = read_object(folder / f"{name}.json")
    known, now = ("place", record.place) if "place" in earlier else ("data", record.data)  # as earlier versions had it
    other_data = earlier.get("data_sha256") != record.data_sha256 and public(str(earlier.get(known))) != now
    # SPEC@FILE has no other identity than its name, and no size of its own.
    model_name = [] if record.which is not None else [run, list(record.size)]
    other_model = model_name and [public(str(earlier.get("run"))), earlier.get("size")] != [
        public(run),
        list(record.size),
    ]
    if earlier and (other_data or other_model):
        name += f"-{hashlib.sha256(json.dumps([record.place, *model_name]).encode()).hexdigest()[:8]}"
    return name


def weights_of(run: Run | str, which: str) -> tuple[str | None, Path | None]:
    """Return the name and the file of the weights to evaluate.

    The name is `which`, or WEIGHTS if `run` is RUN@WEIGHTS. For SPEC@FILE, the name is None. The file is None if the
    weights come from a library.

    Args:
        run: a run, or its folder, RUN@WEIGHTS or SPEC@FILE as text.
        which: weights of a run, such as "best".
    """
    parts = split_spec(run) if isinstance(run, str) else None
    if parts is not None:
        file = split_choice(parts[1])[0]
        return None, file if file.is_file() else None
    run = Run.open(run) if isinstance(run, str) else run
    return run.which or which, run.weights(which)


def write_evaluation(record: Record, path: Path, run: str, metrics: TaskMetrics) -> None:
    """Write an evaluation as JSON, and its images' counts next to it as .npz. Each file is complete or missing.

    Args:
        record: the settings of the evaluation.
        path: the JSON file.
        run: the run's name as the user wrote it.
        metrics: the result.

    Raises: OSError.
    """
    images = None
    if arrays := _arrays_of_images(metrics):
        with replacing(path.with_suffix(IMAGES)) as partial, partial.open("wb") as file:
            np.savez_compressed(file, **arrays)  # given a name, numpy would add a suffix
        images = file_digest(path.with_suffix(IMAGES))
    content = {"run": public(run), **record.to_json(), "images_sha256": images, **metrics.to_json()}
    write_whole(path, json.dumps(content, indent=1) + "\n")


def name_of_several(records: Sequence[Record], run: str, *, own_size: bool = True) -> str:
    """Return the name of the file for an evaluation on several data sets, without a suffix.

    `records` has a record for each data set, and `run` is the run's name as the user wrote it. `own_size` is True if
    the model sees images at the size of its training. False puts the size into the digest.
    """
    kinds = [[record.place, record.name(own_size=own_size), record.which or run] for record in records]
    return f"evaluations-{hashlib.sha256(json.dumps(kinds).encode()).hexdigest()[:8]}"


def write_evaluations(records: Sequence[Record], path: Path, run: str, results: Sequence[OnDataSet]) -> None:
    """Write a run's evaluations on several data sets as one JSON file, completely or not at all.

    Args:
        records: the settings of the evaluation on each data set.
        path: the JSON file.
        run: the run's name as the user wrote it.
        results: the result on each data set, in the order of `records`.

    Raises: OSError if the file cannot be written.
    """
    content = {
        "run": public(run),
        "common_classes": list(common_classes(results)),
        "common_miou": [common_mious(results).get(number) for number in range(len(results))],
        "data_sets": [record.to_json() | result.to_json() for record, result in zip(records, results, strict=True)],
    }
    write_whole(path, json.dumps(without_nan(content), indent=1) + "\n")


def _arrays_of_images(metrics: TaskMetrics) -> dict[str, Any]:
    """Return the numbers of single images, as the file next to an evaluation has them, or {} if they were not kept."""
    images = [metrics_of.images for metrics_of in metrics.by_task.values() if metrics_of.images is not None]
    return {name: array for image_metrics in images for name, array in image_metrics.arrays.items()}


def _with_images(metrics: TaskMetrics, path: Path, sha256: str) -> TaskMetrics:
    """Return metrics with the per-image numbers of the .npz file. Raises: OSError, ValueError, KeyError."""
    if not path.is_file() or file_digest(path) != sha256:
        raise ValueError(f"{path} is of another evaluation")
    check_unpacked(path)
    with np.load(path) as content:
        images: dict[str, Any] = {task: EVALUATORS[task].images.of_arrays(content) for task in metrics.by_task}
    replaced: dict[str, Any] = {
        task: replace(metrics_of, images=images[task]) for task, metrics_of in metrics.by_task.items()
    }
    return TaskMetrics(**replaced)


def judged_range(heads: Mapping[str, RegressionHead], split: Split, settings: DepthSettings) -> DepthRange | None:
    """Return the range and crop of the depth labels that count when a model is evaluated on a split.

    None if the split has no depth in metres, or the model does not predict it. `heads` are the model's numeric heads by
    name. `settings` are the limits and the crop that the user chose.
    """
    tasks = [task for task in split.tasks if in_metres([task])]
    judged = [head for task in tasks if (head := metric_head(heads, task)) is not None]
    return DepthRange.of(judged[0], settings) if judged else None


def _evaluate(entry: Entry, split: Split, judging: EvalSettings, progress: Progress | None) -> TaskMetrics:
    model, description = judging.load(entry, split.classes)
    depth = None if judged_range(description.judged_heads, split, judging.depth) is None else judging.depth
    with memory_errors(judging.device, judging.batch_size):
        return evaluate_tasks(
            model.to(judging.device),
            split,
            Inference(description.size, judging.device, judging.batch_size, framing=judging.framing(description.fit)),
            depth=depth,
            progress=progress,
        )


@contextmanager
def memory_errors(device: str, batch_size: int) -> Iterator[None]:
    """Convert an out-of-memory error in a with block to a ModelError that suggests a smaller batch.

    The message names the model's `device` and `batch_size`.

    Raises: ModelError.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        why = str(error).partition("\n")[0] or "no memory"
        less = f"--batch-size {batch_size // 2}" if batch_size > 1 else "a smaller --size, or --device cpu"
        raise ModelError(
            f"Out of memory: {batch_size} images at a time on {device} ({why})",
            fix=f"Use {less}",
        ) from error


def kept_metrics(folder: Path, record: Record, class_names: tuple[str, ...]) -> TaskMetrics | None:
    """Return the metrics of a stored evaluation with the same settings as `record`, or None if there is none.

    An evaluation whose file cannot be read is ignored.

    Args:
        folder: the run's folder, where evaluations are stored.
        record: the settings of the wanted evaluation. A stored evaluation must have the same `Record.identity`.
        class_names: the classes of the data. Evaluations of segmentation with other classes are ignored.
    """
    identity = record.identity
    for path in sorted(folder.glob("evaluation-*.json")):
        content = read_object(path)
        try:
            same = all(content[key] == value for key, value in identity.items())
            if same and content.get("framing") == identity.get("framing"):
                metrics = TaskMetrics.of_json(content)
                if metrics.segmentation is None or metrics.segmentation.class_names == class_names:
                    return _with_images(metrics, path.with_suffix(IMAGES), content["images_sha256"])
        except _UNREADABLE:
            continue
    return None
