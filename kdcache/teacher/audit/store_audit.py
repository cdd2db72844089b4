"""The audit of a cache's heads: classes and depth."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from kdcache.errors import MismatchError
from kdcache.store import Records
from kdcache.teacher.audit.audit import Audit, audit_cache
from kdcache.teacher.audit.depth_audit import RegressionAudit, audit_regression
from kdcache.teacher.audit.first_views import whole_records

Progress = Callable[[str, int, int], None]
"""Called with (what, done, total)."""


@dataclass(frozen=True)
class StoreAudit:
    """The audits of all heads of a cache.

    Attributes:
        images: number of images.
        classes: the audit of the segmentation head, or None if the cache does not have it.
        regressions: the audits of the numeric heads.
        seal: digest of the cache's seal.
        parents: digests of the seals of the caches that the teacher itself was distilled from.
    """

    images: int
    classes: Audit | None = None
    regressions: tuple[RegressionAudit, ...] = ()
    seal: str = ""
    parents: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return the audits as JSON values.

        The segmentation audit is at the top level. The numeric heads are in `regressions`, by name.
        """
        classes = {"images": self.images} if self.classes is None else self.classes.to_json()
        values = {audit.name: audit.to_json() for audit in self.regressions}
        store = {"seal": self.seal, "parents": list(self.parents)}
        return {**classes, "store": store, "regressions": values}


def audit_store(records: Records, *, worst: int = 10, progress: Progress | None = None) -> StoreAudit:
    """Measure the quality of all heads of a cache.

    Args:
        records: the cache with its pixels and labels.
        worst: number of worst images to list for each head.
        progress: called with (description of the step, images done, total images).
    Raises: MismatchError for a cache without heads, or for a missing or changed data set; CorruptError for a damaged
        cache.
    """
    report = progress or (lambda what, done, total: None)
    cache = records.cache
    records.check_complete()
    if not cache.manifest.heads:
        raise MismatchError(
            f"Cannot audit {cache.place}: it has no head of its teacher, only features "
            f"({', '.join(cache.manifest.features)})",
            fix="Compare the features with those of their teacher: kdcache verify CACHE --teacher TEACHER",
        )
    classes = None
    if cache.manifest.segmentation is not None:
        classes = audit_cache(records, worst=worst, progress=lambda *now: report("auditing classes", *now))
    regressions = []
    for name in cache.manifest.regressions:
        what = f"auditing {name}"
        regressions.append(
            audit_regression(records, name, worst=worst, progress=lambda *now, what=what: report(what, *now))
        )
    assert cache.ledger is not None  # of a store that is complete
    seal, parents = cache.ledger.completion.digest, cache.manifest.teacher.parents
    return StoreAudit(len(whole_records(cache)), classes, tuple(regressions), seal, parents)
