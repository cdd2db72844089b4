"""The full state of a training in one file, replaced whole or not at all."""

from pathlib import Path
from typing import Any

import torch

from kdcache.errors import RecipeError
from kdcache.store.durable import disk_space_errors, sync_path

FILE = "checkpoint.pt"
PARTS = {"model", "criterion", "optimizer", "schedule", "progress", "random"}


def save_checkpoint(run: Path, state: dict[str, Any]) -> None:
    """Write model, projections of the loss, optimizer, schedule, random state, step and best so far."""
    partial = run / f".{FILE}.partial"
    with disk_space_errors(run):
        try:
            torch.save(state, partial)
            sync_path(partial)
            partial.replace(run / FILE)
        finally:
            partial.unlink(missing_ok=True)  # what does not fit must not keep the disk full
        sync_path(run)


def load_checkpoint(run: Path, device: torch.device) -> dict[str, Any] | None:
    """The last saved state, None when nothing was saved yet. Tensors and plain values only: no pickled code.

    Raises: RecipeError when the file cannot be read.
    """
    path = run / FILE
    if not path.is_file():
        return None
    try:
        state: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:
        raise _unreadable(path, (str(error) or type(error).__name__).splitlines()[0]) from error
    if not isinstance(state, dict) or state.keys() != PARTS:
        raise _unreadable(path, "it holds something else")
    return state


def _unreadable(path: Path, what: str) -> RecipeError:
    return RecipeError(
        "a checkpoint must be readable",
        received=f"{path}: {what}",
        remedy="delete that file to begin the run again, or restore it from a copy",
    )
