"""Weights from Hugging Face's hub, for the spec `default`."""

from pathlib import Path
from typing import Any

from torch import Tensor

from kdcache.errors import ModelError
from kdcache.models.class_names import names_beside
from kdcache.models.weights import HUB_FILES, read_state_dict


def download_state(repository: str) -> dict[str, Tensor]:
    """Return the weights of a Hugging Face repository (`OWNER/NAME`): name -> tensor. They are downloaded once.

    Raises: ModelError if there is no network, or if the repository has no weights.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    for name in HUB_FILES:
        try:
            return read_state_dict(hf_hub_download(repository, name))
        except LocalEntryNotFoundError as error:  # offline, and a subclass of the next
            raise not_downloaded(repository, error) from error
        except EntryNotFoundError:
            continue
        except ModelError:
            raise
        except Exception as error:  # the hub's own errors, those of its HTTP client, OSError
            raise not_downloaded(repository, error) from error
    raise not_downloaded(repository, FileNotFoundError(f"it has none of {', '.join(HUB_FILES)}"))


def download_names(repository: str) -> tuple[str, ...]:
    """Return the class names, in the order of the class ids, from the config.json of a Hugging Face repository.

    `repository` is `OWNER/NAME`. Return () if the names are not available.
    """
    from huggingface_hub import hf_hub_download

    try:
        return names_beside(Path(hf_hub_download(repository, "config.json")))
    except Exception:  # the hub's own errors, those of its HTTP client, OSError: the weights are there
        return ()


def not_downloaded(repository: str, error: Any) -> ModelError:
    """Return the ModelError for a failed download from a Hugging Face repository. `error` gives the reason."""
    reason = (str(error) or type(error).__name__).splitlines()[0]
    return ModelError(
        f"Cannot download weights 'default' from https://huggingface.co/{repository}: {reason}",
        fix="Check the network, or fetch that repository yourself and give its folder as the weights.",
    )
