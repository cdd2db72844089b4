"""The procedural data set: reproducible anywhere, uneven as streets are, writable as a folder."""

from __future__ import annotations

import hashlib
import multiprocessing
import pickle
import subprocess
import sys

import numpy as np
import pytest

from kdcache.data import IGNORE_INDEX, list_splits, open_split, pixel_checksum, write_scenes
from kdcache.data.scenes.generate import SceneCache, ScenesSpec
from kdcache.errors import DataError

SMALL = "scenes:48x64,train=6,val=2,unlabelled=3,seed=7"


def checksums(data: str) -> list[int]:
    """Image and label checksums of the train split."""
    split = open_split(data, "train")
    return [pixel_checksum(array) for i in range(len(split)) for array in (split.image(i), split.label(i))]


def test_the_defaults() -> None:
    train, val = open_split("scenes", "train"), open_split("scenes", "val")
    assert (len(train), len(val)) == (64, 16)
    assert train.image(0).shape == (96, 128, 3)
    assert len(train.classes) == 7
    assert list_splits("scenes") == ["train", "val"]
    assert list_splits(SMALL) == ["train", "unlabelled", "val"]


def test_a_spawned_process_draws_the_same() -> None:
    code = (
        "from kdcache.data import open_split, pixel_checksum as c;"
        f"s = open_split({SMALL!r}, 'train');"
        "print([c(a) for i in range(len(s)) for a in (s.image(i), s.label(i))])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == str(checksums(SMALL))


def test_a_split_crosses_to_a_spawned_process_by_pickle() -> None:
    split = open_split(SMALL, "train")
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        image = pool.apply(split.image, (2,))
    assert np.array_equal(image, split.image(2))
    assert len(pickle.dumps(split)) < 4000


def test_samples_depend_on_seed_split_and_index_only() -> None:
    def image(data: str, split: str, index: int) -> int:
        return pixel_checksum(open_split(data, split).image(index))

    base = image("scenes:48x64", "train", 1)
    assert image("scenes:48x64,train=1000,val=3", "train", 1) == base
    others = [("scenes:48x64,seed=1", "train", 1), ("scenes:48x64", "val", 1), ("scenes:48x64", "train", 2)]
    assert len({base, *(image(*other) for other in others)}) == 4


def test_digest_tells_the_pixels_apart() -> None:
    specs = ["scenes:48x64", "scenes:48x65", "scenes:48x64,seed=1", "scenes:48x64,train=65"]
    assert len({open_split(spec, "train").digest() for spec in specs}) == len(specs)


def test_what_is_returned_belongs_to_the_caller() -> None:
    split = open_split(SMALL, "val")
    for read in (split.image, split.label):
        before = read(0).copy()
        read(0)[:] = 9
        assert np.array_equal(read(0), before)


def test_unlabelled_has_images_only() -> None:
    split = open_split(SMALL, "unlabelled")
    assert [split.has_label(i) for i in range(len(split))] == [False] * 3
    assert split.label(0) is None
    assert split.image(2).shape == (48, 64, 3)


def test_classes_are_all_there_and_uneven() -> None:
    split = open_split("scenes:train=40", "train")
    counts = sum(np.bincount(split.label(i).reshape(-1), minlength=256) for i in range(40))
    shares = counts / counts.sum()
    assert (shares[:7] > 0.003).all()
    assert shares[:7].max() / shares[:7].min() > 10
    assert 0.005 < shares[IGNORE_INDEX] < 0.06
    assert counts[7:IGNORE_INDEX].sum() == 0


def test_colours_overlap_between_classes() -> None:
    """The nearest mean colour is a poor classifier, so texture and place are what there is to learn."""
    split = open_split("scenes:train=24", "train")
    colours = np.concatenate([split.image(i).reshape(-1, 3) for i in range(24)]).astype(np.float32)
    ids = np.concatenate([split.label(i).reshape(-1) for i in range(24)])
    means = np.stack([colours[ids == c].mean(axis=0) for c in range(7)])
    nearest = ((colours[:, None] - means) ** 2).sum(axis=2).argmin(axis=1)
    recalls = [(nearest[ids == c] == c).mean() for c in range(7)]
    assert np.mean(recalls) < 0.5


@pytest.mark.parametrize("size", ["16x16", "17x31", "16x200", "200x16", "65x40"])
def test_odd_sizes(size) -> None:
    split = open_split(f"scenes:{size},train=20", "train")
    for index in range(20):
        assert split.image(index).shape == (*map(int, size.split("x")), 3)


@pytest.mark.parametrize(
    "data", ["scenes:96", "scenes:96x", "scenes:trian=4", "scenes:train=-1", "scenes:8x8", "scenes:train=1,train=2"]
)
def test_malformed_specs_show_what_is_wrong(data) -> None:
    with pytest.raises(DataError) as caught:
        open_split(data, "train")
    assert data in caught.value.problem


@pytest.mark.parametrize("style", ["game", "camera"])
def test_a_style_is_a_domain_of_its_own(style) -> None:
    spec, other = f"scenes:48x64,train=30,depth=exact,style={style}", {"game": "camera", "camera": "game"}[style]
    split, plain = open_split(spec, "train"), open_split("scenes:48x64,train=30,depth=exact", "train")
    assert split.classes == plain.classes
    assert not set(split.ids) & set(plain.ids)
    assert split.digest() != open_split(spec.replace(style, other), "train").digest()
    assert checksums(spec) == checksums(spec)
    assert not set(checksums(spec)) & set(checksums("scenes:48x64,train=30"))
    counts = sum(np.bincount(split.label(i).reshape(-1), minlength=256) for i in range(30))
    assert (counts[:7] / counts.sum() > 0.003).all()
    assert counts[7:IGNORE_INDEX].sum() == 0
    metres = np.stack([split.label(i, "depth") for i in range(30)])
    assert np.nanmin(metres) > 1
    assert np.nanmax(metres) <= 80
    assert np.isnan(metres[np.stack([split.label(i) for i in range(30)]) == 0]).all()


def test_styles_differ_in_light_noise_sharpness_and_who_is_there() -> None:
    """Of 40 scenes each: brighter, cleaner and more saturated is game, with more cars and fewer people."""
    measured = {}
    for style in ("game", "camera"):
        split = open_split(f"scenes:48x64,train=40,style={style}", "train")
        images = np.stack([split.image(i) for i in range(40)]).astype(float)
        labels = np.stack([split.label(i) for i in range(40)])
        sky = (labels[:, :-2] == 0) & (labels[:, 2:] == 0)
        rough = np.abs(images[:, :-2] + images[:, 2:] - 2 * images[:, 1:-1]).mean(3)[sky].mean()
        measured[style] = {
            "light": images.mean(),
            "saturation": (images.max(3) - images.min(3)).mean(),
            "clean": -rough,
            "vehicles": (labels == 5).mean(),
            "nobody": -(labels == 6).mean(),
        }
    assert all(measured["game"][name] > measured["camera"][name] for name in measured["game"]), measured


def test_default_is_a_style_and_leaves_the_ids() -> None:
    assert open_split("scenes:48x64,style=default", "train").ids == open_split("scenes:48x64", "train").ids
    with pytest.raises(DataError, match=r"style=default\|game\|camera"):
        open_split("scenes:style=film", "train")


def test_missing_splits_are_named() -> None:
    with pytest.raises(DataError, match="'unlabelled' of 'scenes', which has train, val"):
        open_split("scenes", "unlabelled")
    with pytest.raises(DataError, match="'train' of 'scenes:train=0', which has val"):
        open_split("scenes:train=0", "train")


def test_indices_are_those_of_a_sequence() -> None:
    split = open_split(SMALL, "val")
    assert np.array_equal(split.image(-1), split.image(1))
    with pytest.raises(IndexError):
        split.image(2)


def test_written_out_it_is_a_folder_data_set(tmp_path) -> None:
    root = write_scenes(tmp_path / "data", SMALL)
    assert list_splits(root) == list_splits(SMALL)
    for name in list_splits(root):
        made, read = open_split(SMALL, name), open_split(root, name)
        assert read.classes == made.classes
        assert len(read) == len(made)
        for i in range(len(made)):
            assert read.has_label(i) == made.has_label(i)
            assert np.array_equal(read.image(i), made.image(i))
            if made.has_label(i):
                assert np.array_equal(read.label(i), made.label(i))


def test_the_cache_is_bounded_and_keeps_what_is_used() -> None:
    cache, spec = SceneCache(limit_bytes=3 * 16 * 16 * 4), ScenesSpec(16, 16)
    first = cache.get(spec, "train", 0)
    for index in range(1, 10):
        cache.get(spec, "train", index)
        assert cache.get(spec, "train", 0)[0] is first[0]
        assert len(cache.samples) <= 3
    assert cache.held_bytes == sum(a.nbytes for sample in cache.samples.values() for a in sample)


def test_the_spec_is_read_in_any_order() -> None:
    assert ScenesSpec.parse("scenes:val=2,32x48,seed=5") == ScenesSpec(32, 48, val=2, seed=5)
    assert ScenesSpec.parse("scenes") == ScenesSpec.parse("scenes:") == ScenesSpec()


# Depth

DEEP = "scenes:48x64,train=6,val=2,unlabelled=2,seed=7,depth={},tasks={}"


def depths(data: str, split: str = "train") -> list[np.ndarray | None]:
    opened = open_split(data, split)
    return [opened.label(index, "depth") for index in range(len(opened))]


@pytest.mark.parametrize("depth", ["exact", "sparse"])
def test_depth_changes_neither_pixels_nor_ids(depth) -> None:
    assert checksums(DEEP.format(depth, "both")) == checksums(SMALL)
    assert open_split(DEEP.format(depth, "halves"), "train").digest() == open_split(SMALL, "train").digest()


def test_pixels_and_ids_are_what_they_were_before_there_was_depth() -> None:
    """A store's bytes hang on them: the digest is that of the commit before depth."""
    digest = hashlib.sha256()
    for spec in ("scenes:37x53,train=6,seed=3", "scenes:96x128,train=4"):
        split = open_split(spec, "train")
        digest.update(b"".join(a.tobytes() for i in range(len(split)) for a in (split.image(i), split.label(i))))
    assert digest.hexdigest() == "791aa575e9948e51d9548f74b8ed7b48ef73a48fb4c45895338c324a8dad4c4c"


@pytest.mark.parametrize(
    ("tasks", "segmentation", "depth"),
    [
        ("both", [1, 1, 1, 1], [1, 1, 1, 1]),
        ("halves", [1, 0, 1, 0], [0, 1, 0, 1]),
        ("depth", [0, 0, 0, 0], [1, 1, 1, 1]),
    ],
)
def test_tasks_say_which_samples_have_which_labels(tasks, segmentation, depth) -> None:
    data = DEEP.format("sparse", tasks)
    train = open_split(data, "train")
    for index in range(4):
        assert [train.has_label(index), train.has_label(index, "depth")] == [segmentation[index], depth[index]]
        assert (train.label(index) is not None) == segmentation[index]
        assert (train.label(index, "depth") is not None) == depth[index]
    assert train.tasks == (("depth",) if tasks == "depth" else ("segmentation", "depth"))
    assert open_split(data, "val").tasks == ("segmentation", "depth")
    assert open_split(data, "unlabelled").tasks == ()
    assert open_split(SMALL, "train").tasks == ("segmentation",)


def test_sparse_depth_is_a_tenth_of_the_exact_depth_and_that_of_val_is_exact() -> None:
    exact, sparse = depths("scenes:train=8,depth=exact"), depths("scenes:train=8,depth=sparse")
    for whole, points in zip(exact, sparse, strict=True):
        at = np.isfinite(points)
        assert np.array_equal(points[at], whole[at])
    assert 0.05 < np.mean([np.isfinite(points) for points in sparse]) < 0.2
    assert np.array_equal(depths("scenes:depth=sparse", "val"), depths("scenes:depth=exact", "val"), equal_nan=True)


def test_depth_is_that_of_a_pinhole_camera_over_level_ground() -> None:
    """Written anew: each column's ground rises like 1 / (rows below the horizon), the same for all columns of a row."""
    split = open_split("scenes:96x128,val=0,train=8,depth=exact", "train")
    for index in range(8):
        label, metres = split.label(index), split.label(index, "depth").astype(np.float64)
        ground = np.where((label == 2) & (metres < 60), metres, np.nan)  # the road
        rows = np.flatnonzero(np.isfinite(ground).any(axis=1))
        per_row = np.nanmedian(ground[rows], axis=1)
        assert np.nanmax(np.abs(ground[rows] - per_row[:, None])) < 1e-4
        horizon = np.median(rows + 0.5 - 2.3 * 96 / per_row)
        assert abs(horizon - round(horizon)) < 1e-3
        np.testing.assert_allclose(per_row, 2.3 * 96 / (rows + 0.5 - horizon), rtol=1e-5)
        assert np.nanmax(metres) <= 80
        standing = np.isin(label, (4, 5, 6))  # poles, vehicles, pedestrians, which hide ground that is farther away
        plane = 2.3 * 96 / np.maximum(np.arange(96)[:, None] - horizon, 1e-9)  # at the upper edge of its pixels
        assert (metres <= plane + 1e-3)[standing].all()
        assert metres[label == 1].min() >= 60  # facades stand behind all else
        assert np.isnan(metres[label == 0]).all()


def test_a_thing_has_one_depth() -> None:
    """Depth is level within a thing: the image has far fewer depths of vehicles than pixels of them."""
    split = open_split("scenes:96x128,train=6,depth=exact", "train")
    for index in range(6):
        of_vehicles = split.label(index, "depth")[split.label(index) == 5]
        assert len(np.unique(of_vehicles)) <= 6


@pytest.mark.parametrize("part", ["depth=dense", "tasks=halves", "depth=exact,tasks=all", "depth=none,tasks=both"])
def test_malformed_depth_shows_what_is_wrong(part) -> None:
    with pytest.raises(DataError, match="depth=none") as caught:
        open_split(f"scenes:{part}", "train")
    assert part in caught.value.problem


def test_written_out_depth_is_the_same_metres(tmp_path) -> None:
    data = DEEP.format("sparse", "halves")
    root = write_scenes(tmp_path / "data", data)
    for name in ("train", "val"):
        made, read = open_split(data, name), open_split(root, name)
        for i in range(len(made)):
            assert [read.has_label(i), read.has_label(i, "depth")] == [made.has_label(i), made.has_label(i, "depth")]
            if made.has_label(i, "depth"):
                assert np.array_equal(read.label(i, "depth"), made.label(i, "depth"), equal_nan=True)


def test_an_unknown_task_is_refused() -> None:
    with pytest.raises(ValueError, match="segmentation, depth"):
        open_split(SMALL, "train").label(0, "colour")
