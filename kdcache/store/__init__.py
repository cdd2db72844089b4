"""The cache: a Zarr v3 group that holds a teacher's outputs, with a manifest and a ledger.

    format/         what lies in it: manifest, arrays, codec, shards
    backend/        where its files are: a folder, an object store
    ledger.py       which shards are finished, and the seal
    worker.py       the numbers of processes that write a cache together
    freshness.py    whether a data set still is what a cache was built from
    writer.py       whole shards by one owner
    recovery.py     what a build makes good in a damaged cache
    copy.py         a cache into another codec, other shards, in part
    subset.py       which samples a part has
    reader.py       open_cache, Cache
    join.py         open_caches: several caches of the same views as one
    targets.py      targets through windows of an augmentation of one's own
    records.py      Records: a cache with the data set that it was built from
    sample_ids.py   the ids
    verify.py       every byte against the ledger
    summary.py      what `kdcache inspect` prints

It knows tensors as numpy arrays and no models.
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
