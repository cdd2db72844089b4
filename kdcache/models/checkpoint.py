"""The weights in a checkpoint: under `state_dict` and similar keys, raw or averaged, of a module or a wrapper."""

import argparse
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from kdcache.errors import ModelError

_CONTAINERS = ("state_dict", "model_state_dict", "model_state", "model", "net", "network", "student", "module")
_SHADOW = "shadow"  # of an average that keeps its settings beside it
_AVERAGED = re.compile(r"(^|_)(ema|avg|averaged?|swa|teacher|shadow)(_|$)")
"""Words in the names of averaged weights."""
_LIGHTNING = "pytorch-lightning_version"
_ATTRIBUTES = ("model", "student", "network", "net")  # of a LightningModule, where it has several with tensors
_WRAPPERS = ("module.", "_orig_mod.")  # DistributedDataParallel, torch.compile
_COUNTS = ("n_averaged", "steps")  # beside the tensors of an average
_NAMED = 4
CHOICES = {"raw": "raw", "ema": "averaged"}
"""The word after a colon (`FILE:ema`) -> the kind of weights that it names."""


class _HistoryBuffer:
    """A stand-in for mmengine's class, to read a checkpoint without mmengine."""


HARMLESS: list[Any] = [
    argparse.Namespace,
    np.ndarray,
    np.dtype,
    *dict.fromkeys(type(np.dtype(kind)) for kind in "?bBhHiIlLqQefd"),
    *(
        (value.__reduce__()[0], f"numpy.{core}.multiarray.{name}")
        for core in ("core", "_core")  # before numpy 2, and since
        for value, name in ((np.zeros(1), "_reconstruct"), (np.float64(1), "scalar"))
    ),
    (_HistoryBuffer, "mmengine.logging.history_buffer.HistoryBuffer"),
]
"""Types that torch may unpickle in addition to tensors. Building them runs no code from the file."""

_Kinds = dict[str, tuple[str, object]]
"""A word of CHOICES -> (the name of these weights in the checkpoint, the weights)."""


def unwrap(content: object, path: Path, choice: str | None = None) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Return the weights in the content of a checkpoint: tensors by name, and notes for the user.

    Args:
        content: the object that was read from the file.
        path: the file, for messages.
        choice: `raw`, or `ema` for averaged weights. None takes the usual ones (`state_dict` and similar keys). If the
            checkpoint has averaged weights, a note says which kind was taken.
    Raises: ModelError if there are no tensors, or no weights of the given choice.
    """
    kinds = _kinds(content, path)
    usual = next((kind for kind, (name, _) in kinds.items() if not _AVERAGED.search(name)), "ema")
    kind = choice or usual
    if kind not in kinds:
        raise ModelError(
            f"{path} has no {CHOICES[kind]} weights, only {kinds[usual][0] or 'one set of tensors'}",
            fix=f"Leave out :{kind}. For the average of a run of kdcache give RUN@best-ema",
        )
    note = ""
    if len(kinds) > 1:
        other_kind = next(other_kind for other_kind in kinds if other_kind != kind)
        note = (
            f"{path} has raw and averaged weights: {kinds[kind][0]} is taken, the {CHOICES[kind]} ones. "
            f"{path}:{other_kind} takes {kinds[other_kind][0]}, the {CHOICES[other_kind]} ones"
        )
    elif kind == "ema":
        note = f"{path} has averaged weights alone: {kinds[kind][0]} is taken"
    state = _without_prefixes(_checked(kinds[kind][1], path))
    return state, (note,) if note and choice is None else ()


def _kinds(content: object, path: Path) -> _Kinds:
    kinds = _by_key(content)
    if not isinstance(content, Mapping):
        return kinds
    swapped = _swapped(content)
    if swapped is not None:
        kinds = {"ema": ("state_dict", content["state_dict"]), "raw": (swapped, content[swapped])}
    if _LIGHTNING not in content:
        return kinds
    if "ema" not in kinds:
        return _by_attribute(_checked(kinds["raw"][1], path), path)
    return {kind: (name, _network(_checked(state, path), path)) for kind, (name, state) in kinds.items()}


def _by_key(content: object) -> _Kinds:
    kinds: _Kinds = {}
    name = ""
    while isinstance(content, Mapping):
        averaged = next((key for key in content if _AVERAGED.search(str(key)) and _tensors(content[key])), None)
        if averaged is not None:
            kinds.setdefault("ema", (str(averaged), _tensors(content[averaged])))
        inner = next((key for key in _CONTAINERS if isinstance(content.get(key), Mapping)), None)
        if inner is None:
            break
        name, content = name or inner, content[inner]
    if "ema" not in kinds or _tensors(content):
        kinds["raw"] = name, content
    return kinds


def _swapped(content: Mapping[Any, Any]) -> str | None:
    """Return the key of the raw weights if `state_dict` is the average (mmengine, Lightning), else None."""
    meta = content.get("meta")
    mmengine = isinstance(meta, Mapping) and "mmengine_version" in meta
    key = "ema_state_dict" if mmengine else "current_model_state"
    return key if _tensors(content.get("state_dict")) and _tensors(content.get(key)) else None


def _by_attribute(state: dict[str, Tensor], path: Path) -> _Kinds:
    """Return the raw and the averaged network of a LightningModule. They are different attributes of it."""
    names = [name.partition(".")[0] for name in state if "." in name]
    averaged = next((name for name in names if _AVERAGED.search(name)), None)
    if averaged is None or len(set(names)) == 1:
        return {"raw": (_LIGHTNING, _network(state, path))}
    raw = {name: value for name, value in state.items() if not _AVERAGED.search(name.partition(".")[0])}
    return {"raw": (_attribute(raw, path), _network(raw, path)), "ema": (averaged, _below(averaged, state))}


def _network(state: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Return the tensors of the network in a LightningModule, without the name of the module's attribute."""
    return _below(_attribute(state, path), state)


def _attribute(state: Mapping[str, Tensor], path: Path) -> str:
    attributes = list(dict.fromkeys(name.partition(".")[0] for name in state if "." in name))
    only = attributes[0] if len(attributes) == 1 else None
    attribute = next((name for name in _ATTRIBUTES if name in attributes), only)
    if attribute is None:
        raise ModelError(
            f"Cannot find the network in the Lightning checkpoint {path}: it has "
            f"{some([f'{name}.' for name in attributes]) or 'no attributes'}",
            fix="Save the network alone: torch.save(module.NETWORK.state_dict(), NEW)",
            rule="The network is its one attribute with tensors, or model, student, network or net.",
        )
    return attribute


def _below(attribute: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    prefix = f"{attribute}."
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def _tensors(content: object) -> dict[str, Tensor]:
    """Return the tensors by name in a part of a checkpoint, or {} if it holds something else."""
    while isinstance(content, Mapping):
        if content and all(isinstance(key, str) and isinstance(value, Tensor) for key, value in content.items()):
            return dict(content)
        content = next((content[key] for key in (*_CONTAINERS, _SHADOW) if isinstance(content.get(key), Mapping)), None)
    return {}


def _checked(content: object, path: Path) -> dict[str, Tensor]:
    if not isinstance(content, Mapping) or not content:
        raise _not_a_state_dict(path, f"{type(content).__name__} without tensors")
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise _not_a_state_dict(path, f"{name!r} of type {type(value).__name__}")
    return dict(content)


def _without_prefixes(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors without the prefixes of wrappers, and without the counter of an average."""
    while True:
        named = [name for name in state if name not in _COUNTS]
        prefix = next((p for p in _WRAPPERS if named and all(name.startswith(p) for name in named)), None)
        if prefix is None:
            return state
        state = {name.removeprefix(prefix): state[name] for name in named}


def _not_a_state_dict(path: Path, content: str) -> ModelError:
    return ModelError(
        f"No dictionary of names and tensors in {path}: it holds {content}", fix="Save model.state_dict() alone."
    )


def some(names: Sequence[str]) -> str:
    """Return the first 4 names as one text with commas, for a message. If there are more names, "..." follows."""
    return ", ".join([*names[:_NAMED], *(["..."] if len(names) > _NAMED else [])])
