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
    """What was checked of a cache. True if all of it is right.

    Attributes:
        files: the result for the cache's files. If a file is damaged, nothing else is checked.
        manifest: the cache's manifest. None with damaged files.
        changes: how the data set differs from the cache's at its build. None without data.
        samples: number of samples compared.
        agreement: the stored targets compared with the teacher's outputs. None without a teacher.
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
    """Check every byte of a cache, as `kdcache verify` does, and optionally its data set and teacher.

    >>> import kdcache
    >>> bool(kdcache.verify("streets.zarr", data="streets", progress=False))
    True

    Args:
        cache: a complete cache.
        teacher: a run, SPEC@FILE, or the members of an ensemble. It runs again on some records.
        records: number of records that it runs on.
        seal: the expected digest of the seal, as published elsewhere.
        data: the data set.
        split: its split. Default: the cache's.
        class_map: as at the build.
        device: auto, cpu or cuda.
        cache_dir: the folder for copies of a remote cache.
        cache_bytes: the limit of that folder in bytes.
        progress: show a bar, or lines without a terminal.
    Raises: MismatchError for another seal, RecipeError for a setting without effect, KDCacheError of every kind.
    """
    for flag, value, needed, other in (
        ("--split", split, data, "--data DATA"),
        ("--class-map", class_map, teacher, "--teacher TEACHER"),
    ):
        if value is not None and needed is None:
            raise RecipeError(f"Cannot use {flag} {value} without {other}", fix=f"Add {other}, or leave out {flag}.")
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
    """Return how a data set differs from the cache's, how many samples it has, and its name. Every file is read."""
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
    origins = [str(teacher)] if isinstance(teacher, str | Path) else [str(one) for one in teacher]
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
