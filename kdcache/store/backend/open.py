"""Open the place that an address names."""

from pathlib import Path

from kdcache.errors import StoreError
from kdcache.files import user_cache
from kdcache.store.backend.base import Place
from kdcache.store.backend.local import Folder


def open_place(location: "str | Path | Place", cache_dir: Path | None = None, cache_bytes: int | None = None) -> Place:
    """Open a folder, or a prefix in an object store (s3://bucket/prefix, gs://, az://).

    Copies of a remote cache lie in `cache_dir`, by default kdcache in the user's cache folder. They take at most
    `cache_bytes`, by default half of its free space.

    Raises: StoreError for an address that is not understood, an address on the Hub, or a missing extra `remote`.
    """
    if isinstance(location, Place):
        return location
    if "://" not in str(location):
        return Folder(Path(location))
    if str(location).startswith("hf://"):
        raise StoreError(
            f"Cannot use a cache on the Hub in place: {location}",
            fix=f"Copy it, then use the copy: kdcache copy {location} CACHE.zarr",
        )
    from kdcache.store.backend.mirror import Mirror
    from kdcache.store.backend.object_store import Bucket  # obstore is an extra

    return Bucket(str(location), Mirror(cache_dir or user_cache(), cache_bytes))
