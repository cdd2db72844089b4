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
    """Summarise a cache: its source, size, completeness and arrays, as `kdcache inspect` does.

    >>> import kdcache
    >>> summary = kdcache.inspect("streets.zarr")
    >>> summary.complete, summary.records_written
    (True, 32)

    Args:
        cache: a folder, an address, or an open cache, complete or not.
        cache_dir: the folder for copies of a remote cache.
        cache_bytes: its limit in bytes.
    Raises: RecipeError for a run. StoreError for anything else that is not a cache.
    """
    if isinstance(cache, str | Path) and is_run(Path(cache)):
        raise RecipeError(
            f"Cannot inspect {cache}: it is a run, not a cache",
            fix="Add --card for its card. kdcache compare and report have its scores.",
        )
    return inspect_store(place_of(cache, cache_dir, cache_bytes))


def card(subject: str | Path | Cache | Run, *, cache_dir: str | Path | None = None, cache_bytes: Any = None) -> str:
    """Return the card of a cache or a run in Markdown, as `kdcache inspect --card` does.

    >>> import kdcache
    >>> "kdcache train-student" in kdcache.card("streets.zarr")
    True

    It has digests, the commands to train from it and to make it again, versions, seeds and a bibliography entry.
    """
    if isinstance(subject, Run):
        return run_card(subject)
    if isinstance(subject, str | Path) and is_run(Path(subject)):
        return run_card(Run.open(subject))
    return store_card(inspect_store(place_of(subject, cache_dir, cache_bytes)))


@dataclass(frozen=True)
class Audited:
    """The audit of a cache's teacher, and the folder with report.json and pictures."""

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
    """Audit a teacher by the content of its cache, as `kdcache inspect --teacher-report` does.

    >>> import kdcache
    >>> audited = kdcache.audit("streets.zarr", data="streets", out="report", progress=False)
    >>> audited.folder.name
    'report'

    Args:
        cache: a complete cache.
        data: the data set, for a cache without labels.
        split: its split. Default: the cache's.
        out: folder of the report. Default: NAME-report next to the cache.
        cache_dir: the folder for copies of a remote cache.
        cache_bytes: its limit in bytes.
        progress: show a bar, or lines without a terminal.
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
