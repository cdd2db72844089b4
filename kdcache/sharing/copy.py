"""Copies from and onto the Hub: what `kdcache copy` does with an address that begins with hf://."""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from kdcache.sharing.address import HubAddress, hub_address
from kdcache.sharing.card import store_card
from kdcache.store import Cache, CopyChanges, Fidelity, copy_store, open_cache, summarise
from kdcache.store.copy import copied_manifest

if TYPE_CHECKING:
    from kdcache.sharing.push import PushResult

Progress = Callable[[str, int, int], None]
"""Called with (what is done, how much of it is done, how much it is)."""


@contextmanager
def opened(
    location: str | Path,
    *,
    cache_dir: Path | None = None,
    cache_bytes: int | None = None,
    progress: Progress | None = None,
) -> Iterator[Cache]:
    """An open store, wherever it lies: one on the Hub is fetched first, and its files are removed after the block.

    Args:
        cache_dir, cache_bytes: as in `open_cache`.
    Raises: StoreError and its kinds.
    """
    address = hub_address(location)
    if address is None:
        yield open_cache(location, cache_dir=cache_dir, cache_bytes=cache_bytes)
        return
    from kdcache.sharing.fetch import fetched  # huggingface_hub is an extra

    with fetched(address, cache_dir, None if progress is None else _about(progress, "fetching files")) as folder:
        yield open_cache(folder)


def push_store(
    source: Cache,
    address: HubAddress,
    changes: CopyChanges | None = None,
    *,
    licence: str | None,
    private: bool = False,
    fidelity: Fidelity | None = None,
    cache_dir: Path | None = None,
    progress: Progress | None = None,
) -> "PushResult":
    """Push a store as a data set of its own, with a card. Interrupted, the same call goes on with what is missing.

    The copy that is pushed lies in a folder of this machine until all of it is there: its files were compared with
    their digests, and it has no pixels unless `changes` asks for them: the licence of images is seldom one's own.

    Args:
        licence: a name that the Hub has for it, such as cc-by-4.0.
        private: makes a repository that is not there yet a private one, and refuses a public one.
        fidelity: as in `copy_store`.
        cache_dir: where the folder lies; default as for the copies of remote stores.
    Raises: StoreError for whatever keeps the push from ending well: before the first byte where that can be known.
    """
    from kdcache.sharing.fetch import staging  # huggingface_hub is an extra
    from kdcache.sharing.push import check_push, push

    changes = changes or CopyChanges()
    changes = replace(changes, pixels=changes.pixels or "source")
    check_push(address, copied_manifest(source, changes), licence)
    assert source.ledger is not None
    identity = f"{address}\n{source.ledger.completion.digest}\n{changes}"
    name = f"push-{address.name}-{hashlib.sha256(identity.encode()).hexdigest()[:12]}"
    with staging(name, cache_dir) as folder:
        copying, sending = (None if progress is None else _about(progress, what) for what in ("copying", "sending"))
        copy_store(source, folder, changes, fidelity=fidelity, progress=copying)
        copied = open_cache(folder)
        card = store_card(summarise(copied), address=str(address), licence=licence)
        return push(copied, address, card, private=private, progress=sending)


def _about(progress: Progress, what: str) -> Callable[[int, int], None]:
    return lambda done, total: progress(what, done, total)
