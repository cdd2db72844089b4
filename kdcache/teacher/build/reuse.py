"""Copy the targets of an earlier cache, because no teacher needs to run twice on the same pixels.

A record is copied if the same view of the same sample renders to exactly the pixels that the teacher saw, in a cache of
the same teacher, classes, size and head. The teacher runs again for damaged records. For a new tap or statistic, the
teacher runs again on every record, but stored targets are kept.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from kdcache.errors import CorruptError, MismatchError
from kdcache.models.foreign.wrapped import answer_as
from kdcache.store import Cache, Manifest, round_targets
from kdcache.store.copy import rounds
from kdcache.teacher.build.manifest import plan_manifest
from kdcache.teacher.build.options import BuildOptions
from kdcache.teacher.build.probe import TeacherProbe
from kdcache.teacher.build.render import Array, Rendered

_LOOKED_AT = ("records/pixel_checksum", "records/window", "records/flip")


class Reuse:
    """The records of an earlier cache whose targets a new build can copy.

    Args:
        old: the earlier cache.
        manifest: the manifest of the new build.

    Attributes:
        complete: True if the earlier cache has everything that the new one stores, so that the teacher need not run on
            copied records.
        damaged: numbers of the earlier cache's records that are needed but cannot be read.
    Raises: CorruptError if the earlier cache's ledger is damaged.
    """

    def __init__(self, old: Cache, manifest: Manifest) -> None:
        self._old = old
        self._codec = manifest.codec
        old_features = old.manifest.features
        taps = [tap for tap, feature in manifest.features.items() if old_features.get(tap) == feature]
        old_statistics = old.manifest.statistics
        maps = [name for name, statistic in manifest.statistics.items() if old_statistics.get(name) == statistic]
        self.complete = (len(taps), len(maps)) == (len(manifest.features), len(manifest.statistics))
        targets = [path for head in old.manifest.heads for path in old.target_paths(head)]
        scales = [f"scales/{tap}" for tap in taps if manifest.features[tap].dtype == "uint8"]
        self._paths = [*targets, *(f"features/{tap}" for tap in taps), *scales, *(f"statistics/{n}" for n in maps)]
        self._samples = {sample: number for number, sample in enumerate(old.ids)}
        self._read: dict[int, dict[str, Array]] = {}
        self.damaged = set[int]()
        if old.ledger is not None:
            old.ledger.check_lines()

    def find(self, item: Rendered, sample: str) -> int | None:
        """Return the number of the earlier cache's record with the same pixels as `item`, or None if there is none.

        The found record's targets are read and kept until the method `rows` returns them. `sample` is the id of the
        item's sample.
        """
        number = self._samples.get(sample)
        if number is None or item.view >= self._old.manifest.view.views_per_sample:
            return None
        record = self._old.manifest.record(number, item.view)
        try:
            stored = self._old.read(record, _LOOKED_AT)
            same = (
                int(stored["records/pixel_checksum"]) == item.checksum
                and tuple(stored["records/window"].tolist()) == item.window.as_tuple()
                and bool(stored["records/flip"]) == item.flip
            )
            if same:
                self._read[record] = self._old.read(record, self._paths)
        except CorruptError:
            self.damaged.add(record)
            return None
        return record if same else None

    def rows(self, records: Sequence[int]) -> dict[str, Array]:
        """Return the stored arrays of several records of the earlier cache, by path, each (records, ...).

        `records` are numbers that `find` has returned.
        """
        read = [self._read.pop(record) for record in records]
        return round_targets({path: np.stack([row[path] for row in read]) for path in self._paths}, self._codec)


def options_of(old: Manifest, **changes: Any) -> BuildOptions:
    """Return the build options of the cache with the manifest `old`, with some fields replaced.

    `changes` maps names of `BuildOptions` fields to new values.
    """
    return BuildOptions(**{**old.settings(), **changes})


def plan_extended(probe: TeacherProbe, old: Cache) -> Manifest:
    """Return the manifest of a build that copies targets from the earlier cache `old`, after checking that they fit.

    `probe` has the split, the teacher and the options of the new build.

    Raises: MismatchError naming every setting that differs. RecipeError, ModelError or StoreError if the options, the
        teacher or the split do not suit any cache.
    """
    split, options, old_manifest = probe.split, probe.options, old.manifest
    differences = []
    if old_manifest.dataset.class_names != split.classes.names:
        differences.append(f"classes: {_some(old_manifest.dataset.class_names)} against {_some(split.classes.names)}")
    for name, earlier, new in (
        ("view.size", old_manifest.view.size, options.crop or options.size),
        ("view.image_size", old_manifest.view.image_size, options.size if options.crop else None),
        ("view.teacher_size", old_manifest.view.teacher_size, options.teacher_size),
    ):
        if earlier != (None if new is None else tuple(new)):
            differences.append(f"{name}: {earlier} against {new}")
    if old_manifest.teacher.folds is not None and old_manifest.dataset.ids_digest != split.digest():
        differences.append("samples: the folds of a larger split are others, and its teachers too")
    if old_manifest.codec == "small" and options.codec != "small":
        differences.append(f"codec: small rounded its targets, {options.codec} does not")
    _refuse(old, differences)
    answer_as(probe.teacher.model, old_manifest.heads, old_manifest.view.teacher_size or old_manifest.view.size)
    keeps_figures = old_manifest.fidelity is not None and not rounds(old_manifest, options.codec)
    manifest = plan_manifest(probe, fidelity=not keeps_figures)
    differences = [f"teacher.{text}" for text in old_manifest.teacher.differences(manifest.teacher)]
    if old_manifest.heads != manifest.heads:
        differences.append(f"heads: {old_manifest.heads} against {manifest.heads}")
    _refuse(old, differences)
    return manifest.model_copy(update={"fidelity": old_manifest.fidelity}) if keeps_figures else manifest


def _refuse(old: Cache, differences: Sequence[str]) -> None:
    if differences:
        raise MismatchError(
            f"Cannot reuse the targets of {old.place}: it differs in {', '.join(differences)}",
            fix="Give the teacher and the settings that it was built with, or leave --from out to compute all targets "
            "again.",
        )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
