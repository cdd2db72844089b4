"""Export a trained model for deployment: weights only, an ONNX graph, a torch.export program, or YOLO's checkpoint.

Graphs take RGB in 0..1 as float32 (B, 3, H, W), and return logits (B, C, H, W), and depth in metres (B, 1, H, W) if the
model has that head. Normalisation, resize and the nonlinearity after it, which are easily done wrong elsewhere, are
inside. A backbone without learnt heads returns its features (B, c, h, w). Batch, height and width are dynamic if the
exporter supports it. Every file carries class names, colours, mean, std, size and spec, and is compared with the model
itself before it gets its name.

Only the trained model is exported, without what served training (projections of features, auxiliary heads).
"""

import importlib.util
import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from kdcache.errors import ModelError, RecipeError, suggest
from kdcache.files import replacing
from kdcache.heads import RegressionHead
from kdcache.models.architectures import yolo
from kdcache.models.native import SegmentationModel
from kdcache.models.registry import build_model
from kdcache.models.weights import save_weights
from kdcache.run_folder import RunModel
from kdcache.tasks import SEGMENTATION

SUFFIXES = {"safetensors": ".safetensors", "onnx": ".onnx", "torch.export": ".pt2", "ultralytics": ".pt"}
"""The suffix of each format's files."""
PROGRAM_METADATA = "kdcache.json"
"""Name of the metadata among the extra files of a torch.export program."""
TOLERANCE = 1e-4
"""The largest difference allowed, as a part of the largest output. Float32 graphs differ by 1e-6 to 1e-5."""
_LEAST = torch.finfo(torch.float32).tiny
_TRACED = (2, 160, 224)  # batch, height and width all differ, or the exporter takes them for one number
_AXES = {0: "batch", 2: "height", 3: "width"}
_NATIVE = ("safetensors", "ultralytics")  # which hold a network, and no graph
_FREE = (tuple(_AXES), (0,), ())  # axes that may vary, the most first


@dataclass(frozen=True)
class Exported:
    """The result of an export: a file that was written and then compared with the model.

    Attributes:
        path: the file.
        format: `safetensors`, `onnx`, `torch.export` or `ultralytics`.
        size_bytes: the file's size.
        free: the axes that may have any size: `batch`, `height`, `width`.
        checked_by: the runtime that ran the file, or None if no runtime is installed.
        unchecked: the reason why the file was not run, or ''.
        difference: the largest absolute difference from the model's output.
        relative: this difference as a part of the largest output.
        size: the (height, width) in pixels of the model's training, at which the file was checked.
        notes: notes for the user about the file.
    """

    path: Path
    format: str
    size_bytes: int
    free: tuple[str, ...]
    checked_by: str | None
    unchecked: str
    difference: float
    relative: float
    size: tuple[int, int]
    notes: tuple[str, ...] = ()


class Deployed(nn.Module):
    """A model with its normalisation before it and its last resize after it, as it is exported.

    Args:
        model: the model, in eval mode.
        raw: True leaves out the resize, so that logits are at the native stride.

    Attributes:
        mean, std: (3, 1, 1), the normalisation of red, green and blue.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: SegmentationModel, raw: bool = False) -> None:
        super().__init__()
        self.model = model
        self.raw = raw
        self.register_buffer("mean", torch.tensor(model.mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(model.std).view(3, 1, 1))

    def forward(self, image: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Return the outputs for images, float32 RGB in 0 to 1 (B, 3, H, W): one tensor, or a tuple of several.

        Segmentation has logits (B, C, H, W). Another head has values (B, c, H, W) in its unit. With `raw`, both are the
        heads' outputs at the native stride (B, c, h, w). A model without trained heads returns the features of its taps
        instead.
        """
        answers = self._answers(image)
        return answers if len(answers) > 1 else answers[0]

    def _answers(self, image: Tensor) -> tuple[Tensor, ...]:
        taps = () if self.model.learnt_heads else self.model.taps
        heads, features = self.model((image - self.mean) / self.std, taps)
        if taps:
            return tuple(features[tap] for tap in taps)
        if self.raw:
            return tuple(heads[name] for name in self.model.learnt_heads)
        aligned, size = self.model.align_corners, image.shape[-2:]
        learnt = {name: heads[name] for name in self.model.learnt_heads}
        full = {n: F.interpolate(x, size=size, mode="bilinear", align_corners=aligned) for n, x in learnt.items()}
        regressions = self.model.regressions
        return tuple(regressions[n].values(x) if n in regressions else x for n, x in full.items())

    @property
    def names(self) -> list[str]:
        """The names of the outputs, in order: `logits` and other trained heads. Without trained heads, the taps."""
        if not self.model.learnt_heads:
            return list(self.model.taps)
        return ["logits" if name == SEGMENTATION else name for name in self.model.learnt_heads]


def export_model(
    model: SegmentationModel,
    description: RunModel,
    out: str | Path,
    *,
    format: str | None = None,
    raw: bool = False,
    tolerance: float = TOLERANCE,
) -> Exported:
    """Export a model to a file, and check that the file gives the same outputs as the model.

    Args:
        model: the model, on the CPU. It is left in eval mode.
        description: stored in the file. It also has the size of the images for the check.
        out: the new file.
        format: `safetensors`, `onnx`, `torch.export` or `ultralytics`. None goes by the suffix of `out`.
        raw: True leaves out the last resize. Only for `onnx` and `torch.export`.
        tolerance: the largest difference allowed, as a part of the largest output.

    Raises:
        RecipeError: the format or the suffix is unknown, `out` exists, or `raw` does not fit the format.
        ModelError: the model cannot be exported, a library is missing, or the file's outputs differ. No file is left.
    """
    out = Path(out)
    kind = _format(out, format)
    _check_place(out)
    if raw and kind in _NATIVE:
        raise RecipeError(
            f"Cannot use --raw with {kind}: the file holds no graph",
            fix="Leave out --raw. Whoever builds the model from its weights gets logits at native stride anyway.",
        )
    deployed = Deployed(model.eval(), raw).eval()
    metadata = description.metadata() | ({} if kind in _NATIVE else _interface(model, raw))
    with replacing(out) as partial:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # exporters deprecate their own insides
            free, run, unchecked, notes = WRITERS[kind](deployed, description, metadata, partial)
            difference, relative = 0.0, 0.0
            if run is not None:
                difference, relative = _compare(deployed, run, description, free, raw or kind in _NATIVE)
        if not relative <= tolerance:  # also when it is NaN
            raise ModelError(
                f"{out.name} answers otherwise than the model: {difference:.3g}, {relative:.3g} of the largest logit, "
                f"of at most {tolerance:g}",
                fix="Export in another format, or raise --tolerance if you can accept that.",
            )
        size_bytes = partial.stat().st_size
    names = tuple(name for axis, name in _AXES.items() if axis in free)
    checked_by = None if unchecked else _CHECKERS[kind]
    return Exported(out, kind, size_bytes, names, checked_by, unchecked, difference, relative, description.size, notes)


def _write_weights(deployed: Deployed, description: RunModel, metadata: dict[str, str], path: Path) -> "_Written":
    save_weights(deployed.model, path, {"format": "pt", **metadata})
    count, moments = len(description.class_names), {"mean": description.mean, "std": description.std}
    again = build_model(description.spec, count, weights=load_file(path), strict_head=True, **moments)
    again.untrained = deployed.model.untrained
    return tuple(_AXES), Deployed(again.eval(), raw=True), "", ()


def _write_checkpoint(deployed: Deployed, description: RunModel, metadata: dict[str, str], path: Path) -> "_Written":
    notes = yolo.write_checkpoint(deployed.model, description, path)
    return tuple(_AXES), yolo.reader(path, deployed.model.mean), "", notes


def _write_program(deployed: Deployed, description: RunModel, metadata: dict[str, str], path: Path) -> "_Written":
    program, free = _trace(deployed, description)
    with path.open("wb") as file:
        torch.export.save(program, file, extra_files={PROGRAM_METADATA: json.dumps(metadata)})
    with path.open("rb") as file:
        return free, torch.export.load(file).module(), "", ()


def _write_onnx(deployed: Deployed, description: RunModel, metadata: dict[str, str], path: Path) -> "_Written":
    lacking = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if lacking:
        raise ModelError(
            f"Missing {' and '.join(lacking)} for ONNX files", fix="In a clone of kdcache: pip install '.[onnx]'"
        )
    program, free = _trace(deployed, description)
    names = deployed.names
    exported = torch.onnx.export(program, (), input_names=["image"], output_names=names, dynamo=True, verbose=False)
    assert exported is not None
    exported.model.metadata_props.update(metadata)
    _name_axes(exported.model, deployed.raw or not deployed.model.learnt_heads, free)
    exported.save(path, external_data=False)
    if importlib.util.find_spec("onnxruntime") is None:
        return free, None, "onnxruntime is not installed (pip install '.[onnx]')", ()
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 4
    session = onnxruntime.InferenceSession(path.read_bytes(), settings, providers=["CPUExecutionProvider"])
    return free, lambda image: tuple(map(torch.from_numpy, session.run(names, {"image": image.numpy()}))), "", ()


_Run = Callable[[Tensor], Tensor | tuple[Tensor, ...]]
_Written = tuple[tuple[int, ...], _Run | None, str, tuple[str, ...]]
"""Free axes, the file as a function (None when nothing can run it), why not, and notes."""
WRITERS: dict[str, Callable[[Deployed, RunModel, dict[str, str], Path], _Written]] = {
    "safetensors": _write_weights,
    "onnx": _write_onnx,
    "torch.export": _write_program,
    "ultralytics": _write_checkpoint,
}
_CHECKERS = {
    "safetensors": "a model built from it",
    "onnx": "onnxruntime",
    "torch.export": "torch.export.load",
    "ultralytics": "ultralytics",
}


def _trace(deployed: Deployed, description: RunModel) -> tuple[Any, tuple[int, ...]]:
    """Return the traced program, and the axes that may have any size: as many as the model allows."""
    failure: Exception | None = None
    for free in _FREE:
        batch, height, width = _TRACED if 2 in free else (_TRACED[0] if free else 1, *description.size)
        axes: dict[int, Any] = dict.fromkeys(free, torch.export.Dim.AUTO)
        image = torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(0))
        try:
            program = torch.export.export(deployed, (image,), dynamic_shapes={"image": axes})
            # Where the model needs one size, AUTO gives a number.
            shape = next(node for node in program.graph.nodes if node.name == "image").meta["val"].shape
            if not any(isinstance(shape[axis], int) for axis in free):
                program.module()(torch.zeros(1, 3, *description.size))  # what was traced may exclude small images
                return program, free
        except Exception as error:  # of the model, of Dynamo, of the exporter
            failure = error
    raise ModelError(
        f"Cannot trace {description.spec} with torch.export: {type(failure).__name__}: "
        f"{(str(failure).strip() or '-').splitlines()[0]}",
        fix="Export with --format safetensors, or rewrite what torch.export cannot trace.",
    ) from failure


def _compare(
    deployed: Deployed, run: _Run, description: RunModel, free: tuple[int, ...], raw: bool
) -> tuple[float, float]:
    """Return the largest difference between file and model: absolute, and as a part of the largest output.

    Images have the size of the training and, if sizes may vary, another one.
    """
    sizes = [(1, *description.size)]
    if 2 in free:
        sizes.append((2, _other(description.size[0]), _other(description.size[1])))
    original = Deployed(deployed.model, raw).eval()
    differences = []
    for number, (batch, height, width) in enumerate(sizes):
        image = torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(number))
        expected = original(image)
        try:
            answers = _several(run(image))
        except Exception as error:
            raise ModelError(
                f"The exported file fails at {batch}x3x{height}x{width}: {type(error).__name__}: "
                f"{str(error).splitlines()[0]}",
                fix="Export in another format.",
            ) from error
        for answer, model_answer in zip(answers, _several(expected), strict=True):
            if answer.shape != model_answer.shape:
                raise ModelError(
                    f"The exported file answers in shape {tuple(answer.shape)} instead of {tuple(model_answer.shape)}",
                    fix="Export in another format.",
                )
            difference = (answer - model_answer).abs().max()
            differences.append(torch.stack([difference, difference / model_answer.abs().max().clamp(min=_LEAST)]))
    worst, relative = torch.stack(differences).amax(0).tolist()  # NaN stays NaN
    return worst, relative


def _several(answers: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (answers,) if isinstance(answers, Tensor) else tuple(answers)


def _other(side: int) -> int:
    """Return another side in pixels for a check: about two thirds, a multiple of 32, and at least 64."""
    rounded = 32 * max(2, side // 48)
    return rounded + 32 if rounded == side else rounded


def _interface(model: SegmentationModel, raw: bool) -> dict[str, str]:
    """Return metadata about the graph for its users: input, output, stride."""
    answers = [] if model.learnt_heads else [f"{tap} (B, c, h, w), a feature" for tap in model.taps]
    for name in model.learnt_heads:
        kind = model.head_kinds[name]
        if isinstance(kind, RegressionHead):
            answers.append(f"{name} (B, {kind.channels}, " + ("h, w), raw" if raw else f"H, W) in {kind.unit}"))
        else:
            grid = f"h, w) at stride {model.stride}" if raw else "H, W)"
            answers.append(f"logits (B, C, {grid}; argmax over C is the class id")
    return {
        "input": "image: float32 RGB in 0..1 (B, 3, H, W); normalisation is inside",
        "output": "; ".join(answers),
        "stride": str(model.stride),
        "align_corners": json.dumps(model.align_corners),
    }


def _name_axes(graph_model: Any, raw: bool, free: tuple[int, ...]) -> None:
    """Give the axes that may have any size a name: `batch`, `height`, `width`."""
    for axis in free:
        graph_model.graph.inputs[0].shape[axis] = _AXES[axis]
        for output in graph_model.graph.outputs:
            output.shape[axis] = f"{output.name}_{_AXES[axis]}" if raw and axis else _AXES[axis]


def _format(out: Path, format: str | None) -> str:
    named = {suffix: name for name, suffix in SUFFIXES.items()}.get(out.suffix)
    allowed = ", ".join(f"{name} ({suffix})" for name, suffix in SUFFIXES.items())
    if format is not None and format not in SUFFIXES:
        raise RecipeError(f"Unknown --format {format!r}", fix=suggest(str(format), SUFFIXES, f"Use one of {allowed}."))
    if named is None or named != (format or named):
        raise RecipeError(
            f"Cannot write {format or 'a model'} to --out {out}: suffixes are {allowed}",
            fix=f"Use --out {out.with_suffix(SUFFIXES[format or 'onnx'])}" if out.name else "Give a file.",
        )
    return named


def _check_place(out: Path) -> None:
    if out.exists() or not out.parent.is_dir():
        raise RecipeError(
            f"Cannot write {out}: " + ("it exists" if out.exists() else f"there is no folder {out.parent}"),
            fix="Give another --out, or remove that file." if out.exists() else f"mkdir -p {out.parent}",
        )
