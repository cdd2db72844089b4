"""The loss of several streams: the weighted sum of each stream's own loss on its rows."""

from __future__ import annotations

import pytest
import torch
from terms_oracle import Store

from kdcache.distill import (
    Batch,
    Criterion,
    DistillLoss,
    LabelTargets,
    Streams,
    UncertaintyBalance,
    mean_counts,
    pixels_of,
    rows_of,
)
from kdcache.distill.terms import loss_term, make_term
from kdcache.models import Outputs

C, SIZE = 4, (8, 12)


def batch_of(rows: int, seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    label = torch.randint(0, C, (rows, *SIZE), generator=generator, dtype=torch.uint8)
    label[:, : seed % 5] = 255
    pixels = torch.randint(0, 256, (rows, *SIZE, 3), generator=generator, dtype=torch.uint8)
    return Batch(pixels=pixels, labels={"segmentation": label})


@pytest.fixture
def streams() -> tuple[Criterion, Streams, Outputs]:
    """A plain stream and one with KL to its labels' cells, two and three rows, weights 0.5 and 2."""
    plain = DistillLoss(kl_weight=0.0)
    taught = DistillLoss(LabelTargets(C, SIZE, (2, 3)), kl_weight=0.7, class_weight=torch.tensor([1.0, 2, 3, 4]))
    batch = (batch_of(2, 1), batch_of(3, 3))
    torch.manual_seed(5)
    logits = torch.randn(5, C, 2, 3, requires_grad=True)
    outputs = Outputs({"segmentation": logits}, {"tap": torch.randn(5, 2, 1, 1)})
    return Criterion([plain, taught], ["a", "b"], [0.5, 2.0]), batch, outputs


def test_it_is_the_weighted_sum_of_the_streams_own_losses(
    streams: tuple[Criterion, Streams, Outputs],
) -> None:
    criterion, batch, outputs = streams
    losses = criterion(outputs, batch)
    rows = [outputs.logits.detach()[:2].requires_grad_(), outputs.logits.detach()[2:].requires_grad_()]
    own = [one(logits, part) for one, logits, part in zip(criterion.losses, rows, batch, strict=True)]
    expected = 0.5 * own[0].loss + 2.0 * own[1].loss
    torch.testing.assert_close(losses.loss, expected)
    for name, alone in zip("ab", own, strict=True):
        assert torch.equal(losses.terms[f"{name}/loss"], alone.loss)
        assert torch.equal(losses.terms[f"{name}/ce"], alone.ce)
        assert torch.equal(losses.terms[f"{name}/kl"], alone.kl)
    losses.loss.backward()
    expected.backward()
    torch.testing.assert_close(outputs.logits.grad, torch.cat([row.grad for row in rows]))
    assert criterion.names == tuple(losses.terms) == ("a/loss", "a/ce", "a/kl", "b/loss", "b/ce", "b/kl")


def test_parts_are_each_stream_s_loss_and_its_terms(streams: tuple[Criterion, Streams, Outputs]) -> None:
    criterion, batch, outputs = streams
    parts, losses = criterion.parts(outputs, batch), criterion(outputs, batch)
    assert list(parts) == ["a/loss", "a/ce", "b/loss", "b/ce", "b/kl"]
    torch.testing.assert_close(parts["a/loss"] + parts["b/loss"], losses.loss)
    torch.testing.assert_close(parts["b/ce"] + parts["b/kl"], parts["b/loss"])


def test_denominators_of_parts_average_to_the_whole(streams: tuple[Criterion, Streams, Outputs]) -> None:
    criterion, _, _ = streams
    whole = (batch_of(4, 1), batch_of(2, 3))
    logits = torch.randn(6, C, 2, 3)
    parts = [rows_of(whole, 3), rows_of(whole, 3, 3)]
    assert [list(map(len, part)) for part in parts] == [[2, 1], [2, 1]]
    assert torch.equal(torch.cat([part[0].label for part in parts]), whole[0].label)
    counts = mean_counts([criterion.counts(part) for part in parts])
    of_parts = [torch.cat([logits[:2], logits[4:5]]), torch.cat([logits[2:4], logits[5:]])]
    outputs = [Outputs({"segmentation": own}, {}) for own in of_parts]
    losses = [criterion(own, part, counts).loss for own, part in zip(outputs, parts, strict=True)]
    torch.testing.assert_close(sum(losses) / 2, criterion(Outputs({"segmentation": logits}, {}), whole).loss)


def test_pixels_are_those_of_all_streams_in_their_order() -> None:
    first, second = batch_of(1, 1), batch_of(2, 2)
    assert torch.equal(pixels_of((first, second)), torch.cat([first.pixels, second.pixels]))
    assert pixels_of((first,)) is first.pixels, "a single stream is not copied"


@pytest.fixture
def alone() -> tuple[Criterion, DistillLoss, Batch, torch.Tensor]:
    """The loss of a training without streams, the same loss for a loop of one's own, its rows and logits."""
    own = DistillLoss(LabelTargets(C, SIZE, (2, 3)), kl_weight=0.7)
    torch.manual_seed(5)
    return Criterion([own]), own, batch_of(3, 3), torch.randn(3, C, 2, 3, requires_grad=True)


def test_one_stream_without_a_name_is_its_own_loss_to_the_bit(
    alone: tuple[Criterion, DistillLoss, Batch, torch.Tensor],
) -> None:
    criterion, own, batch, logits = alone
    losses, expected = criterion(logits, (batch,)), own(logits, batch)
    assert criterion.names == own.names == tuple(losses.terms) == ("ce", "kl")
    assert torch.equal(losses.loss, expected.loss)
    assert (losses.ce, losses.kl) == (expected.ce, expected.kl)
    gradients = [torch.autograd.grad(one.loss, logits)[0] for one in (losses, expected)]
    assert torch.equal(*gradients)
    parts = criterion.parts(logits, (batch,))
    assert list(parts) == ["ce", "kl"]
    assert all(torch.equal(parts[name], value) for name, value in own.parts(logits, batch).items())


def test_a_single_stream_s_outputs_are_not_copied(alone: tuple[Criterion, DistillLoss, Batch, torch.Tensor]) -> None:
    criterion, own, batch, logits = alone
    seen = list[torch.Tensor]()
    own.by_task = lambda outputs, *_: (seen.append(outputs.logits), ({"segmentation": logits.sum()}, {}))[1]
    criterion(logits, (batch,))
    assert seen[0] is logits


@pytest.mark.parametrize("balanced", [False, True])
def test_a_checkpoint_of_a_loss_without_streams_is_read(balanced: bool) -> None:
    """Until decision 0040 the loss of a single source was a `DistillLoss`, which held the balance last."""

    def loss() -> DistillLoss:
        spec = loss_term("hint", teacher_tap="deep")
        return DistillLoss(Store(), kl_weight=0.0, further=[make_term(spec, targets=Store(), student_taps={"head": 2})])

    def balance() -> UncertaintyBalance | None:
        return UncertaintyBalance({"segmentation": "classes", "depth": "absolute"}) if balanced else None

    before, now = loss(), Criterion([loss()], balance=balance())
    before.balance = balance()
    assert not torch.equal(before.terms[0].projection.weight, now.losses[0].terms[0].projection.weight)
    now.load_state_dict(before.state_dict())
    assert torch.equal(before.terms[0].projection.weight, now.losses[0].terms[0].projection.weight)
    assert [p.shape for p in now.parameters()] == [p.shape for p in before.parameters()]
    again = Criterion([loss()], balance=balance())
    again.load_state_dict(now.state_dict())
    assert torch.equal(before.terms[0].projection.weight, again.losses[0].terms[0].projection.weight)
    with pytest.raises(RuntimeError, match=r"streams\.0\.further\.1"):
        again.load_state_dict({**now.state_dict(), "further.1.ring": torch.zeros(1)})
