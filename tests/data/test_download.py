"""Downloads: torchvision is asked, and nothing half is taken for whole. No test uses a network."""

from __future__ import annotations

import urllib.error
from pathlib import Path
from typing import ClassVar

import pytest
import torchvision.datasets

from kdcache.data import download, open_split
from kdcache.errors import DataError


@pytest.fixture
def torchvision_voc(monkeypatch, tiny):
    """Stands in for VOCSegmentation: calls are noted, `fails` is raised after part of the work, `lacks` left out."""

    class Fake:
        calls: ClassVar[list[str]] = []
        fails: BaseException | None = None
        lacks = ""

        def __init__(self, root: str, *, year: str, image_set: str, download: bool) -> None:
            assert (year, image_set, download) == ("2012", "train", True)
            Fake.calls.append(root)
            (Path(root) / "VOCtrainval_11-May-2012.tar").write_bytes(b"archive")
            made = tiny.write("voc", Path(root) / "VOCdevkit/VOC2012")
            if Fake.lacks:
                (made / Fake.lacks).unlink()
            if Fake.fails is not None:
                raise Fake.fails

    monkeypatch.setattr(torchvision.datasets, "VOCSegmentation", Fake)
    return Fake


def refusal(layout: str, root: Path) -> DataError:
    with pytest.raises(DataError) as caught:
        download(layout, root)
    assert caught.value.remedy
    return caught.value


def nothing_usable(root: Path) -> bool:
    try:
        open_split(root, "train")
    except DataError:
        return not (root / "VOCdevkit/VOC2012").exists()
    return False


def test_a_download_is_made_once_and_leaves_only_the_data(torchvision_voc, tmp_path) -> None:
    root = tmp_path / "new" / "data"
    made = download("voc", root)
    assert made == root / "VOCdevkit/VOC2012"
    assert len(open_split(f"voc:{root}", "train")) == 3
    assert {path.name for path in root.iterdir()} <= {"VOCdevkit", ".kdcache-download.lock"}
    assert download("voc", root) == made
    assert len(torchvision_voc.calls) == 1


def test_data_that_are_there_are_not_fetched(torchvision_voc, tiny, tmp_path) -> None:
    root = tiny.write("voc", tmp_path / "VOC2012")
    assert download("voc", tmp_path) == root
    assert download("voc", root) == root
    assert torchvision_voc.calls == []


@pytest.mark.parametrize(
    "error",
    [urllib.error.URLError("no route"), RuntimeError("File not found or corrupted."), OSError(28, "No space left")],
)
def test_a_failed_download_is_an_error_and_the_next_one_goes_on(error, torchvision_voc, tmp_path) -> None:
    torchvision_voc.fails = error
    refused = refusal("voc", tmp_path)
    assert str(error) in refused.received
    assert "VOCtrainval_11-May-2012.tar" in refused.remedy
    assert nothing_usable(tmp_path)
    assert (tmp_path / ".kdcache-download/VOCtrainval_11-May-2012.tar").is_file()
    torchvision_voc.fails = None
    download("voc", tmp_path)
    assert len(open_split(tmp_path, "val")) == 1


def test_an_interrupted_download_is_nothing(torchvision_voc, tmp_path) -> None:
    torchvision_voc.fails = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        download("voc", tmp_path)
    assert nothing_usable(tmp_path)


@pytest.mark.parametrize(
    "lacks",
    ["JPEGImages/a.jpg", "SegmentationClass/d.png", "ImageSets/Segmentation/val.txt", "SegmentationClass/a.png"],
)
def test_an_archive_that_is_not_whole_is_refused(lacks, torchvision_voc, tmp_path) -> None:
    torchvision_voc.lacks = lacks
    assert "is whole" in refusal("voc", tmp_path).rule
    assert nothing_usable(tmp_path)


def test_what_lies_there_is_not_replaced(torchvision_voc, tiny, tmp_path) -> None:
    root = tiny.write("voc", tmp_path / "VOCdevkit/VOC2012")
    (root / "JPEGImages/a.jpg").unlink()
    assert "JPEGImages/a" in refusal("voc", tmp_path).received
    assert torchvision_voc.calls == []


@pytest.mark.parametrize(
    ("layout", "words"), [("cityscapes", "registration"), ("folder", "by hand"), ("vco", "Use voc")]
)
def test_other_data_sets_are_not_downloaded(layout, words, torchvision_voc, tmp_path) -> None:
    error = refusal(layout, tmp_path / "new")
    assert words in error.remedy
    assert not (tmp_path / "new").exists()


def test_a_place_that_is_a_file(torchvision_voc, tmp_path) -> None:
    (tmp_path / "file").write_text("x")
    assert str(tmp_path / "file") in refusal("voc", tmp_path / "file").received
