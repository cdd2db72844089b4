"""What of the loss is differentiated: its terms, its weights, by torch.func and by compiled programs."""

import pytest
import torch
from torch import Tensor

from kdcache_kernels import PackedTarget, library, pack
from kdcache_kernels import distill_loss as any_distill_loss

C, GRID = 5, (3, 4)
SIZES = [(12, 16), (3, 4), (10, 13)]  # cells, pixels, tiles


def make(device, size=(12, 16), dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    z = (torch.randn(2, C, *GRID, generator=generator) * 2).to(device, dtype).requires_grad_()
    t = torch.randn(2, C, *GRID, generator=generator).to(device) * 2
    y = torch.randint(0, C, (2, *size), generator=generator, dtype=torch.uint8).to(device)
    y[0, :2] = 255
    return z, y, PackedTarget(*pack(t, 3, impl="reference"), C, size)


OPTIONS = {"ce_weight": 0.7, "kl_weight": 1.3, "temperature": 2.0}


def close(actual: Tensor, expected: Tensor) -> None:
    assert (actual - expected).abs().max() <= 2e-6 * expected.abs().max()


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_every_part_has_its_gradient(distill_loss, size, device):
    """Beside the terms by themselves in float64, and any sum of parts."""
    z, y, target = make(device, size)
    exact = z.detach().double().requires_grad_()
    reference = any_distill_loss(exact, y, target, **OPTIONS, impl="reference")
    parts = distill_loss(z, y, target, **OPTIONS)
    assert all(part.requires_grad for part in parts)
    torch.testing.assert_close(parts.loss, 0.7 * parts.ce + 1.3 * parts.kl)
    for upstream in [(0, 1, 0), (0, 0, 1), (0.5, 2, 0), (1, -3, 4)]:
        chosen = [(n, factor) for n, factor in enumerate(upstream) if factor]
        (expected,) = torch.autograd.grad(sum(f * reference[n] for n, f in chosen), exact, retain_graph=True)
        (actual,) = torch.autograd.grad(sum(f * parts[n] for n, f in chosen), z, retain_graph=True)
        close(actual, expected)


def test_a_weight_that_is_learnt_gets_its_term(distill_loss, device):
    z, y, target = make(device)
    weights = [torch.tensor(value, device=device, requires_grad=True) for value in (0.7, 1.3)]
    parts = distill_loss(z, y, target, ce_weight=weights[0], kl_weight=weights[1], temperature=2.0)
    logits, *gradients = torch.autograd.grad(-2 * parts.loss, [z, *weights])
    torch.testing.assert_close(gradients, [-2 * parts.ce, -2 * parts.kl])
    plain = distill_loss(z, y, target, **OPTIONS)
    torch.testing.assert_close(logits, torch.autograd.grad(-2 * plain.loss, z)[0])
    # Of a student that is not trained, too.
    parts = distill_loss(z.detach(), y, target, ce_weight=weights[0], kl_weight=0.5)
    assert torch.equal(torch.autograd.grad(parts.loss, weights[0])[0], parts.ce.detach())


def test_a_term_that_is_left_out_has_no_gradient(distill_loss, device):
    z, y, target = make(device)
    assert (torch.autograd.grad(distill_loss(z, y, target, kl_weight=0.0).kl, z)[0] == 0).all()
    assert (torch.autograd.grad(distill_loss(z, None, target, size=(12, 16)).ce, z)[0] == 0).all()


def test_a_term_that_is_not_finite_has_a_gradient_of_nan_everywhere(distill_loss, device):
    z, y, target = make(device)
    target.values[0, 0, 1, 1] = torch.nan
    parts = distill_loss(z, y, target, **OPTIONS)
    assert torch.autograd.grad(parts.kl, z, retain_graph=True)[0].isnan().all()
    assert torch.autograd.grad(parts.ce, z)[0].isfinite().all()  # as if there were no teacher


@pytest.mark.interpreted(part=["kl"])
@pytest.mark.parametrize("part", ["loss", "ce", "kl"])
def test_torch_func(distill_loss, part, device):
    """Its gradient, and one per sample, are autograd's."""
    z, y, target = make(device)

    def of(z: Tensor, y: Tensor, values: Tensor, indices: Tensor, tail: Tensor) -> Tensor:
        packed = PackedTarget(values, indices, tail, C, (12, 16))
        return getattr(distill_loss(z, y, packed, **OPTIONS), part)

    arguments = (y, target.values, target.indices, target.tail)
    (expected,) = torch.autograd.grad(of(z, *arguments), z)
    torch.testing.assert_close(torch.func.grad(of)(z.detach(), *arguments), expected)
    samples = [z.detach()[:, None], *(x[:, None] for x in arguments)]
    per_sample = torch.func.vmap(torch.func.grad(of))(*samples)
    for n in range(2):
        one = [x[n].clone() for x in samples]
        (expected,) = torch.autograd.grad(of(one[0].requires_grad_(), *one[1:]), one[0])
        torch.testing.assert_close(per_sample[n], expected)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")  # of torch.func.jvp itself
@pytest.mark.fused
def test_what_is_not_computed_says_so(distill_loss, device):
    z, y, target = make(device)
    with pytest.raises(RuntimeError, match=r"Cannot differentiate distill_loss forwards .*\n  fix: "):
        torch.func.jvp(lambda z: distill_loss(z, y).loss, (z.detach(),), (z.detach(),))
    with pytest.raises(RuntimeError, match=r"Cannot differentiate distill_loss twice .*\n  fix: "):
        torch.func.jacrev(torch.func.grad(lambda z: distill_loss(z, y).loss))(z.detach())
    for part in distill_loss(z, y, target, **OPTIONS):
        (gradient,) = torch.autograd.grad(part, z, create_graph=True)
        with pytest.raises(RuntimeError, match="Cannot differentiate distill_loss twice"):
            gradient.square().sum().backward()


@pytest.mark.fused
def test_a_compiled_sum_of_terms(distill_loss, device):
    z, y, target = make(device)
    scale = torch.tensor(0.3, device=device, requires_grad=True)

    def step(z: Tensor, y: Tensor, values: Tensor, indices: Tensor, tail: Tensor, scale: Tensor) -> Tensor:
        packed = PackedTarget(values, indices, tail, C, (12, 16))
        parts = distill_loss(z, y, packed, kl_weight=scale, temperature=2.0)
        return parts.loss + scale * parts.ce

    arguments = (z, y, target.values, target.indices, target.tail, scale)
    functions = (step, torch.compile(step, fullgraph=True, backend="aot_eager"))
    results = [torch.autograd.grad(function(*arguments), (z, scale)) for function in functions]
    for plain, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, plain)


@pytest.mark.fused
def test_the_gradient_of_a_term_costs_nothing_where_it_is_not_asked_for(distill_loss, device, monkeypatch):
    """A step on the loss alone runs the kernels once; one on a term once more, and without the other term."""
    calls = []
    original = library.computed

    def record(problem, family):
        calls.append((problem.use_ce, problem.use_kl, problem.need_gradient))
        return original(problem, family)

    monkeypatch.setattr(library, "computed", record)
    z, y, target = make(device)
    distill_loss(z, y, target, **OPTIONS).loss.backward()
    assert calls == [(True, True, True)]
    distill_loss(z, y, target, **OPTIONS).kl.backward()
    assert calls[1:] == [(True, True, True), (False, True, True)]


def test_opcheck_of_the_recomputed_gradient(backend):
    if backend.impl == "reference":
        pytest.skip("it is no operator")
    z, y, target = make(backend.device)
    scalar = torch.ones((), dtype=torch.float64, device=backend.device)
    problem = dict.fromkeys(library.LOSS_ARGUMENTS) | {
        "student": z.detach(), "labels": y, "size": (12, 16), "use_ce": True, "ce_weight": scalar, "kl_weight": scalar,
        "temperature": 2.0, "label_smoothing": 0.0, "focal_gamma": 0.0,
        "ignore_index": 255, "distill_void": True, "align_corners": False, "need_gradient": True,
    }  # fmt: skip
    names = [name for name in library.LOSS_ARGUMENTS if name.startswith("target_")]
    values = dict(zip(names, library.target_arguments(target), strict=True))
    torch.library.opcheck(library.distill_gradient, (backend.impl, *(problem | values).values()))
