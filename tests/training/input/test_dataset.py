"""Samples: equal draws with and without a teacher, and targets that lie where the pixels do.

Two teachers know the truth: `Colours` names the class whose colour it sees, `Ramp` repeats the red and green
values, which rise linearly over an image. What the store holds of them can be checked against every warped
pixel.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from torch.utils.data import DataLoader, default_collate

from kdcache.data import IGNORE_INDEX, OUTSIDE_RGB, Augmentation, Fold, open_split, write_scenes
from kdcache.distill import Batch, DistillLoss
from kdcache.distill.batch import tensors_of
from kdcache.errors import KDCacheError, MismatchError, RecipeError
from kdcache.models import Outputs, SegmentationModel
from kdcache.store import Cache, Records, open_cache
from kdcache.training import CacheDataset, LabelledDataset
from kdcache.training.input.residency import keep_records
from kdcache.training.input.resident_records import PIXEL_PATHS, DeviceTargets
from kdcache.training.input.subset import Part
from kdcache_kernels import PackedTarget, target_argmax_confidence

COLOURS = np.array([(250, 10, 10), (10, 250, 10), (10, 10, 250), (240, 240, 20)], np.uint8)
VIEW = (64, 96)
RAMP_GAIN = 8.0


class Plain(SegmentationModel):
    """A teacher without weights at stride 4, which sees RGB in 0..1."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(spec="test:plain", num_classes=num_classes, stride=4, taps=())
        self.mean, self.std = (0, 0, 0), (1, 1, 1)


class Colours(Plain):
    """Scores of a cell: how near its mean colour is to that of each class."""

    def forward(self, x_B3HW: torch.Tensor, taps: object = ()) -> Outputs:
        colours = torch.from_numpy(COLOURS).float() / 255
        cells = F.avg_pool2d(x_B3HW, 4)[:, None]
        return Outputs({"segmentation": -40 * (cells - colours[None, :, :, None, None]).square().sum(2)}, {})


class Ramp(Plain):
    """Scores of a cell: its red, its green, and zero."""

    def forward(self, x_B3HW: torch.Tensor, taps: object = ()) -> Outputs:
        cells = F.avg_pool2d(x_B3HW, 4)[:, :2] * RAMP_GAIN
        return Outputs({"segmentation": torch.cat([cells, torch.zeros_like(cells[:, :1])], 1)}, {})


def write_folder(root: Path, samples: list[tuple[np.ndarray, np.ndarray]], classes: str) -> str:
    root.mkdir(parents=True)
    (root / "classes.txt").write_text(classes)
    for kind in ("images", "labels"):
        (root / kind / "train").mkdir(parents=True)
    for number, (image, label) in enumerate(samples):
        Image.fromarray(image).save(root / "images" / "train" / f"{number}.png")
        Image.fromarray(label).save(root / "labels" / "train" / f"{number}.png")
    return str(root)


@pytest.fixture(scope="module", params=["stored", "source"])
def coloured(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, make_cache: Callable) -> tuple:
    """(data, store) of flat regions; sources of other proportions than the view when they are rendered again."""
    high, wide = (3, 2) if request.param == "source" else (1, 1)
    rng = np.random.default_rng(5)
    samples = []
    for _ in range(3):
        label = np.repeat(np.repeat(rng.integers(0, 4, (2, 3), dtype=np.uint8), 32 * high, 0), 32 * wide, 1)
        samples.append((COLOURS[label], label))
    data = write_folder(tmp_path_factory.mktemp("coloured") / "data", samples, "red\ngreen\nblue\nyellow\n")
    return data, make_cache(data, model=Colours(4), size=VIEW, pixels=request.param)


@pytest.fixture(scope="module", params=["stored", "source"])
def ramped(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, make_cache: Callable) -> tuple:
    """(data, store) of images whose red rises from left to right and green from top to bottom."""
    high, wide = (2, 3) if request.param == "source" else (1, 1)
    height, width = VIEW[0] * high, VIEW[1] * wide
    image = np.zeros((height, width, 3), np.uint8)
    image[..., 0] = (255 * (np.arange(width) + 0.5) / width).round()
    image[..., 1] = (255 * (np.arange(height) + 0.5) / height).round()[:, None]
    sample = (image, np.zeros((height, width), np.uint8))
    data = write_folder(tmp_path_factory.mktemp("ramped") / "data", [sample], "x\ny\nnothing\n")
    return data, make_cache(data, model=Ramp(3), size=VIEW, pixels=request.param)


def open_dataset(place: tuple, **options: object) -> CacheDataset:
    data, path = place
    options = {"augmentation": Augmentation(scale=(0.5, 2.0), flip=True, jitter=0.0), **options}
    return CacheDataset(Records(open_cache(path), open_split(data, "train")), **options)


def draws(dataset: CacheDataset, count: int) -> Iterator[Batch]:
    for seed in range(count):
        yield dataset.draw(seed % len(dataset), 0, np.random.default_rng(seed))


def outputs_of(window: torch.Tensor, flip: torch.Tensor, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Where rows and columns of the output lie, in pixels of the view: the design's formula, written out."""
    y0, x0, y1, x1 = window.tolist()
    y = y0 + (np.arange(size[0]) + 0.5) * (y1 - y0) / size[0]
    x = x0 + (np.arange(size[1]) + 0.5) * (x1 - x0) / size[1]
    return y, x[::-1] if flip else x


@pytest.mark.parametrize("size", [VIEW, (40, 60)])
def test_a_warped_label_is_what_the_target_says_there(coloured: tuple, size: tuple[int, int]) -> None:
    dataset = open_dataset(coloured, size=size)
    flips, compared, outside = set(), 0, 0
    for sample in draws(dataset, 24):
        pixels, label, target = sample.pixels, sample.label, sample.target
        assert pixels.shape == (*size, 3)
        assert label.shape == size
        packed = PackedTarget(target.values[None], None, None, 4, VIEW)
        argmax, confidence = target_argmax_confidence(packed, size, sample.window[None], sample.flip[None])
        beyond = label == IGNORE_INDEX
        assert torch.equal(confidence[0] == 0, beyond)
        assert (pixels[beyond] == torch.tensor(OUTSIDE_RGB, dtype=torch.uint8)).all()
        # Farther than a cell from every border, in pixels of the output, there is nothing to blur.
        y, _ = outputs_of(sample.window, sample.flip, size)
        reach = 2 * int(np.ceil(6 / (y[1] - y[0]))) + 1
        ids = F.pad(label[None].float(), [reach // 2] * 4, value=-1)
        pure = F.max_pool2d(ids, reach, 1) == -F.max_pool2d(-ids, reach, 1)
        pure = pure[0] & ~beyond
        assert torch.equal(argmax[0][pure], label[pure])
        assert (confidence[0][pure] > 0.99).all()
        assert (pixels[pure].int() - torch.from_numpy(COLOURS)[label[pure].long()].int()).abs().max() <= 1
        flips.add(bool(sample.flip))
        compared += int(pure.sum())
        outside += int(beyond.sum())
    assert flips == {True, False}
    assert compared > 1000
    assert outside > 1000


@pytest.mark.parametrize("size", [VIEW, (40, 60), (100, 130)])
def test_target_and_pixels_lie_at_the_same_place_to_half_a_pixel(ramped: tuple, size: tuple[int, int]) -> None:
    dataset = open_dataset(ramped, size=size)
    for sample in draws(dataset, 24):
        pixels, label, target = sample.pixels, sample.label, sample.target
        y, x = outputs_of(sample.window, sample.flip, size)
        grid = np.stack(np.broadcast_arrays((2 * x / VIEW[1] - 1)[None], (2 * y / VIEW[0] - 1)[:, None]), -1)
        values = target.values[None].double()
        sampled = F.grid_sample(values, torch.from_numpy(grid)[None], padding_mode="border", align_corners=False)[0]
        position = (sampled[:2] - sampled[2]) / RAMP_GAIN * 255
        # A bilinear resize repeats the outermost cell's centre: two pixels of the view.
        rows, columns = (y > 3) & (y < VIEW[0] - 3), (x > 3) & (x < VIEW[1] - 3)
        inner = torch.from_numpy(rows[:, None] & columns[None])
        assert inner.any()
        assert (label[inner] == 0).all()
        difference = (position - pixels[..., :2].permute(2, 0, 1))[:, inner]
        per_pixel = torch.tensor([255 / VIEW[1], 255 / VIEW[0]])
        assert ((difference.abs() - 1.2).amax(1) <= 0.5 * per_pixel).all()
        assert (difference.mean(1).abs() <= 0.6).all()


@pytest.mark.parametrize("augment", ["warp", "replay", "none"])
@pytest.mark.parametrize("pixels", ["stored", "source"])
def test_pixels_are_the_same_with_and_without_targets(
    cache_path: Path, source_path: Path, scenes: str, augment: str, pixels: str
) -> None:
    cache = open_cache(cache_path if pixels == "stored" else source_path)
    split = open_split(scenes, "train")
    taught, plain = (CacheDataset(Records(cache, split), augment=augment, targets=targets) for targets in (True, False))
    for seed in range(12):
        one, two = (d.draw(seed % 6, seed, np.random.default_rng(seed)) for d in (taught, plain))
        assert torch.equal(one.pixels, two.pixels)
        assert torch.equal(one.label, two.label)
        assert one.target.values.numel() > 0
        assert two.targets == {}


def test_the_generator_stays_aligned_whether_targets_are_read_or_not(cache: Cache) -> None:
    generators = [np.random.default_rng(3) for _ in range(2)]
    for generator, targets in zip(generators, (True, False), strict=True):
        CacheDataset(cache, targets=targets).draw(0, 0, generator)
    assert generators[0].random() == generators[1].random()


def test_replay_gives_stored_pixels_exactly(cache: Cache) -> None:
    still = CacheDataset(cache, augment="replay", augmentation=Augmentation(jitter=0.0))
    for index in range(len(cache)):
        rows = cache.read(index, ["pixels/image", "labels/segmentation", "targets/segmentation/values"])
        sample = still.draw(index, 7, np.random.default_rng(index))
        assert np.array_equal(sample.pixels, rows["pixels/image"])
        assert np.array_equal(sample.label, rows["labels/segmentation"])
        assert np.array_equal(sample.target.values, rows["targets/segmentation/values"])
        assert sample.window is None  # the whole view
        assert sample.flip is None


def test_replay_jitters_pixels_alone_and_none_never(cache: Cache) -> None:
    strong = Augmentation(jitter=0.9)
    stored = cache.read(0, ["pixels/image", "labels/segmentation"])
    for augment, changed in (("replay", True), ("none", False)):
        dataset = CacheDataset(cache, augment=augment, augmentation=strong)
        samples = [dataset.draw(0, 0, np.random.default_rng(seed)) for seed in range(4)]
        assert [not np.array_equal(s.pixels, stored["pixels/image"]) for s in samples] == [changed] * 4
        assert all(np.array_equal(s.label, stored["labels/segmentation"]) for s in samples)


def test_jitter_leaves_label_and_target_of_a_warp(cache: Cache) -> None:
    samples = [
        CacheDataset(cache, augmentation=Augmentation(jitter=jitter)).draw(1, 0, np.random.default_rng(4))
        for jitter in (0.0, 0.9)
    ]
    assert not torch.equal(samples[0].pixels, samples[1].pixels)
    assert torch.equal(samples[0].label, samples[1].label)
    assert all(torch.equal(a, b) for a, b in zip(tensors_of(samples[0])[1:], tensors_of(samples[1])[1:], strict=True))


def test_source_and_stored_pixels_are_one_when_the_source_has_the_view_s_size(
    cache_path: Path, make_cache: Callable, scenes: str
) -> None:
    source = CacheDataset(Records(open_cache(make_cache(pixels="source")), open_split(scenes, "train")))
    stored = CacheDataset(open_cache(cache_path))
    for seed in range(6):
        one, two = (d.draw(seed, 0, np.random.default_rng(seed)) for d in (source, stored))
        assert torch.equal(one.pixels, two.pixels)
        assert torch.equal(one.label, two.label)
        assert all(torch.equal(a, b) for a, b in zip(tensors_of(one)[1:], tensors_of(two)[1:], strict=True))


def test_top_k_targets_are_given_as_stored(source_path: Path, scenes: str) -> None:
    cache = open_cache(source_path)
    dataset = CacheDataset(Records(cache, open_split(scenes, "train")))
    target = dataset.draw(2, 0, np.random.default_rng(0)).target
    rows = cache.read(2, cache.target_paths())
    for name in ("values", "indices", "tail"):
        assert np.array_equal(getattr(target, name), rows[f"targets/segmentation/{name}"])
    assert target.values.shape[0] == 3


@pytest.mark.parametrize("targets", [True, False])
def test_a_drifted_image_is_refused_at_its_first_visit_by_name(
    tmp_path: Path, make_cache: Callable, targets: bool
) -> None:
    data = str(write_scenes(tmp_path / "data", "scenes:32x48,train=3,val=1"))
    path = make_cache(data, pixels="source")
    split = open_split(data, "train")
    dataset = CacheDataset(Records(open_cache(path), split), targets=targets)
    changed = split.image(1)
    changed[5, 5, 0] ^= 64
    Image.fromarray(changed).save(split.samples[1].image.path)
    rng = np.random.default_rng(0)
    dataset.draw(0, 0, rng)
    dataset.draw(2, 0, rng)
    for epoch in (0, 0, 5):  # a run that resumes in its sixth epoch looks, too
        with pytest.raises(MismatchError) as caught:
            dataset.draw(1, epoch, rng)
        assert split.ids[1] in caught.value.problem
    with pytest.raises(MismatchError):
        dataset[1]


def test_a_store_without_pixels_needs_the_data_set_it_was_built_from(source_path: Path, scenes: str) -> None:
    cache = open_cache(source_path)
    with pytest.raises(MismatchError, match="Missing --data"):
        CacheDataset(cache)
    for data, split in ((scenes, "val"), (scenes.replace("train=6", "train=7"), "train"), ("scenes:48x32", "train")):
        with pytest.raises(MismatchError) as caught:
            CacheDataset(Records(cache, open_split(data, split)))
        assert data in caught.value.problem
        assert scenes in caught.value.problem


def test_items_follow_torch_s_generator(cache: Cache) -> None:
    dataset = CacheDataset(cache)

    def items() -> list[Batch]:
        torch.manual_seed(3)
        return [dataset[index] for index in (0, 0, 1)]

    first, again = items(), items()
    assert all(torch.equal(a.pixels, b.pixels) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0].pixels, first[1].pixels)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_dataloader_s_user_meets_every_view(workers: int, make_cache: Callable) -> None:
    cache = open_cache(make_cache(views=3))
    dataset = CacheDataset(cache, augmentation=Augmentation.off())
    views = [cache.read(record, PIXEL_PATHS)[PIXEL_PATHS[0]].tobytes() for record in range(3 * len(dataset))]
    assert len(set(views)) == len(views)
    torch.manual_seed(5)
    loader = DataLoader(dataset, batch_size=2, shuffle=True, num_workers=workers)
    met = {image.numpy().tobytes() for _ in range(20) for batch in loader for image in batch.pixels}
    assert met == set(views)


def test_items_own_their_memory(cache: Cache) -> None:
    dataset = CacheDataset(cache, augment="none")
    before = dataset.draw(0, 0, np.random.default_rng(0))
    copies = before.pixels.clone(), before.label.clone(), before.target.values.clone()
    for part in (before.pixels, before.label, before.target.values):
        part.zero_()
    after = dataset.draw(0, 0, np.random.default_rng(0))
    for part, original in zip((after.pixels, after.label, after.target.values), copies, strict=True):
        assert torch.equal(part, original)


def test_datasets_travel_to_other_processes(cache: Cache, source_path: Path, scenes: str) -> None:
    split = open_split(scenes, "train")
    for dataset in (
        CacheDataset(cache),
        CacheDataset(Records(open_cache(source_path), split)),
        LabelledDataset(split, (16, 24)),
    ):
        twin = pickle.loads(pickle.dumps(dataset))
        one, two = (d.draw(3, 0, np.random.default_rng(1)) for d in (dataset, twin))
        assert torch.equal(one.pixels, two.pixels)
        assert all(torch.equal(a, b) for a, b in zip(tensors_of(one), tensors_of(two), strict=True))


def test_a_labelled_dataset_leaves_out_what_has_no_label(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)
    label = rng.integers(0, 3, (20, 30), dtype=np.uint8)
    data = write_folder(tmp_path / "data", [(image, label)] * 4, "a\nb\nc\n")
    (tmp_path / "data" / "labels" / "train" / "1.png").unlink()
    dataset = LabelledDataset(open_split(data, "train"), (20, 30), Augmentation.off())
    assert [dataset.sample_id(index) for index in range(len(dataset))] == ["0", "2", "3"]
    sample = dataset.draw(1, 0, rng)
    assert np.array_equal(sample.pixels, image)
    assert np.array_equal(sample.label, label)
    assert sample.targets == {}


def test_an_unknown_augmentation_is_refused(cache: Cache) -> None:
    with pytest.raises(RecipeError, match="wrap"):
        CacheDataset(cache, augment="wrap")


def test_what_lies_beyond_the_image_does_not_teach(make_cache: Callable) -> None:
    """Crops that reach beyond their image, replayed: the KL is that of the pixels which show it."""
    cache = open_cache(make_cache(views=6, crop=(32, 48), view_scale=(0.4, 1.0)))
    dataset = CacheDataset(cache, augment="replay", augmentation=Augmentation.off())
    batch = default_collate([dataset.draw(number, 1, np.random.default_rng(0)) for number in range(len(dataset))])
    shown = ~(batch.pixels == torch.tensor(OUTSIDE_RGB, dtype=torch.uint8)).all(-1)
    assert 0.1 < shown.float().mean() < 0.9
    student = torch.randn(len(dataset), cache.num_classes, 8, 12, generator=torch.Generator().manual_seed(0))
    full = [F.interpolate(z.double(), (32, 48), mode="bilinear") for z in (student, batch.target.values)]
    p, q = ((z / 2).log_softmax(1) for z in full)
    kl = 4 * F.kl_div(p, q, reduction="none", log_target=True).sum(1)[shown].mean()
    actual = DistillLoss(cache, ce_weight=0.0, kl_weight=1.0)(student, batch)
    assert actual.kl.item() == pytest.approx(kl.item(), rel=1e-5)
    assert actual.loss.item() == pytest.approx(kl.item(), rel=1e-5)


@pytest.mark.parametrize("augment", ["warp", "none"])
def test_crops_are_only_replayed(augment: str, make_cache: Callable) -> None:
    with pytest.raises(KDCacheError, match="--augment replay"):
        CacheDataset(open_cache(make_cache(views=2, crop=(16, 24))), augment=augment)


@pytest.mark.parametrize("limit", [None, 2])
def test_every_epoch_shows_the_next_view_of_each_sample(make_cache: Callable, limit: int | None) -> None:
    cache = open_cache(make_cache(views=3))
    dataset = CacheDataset(cache, augment="replay", augmentation=Augmentation.off(), part=Part(views=limit))
    count = limit or 3
    firsts = set()
    for index in range(len(dataset)):
        views = [dataset.record(index, epoch) - 3 * dataset.indices[index] for epoch in range(2 * count + 1)]
        assert sorted(views[:count]) == list(range(count))
        assert all(after == (before + 1) % count for before, after in pairwise(views))
        firsts.add(views[0])
        for epoch in range(count):
            drawn = dataset.draw(index, epoch, np.random.default_rng(0))
            row = cache.read(dataset.record(index, epoch), [*PIXEL_PATHS, "targets/segmentation/values"])
            assert np.array_equal(drawn.pixels, row[PIXEL_PATHS[0]])
            assert np.array_equal(drawn.label, row[PIXEL_PATHS[1]])
            assert np.array_equal(drawn.target.values, row["targets/segmentation/values"])
    assert len(firsts) > 1  # an epoch is not one view of all samples


def test_a_part_takes_its_own_views(make_cache: Callable) -> None:
    """Numbers of drawn samples are not those of the store's."""
    cache = open_cache(make_cache(views=2))
    whole = CacheDataset(cache, augment="replay")
    part = CacheDataset(cache, augment="replay", part=Part(without=Fold(0, 2)))
    assert 0 < len(part) < len(whole)
    assert part.indices != whole.indices[: len(part)]
    for index, number in enumerate(part.indices):
        assert [part.record(index, epoch) for epoch in range(3)] == [whole.record(number, epoch) for epoch in range(3)]


VIEWS: dict[str, dict[str, object]] = {
    "whole and drawn": {"views": 4},
    "crops": {"views": 4, "crop": (16, 24), "view_scale": (0.4, 1.5)},
}


@pytest.mark.parametrize("name", VIEWS)
def test_a_view_is_replayed_whole_from_store_source_memory_and_device(
    name: str, make_cache: Callable, scenes: str
) -> None:
    """Pixels, label, target and features of the very record, where numbers of draws, samples and records differ."""
    split, path = open_split(scenes, "train"), "features/head"
    stored, source = (open_cache(make_cache(features=("head",), pixels=p, **VIEWS[name])) for p in ("stored", "source"))
    still: dict[str, object] = {"augment": "replay", "augmentation": Augmentation.off(), "extras": (path,)}
    still["part"] = Part(without=Fold(0, 2))
    datasets = [
        CacheDataset(stored, **still),
        CacheDataset(Records(source, split), **still),
        CacheDataset(stored, **still),
        CacheDataset(stored, **still),
    ]
    keep_records(datasets[2], "ram", torch.device("cpu"))
    datasets[3].on_device = DeviceTargets()
    assert datasets[0].shard_records == 1  # of four records
    flips = stored.column("flip")
    met = set()
    for index, epoch in ((index, epoch) for epoch in (*range(4), 1) for index in range(len(datasets[0]))):
        record = datasets[0].record(index, epoch)
        met.add(bool(flips[record]))
        rows = stored.read(record, [*PIXEL_PATHS, "targets/segmentation/values", path])
        for dataset in datasets:
            drawn = dataset.draw(index, epoch, np.random.default_rng(0))
            assert np.array_equal(drawn.pixels, rows[PIXEL_PATHS[0]])
            assert np.array_equal(drawn.label, rows[PIXEL_PATHS[1]])
            assert np.array_equal(drawn.arrays[path], rows[path])
            if dataset.on_device is None:
                assert np.array_equal(drawn.target.values, rows["targets/segmentation/values"])
            else:
                assert drawn.record.item() == record
    assert met == {True, False}


def test_labels_of_a_store_of_views_are_those_of_its_samples(make_cache: Callable, tmp_path: Path) -> None:
    data = write_scenes(tmp_path / "data", "scenes:32x48,train=6,val=1")
    for label in sorted((data / "labels/train").iterdir())[1:3]:
        label.unlink()
    cache = open_cache(make_cache(str(data), views=3))
    dataset = CacheDataset(cache)
    assert dataset.labelled == [0, 3, 4, 5]
    assert dataset.label_flags is not None
    assert dataset.label_flags.tolist() == [True, False, False, True, True, True]
    for index, epoch in ((index, epoch) for index in range(6) for epoch in range(3)):
        label = dataset.draw(index, epoch, np.random.default_rng(0)).label
        assert bool((label == IGNORE_INDEX).all()) == (index in (1, 2))
    assert list(CacheDataset(cache, labelled_only=True).indices) == [0, 3, 4, 5]
