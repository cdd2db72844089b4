"""`kdcache.inspect`, `kdcache.card` and `kdcache.audit`: what a cache is, and how good its teacher is."""

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
    """Return what a cache is: from what, how big, complete or not, its arrays, as `kdcache inspect` does.

    Args:
        cache_dir, cache_bytes: the folder for copies of a remote cache, and its room.
    Raises: RecipeError for a run. StoreError for no cache.
    """
    if isinstance(cache, str | Path) and is_run(Path(cache)):
        raise RecipeError(
            f"Cannot inspect {cache}: it is a run, not a cache",
            fix="Add --card for its card. kdcache compare and report have its scores.",
        )
    return inspect_store(place_of(cache, cache_dir, cache_bytes))


def card(subject: str | Path | Cache | Run, *, cache_dir: str | Path | None = None, cache_bytes: Any = None) -> str:
    """Return the card of a cache or a run in Markdown, as `kdcache inspect --card` does.

    It has digests, the commands that train from it and make it again, versions, seeds and an entry for a bibliography.
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
    """Audit a teacher by what its cache holds, as `kdcache inspect --teacher-report` does.

    Args:
        data, split: the data set, for a cache without labels. Default: the cache's split.
        out: folder of the report. Default: NAME-report beside the cache.
        cache_dir, cache_bytes: the folder for copies of a remote cache, and its room.
        progress: shows a bar, or lines where there is no terminal.
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
