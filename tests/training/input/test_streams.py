"""The rows that streams have of a batch: whose order depends on nothing but seed and draw."""

from __future__ import annotations

import pytest
import torch

from kdcache.data import open_split
from kdcache.errors import DataError
from kdcache.training import LabelledDataset
from kdcache.training.input.loader import Draws
from kdcache.training.input.streams import StreamDraws, feed_streams, stream_seed

CPU = torch.device("cpu")
SIZE = (16, 24)


def stream(name: str, count: int, rows: int, seed: int) -> StreamDraws:
    split = open_split(f"scenes:16x24,train={count},val=1", "train")
    return StreamDraws(name, Draws(LabelledDataset(split, SIZE), seed), rows)


@pytest.mark.parametrize("workers", [0, 2])
def test_processes_draw_together_what_one_draws_alone(workers: int) -> None:
    streams = [stream("a", 5, 4, 7), stream("b", 3, 2, stream_seed(7, 1))]
    whole = list(feed_streams(streams, CPU, first=3, last=5, workers=0))
    assert [list(map(len, batch)) for batch in whole] == [[4, 2]] * 2
    wanted = [[part.pixels.clone() for part in batch] for batch in whole]
    again = [
        [[part.pixels.clone() for part in batch] for batch in feed_streams(
            streams, CPU, first=3, last=5, workers=workers if rank else 0, rank=rank, world=2)]
        for rank in range(2)
    ]  # fmt: skip
    # Without workers a batch's memory is drawn into again: the last of the whole is compared.
    for number in range(2):
        assert torch.equal(torch.cat([again[rank][-1][number] for rank in range(2)]), wanted[-1][number])


def test_a_stream_s_order_does_not_depend_on_the_others() -> None:
    alone = stream("a", 5, 4, 7)
    ((batch,),) = feed_streams([alone], CPU, first=2, last=3, workers=0)
    first = batch.pixels.clone()
    (both,) = feed_streams([alone, stream("b", 3, 2, 1)], CPU, first=2, last=3, workers=0)
    assert torch.equal(both[0].pixels, first)
    assert alone.sample_ids(2) == [f"a:{sample}" for sample in alone.draws.sample_ids(2, 4)]


def test_streams_have_seeds_of_their_own() -> None:
    assert stream_seed(3, 0) == 3
    seeds = [stream_seed(seed, number) for seed in range(20) for number in range(1, 4)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_an_error_of_one_stream_comes_in_the_place_of_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    good, bad = stream("a", 5, 2, 0), stream("b", 3, 2, 1)
    error = DataError("Cannot read nothing", fix="Repair it.")
    monkeypatch.setattr(bad.draws, "draw_into", lambda draw, out: error)
    assert list(feed_streams([good, bad], CPU, first=0, last=2, workers=0)) == [error, error]
