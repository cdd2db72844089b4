"""From what the user typed to splits: a folder, or the built-in procedural `scenes`."""

from __future__ import annotations

import os

from kdcache.data.folder import list_folder_splits, open_folder
from kdcache.data.sample import Split
from kdcache.data.scenes import ScenesSpec, ScenesSplit, is_scenes


def open_split(data: str | os.PathLike[str], split: str) -> Split:
    """Open one split of a data set.

    Args:
        data: a folder in the `folder` layout, or `scenes`, `scenes:HxW,train=64,val=16,seed=0,unlabelled=0`
            (a folder of that name is `./scenes`).
        split: its name, such as `train`.
    Raises: DataError with what is missing or malformed.
    """
    data = os.fspath(data)
    return ScenesSplit(data, split) if is_scenes(data) else open_folder(data, split)


def list_splits(data: str | os.PathLike[str]) -> list[str]:
    """Names of the splits that `open_split` would find, sorted.

    Raises: DataError for a malformed spec or a folder without `images`.
    """
    data = os.fspath(data)
    return ScenesSpec.parse(data).splits() if is_scenes(data) else list_folder_splits(data)
