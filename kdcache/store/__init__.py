"""The store: a Zarr v3 group that holds what a teacher said, with a manifest and a ledger.

    manifest.py   who made it, from what, how; the teacher's fingerprint
    schema.py     arrays, chunks, codecs
    durable.py    writes that survive a power cut
    ledger.py     which shards are finished, and the seal
    writer.py     whole shards by one owner
    reader.py     open_cache, Cache
    shard.py      records straight from shards, at the decoder's speed
    layout.py     which arrays that can be done with
    verify.py     every byte against the ledger
    summary.py    what `kdcache inspect` says

It knows tensors as numpy arrays and no models.
"""

from kdcache.store.manifest import Fingerprint, Manifest
from kdcache.store.reader import Cache, open_cache, read_manifest
from kdcache.store.summary import StoreSummary, inspect_store, summarise
from kdcache.store.verify import VerifyReport, verify_files
from kdcache.store.writer import StoreWriter, open_writer

__all__ = [
    "Cache",
    "Fingerprint",
    "Manifest",
    "StoreSummary",
    "StoreWriter",
    "VerifyReport",
    "inspect_store",
    "open_cache",
    "open_writer",
    "read_manifest",
    "summarise",
    "verify_files",
]
