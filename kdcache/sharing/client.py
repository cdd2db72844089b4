"""The Hub's client, huggingface_hub: the extra `hub`. Token and endpoint are those that it finds itself.

A token is HF_TOKEN's or that of `hf auth login`; HF_ENDPOINT names another Hub.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from kdcache.errors import StoreError
from kdcache.sharing.address import HubAddress

try:
    from huggingface_hub import CommitOperationAdd, HfApi, get_token, snapshot_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HfHubHTTPError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )
    from huggingface_hub.hf_api import RepoFile
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars, tqdm
except ImportError as error:
    raise StoreError(
        "stores on the Hub need huggingface_hub",
        received=f"it cannot be imported ({error})",
        remedy="in a clone of kdcache: pip install '.[hub]'",
    ) from error

__all__ = ["DATASET", "NOT_THERE", "CommitOperationAdd", "RepoFile"]
__all__ += ["answers", "check_token", "hub", "snapshot_download", "tqdm"]
DATASET = "dataset"
"""The kind of repository that a store is, as the client names it."""
NOT_THERE = (RepositoryNotFoundError, RevisionNotFoundError, EntryNotFoundError)
_HTTP_ERROR: type[Exception] = HfHubHTTPError.__mro__[1]  # of the client's own HTTP library, which has changed its name
_LOG_IN = "give a token that may, as HF_TOKEN or with: hf auth login"
_GO_ON = "run the same command again: it goes on where it stopped"
_REMEDIES = {
    400: "correct what the Hub names, for instance --license",
    401: "set HF_TOKEN to a token that is valid, or log in with: hf auth login",
    402: "make room, or a plan for it, on the Hub; then run the same command again: it goes on where it stopped",
    403: _LOG_IN,
    404: "check the address; a private or gated repository needs a token that may read it (HF_TOKEN)",
}


def hub() -> HfApi:
    """The client."""
    return HfApi(library_name="kdcache")


def check_token() -> None:
    """Refuse to push without a token. Raises StoreError."""
    if get_token() is None:
        raise StoreError(
            "pushing to the Hub needs a token that may write there",
            received="no HF_TOKEN in the environment, and no login",
            remedy="set HF_TOKEN, or log in once with: hf auth login",
        )


@contextmanager
def answers(address: HubAddress) -> Iterator[None]:
    """Turn what the Hub refuses, and what does not reach it, into an error with a remedy. Its own bars are hidden.

    Raises: StoreError. Errors of this machine's disk stay what they are.
    """
    shown = not are_progress_bars_disabled()
    if shown:
        disable_progress_bars()
    try:
        yield
    except (_HTTP_ERROR, OSError, ValueError, RuntimeError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise StoreError(
            "the Hub must answer, and take what is sent",
            received=f"{address}: {_summary(error)}",
            remedy=_REMEDIES.get(_status(error) or 0, _GO_ON),
        ) from error
    finally:
        if shown:
            enable_progress_bars()


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _status(error: BaseException) -> int | None:
    """The status of the answer that an error came of; None where there was no answer."""
    statuses = (getattr(getattr(one, "response", None), "status_code", None) for one in _chain(error))
    return next((int(status) for status in statuses if status is not None), None)


def _summary(error: BaseException) -> str:
    """What went wrong, in a line: the server's own words where there are some."""
    chain = list(_chain(error))
    answer = next(filter(None, (getattr(one, "server_message", None) for one in chain)), None)
    checked = isinstance(error, ValueError) and not isinstance(error, _HTTP_ERROR)  # by the client, which explains it
    words = str(error) if checked else str(answer or chain[-1]) or type(chain[-1]).__name__
    lines = [line.strip() for line in words.splitlines() if line.strip()]
    status = _status(error)
    return ("" if status is None else f"{status}, ") + " ".join(lines[:2])[:300]
