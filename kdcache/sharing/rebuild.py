"""The command line that builds a cache again, from its manifest.

A manifest knows its data set and its teachers by digests, not by place. DATA and TEACHER stand for them.
"""

import shlex
from collections.abc import Iterator
from typing import Any

from kdcache.settings import Entry, entries
from kdcache.settings.building import BUILD
from kdcache.store.format.manifest import Manifest
from kdcache.store.format.teacher_models import Augmented, Fingerprint


def build_command(manifest: Manifest) -> str:
    """Return the `kdcache build-teacher-cache` command that builds the cache with this manifest again.

    The result is shell text on several lines.

    Flags with default values are left out. DATA and TEACHER stand for the paths, which a manifest does not hold.
    """
    if manifest.teacher.per_head:
        return "# This version of kdcache does not compute a cache of one teacher per head."
    table = entries(*BUILD)
    words = [
        *_teachers(manifest.teacher),
        *(word for name, value in _values(manifest).items() for word in _flag(table[name], value)),
    ]
    return " \\\n  ".join(["kdcache build-teacher-cache --data DATA", *words, "--out CACHE.zarr"])


def _teachers(teacher: Fingerprint) -> Iterator[str]:
    count = len(teacher.members)
    yield from (f"--teacher TEACHER{f'_{number + 1}' if count else ''}" for number in range(count or 1))


def _values(manifest: Manifest) -> dict[str, Any]:
    """Return setting name -> value for the command of a build. None means the default."""
    teacher, build, is_ensemble = manifest.teacher, manifest.build, len(manifest.teacher.members) > 1
    settings = manifest.settings()
    settings["view_scale"] = _colons(settings["view_scale"]) if "view_scale" in settings else None  # to the last digit
    foreign_weights = not is_ensemble and not any(
        teacher.trainings
    )  # weights that are no run of kdcache, which knows its own
    return {
        "teacher_weights": _numbers(member.share for member in teacher.members)
        if is_ensemble and teacher.folds is None
        else None,
        "tta": None if teacher.tta is None else _tta(teacher.tta),
        "folds": teacher.folds,
        "folds_by": teacher.folds_by,
        "class_map": None if teacher.class_map is None else "CLASS_MAP",
        "mean": _numbers(teacher.mean) if foreign_weights else None,
        "std": _numbers(teacher.std) if foreign_weights else None,
        "split": manifest.dataset.split,
        **settings,
        "threads": build.threads,
        "device": "cpu" if build.device == "cpu" else "cuda",
    }


def _flag(entry: Entry, value: Any) -> Iterator[str]:
    if value is None or value == entry.default:
        return
    if isinstance(value, bool):
        yield entry.flag if value else entry.flag.replace("--", "--no-", 1)
        return
    formatted = entry.spelling is not None and entry.spelling.show is not None and not isinstance(value, str)
    yield f"{entry.flag} {shlex.quote(entry.spelling.show(value) if formatted else str(value))}"  # type: ignore[misc, union-attr]


def _numbers(values: Any) -> str:
    return ",".join(map(str, values))


def _colons(values: Any) -> str:
    return ":".join(map(str, values))


def _tta(tta: Augmented) -> str:
    words = ["flip"] if tta.flip else []
    if tta.scales != (1.0,) or not words:
        words.append(f"scales={_colons(tta.scales)}")
    return ",".join(words)
