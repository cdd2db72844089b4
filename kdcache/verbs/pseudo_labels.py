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
    """Write a teacher's confident predictions as label PNGs, as `kdcache export-pseudo-labels` does.

    >>> import kdcache
    >>> exported = kdcache.export_pseudo_labels("streets.zarr", "pseudo", quantile=0.5, data="streets", progress=False)
    >>> exported.written
    8

    Pixels with less confident predictions become 255. Give either `threshold` or `quantile`. After an interruption, the
    same call continues.

    Args:
        cache: a complete cache.
        out: folder for the labels.
        threshold: the smallest probability that is kept, between 0 and 1.
        quantile: the fraction of each class's pixels that is kept, the most confident first, between 0 and 1.
        images: also write the images at view size.
        data: the data set, to measure the precision with its labels. Default: the labels in the cache.
        split: name of its split. Default: the split that the cache was built from.
        cache_dir: folder for local copies of a remote cache's files. Default: kdcache in the user's cache folder.
        cache_bytes: maximum size of these copies in bytes, or a text such as "50GiB". Default: half of the free space.
        progress: show a progress bar, or lines without a terminal.
    Raises: KDCacheError, the base class of all errors of kdcache.
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
