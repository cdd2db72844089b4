"""Exported files, read by the tools that deploy them: onnx, onnxruntime, torch.export, safetensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn import functional as F

from kdcache.errors import ModelError, RecipeError
from kdcache.models import SegmentationModel, build_model
from kdcache.models import export as room
from kdcache.models.export import PROGRAM_METADATA, SUFFIXES, export_model
from kdcache.run_folder import RunModel

NAMES, COLOURS = ("road", "car", "sky"), ((128, 64, 128), (0, 0, 142), (70, 130, 180))
MEAN, STD = (0.4, 0.5, 0.6), (0.1, 0.2, 0.3)


def trained(spec: str, size: tuple[int, int] = (64, 96)) -> tuple[SegmentationModel, RunModel]:
    torch.manual_seed(0)
    model = build_model(spec, 3, mean=MEAN, std=STD)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.2, 0.2)
            module.running_var.uniform_(0.5, 2.0)
    description = RunModel(
        spec=spec, class_names=NAMES, class_colours=COLOURS, size=size, mean=MEAN, std=STD, trained_on="x"
    )
    return model.eval(), description


def expected(model: SegmentationModel, image: Tensor, raw: bool = False) -> Tensor:
    with torch.inference_mode():
        x = (image - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
        logits = model(x).logits
        if raw:
            return logits
        return F.interpolate(logits, image.shape[-2:], mode="bilinear", align_corners=model.align_corners)


def session(path: Path) -> Any:
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("raw", [False, True])
def test_onnx_runs_at_any_size_and_says_what_it_is(tmp_path: Path, raw: bool) -> None:
    model, description = trained("kdcache:tiny")
    done = export_model(model, description, tmp_path / "m.onnx", raw=raw)
    assert (done.format, done.free, done.checked_by) == ("onnx", ("batch", "height", "width"), "onnxruntime")
    assert 0 <= done.difference < 1e-4
    runs = session(tmp_path / "m.onnx")
    for shape in [(1, 3, 64, 96), (3, 3, 97, 130), (2, 3, 200, 168)]:
        image = torch.rand(shape)
        logits = torch.from_numpy(runs.run(None, {"image": image.numpy()})[0])
        torch.testing.assert_close(logits, expected(model, image, raw), rtol=1e-4, atol=1e-5)
    graph = onnx.load(tmp_path / "m.onnx")
    onnx.checker.check_model(graph, full_check=True)
    axes = [d.dim_param or d.dim_value for d in graph.graph.input[0].type.tensor_type.shape.dim]
    assert axes == ["batch", 3, "height", "width"]
    metadata = {entry.key: entry.value for entry in graph.metadata_props}
    assert json.loads(metadata["class_names"]) == list(NAMES)
    assert json.loads(metadata["class_colours"]) == [list(colour) for colour in COLOURS]
    assert (json.loads(metadata["mean"]), json.loads(metadata["std"])) == (list(MEAN), list(STD))
    assert (json.loads(metadata["size"]), metadata["spec"]) == ([64, 96], "kdcache:tiny")
    assert ("at stride 4" in metadata["output"]) == raw
    assert "trained_on" not in metadata


@pytest.mark.parametrize("raw", [False, True])
def test_a_program_runs_where_it_is_loaded(tmp_path: Path, raw: bool) -> None:
    """Also of a model that was being trained."""
    model, description = trained("kdcache:tiny")
    done = export_model(model.train(), description, tmp_path / "m.pt2", raw=raw)
    assert not model.training
    assert done.free == ("batch", "height", "width")
    metadata = {PROGRAM_METADATA: ""}
    program = torch.export.load(tmp_path / "m.pt2", extra_files=metadata)
    for shape in [(1, 3, 64, 96), (3, 3, 97, 130)]:
        image = torch.rand(shape)
        assert torch.equal(program.module()(image), expected(model, image, raw))
    assert json.loads(json.loads(metadata[PROGRAM_METADATA])["class_names"]) == list(NAMES)


def test_weights_carry_the_description(tmp_path: Path) -> None:
    model, description = trained("kdcache:tiny")
    done = export_model(model, description, tmp_path / "m.safetensors")
    assert (done.difference, done.size_bytes) == (0.0, (tmp_path / "m.safetensors").stat().st_size)
    with safe_open(tmp_path / "m.safetensors", framework="pt") as file:
        assert set(file.keys()) == set(model.state_dict())
        assert RunModel.from_metadata(file.metadata(), tmp_path) == description.model_copy(update={"trained_on": ""})
        assert file.metadata()["format"] == "pt"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spec", "suffix"),
    [
        ("segformer:b0", ".onnx"),
        ("kdcache:deeplab-mobilenet", ".onnx"),
        ("torchvision:lraspp_mobilenet_v3_large", ".onnx"),
        ("smp:deeplabv3plus-resnet18", ".onnx"),
        ("smp:deeplabv3plus-resnet18", ".pt2"),
    ],
)
def test_every_family_is_exported(tmp_path: Path, spec: str, suffix: str) -> None:
    """The way to ONNX goes through torch.export, so one family is enough for .pt2."""
    model, description = trained(spec)
    done = export_model(model, description, tmp_path / f"m{suffix}")
    assert done.free == ("batch", "height", "width")
    image = torch.rand(2, 3, 96, 128)
    if suffix == ".onnx":
        logits = torch.from_numpy(session(tmp_path / "m.onnx").run(None, {"image": image.numpy()})[0])
    else:
        logits = torch.export.load(tmp_path / "m.pt2").module()(image)
    torch.testing.assert_close(logits, expected(model, image), rtol=1e-3, atol=1e-4)


def test_small_images_that_a_free_graph_would_exclude_fix_the_size(tmp_path: Path) -> None:
    """At 32 x 32 the deepest stage is one cell, which takes another way through the network."""
    model, description = trained("kdcache:tiny", (32, 32))
    assert export_model(model, description, tmp_path / "m.pt2").free == ("batch",)
    image = torch.rand(3, 3, 32, 32)
    assert torch.equal(torch.export.load(tmp_path / "m.pt2").module()(image), expected(model, image))


class _OneSize(SegmentationModel):
    """Takes one height and width only, and one image at a time when asked."""

    def __init__(self, batch: int | None) -> None:
        super().__init__(spec="my:model", num_classes=3, stride=1, taps=())
        self.batch = batch
        self.layer = nn.Conv2d(3, 3, 1)

    def forward(self, x_B3HW: Tensor, taps: Any = ()) -> Any:
        from kdcache.models import Outputs

        if x_B3HW.shape[-2:] != (64, 96) or x_B3HW.shape[0] != (self.batch or x_B3HW.shape[0]):
            raise ValueError("another size")
        return Outputs({"segmentation": self.layer(x_B3HW)}, {})


@pytest.mark.parametrize(("batch", "free"), [(None, ("batch",)), (1, ())])
def test_a_model_of_one_size_is_exported_as_such(tmp_path: Path, batch: int | None, free: tuple[str, ...]) -> None:
    _, description = trained("kdcache:tiny")
    assert export_model(_OneSize(batch), description, tmp_path / "m.pt2").free == free


class _Untraceable(_OneSize):
    def forward(self, x_B3HW: Tensor, taps: Any = ()) -> Any:
        if float(x_B3HW.sum()) > 1e9:
            raise ValueError
        return super().forward(x_B3HW, taps)


def test_what_cannot_be_traced_is_refused_with_the_way_out(tmp_path: Path) -> None:
    _, description = trained("kdcache:tiny")
    with pytest.raises(ModelError, match=r"Cannot trace kdcache:tiny[\s\S]*--format safetensors"):
        export_model(_Untraceable(None), description, tmp_path / "m.onnx")
    assert list(tmp_path.iterdir()) == []


def _written_as(monkeypatch: pytest.MonkeyPatch, answer: Any, free: tuple[int, ...] = (0, 2, 3)) -> None:
    """Files of weights that answer `answer(own answer, image)`."""

    def written(deployed: room.Deployed, description: RunModel, metadata: dict[str, str], path: Path) -> Any:
        path.write_bytes(b"something")
        own = room.Deployed(deployed.model, raw=True)
        return free, lambda image: answer(own(image), image), "", ()

    monkeypatch.setitem(room.WRITERS, "safetensors", written)


def test_a_file_of_any_size_is_checked_at_another_one_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, description = trained("kdcache:tiny")

    def answer(logits: Tensor, image: Tensor) -> Tensor:
        return logits + float(tuple(image.shape) != (1, 3, *description.size))

    _written_as(monkeypatch, answer)
    with pytest.raises(ModelError, match="answers otherwise than the model"):
        export_model(model, description, tmp_path / "m.safetensors")
    _written_as(monkeypatch, answer, free=())
    assert export_model(model, description, tmp_path / "m.safetensors").difference == 0


@pytest.mark.parametrize("scale", [1.0, 1000.0])
def test_a_difference_counts_beside_the_largest_logit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scale: float
) -> None:
    model, description = trained("kdcache:tiny")
    with torch.no_grad():
        for parameter in model.get_submodule("classifier").parameters():
            parameter.mul_(scale)
    _written_as(monkeypatch, lambda logits, _: logits + 2e-4 * logits.abs().max())
    with pytest.raises(ModelError, match="answers otherwise than the model"):
        export_model(model, description, tmp_path / "m.safetensors")
    _written_as(monkeypatch, lambda logits, _: logits + 5e-5 * logits.abs().max())
    assert export_model(model, description, tmp_path / "m.safetensors").relative == pytest.approx(5e-5, rel=0.02)


@pytest.mark.parametrize("suffix", SUFFIXES.values())
@pytest.mark.parametrize("wrong", [0.01, float("nan"), "shape", "crash"])
def test_a_file_that_answers_otherwise_is_not_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, wrong: Any
) -> None:
    model, description = trained("kdcache:tiny")
    name = next(name for name, end in SUFFIXES.items() if end == suffix)

    def written(deployed: room.Deployed, description: RunModel, metadata: dict[str, str], path: Path) -> Any:
        path.write_bytes(b"something")
        own = room.Deployed(deployed.model, raw=name in ("safetensors", "ultralytics"))

        def run(image: Tensor) -> Tensor:
            if wrong == "crash":
                raise RuntimeError("no such kernel")
            answer = own(image)
            return answer[..., 1:] if wrong == "shape" else answer + wrong

        return (0, 2, 3), run, "", ()

    monkeypatch.setitem(room.WRITERS, name, written)
    with pytest.raises(ModelError):
        export_model(model, description, tmp_path / f"m{suffix}")
    assert list(tmp_path.iterdir()) == []
    if wrong == 0.01:
        assert export_model(model, description, tmp_path / f"m{suffix}", tolerance=1.0).difference == pytest.approx(
            0.01
        )


def test_without_onnxruntime_it_says_that_nobody_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = room.importlib.util.find_spec
    model, (_, description) = _OneSize(None), trained("kdcache:tiny")
    monkeypatch.setattr(room.importlib.util, "find_spec", lambda n: None if n == "onnxruntime" else find(n))
    done = export_model(model, description, tmp_path / "m.onnx")
    assert done.checked_by is None
    assert "onnxruntime" in done.unchecked
    image = np.random.default_rng(0).random((1, 3, 64, 96), np.float32)
    assert session(tmp_path / "m.onnx").run(None, {"image": image})[0].shape == (1, 3, 64, 96)
    monkeypatch.setattr(room.importlib.util, "find_spec", lambda n: None if n == "onnx" else find(n))
    with pytest.raises(ModelError, match=r"pip install '\.\[onnx\]'"):
        export_model(model, description, tmp_path / "n.onnx")


def test_wrong_places_and_formats(tmp_path: Path) -> None:
    model, description = trained("kdcache:tiny")
    (tmp_path / "thesis.onnx").write_text("thesis")
    for out, options, received in [
        ("m.tflite", {}, r"m\.tflite"),
        ("m.onnx", {"format": "torch.export"}, r"torch\.export to --out .*m\.onnx[\s\S]*m\.pt2"),
        ("m.onnx", {"format": "onix"}, "'onix'"),
        ("thesis.onnx", {}, "it exists"),
        ("none/m.onnx", {}, "no folder"),
        ("m.safetensors", {"raw": True}, "holds no graph"),
    ]:
        with pytest.raises(RecipeError, match=received):
            export_model(model, description, tmp_path / out, **options)  # type: ignore[arg-type]
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.onnx"]
    assert (tmp_path / "thesis.onnx").read_text() == "thesis"


@pytest.mark.parametrize(("suffix", "raw"), [(".pt2", True), (".onnx", False)])  # above, each with both
def test_depth_is_the_second_answer(tmp_path, suffix, raw) -> None:
    """In metres, of the raw output that was resized; with --raw that output itself."""
    if suffix == ".onnx":
        onnxruntime = pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")
    torch.manual_seed(0)
    model = build_model("kdcache:hydra,as=exp,max=20", 3).eval()
    with torch.no_grad():
        model.depth_output.weight.normal_(std=0.5)
    description = RunModel(
        spec=model.spec, class_names=("a", "b", "c"), class_colours=((0, 0, 0), (1, 1, 1), (2, 2, 2)), size=(64, 96),
        mean=model.mean, std=model.std, heads=model.regressions,
    )  # fmt: skip
    path = tmp_path / f"m{suffix}"
    exported = export_model(model, description, path, raw=raw)
    assert exported.relative <= 1e-4
    image = torch.rand(2, 3, 96, 64)
    heads = model(model.standardise(image)).heads
    wanted = heads["depth"]
    if not raw:
        full = F.interpolate(wanted.double(), size=(96, 64), mode="bilinear", align_corners=False)
        wanted = full.exp().clamp(max=20).float()
        metres_resized = F.interpolate(heads["depth"].exp(), size=(96, 64), mode="bilinear", align_corners=False)
        assert (metres_resized - wanted).abs().max() > 1e-2  # another map
    if suffix == ".pt2":
        logits, depth = torch.export.load(path).module()(image)
    else:
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        assert [output.name for output in session.get_outputs()] == ["logits", "depth"]
        logits, depth = map(torch.from_numpy, session.run(None, {"image": image.numpy()}))
        assert '"max_depth": 20' in session.get_modelmeta().custom_metadata_map["heads"]
    assert logits.shape[1] == 3
    torch.testing.assert_close(depth, wanted, rtol=1e-3, atol=1e-4)


def test_a_head_of_which_a_run_learnt_nothing_is_no_answer(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = build_model("kdcache:hydra", 3).eval()
    model.untrained = ("segmentation",)
    description = RunModel(
        spec=model.spec, class_names=NAMES, class_colours=COLOURS, size=(64, 96), mean=model.mean, std=model.std,
        heads=model.regressions, untrained=model.untrained,
    )  # fmt: skip
    export_model(model, description, tmp_path / "m.onnx")
    runs = session(tmp_path / "m.onnx")
    assert [output.name for output in runs.get_outputs()] == ["depth"]
    assert runs.get_modelmeta().custom_metadata_map["output"] == "depth (B, 1, H, W) in m"
    assert export_model(model, description, tmp_path / "m.safetensors").relative <= 1e-4
