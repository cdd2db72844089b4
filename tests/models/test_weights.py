"""Weights files: read safely, fit by name, refuse by name; the digest."""

import os
import pickle
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.models import mobilenet_v3_large

from kdcache.errors import ModelError
from kdcache.models import build_model, load_weights, read_state_dict, state_digest
from kdcache.models.weights import count_classes, save_weights


def _state(num_classes: int = 4) -> dict[str, Tensor]:
    torch.manual_seed(1)
    return dict(build_model("kdcache:tiny", num_classes).state_dict())


def _same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return set(a) == set(b) and all(torch.equal(a[k], b[k]) for k in a)


def test_safetensors_round_trip(tmp_path: Path) -> None:
    state = _state()
    save_file(state, tmp_path / "w.safetensors")
    assert _same(read_state_dict(tmp_path / "w.safetensors"), state)
    model = build_model("kdcache:tiny", None, weights=tmp_path / "w.safetensors")
    assert model.num_classes == 4
    assert _same(dict(model.state_dict()), state)


def _ddp(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"module.{k}": v for k, v in state.items()}


def _lightning(state: dict[str, Tensor], path: Path) -> Path:
    """A checkpoint as Lightning's Trainer.save_checkpoint lays it out."""
    torch.save({"epoch": 1, "pytorch-lightning_version": "2.5", "state_dict": state, "hyper_parameters": {}}, path)
    return path


@pytest.mark.parametrize("others", [{}, {"teacher.weight": torch.ones(2)}, {"criterion.class_weight": torch.ones(3)}])
@pytest.mark.parametrize("attribute", ["model", "student", "network", "net", "model.module"])
def test_a_lightning_checkpoint_gives_its_network(tmp_path: Path, attribute: str, others: dict[str, Tensor]) -> None:
    state = _state()
    path = _lightning(
        {**others, **{f"{attribute}.{name}": value for name, value in state.items()}}, tmp_path / "w.ckpt"
    )
    assert _same(read_state_dict(path), state)


def test_a_lightning_module_of_one_network_may_call_it_anything(tmp_path: Path) -> None:
    state = _state()
    path = _lightning({f"segmenter.{name}": value for name, value in state.items()}, tmp_path / "w.ckpt")
    assert _same(read_state_dict(path), state)
    path = _lightning({"left.weight": torch.ones(2), "right.weight": torch.ones(2)}, tmp_path / "w.ckpt")
    with pytest.raises(ModelError, match=r"left\., right\.") as caught:
        read_state_dict(path)
    assert "state_dict()" in caught.value.fix


@pytest.mark.parametrize("suffix", [".pth", ".pt"])
@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: s,
        lambda s: {"state_dict": s, "epoch": 3},
        lambda s: {"model": s, "optimizer": {"lr": 0.1}},
        _ddp,
        lambda s: {"model_state_dict": _ddp(s)},
        lambda s: {"model": {f"_orig_mod.{k}": v for k, v in _ddp(s).items()}},
    ],
    ids=["bare", "state_dict", "model", "ddp", "nested-ddp", "compiled-ddp"],
)
def test_torch_containers(tmp_path: Path, suffix: str, wrap: Any) -> None:
    state = _state()
    torch.save(wrap(state), tmp_path / f"w{suffix}")
    assert _same(read_state_dict(tmp_path / f"w{suffix}"), state)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("keep", [0.0, 0.0001, 0.5, 0.99])
def test_truncated_file_is_named(tmp_path: Path, suffix: str, keep: float) -> None:
    path = tmp_path / f"cut{suffix}"
    if suffix == ".pth":
        torch.save(_state(), path)
    else:
        save_file(_state(), path)
    path.write_bytes(path.read_bytes()[: int(keep * path.stat().st_size)])
    with pytest.raises(ModelError, match=f"cut{suffix}[\\s\\S]*again"):
        read_state_dict(path)


class _Payload:
    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, ("pwned",)


@pytest.mark.parametrize("zipped", [True, False])
def test_pickled_code_is_refused_and_not_run(tmp_path: Path, zipped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    if zipped:
        torch.save({"model": _state(), "x": _Payload()}, "evil.pth")
    else:
        Path("evil.pth").write_bytes(pickle.dumps(_Payload(), protocol=2))
    with pytest.raises(ModelError, match=r"evil\.pth"):
        read_state_dict("evil.pth")
    assert not Path("pwned").exists()


@pytest.mark.parametrize("content", [Fraction(1, 2), nn.Conv2d(1, 1, 1)], ids=["number", "module"])
def test_pickled_object_is_named_with_the_remedy(tmp_path: Path, content: object) -> None:
    torch.save({"model": _state(), "args": content}, tmp_path / "w.pth")
    with pytest.raises(ModelError, match=r"pickled (fractions\.Fraction|torch\.nn\.\S+)[\s\S]*state dict alone"):
        read_state_dict(tmp_path / "w.pth")


@pytest.mark.parametrize("content", [{}, {"epoch": 3}, [torch.zeros(1)], {"state_dict": {"a": 1}}])
def test_no_state_dict(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(ModelError, match="names and tensors"):
        read_state_dict(tmp_path / "w.pth")


@pytest.mark.parametrize("name", ["absent.pth", "."])
def test_missing_file(tmp_path: Path, name: str) -> None:
    with pytest.raises(ModelError, match=r"Weights not found|No weights in the folder"):
        read_state_dict(tmp_path / name)


def test_unknown_suffix(tmp_path: Path) -> None:
    (tmp_path / "w.onnx").write_bytes(b"x")
    with pytest.raises(ModelError, match=r"w\.onnx"):
        read_state_dict(tmp_path / "w.onnx")


@pytest.mark.parametrize("strict_head", [True, False])
def test_misfits_are_named_and_counted_and_change_nothing(strict_head: bool) -> None:
    state = _state()
    del state["encoder.stage2.0.conv2.weight"]
    state["surprise.weight"] = torch.zeros(1)
    state["lateral.stage1.weight"] = torch.zeros(7, 7)
    model = build_model("kdcache:tiny", 4)
    before = state_digest(model)
    with pytest.raises(ModelError) as caught:
        load_weights(model, state, strict_head=strict_head)
    message = str(caught.value)
    assert "1 missing: encoder.stage2.0.conv2.weight" in message
    assert "1 unexpected: surprise.weight" in message
    assert "lateral.stage1.weight (7, 7) instead of (32, 16, 1, 1)" in message
    assert state_digest(model) == before


def test_many_misfits_are_shortened() -> None:
    state = {f"x{i}": torch.zeros(1) for i in range(300)}
    with pytest.raises(ModelError, match=r"300 unexpected: x0, x1, x2, x3, \.\.\."):
        load_weights(build_model("kdcache:tiny", 4), state, strict_head=True)


def test_class_counts_differ() -> None:
    model = build_model("kdcache:tiny", 6)
    with pytest.raises(
        ModelError, match=r"weights have 4 classes, and the data or their class map 6[\s\S]*--class-map"
    ):
        load_weights(model, _state(4), strict_head=True)
    initial = model.get_parameter("classifier.weight").clone()
    report = load_weights(model, _state(4), strict_head=False)
    assert report.reinitialised == ("classifier.weight", "classifier.bias")
    assert torch.equal(model.get_parameter("classifier.weight"), initial)
    assert torch.equal(model.state_dict()["context.weight"], _state(4)["context.weight"])


def test_backbone_alone() -> None:
    state = {k: v for k, v in _state().items() if k.startswith("encoder.")}
    with pytest.raises(ModelError, match=r"missing: context\.weight"):
        load_weights(build_model("kdcache:tiny", 4), state, strict_head=True)
    model = build_model("kdcache:tiny", 4)
    report = load_weights(model, state, strict_head=False)
    assert set(report.loaded) == set(state)
    assert set(report.loaded) | set(report.reinitialised) | set(report.missing) == set(model.state_dict())
    assert "classifier.weight" in report.reinitialised
    with pytest.raises(ModelError, match=r"have no classifier\.weight"):
        count_classes(state, ("classifier.",))


def test_image_classifier_as_backbone() -> None:
    torch.manual_seed(2)
    state = mobilenet_v3_large(weights=None).state_dict()
    model = build_model("torchvision:lraspp_mobilenet_v3_large", 4)
    report = load_weights(model, state, strict_head=False)
    assert set(report.unexpected) == {k for k in state if k.startswith("classifier.")}
    assert all(k.startswith("classifier.") for k in report.reinitialised)
    assert torch.equal(model.state_dict()["backbone.0.0.weight"], state["features.0.0.weight"])


def test_old_files_lack_the_batch_counters() -> None:
    state = {k: v for k, v in _state().items() if not k.endswith("num_batches_tracked")}
    report = load_weights(build_model("kdcache:tiny", 4), state, strict_head=True)
    assert report.missing
    assert all(k.endswith("num_batches_tracked") for k in report.missing)


def test_digest_sees_one_bit_and_nothing_else() -> None:
    torch.manual_seed(0)
    model = build_model("kdcache:tiny", 3)
    digest = state_digest(model)
    assert len(digest) == 64
    assert state_digest(model.to(memory_format=torch.channels_last)) == digest
    assert state_digest(model.eval().requires_grad_(False)) == digest
    mean = model.get_buffer("encoder.stage1.0.norm2.running_mean")
    mean.view(torch.int32)[3] ^= 1
    assert state_digest(model) != digest
    mean.view(torch.int32)[3] ^= 1
    assert state_digest(model) == digest
    assert state_digest(model.half()) != digest


def test_digest_sees_shape_and_handles_scalars_and_bfloat16() -> None:
    a, b = nn.Module(), nn.Module()
    a.register_buffer("x", torch.zeros(2, 3, dtype=torch.bfloat16))
    b.register_buffer("x", torch.zeros(3, 2, dtype=torch.bfloat16))
    assert state_digest(a) != state_digest(b)
    a.register_buffer("y", torch.tensor(1))
    assert len(state_digest(a)) == 64


def test_a_byte_that_was_flipped_in_written_weights_is_noticed(tmp_path: Path) -> None:
    """The format has no checksum: a weight may be any number, so that its header names the digest of all."""
    model = build_model("kdcache:tiny", 3)
    path, again = tmp_path / "w.safetensors", tmp_path / "again.safetensors"
    for file in (path, again):
        save_weights(model, file)
    whole = path.read_bytes()
    assert again.read_bytes() == whole
    assert read_state_dict(path).keys() == model.state_dict().keys()
    tensors = 8 + int.from_bytes(whole[:8], "little")
    for place in (tensors, (tensors + len(whole)) // 2, len(whole) - 1, whole.index(b"state_sha256") + 20):
        damaged = bytearray(whole)
        damaged[place] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(ModelError, match=r"w\.safetensors are damaged: their tensors have another SHA-256"):
            read_state_dict(path)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda t: t.fill_(float("nan")), "NaN"),
        (lambda t: t.index_fill(0, torch.tensor([0]), float("inf")), "infinite"),
        (lambda t: t.double() * 1e300 + 1e300, "too large"),
        (lambda t: t.to(torch.complex64), "complex"),
    ],
)
def test_weights_are_finite_real_numbers(strict, spoil, message) -> None:
    """Of parameters and of statistics; the model is left as it was."""
    model = build_model("kdcache:tiny", 5)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for name, value in before.items():
        if not value.is_floating_point():
            continue
        state = {**before, name: spoil(value.clone())}
        with pytest.raises(ModelError, match=message) as caught:
            load_weights(model, state, strict_head=strict)
        assert name in caught.value.problem
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
