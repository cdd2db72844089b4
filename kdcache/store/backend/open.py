"""Find the location of a cache from a path or address."""

from pathlib import Path

from kdcache.errors import StoreError
from kdcache.files import user_cache
from kdcache.store.backend.base import Place
from kdcache.store.backend.local import Folder


def open_place(location: "str | Path | Place", cache_dir: Path | None = None, cache_bytes: int | None = None) -> Place:
    """Return the location of a cache from a path or address, without reading it.

    Args:
        location: a folder, s3://BUCKET/PREFIX, gs://BUCKET/PREFIX or az://CONTAINER/PREFIX. A `Place` is returned
            unchanged.
        cache_dir: folder for local copies of a remote cache's files. Default: kdcache in the user's cache folder.
        cache_bytes: maximum size of these copies in bytes. Default: half of the free space of that disk.
    Raises: StoreError for an invalid address, for an hf:// address, or if the extra `remote` is not installed.
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
