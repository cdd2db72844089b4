"""Weights: read them from a file without running its code, load them into a model by name, and digest them.

Nothing is ever ignored silently: missing and unexpected tensors are errors that name them, except for what the report
lists. A teacher is loaded strictly. A student may start from weights with another head.
"""

import hashlib
import pickle
import re
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from kdcache.bounded import check_unpacked
from kdcache.errors import ModelError
from kdcache.models.checkpoint import CHOICES, HARMLESS, some, unwrap
from kdcache.models.class_names import names_beside, names_in
from kdcache.models.foreign.hub_spec import is_checkpoint
from kdcache.models.native import LoadReport, SegmentationModel
from kdcache.run_folder import MODEL, train_again

HUB_FILES = ("model.safetensors", "pytorch_model.bin")
"""What a folder of weights holds, as Hugging Face's hub has them; the first that is there is read."""
_TORCH_SUFFIXES = (".pth", ".pt", ".bin", ".ckpt")
_IMAGE_HEADS = ("classifier.", "fc.")
DEPTH_HEAD = "depth_head."
"""The prefix of the tensors of a depth head that was added to a model."""
AUXILIARY_HEAD = "aux_classifier."
"""The prefix of the tensors of an auxiliary head that was added to a model, and of torchvision's."""
_AUXILIARY = (AUXILIARY_HEAD, "auxlayer.", "auxiliary_head.", "aux_head.", "aux.")
_NESTED_AUXILIARY = ".aux_head."  # of YOLO26, within its last layer
_WRITTEN = "state_sha256"  # in the header of a file that `save_weights` wrote
_COUNTER = "num_batches_tracked"  # absent from old files, and unused while BatchNorm has a momentum


class Weights(NamedTuple):
    """The content of a weights file.

    Attributes:
        state: the tensors by name.
        class_names: the class names, in the order of the class ids, from the file or a file next to it. () if unknown.
        notes: notes for the user, such as which of two kinds of weights was taken.
    """

    state: dict[str, Tensor]
    class_names: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Return the tensors in a weights file by name, on the CPU.

    `path` is a `.safetensors` file, a torch file, or a folder of Hugging Face with one of them. `FILE:raw` and
    `FILE:ema` choose between raw and averaged weights.

    Raises: ModelError if the file is missing, damaged or of another kind, or if it has pickled objects or no weights.
    """
    return read_weights(path).state


def read_weights(path: str | Path) -> Weights:
    """Read a weights file onto the CPU.

    A state dict under a key such as `state_dict` or `model` is found. Prefixes of DistributedDataParallel and
    torch.compile are removed. A Lightning checkpoint gives its network.

    Args:
        path: a `.safetensors` file, a torch file (read with `weights_only=True`), or a folder of Hugging Face with one
            of them. If a checkpoint has raw weights and an average of them (EMA), `FILE:raw` and `FILE:ema` choose.
            Without this, its `state_dict` is taken.
    Raises: ModelError if the file is missing, damaged or of another kind, or if it has pickled objects or no weights.
    """
    path, choice = split_choice(path)
    path = _file_of(path)
    if path.suffix == ".safetensors":
        content = _read_safetensors(path)
    elif path.suffix in _TORCH_SUFFIXES:
        content = _read_torch(path)
    else:
        raise ModelError(
            f"Unknown kind of weights: {path}. Kinds are .safetensors and {', '.join(_TORCH_SUFFIXES)}",
            fix="Save the state dict with safetensors.torch.save_file.",
        )
    state, notes = unwrap(content, path, choice)
    names = names_in(read_metadata(path)) if path.suffix == ".safetensors" else names_in(content)
    return Weights(state, names or names_beside(path), notes)


def split_choice(text: str | Path) -> tuple[Path, str | None]:
    """Split `FILE:ema` or `FILE:raw` into (FILE, `ema` or `raw`). Return (path, None) for any other path.

    Raises: ModelError if another word follows the colon after an existing file.
    """
    path, (file, colon, choice) = Path(text), str(text).rpartition(":")
    if not colon or path.exists() or not Path(file).exists():
        return path, None
    if choice not in CHOICES:
        raise ModelError(
            f"Unknown weights {choice!r} of {file}",
            fix="Give FILE:ema for averaged weights, FILE:raw for raw ones, or FILE alone.",
        )
    return Path(file), choice


def read_metadata(path: str | Path) -> dict[str, str]:
    """Return the texts that a `.safetensors` file holds in addition to its tensors: name -> text.

    Return {} if there are none, or for another kind of file. For a folder, the file is the first of `HUB_FILES` in it.

    Raises: ModelError if the file is missing or damaged.
    """
    if is_checkpoint(str(path)):
        return {}
    path = _file_of(split_choice(path)[0])
    if path.suffix != ".safetensors":
        return {}
    try:
        check_unpacked(path)
        with safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except (SafetensorError, OSError, ValueError) as error:
        raise _damaged(path, error) from error


def save_weights(model: nn.Module, path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a module's state dict to a `.safetensors` file.

    The header has a digest of the tensors, and `metadata` (name -> text) unless it is None.
    """
    # Copies: the format takes no two tensors that share memory, as tied weights do.
    state = {name: tensor.contiguous().clone() for name, tensor in model.state_dict().items()}
    save_file(state, path, {**(metadata or {}), _WRITTEN: _digest(state)})


def load_weights(model: SegmentationModel, state: Mapping[str, Tensor], *, strict_head: bool) -> LoadReport:
    """Copy tensors into a model by name, and return a report. After an error, the model is unchanged.

    Auxiliary heads in the weights that the model does not have are left out and reported.

    Args:
        model: the model to change.
        state: the tensors by name.
        strict_head: True requires every tensor, as for a teacher. False is for the start of a training. Weights of a
            backbone only are then enough, and a classifier of another number of classes keeps its random values.
    Raises: ModelError if tensors are missing, are unknown or have another shape, or if values are not finite.
    """
    model_state: dict[str, Tensor] = model.state_dict()
    state = model.adopt_names(state)
    dropped: list[str] = []
    holder = ""
    if not strict_head:
        state, dropped, holder = _as_backbone(model, state)
    auxiliary = [k for k in state if k not in model_state and (k.startswith(_AUXILIARY) or _NESTED_AUXILIARY in k)]
    unexpected = [k for k in state if k not in model_state and k not in auxiliary]
    counters = [k for k in model_state if k not in state and k.endswith(_COUNTER)]
    missing = [k for k in model_state if k not in state and k not in counters]
    reshaped = [k for k in model_state if k in state and model_state[k].shape != state[k].shape]
    recounted = [k for k in reshaped if not holder and _differs_in_classes(model, k, model_state[k], state[k])]
    reshaped = [k for k in reshaped if k not in recounted]
    reinitialised: list[str] = []
    if not strict_head:
        absent_head = [
            k for k in missing if (not k.startswith(holder) if holder else _is_head(model, k, model_state[k]))
        ]
        missing = [k for k in missing if k not in absent_head]
        reinitialised = [k for k in model_state if k in absent_head or k in recounted]
    if missing or unexpected or reshaped:
        shapes = [f"{k} {tuple(state[k].shape)} instead of {tuple(model_state[k].shape)}" for k in reshaped]
        _refuse_misfit(model, missing, unexpected, shapes)
    if strict_head and recounted:
        raise ModelError(
            f"The weights have {state[recounted[0]].shape[0]} classes, and the data or their class map "
            f"{model.num_classes}, for {model.spec}",
            fix="Map each of the model's classes to one of the data's with --class-map FILE.",
        )
    loaded = [k for k in model_state if k in state and k not in reinitialised]
    _check_numbers(model_state, {k: state[k] for k in loaded})
    model.load_state_dict({k: state[k] for k in loaded}, strict=False)
    return LoadReport(
        loaded=tuple(loaded),
        missing=tuple(counters),
        unexpected=tuple(dropped),
        unused_auxiliary=tuple(auxiliary),
        reinitialised=tuple(reinitialised),
    )


def _check_numbers(own: Mapping[str, Tensor], loaded: Mapping[str, Tensor]) -> None:
    """Check that weights are finite. A buffer may be infinite if the model's buffer is."""
    for name, value in loaded.items():
        if value.is_complex() and not own[name].is_complex():
            kind = "complex numbers"
        elif not own[name].is_floating_point() or own[name].is_meta:
            continue
        elif value.isnan().any():
            kind = "NaN"
        elif value.to(own[name].dtype).isinf().any() and not own[name].isinf().any():
            kind = "numbers that are infinite or too large"
        else:
            continue
        raise ModelError(
            f"The weights are no finite real numbers: {kind} in {name}",
            fix="Give a checkpoint from before the training diverged, or check how the file was made.",
        )


def count_classes(state: Mapping[str, Tensor], classifier_keys: Sequence[str]) -> int:
    """Return the number of classes of weights: the output channels of their classifier.

    Args:
        state: the tensors by name.
        classifier_keys: prefixes of the names of the classifier's tensors. Only the first prefix is used.
    Raises: ModelError if `state` has no tensor with the name of this prefix plus `weight`.
    """
    name = f"{classifier_keys[0]}weight"
    if name not in state:
        raise ModelError(
            f"Unknown number of classes: the weights have no {name} (found {some(list(state))})",
            fix="Give the number of classes, or the weights of the whole model.",
        )
    return int(state[name].shape[0])


def state_digest(module: nn.Module) -> str:
    """Return the SHA-256 (hexadecimal) of a module's state dict: names, dtypes, shapes and bytes, also of buffers.

    It does not depend on the device, the memory format or the order of the names.

    Raises: ModelError if the state dict holds anything but tensors.
    """
    state = module.state_dict()
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise ModelError(
                f"Cannot digest the state dict: {name} is of type {type(value).__name__}, no tensor",
                fix="Drop get_extra_state from that module.",
            )
    return _digest(state)


def _digest(state: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(state.items()):
        digest.update(f"{name}\0{value.dtype}\0{tuple(value.shape)}\0".encode())
        row_major = value.detach().cpu().contiguous()
        digest.update(row_major.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _file_of(path: Path) -> Path:
    """Return a weights file, or the weights file in a folder. Raises: ModelError if there is none."""
    if path.is_file():
        return path
    if not path.is_dir():
        raise ModelError(f"Weights not found: {path}", fix="Check the path.")
    file = next((path / name for name in HUB_FILES if (path / name).is_file()), None)
    if file is None:
        raise ModelError(
            f"No weights in the folder {path}: it has no {' or '.join(HUB_FILES)}",
            fix="Check the path, or give the file itself.",
        )
    return file


def _read_safetensors(path: Path) -> object:
    try:
        check_unpacked(path)
        state = load_file(path, device="cpu")
    except (SafetensorError, OSError, ValueError) as error:
        raise _damaged(path, error) from error
    written = read_metadata(path).get(_WRITTEN)
    if written is not None and _digest(state) != written:  # the format itself has no checksum
        raise ModelError(
            f"The weights {path} are damaged: their tensors have another SHA-256 than the header names", fix=_anew(path)
        )
    return state


def _read_torch(path: Path) -> object:
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(HARMLESS):
            warnings.simplefilter("ignore")  # about pickle protocols: a refusal follows where it matters
            check_unpacked(path)
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        pickled = re.search(r"(?:GLOBAL|global|class) ([\w.]+)", str(error))
        if pickled is None:
            raise _damaged(path, error) from error
        raise ModelError(
            f"Cannot read {path}: it has a pickled {pickled[1]}, and unpickling can run code",
            fix="If you trust it, load it yourself with weights_only=False and save its state dict alone.",
        ) from error
    except Exception as error:  # torch meets a damaged file with anything from KeyError to OSError
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> ModelError:
    reason = (str(error) or type(error).__name__).splitlines()[0]
    return ModelError(f"Cannot read the weights {path} of {path.stat().st_size} bytes: {reason}", fix=_anew(path))


def _anew(path: Path) -> str:
    """Return the fix for a damaged file: restore it, or train a run again."""
    run = (path.parent / MODEL).is_file()
    return (
        f"{train_again(path.parent)}; or use other weights of it, as RUN@last" if run else "Copy or download it again."
    )


def _as_backbone(model: SegmentationModel, state: Mapping[str, Tensor]) -> tuple[Mapping[str, Tensor], list[str], str]:
    """Return a backbone's tensors under this model's names, the names of tensors to leave out, and a prefix.

    The prefix names the module of the model whose names fit more of the tensors than the model's. Otherwise it is ''.
    """
    expected = model.state_dict()
    adopted, dropped = _as_classifier(model, state)
    dots = ((name, place + 1) for name in expected for place, letter in enumerate(name) if letter == ".")
    holders = Counter(name[:place] for name, place in dots if name[place:] in state)
    holder, held = next(iter(holders.most_common(1)), ("", 0))
    if held <= sum(k in expected for k in adopted):
        return adopted, dropped, ""
    return {holder + k: value for k, value in state.items()}, [], holder


def _as_classifier(model: SegmentationModel, state: Mapping[str, Tensor]) -> tuple[Mapping[str, Tensor], list[str]]:
    """Return an image classifier's tensors under the names of this model's backbone, and the names in its own head."""
    prefix = model.backbone_prefix
    expected = model.state_dict()
    if not prefix:
        return state, []
    if any(k.startswith(prefix) for k in state):
        head = [k for k in state if not k.startswith(prefix)]
        foreign = head and all(k.startswith(_IMAGE_HEADS) and k not in expected for k in head)
        return ({k: v for k, v in state.items() if k not in head}, head) if foreign else (state, [])
    trunk, head_prefix = ("features.", "classifier.") if any(k.startswith("features.") for k in state) else ("", "fc.")
    dropped = [k for k in state if k.startswith(head_prefix)]
    adopted = {prefix + k.removeprefix(trunk): v for k, v in state.items() if k not in dropped}
    # Names that do not become the backbone's are shown as the file has them.
    return (adopted, dropped) if any(k in expected for k in adopted) else (state, [])


def _is_head(model: SegmentationModel, name: str, value: Tensor) -> bool:
    if name.startswith((DEPTH_HEAD, AUXILIARY_HEAD)):
        return True
    if model.backbone_prefix:
        return not name.startswith(model.backbone_prefix)
    return _is_classifier(model, name, value)


def _is_classifier(model: SegmentationModel, name: str, value: Tensor) -> bool:
    if model.classifier_keys:
        return name.startswith(model.classifier_keys)
    return value.ndim > 0 and value.shape[0] == model.num_classes


def _differs_in_classes(model: SegmentationModel, name: str, own: Tensor, value: Tensor) -> bool:
    """Return True if two tensors have equal shapes except for the number of classes."""
    same_rest = own.ndim == value.ndim > 0 and own.shape[1:] == value.shape[1:]
    return same_rest and _is_classifier(model, name, own)


def _refuse_misfit(model: SegmentationModel, missing: list[str], unexpected: list[str], shapes: list[str]) -> None:
    kinds = {"missing": missing, "unexpected": unexpected, "of another shape": shapes}
    misfits = "; ".join(f"{len(names)} {kind}: {some(names)}" for kind, names in kinds.items() if names)
    raise ModelError(
        f"The weights are not those of {model.spec}: {misfits}",
        fix="Check the model's name (kdcache models lists them) and the file.",
    )
