"""What a training is validated on."""

import itertools

from kdcache.data import ClassList, Split, fold_alone, open_split, shared_sequences
from kdcache.errors import MismatchError
from kdcache.train.config import TrainConfig
from kdcache.train.input.dataset import DrawnDataset


def open_validation(config: TrainConfig) -> Split | None:
    """Open the split that a training is validated on, or its fold `--val-fold`; None without `--val`."""
    if config.val is None:
        return None
    split = open_split(config.val, config.val_split)
    return split if config.validated_fold is None else fold_alone(split, *config.validated_fold)


def check_validation(config: TrainConfig, classes: ClassList, split: Split) -> None:
    """Raises: MismatchError when training and validation have other classes; either may have none."""
    if classes.names and split.classes.names and split.classes.names != classes.names:
        raise MismatchError(
            "training and validation have the same classes in the same order",
            received=f"{', '.join(split.classes.names)} in {config.val} against {', '.join(classes.names)}",
            remedy="give the validation data of the same class list",
        )


def judged_by_its_own(dataset: DrawnDataset, val: Split | None) -> str | None:
    """A warning that counts the images of the validation data that the training learns from, or None.

    Of a store that keeps its pixels nothing is known here, for its images have no files.
    """
    if val is None or dataset.split is None:
        return None
    trained = {dataset.split.origin(index) for index in dataset.indices}
    shared = [name for index, name in enumerate(val.ids) if val.origin(index) in trained]
    if not shared:
        return None
    return (
        f"{len(shared)} of {len(val)} validation images are trained on too, such as {shared[0]!r}: the score says "
        "little about other images. Remedy: take them out of one of the two; where --val-fold I/K judges a fold, leave "
        "it out of the training with --fold I/K"
    )


def shared_with_judge(config: TrainConfig, dataset: DrawnDataset, val: Split | None) -> str | None:
    """A warning that names the sequences of which the training sees some samples and is judged on others, or None.

    The judge is the validation data, and the fold that is left out. `shared_sequences` has the rule for ids without
    `--folds-by`.
    """
    source = dataset.cache or dataset.split
    assert source is not None
    judges, judged = [], list[str]()
    if val is not None:
        judges.append("validation")
        judged += val.ids
    if config.left_out is not None:
        judges.append(f"fold {config.fold}")
        judged += itertools.compress(source.ids, config.left_out.holds(source.ids))
    shared = shared_sequences(source.ids, dataset.indices, list(dict.fromkeys(judged)), config.folds_by)
    if not shared:
        return None
    some = [f"{name} ({count} judged, {trained} trained on)" for name, count, trained in shared[:5]]
    more = f" and {len(shared) - len(some)} more" if len(shared) > len(some) else ""
    return (
        f"training and what judges it ({' and '.join(judges)}) share sequences: {', '.join(some)}{more}. Frames of one "
        "video are alike, so the score says little about other videos. Remedy: judge on other sequences, which "
        "--folds-by PATTERN (for instance '^(.+)_') keeps whole in a fold"
    )
