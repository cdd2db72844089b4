"""A part of a store's samples: which they are, and what stands for their ids."""

import hashlib
import json
from collections.abc import Sequence

import numpy as np

from kdcache.errors import MismatchError, StoreError
from kdcache.store.reader import Cache


def spread_samples(source: Cache, count: int) -> list[int]:
    """`count` sample numbers, evenly spread over a store. Raises StoreError for a number that it does not have."""
    there = source.manifest.dataset.samples
    if not 1 <= count <= there:
        raise StoreError(
            "a copy has from one to all of the samples",
            received=f"{count} of {there} samples of {source.place}",
            remedy=f"ask for 1 to {there}",
        )
    return [int(number) for number in np.linspace(0, there - 1, count).round()]


def samples_of_ids(source: Cache, ids: Sequence[str]) -> list[int]:
    """Numbers of the samples with these ids, ascending. Raises MismatchError naming those that are not there."""
    numbers = {sample: number for number, sample in enumerate(source.ids)}
    unknown = sorted(set(ids) - set(numbers))
    if unknown or not ids:
        named = ", ".join(map(repr, unknown[:3])) + (f" and {len(unknown) - 3} more" if len(unknown) > 3 else "")
        like = ", ".join(map(repr, source.ids[:1]))
        raise MismatchError(
            "a copy takes samples that the store has, by their ids",
            received=f"{named or 'no id at all'}; the ids of {source.place} are like {like}",
            remedy="give one id per line: the image's path in its split, without the last suffix",
        )
    return sorted({numbers[sample] for sample in ids})


def ids_digest(class_names: Sequence[str], ids: Sequence[str]) -> str:
    """What the manifest keeps of class names and ids; the `digest` of the split that has just these samples."""
    text = json.dumps([list(class_names), list(ids)], ensure_ascii=True)
    return hashlib.sha256(text.encode("ascii")).hexdigest()
