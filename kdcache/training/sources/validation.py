"""Open and check the data that a training is validated on."""

import itertools
from collections.abc import Sequence

import numpy as np

from kdcache.data import ClassList, Contents, Split, fold_alone, open_split, read_contents, shared_sequences
from kdcache.errors import MismatchError
from kdcache.run_samples import RunSamples
from kdcache.training.config import TrainConfig
from kdcache.training.input.dataset import DrawnDataset


def open_validation(config: TrainConfig) -> Split | None:
    """Return the split to validate on, or only its fold `--val-fold`. None without `--val`."""
    if config.data.val is None:
        return None
    split = open_split(config.data.val, config.data.val_split)
    return split if config.validated_fold is None else fold_alone(split, *config.validated_fold)


def check_validation(config: TrainConfig, classes: ClassList, split: Split) -> None:
    """Raise MismatchError if training and validation have different classes. Data without classes pass."""
    if classes.names and split.classes.names and split.classes.names != classes.names:
        raise MismatchError(
            f"Training and validation have different classes: {', '.join(split.classes.names)} in {config.data.val} "
            f"against {', '.join(classes.names)}",
            fix="Give the validation data of the same class list.",
        )


def judged_by_its_own(samples: RunSamples) -> str | None:
    """Return a warning with the number of validation images that are also trained on, or None if there are none."""
    shared = () if samples.validation is None else samples.trained_on(samples.validation)
    if samples.validation is None or not shared:
        return None
    return (
        f"warning: {len(shared)} of {len(samples.validation.ids)} validation images are also trained on, such as "
        f"{shared[0]!r}: the score says little about other images. Fix: take them out of one of the two. If you "
        "validate on a fold with --val-fold I/K, leave this fold out of the training with --fold I/K"
    )


def read_samples(datasets: Sequence[DrawnDataset], val: Split | None) -> RunSamples:
    """Return digests of the images and labels to learn from and to validate on.

    Args:
        datasets: the samples of each stream.
        val: the validation data, or None.
    Raises: DataError for a file that cannot be read. CorruptError for a damaged cache.
    """
    streams = tuple(map(_drawn_contents, datasets))
    return RunSamples(datasets[0].classes.names, streams, None if val is None else read_contents(val))


def _drawn_contents(dataset: DrawnDataset) -> Contents | None:
    """Return digests of the samples of a stream, or None for a cache that does not record them."""
    numbers, cache = list(dataset.indices), dataset.cache
    if cache is None:
        assert dataset.split is not None
        return read_contents(dataset.split, numbers)
    if not cache.manifest.records_contents:
        return None
    records = [cache.manifest.record(number) for number in numbers]
    image, label = (cache.column(name)[records] for name in ("image_digest", "label_digest"))
    return Contents(tuple(cache.ids[number] for number in numbers), image, label, np.zeros_like(image))


def shared_with_judge(config: TrainConfig, dataset: DrawnDataset, val: Split | None) -> str | None:
    """Return a warning that names the sequences (videos) with images in training and validation, or None.

    Validation means the validation data and the fold that the training leaves out. `--folds-by` says which ids form a
    sequence. Without it, ids with regular numbers, such as the frames of a video, do (see `shared_sequences`).

    Args:
        config: the stream's settings.
        dataset: the stream's samples.
        val: the validation data, or None.
    """
    source = dataset.cache or dataset.split
    assert source is not None
    validations, validated = [], list[str]()
    if val is not None:
        validations.append("validation")
        validated += val.ids
    if config.left_out is not None:
        validations.append(f"fold {config.data.fold}")
        validated += itertools.compress(source.ids, config.left_out.holds(source.ids))
    judged = list(dict.fromkeys(validated))
    shared = shared_sequences(source.ids, dataset.indices, judged, config.data.folds_by)
    if not shared:
        return None
    labelled = shared_sequences(source.ids, dataset.labelled, judged, config.data.folds_by)
    labels = {sequence.name: sequence.trained for sequence in labelled}
    some = [
        f"{name} ({count} images there, {trained} in training, {labels.get(name, 0)} of these with a label)"
        for name, count, trained in shared[:5]
    ]
    more = f" and {len(shared) - len(some)} more" if len(shared) > len(some) else ""
    return (
        f"warning: training shares sequences with {' and '.join(validations)}: {', '.join(some)}{more}. Frames of one "
        "video look alike, so the score says little about other videos. Fix: validate on other sequences. "
        "--folds-by PATTERN (for example '^(.+)_') keeps the frames of a sequence in one fold"
    )
