"""`kdcache.inspect`, `kdcache.card` and `kdcache.audit`: the content of a cache, and the quality of its teacher."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdcache.data import Split
from kdcache.errors import RecipeError
from kdcache.progress import progress_of_steps
from kdcache.run_folder import Run, is_run
from kdcache.sharing import run_card, store_card
from kdcache.store import Cache, Records, StoreSummary, inspect_store, open_cache
from kdcache.store.backend.base import Place
from kdcache.teacher.audit.figures import check_report_folder, write_report
from kdcache.teacher.audit.store_audit import StoreAudit, audit_store
from kdcache.verbs.keywords import Data
from kdcache.verbs.places import place_of


def inspect(cache: str | Path | Cache, *, cache_dir: str | Path | None = None, cache_bytes: Any = None) -> StoreSummary:
    """Summarise a cache: its data set, teacher, size and arrays, as `kdcache inspect` does.

    >>> import kdcache
    >>> summary = kdcache.inspect("streets.zarr")
    >>> summary.complete, summary.records_written
    (True, 32)

    Args:
        cache: a folder, an address or an open cache. The cache may be unfinished.
        cache_dir: folder for local copies of a remote cache's files. Default: kdcache in the user's cache folder.
        cache_bytes: maximum size of these copies in bytes, or a text such as "50GiB". Default: half of the free space.
    Raises: RecipeError for a run; StoreError for anything else that is not an intact cache.
    """
    if isinstance(cache, str | Path) and is_run(Path(cache)):
        raise RecipeError(
            f"Cannot inspect {cache}: it is a run, not a cache",
            fix="Add --card for its card. kdcache compare and report have its scores.",
        )
    return inspect_store(place_of(cache, cache_dir, cache_bytes))


def card(subject: str | Path | Cache | Run, *, cache_dir: str | Path | None = None, cache_bytes: Any = None) -> str:
    """Return a Markdown page that describes a cache or a run, as `kdcache inspect --card` does.

    >>> import kdcache
    >>> "kdcache train-student" in kdcache.card("streets.zarr")
    True

    The page has digests, versions, seeds, a bibliography entry, and the commands to use the cache or run and to make it
    again.

    Args:
        subject: a folder, address or open cache, or a run.
        cache_dir: folder for local copies of a remote cache's files. Default: kdcache in the user's cache folder.
        cache_bytes: maximum size of these copies in bytes, or a text such as "50GiB". Default: half of the free space.
    Raises: StoreError for something that is neither a cache nor a run.
    """
    if isinstance(subject, Run):
        return run_card(subject)
    if isinstance(subject, str | Path) and is_run(Path(subject)):
        return run_card(Run.open(subject))
    return store_card(inspect_store(place_of(subject, cache_dir, cache_bytes)))


@dataclass(frozen=True)
class Audited:
    """The result of `kdcache.audit`.

    Attributes:
        audit: the quality of the cache's teacher.
        folder: the folder with report.json and the pictures.
        pictures: paths of the pictures.
    """

    audit: StoreAudit
    folder: Path
    pictures: tuple[Path, ...]


def audit(
    cache: str | Path | Cache,
    *,
    data: Data | None = None,
    split: str | None = None,
    out: str | Path | None = None,
    cache_dir: str | Path | None = None,
    cache_bytes: Any = None,
    progress: bool = True,
) -> Audited:
    """Measure a teacher's quality from its cache, and write a report, as `kdcache inspect --teacher-report` does.

    >>> import kdcache
    >>> audited = kdcache.audit("streets.zarr", data="streets", out="report", progress=False)
    >>> audited.folder.name
    'report'

    Args:
        cache: a complete cache.
        data: the data set, if the cache does not store images and labels.
        split: name of its split. Default: the split that the cache was built from.
        out: folder for the report. Default: NAME-report next to the cache NAME.zarr.
        cache_dir: folder for local copies of a remote cache's files. Default: kdcache in the user's cache folder.
        cache_bytes: maximum size of these copies in bytes, or a text such as "50GiB". Default: half of the free space.
        progress: show a progress bar, or lines without a terminal.
    Raises: KDCacheError, the base class of all errors of kdcache.
    """
    place = place_of(cache, cache_dir, cache_bytes)
    records = (
        Records(open_cache(place), data)
        if isinstance(data, Split)
        else Records.open(place, None if data is None else str(data), split)
    )
    folder = _beside(place) if out is None else Path(out)
    check_report_folder(folder)
    with progress_of_steps("auditing the teacher", progress) as report:
        found = audit_store(records, progress=report)
        report("drawing", 0, 1)
        pictures = write_report(found, records, folder)
    return Audited(found, folder, tuple(pictures))


def _beside(place: Place) -> Path:
    name = str(place).rstrip("/").rsplit("/", 1)[-1].removesuffix(".zarr") + "-report"
    return Path(name) if place.remote else place.folder.absolute().with_name(name)
