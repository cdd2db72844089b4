"""Small problems: which family `impl="auto"` takes, and the family torch on images of one pixel."""

import json
import math

import pytest
import torch

from kdcache_kernels import LossProblem, PackedTarget, distill_loss, pack
from kdcache_kernels.plain import choice
from kdcache_kernels.plain.teacher import largest

CLASSIFICATION = (64, 1000, 1, 1)  # batch, classes, cells and label pixels along an axis


def make(batch, classes, cells, pixels, *, k=None, scale=3.0, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(batch, classes, cells, cells, generator=generator) * scale for _ in range(2))
    labels = torch.randint(0, classes, (batch, pixels, pixels), generator=generator)
    labels[0] = -1
    k = k or (classes if classes <= 32 else 8)
    target = PackedTarget(*pack(teacher, k), classes, (pixels, pixels))
    return student.requires_grad_(), labels, target


def results(inputs, impl, **options):
    student, labels, target = inputs
    options = {"kl_weight": 1.0, "temperature": 2.0, "ignore_index": -1, **options}
    parts = distill_loss(student, labels, target, impl=impl, **options)
    return [*(part.detach() for part in parts), torch.autograd.grad(parts.loss, student)[0]]


def same_bits(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize(
    ("shape", "family"),
    [
        (CLASSIFICATION, "torch"),
        ((1, 1000, 16, 16), "torch"),
        ((4, 1000, 7, 7), "torch"),
        ((2, 3, 8, 32), "numba"),
        ((1, 11, 24, 96), "numba"),
        ((1, 150, 8, 32), "numba"),
        ((1, 150, 10, 7), "numba"),  # no stride that was measured
    ],
    ids=str,
)
def test_the_family_that_auto_takes(shape, family):
    inputs = make(*shape)
    others = {"numba", "torch"} - {family}
    chosen = results(inputs, "auto")
    assert same_bits(chosen, results(inputs, family))
    assert not any(same_bits(chosen, results(inputs, other)) for other in others)


def test_windows_flips_and_compiled_programs_keep_numba():
    inputs = make(*CLASSIFICATION)
    moved = {"flip_B": torch.zeros(CLASSIFICATION[0], dtype=torch.bool)}
    assert same_bits(results(inputs, "auto", **moved), results(inputs, "numba", **moved))
    student, labels, target = inputs

    def loss(z, impl):
        return distill_loss(z, labels, target, kl_weight=1.0, ignore_index=-1, impl=impl).loss

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(student, "auto"), loss(student, "numba"))
    assert not torch.equal(loss(student, "auto"), loss(student, "numba"))


def test_the_choice_does_not_depend_on_threads_and_neither_do_the_bits():
    before = torch.get_num_threads()
    inputs, found = make(*CLASSIFICATION), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(results(inputs, "auto"))
    finally:
        torch.set_num_threads(before)
    assert all(same_bits(one, found[0]) for one in found[1:])


def test_the_table_is_whole_and_is_read_at_the_problem_or_below():
    table = json.loads(choice.FILE.read_text(encoding="utf-8"))
    assert table["command"].startswith("python benchmarks/choice.py")
    for kind, measured in table["kinds"].items():
        assert measured["pixels"] == sorted(measured["pixels"])
        assert len(measured["ratios"]) == len(table["classes"])
        for classes, ratios in zip(table["classes"], measured["ratios"], strict=True):
            assert len(ratios) == len(measured["pixels"])
            for pixels, ratio in zip(measured["pixels"], ratios, strict=True):
                if ratio is not None:
                    assert choice.torch_is_faster(kind, classes, pixels) is (ratio >= choice.LEAST)
    assert not choice.torch_is_faster("one cell", 1, 256)
    assert choice.torch_is_faster("one cell", 1000, 10**6)
    assert choice.torch_is_faster("1", 150, choice.MOST // 150)
    assert not choice.torch_is_faster("1", 150, choice.MOST // 150 + 1)
    assert not choice.torch_is_faster("3", 1000, 256)
    largest = table["kinds"]["4"]["ratios"][-1]
    assert largest[-1] is None
    assert not choice.torch_is_faster("4", 5000, 10**9)


@pytest.mark.parametrize("k", [1, 16, 63, 64])
@pytest.mark.parametrize("temperature", [1.0, 2.0, 2.5])
@pytest.mark.parametrize("options", [{}, {"ce_weight": 0.0}, {"kl_weight": 0.0}, {"label_smoothing": 0.1}], ids=str)
def test_images_of_one_pixel_against_float64(k, temperature, options):
    student, labels, target = make(7, 64, 1, 1, k=k)
    options = {"temperature": temperature, "class_weight": torch.linspace(0, 2, 64), **options}
    exact = results((student.detach().double().requires_grad_(), labels, target), "reference", **options)
    actual = results((student, labels, target), "torch", **options)
    for one, other in zip(actual[:3], exact[:3], strict=True):
        assert abs(one.item() - other.item()) <= 1e-6 * abs(other.item()) + 2e-7 * temperature**2
    assert (actual[3] - exact[3]).abs().max() <= 2e-6 * exact[3].abs().max()


@pytest.mark.parametrize("scale", [0.0, 100.0, 6e4])
@pytest.mark.parametrize("k", [3, 100])
def test_wide_and_constant_logits_of_one_pixel(scale, k):
    student, labels, target = make(5, 100, 1, 1, k=k, scale=scale)
    exact = results((student.detach().double().requires_grad_(), labels, target), "reference")
    actual = results((student, labels, target), "torch")
    for one, other in zip(actual[:3], exact[:3], strict=True):
        assert one.item() == pytest.approx(other.item(), rel=2e-6, abs=2e-6)
    assert (actual[3] - exact[3]).abs().max() <= (2e-6 + 2e-7 * scale) * exact[3].abs().max().clamp_min(1e-9)


def test_an_offset_of_all_logits_changes_nothing():
    """The sum over the classes that a target leaves out would be rounded with the offset."""
    student, labels, target = make(8, 1000, 1, 1, k=16)
    moved = (student.detach() + 1024.0).requires_grad_()
    plain, shifted = (results((z, labels, target), "torch") for z in (student, moved))
    for one, other in zip(shifted, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-4, atol=1e-6)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("k", [8, 40])
def test_logits_that_are_not_finite(value, k):
    """One of an image that counts in no term changes nothing; else the loss and its whole gradient are NaN."""
    student, labels, target = make(6, 40, 1, 1, k=k)
    gate = torch.ones(labels.shape)
    gate[0] = 0
    clean = results((student, labels, target), "torch", pixel_weight_BHW=gate, distill_void=False)
    spoilt = student.detach().clone()
    spoilt[0, 3] = value  # its label is void, and so it does not teach
    found = results((spoilt.requires_grad_(), labels, target), "torch", pixel_weight_BHW=gate, distill_void=False)
    assert same_bits(found, clean)
    spoilt = student.detach().clone()
    spoilt[1, 3] = value
    found = results((spoilt.requires_grad_(), labels, target), "torch")
    assert found[0].isnan()
    assert found[3].isnan().all()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64], ids=str)
def test_label_dtypes_and_no_counted_pixel(dtype):
    student, labels, target = make(6, 40, 1, 1)
    void = torch.full_like(labels, 255).to(dtype)
    loss, _, _, gradient = results((student, void, target), "torch", ignore_index=255, distill_void=False)
    assert loss == 0
    assert not gradient.any()


def test_a_problem_is_not_looked_up_by_its_values():
    student, labels, target = make(*CLASSIFICATION)
    with torch.no_grad():
        student.fill_(math.nan)
    problem = LossProblem(
        student=student, labels=labels, target=target, size=(1, 1), use_ce=True, ce_weight=torch.ones(()),
        kl_weight=torch.ones(()), ce_denominator=None, kl_denominator=None, temperature=1.0, class_weight=None,
        ignore_index=-1, window=None, flip=None, pixel_weight=None, distill_void=True, align_corners=False,
        need_gradient=True,
    )  # fmt: skip
    assert choice.prefers_torch(problem)


@pytest.mark.parametrize("shape", [(4, 1000, 49), (3, 999, 9), (2, 301, 64), (1, 1, 20000), (20000, 2, 1), (256, 1000)])
def test_the_largest_of_the_classes_is_exact(shape):
    x_BCP = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    assert torch.equal(largest(x_BCP), x_BCP.amax(1))
    x_BCP[0, -1] = torch.nan
    assert torch.equal(largest(x_BCP).isnan(), x_BCP.amax(1).isnan())
