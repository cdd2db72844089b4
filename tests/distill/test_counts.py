"""Denominators that processes share."""

from __future__ import annotations

import torch

from kdcache.distill import Counts, average_counts, mean_counts


def test_counts_of_any_shape_are_exchanged_at_once_and_keep_their_dtype() -> None:
    counts = Counts(
        torch.tensor(3.0), torch.tensor(5.0, dtype=torch.float64), (torch.tensor(7.0), torch.tensor([1.0, 2.0]))
    )
    exchanged = list[torch.Tensor]()

    def average(tensor: torch.Tensor) -> torch.Tensor:
        exchanged.append(tensor)
        return 2 * tensor

    twice = average_counts(counts, average)
    assert [tensor.tolist() for tensor in exchanged] == [[3.0, 5.0, 7.0, 1.0, 2.0]]
    assert (twice.ce.item(), twice.kl.item()) == (6.0, 10.0)
    assert [term.tolist() for term in twice.terms] == [14.0, [2.0, 4.0]]
    assert [twice.ce.dtype, twice.kl.dtype, twice.terms[1].dtype] == [torch.float32, torch.float64, torch.float32]
    assert mean_counts([counts, twice]).terms[1].tolist() == [1.5, 3.0]
