"""The loss of several streams: the weighted sum of each stream's own loss on its rows."""

from __future__ import annotations

import pytest
import torch

from kdcache.distill import Batch, DistillLoss, LabelTargets, StreamBatch, StreamLoss
from kdcache.distill.counts import Denominators
from kdcache.models import Outputs

C, SIZE = 4, (8, 12)


def batch_of(rows: int, seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    label = torch.randint(0, C, (rows, *SIZE), generator=generator, dtype=torch.uint8)
    label[:, : seed % 5] = 255
    pixels = torch.randint(0, 256, (rows, *SIZE, 3), generator=generator, dtype=torch.uint8)
    return Batch(pixels=pixels, labels={"segmentation": label})


@pytest.fixture
def streams() -> tuple[StreamLoss, StreamBatch, Outputs]:
    """A plain stream and one with KL to its labels' cells, two and three rows, weights 0.5 and 2."""
    plain = DistillLoss(kl_weight=0.0)
    taught = DistillLoss(LabelTargets(C, SIZE, (2, 3)), kl_weight=0.7, class_weight=torch.tensor([1.0, 2, 3, 4]))
    batch = StreamBatch((batch_of(2, 1), batch_of(3, 3)))
    torch.manual_seed(5)
    logits = torch.randn(5, C, 2, 3, requires_grad=True)
    outputs = Outputs({"segmentation": logits}, {"tap": torch.randn(5, 2, 1, 1)})
    return StreamLoss([plain, taught], ["a", "b"], [0.5, 2.0]), batch, outputs


def test_it_is_the_weighted_sum_of_the_streams_own_losses(
    streams: tuple[StreamLoss, StreamBatch, Outputs],
) -> None:
    criterion, batch, outputs = streams
    losses = criterion(outputs, batch)
    rows = [outputs.logits.detach()[:2].requires_grad_(), outputs.logits.detach()[2:].requires_grad_()]
    own = [one(logits, part) for one, logits, part in zip(criterion.streams, rows, batch.streams, strict=True)]
    expected = 0.5 * own[0].loss + 2.0 * own[1].loss
    torch.testing.assert_close(losses.loss, expected)
    for actual, alone in zip(losses.streams, own, strict=True):
        assert torch.equal(actual.ce, alone.ce)
        assert torch.equal(actual.kl, alone.kl)
    losses.loss.backward()
    expected.backward()
    torch.testing.assert_close(outputs.logits.grad, torch.cat([row.grad for row in rows]))
    assert criterion.names == ("a/loss", "a/ce", "a/kl", "b/loss", "b/ce", "b/kl")


def test_parts_are_each_stream_s_loss_and_its_terms(streams: tuple[StreamLoss, StreamBatch, Outputs]) -> None:
    criterion, batch, outputs = streams
    parts, losses = criterion.parts(outputs, batch), criterion(outputs, batch)
    assert list(parts) == ["a/loss", "a/ce", "b/loss", "b/ce", "b/kl"]
    torch.testing.assert_close(parts["a/loss"] + parts["b/loss"], losses.loss)
    torch.testing.assert_close(parts["b/ce"] + parts["b/kl"], parts["b/loss"])


def test_denominators_of_parts_average_to_the_whole(streams: tuple[StreamLoss, StreamBatch, Outputs]) -> None:
    criterion, _, _ = streams
    whole = StreamBatch((batch_of(4, 1), batch_of(2, 3)))
    logits = torch.randn(6, C, 2, 3)
    parts = [whole.rows(3), whole.rows(3, 3)]
    assert [list(map(len, part.streams)) for part in parts] == [[2, 1], [2, 1]]
    assert torch.equal(torch.cat([part.streams[0].label for part in parts]), whole.streams[0].label)
    counts = Denominators.mean([criterion.counts(part) for part in parts])
    of_parts = [torch.cat([logits[:2], logits[4:5]]), torch.cat([logits[2:4], logits[5:]])]
    outputs = [Outputs({"segmentation": own}, {}) for own in of_parts]
    losses = [criterion(own, part, counts).loss for own, part in zip(outputs, parts, strict=True)]
    torch.testing.assert_close(sum(losses) / 2, criterion(Outputs({"segmentation": logits}, {}), whole).loss)


def test_pixels_are_those_of_all_streams_in_their_order() -> None:
    batch = StreamBatch((batch_of(1, 1), batch_of(2, 2)))
    assert torch.equal(batch.pixels[0], batch.streams[0].pixels[0])
    assert torch.equal(batch.pixels[1:], batch.streams[1].pixels)
    assert len(batch) == 3
    copy = batch.empty_like(torch.device("cpu"))
    copy.copy_from(batch)
    assert torch.equal(copy.pixels, batch.pixels)
