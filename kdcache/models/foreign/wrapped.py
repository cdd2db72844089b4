"""Any module behind kdcache's model interface."""

import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from kdcache.errors import ModelError
from kdcache.heads import CategoricalHead
from kdcache.models.foreign.answers import DECLARED, Reading
from kdcache.models.foreign.peel import NotingResizes, Resize, is_exact, peels, resize_of
from kdcache.models.foreign.readings import TimmMaps, reading_of
from kdcache.models.foreign.sizes import probe
from kdcache.models.foreign.tokens import as_map
from kdcache.models.native import Outputs, SegmentationModel, in_eval_mode
from kdcache.tasks import SEGMENTATION


class Head(Protocol):
    """A head whose outputs are stored in a cache, such as an entry of the cache's manifest."""

    @property
    def size(self) -> tuple[int, int]:
        """The (h, w) of the head's stored outputs."""


class WrappedModel(SegmentationModel):
    """Any `torch.nn.Module` as a model of kdcache. Its state dict keeps the network's names.

    Any submodule can be a tap, by its dotted name, if its output is (B, c, h, w) or a transformer's tokens (B, N, c).
    `taps` lists the network's direct children and the features in its return value.

    If the network ends with a bilinear resize, the model leaves it out and takes over its `align_corners`. Otherwise
    `align_corners` is the network's attribute of this name, or False. `mean` and `std` come from the
    network if it has them, else from ImageNet.

    Args:
        spec: the model's spec.
        network: the network.
        num_classes: the expected number of classes. None accepts any.
        declared: the network's heads: name -> kind. None reads the network's attribute `kdcache_heads`, if it exists.
        reading: the adapter that calls the network. None chooses one.

    Attributes:
        peeled: the names of heads whose last resize is left out.
        patch: the side in pixels of a patch, if the network's first layer cuts the image into patches. Otherwise None.
    Raises: ModelError if the network fails on an image, or has another number of classes or other heads than declared.
    """

    def __init__(
        self,
        spec: str,
        network: nn.Module,
        num_classes: int | None,
        declared: Mapping[str, Any] | None = None,
        reading: Reading | None = None,
    ) -> None:
        declared = getattr(network, DECLARED, None) if declared is None else declared
        if reading is None:
            reading = (None if declared is not None else reading_of(network)) or Reading(declared)
        children = [name for name, _ in network.named_children()] if reading.lists_modules else []

        def run(x_13HW: Tensor) -> tuple[object, dict[str, Tensor], list[str]]:
            with NotingResizes(), _recorded(network, children) as outputs:
                answer = reading.call(network, x_13HW)
            return answer, reading.heads(spec, answer), [name for name, y in outputs.items() if _is_map(y)]

        with torch.no_grad(), in_eval_mode(network):
            found, (answer, heads, modules) = probe(spec, network, run)
            resizes = _resizes(heads)
        kinds = reading.kinds(spec, heads)
        segmentation = kinds.get(SEGMENTATION)
        classes = segmentation.classes if isinstance(segmentation, CategoricalHead) else 0
        if num_classes is not None and segmentation is not None and not fits(classes, num_classes):
            raise ModelError(
                f"{spec} returned {classes} channels for {num_classes} classes",
                fix="Use the num_classes that the function is given.",
            )
        native = heads | {name: resize.native for name, resize in resizes.items()}
        rows = max((head.shape[-2] for head in native.values()), default=found.size[0])
        rows = native[SEGMENTATION].shape[-2] if segmentation is not None else rows
        named = [name for name in reading.features(answer, found.size, found.patch) if name not in modules]
        super().__init__(
            spec=spec,
            num_classes=classes,
            stride=max(1, round(found.size[0] / rows)),
            taps=(*named, *modules),
            align_corners=bool(getattr(network, "align_corners", False)),
            head_kinds=kinds,
        )
        for resize in resizes.values():
            self.align_corners = resize.align_corners
        for name in ("mean", "std"):
            published = getattr(network, "pretrained_cfg", {}) if isinstance(reading, TimmMaps) else {}
            values = getattr(network, name, published.get(name))
            if values is not None:  # numbers, or a tensor of any shape
                setattr(self, name, torch.as_tensor(values).flatten().tolist())
        self.probe_size, self.processor, self.patch = found.size, found.processor, found.patch
        self.peeled = tuple(resizes)
        self.network = network
        self._reading = reading
        self._named = tuple(named)
        self.register_state_dict_post_hook(_strip_prefix)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(_add_prefix)  # type: ignore[no-untyped-call]

    def adopt_names(self, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return the tensors of a weights file that the model can take, with their names unchanged: name -> tensor.

        `state` has all tensors of the file. The result leaves out a timm classifier's tensors if the model has no head,
        and nothing else.
        """
        names = (getattr(self.network, "pretrained_cfg", None) or {}).get("classifier") or ()
        prefixes = tuple(f"{name}." for name in ([names] if isinstance(names, str) else names))
        return state if self.head_kinds else {k: v for k, v in state.items() if not k.startswith(prefixes)}

    def forward(self, x_B3HW: Tensor, taps: Sequence[str] = ()) -> Outputs:
        """Return the heads' outputs at their native stride, and the features of the given taps.

        `x_B3HW` is normalised float RGB. Raises: ModelError for an unknown tap, or one whose output is neither (B, c,
        h, w) nor a transformer's tokens (B, N, c).
        """
        self.check_taps(taps)
        hooked = [tap for tap in taps if tap not in self._named]
        peel = bool(self.peeled) and peels()
        outputs: dict[str, Any] = {}
        if hooked:
            with _recorded(self.network, hooked) as outputs:
                answer = self._answer(x_B3HW, peel=peel)
        else:
            answer = self._answer(x_B3HW, peel=peel)
        heads = self._reading.heads(self.spec, answer)
        if peel:
            heads |= {name: found.native for name in self.peeled if (found := resize_of(heads[name])) is not None}
        size = x_B3HW.shape[-2], x_B3HW.shape[-1]
        features: dict[str, Tensor] = {}
        if len(hooked) < len(taps):
            features |= self._reading.features(answer, size, self.patch)
        features |= {tap: as_map(outputs.get(tap), size, self.patch, f"{tap!r} of {self.spec}") for tap in hooked}
        for tap in taps:
            if tap not in features:  # of this size alone
                as_map(getattr(answer, "last_hidden_state", None), size, self.patch, f"{tap!r} of {self.spec}")
        return Outputs(heads, {tap: features[tap] for tap in taps})

    def _answer(self, x_B3HW: Tensor, *, peel: bool) -> object:
        x_B3HW = x_B3HW.flip(1) if self.processor.channels == "bgr" else x_B3HW
        if not peel:
            return self._reading.call(self.network, x_B3HW)
        with NotingResizes():
            return self._reading.call(self.network, x_B3HW)

    @property
    def probed_taps(self) -> tuple[str, ...]:
        """The taps whose features are in the fingerprint of a teacher without heads. () for a model with heads."""
        return super().probed_taps if self._reading.lists_modules else self._named

    def check_taps(self, taps: Iterable[str]) -> None:
        """Check that each tap is in the attribute `taps` or is the name of a submodule of the wrapped network.

        Raises: ModelError for any other tap.
        """
        modules = {name for name, _ in self.network.named_modules() if name}
        super().check_taps(tap for tap in taps if tap not in modules)


def answer_as(model: nn.Module, stored: Mapping[str, Head], size: tuple[int, int]) -> None:
    """Make a teacher return outputs of the same sizes as those in an earlier cache.

    If the cache stored a head at the size of the images, this head keeps its last resize.

    Args:
        model: the teacher, which is changed.
        stored: the heads of the earlier cache, by name.
        size: (height, width) of the images that the teacher got for that cache.
    """
    for module in model.modules():
        if isinstance(module, WrappedModel):
            module.peeled = tuple(name for name in module.peeled if name not in stored or stored[name].size != size)


def fits(channels: int, num_classes: int) -> bool:
    """Return True if a network has one output channel per class, or one channel for two classes."""
    return channels == num_classes or (channels == 1 and num_classes == 2)


def _is_map(output: object) -> bool:
    return isinstance(output, Tensor) and output.ndim == 4


def _resizes(heads: Mapping[str, Tensor]) -> dict[str, Resize]:
    """Return the last resize of each head that has one. All must agree, as a model has one `align_corners`."""
    found = {name: resize for name, head in heads.items() if (resize := resize_of(head)) and is_exact(head, resize)}
    if not found:
        return {}
    corners = found.get(SEGMENTATION, next(iter(found.values()))).align_corners
    return {name: resize for name, resize in found.items() if resize.align_corners == corners}


@contextmanager
def _recorded(network: nn.Module, names: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Record the outputs of submodules by name in a with block, for calls of this thread. The last call counts."""
    outputs: dict[str, Any] = {}
    thread = threading.get_ident()

    def hook(name: str) -> RemovableHandle:
        def record(_module: nn.Module, _inputs: object, output: Any) -> None:
            if threading.get_ident() == thread:
                first = output[0] if isinstance(output, tuple) and output else output
                outputs[name] = first.clone() if isinstance(first, Tensor) else first

        return network.get_submodule(name).register_forward_hook(record)

    with ExitStack() as stack:
        for name in names:
            stack.callback(hook(name).remove)
        yield outputs


_PREFIX = "network."


def _strip_prefix(_module: nn.Module, state: dict[str, Any], prefix: str, _metadata: dict[str, Any]) -> None:
    for key in [k for k in state if k.startswith(prefix + _PREFIX)]:
        state[prefix + key[len(prefix + _PREFIX) :]] = state.pop(key)


def _add_prefix(_module: nn.Module, state: dict[str, Any], prefix: str, *_rest: object) -> None:
    for key in [k for k in state if k.startswith(prefix)]:
        state[prefix + _PREFIX + key[len(prefix) :]] = state.pop(key)
