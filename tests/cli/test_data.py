"""`kdcache data check` and --data with the layouts of public data sets."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from kdcache_cli.console import OUT

TINY = SimpleNamespace(**runpy.run_path(str(Path(__file__).parents[1] / "data" / "tiny.py")))


@pytest.mark.parametrize("layout", ["folder", "camvid", "voc", "cityscapes", "gta5", "ade20k"])
def test_a_check_says_which_layout_it_found(layout, cli, tmp_path) -> None:
    root = TINY.write(layout, tmp_path / "set [x]")
    looked = cli("data", "check", root, "--json", tmp_path / "report.json")
    assert looked.code == 0, looked.out + looked.err
    assert f"layout {layout} in {root}" in looked.out
    assert "nothing wrong" in looked.out
    assert json.loads((tmp_path / "report.json").read_text())["layout"] == layout
    named = cli("data", "check", f"{layout}:{root}", "--split", "val")
    assert named.code == 0
    assert "val: 1 images, 1 labelled" in named.out
    assert "layout scenes" in cli("data", "check", "scenes:32x48,train=1,val=1").out


def test_a_check_says_why_and_warns_without_failing(cli, tmp_path) -> None:
    root = TINY.write("folder", tmp_path / "set [x]")
    looked = cli("data", "check", root)
    assert f"layout folder in {root}: images/train/, images/val/ and classes.txt\n" in looked.out
    (root / "classes.txt").write_text("road\ncar\nsky\nunicorn [/]\n")
    looked = cli("data", "check", root)
    assert looked.code == 0
    assert "warning 1 of 4 classes are in no label: 'unicorn [/]'" in looked.out
    assert looked.out.rstrip().splitlines()[-2] == "no problem"
    (root / "classes.txt").write_text("id,name\nroad\ncar\nsky\n")
    looked = cli("data", "check", root, "--json", tmp_path / "report.json")
    assert looked.code == 1
    assert "problem the first line of classes.txt is a header ('id,name')" in looked.out
    assert "no problem" not in looked.out
    report = json.loads((tmp_path / "report.json").read_text())
    assert (len(report["problems"]), len(report["warnings"])) == (1, 0)
    assert report["why"] == "images/train/, images/val/ and classes.txt"


def test_a_conversion_ends_with_a_command_that_can_be_copied(cli, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(OUT, "_force_terminal", True)
    out = tmp_path / f"{'wide ' * 40}folder" / f"{'wider' * 40}"  # than any line
    converted = cli("data", "convert", TINY.write("coco", tmp_path / "coco"), out)
    assert converted.code == 0, converted.err
    last = converted.out.rstrip().splitlines()[-1]
    assert last == f"next: kdcache data check '{out}' --sheet sheet.png"


def test_a_conversion_counts_labels_and_warns_of_masks_of_0_and_255(cli, tmp_path) -> None:
    root = tmp_path / "set"
    TINY.save_image(root / "images/a.jpg")
    TINY.save_label(root / "masks/a.png", np.resize([0, 255], TINY.SIZE).astype(np.uint8))
    (root / "classes.txt").write_text("background\nroad\n")
    converted = cli("data", "convert", root, tmp_path / "out")
    assert "1 images written (1 hard link; labels: 1 hard link), 0 kept, 0 left out" in converted.out
    assert "hold 'background' and void alone" in converted.err
    binary = cli("data", "convert", root, tmp_path / "binary", "--binary")
    assert "labels: 1 file)" in binary.out
    assert "warning" not in binary.err


def test_a_check_names_the_kinds_of_labels_and_the_most_frequent_sizes(cli, tmp_path) -> None:
    (tmp_path / "classes.txt").write_text("road 9 9 9\ncar 200 0 0\n")
    for number, height in enumerate((32, 40, 40, 33, 34, 35)):
        TINY.save_image(tmp_path / f"images/train/{number}.png", (height, 48))
        label = np.full((height, 48, 3), 9, np.uint8) if number else np.resize([0, 1], (height, 48)).astype(np.uint8)
        TINY.save_label(tmp_path / f"labels/train/{number}.png", label)
    found = cli("data", "check", tmp_path).out
    assert "train: 6 images, 6 labelled (8-bit RGB, 8-bit grey); sizes 2 of 40x48, 1 of 32x48" in found
    assert "and 1 other sizes" in found


def test_a_check_shows_depth_and_refuses_what_lies_beyond(cli, tmp_path) -> None:
    data = "scenes:32x48,train=4,val=1,depth=sparse,tasks=halves"
    looked = cli("data", "check", data, "--json", tmp_path / "report.json", "--max-depth", "80")
    assert looked.code == 0, looked.out + looked.err
    assert "train: 4 images, 2 labelled, 2 with depth" in looked.out
    assert "40 to 80" in looked.out
    depth = json.loads((tmp_path / "report.json").read_text())["splits"]["train"]["depth"]
    assert f"depth: {depth['least']:.2f} to {depth['most']:.2f} m, known for" in looked.out
    assert sum(depth["histogram"]) == depth["known"] > 0
    refused = cli("data", "check", data, "--max-depth", "50")
    assert refused.code == 1
    assert "beyond 50 m" in refused.out
    assert cli("data", "check", data, "--max-depth", "-1").code == 2


def test_pictures_without_splits_train_as_the_message_says(cli, tmp_path) -> None:
    root = tmp_path / "mine"
    for name in "abcdefgh":
        TINY.save_image(root / f"images/{name}.png")
        TINY.save_label(root / f"labels/{name}.png", TINY.numbers("folder", name))
    (root / "classes.txt").write_text("road\ncar\nsky\n")
    train = f"train-teacher --data {root} --model kdcache:tiny --size 32x48 --iterations 2 --batch-size 2"
    refused = cli(*f"{train} --out {tmp_path}/run".split())
    assert refused.code == 2
    remedy = "--fold 0/5 --val-split train --val-fold 0/5"
    assert remedy in refused.err
    trained = cli(*f"{train} {remedy} --out {tmp_path}/other".split())
    assert trained.code == 0, trained.err


def test_a_defect_ends_a_check_with_1_and_is_explained(cli, tmp_path) -> None:
    root = TINY.write("cityscapes", tmp_path / "set")
    path = root / "gtFine/train/trainstadt/trainstadt_a_gtFine_labelIds.png"
    TINY.save_label(path, TINY.numbers("voc") % 19)
    looked = cli("data", "check", root)
    assert looked.code == 1
    assert "problem train: 1 samples cannot be read" in looked.out
    assert "it has train ids" in looked.out


@pytest.mark.parametrize(
    ("words", "received", "remedy"),
    [
        ("data check vco:{w}/voc", "Unknown layout 'vco'", "Did you mean voc?"),
        ("data check voc:{w}/nowhere", "Data folder not found: ", "Check the path"),
        ("data check {w}", "ade20k: images/training/", "{w}/voc (voc)"),
        ("data check voc:{w}/voc --download", "--download was removed", "torchvision"),
        (
            "train-teacher --data camvid:{w}/voc --model kdcache:tiny --size 32x48 --out {w}/run",
            "layout voc",
            "voc:{w}/voc",
        ),
    ],
)
def test_wrong_words_end_in_one_panel(words, received, remedy, cli, tmp_path) -> None:
    TINY.write("voc", tmp_path / "voc")
    ended = cli(*words.format(w=tmp_path).split())
    assert ended.code == 2
    assert received.format(w=tmp_path) in ended.err
    assert remedy.format(w=tmp_path) in ended.err
    assert "Traceback" not in ended.err
    assert not (tmp_path / "run").exists()


def test_a_training_from_voc(cli, tmp_path) -> None:
    """From the folder above VOCdevkit, as it is unpacked: train, build a store, evaluate."""
    TINY.write("voc", tmp_path / "data/VOCdevkit/VOC2012")
    data = f"voc:{tmp_path}/data"
    train = f"train-teacher --data {data} --model kdcache:tiny --size 32x48 --iterations 2 --batch-size 2"
    trained = cli(*f"{train} --val-every 2 --out {tmp_path}/teacher".split())
    assert trained.code == 0, trained.err
    assert "best mIoU" in trained.out
    built = cli(*f"build-teacher-cache --data {data} --teacher {tmp_path}/teacher --out {tmp_path}/s.zarr".split())
    assert built.code == 0, built.err
    scored = cli(*f"evaluate {tmp_path}/teacher --data {data} --split val".split())
    assert scored.code == 0, scored.err
    assert "tvmonitor" in scored.out
