"""From an address to the place that it names."""

from pathlib import Path

from kdcache.errors import StoreError
from kdcache.files import user_cache
from kdcache.store.backend.base import Place
from kdcache.store.backend.local import Folder


def open_place(location: "str | Path | Place", cache_dir: Path | None = None, cache_bytes: int | None = None) -> Place:
    """A folder, or the address of a prefix in an object store: s3://bucket/prefix, gs:// and az:// likewise.

    Args:
        cache_dir, cache_bytes: where copies of a remote store are kept, and how much of them; default kdcache in the
            user's cache folder, and half of what is free there.
    Raises: StoreError for an address that is not understood, one on the Hub, or without the extra `remote`.
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
