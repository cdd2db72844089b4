"""Sequences of samples, such as the frames of a video: folds of whole sequences, and sequences in both train and val.

Frames of one video are similar, so a model that has learnt from a frame's neighbours scores too well on it.
"""

from __future__ import annotations

import hashlib
import heapq
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kdcache.errors import RecipeError

MOST_FOLDS = 255
EXAMPLE = "'^(.+)_', what stands before the last _"
_LAST_NUMBER = re.compile(r"(.*[^0-9]|)([0-9]{1,18})([^0-9]*)", re.DOTALL)


class SharedSequence(NamedTuple):
    """A sequence, such as a video, with samples in both the training data and the validation data.

    Attributes:
        name: the sequence's name.
        judged: the number of its samples in the validation data.
        trained: the number of its samples in the training data.
    """

    name: str
    judged: int
    trained: int


def sequence_pattern(text: str, flag: str = "--folds-by") -> re.Pattern[str]:
    """Compile `text`, a regular expression that finds the name of a sequence in a sample id.

    `flag` is the command-line flag, for error messages.

    Raises: RecipeError for an invalid regular expression.
    """
    try:
        return re.compile(text)
    except re.error as error:
        raise RecipeError(
            f"Invalid value of {flag}: {text!r} ({error})",
            fix=f"Give a regular expression whose match in a sample's id names the sequence, for example {EXAMPLE}.",
        ) from error


def check_folds_by(by: str | None, *, folds: bool) -> None:
    """Check `by`, the value of `--folds-by`, or None without the flag. `folds` tells whether folds are also requested.

    Raises: RecipeError for an invalid regular expression, or for `--folds-by` without folds.
    """
    if by is not None:
        sequence_pattern(by)
        if not folds:
            raise RecipeError(
                f"Cannot use --folds-by {by!r} without folds",
                fix="Add the folds (--fold I/K of a training, --folds K of a build), or leave out --folds-by.",
            )


def sequences_of(ids: Sequence[str], by: str, flag: str = "--folds-by") -> list[str]:
    """Return the name of every sample's sequence, which a pattern finds in the sample's id.

    The name is the pattern's first group, or the whole match without a group. For example, the pattern `^(.+)_` gives
    "drive1" for the id "drive1_0042".

    Args:
        ids: the sample ids.
        by: the pattern, a regular expression.
        flag: the command-line flag, for error messages.

    Raises: RecipeError for an invalid regular expression, or one that does not match every id.
    """
    pattern = sequence_pattern(by, flag)
    names = [_matched(pattern, sample) for sample in ids]
    nameless = [sample for sample, name in zip(ids, names, strict=True) if not name]
    if nameless:
        raise RecipeError(
            f"{flag} {by!r} names no sequence in {len(nameless)} of {len(ids)} ids, such as {nameless[0]!r}",
            fix=f"Give a pattern that fits all ids, for example {EXAMPLE}.",
        )
    return names


def folds_of(ids: Sequence[str], folds: int, by: str | None = None) -> npt.NDArray[np.int64]:
    """Return the fold number of every sample, int64 (N,), from 0 to `folds` - 1.

    Without `by`, the ids are sorted by a hash, and go to the folds in turn. So fold sizes differ by at most one.

    With `by`, all samples of a sequence get the same fold. The largest sequence comes first, and each sequence goes to
    the fold with the fewest samples. Then the largest fold exchanges sequences with others while that evens out their
    sizes.

    The hash is BLAKE2b with 8 bytes and the key `kdcache folds`, over the id or sequence name in UTF-8. The order of
    the ids does not matter. One more sample may move other samples to another fold.

    Args:
        ids: the ids of all samples.
        folds: the number of folds.
        by: a regular expression whose match in an id names its sequence, or None.

    Raises: RecipeError unless there are 2 to 255 folds and a sample or sequence for each, or if `by` is invalid.
    """
    if not 2 <= folds <= min(MOST_FOLDS, len(ids)):
        raise RecipeError(
            f"Cannot deal {len(ids)} samples into {folds} folds",
            fix=f"Use 2 to {MOST_FOLDS} folds, and no more than there are samples: --folds 2",
        )
    if by is None:
        fold_of = np.empty(len(ids), np.int64)
        fold_of[sorted(range(len(ids)), key=lambda number: _rank(ids[number]))] = np.arange(len(ids)) % folds
        return fold_of
    names = sequences_of(ids, by)
    sizes = Counter(names)
    if len(sizes) < folds:
        examples = ", ".join(sorted(sizes)[:5]) + (", ..." if len(sizes) > 5 else "")
        raise RecipeError(
            f"Cannot deal {len(sizes)} sequences, which --folds-by {by!r} names, into {folds} folds: {examples}",
            fix=f"Use up to {len(sizes)} folds, or a pattern that names shorter sequences."
            if len(sizes) > 1
            else "Give a pattern that names shorter sequences, or leave out --folds-by.",
        )
    fold_of_sequence = {name: fold for fold, part in enumerate(_deal(sizes, folds)) for name in part}
    return np.array([fold_of_sequence[name] for name in names], np.int64)


def shared_sequences(
    data: Sequence[str], used: Sequence[int], judged: Sequence[str], by: str | None = None
) -> list[SharedSequence]:
    """Return the sequences that have samples in both the training data and the validation data.

    With `by`, a regular expression names each id's sequence, and ids without a match have none. Without `by`, ids that
    differ only in their last number form a sequence if all of these are true:

    - The training data or the validation data have at least four of these ids, and at least half of the steps between
      their numbers are equal. Photographs from a larger collection have irregular numbers.
    - The numbers are not just a count of all training samples, one number after the other.
    - None of the ids is in both training and validation. Otherwise the count probably restarts in every split.

    Args:
        data: all ids of the training data.
        used: positions in `data` of the samples to train on.
        judged: ids of the samples to validate on.
        by: a regular expression, or None.

    Raises: RecipeError for an invalid regular expression.
    """
    trained = {data[number] for number in used}
    sequence_of = _numbered(data, trained, judged) if by is None else _named({*trained, *judged}, by)
    judged_counts, trained_counts = (
        Counter(sequence_of[sample] for sample in samples if sample in sequence_of) for samples in (judged, trained)
    )
    names = sorted(judged_counts.keys() & trained_counts.keys())
    return [SharedSequence(name, judged_counts[name], trained_counts[name]) for name in names]


def _matched(pattern: re.Pattern[str], sample: str) -> str:
    match = pattern.search(sample)
    return "" if match is None else match[min(1, pattern.groups)] or ""


def _named(ids: set[str], by: str) -> dict[str, str]:
    pattern = sequence_pattern(by)
    return {sample: name for sample in ids if (name := _matched(pattern, sample))}


def _numbered(data: Sequence[str], trained: set[str], judged: Sequence[str]) -> dict[str, str]:
    """Return sample id -> its sequence, for ids that share numbered frames between training and validation.

    A sequence's name is an id with * instead of its last number.
    """
    data_numbers, judged_numbers = _by_last_number(data), _by_last_number(judged)
    sequence_of: dict[str, str] = {}
    for before, after in data_numbers.keys() & judged_numbers.keys():
        frames, judged_frames = data_numbers[before, after], judged_numbers[before, after]
        step = _usual_step(frames.values())
        count = step == 1 and len(frames) == len(data)
        overlap = any(sample in trained for sample in judged_frames)
        if not count and not overlap and (step or _usual_step(judged_frames.values())):
            sequence_of |= dict.fromkeys((*frames, *judged_frames), f"{before}*{after}")
    return sequence_of


def _by_last_number(ids: Sequence[str]) -> dict[tuple[str, str], dict[str, int]]:
    """Return (text before the last number, text after it) -> {sample id -> that number}."""
    numbers: dict[tuple[str, str], dict[str, int]] = {}
    for sample in ids:
        if (match := _LAST_NUMBER.fullmatch(sample)) is not None:
            numbers.setdefault((match[1], match[3]), {})[sample] = int(match[2])
    return numbers


def _usual_step(numbers: Collection[int]) -> int | None:
    """Return the step that at least half of the sorted numbers have, or None.

    Fewer than four numbers give None.
    """
    if len(numbers) < 4:
        return None
    step, times = Counter(second - first for first, second in pairwise(sorted(numbers))).most_common(1)[0]
    return step if 2 * times >= len(numbers) - 1 else None


def _deal(sizes: Mapping[str, int], folds: int) -> list[list[str]]:
    """Return the names of the sequences in each fold. `sizes` maps a sequence to its number of samples."""
    parts: list[list[str]] = [[] for _ in range(folds)]
    fullness = [(0, fold) for fold in range(folds)]
    for name in sorted(sizes, key=lambda name: (-sizes[name], *_rank(name))):
        samples, fold = fullness[0]
        parts[fold].append(name)
        heapq.heapreplace(fullness, (samples + sizes[name], fold))
    while True:
        *others, fullest = sorted(parts, key=lambda part: sum(sizes[name] for name in part))
        if not any(_exchange(sizes, fullest, part) for part in others):
            return parts


def _exchange(sizes: Mapping[str, int], large: list[str], small: list[str]) -> bool:
    """Move a sequence from the large fold to the small one, perhaps in exchange for a smaller one.

    `large` and `small` are names of sequences and change in place. Return False if no exchange evens out the sizes.
    """
    gap = sum(sizes[name] for name in large) - sum(sizes[name] for name in small)
    outgoing, incoming = ({sizes[name]: name for name in reversed(part)} for part in (large, small))
    exchanges = [
        (abs(gap - 2 * (lost - gained)), lost, gained)
        for lost in outgoing
        for gained in (0, *incoming)
        if 0 < lost - gained < gap
    ]
    if not exchanges:
        return False
    _, lost, gained = min(exchanges)
    large.remove(outgoing[lost])
    small.append(outgoing[lost])
    if gained:
        small.remove(incoming[gained])
        large.append(incoming[gained])
    return True


def _rank(sample: str) -> tuple[bytes, str]:
    return hashlib.blake2b(sample.encode(), digest_size=8, key=b"kdcache folds").digest(), sample
