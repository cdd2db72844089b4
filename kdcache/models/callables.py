"""Any network as `module:function` or `path/to/file.py:function`.

The function is called with `num_classes=`, unless it takes none, and returns a module. A `SegmentationModel` is used as
it is; anything else is wrapped: it may answer with a tensor, a mapping with `out` (or `logits`), an object with
`.logits`, or a tuple or list whose first element is one of these.

A network of several heads says so in its attribute `kdcache_heads`, and answers with a mapping of these names:

    network.kdcache_heads = {"segmentation": "categorical", "depth": {"kind": "regression", "max_depth": 10.0}}

The fields of a regression are those of `kdcache.heads.RegressionHead`; `{}` declares a network of features alone.
"""

import importlib
import importlib.util
import inspect
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from kdcache.errors import ModelError
from kdcache.heads import SEGMENTATION, CategoricalHead, HeadKind, head_kind
from kdcache.models.native import Outputs, SegmentationModel, in_eval_mode

_DECLARED = "kdcache_heads"
_PROBE_PX = 128  # side of the image that finds the stride; deep enough for stride 32 and a few cells


class WrappedModel(SegmentationModel):
    """A foreign network behind the interface; its state dict keeps the network's own names.

    Taps are dotted module names, any whose output is (B, c, h, w); `taps` lists the network's direct children
    of that kind in the order they ran. They are read by forward hooks that exist only while a tap is
    wanted, see only the calls of their own thread, and copy the feature, which a later in-place layer would
    overwrite.

    The module's attributes `align_corners` (False when absent), `mean`, `std` and `kdcache_heads` are honoured.

    Args:
        declared: its heads, as `kdcache_heads` has them; None reads that attribute.
    Raises: ModelError when the network fails on an image, has another number of classes, or other heads than it says.
    """

    def __init__(
        self, spec: str, network: nn.Module, num_classes: int | None, declared: Mapping[str, Any] | None = None
    ) -> None:
        declared = getattr(network, _DECLARED, None) if declared is None else declared
        heads, children = _probe(spec, network, declared)
        kinds = _kinds(spec, declared, heads)
        segmentation = kinds.get(SEGMENTATION)
        classes = segmentation.classes if isinstance(segmentation, CategoricalHead) else 0
        if num_classes is not None and segmentation is not None and not _fits(classes, num_classes):
            raise ModelError(
                "a model must return one channel per class",
                received=f"{classes} channels for {num_classes} classes from {spec}",
                remedy="use the num_classes that the function is given",
            )
        rows = max((head.shape[-2] for head in heads.values()), default=_PROBE_PX)
        rows = heads[SEGMENTATION].shape[-2] if segmentation is not None else rows
        super().__init__(
            spec=spec,
            num_classes=classes,
            stride=max(1, round(_PROBE_PX / rows)),
            taps=children,
            align_corners=bool(getattr(network, "align_corners", False)),
            head_kinds=kinds,
        )
        for name in ("mean", "std"):
            if (values := getattr(network, name, None)) is not None:  # numbers, or a tensor of any shape
                setattr(self, name, torch.as_tensor(values).flatten().tolist())
        self.network = network
        self._declared = declared
        self.register_state_dict_post_hook(_strip_prefix)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(_add_prefix)  # type: ignore[no-untyped-call]

    def forward(self, x_B3HW: Tensor, taps: Sequence[str] = ()) -> Outputs:
        """Run the network. Raises: ModelError for an unknown tap, or one that gives no (B, c, h, w) tensor."""
        self.check_taps(taps)
        if not taps:
            return Outputs(_heads(self.spec, self._declared, self.network(x_B3HW)), {})
        with _recorded(self.network, taps) as outputs:
            heads = _heads(self.spec, self._declared, self.network(x_B3HW))
        features = {}
        for tap in taps:
            feature = outputs.get(tap)
            if not isinstance(feature, Tensor) or feature.ndim != 4:
                kind = tuple(feature.shape) if isinstance(feature, Tensor) else type(feature).__name__
                raise ModelError(
                    "a tapped module must run and return a (B, c, h, w) tensor",
                    received=f"{tap!r} of {self.spec} returned {kind}",
                    remedy=f"tap another module, for example {', '.join(self.taps) or 'a convolution'}",
                )
            features[tap] = feature
        return Outputs(heads, features)

    def check_taps(self, taps: Iterable[str]) -> None:
        modules = {name for name, _ in self.network.named_modules() if name}
        for tap in taps:
            if tap not in modules:
                super().check_taps([tap])


def build(spec: str, num_classes: int | None) -> SegmentationModel:
    """Import the function that `spec` names and build its model.

    Args:
        num_classes: None calls the function without it; it must then have a default of its own.
    Raises: ModelError when the import fails, when the name is missing, cannot be called or returns no module, when
        the model fails on an image, or when it has another number of classes.
    """
    place, _, name = spec.rpartition(":")
    with _working_folder_on_path():
        function = getattr(_import(place, spec), name, None)
        if not callable(function):
            problem = "no such name" if function is None else f"of type {type(function).__name__}"
            raise ModelError(
                "a model must be module:function with a function that returns the network",
                received=f"{spec}: {name} is {problem}",
                remedy=f"define {name}(num_classes) there",
            )
        network = _call(spec, function, num_classes)
    if not isinstance(network, nn.Module):
        raise ModelError(
            "a model function must return a torch.nn.Module",
            received=f"{type(network).__name__} from {spec}",
            remedy="return the network itself",
        )
    if not isinstance(network, SegmentationModel):
        return WrappedModel(spec, network, num_classes)
    network.spec = spec
    counted = SEGMENTATION in network.head_kinds
    if counted and num_classes is not None and not _fits(network.num_classes, num_classes):
        raise ModelError(
            "a model must have the number of classes that it is built for",
            received=f"{network.num_classes} instead of {num_classes} from {spec}",
            remedy="use the num_classes that the function is given",
        )
    return network


def _fits(channels: int, num_classes: int) -> bool:
    """Whether a network has one channel for each class, or one logit for two classes (`kdcache.models.logits`)."""
    return channels == num_classes or (channels == 1 and num_classes == 2)


def _import(place: str, spec: str) -> ModuleType:
    try:
        if not place.endswith(".py"):
            return importlib.import_module(place)
        path = Path(place).resolve(strict=True)
        # The path is part of the name: two files called model.py are two modules.
        module_spec = importlib.util.spec_from_file_location(
            f"kdcache_user{path.with_suffix('')}".replace("/", "_"), path
        )
        assert module_spec is not None
        assert module_spec.loader is not None
        module = importlib.util.module_from_spec(module_spec)
        sys.modules[module_spec.name] = module  # dataclasses and pickling read their module there
        module_spec.loader.exec_module(module)
    except Exception as error:
        raise ModelError(
            "the module of a model spec must import",
            received=f"{spec}: {type(error).__name__}: {error}",
            remedy="fix the import, or install the module, or give path/to/file.py:function",
        ) from error
    return module


def _call(spec: str, function: Callable[..., Any], num_classes: int | None) -> object:
    named = {} if num_classes is None else {"num_classes": num_classes}
    problem: TypeError | None = None
    for arguments in (named, {}):  # the latter for one that knows its own number, which is compared afterwards
        try:
            inspect.signature(function).bind(**arguments)
        except TypeError as error:
            problem = problem or error
            continue
        except ValueError:  # a builtin without a signature: the call itself will fail or not
            pass
        return function(**arguments)
    shown = f"num_classes={num_classes}" if named else "no argument, as no num_classes is known"
    raise ModelError(
        "a model function must be callable with num_classes, or without when it knows its own",
        received=f"{spec} with {shown}: {problem}",
        remedy="write it as def build(num_classes=21), or give the number of classes (in Python num_classes, on "
        "the command line --classes FOLDER or --data)",
    ) from problem


@contextmanager
def _working_folder_on_path() -> Iterator[None]:
    """Let `my_models:build` find ./my_models.py: a console script does not search there by itself.

    At the end of the path, so that a local file never hides an installed module.
    """
    folder = os.getcwd()
    if folder in sys.path or "" in sys.path:
        yield
        return
    sys.path.append(folder)
    try:
        yield
    finally:
        if folder in sys.path:
            sys.path.remove(folder)


def _heads(spec: str, declared: Mapping[str, Any] | None, answer: object) -> dict[str, Tensor]:
    """The outputs of a network by the names of its heads. Raises: ModelError for one that is missing or no map."""
    if declared is None:
        return {SEGMENTATION: _logits(spec, answer)}
    heads = {}
    for name in declared:
        head = answer.get(name) if isinstance(answer, Mapping) else None
        if not isinstance(head, Tensor) or head.ndim != 4:
            shown = f"{name!r} of shape {tuple(head.shape)}" if isinstance(head, Tensor) else f"no tensor {name!r}"
            raise ModelError(
                f"a network with {_DECLARED} returns a mapping with a tensor (B, C, h, w) for each of its names",
                received=f"{type(answer).__name__} with {shown} from {spec}",
                remedy=f'return {{"{name}": ...}}, or leave that name out of {_DECLARED}',
            )
        heads[name] = head
    return heads


def _kinds(spec: str, declared: Mapping[str, Any] | None, heads: Mapping[str, Tensor]) -> dict[str, HeadKind]:
    """What each head's output means. Raises: ModelError for a declaration that is none, or does not fit the output."""
    if declared is None:
        return {SEGMENTATION: CategoricalHead(heads[SEGMENTATION].shape[1])}
    kinds: dict[str, HeadKind] = {}
    for name, declaration in declared.items():
        try:
            kinds[name] = head_kind(declaration, heads[name].shape[1])
            if isinstance(kinds[name], CategoricalHead) != (name == SEGMENTATION):
                raise ValueError(f"{SEGMENTATION} is categorical, and all others are regressions")
        except ValueError as error:
            raise ModelError(
                f"{_DECLARED} has for each head categorical, regression, or a mapping of kind and its fields",
                received=f"{name!r} of {spec}: {error}",
                remedy='for instance {"depth": {"kind": "regression", "parameterisation": "exp", "max_depth": 80.0}}',
            ) from error
    return kinds


def _logits(spec: str, answer: object) -> Tensor:
    while isinstance(answer, tuple | list) and answer:  # what follows are auxiliary outputs
        answer = answer[0]
    if isinstance(answer, Mapping):
        logits = answer.get("out", answer.get("logits"))
    else:
        logits = answer if isinstance(answer, Tensor) else getattr(answer, "logits", None)
    if not isinstance(logits, Tensor) or logits.ndim != 4:
        shape = f" of shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else ""
        raise ModelError(
            "a model returns logits (B, C, h, w): a tensor, under 'out' or 'logits', as .logits, or first in a tuple",
            received=f"{type(answer).__name__}{shape} from {spec}",
            remedy="return the class scores of every cell, without softmax or argmax",
        )
    return logits


@contextmanager
def _recorded(network: nn.Module, names: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Outputs of submodules by name, for calls of this thread inside the block; the last call counts."""
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


def _probe(spec: str, network: nn.Module, declared: Mapping[str, Any] | None) -> tuple[dict[str, Tensor], list[str]]:
    """The heads' outputs for one black image; the direct children with (B, c, h, w) outputs in the order they ran."""
    like = next(network.parameters(), torch.empty(0))
    image = torch.zeros(1, 3, _PROBE_PX, _PROBE_PX, device=like.device, dtype=like.dtype)
    children = [name for name, _ in network.named_children()]
    try:
        with torch.no_grad(), in_eval_mode(network), _recorded(network, children) as outputs:
            heads = _heads(spec, declared, network(image))
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(
            f"a model must run on a float image of shape {tuple(image.shape)}",
            received=f"{spec}: {type(error).__name__}: {error}",
            remedy="accept any height and width",
        ) from error
    return heads, [name for name, y in outputs.items() if isinstance(y, Tensor) and y.ndim == 4]


_PREFIX = "network."


def _strip_prefix(_module: nn.Module, state: dict[str, Any], prefix: str, _metadata: dict[str, Any]) -> None:
    for key in [k for k in state if k.startswith(prefix + _PREFIX)]:
        state[prefix + key[len(prefix + _PREFIX) :]] = state.pop(key)


def _add_prefix(_module: nn.Module, state: dict[str, Any], prefix: str, *_rest: object) -> None:
    for key in [k for k in state if k.startswith(prefix)]:
        state[prefix + _PREFIX + key[len(prefix) :]] = state.pop(key)
