"""The cache: a Zarr v3 group that holds a teacher's outputs, with a manifest and a ledger.

    format/         the content: manifest, arrays, codec, shards
    backend/        the location: a folder, an object store
    ledger.py       the finished shards, and the seal
    worker.py       the numbers of processes that write a cache together
    freshness.py    comparison of a data set with the one that a cache was built from
    writer.py       writing whole shards
    recovery.py     repair of a damaged cache by a build
    copy.py         copies with another codec, other shards, or only a part
    subset.py       the samples of a part
    reader.py       open_cache, Cache
    join.py         open_caches: several caches of the same views as one
    targets.py      targets for crops of the user's own augmentation
    records.py      Records: a cache with the data set that it was built from
    sample_ids.py   the ids
    verify.py       comparison of every byte with the ledger
    summary.py      the summary that `kdcache inspect` prints

This package uses numpy arrays, and no models.
"""

from kdcache.store.copy import CopyChanges, CopyResult, copy_store
from kdcache.store.format.codec import round_targets
from kdcache.store.format.manifest import Codec, Manifest
from kdcache.store.format.manifest_models import Fidelity
from kdcache.store.format.teacher_models import Fingerprint
from kdcache.store.freshness import data_changes, renewal
from kdcache.store.join import JoinedCache, open_caches, seal_of
from kdcache.store.reader import Cache, begun_manifest, open_cache, read_manifest, store_exists
from kdcache.store.records import Records
from kdcache.store.subset import evenly_spread, spread_samples
from kdcache.store.summary import StoreSummary, inspect_store, summarise
from kdcache.store.targets import SampleTargets
from kdcache.store.verify import VerifyReport, verify_files
from kdcache.store.worker import Worker, worker_of
from kdcache.store.writer import StoreWriter, open_writer

__all__ = [
    "Cache",
    "Codec",
    "CopyChanges",
    "CopyResult",
    "Fidelity",
    "Fingerprint",
    "JoinedCache",
    "Manifest",
    "Records",
    "SampleTargets",
    "StoreSummary",
    "StoreWriter",
    "VerifyReport",
    "Worker",
    "begun_manifest",
    "copy_store",
    "data_changes",
    "evenly_spread",
    "inspect_store",
    "open_cache",
    "open_caches",
    "open_writer",
    "read_manifest",
    "renewal",
    "round_targets",
    "seal_of",
    "spread_samples",
    "store_exists",
    "summarise",
    "verify_files",
    "worker_of",
]
