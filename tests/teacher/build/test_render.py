"""Several views of a sample: the whole image, and crops that a seed draws."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kdcache.data import Window, draw_view, id_hash, open_split, pixel_checksum, render
from kdcache.distill.batch import tensors_of
from kdcache.errors import CorruptError, MismatchError, RecipeError
from kdcache.store import Records, inspect_store, open_cache
from kdcache.store.format.manifest_models import Drawn, View
from kdcache.teacher import TeacherProbe, build_cache, compare_teacher, plan_manifest, score_cache
from kdcache.training import CacheDataset
from kdcache.training.input.loader import Draws
from kdcache_kernels import pack

VIEWS = {"views": 3, "view_seed": 7, "view_scale": (1.5, 3.0)}
CPU = torch.device("cpu")


@pytest.fixture
def viewed(tmp_path, teacher, folder_data, options):
    """viewed(pixels, ...): a store of 7 samples in 3 views, and its data folder's split."""

    def build(pixels: str = "stored", **changes):
        source = open_split(folder_data, "train")
        out = tmp_path / f"{pixels}.zarr"
        build_cache(source, teacher, out, options(pixels=pixels, **VIEWS, **changes))
        return open_cache(out), source

    return build


@given(
    sample=st.text(min_size=1),
    view=st.integers(0, 9),
    seed=st.integers(0, 2**63 - 1),
    size=st.tuples(st.integers(1, 4000), st.integers(1, 4000)),
    low=st.floats(1, 8),
    more=st.floats(0, 8),
    flip=st.booleans(),
)
def test_a_view_is_drawn_by_its_own_names(sample, view, seed, size, low, more, flip) -> None:
    """Inside the image, of its aspect ratio, and no other view's business."""
    window, mirrored = draw_view(seed, sample, view, size, (low, low + more), flip)
    assert (window, mirrored) == draw_view(seed, sample, view, size, (low, low + more), flip)
    height, width = window.y1 - window.y0, window.x1 - window.x0
    if view == 0:
        assert (window, mirrored) == (Window.full(*size), False)
    else:
        zoom = size[0] / height
        assert low * (1 - 1e-9) <= zoom <= (low + more) * (1 + 1e-9)
        assert size[1] / width == pytest.approx(zoom)
        assert min(window.y0, window.x0) >= 0
        assert window.y1 <= size[0] * (1 + 1e-12)
        assert window.x1 <= size[1] * (1 + 1e-12)
    assert flip or not mirrored


def test_views_differ_and_are_as_the_format_says() -> None:
    drawn = {
        (sample, view): draw_view(0, sample, view, (36, 52), (1, 2), True) for sample in "ab" for view in (1, 2, 3)
    }
    assert len(set(drawn.values())) == 6
    digest = hashlib.blake2b("ä".encode(), digest_size=8).digest()
    assert id_hash("ä") == int.from_bytes(digest, "little")
    u = np.random.default_rng((5, id_hash("ä"), 2)).random(4)
    zoom = 1.5 + u[0] * 1.5
    y0, x0 = u[1] * (36 - 36 / zoom), u[2] * (52 - 52 / zoom)
    window, flip = draw_view(5, "ä", 2, (36, 52), (1.5, 3.0), True)
    assert window.as_tuple() == pytest.approx((y0, x0, y0 + 36 / zoom, x0 + 52 / zoom), rel=1e-12)
    assert flip == (u[3] < 0.5)


@pytest.mark.parametrize("pixels", ["stored", "source"])
def test_the_store_holds_every_view(viewed, teacher, pixels) -> None:
    cache, source = viewed(pixels, features=("head",))
    about = cache.manifest
    assert (len(cache), about.dataset.samples, about.dataset.labelled) == (21, 7, 7)
    assert about.view.drawn == Drawn(seed=7, scale=(1.5, 3.0), flip=True)
    flips = []
    for first in range(0, 21, 3):  # shards of 3 records, batches of 2 and 1
        for batch in (range(first, first + 2), range(first + 2, first + 3)):
            rendered = []
            for record in batch:
                sample, view = divmod(record, 3)
                image, label = source.image(sample), source.label(sample)
                window, flip = draw_view(7, source.ids[sample], view, image.shape[:2], (1.5, 3.0), True)
                rendered.append(render(image, label, window, flip=flip, size=(32, 48)))
                stored = cache.read(record, list(cache.specs))
                assert (stored["records/sample"], stored["records/view"]) == (sample, view)
                assert tuple(stored["records/window"]) == window.as_tuple()
                assert stored["records/flip"] == flip
                assert stored["records/pixel_checksum"] == pixel_checksum(rendered[-1][0])
                if pixels == "stored":
                    assert np.array_equal(stored["pixels/image"], rendered[-1][0])
                    assert np.array_equal(stored["labels/segmentation"], rendered[-1][1])
                flips.append(bool(flip))
            with torch.inference_mode():
                inputs = torch.from_numpy(np.stack([view for view, _ in rendered]))
                values, _, _ = pack(teacher.model(teacher.model.normalise(inputs)).logits, 7)
            for record, said in zip(batch, values, strict=True):
                assert np.array_equal(cache.read(record, cache.target_paths())["targets/segmentation/values"], said)
    assert 0 < sum(flips) < 14
    assert not any(flips[::3])


@pytest.mark.parametrize("threads", [0, 3])
def test_one_view_is_what_it_was(tmp_path, teacher, split, options, tree, threads) -> None:
    """Further views leave the first as they are; a sample's image is read once for a batch of its views."""
    reads = []

    class Counted:
        def __getattr__(self, name):
            return getattr(split, name)

        def __len__(self):
            return len(split)

        def image(self, index):
            reads.append(index)
            return split.image(index)

    build_cache(split, teacher, tmp_path / "one", options(render_threads=threads, batch_size=1))
    reads.clear()
    several = options(render_threads=threads, batch_size=4, shard_records=4, views=4)
    build_cache(Counted(), teacher, tmp_path / "four", several)
    assert sorted(reads) == [0, *range(7)]  # the plan looks at the first
    one, four = open_cache(tmp_path / "one"), open_cache(tmp_path / "four")
    for record in range(7):
        ours, theirs = (
            one.read(record, ["pixels/image", "records/window"]),
            four.read(4 * record, ["pixels/image", "records/window"]),
        )
        assert all(np.array_equal(ours[path], theirs[path]) for path in ours)


def test_options_that_cannot_be(teacher, split, options) -> None:
    for change in (
        {"views": 0},
        {"views": 2, "view_scale": (0.01, 2)},
        {"views": 2, "view_scale": (3, 2)},
        {"view_seed": -1},
    ):
        with pytest.raises(RecipeError, match="view"):
            plan_manifest(TeacherProbe(split, teacher, options(**change)))
    with pytest.raises(ValueError, match="views_per_sample is 2"):
        View(size=(2, 2), views_per_sample=2, pixels="stored")
    with pytest.raises(ValueError, match="no range"):
        Drawn(seed=0, scale=(3.0, 2.0), flip=True)


@pytest.mark.parametrize(
    "change",
    [{"views": 2}, {"view_seed": 8}, {"view_scale": (1.0, 2.0)}, {"view_flip": False}],
    ids=lambda c: next(iter(c)),
)
def test_a_build_goes_on_with_the_same_views(viewed, teacher, options, change) -> None:
    cache, source = viewed()
    with pytest.raises(MismatchError, match="view"):
        build_cache(source, teacher, cache.path, options(**{**VIEWS, **change}))


def test_inspection_tells_of_views(viewed) -> None:
    facts = dict(inspect_store(viewed()[0].path).facts())
    assert "3 per sample, crops zoomed 1.5 to 3 times, half of them mirrored, seed 7" in facts["view"]


@pytest.mark.parametrize("pixels", ["stored", "source"])
def test_checks_of_a_store_with_views(viewed, teacher, folder_data, pixels) -> None:
    """All records beside the teacher, labels of whole images alone; drift is named by the sample."""
    cache, source = viewed(pixels)
    agreement = compare_teacher(Records(cache, source), teacher, CPU, 21)
    assert agreement.ok
    assert (agreement.records, agreement.argmax) == (21, 1.0)
    first, second = sorted((folder_data / "images/train").iterdir())[:2]
    first.write_bytes(second.read_bytes())
    drifted = compare_teacher(Records(cache, open_split(folder_data, "train")), teacher, CPU, 21).drifted
    assert drifted == (source.ids[0],) * 3


def test_scores_count_whole_images_alone(tmp_path, split, teacher, options) -> None:
    build_cache(split, teacher, tmp_path / "one", options(batch_size=1))
    build_cache(split, teacher, tmp_path / "three", options(batch_size=1, **VIEWS))
    one, three = (open_cache(tmp_path / name) for name in ("one", "three"))
    assert score_cache(Records(three, split)) == score_cache(Records(one, split))


def rows(dataset: CacheDataset, index: int, epoch: int):
    return dataset.draw(index, epoch, np.random.default_rng(0))


@pytest.mark.parametrize("pixels", ["stored", "source"])
def test_replay_shows_the_views_in_turn(viewed, pixels) -> None:
    cache, source = viewed(pixels)
    reference, _ = viewed("stored") if pixels == "source" else (cache, source)
    dataset = CacheDataset(Records(cache, source), augment="replay")
    dataset.augmentation = replace(dataset.augmentation, jitter=0.0)
    assert len(dataset) == 7
    firsts = set()
    for index in range(7):
        shown = []
        for epoch in range(6):
            record = dataset.record(index, epoch)
            assert record == 3 * index + (epoch + id_hash(source.ids[index])) % 3
            shown.append(record)
            sample = rows(dataset, index, epoch)
            wanted = reference.read(record, list(reference.specs))
            assert np.array_equal(sample.pixels, wanted["pixels/image"])
            assert np.array_equal(sample.label, wanted["labels/segmentation"])
            assert np.array_equal(sample.target.values, wanted["targets/segmentation/values"])
            assert sample.window is None, "the whole view"
            assert sample.flip is None
        assert sorted(shown[:3]) == [3 * index, 3 * index + 1, 3 * index + 2]
        assert shown[3:] == shown[:3]
        firsts.add(shown[0] % 3)
    assert len(firsts) > 1


@pytest.mark.parametrize("augment", ["warp", "none"])
@pytest.mark.parametrize("pixels", ["stored", "source"])
def test_warp_and_none_take_whole_images(tmp_path, viewed, teacher, options, pixels, augment) -> None:
    cache, source = viewed(pixels, batch_size=1)
    build_cache(source, teacher, tmp_path / "one", options(batch_size=1, pixels=pixels))
    several = CacheDataset(Records(cache, source), augment=augment)
    one = CacheDataset(Records(open_cache(tmp_path / "one"), source), augment=augment)
    for index in range(7):
        for ours, theirs in zip(_flat(rows(several, index, 2)), _flat(rows(one, index, 2)), strict=True):
            assert torch.equal(ours, theirs)


def _flat(sample) -> list[torch.Tensor]:
    return tensors_of(sample)


def test_an_epoch_visits_each_sample_once(viewed) -> None:
    cache, _ = viewed()
    for shuffle in ("full", "window"):
        draws = Draws(CacheDataset(cache, augment="replay"), seed=3, shuffle=shuffle)
        for epoch in range(3):
            assert sorted(draws.visit(7 * epoch + n)[0] for n in range(7)) == list(range(7))
    assert draws.sample_ids(0, 7) == [cache.ids[draws.visit(n)[0]] for n in range(7)]


def test_a_changed_image_is_refused_in_every_view(viewed, folder_data) -> None:
    cache, _ = viewed("source")
    first, second = sorted((folder_data / "images/train").iterdir())[:2]
    first.write_bytes(second.read_bytes())
    dataset = CacheDataset(Records(cache, open_split(folder_data, "train")), augment="replay")
    for epoch in range(3):
        with pytest.raises(MismatchError, match="does not render as at the build"):
            rows(dataset, 0, epoch)
        rows(dataset, 1, epoch)


def test_a_manifest_whose_views_do_not_add_up(viewed) -> None:
    cache, _ = viewed()
    file: Path = cache.path / "zarr.json"
    file.write_text(file.read_text().replace('"views_per_sample": 3', '"views_per_sample": 4'))
    with pytest.raises(CorruptError, match="views_per_sample"):
        open_cache(cache.path)
