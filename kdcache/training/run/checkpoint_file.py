"""The full state of a training in one file, replaced completely or not at all."""

import os
import shlex
import shutil
import zipfile
from pathlib import Path
from typing import Any

import torch

from kdcache.bounded import check_unpacked
from kdcache.errors import RecipeError
from kdcache.files import replacing
from kdcache.store.backend.durable import disk_space_errors

FILE = "checkpoint.pt"
KEPT = "checkpoints"
PARTS = {"model", "criterion", "optimizer", "schedule", "progress", "random"}
EMA = "ema"  # a part of a training with --ema alone


def save_checkpoint(run: Path, state: dict[str, Any]) -> None:
    """Write the state of a training to `checkpoint.pt` in the folder `run`, completely or not at all.

    `state` has the parts model, criterion, optimizer, schedule, progress and random, and with --ema also ema.
    """
    with disk_space_errors(run), replacing(run / FILE) as partial:
        torch.save(state, partial)


def keep_checkpoint(run: Path, step: int) -> None:
    """Keep the newest checkpoint, saved after `step` steps, also as `checkpoints/step-NNNNNN.pt` in the folder `run`.

    This file is a hard link, or a copy on a file system without links. The next save does not change it.
    """
    path = run / KEPT / f"step-{step:06}.pt"
    with disk_space_errors(run):
        path.parent.mkdir(exist_ok=True)
        with replacing(path) as partial:
            try:
                os.link(run / FILE, partial)
            except OSError:
                shutil.copyfile(run / FILE, partial)


def load_checkpoint(run: Path, device: torch.device) -> dict[str, Any] | None:
    """Return the last saved state in the folder `run`: name of a part -> its state. None if nothing was saved yet.

    Tensors are loaded to `device`. The file has tensors and plain values, and no pickled code.

    Raises: RecipeError if the file cannot be read.
    """
    path = run / FILE
    if not path.is_file():
        return None
    try:
        check_unpacked(path)
        _check_sums(path)
        state: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:
        raise _unreadable(path, (str(error) or type(error).__name__).splitlines()[0]) from error
    if not isinstance(state, dict) or state.keys() - {EMA} != PARTS:
        raise _unreadable(path, "it holds something else")
    return state


def _check_sums(path: Path) -> None:
    """Compare the checksums of a checkpoint, because torch does not. Raises: ValueError, zipfile.BadZipFile."""
    with zipfile.ZipFile(path) as archive:
        if (damaged := archive.testzip()) is not None:
            raise ValueError(f"{damaged} in it has another checksum than when it was written")


def _unreadable(path: Path, what: str) -> RecipeError:
    return RecipeError(
        f"Cannot read the checkpoint {path}: {what}",
        fix="Restore it from a copy. Or delete it and repeat the command, which begins the run again: "
        + shlex.join(["rm", str(path)]),
    )
