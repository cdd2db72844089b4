"""SegFormer: transformers' own logits, its published names and counts, the hub's files; as teacher and student."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import SegformerConfig, SegformerForImageClassification, SegformerForSemanticSegmentation

from kdcache.errors import ModelError
from kdcache.models import build_model, load_weights, read_state_dict, state_digest
from kdcache.models.architectures import segformer
from kdcache.models.architectures.segformer import SIZES
from kdcache.models.registry import describe_model

CLASSES = 5
# Table 6 of arXiv 2105.15203 gives encoders and decoders in millions; these are the sums at 150 classes.
PUBLISHED_M = {"b0": 3.8, "b1": 13.7, "b2": 27.5, "b3": 47.3, "b4": 64.1, "b5": 84.7}


def config(name: str, labels: int = CLASSES) -> SegformerConfig:
    size = SIZES[name]
    settings: dict[str, Any] = {"hidden_sizes": size.widths, "depths": size.depths, "num_labels": labels}
    return SegformerConfig(**settings, decoder_hidden_size=size.decoder)


def original(name: str = "b0", seed: int = 0) -> nn.Module:
    """transformers' own, with statistics that are not the initial ones."""
    torch.manual_seed(seed)
    network = SegformerForSemanticSegmentation(config(name))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    norm = network.decode_head.batch_norm
    norm.running_mean.uniform_(-0.2, 0.2)
    norm.running_var.uniform_(0.5, 2.0)
    return network.eval()


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as transformers itself writes it, and as the hub has it."""
    folder = tmp_path_factory.mktemp("hub")
    original().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", ["b0", "b1"])
def test_logits_are_those_of_transformers(name: str) -> None:
    network = original(name)
    model = build_model(f"segformer:{name}", CLASSES).eval()
    load_weights(model, network.state_dict(), strict_head=True)
    for size in [(64, 96), (65, 51), (32, 32)]:
        x = torch.randn(2, 3, *size)
        with torch.inference_mode():
            expected = network(x, output_hidden_states=True)
            output = model(x, model.taps)
        assert torch.equal(output.logits, expected.logits)
        assert output.logits.std() > 1e-3
        assert output.logits.shape[-2:] == (-(-size[0] // 4), -(-size[1] // 4))
        for tap, hidden in zip(model.taps, expected.hidden_states, strict=False):
            assert torch.equal(output.features[tap], hidden)
    assert not model.align_corners


def test_head_tap_is_the_classifiers_input_before_dropout() -> None:
    torch.manual_seed(0)
    model = build_model("segformer:b0", CLASSES).eval()
    with torch.inference_mode():
        heads, features = model(torch.randn(1, 3, 40, 56), ["head"])
        logits = heads["segmentation"]
        assert features["head"].shape == (1, 256, 10, 14)
        assert torch.equal(model.get_submodule("decode_head.classifier")(features["head"]), logits)


def test_parameters_are_as_published() -> None:
    assert tuple(PUBLISHED_M) == segformer.NAMES
    for name, millions in PUBLISHED_M.items():
        info = describe_model(f"segformer:{name}")
        more = (150 - 21) * (SIZES[name].decoder + 1)  # of the classifier, which is listed at 21 classes
        assert abs((info.parameters + more) / 1e6 - millions) < 0.1
        assert [t.stride for t in info.taps.values()] == [4, 8, 16, 32, 4]
        with torch.device("meta"):
            assert sum(p.numel() for p in SegformerForSemanticSegmentation(config(name, 21)).parameters()) == (
                info.parameters
            )


def test_the_hubs_folder_and_files_load(hub: Path, tmp_path: Path) -> None:
    expected = original()
    x = torch.randn(1, 3, 64, 64)
    (tmp_path / "bin").mkdir()
    torch.save(load_file(hub / "model.safetensors"), tmp_path / "bin" / "pytorch_model.bin")
    for weights in (hub, hub / "model.safetensors", tmp_path / "bin", tmp_path / "bin" / "pytorch_model.bin"):
        model = build_model("segformer:b0", None, weights=weights).eval()
        assert model.num_classes == CLASSES
        with torch.inference_mode():
            assert torch.equal(model(x).logits, expected(x).logits)
    with pytest.raises(ModelError, match="No weights in the folder"):
        read_state_dict(tmp_path)


def test_tensors_have_the_published_names_and_transformers_reads_them(hub: Path, tmp_path: Path) -> None:
    state = build_model("segformer:b0", CLASSES).state_dict()
    published = set(load_file(hub / "model.safetensors"))
    assert {
        "segformer.encoder.patch_embeddings.0.proj.weight",
        "segformer.encoder.block.0.0.attention.self.sr.weight",
        "segformer.encoder.block.3.1.mlp.dense2.bias",
        "segformer.encoder.layer_norm.3.weight",
        "decode_head.linear_c.0.proj.weight",
        "decode_head.classifier.weight",
    } <= set(state)
    assert published <= set(state)
    assert {k.rpartition(".")[2] for k in set(state) - published} <= {"num_batches_tracked"}
    save_file(dict(state), tmp_path / "model.safetensors", {"format": "pt"})
    config("b0").save_pretrained(tmp_path)
    network = SegformerForSemanticSegmentation.from_pretrained(tmp_path).eval()
    model = build_model("segformer:b0", CLASSES, weights=tmp_path).eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        assert torch.equal(network(x).logits, model(x).logits)


def test_state_survives_copies_and_wrappers() -> None:
    torch.manual_seed(0)
    model = build_model("segformer:b0", CLASSES)
    twin = copy.deepcopy(model)
    torch.manual_seed(1)
    other = build_model("segformer:b0", CLASSES)
    assert state_digest(other) != state_digest(model)
    nn.Sequential(other).load_state_dict(nn.Sequential(model).state_dict())
    assert state_digest(other) == state_digest(model) == state_digest(twin)


def image_classifier(tmp_path: Path) -> dict[str, Tensor]:
    """A file like the published `nvidia/mit-b0`: the encoder and 1000 classes of images."""
    torch.manual_seed(3)
    SegformerForImageClassification(config("b0", 1000)).save_pretrained(tmp_path)
    return load_file(tmp_path / "model.safetensors")


def test_an_imagenet_encoder_initialises(tmp_path: Path) -> None:
    state = image_classifier(tmp_path)
    model = build_model("segformer:b0", CLASSES, weights=tmp_path)
    report = model.load_report
    assert report is not None
    assert set(report.unexpected) == {"classifier.weight", "classifier.bias"}
    assert set(report.loaded) == {k for k in state if k.startswith("segformer.")}
    assert all(name.startswith("decode_head.") for name in report.reinitialised)
    assert all(torch.equal(model.state_dict()[k], state[k]) for k in report.loaded)
    bare = {k.removeprefix("segformer."): v for k, v in state.items() if k.startswith("segformer.")}
    again = load_weights(build_model("segformer:b0", CLASSES), bare, strict_head=False)
    assert set(again.loaded) == set(report.loaded)
    with pytest.raises(ModelError, match="missing: decode_head"):
        load_weights(model, state, strict_head=True)


def test_the_hub_is_asked_only_for_default(hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image_classifier(tmp_path)
    asked: list[tuple[str, str]] = []

    def download(repository: str, name: str) -> str:
        asked.append((repository, name))
        return str((tmp_path if "mit-" in repository else hub) / name)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    build_model("segformer:b0", CLASSES)
    assert asked == []
    teacher = build_model("segformer:b0", None, weights="default")
    assert teacher.num_classes == CLASSES
    files = ("model.safetensors", "config.json")  # the latter for the names of its classes
    assert asked == [("nvidia/segformer-b0-finetuned-ade-512-512", name) for name in files]
    student = build_model("segformer:b0", 3, weights="default", strict_head=False)
    assert student.num_classes == 3
    assert asked[2:] == [("nvidia/mit-b0", "model.safetensors")]


def test_older_repositories_have_a_pytorch_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import httpx
    from huggingface_hub.errors import RemoteEntryNotFoundError

    torch.save(image_classifier(tmp_path), tmp_path / "pytorch_model.bin")

    def download(_repository: str, name: str) -> str:
        if name.endswith(".safetensors"):
            answer = httpx.Response(404, request=httpx.Request("GET", "https://example.org"))
            raise RemoteEntryNotFoundError("no such entry", response=answer)
        return str(tmp_path / name)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    assert build_model("segformer:b0", CLASSES, weights="default").load_report is not None


def test_offline_it_says_what_to_fetch(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub.errors import LocalEntryNotFoundError

    for error in (LocalEntryNotFoundError("offline"), OSError("no route"), RuntimeError("odd")):

        def download(*_words: str, error: Exception = error) -> str:
            raise error

        monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
        with pytest.raises(ModelError, match=r"huggingface\.co/nvidia/segformer-b5-finetuned-ade-640-640[\s\S]*folder"):
            build_model("segformer:b5", None, weights="default")


def test_stochastic_depth_and_dropout_are_as_published() -> None:
    model = build_model("segformer:b2", CLASSES)
    kinds = [type(m).__name__ for m in model.modules()]
    assert kinds.count("SegformerDropPath") == 15  # of 16 blocks; the first is never dropped
    rates = [m.drop_prob for m in model.modules() if type(m).__name__ == "SegformerDropPath"]
    assert rates == pytest.approx([0.1 * i / 15 for i in range(1, 16)])
    assert model.get_submodule("decode_head.dropout").p == 0.1


def test_trains_in_channels_last_and_repeats() -> None:
    pixels = torch.randint(0, 256, (2, 64, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    results = []
    for _ in range(2):
        torch.manual_seed(5)
        model = build_model("segformer:b0", 3).to(memory_format=torch.channels_last).train()
        x = model.normalise(pixels)
        labels = (x[:, 0, 2::4, 2::4] > 0).long()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        losses = []
        for _ in range(8):
            loss = F.cross_entropy(model(x).logits, labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert all(p.grad is not None for p in model.parameters())
        results.append(losses)
    assert results[0] == results[1]
    assert results[0][-1] < 0.8 * results[0][0]


def test_compiles_as_one_graph() -> None:
    torch.manual_seed(0)
    model = build_model("segformer:b0", 3).eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        compiled = torch.compile(lambda x: model(x, ["head"]), fullgraph=True, backend="eager")(x)
        assert torch.equal(compiled.logits, model(x).logits)


def test_without_the_extra_the_pip_command_is_named() -> None:
    code = (
        "import sys; sys.modules['transformers'] = None\n"
        "import importlib.util as u; real = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'transformers' else real(name, *a)\n"
        "from kdcache.models import build_model, missing_models\n"
        "print(missing_models())\n"
        "build_model('segformer:b0', 3)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "\"pip install '.[segformer]'\": ['segformer:b0'" in done.stdout
    assert "ModelError" in done.stderr
    assert "pip install '.[segformer]'" in done.stderr
