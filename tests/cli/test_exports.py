"""What people see who try an export of a labelling tool."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image


def write(root: Path) -> Path:
    root.mkdir()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (24, 32, 3), dtype=np.uint8)).save(root / "a.jpg")
    shape = {"label": "car", "points": [[4, 6], [20, 6], [20, 12]], "shape_type": "polygon"}
    (root / "a.json").write_text(json.dumps({"shapes": [shape], "imagePath": "a.jpg", "imageData": None}))
    return root


def test_a_check_and_a_training_name_the_file_and_the_command(cli, tmp_path: Path) -> None:
    root = write(tmp_path / "my set")
    looked = cli("data", "check", root, "--sheet", tmp_path / "sheet.png")
    assert looked.code == 0, looked.err
    assert f"layout labelme in {root}: a.json; background and its classes" in looked.out
    command = f"kdcache data convert '{root}' 'my set-folder'"
    assert looked.out.rstrip().splitlines()[-1] == f"next: {command}"
    tried = cli(
        "train-teacher", "--data", root, "--model", "kdcache:tiny", "--size", "32x32", "--out", tmp_path / "run"
    )
    assert tried.code == 2
    assert "labelme" in tried.err
    assert "kdcache data convert" in tried.err
    assert not (tmp_path / "run").exists()
    converted = cli("data", "convert", root, tmp_path / "out")
    assert converted.code == 0, converted.err
    assert cli("data", "check", tmp_path / "out").code == 0


def test_a_file_of_an_export_is_named_with_its_folder(cli, tmp_path: Path) -> None:
    root = write(tmp_path / "set")
    looked = cli("data", "check", root / "a.json")
    assert looked.code == 2
    assert "Name its folder" in " ".join(looked.err.split())
