"""`ultralytics:`: YOLO26's networks for semantic segmentation and depth, built by the installed package.

ultralytics:yolo26n-sem         one of NAMES; @default takes the weights that Ultralytics publishes
ultralytics:FILE.pt             a checkpoint of the package, as a teacher or for --init

The package is AGPL-3.0. Nothing of it is part of kdcache, and it is imported only if a spec names it. A checkpoint is a
pickle, which the package itself reads, and only with `--trust`. Images are RGB in 0..1.
"""

import logging
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from kdcache.errors import ModelError, suggest
from kdcache.heads import HeadKind, RegressionHead
from kdcache.models.architectures.hub_models import CODE_ALLOWED
from kdcache.models.foreign.answers import Reading
from kdcache.models.foreign.hub_spec import CHECKPOINT_SUFFIX
from kdcache.models.foreign.wrapped import WrappedModel
from kdcache.models.native import SegmentationModel
from kdcache.run_folder import RunModel
from kdcache.tasks import DEPTH, SEGMENTATION

TESTED = ("8.4.120", "8.5")
"""The first version that is tested, and the first that is not."""
NAMES = tuple(f"yolo26{scale}-{task}" for task in ("sem", "sem-ade20k", "depth") for scale in "nsmlx")
MULTIPLE = 32
OUTSIDE_RGB = (124, 116, 104)
"""The colour outside an image, as `kdcache.data.rendering.view` has it."""
GREY = 114
"""The colour outside an image in Ultralytics' letterbox."""
_HEADS = {"semantic": SEGMENTATION, "depth": DEPTH}
_OTHER = {"": "detect", "-seg": "segment", "-cls": "classify", "-pose": "pose", "-obb": "obb"}
_OTHER_NAME = re.compile(rf"(yolo\w*?[nsmlx])({'|'.join(_OTHER)})")
_ZERO, _ONE = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)


@dataclass(frozen=True)
class _About:
    """The facts about a network of the package.

    Attributes:
        task: the package's name for the network's task.
        plan: the network's layers, from its yaml file.
        names: the class names, in the order of the class ids.
        side: the side of its training images in pixels, or None.
    """

    task: str
    plan: Mapping[str, Any]
    names: tuple[str, ...] = ()
    side: int | None = None

    @property
    def classifier_keys(self) -> tuple[str, ...]:
        last = len(self.plan["backbone"]) + len(self.plan["head"]) - 1
        return (f"model.{last}.classifier.1.",) if self.task == "semantic" else ()


class YoloModel(WrappedModel):
    """A network of Ultralytics as a model of kdcache, without its auxiliary head.

    The network's head returns the same output in training mode as in eval mode: logits, or depth in metres. The taps
    are the layers whose outputs Ultralytics keeps for skip connections and for the head. The last taps are the head's
    inputs.

    Args:
        spec: the model's spec, such as `ultralytics:yolo26n-sem`.
        network: the network of Ultralytics.
        about: the network's task, layers, class names and image size.
    """

    network: Any

    def __init__(self, spec: str, network: Any, about: _About) -> None:
        head = network.model[-1]
        if about.task == "semantic":
            head.aux_head = None
        super().__init__(spec, network, None, reading=_YoloReading(about.task))
        self.align_corners = about.task == "depth"
        self.mean, self.std = _ZERO, _ONE
        layers = [*(layer for layer in network.save if layer not in head.f), *reversed(head.f)]
        self.taps = tuple(f"model.{layer}" for layer in layers)
        self.classifier_keys = about.classifier_keys
        size = None if about.side is None else (about.side, about.side)
        self.processor = replace(self.processor, multiple=MULTIPLE, native_size=size)
        self.train()

    def train(self, mode: bool = True) -> "YoloModel":
        """Set the mode of all layers, True for training and False for eval, and return the model.

        Only the head module itself stays in eval mode, so that its output has the same form in both modes. The layers
        in it follow `mode`.
        """
        super().train(mode)
        self.network.model[-1].training = False  # of the layer itself: those below it normalise by the batch
        return self

    def normalise(self, pixels_BHW3: Tensor) -> Tensor:
        """Return the network's input, float32 (B, 3, H, W), for uint8 RGB pixels (B, H, W, 3).

        Rows and columns at the edges that have only the padding colour OUTSIDE_RGB become grey, as in Ultralytics.
        Raises: ModelError for another dtype or shape.
        """
        x_B3HW = super().normalise(pixels_BHW3)
        outside_BHW = (pixels_BHW3 == pixels_BHW3.new_tensor(OUTSIDE_RGB)).all(-1)
        margin_BHW = _from_edges(outside_BHW.all(2))[:, :, None] | _from_edges(outside_BHW.all(1))[:, None]
        grey_13HW = super().normalise(pixels_BHW3.new_full((1, 1, 1, 3), GREY))
        return torch.where(margin_BHW[:, None], grey_13HW, x_B3HW)


def _from_edges(outside_BN: Tensor) -> Tensor:
    """Return bool (B, N): True for entries that are outside the image, like all entries from there to an edge."""
    flags_BN = outside_BN.int()
    return (flags_BN.cumprod(1) + flags_BN.flip(1).cumprod(1).flip(1)).bool()


class _YoloReading(Reading):
    """Reads a network's output: logits, or depth in metres."""

    lists_modules = False

    def __init__(self, task: str) -> None:
        super().__init__()
        self.task = task

    def heads(self, spec: str, answer: object) -> dict[str, Tensor]:
        (logits,) = super().heads(spec, answer).values()
        return {_HEADS[self.task]: logits}

    def kinds(self, spec: str, heads: Mapping[str, Tensor]) -> dict[str, HeadKind]:
        if self.task == "depth":
            return {DEPTH: RegressionHead(parameterisation="identity", max_depth=None)}
        return super().kinds(spec, heads)


def check_name(name: str) -> None:
    """Check that `name` is a checkpoint (`FILE.pt`) or a model such as `yolo26n-sem`.

    `name` is the part of a spec after the colon.

    Raises: ModelError for an unknown name and for models of other tasks, such as detection.
    """
    if name in NAMES or name.endswith(CHECKPOINT_SUFFIX):
        return
    if match := _OTHER_NAME.fullmatch(name):
        raise _of_other_task(f"ultralytics:{name}", _OTHER[match[2]])
    raise ModelError(
        f"Unknown model ultralytics:{name}",
        fix=suggest(name, NAMES, f"Use one of {', '.join(NAMES)}, or FILE{CHECKPOINT_SUFFIX}."),
    )


def classifier_keys(name: str) -> tuple[str, ...]:
    """Return the prefixes, in the state dict, of the layers whose output channels are the classes. () for depth.

    `name` is the part of a spec after the colon, such as `yolo26n-sem` or `FILE.pt`.

    Raises: ModelError if the checkpoint is missing, is not trusted, or cannot be read.
    """
    return _about(name).classifier_keys


def build(name: str, num_classes: int) -> YoloModel:
    """Build a model such as `yolo26n-sem`, or the architecture of a checkpoint (`FILE.pt`), with random weights.

    `name` is the part of a spec after the colon. For depth, `num_classes` is ignored.

    Raises: ModelError if the checkpoint is missing, is not trusted, or cannot be read.
    """
    about = _about(name)
    with _quiet():
        tasks = _tasks()
        kind = tasks.SemanticSegmentationModel if about.task == "semantic" else tasks.DepthModel
        classes = num_classes if about.task == "semantic" else 1
        network = kind(deepcopy(dict(about.plan)) | {"nc": classes}, verbose=False)
    return YoloModel(f"ultralytics:{name}", network, about)


def default_state(name: str, whole: bool = True) -> dict[str, Tensor]:
    """Return the weights of a checkpoint (`FILE.pt`), or the published weights of a model: name -> tensor.

    Published weights are downloaded once.

    Args:
        name: the part of a spec after the colon, such as `yolo26n-sem` or `FILE.pt`.
        whole: True asks for encoder and head, False for the encoder only. It changes nothing, because encoder and head
            are in one file.
    Raises: ModelError without `--trust`, for a file that Ultralytics cannot read, and for models of other tasks.
    """
    state: dict[str, Tensor] = _load(_file(name))[0].state_dict()
    return state


def default_names(name: str) -> tuple[str, ...]:
    """Return the class names in a checkpoint, or in a model's published weights, in the order of the class ids.

    A depth model has no classes and gives (). `name` is the part of a spec after the colon, such as `yolo26n-sem` or
    `FILE.pt`. Published weights are downloaded once.

    Raises: ModelError without `--trust`, for a file that Ultralytics cannot read, and for models of other tasks.
    """
    return _about(str(_file(name))).names


def write_checkpoint(model: SegmentationModel, description: RunModel, path: Path) -> tuple[str, ...]:
    """Write a model as a checkpoint that Ultralytics' command `yolo` can read.

    The normalisation of images becomes a part of the first convolution.

    Args:
        model: a model that Ultralytics built.
        description: the model's description, which is also stored.
        path: the file.
    Returns: notes for the user.
    Raises: ModelError for a model of another library.
    """
    if not isinstance(model, YoloModel):
        raise ModelError(
            f"Cannot write {model.spec} as {CHECKPOINT_SUFFIX}: it is no network of ultralytics",
            fix=f"Export .onnx, .pt2 or .safetensors. Or train --model ultralytics:{NAMES[0]}.",
        )
    network: Any = deepcopy(model.network).float().eval()
    notes = _fold(network.model[0], model.mean, model.std)
    if SEGMENTATION in model.head_kinds:
        network.names = dict(enumerate(description.class_names))
    network.task = next(task for task, head in _HEADS.items() if head in model.head_kinds)
    network.args = {"task": network.task, "imgsz": max(description.size), "model": model.spec.partition(":")[2]}
    content = {"model": network, "train_args": network.args, "ema": None, "optimizer": None, "epoch": -1}
    about = {"version": _package().__version__, "license": "AGPL-3.0 (https://ultralytics.com/license)"}
    torch.save(content | about | {"kdcache": description.metadata()}, path)
    return notes


def reader(path: Path, mean: tuple[float, float, float]) -> Callable[[Tensor], Tensor]:
    """Return a function that runs the network in a checkpoint that kdcache wrote, to compare it with the model.

    The function takes images (B, 3, H, W), RGB in 0 to 1, and returns the network's output. For the first convolution,
    it pads them with `mean`, the model's mean of RGB in 0 to 1, as in training. Ultralytics itself pads with black.
    """
    with TemporaryDirectory() as folder, _quiet():
        named = Path(folder, f"model{CHECKPOINT_SUFFIX}")  # the package goes by the suffix
        named.symlink_to(path.resolve())
        network, _ = _tasks().load_checkpoint(named)
    first = network.model[0].conv
    (rows, columns), first.padding = first.padding, (0, 0)
    mean_311 = torch.tensor(mean).view(3, 1, 1)
    return lambda image: network(F.pad(image - mean_311, (columns, columns, rows, rows)) + mean_311)


def _fold(first: Any, mean: tuple[float, float, float], std: tuple[float, float, float]) -> tuple[str, ...]:
    """Change a convolution with BatchNorm so that it takes RGB in 0 to 1. Return notes about that."""
    if (mean, std) == (_ZERO, _ONE):
        return ()
    scaled_OIhw = first.conv.weight.data / torch.tensor(std).view(3, 1, 1)
    first.bn.running_mean += (scaled_OIhw * torch.tensor(mean).view(3, 1, 1)).sum((1, 2, 3))
    first.conv.weight.data = scaled_OIhw
    return (
        f"mean {mean} and std {std} are folded into the first convolution. Ultralytics surrounds images with black, "
        "and this training with the mean: pixels near the edge may differ",
    )


def _about(name: str) -> _About:
    """Return the facts about a model or a checkpoint. Raises: ModelError."""
    if name not in NAMES:
        path = _file(name)
        _check_allowed(path)
        return _read_about(path, path.stat().st_mtime_ns if path.is_file() else 0)
    plan = name.removesuffix("-ade20k")
    with _quiet():
        return _About("depth" if plan.endswith("depth") else "semantic", _tasks().yaml_model_load(f"{plan}.yaml"))


@lru_cache(maxsize=4)
def _read_about(path: Path, changed: int) -> _About:
    return _load(path)[1]


def _file(name: str) -> Path:
    """Return the path of a checkpoint. Published weights are where the package keeps its downloads.

    Raises: ModelError if a checkpoint is missing.
    """
    path, published = Path(name).expanduser(), name.removesuffix(CHECKPOINT_SUFFIX)
    if path.is_file():
        return path
    if published not in NAMES:
        raise ModelError(f"Weights not found: {name}", fix="Check the path.")
    _check_allowed(Path(f"{published}{CHECKPOINT_SUFFIX}"))
    return Path(_package().settings["weights_dir"], f"{published}{CHECKPOINT_SUFFIX}")


def _check_allowed(path: Path) -> None:
    if not CODE_ALLOWED.get():
        raise ModelError(
            f"Cannot read {path}: ultralytics pickles its checkpoints, and unpickling can run code",
            fix="If you trust the file, add --trust. In Python, call inside `with kdcache.models.trusting():`",
        )


def _load(path: Path) -> tuple[Any, _About]:
    """Return the network in a checkpoint, and the facts about it. Raises: ModelError."""
    _check_allowed(path)
    try:
        with _quiet():
            network, checkpoint = _tasks().load_checkpoint(str(path))
    except Exception as error:  # whatever the package, its downloads or unpickling raises
        raise ModelError(
            f"Cannot read {path} with ultralytics: {(str(error) or type(error).__name__).splitlines()[0]}",
            fix="Give a checkpoint that `yolo train` or `kdcache export` wrote, or download it again.",
        ) from error
    if network.task not in _HEADS:
        raise _of_other_task(str(path), network.task)
    side = dict(checkpoint.get("train_args") or {}).get("imgsz")
    names = network.names.values() if network.task == "semantic" else ()
    about = _About(network.task, network.yaml, tuple(map(str, names)), side if isinstance(side, int) else None)
    return network, about


def _of_other_task(place: str, task: str) -> ModelError:
    scale = _OTHER_NAME.match(Path(place.rpartition(":")[2]).stem)
    size = scale[1][-1] if scale else "n"
    return ModelError(
        f"Cannot use {place}: its task is {task}, and kdcache distils semantic segmentation and depth",
        fix=f"Use ultralytics:yolo26{size}-sem or ultralytics:yolo26{size}-depth, or a checkpoint of these tasks.",
    )


def _tasks() -> Any:
    """Return the package's module of networks. Raises: ModelError as `_package`."""
    _package()
    from ultralytics.nn import tasks

    return tasks


def _package() -> Any:
    """Return the package. Raises: ModelError for a version that is not tested."""
    with _quiet():
        import ultralytics

    low, high = TESTED
    if not _numbers(low) <= _numbers(ultralytics.__version__) < _numbers(high):
        raise ModelError(
            f"Cannot use ultralytics {ultralytics.__version__}: kdcache is tested with {low} up to {high}",
            fix=f"pip install 'ultralytics>={low},<{high}'",
        )
    return ultralytics


def _numbers(version: str) -> list[int]:
    return [int(part) for part in re.findall(r"\d+", version)[:3]]


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the package's output, because kdcache reports what matters."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
