"""`kdcache.export_pseudo_labels`: the teacher's confident predictions as label files."""

from pathlib import Path
from typing import Any

from kdcache.data import Split
from kdcache.progress import progress_of_steps
from kdcache.store import Cache, Records, open_cache
from kdcache.teacher.audit.pseudo_labels import Exported, Rule
from kdcache.teacher.audit.pseudo_labels import export_pseudo_labels as export
from kdcache.verbs.keywords import Data
from kdcache.verbs.places import place_of


def export_pseudo_labels(
    cache: str | Path | Cache,
    out: str | Path,
    *,
    threshold: float | None = None,
    quantile: float | None = None,
    images: bool = False,
    data: Data | None = None,
    split: str | None = None,
    cache_dir: str | Path | None = None,
    cache_bytes: Any = None,
    progress: bool = True,
) -> Exported:
    """Write the teacher's confident classes as labels, 255 elsewhere, as `kdcache export-pseudo-labels` does.

    >>> import kdcache
    >>> exported = kdcache.export_pseudo_labels("streets.zarr", "pseudo", quantile=0.5, data="streets", progress=False)
    >>> exported.written
    8

    Args:
        cache: a complete cache.
        out: data folder. An interrupted export is continued.
        threshold: keep pixels with at least this probability, in (0, 1).
        quantile: keep this share of every class, its surest pixels, in (0, 1).
        images: also write the images at view size.
        data: the data set, to compare with its labels. Default: the cache's labels.
        split: its split. Default: the cache's.
        cache_dir: the folder for copies of a remote cache.
        cache_bytes: the limit of that folder in bytes.
        progress: show a bar, or lines without a terminal.
    Raises: KDCacheError of every kind.
    """
    rule = Rule(threshold, quantile)
    place = place_of(cache, cache_dir, cache_bytes)
    records = (
        Records(open_cache(place), data)
        if isinstance(data, Split)
        else Records.open(place, None if data is None else str(data), split)
    )
    with progress_of_steps("", progress) as report:
        return export(records, Path(out), rule, images=images, progress=report)
