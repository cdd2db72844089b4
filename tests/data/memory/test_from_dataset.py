"""Data sets that a program holds: the same samples as from files, honest ids, and clear refusals."""

from __future__ import annotations

import gc
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset, Subset

from kdcache.data import from_dataset, list_splits, open_split
from kdcache.errors import DataError, MismatchError
from kdcache.models import build_model
from kdcache.store import Records, open_cache
from kdcache.teacher import BuildOptions, Teacher, build_cache, load_teacher
from kdcache.training import make_config, train

SCENES = "scenes:32x48,train=6,val=3"
NAMES = open_split(SCENES, "train").classes.names


class Scenes(Dataset[Any]):
    """The procedural scenes as somebody's data set."""

    def __init__(self, split: str = "train", *, kind: str = "tuple", lost: tuple[int, ...] = ()) -> None:
        self.scenes, self.kind, self.lost = open_split(SCENES, split), kind, lost

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, index: int) -> Any:
        image, label = self.scenes.image(index), self.scenes.label(index)
        assert label is not None
        mask = None if index in self.lost else label
        if self.kind == "tensors":
            return torch.from_numpy(image).permute(2, 0, 1), torch.from_numpy(label).long()[None]
        if self.kind == "mapping":
            return {"name": f"s{9 - index}", "image": Image.fromarray(image), "mask": Image.fromarray(label)}
        return image, mask


def assert_same(split: Any, order: list[int]) -> None:
    scenes = open_split(SCENES, "train")
    for own, number in enumerate(order):
        assert np.array_equal(split.image(own), scenes.image(number))
        assert np.array_equal(split.label(own), scenes.label(number))
        assert split.image(own).flags.writeable
        assert split.label(own).dtype == np.uint8


@pytest.mark.parametrize("kind", ["tuple", "tensors", "mapping"])
def test_items_of_every_kind_are_the_same_samples(kind: str) -> None:
    split = from_dataset(Scenes(kind=kind), NAMES)
    assert_same(split, list(range(6)))
    assert split.tasks == ("segmentation",)
    assert "every sample was read once" in repr(split)
    assert split.digest() == from_dataset(Scenes(), NAMES).digest()  # of contents, whatever their container


def test_ids_of_a_column_are_sorted_and_the_digest_sees_no_contents() -> None:
    split = from_dataset(Scenes(kind="mapping"), NAMES, ids="name")
    assert split.ids == ("s4", "s5", "s6", "s7", "s8", "s9")
    assert_same(split, [5, 4, 3, 2, 1, 0])
    assert "of column name" in repr(split)
    given = from_dataset(Scenes(), NAMES, ids=[f"s{9 - number}" for number in range(6)])
    assert given.ids == split.ids
    assert given.digest() == split.digest()


def test_ids_of_contents_see_every_change() -> None:
    whole = from_dataset(Scenes(), NAMES)
    assert from_dataset(Subset(Scenes(), [1, 0, 2, 3, 4, 5]), NAMES).digest() != whole.digest()
    assert from_dataset(Scenes("val"), NAMES).digest() != whole.digest()
    assert from_dataset(Scenes(lost=(2,)), NAMES).digest() != whole.digest()
    assert from_dataset(Scenes(), [f"{name}s" for name in NAMES]).digest() != whole.digest()


def test_samples_without_a_label_are_known() -> None:
    split = from_dataset(Scenes(lost=(1, 4)), NAMES)
    assert [split.has_label(index) for index in range(6)] == [True, False, True, True, False, True]
    assert split.label(1) is None
    by_name = from_dataset(Scenes(lost=(1,)), NAMES, ids=list("abcdef"))
    with pytest.raises(DataError, match=r"(?s)item 1 of .* has no label.*Leave ids out"):
        by_name.label(1)


def test_void_numbers_and_images_alone() -> None:
    items = [(np.zeros((4, 6, 3), np.uint8), np.full((4, 6), -100))]
    assert (from_dataset(items, ["a", "b"], void=-100).label(0) == 255).all()
    alone = from_dataset([Image.new("L", (6, 4), 7)], ["a", "b"])
    assert alone.image(0).shape == (4, 6, 3)
    assert alone.tasks == ()


def test_depth_is_a_part_of_its_own() -> None:
    metres = np.array([[1.0, 0.0], [np.inf, 2.5]])
    items = [{"image": np.zeros((2, 2, 3), np.uint8), "far": metres}]
    split = from_dataset(items, ["a", "b"], depth="far")
    assert split.tasks == ("depth",)
    assert np.array_equal(split.label(0, "depth"), np.float32([[1, np.nan], [np.nan, 2.5]]), equal_nan=True)


def test_its_name_opens_it_as_long_as_it_is_held() -> None:
    split = from_dataset(Scenes(), NAMES, name="my scenes")
    data = split.data
    assert data.startswith("memory:my-scenes@")
    assert open_split(data, "train") is split
    assert list_splits(data) == ["train"]
    with pytest.raises(DataError, match=r"Unknown split 'val' of .*, which has train"):
        open_split(data, "val")
    del split
    gc.collect()
    with pytest.raises(DataError, match="Data set not in memory: memory:my-scenes@"):
        open_split(data, "train")
    assert from_dataset(Scenes(), NAMES, name="my scenes").data == data


def test_it_travels_to_workers() -> None:
    split = pickle.loads(pickle.dumps(from_dataset(Scenes(), NAMES)))
    assert_same(split, list(range(6)))


def test_a_store_a_training_and_its_validation_are_made_of_them(tmp_path: Path) -> None:
    data, val = from_dataset(Scenes(), NAMES), from_dataset(Scenes("val"), NAMES, split="val")
    torch.manual_seed(0)
    teacher = Teacher(build_model("kdcache:tiny", len(NAMES)).eval(), "test")
    options = BuildOptions(size=(32, 48), views=1, batch_size=4, pixels="source")
    build_cache(data, teacher, tmp_path / "s.zarr", options)
    cache = open_cache(tmp_path / "s.zarr")
    assert cache.manifest.dataset.ids_digest == data.digest()
    assert np.array_equal(Records(cache, data).pixels(2), data.image(2))
    with pytest.raises(MismatchError, match="is not what"):
        Records(cache, val)
    settings = {"model": "kdcache:tiny", "iterations": 2, "batch_size": 2, "device": "cpu", "workers": 0}
    settings |= {"cache": str(tmp_path / "s.zarr"), "data": data.data, "split": data.split}
    result = train(make_config(verb="train-student", val=val.data, val_split="val", **settings), tmp_path / "run")
    assert result["best_miou"] is not None
    teacher = load_teacher(str(tmp_path / "run"), data)
    build_cache(data, teacher, tmp_path / "t.zarr", options)


def test_hugging_face_data_sets() -> None:
    datasets = pytest.importorskip("datasets")
    rows = [Scenes(kind="mapping")[index] for index in range(6)]
    features = datasets.Features(name=datasets.Value("string"), image=datasets.Image(), mask=datasets.Image())
    table = datasets.Dataset.from_list(rows, features=features, split="train")
    split = from_dataset(table, NAMES, ids="name")
    assert split.split == "train"
    assert_same(split, [5, 4, 3, 2, 1, 0])
    again = pickle.loads(pickle.dumps(split))
    assert np.array_equal(again.image(3), split.image(3))
    with pytest.raises(DataError, match="several splits at once: DatasetDict with train"):
        from_dataset(datasets.DatasetDict(train=table), NAMES)
    with pytest.raises(DataError, match="no length and items by number"):
        from_dataset(table.to_iterable_dataset(), NAMES)


class Jittering(Scenes):
    def __getitem__(self, index: int) -> Any:
        image, label = super().__getitem__(index)
        self.reads = getattr(self, "reads", 0) + 1
        return np.roll(image, self.reads, 1), label


class Flipping(Scenes):
    """Flips every fifth image that is read."""

    def __getitem__(self, index: int) -> Any:
        image, label = super().__getitem__(index)
        self.reads = getattr(self, "reads", 0) + 1
        return (image[:, ::-1], label[:, ::-1]) if self.reads % 5 == 0 else (image, label)


class Broken(Scenes):
    def __getitem__(self, index: int) -> Any:
        raise FileNotFoundError("no such file")


class Lengthless(Scenes):
    def __len__(self) -> int:
        return 1 // 0


def test_a_transform_that_fails_later_is_named_with_its_item() -> None:
    dataset = Scenes()
    split = from_dataset(dataset, NAMES, ids=[str(number) for number in range(6)])
    dataset.__class__ = Broken
    for read in (split.image, split.label):
        with pytest.raises(DataError, match="Cannot read item 2 of memory:") as caught:
            read(2)
        assert "FileNotFoundError: no such file" in caught.value.problem
        assert isinstance(caught.value.__cause__, FileNotFoundError)


ZEROS = np.zeros((4, 6, 3), np.uint8)
ONES = np.ones((4, 6), np.uint8)


@pytest.mark.parametrize(
    ("dataset", "options", "message"),
    [
        (Jittering(), {}, "Take the augmentation out"),
        (Flipping(), {}, "Take the augmentation out"),
        (Broken(), {}, "Cannot read item 0: FileNotFoundError"),
        (Lengthless(), {}, "Cannot read the length of the data set: ZeroDivisionError"),
        ([{"image": ZEROS, "mask": ONES}, {"image": ZEROS}], {}, "Cannot read item 1: KeyError"),
        ([(ZEROS, [*ONES.tolist()[:3], [1]])], {}, "Cannot read item 0: ValueError"),
        (iter([]), {}, "no length and items by number"),
        ([], {}, "The data set is empty"),
        ([(ZEROS.astype(np.float32), ONES)], {}, "image of item 0: float32 (4, 6, 3)"),
        ([(np.zeros((4, 6, 4), np.uint8), ONES)], {}, "image of item 0: uint8 (4, 6, 4)"),
        ([(ZEROS, ONES.astype(np.float32))], {}, "label of item 0: float32 (4, 6)"),
        ([(ZEROS, ZEROS)], {}, "not colours"),
        ([(ZEROS, ONES[:2])], {}, "item 0: a label of 2x6, an image of 4x6"),
        ([(ZEROS, ONES + 4)], {}, "5 for 2 classes"),
        ([(ZEROS, np.full((4, 6), -100))], {}, "void=-100"),
        ([{"photo": ZEROS}], {}, "image='photo'"),
        ([{"image": ZEROS}], {"label": "mask"}, "no 'mask'"),
        ([{"image": ZEROS, "n": 1}, {"image": ZEROS, "n": 1}], {"ids": "n"}, "'1' twice"),
        ([{"image": ZEROS}], {"ids": "n"}, "leave ids out"),
        ([(ZEROS, ONES)], {"ids": ["a", "b"]}, "ids: 2 for 1 samples"),
        ([(ZEROS, ONES)], {"classes": 2}, "Invalid value of classes: "),
        ([(ZEROS, ONES)], {"classes": "road"}, "Invalid value of classes: "),
    ],
    ids=lambda value: None,
)
def test_what_is_no_data_set_is_refused(dataset: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError) as caught:
        from_dataset(dataset, **{"classes": ["a", "b"] if not isinstance(dataset, Scenes) else NAMES, **options})
    assert message in str(caught.value)
