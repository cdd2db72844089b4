"""`kdcache.verify`: every byte of a cache, its data set and its teacher."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdcache.data import Changes, ClassList, Split
from kdcache.errors import RecipeError
from kdcache.progress import progress_bar, progress_of, warn
from kdcache.settings.parse import Count
from kdcache.settings.shared import MachineSettings
from kdcache.store import Cache, Manifest, Records, VerifyReport, data_changes, open_cache, read_manifest, verify_files
from kdcache.store.backend.base import Place
from kdcache.teacher import Agreement, compare_teacher, load_like
from kdcache.training import pick_device
from kdcache.verbs.keywords import Data, open_data
from kdcache.verbs.places import place_of


@dataclass(frozen=True)
class Verified:
    """The result of `kdcache.verify`. It is True in a condition if everything that was checked is right.

    Attributes:
        place: the cache's location.
        files: the check of the cache's files. If a file is damaged, nothing else is checked.
        manifest: the cache's manifest, or None if a file is damaged.
        changes: the differences between the data set and the one that the cache was built from. None if not checked.
        samples: number of samples in the checked data set.
        data: the checked data set's spec.
        agreement: the stored targets compared with new outputs of the teacher. None if not checked.
    """

    place: Place
    files: VerifyReport
    manifest: Manifest | None = None
    changes: Changes | None = None
    samples: int = 0
    data: str = ""
    agreement: Agreement | None = None

    def __bool__(self) -> bool:
        return not self.files.damaged and not self.changes and (self.agreement is None or self.agreement.ok)


def verify(
    cache: str | Path | Cache,
    *,
    teacher: str | Path | Sequence[str] | None = None,
    records: Count = 16,
    seal: str | None = None,
    data: Data | None = None,
    split: str | None = None,
    class_map: str | Path | None = None,
    device: str = MachineSettings.device,
    cache_dir: str | Path | None = None,
    cache_bytes: Any = None,
    progress: bool = True,
) -> Verified:
    """Check every byte of a cache, and optionally its data set and its teacher, as `kdcache verify` does.

    >>> import kdcache
    >>> bool(kdcache.verify("streets.zarr", data="streets", progress=False))
    True

    Args:
        cache: a complete cache.
        teacher: a run, SPEC@FILE, or the members of an ensemble. It runs again on some records, and its outputs are
            compared. None compares no outputs.
        records: number of records on which the teacher runs.
        seal: the digest that the cache's seal must have, as published elsewhere. None accepts every seal.
        data: the data set, which is compared with the one that the cache was built from. None compares none.
        split: name of its split. Default: the split that the cache was built from.
        class_map: file that names the data class for each class of the teacher, as at the build. None if the build
            had no class map.
        device: device of the teacher: "auto", "cpu" or "cuda".
        cache_dir: folder for local copies of a remote cache's files. Default: kdcache in the user's cache folder.
        cache_bytes: maximum size of these copies in bytes, or a text such as "50GiB". Default: half of the free space.
        progress: show a progress bar, or lines without a terminal.
    Raises: MismatchError for another seal; RecipeError for a setting without effect; KDCacheError, the base class of
        all errors of kdcache.
    """
    for flag, value, needed, needed_flag in (
        ("--split", split, data, "--data DATA"),
        ("--class-map", class_map, teacher, "--teacher TEACHER"),
    ):
        if value is not None and needed is None:
            raise RecipeError(
                f"Cannot use {flag} {value} without {needed_flag}", fix=f"Add {needed_flag}, or leave out {flag}."
            )
    place = place_of(cache, cache_dir, cache_bytes)
    with progress_bar(progress) as bar:
        files = verify_files(place, progress_of(bar, "checking files"), seal=seal)
    if files.damaged:
        return Verified(place, files)
    manifest = read_manifest(place)
    changes, samples, name = None, 0, ""
    if data is not None:
        changes, samples, name = _compare_data(place, data, split, progress)
    agreement = None
    if teacher:
        agreement = _compare_teacher(place, manifest, teacher, records, data, split, class_map, device)
    return Verified(place, files, manifest, changes, samples, name, agreement)


def _compare_data(place: Place, data: Data, split: str | None, progress: bool) -> tuple[Changes, int, str]:
    """Compare a data set with the one that a cache was built from. Every file is read.

    Returns: the changes, the number of samples, and the data set's spec.
    """
    cache = open_cache(place)
    source = open_data(data, split or (None if isinstance(data, Split) else cache.manifest.dataset.split))
    with progress_bar(progress) as bar:
        changes = data_changes(cache, source, indexed=False, progress=progress_of(bar, "comparing the data set"))
    return changes, len(source), source.data


def _compare_teacher(
    place: Place,
    manifest: Manifest,
    teacher: str | Path | Sequence[str],
    records: int,
    data: Data | None,
    split: str | None,
    class_map: str | Path | None,
    device: str,
) -> Agreement:
    origins = [str(teacher)] if isinstance(teacher, str | Path) else [str(origin) for origin in teacher]
    dataset = manifest.dataset
    classes = ClassList(dataset.class_names, dataset.class_colours)
    classified = manifest.segmentation is not None
    loaded = load_like(manifest.teacher, origins, classes, class_map=class_map, classified=classified)
    for note in loaded.notes:
        warn(note)
    opened = (
        Records(open_cache(place), data)
        if isinstance(data, Split)
        else Records.open(place, None if data is None else str(data), split)
    )
    return compare_teacher(opened, loaded, pick_device(device), records)
