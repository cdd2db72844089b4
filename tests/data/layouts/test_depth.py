"""Depth files: units, what means unknown, and everything that cannot be metres."""

from __future__ import annotations

import itertools
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kdcache.data import check, list_splits, open_split
from kdcache.errors import DataError, RecipeError

SIZE = (6, 8)
METRES = np.linspace(0.5, 79.5, 48, dtype=np.float32).reshape(SIZE)
METRES[0, :3] = np.nan


@pytest.fixture
def deep(builder):
    """A function that writes depth of sample `a`, whose image and label are there, and opens the split."""

    def write(suffix: str, numbers: np.ndarray, toml: str = "", *, name: str = "a"):
        builder.pair("a")
        path = builder.root / "depth/train" / f"{name}{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        if suffix == ".npy":
            np.save(path, numbers)
        elif suffix == ".npz":
            np.savez(path, other=np.zeros(3), depth=numbers)
        else:
            Image.fromarray(numbers).save(path)
        if toml:
            (builder.root / "depth.toml").write_text(toml)
        return open_split(builder.root, "train")

    return write


def in_units(per_metre: float) -> np.ndarray:
    return np.nan_to_num(METRES * per_metre).round().astype(np.uint16)


@pytest.mark.parametrize(
    ("suffix", "numbers", "toml"),
    [
        (".npy", METRES, ""),
        (".npy", METRES.astype(np.float64), ""),
        (".npz", METRES, ""),
        (".tiff", METRES, ""),
        (".tif", np.nan_to_num(METRES), ""),  # 0 is unknown
        (".png", in_units(256), "units_per_metre = 256"),
        (".png", in_units(500), "units_per_metre = 500"),
        (".npy", in_units(256).astype(np.int32), "units_per_metre = 256.0"),
        (".npy", np.where(np.isnan(METRES), -1, METRES * 1000), "units_per_metre = 1000\ninvalid = [-1, 0]"),
        (".npy", np.where(np.isnan(METRES), np.inf, METRES), ""),
        (".npy", np.where(np.isnan(METRES), 1e300, METRES.astype(np.float64)), ""),  # beyond float32
    ],
)
def test_each_format_becomes_the_same_metres(deep, suffix, numbers, toml) -> None:
    split = deep(suffix, numbers, toml)
    assert split.tasks == ("segmentation", "depth")
    assert split.has_label(0, "depth")
    depth = split.label(0, "depth")
    assert depth.dtype == np.float32
    np.testing.assert_allclose(depth, METRES, atol=0.51 / 256, rtol=1e-6)
    assert np.array_equal(pickle.loads(pickle.dumps(split)).label(0, "depth"), depth, equal_nan=True)
    assert len(split.content_digests(0)) == 3


@pytest.mark.parametrize(
    ("suffix", "numbers", "toml", "message"),
    [
        (".png", in_units(256), "", "units_per_metre"),
        (".npy", in_units(256), "", "units_per_metre"),
        (".png", in_units(256), "units_per_metre = 1", "in 1/256 m"),
        (".npy", METRES * 1000, "", "in millimetres"),
        (".npy", -METRES, "", "not above 0"),
        (".npy", np.zeros(SIZE, np.float32), "", "no pixel has a known depth"),
        (".npy", METRES[:-1], "", "label 5 x 8, image 6 x 8"),
        (".npy", METRES[None], "", r"\(1, 6, 8\)"),
        (".npy", METRES.astype(complex), "", "complex"),
        (".npy", np.zeros((0, 8), np.uint16), "", r"\(0, 8\)"),
        (".npy", np.array([{}], object), "", "Cannot read depth file"),
        (".png", np.ones(SIZE, np.uint8), "units_per_metre = 1", "8-bit grey"),
        (".png", np.ones((*SIZE, 3), np.uint8), "units_per_metre = 1", "8-bit RGB"),
        (".tif", np.ones((*SIZE, 3), np.uint8), "", "mode RGB"),
    ],
)
def test_what_is_no_depth_is_refused(deep, suffix, numbers, toml, message) -> None:
    split = deep(suffix, numbers, toml)
    with pytest.raises(DataError, match=message) as caught:
        split.label(0, "depth")
    assert "depth/train/a" in str(caught.value)
    assert split.label(0) is not None  # the other task is there still


@pytest.mark.parametrize(
    "toml", ["units_per_metre = 0", "units_per_metre = true", "unit = 3", "invalid = 0", "invalid = ['a']", "nonsense"]
)
def test_a_malformed_sidecar_is_refused(deep, toml) -> None:
    with pytest.raises(DataError, match=r"(?s)Cannot read .*depth\.toml: .*units_per_metre.*invalid"):
        deep(".npy", METRES, toml)


def test_an_unreadable_file_is_named(deep) -> None:
    split = deep(".npy", METRES)
    split.samples[0].labels["depth"].path.write_bytes(b"\x93NUMPY nothing")
    with pytest.raises(DataError, match=r"Cannot read depth file .*a\.npy"):
        split.label(0, "depth")


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".png", ".tiff"])
def test_a_file_cut_short_is_named(deep, suffix) -> None:
    split = deep(suffix, in_units(256) if suffix == ".png" else METRES, "units_per_metre = 256")
    path = split.samples[0].labels["depth"].path
    whole = path.read_bytes()
    for length in (0, 7, 60, len(whole) - 30):
        path.write_bytes(whole[:length])
        with pytest.raises(DataError, match=path.name):
            split.label(0, "depth")


def test_depth_without_an_image_is_refused_and_reported(deep, builder) -> None:
    with pytest.raises(DataError, match=r"'b\.npy'"):
        deep(".npy", METRES, name="b")
    np.save(builder.root / "depth/train/a.npy", METRES)
    np.savez(builder.root / "depth/train/a.npz", METRES)
    report = check(builder.root)
    assert report.splits["train"].depth.without_image == ["a.npz", "b.npy"]
    assert "2 depth files belong to no image, or to one that has another: 'a.npz', 'b.npy'" in report.problems[0]


def test_samples_may_have_either_label_or_none(deep, builder) -> None:
    for name in ("b.png", "c.png"):
        builder.image(name)
    split = deep(".npy", METRES, name="b")
    has = [(split.has_label(i), split.has_label(i, "depth")) for i in range(3)]
    assert has == [(True, False), (False, True), (False, False)]
    assert split.label(0, "depth") is None


def test_depth_alone_needs_no_classes(new_builder) -> None:
    one = new_builder("deep")
    one.image("a.png")
    (one.root / "depth/train").mkdir(parents=True)
    np.save(one.root / "depth/train/a.npy", METRES)
    split = open_split(one.root, "train")
    assert (split.classes.names, split.tasks) == ((), ("depth",))
    report = check(one.root)
    assert (report.problems, report.splits["train"].depth.labelled) == ([], 1)


def test_pictures_without_splits_are_divided_by_lists(new_builder) -> None:
    one = new_builder("flat").classes()
    for name in ("a", "b"):
        one.image(f"{name}.png", split=".")
        (one.root / "depth").mkdir(exist_ok=True)
        np.save(one.root / f"depth/{name}.npy", METRES)
    (one.root / "val.txt").write_text("b\n")
    (one.root / "train.txt").write_text("a\n")
    assert list_splits(one.root) == ["train", "val"]
    assert open_split(one.root, "val").label(0, "depth") is not None


def test_a_check_counts_range_share_and_histogram(deep, builder) -> None:
    deep(".npy", METRES)
    depth = check(builder.root).splits["train"].depth
    known = METRES[np.isfinite(METRES)]
    assert (depth.labelled, depth.pixels, depth.known) == (1, 48, 45)
    assert (depth.least, depth.most) == (known.min(), known.max())
    edges = [*depth.edges, np.inf]
    assert depth.histogram == [int(((known >= a) & (known < b)).sum()) for a, b in itertools.pairwise(edges)]


@pytest.mark.parametrize(
    ("numbers", "toml", "max_depth", "message"),
    [
        (in_units(256), "units_per_metre = 1", None, "in 1/256 m (KITTI) that would be"),
        (-METRES, "", None, "45 of 45 depths are not above 0"),
        (np.zeros(SIZE), "", None, "no pixel has a known depth"),
        (METRES, "", 40.0, "beyond 40 m"),
        (METRES[:, :-1], "", None, "another size than their image"),
        (in_units(256), "", None, "Write `units_per_metre = 1000` (millimetres) or 256"),
    ],
)
def test_a_check_lists_what_is_impossible(deep, builder, numbers, toml, max_depth, message) -> None:
    deep(".npy", numbers, toml)
    (problem,) = [each for each in check(builder.root, max_depth=max_depth).problems if message in each]
    assert "'a'" in problem


def test_a_check_warns_of_few_points_and_of_small_numbers(deep, builder) -> None:
    deep(".npy", METRES / 1000)
    assert any("divided once too often" in warning for warning in check(builder.root).warnings)
    sparse = np.zeros((60, 80), np.float32)
    sparse[3, 3] = 5
    builder.image("a.png", size=sparse.shape)
    np.save(builder.root / "depth/train/a.npy", sparse)
    assert any("0.021 % of the pixels" in warning for warning in check(builder.root).warnings)


def test_max_depth_is_above_0(builder) -> None:
    with pytest.raises(RecipeError, match="above 0"):
        check(builder.root, max_depth=0)


# Cityscapes


def cityscapes(tiny, root: Path) -> Path:
    tiny.write("cityscapes", root)
    numbers = np.arange(tiny.SIZE[0] * tiny.SIZE[1]).reshape(tiny.SIZE).astype(np.uint16) * 30
    for name in ("a", "b"):
        city = root / "disparity/train/trainstadt"
        city.mkdir(parents=True, exist_ok=True)
        numbers[0, 1] = 1
        Image.fromarray(numbers).save(city / f"trainstadt_{name}_disparity.png")
        camera = root / f"camera/train/trainstadt/trainstadt_{name}_camera.json"
        camera.parent.mkdir(parents=True, exist_ok=True)
        camera.write_text('{"extrinsic": {"baseline": 0.209313}, "intrinsic": {"fx": 2262.52}}')
    return root


def test_disparity_becomes_depth_by_the_camera(tiny, tmp_path) -> None:
    split = open_split(cityscapes(tiny, tmp_path / "city"), "train")
    assert split.tasks == ("segmentation", "depth")
    assert [split.has_label(i, "depth") for i in range(3)] == [True, True, False]
    depth = split.label(0, "depth")
    assert np.isnan(depth[0, :2]).all()  # 0 is unknown, 1 infinitely far
    assert depth[0, 2] == pytest.approx(0.209313 * 2262.52 / ((60 - 1) / 256), rel=1e-6)
    assert np.isfinite(depth[0, 2:]).all()


def test_cities_are_no_must(tiny, tmp_path) -> None:
    root = tmp_path / "city"
    tiny.save_image(root / "leftImg8bit/train/a/one_leftImg8bit.png")
    for folder in ("leftImg8bit/train/a", "disparity/train", "camera/train"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    tiny.save_image(root / "leftImg8bit/train/two_leftImg8bit.png")
    Image.fromarray(np.full(tiny.SIZE, 2561, np.uint16)).save(root / "disparity/train/two_disparity.png")
    with pytest.raises(DataError, match=r"Missing files .*'camera/train/two_camera\.json'"):
        open_split(root, "train")
    (root / "camera/train/two_camera.json").write_text('{"extrinsic": {"baseline": 0.2}, "intrinsic": {"fx": 1000}}')
    assert open_split(root, "train").label(1, "depth")[0, 0] == pytest.approx(20)


def test_a_camera_that_lacks_or_is_none_is_named(tiny, tmp_path) -> None:
    root = cityscapes(tiny, tmp_path / "city")
    camera = root / "camera/train/trainstadt/trainstadt_a_camera.json"
    camera.write_text('{"extrinsic": {}}')
    with pytest.raises(DataError, match=r"trainstadt_a_camera\.json: KeyError 'baseline'"):
        open_split(root, "train").label(0, "depth")
    camera.unlink()
    with pytest.raises(DataError, match=r"Missing files .*'camera/train/trainstadt/trainstadt_a_camera\.json'"):
        open_split(root, "train")


def test_an_npz_has_one_array_or_one_called_depth(builder) -> None:
    builder.pair("a")
    (builder.root / "depth/train").mkdir(parents=True)
    path = builder.root / "depth/train/a.npz"
    np.savez_compressed(path, METRES)
    assert np.nanmax(open_split(builder.root, "train").label(0, "depth")) == np.nanmax(METRES)
    np.savez(path, one=METRES, other=METRES)
    with pytest.raises(DataError, match=r"a\.npz: its arrays are one, other"):
        open_split(builder.root, "train").label(0, "depth")
