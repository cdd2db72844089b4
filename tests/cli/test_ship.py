"""`kdcache export` and `kdcache predict`: from a run to files that others use."""

from __future__ import annotations

import json
import shutil

import onnx
import pytest
from PIL import Image

from kdcache.data.files import read_image

SAFE = "kdcache:tiny@{w}/student.safetensors"


@pytest.fixture(scope="session")
def exported(made, cli, tmp_path_factory):
    """The world's teacher as all three formats."""
    folder = tmp_path_factory.mktemp("exported")
    for suffix in ("safetensors", "onnx", "pt2"):
        ended = cli("export", made / "teacher", "--out", folder / f"student.{suffix}", "--size", "64x96")
        assert ended.code == 0, ended.err
        assert f"student.{suffix}" in ended.out
        assert "largest difference" in ended.out
    return folder


def test_a_run_is_exported(exported) -> None:
    told = {p.key: p.value for p in onnx.load(exported / "student.onnx").metadata_props}
    assert json.loads(told["size"]) == [64, 96]
    assert len(json.loads(told["class_names"])) == 7
    assert sorted(p.name for p in exported.iterdir()) == ["student.onnx", "student.pt2", "student.safetensors"]


def test_raw_logits_and_an_explicit_format(world, cli) -> None:
    ended = cli(
        "export", world / "teacher", "--out", world / "raw.onnx", "--raw", "--format", "onnx", "--size", "64x96"
    )
    assert ended.code == 0, ended.err
    assert "batch, height, width" in ended.out
    dims = onnx.load(world / "raw.onnx").graph.output[0].type.tensor_type.shape.dim
    assert [d.dim_param or d.dim_value for d in dims] == ["batch", 7, "logits_height", "logits_width"]


def test_predictions_of_a_run_and_of_its_export_are_the_same(world, exported, cli, tree) -> None:
    pictures = world / "data/images/val"
    first = cli("predict", world / "teacher", pictures, "--out", world / "one", "--size", "64x96")
    assert first.code == 0, first.err
    assert "2 images" in first.out
    assert "pixels %" in first.out
    spec = SAFE.format(w=exported)
    again = cli("predict", spec, f"{pictures}/*", "--out", world / "two")
    assert again.code == 0, again.err
    assert tree(world / "one") == tree(world / "two")
    for path in pictures.iterdir():
        image = read_image(path)
        with Image.open(world / "one/labels" / f"{path.stem}.png") as label:
            assert label.size == image.shape[1::-1]
        assert read_image(world / "one/overlays" / f"{path.stem}.png").shape == image.shape


def test_weights_that_say_nothing_get_numbers_or_the_names_of_a_folder(world, cli) -> None:
    (world / "alone").mkdir()
    weights = shutil.copy(world / "teacher/best.safetensors", world / "alone")  # no model.json is next to it
    spec = f"kdcache:tiny@{weights}"
    image = world / "data/images/val/val-000000.png"
    numbers = cli("predict", spec, image, "--out", world / "one", "--size", "32x48")
    assert "class 0" in numbers.out, numbers.err
    named = cli("predict", spec, image, "--out", world / "two", "--size", "32x48", "--classes", world / "data")
    assert "class 0" not in named.out
    assert (world / "two/classes.txt").read_text() == (world / "data/classes.txt").read_text()


CASES = {
    "no size": ("predict kdcache:tiny@{w}/teacher/best.safetensors {w}/data/images --out {w}/new", "Missing the size"),
    "spec without weights": ("export kdcache:tiny --out {w}/new.onnx", "Missing weights of 'kdcache:tiny'"),
    "no run": ("export {w}/none --out {w}/new.onnx", "Run not found: {w}/none"),
    "classes of a run": (
        "predict {w}/teacher {w}/data/images --classes {w}/data --out {w}/new",
        "Cannot give classes to the run {w}/teacher: it has its own"),
    "no classes there": (
        "predict kdcache:tiny@{w}/teacher/best.safetensors {w}/data/images --size 32x48 --classes {w} --out {w}/new",
        "classes.txt"),
    "unknown weights": ("predict {w}/teacher {w}/data/images --weights bset --out {w}/new", "'bset'"),
    "no images": ("predict {w}/teacher {w}/teacher --out {w}/new", "No images (.jpg"),
    "names that clash": (
        "predict {w}/teacher {w}/data/images/val {w}/data/labels/val --out {w}/new", "two results val-000000.png"),
    "image nowhere": ("predict {w}/teacher {w}/a.png --out {w}/new", "Image not found: {w}/a.png"),
    "occupied": ("predict {w}/teacher {w}/data/images --out {w}/data", "holds something"),
    "another format": ("export {w}/teacher --out {w}/new.tflite", "new.tflite"),
    "format and suffix": ("export {w}/teacher --format onnx --out {w}/new.pt2", "Cannot write onnx to --out"),
    "weights alone are not raw": ("export {w}/teacher --raw --out {w}/new.safetensors", "--raw with safetensors"),
    "export over a file": (
        "export {w}/teacher --out {w}/teacher/best.safetensors",
        "Cannot write {w}/teacher/best.safetensors: it exists"),
    "export nowhere": ("export {w}/teacher --out {w}/none/new.onnx", "no folder"),
    "tolerance of nothing": (
        "export {w}/teacher --tolerance 0 --out {w}/new.onnx --size 64x96",
        "new.onnx answers otherwise than the model"),
}  # fmt: skip


@pytest.mark.parametrize(("command", "received"), [pytest.param(*case, id=name) for name, case in CASES.items()])
def test_wrong_input(world, cli, tree, command, received) -> None:
    before = tree(world)
    ended = cli(*command.format(w=world).split())
    assert ended.code == 2, (ended.out, ended.err)
    assert received.format(w=world) in ended.err
    assert ended.err.count("fix: ") == 1
    assert "should not have happened" not in ended.err
    assert tree(world) == before


def test_a_broken_image_is_named(world, cli) -> None:
    (world / "broken.png").write_bytes(b"no picture")
    ended = cli("predict", world / "teacher", world / "broken.png", "--out", world / "new")
    assert (ended.code, "broken.png" in ended.err) == (2, True)


def test_an_upright_camera(world, cli) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (60, 30), (90, 100, 110)).save(world / "turned.jpg", exif=exif)
    assert cli("predict", world / "teacher", world / "turned.jpg", "--out", world / "new").code == 0
    with Image.open(world / "new/labels/turned.png") as label:
        assert label.size == (30, 60)
