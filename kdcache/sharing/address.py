"""Addresses of stores on the Hub: hf://datasets/USER/NAME, with @REVISION to pull an earlier state."""

import re
from dataclasses import dataclass

from kdcache.errors import StoreError

SCHEME = "hf://"
_NAME = r"[A-Za-z0-9_](?:[\w.-]*\w)?"
_ADDRESS = re.compile(rf"hf://datasets/({_NAME}/{_NAME})(?:@([\w./-]+))?/?", re.ASCII)


@dataclass(frozen=True)
class HubAddress:
    """The repository of a store: kind `datasets`, one store in each, its files from the root on.

    Attributes:
        repository: USER/NAME.
        revision: a branch, a tag or a commit; None is the newest state.
    """

    repository: str
    revision: str | None = None

    def __str__(self) -> str:
        return f"{SCHEME}datasets/{self.repository}" + ("" if self.revision is None else f"@{self.revision}")

    @property
    def name(self) -> str:
        """The last part of the repository's name."""
        return self.repository.rpartition("/")[2]


def hub_address(location: object) -> HubAddress | None:
    """The address on the Hub that a text is; None for any other place.

    Raises: StoreError for an address that begins with hf:// and is none of a data set.
    """
    text = str(location)
    if not text.startswith(SCHEME):
        return None
    found = _ADDRESS.fullmatch(text)
    if found is None:
        raise StoreError(
            "the address of a store on the Hub is hf://datasets/USER/NAME, with @REVISION for an earlier state",
            received=text,
            remedy="a store is a repository of its own, of the kind datasets: for instance hf://datasets/USER/camvid",
        )
    return HubAddress(found[1], found[2])
