"""Networks are shown an image that they take, and the sizes that they take are found."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kdcache.errors import ModelError
from kdcache.models import WrappedModel
from kdcache.models.foreign.processor import Processor
from kdcache.teacher import Teacher, fingerprint
from kdcache.teacher.load.forward import teach

CPU = torch.device("cpu")


class Picky(nn.Module):
    """A network of stride 8 that fails unless an image has a size that `takes` accepts."""

    def __init__(self, takes: Any, layer: nn.Conv2d | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = layer or nn.Conv2d(3, 4, 3, 8, 1)
        self.takes = takes

    def forward(self, x: Tensor) -> Tensor:
        if not self.takes(*x.shape[-2:]):
            raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")
        return self.layer(x)


@pytest.mark.parametrize(
    ("takes", "probed", "fixed"),
    [
        (lambda h, w: True, (128, 128), None),
        (lambda h, w: (h, w) == (128, 128), (128, 128), (128, 128)),
        (lambda h, w: (h, w) == (224, 224), (224, 224), (224, 224)),
        (lambda h, w: h % 28 == w % 28 == 0, (224, 224), None),
        (lambda h, w: (h, w) == (518, 518), (518, 518), (518, 518)),
    ],
)
def test_the_first_size_that_runs_is_kept(takes: Any, probed: tuple[int, int], fixed: tuple[int, int] | None) -> None:
    model = WrappedModel("own:net", Picky(takes), 4)
    assert (model.probe_size, model.fixed_size, model.stride) == (probed, fixed, 8)


def test_a_size_that_the_network_names_comes_first() -> None:
    network = Picky(lambda h, w: (h, w) == (200, 72))
    network.img_size = (200, 72)
    assert WrappedModel("own:net", network, 4).fixed_size == (200, 72)


def test_the_fingerprint_is_of_images_that_the_network_takes() -> None:
    usual = fingerprint(Teacher(WrappedModel("own:net", Picky(lambda h, w: True), 4), "own"), "float32", CPU)
    assert (usual.probe_size, usual.processor) == (None, None)
    fixed = fingerprint(Teacher(WrappedModel("own:net", Picky(lambda h, w: h == 224), 4), "own"), "float32", CPU)
    assert fixed.probe_size == (224, 224)
    assert fixed.processor is not None
    assert fixed.processor.fixed_size == (224, 224)
    assert [text.partition(":")[0] for text in fixed.differences(usual)] == ["probe"]


def test_patches_make_sizes_multiples() -> None:
    model = WrappedModel("own:net", Picky(lambda h, w: True, nn.Conv2d(3, 4, 14, 14)), 4)
    assert (model.multiple, model.patch) == (14, 14)
    model.check_size((140, 196))
    with pytest.raises(ModelError, match=r"144x192[\s\S]*multiples of 14[\s\S]*--size 140x196"):
        model.check_size((144, 192))
    assert WrappedModel("own:net", Picky(lambda h, w: True), 4).multiple == 1  # padded: every pixel is seen


def test_networks_that_see_the_same_images_share_a_common_multiple() -> None:
    both = Processor.of_all([Processor(multiple=4), Processor(multiple=6, pads=True)])
    assert (both.multiple, both.fixed_size, both.pads) == (12, None, True)
    assert Processor.of_all([Processor(multiple=4), Processor(fixed_size=(8, 8))]).fixed_size == (8, 8)


def test_a_failure_is_the_networks_with_its_size_and_one_that_works() -> None:
    model = WrappedModel("own:net", Picky(lambda h, w: h % 32 == 0), 4)
    pixels = torch.zeros(1, 100, 96, 3, dtype=torch.uint8)
    words = r"Cannot run the network own:net on images of 100x96: RuntimeError[\s\S]*--size 128x128"
    with pytest.raises(ModelError, match=words):
        teach(model, pixels, (), "float32", CPU)


def test_a_network_that_takes_nothing_says_why() -> None:
    with pytest.raises(ModelError, match="on an image of 128x128 pixels: RuntimeError: mat1 and mat2"):
        WrappedModel("own:net", Picky(lambda h, w: False), 4)


def test_tokens_become_a_map_without_those_before_them() -> None:
    class Tokens(nn.Module):
        def __init__(self, prefix: int) -> None:
            super().__init__()
            self.kdcache_heads: dict[str, Any] = {}
            self.patches, self.prefix = nn.Conv2d(3, 6, 16, 16), prefix
            self.norm = nn.LayerNorm(6)

        def forward(self, x: Tensor) -> Any:
            tokens = self.patches(x).flatten(2).transpose(1, 2)
            return self.norm(torch.cat([tokens[:, :1]] * self.prefix + [tokens], 1))

    for prefix in (0, 1, 5):
        model = WrappedModel("own:vit", Tokens(prefix), None).eval()
        assert model.taps == ("last", "patches")
        features = model(torch.randn(2, 3, 64, 96), ["last", "norm", "patches"]).features
        assert {tap: tuple(f.shape) for tap, f in features.items()} == dict.fromkeys(features, (2, 6, 4, 6))
        assert torch.equal(features["last"], features["norm"])
        torch.testing.assert_close(
            features["last"], model.network.norm(features["patches"].movedim(1, -1)).movedim(-1, 1)
        )
    broken = WrappedModel("own:vit", Tokens(40), None).eval()
    with pytest.raises(ModelError, match=re.escape("Cannot lay 64 tokens of 'norm' of own:vit over an image")):
        broken(torch.randn(2, 3, 64, 96), ["norm"])
