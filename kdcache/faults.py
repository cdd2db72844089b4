"""Name errors in a network's own code as the network's, by their traceback."""

import sys
import sysconfig
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import torch
from torch import nn

from kdcache.errors import KDCacheError, ModelError
from kdcache.models import Outputs, SegmentationModel

_ONE_IMAGE = "Expected more than 1 value per channel"
"""What BatchNorm says in training about one value, such as that of one pooled image."""


_PACKAGES = ("kdcache", "kdcache_cli", "kdcache_kernels")
_PARTS = (*Outputs._fields, "logits")


@contextmanager
def naming_network() -> Iterator[None]:
    """Turn errors of a network's forward or backward into a ModelError, in a with block.

    The ModelError names the network if the error's traceback shows it. Other errors are raised unchanged.
    """
    try:
        yield
    except Exception as error:
        if (fault := network_fault(error)) is not None:
            raise fault from error
        raise


def network_fault(error: BaseException) -> ModelError | None:
    """Return a ModelError that names the network, if `error` was raised in a network's forward or backward.

    Return None for any other error, and if the memory ran out. The traceback of `error` shows where it was raised.
    """
    if isinstance(error, KDCacheError | MemoryError | torch.OutOfMemoryError) or hasattr(error, "rule"):
        return None
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    modules = [frame.f_locals.get("self") for frame in frames if frame.f_code.co_name in ("forward", "_call_impl")]
    root = next((module for module in modules if isinstance(module, SegmentationModel)), None)
    kind, said = type(error).__name__, f"{error}{user_place(error)}"
    if isinstance(error, AttributeError) and error.name in _PARTS and not isinstance(error.obj, Outputs):
        return ModelError(
            f"Cannot use what a network returned: {type(error.obj).__name__} instead of Outputs",
            fix='Return kdcache.models.Outputs({"segmentation": logits}, features) from your SegmentationModel, '
            "or make it a torch.nn.Module, which kdcache wraps.",
        )
    if root is not None:
        size = _image_size(frames, root)
        on_images = "" if size is None else f" on images of {size[0]}x{size[1]}"
        return ModelError(
            f"Cannot run the network {root.spec}{on_images}: {kind}{_layer(root, modules)}: {said}",
            fix=_fix(str(error), root, size),
        )
    if any(frame.f_code.co_name in ("backward", "grad") and _is_autograd(frame) for frame in frames):
        return ModelError(
            f"Cannot go backward through the network: {kind}: {said}",
            fix="Look in the network for operations in place (+=, relu_), for outputs without a gradient (detach, "
            "no_grad, frozen layers) and for your own gradients. --debug shows the traceback.",
        )
    return None


def user_place(error: BaseException) -> str:
    """Return ", at FILE:LINE", the innermost line of the user's own code in an error's traceback.

    Return '' if no line is the user's: all are in kdcache, Python or installed libraries.
    """
    lines = [(frame, line) for frame, line in traceback.walk_tb(error.__traceback__) if _is_users(frame)]
    return f", at {lines[-1][0].f_code.co_filename}:{lines[-1][1]}" if lines else ""


def _layer(root: nn.Module, modules: list[object]) -> str:
    """Return ` in its layer NAME (TYPE)` for the innermost layer whose forward was running, or ''."""
    names = {id(module): name.removeprefix("network.") for name, module in root.named_modules()}
    inside = [module for module in modules if id(module) in names and names[id(module)] not in ("", "network")]
    return f" in its layer {names[id(inside[-1])]} ({type(inside[-1]).__name__})" if inside else ""


def _image_size(frames: list[FrameType], root: SegmentationModel) -> tuple[int, int] | None:
    """Return the (height, width) of the images that the network got, or None if the traceback does not show it."""
    for frame in frames:
        if frame.f_locals.get("self") is root and frame.f_code.co_name == "forward":
            images = frame.f_locals.get(frame.f_code.co_varnames[1])
            if isinstance(images, torch.Tensor) and images.ndim == 4:
                return images.shape[-2], images.shape[-1]
    return None


def _fix(text: str, root: SegmentationModel, size: tuple[int, int] | None) -> str:
    if _ONE_IMAGE in text:
        return (
            "BatchNorm needs two images or more at once: use --batch-size 2 or more for each process and part, so a "
            "smaller --accumulate."
        )
    near = root.probe_size if size is None else root.processor.nearest(size)
    near = root.probe_size if near == size else near
    return (
        f"Correct the network, or give it images of a size that it takes, such as --size {near[0]}x{near[1]}. --debug "
        "shows the traceback, which is the network's."
    )


def _is_autograd(frame: FrameType) -> bool:
    return Path(frame.f_code.co_filename).is_relative_to(Path(torch.__file__).parent / "autograd")


def _is_users(frame: FrameType) -> bool:
    """Return True if a line of code is neither in kdcache, nor in Python, nor in an installed library."""
    file = frame.f_code.co_filename
    if file.startswith("<"):
        return False
    packages = [sys.modules[name].__file__ for name in _PACKAGES if name in sys.modules]
    folders = [Path(path).parent for path in packages if path is not None]
    folders += [Path(sys.prefix), *(Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib", "platlib"))]
    return not any(Path(file).is_relative_to(folder) for folder in folders)
