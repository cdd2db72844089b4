"""What storing loses: the figures of the manifest, against the store itself and against direct computation."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numcodecs.bitround import BitRound
from safetensors.torch import save_file

from kdcache.data import Split, Window, open_split, render
from kdcache.errors import MismatchError, ModelError
from kdcache.models import Outputs
from kdcache.store import open_cache, read_manifest
from kdcache.teacher import TeacherProbe, build_cache, load_teacher, plan_manifest
from kdcache.teacher.build import fidelity
from kdcache.teacher.build.fidelity import measure_fidelity
from kdcache.teacher.build.options import view_of
from kdcache.teacher.build.render import render_records
from kdcache_kernels import choose_k, densify

SIZE = (32, 48)


def smooth_logits(images: int = 3, classes: int = 6, size: tuple[int, int] = (7, 9), seed: int = 0) -> torch.Tensor:
    """(B, C, h, w): confident, as a trained teacher's, and smooth."""
    coarse = 8 * torch.randn(images, classes, 3, 4, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(coarse, size, mode="bicubic")


def compared(said: torch.Tensor, stored: torch.Tensor, size, align_corners: bool = False) -> dict[str, float]:
    """The figures from (B, C, h, w) of both, by nothing but PyTorch in float64."""
    said, stored = (
        F.interpolate(x.double(), size, mode="bilinear", align_corners=align_corners) for x in (said, stored)
    )
    kl = {}
    for temperature in (1, 4):
        p, q = (torch.distributions.Categorical(logits=x.movedim(1, -1) / temperature) for x in (said, stored))
        kl[temperature] = torch.distributions.kl_divergence(p, q)
    return {
        "kl_t1": float(kl[1].mean()),
        "kl_t1_max": float(kl[1].max()),
        "kl_t4": float(kl[4].mean()),
        "argmax_agreement": float((said.argmax(1) == stored.argmax(1)).double().mean()),
    }


def raw_logits(teacher, split: Split, records) -> torch.Tensor:
    images = [split.image(record) for record in records]
    views = [render(i, None, Window.full(*i.shape[:2]), flip=False, size=SIZE)[0] for i in images]
    with torch.inference_mode():
        return teacher.model(teacher.model.normalise(torch.from_numpy(np.stack(views))), ()).logits


@pytest.fixture
def calls(teacher):
    """Batch sizes of every forward pass of `teacher`."""
    sizes: list[int] = []
    handle = teacher.model.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    yield sizes
    handle.remove()


@pytest.fixture
def many(tmp_path, folder_data, model_of):
    """A split and a teacher of 40 classes, so that `--top-k auto` measures."""
    (folder_data / "classes.txt").write_text("".join(f"class {i}\n" for i in range(40)))
    model = model_of(40)
    with torch.no_grad():
        model.get_submodule("classifier").weight.mul_(5)
    save_file(dict(model.state_dict()), tmp_path / "w40.safetensors")
    source = open_split(folder_data, "train")
    return source, load_teacher(f"kdcache:tiny@{tmp_path}/w40.safetensors", source.classes)


@pytest.mark.parametrize("codec", ["default", "small", "none"])
@pytest.mark.parametrize("k", [7, 4])
def test_the_figures_are_those_of_the_store(tmp_path, teacher, split, options, codec, k) -> None:
    """What is read back from the finished store, beside the teacher, gives what its manifest says."""
    build_cache(split, teacher, tmp_path / "s.zarr", options(fidelity=True, codec=codec, top_k=k))
    cache = open_cache(tmp_path / "s.zarr")
    said, stored = [], []
    for record in range(len(cache)):
        rows = cache.read(record, cache.target_paths())
        parts = [rows.get(f"targets/segmentation/{name}") for name in ("values", "indices", "tail")]
        stored.append(densify(*(None if p is None else torch.from_numpy(p)[None] for p in parts), 7))
        said.append(raw_logits(teacher, split, [record]))
    wanted = compared(torch.cat(said), torch.cat(stored), SIZE)
    found = cache.manifest.fidelity
    assert found is not None
    assert found.records == 7
    for name, value in wanted.items():
        # The build's forward passes are batches; these are not.
        assert getattr(found, name) == pytest.approx(value, rel=0.05, abs=1e-11), name
    bits = {"default": 10, "small": 5, "none": 10}[codec]
    assert all(
        (array.view(np.uint16) & (2 ** (10 - bits) - 1) == 0).all()
        for path, array in rows.items()
        if array.dtype == np.float16
    )


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("size", [(7, 9), (23, 31), (1, 1), (28, 36), (5, 4)])
@pytest.mark.parametrize("band", [1, 500, 10**9])
def test_against_direct_computation(monkeypatch, align_corners, size, band) -> None:
    monkeypatch.setattr(fidelity, "BAND_NUMBERS", band)
    logits = smooth_logits()
    found = measure_fidelity(logits, 6, "small", size, align_corners=align_corners)
    stored = torch.from_numpy(
        BitRound(5).encode((logits - logits.amax(1, keepdim=True)).half().numpy()).view(np.float16)
    )
    for name, value in compared(logits, stored, size, align_corners).items():
        assert getattr(found, name) == pytest.approx(value, rel=0.01, abs=1e-12), name
    assert found.records == 3


def test_default_loses_nothing_to_speak_of_and_small_a_little() -> None:
    logits = smooth_logits(4, 21, (24, 32))
    default, small, none = (
        measure_fidelity(logits, 21, codec, (96, 128), align_corners=False) for codec in ("default", "small", "none")
    )
    assert none == default
    assert 0 < default.kl_t1 < 1e-6
    assert 0 < default.kl_t4 < 1e-6
    assert default.argmax_agreement > 0.999
    assert 10 * default.kl_t1 < small.kl_t1 < 1e-4
    assert 10 * default.kl_t4 < small.kl_t4 < 1e-3
    assert 0.99 < small.argmax_agreement < default.argmax_agreement
    assert small.kl_t1 < small.kl_t1_max < 1e-2


def test_what_top_k_loses_is_seen() -> None:
    logits = smooth_logits(2, 40, (12, 16))
    by_k = [measure_fidelity(logits, k, "default", (48, 64), align_corners=False) for k in (1, 4, 16, 40)]
    for fewer, more in itertools.pairwise(by_k):
        assert fewer.kl_t1 > 2 * more.kl_t1
        assert fewer.kl_t4 > 2 * more.kl_t4
        assert fewer.argmax_agreement <= more.argmax_agreement


def test_wrong_rounding_is_seen(monkeypatch) -> None:
    logits = smooth_logits(2, 11, (12, 16))

    def measured(change) -> fidelity.Fidelity:
        with monkeypatch.context() as patch:
            patch.setattr(fidelity, "round_targets", lambda rows, codec: {path: change(a) for path, a in rows.items()})
            return measure_fidelity(logits, 11, "default", (48, 64), align_corners=False)

    right = measured(lambda values: values)
    coarse = measured(lambda values: BitRound(2).encode(values).view(np.float16))
    cut = measured(lambda values: values.clip(-2, 0))
    shifted = measured(lambda values: np.roll(values, 1, axis=1))
    assert coarse.kl_t1 > 1000 * right.kl_t1
    assert cut.kl_t1 > 0.01
    assert shifted.kl_t1 > 1
    assert shifted.argmax_agreement < 0.5


def test_a_class_that_is_ruled_out(tmp_path) -> None:
    """-inf is packed as -60000: no figure may be NaN for it."""
    logits = smooth_logits()
    logits[:, 2, :, :4] = -torch.inf
    for k in (6, 3):
        found = measure_fidelity(logits, k, "small", (14, 18), align_corners=False)
        assert found.kl_t1 < found.kl_t1_max < 20  # validated: no NaN, no infinity


def test_images_are_taken_a_band_at_a_time(monkeypatch) -> None:
    """150 classes on 512 x 512 are 300 MB in float64; what is held of them is a band."""
    numbers = []
    kl = fidelity.kl_of_pixels

    def watched(said, stored):
        numbers.append(said.numel())
        return kl(said, stored)

    monkeypatch.setattr(fidelity, "kl_of_pixels", watched)
    monkeypatch.setattr(fidelity, "BAND_NUMBERS", 20_000)
    measure_fidelity(smooth_logits(2, 30, (8, 8)), 30, "default", (64, 64), align_corners=False)
    assert max(numbers) <= 20_000
    assert sum(numbers) == 2 * 30 * 64 * 64


# In a build


def test_sixteen_records_spread_over_the_split(teacher, options) -> None:
    class Watched:
        def __init__(self, inner: Split) -> None:
            self.inner, self.seen = inner, []

        def __getattr__(self, name: str):
            return getattr(self.inner, name)

        def __len__(self) -> int:
            return len(self.inner)

        def image(self, index: int):
            self.seen.append(index)
            return self.inner.image(index)

    source = Watched(open_split("scenes:36x52,train=31", "train"))
    manifest = plan_manifest(TeacherProbe(source, teacher, options(fidelity=True)))
    assert manifest.fidelity.records == 16
    assert source.seen == [0, *range(0, 31, 2)]  # the first for the shapes


@pytest.mark.parametrize("views", [{"views": 3}, {"views": 3, "crop": SIZE, "size": (48, 72)}], ids=["views", "crops"])
def test_first_views_are_measured(many, options, views) -> None:
    """Fidelity and `--top-k auto` are of the first view of samples all over the split, whatever views there are."""
    source, teacher = many
    chosen = options(fidelity=True, view_seed=5, **views)
    with torch.inference_mode():
        view = view_of(chosen)
        first = [render_records(source, view, [sample * 3])[0] for sample in range(len(source))]
        pixels = torch.from_numpy(np.stack([item.taught for item in first]))
        logits = teacher.model(teacher.model.normalise(pixels), ()).logits
    assert len(source) <= 16
    about = plan_manifest(TeacherProbe(source, teacher, chosen))
    k = choose_k(logits, SIZE, logits.shape[1], align_corners=teacher.model.align_corners)[0]
    assert about.heads["segmentation"].k == k
    wanted = measure_fidelity(logits, k, "default", SIZE, align_corners=teacher.model.align_corners)
    assert about.fidelity.kl_t1 == pytest.approx(wanted.kl_t1, rel=0.02)
    assert about.fidelity.kl_t1_max == pytest.approx(wanted.kl_t1_max, rel=0.02)


def test_equal_builds_have_equal_figures(tmp_path, teacher, split, options) -> None:
    for name in ("a", "b"):
        build_cache(split, teacher, tmp_path / name, options(fidelity=True, codec="small"))
    assert read_manifest(tmp_path / "a").fidelity == read_manifest(tmp_path / "b").fidelity


def test_a_build_that_goes_on_measures_nothing(tmp_path, teacher, split, options, calls) -> None:
    build_cache(split, teacher, tmp_path / "s.zarr", options(fidelity=True))
    figures = read_manifest(tmp_path / "s.zarr").fidelity
    assert calls == [1, 2, 2, 2, 1, 2, 2, 1, 2, 1, 1]  # shapes, sample, fingerprint, the pass
    calls.clear()
    (tmp_path / "s.zarr" / "records/view/c/1").unlink()
    result = build_cache(split, teacher, tmp_path / "s.zarr", options(fidelity=True))
    assert calls == [1, 2, 2, 1]
    assert result.manifest.fidelity == figures == read_manifest(tmp_path / "s.zarr").fidelity
    with pytest.raises(MismatchError, match="codec: default against small"):
        build_cache(split, teacher, tmp_path / "s.zarr", options(codec="small"))


def test_top_k_auto_shares_the_pass(many, options) -> None:
    source, teacher = many
    sizes: list[int] = []
    teacher.model.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    with_figures = plan_manifest(TeacherProbe(source, teacher, options(fidelity=True)))
    assert sizes == [1, 2, 2, 2, 1, 2]
    without = plan_manifest(TeacherProbe(source, teacher, options()))
    assert without.heads == with_figures.heads
    assert without.fidelity is None
    k = with_figures.heads["segmentation"].k
    assert 8 <= k < 40
    assert (
        plan_manifest(TeacherProbe(source, teacher, options(fidelity=True, top_k=k))).fidelity == with_figures.fidelity
    )


def test_an_answer_that_is_no_number_stops_the_build_before_it_begins(
    tmp_path, teacher, split, options, monkeypatch
) -> None:
    forward = type(teacher.model).forward

    def poisoned(self, x, taps=()):
        heads, features = forward(self, x, taps)
        logits = heads["segmentation"]
        if len(x) == 2 and x.shape[-2:] == SIZE:
            logits[1, 0, 2, 3] = float("nan")
        return Outputs({"segmentation": logits}, features)

    monkeypatch.setattr(type(teacher.model), "forward", poisoned)
    with pytest.raises(ModelError, match="NaN or infinity") as caught:
        build_cache(split, teacher, tmp_path / "s.zarr", options(fidelity=True))
    assert "record 1" in caught.value.problem
    assert split.ids[1] in caught.value.problem
    assert not (tmp_path / "s.zarr").exists()


def test_a_batch_that_does_not_fit(tmp_path, teacher, split, options, monkeypatch) -> None:
    forward = type(teacher.model).forward

    def large(self, x, taps=()):
        if len(x) > 1:
            raise torch.OutOfMemoryError
        return forward(self, x, taps)

    monkeypatch.setattr(type(teacher.model), "forward", large)
    with pytest.raises(ModelError) as caught:
        build_cache(split, teacher, tmp_path / "s.zarr", options(fidelity=True))
    assert "--batch-size 1" in caught.value.fix
