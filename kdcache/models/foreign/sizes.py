"""A first image that a network takes: its size, and what a forward pass reveals about the network."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from kdcache.errors import ModelError
from kdcache.models.foreign.processor import PROBE_SIZE, Processor, Size

_SECOND = (96, 128)
_TRIED = (224, 256, 336, 384, 448, 512, 518, 640, 1024)
_OF_SIZE = (RuntimeError, ValueError, AssertionError, IndexError)
"""Errors that networks raise for images of a size that they do not take."""
_POSITIONS = ("pos_embed", "position_embed", "positional_embed", "rel_pos", "relative_position", "rope")
_Answer = TypeVar("_Answer")


@dataclass
class Probe:
    """The result of a network's first forward pass.

    Attributes:
        size: (height, width) of the image.
        processor: the sizes that the network takes, as far as a few images show them.
        patch: the side in pixels of a patch, if the network's first layer cuts the image into patches. Otherwise None.
    """

    size: Size
    processor: Processor = field(default_factory=Processor)
    patch: int | None = None


def probe(spec: str, network: nn.Module, run: Callable[[Tensor], _Answer]) -> tuple[Probe, _Answer]:
    """Run a network on black images of several sizes, until it takes one.

    Args:
        spec: the model's spec, for messages.
        network: the network in eval mode.
        run: calls the network with an image (1, 3, H, W).
    Returns: the size that worked, with the sizes that the network takes in general, and the result of `run`.
    Raises: ModelError with the network's first error, if it takes none of the sizes.
    """
    first: Exception | None = None
    for size in dict.fromkeys(_candidates(network)):
        try:
            with _patches(network, size) as patches:
                answer = run(_image(network, size))
        except ModelError:
            raise
        except _OF_SIZE as error:
            first = first or error
        except Exception as error:
            first = error
            break
        else:
            fixed = None if _takes_another(network, run, size) else size
            processor = Processor(math.lcm(*patches), fixed, positions=has_positions(network))
            return Probe(size, processor, patches[0] if patches else None), answer
    assert first is not None
    raise ModelError(
        f"Cannot run {spec} on an image of {PROBE_SIZE[0]}x{PROBE_SIZE[1]} pixels: {type(first).__name__}: {first}",
        fix="Correct the network for float images (1, 3, H, W), or set its attribute img_size to the (H, W) that it "
        "takes.",
    ) from first


def has_positions(network: nn.Module) -> bool:
    """Return True if a network has position embeddings, judged by the names of its modules and tensors."""
    names = [name for part in (network.named_parameters(), network.named_buffers()) for name, _ in part]
    names += [name for name, _ in network.named_modules()]
    return any(word in name.lower() for name in names for word in _POSITIONS)


def _takes_another(network: nn.Module, run: Callable[[Tensor], Any], size: Size) -> bool:
    """Return True if a network takes images of one more size."""
    half = max(1, size[0] // 2), max(1, size[1] // 2)
    double = size[0] * 2, size[1] * 2
    for another in (_SECOND if size == PROBE_SIZE else half, double):
        try:
            run(_image(network, another))
        except Exception:
            continue
        return True
    return False


def _candidates(network: nn.Module) -> Iterator[Size]:
    """Yield sizes to try: the usual one, sizes in the network's configuration, then common ones."""
    yield PROBE_SIZE
    for module in network.modules():
        config = getattr(module, "config", None)
        published = getattr(module, "pretrained_cfg", None)
        for named in (
            getattr(config, "image_size", None),
            published.get("input_size") if isinstance(published, dict) else None,
            getattr(module, "img_size", None),
        ):
            sides = [named, named] if isinstance(named, int) else list(named) if isinstance(named, Sequence) else []
            if len(sides) in (2, 3) and all(isinstance(side, int) and side > 0 for side in sides):
                yield sides[-2], sides[-1]
    yield from ((side, side) for side in _TRIED)


def _image(network: nn.Module, size: Size) -> Tensor:
    like = next(network.parameters(), torch.empty(0))
    return torch.zeros(1, 3, *size, device=like.device, dtype=like.dtype)


@contextmanager
def _patches(network: nn.Module, size: Size) -> Iterator[list[int]]:
    """Collect the sides of patches, in a with block, from convolutions that cut the image into tiles."""
    found: list[int] = []

    def record(module: nn.Module, inputs: tuple[Any, ...], _output: object) -> None:
        if inputs and isinstance(inputs[0], Tensor) and tuple(inputs[0].shape[-2:]) == size:
            assert isinstance(module, nn.Conv2d)
            found.extend(module.stride)

    with ExitStack() as stack:
        for module in network.modules():
            if isinstance(module, nn.Conv2d) and module.in_channels == 3 and _cuts_tiles(module):
                stack.callback(module.register_forward_hook(record).remove)
        yield found


def _cuts_tiles(layer: nn.Conv2d) -> bool:
    tiles = max(layer.stride) > 1 and tuple(layer.kernel_size) == tuple(layer.stride)
    return tiles and layer.padding in ("valid", 0, (0, 0)) and tuple(layer.dilation) == (1, 1)
