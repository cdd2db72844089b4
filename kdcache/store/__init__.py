"""The store: a Zarr v3 group that holds what a teacher said, with a manifest and a ledger.

    manifest.py   who made it, from what, how
    parts.py      the parts of that: data set, view, heads, the teacher's fingerprint
    schema.py     arrays, chunks
    codec.py      how they are compressed, and what is rounded before
    place.py      where the files are, for all that follows
    backend/      a folder on a disk, from an address to its place
    bucket.py     object stores: requests, retries
    mirror.py     copies of their shards on this disk
    durable.py    writes that survive a power cut
    ledger.py     which shards are finished, and the seal
    damage.py     what to say of a file that is not what was written
    recovery.py   what a build makes good in a damaged store
    writer.py     whole shards by one owner
    copy.py       a store into another codec, other shards, in part
    part.py       which samples a part has
    reader.py     open_cache, Cache
    records.py    Records: a store with the data set that it was built from
    shard.py      records straight from shards, at the decoder's speed
    layout.py     which arrays that can be done with
    fallback.py   the others, through zarr-python
    samples.py    the ids
    verify.py     every byte against the ledger
    summary.py    what `kdcache inspect` says

It knows tensors as numpy arrays and no models.
"""

from kdcache.store.codec import round_targets
from kdcache.store.copy import CopyChanges, CopyResult, copy_store
from kdcache.store.manifest import Codec, Manifest
from kdcache.store.part import samples_of_ids, spread_samples
from kdcache.store.parts import Fidelity, Fingerprint
from kdcache.store.reader import Cache, open_cache, read_manifest, store_exists
from kdcache.store.records import Records
from kdcache.store.summary import StoreSummary, inspect_store, summarise
from kdcache.store.verify import VerifyReport, verify_files
from kdcache.store.writer import StoreWriter, Worker, open_writer, worker_of

__all__ = [
    "Cache",
    "Codec",
    "CopyChanges",
    "CopyResult",
    "Fidelity",
    "Fingerprint",
    "Manifest",
    "Records",
    "StoreSummary",
    "StoreWriter",
    "VerifyReport",
    "Worker",
    "copy_store",
    "inspect_store",
    "open_cache",
    "open_writer",
    "read_manifest",
    "round_targets",
    "samples_of_ids",
    "spread_samples",
    "store_exists",
    "summarise",
    "verify_files",
    "worker_of",
]
