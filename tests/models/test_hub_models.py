"""Models of transformers and timm as they come: folders, the local cache, processors, and what is wrong with them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import kdcache
from kdcache.data import from_dataset
from kdcache.errors import MismatchError, ModelError
from kdcache.heads import RegressionHead
from kdcache.models import build_model, trusting
from kdcache.models.foreign.hub_spec import parse_hub
from kdcache.models.foreign.image_settings import image_settings
from kdcache.teacher import fingerprint, load_teacher

T = pytest.importorskip("transformers")
timm = pytest.importorskip("timm")

NAMES = ("sky", "road", "car")
VIT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
CPU = torch.device("cpu")
CODE = """
from pathlib import Path
Path(__file__).with_name("ran").touch()
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

class OwnConfig(PretrainedConfig):
    model_type = "own"

class Own(PreTrainedModel):
    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        self.stem = nn.Conv2d(3, 8, 3, 4, 1)
        self.post_init()

    def forward(self, x):
        return BaseModelOutput(last_hidden_state=self.stem(x))
"""


class Pictures(torch.utils.data.Dataset[Any]):
    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> Any:
        rng = np.random.default_rng(index)
        return rng.integers(0, 255, (60, 80, 3), dtype=np.uint8), rng.integers(0, 3, (60, 80), dtype=np.uint8)


SPLIT = from_dataset(Pictures(), classes=list(NAMES))


def segformer(folder: Path, names: tuple[str, ...] = NAMES) -> str:
    torch.manual_seed(0)
    named = dict(enumerate(names))
    config = T.SegformerConfig(
        hidden_sizes=[8, 16, 24, 32], depths=[1] * 4, decoder_hidden_size=16, num_labels=len(names), id2label=named,
        label2id={name: number for number, name in named.items()},
    )  # fmt: skip
    T.SegformerForSemanticSegmentation(config).save_pretrained(folder)
    T.SegformerImageProcessor().save_pretrained(folder)
    return f"hf:{folder}"


def dinov2(folder: Path) -> str:
    torch.manual_seed(0)
    T.Dinov2Model(T.Dinov2Config(**VIT, image_size=70, patch_size=14)).save_pretrained(folder)
    return f"hf:{folder}"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty local cache of the hub, without a network."""
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def cached(hub: Path, name: str, sha: str, source: Path) -> None:
    repository = hub / f"models--{name.replace('/', '--')}"
    shutil.copytree(source, repository / "snapshots" / sha)
    (repository / "refs").mkdir(exist_ok=True)
    (repository / "refs" / "main").write_text(sha)


def test_specs_are_read_and_mistakes_named() -> None:
    spec = parse_hub("hf:own/net,task=features,revision=0123abc")
    assert (spec.place, spec.task, spec.revision) == ("own/net", "features", "0123abc")
    assert parse_hub("timm:resnet18,weights=a/b.safetensors").weights == "a/b.safetensors"
    for wrong, words in (
        ("hf:own/net,tusk=features", "Unknown option tusk=features"),
        ("hf:own/net,task=classes", "Unknown task 'classes'"),
        ("hf:", "Missing name"),
    ):
        with pytest.raises(ModelError, match=words):
            parse_hub(wrong)
    with pytest.raises(ModelError, match=r"Unknown model of timm: resnet81[\s\S]*resnet"):
        build_model("timm:resnet81", None)
    with pytest.raises(ModelError, match="Folder not found"):
        load_teacher("hf:./nothing", SPLIT)


def test_class_names_are_compared(tmp_path: Path) -> None:
    teacher = load_teacher(segformer(tmp_path / "a"), SPLIT)
    assert teacher.notes == ()
    assert teacher.size == (512, 512)  # of its own processor
    with pytest.raises(MismatchError, match=r"class 1 is car[\s\S]*class-map"):
        load_teacher(segformer(tmp_path / "b", ("sky", "car", "road")), SPLIT)
    with pytest.raises(ModelError, match="has 2 classes, but the data set has 3"):
        load_teacher(segformer(tmp_path / "c", ("sky", "road")), SPLIT)


def test_processors_become_mean_and_std(tmp_path: Path) -> None:
    """What kdcache feeds a network is what the library's own processor makes of the same pixels."""
    pixels = torch.randint(0, 256, (1, 32, 32, 3), dtype=torch.uint8)
    settings = {
        "half": T.ViTImageProcessor(),
        "not normalised": T.ViTImageProcessor(do_normalize=False),
        "rescaled otherwise": T.ViTImageProcessor(rescale_factor=1 / 127.5, image_mean=[1.0] * 3, image_std=[1.0] * 3),
        "not rescaled": T.ViTImageProcessor(do_rescale=False, image_mean=[120.0] * 3, image_std=[60.0] * 3),
        "blue first": T.MobileViTImageProcessor(),
    }
    for name, processor in settings.items():
        processor.save_pretrained(tmp_path / name)
        found, notes = image_settings(tmp_path / name)
        assert notes == []
        model = build_model("kdcache:tiny", 2, mean=found.mean, std=found.std)
        fed = model.normalise(pixels)
        off = {"do_resize": False} | ({"do_center_crop": False} if name == "blue first" else {})
        own = processor(images=[pixels[0].permute(2, 0, 1)], return_tensors="pt", **off)["pixel_values"]
        torch.testing.assert_close(fed.flip(1) if found.channels == "bgr" else fed, own, rtol=1e-5, atol=1e-5)
    (tmp_path / "none").mkdir()
    assert "ImageNet's mean and std are used" in image_settings(tmp_path / "none")[1][0]
    (tmp_path / "none" / "preprocessor_config.json").write_text('{"do_color_quantize": true}')
    with pytest.raises(ModelError, match="replaces colours by clusters"):
        image_settings(tmp_path / "none")


def test_code_of_a_repository_runs_only_if_it_is_allowed(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    (tmp_path / "own.py").write_text(CODE)
    code = {"AutoConfig": "own.OwnConfig", "AutoModel": "own.Own"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": code}))
    save_file({"stem.weight": torch.randn(8, 3, 3, 3), "stem.bias": torch.zeros(8)}, tmp_path / "model.safetensors",
              metadata={"format": "pt"})  # fmt: skip
    with pytest.raises(ModelError, match=r"you have not allowed it[\s\S]*own\.Own[\s\S]*--trust"):
        load_teacher(f"hf:{tmp_path}", SPLIT, classified=False)
    with trusting():
        assert load_teacher(f"hf:{tmp_path}", SPLIT, classified=False).model.taps == ("last",)


def test_weights_that_lack_a_part_are_named(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    origin, file = dinov2(tmp_path), tmp_path / "model.safetensors"
    save_file({k: v for k, v in load_file(file).items() if "layer.1." not in k}, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks \d+ of its tensors[\s\S]*layer\.1\."):
        load_teacher(origin, SPLIT, classified=False)


def test_safetensors_come_first_and_pickled_files_bring_tensors_alone(tmp_path: Path) -> None:
    origin = segformer(tmp_path)
    known = fingerprint(load_teacher(origin, SPLIT), "float32", CPU)
    model = T.SegformerForSemanticSegmentation.from_pretrained(tmp_path)
    torch.save({"anything": Path("of a class")}, tmp_path / "pytorch_model.bin")
    assert fingerprint(load_teacher(origin, SPLIT), "float32", CPU) == known
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="Cannot load"):
        load_teacher(origin, SPLIT)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    assert fingerprint(load_teacher(origin, SPLIT), "float32", CPU) == known


def test_offline_the_local_cache_is_read(hub: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"Cannot find own/net[\s\S]*not in the local cache[\s\S]*hf:FOLDER"):
        load_teacher("hf:own/net", SPLIT)
    segformer(tmp_path / "net")
    cached(hub, "own/net", "a" * 40, tmp_path / "net")
    first = fingerprint(load_teacher("hf:own/net", SPLIT), "float32", CPU)
    assert first.processor is not None
    assert first.processor.revision == "a" * 40
    cached(hub, "own/net", "b" * 40, tmp_path / "net")
    moved = fingerprint(load_teacher("hf:own/net", SPLIT), "float32", CPU)
    (difference,) = first.differences(moved)
    assert difference.startswith(f"processor.revision: {'a' * 12}... against {'b' * 12}...")
    assert f",revision={'a' * 40}" in difference
    pinned = fingerprint(load_teacher(f"hf:own/net,revision={'a' * 40}", SPLIT), "float32", CPU)
    assert pinned == first


def test_depth_is_relative_unless_its_configuration_says_metres(tmp_path: Path) -> None:
    config = T.GLPNConfig(hidden_sizes=[8, 16, 20, 32], depths=[1] * 4, decoder_hidden_size=16, max_depth=10)
    T.GLPNForDepthEstimation(config).save_pretrained(tmp_path)
    model = build_model(f"hf:{tmp_path}", None, weights="default")
    assert model.head_kinds == {"depth": RegressionHead(parameterisation="identity", max_depth=10.0)}


def test_a_processor_that_pads_asks_for_padding(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = T.SamVisionConfig(
        hidden_size=16, output_channels=8, num_hidden_layers=1, num_attention_heads=2, image_size=64, patch_size=16,
        mlp_dim=16, global_attn_indexes=[0], window_size=2,
    )  # fmt: skip
    T.SamVisionModel(config).save_pretrained(tmp_path / "sam")
    T.SamImageProcessor(size={"longest_edge": 64}, pad_size={"height": 64, "width": 64}).save_pretrained(
        tmp_path / "sam"
    )
    out = {"views": 1, "features_only": True, "features": ("last",), "progress": False}
    with pytest.raises(ModelError, match=r"padded images[\s\S]*fit='pad'"):
        kdcache.build_cache(SPLIT, f"hf:{tmp_path / 'sam'}", tmp_path / "s.zarr", fit="squash", **out)
    with pytest.raises(ModelError, match=r"cannot take images of 48x64[\s\S]*size='64x64'"):
        kdcache.build_cache(SPLIT, f"hf:{tmp_path / 'sam'}", tmp_path / "s.zarr", fit="pad", size=(48, 64), **out)
    assert not (tmp_path / "s.zarr").exists()
    built = kdcache.build_cache(SPLIT, f"hf:{tmp_path / 'sam'}", tmp_path / "s.zarr", fit="pad", **out).manifest
    assert built.view.size == (64, 64)
    assert built.teacher.processor is not None
    assert (built.teacher.processor.pads, built.teacher.processor.positions) == (True, True)


class Dot(torch.utils.data.Dataset[Any]):
    """A bright dot on a dark image."""

    def __init__(self, height: int, width: int, at: tuple[float, float]) -> None:
        y, x = np.mgrid[0:height, 0:width] + 0.5
        light = 255 * np.exp(-((y - at[0]) ** 2 + (x - at[1]) ** 2) / (2 * 18**2))
        self.image = np.repeat(light.astype(np.uint8)[..., None], 3, 2)

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> Any:
        return self.image, np.zeros(self.image.shape[:2], np.uint8)


class Patches(nn.Module):
    """Brightness of every 14 x 14 pixels, as tokens after a class token."""

    def __init__(self) -> None:
        super().__init__()
        self.kdcache_heads: dict[str, Any] = {}
        self.mean, self.std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
        self.embed = nn.Conv2d(3, 1, 14, 14, bias=False)
        nn.init.constant_(self.embed.weight, 1 / (3 * 14 * 14))

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.embed(x).flatten(2).transpose(1, 2)
        return torch.cat([tokens[:, :1], tokens], 1)


def test_a_dot_lies_where_its_patch_does(tmp_path: Path) -> None:
    """E4: patches that do not cover the image would shift it; a size that they cover keeps its centre."""
    at = (71.0, 103.0)
    out = {"views": 1, "features_only": True, "features": ("last",), "progress": False}
    split = from_dataset(Dot(144, 192, at), classes=["a", "b"])
    with pytest.raises(ModelError, match=r"144x192[\s\S]*size='140x196'"):
        kdcache.build_cache(split, Patches(), tmp_path / "d.zarr", size=(144, 192), **out)
    assert not (tmp_path / "d.zarr").exists()
    split = from_dataset(Dot(140, 196, at), classes=["a", "b"])
    kdcache.build_cache(split, Patches(), tmp_path / "d.zarr", size=(140, 196), **out)
    light = kdcache.open_cache(tmp_path / "d.zarr").read(0, ["features/last"])["features/last"][0].astype(np.float64)
    assert light.shape == (10, 14)
    for axis, (side, centre) in enumerate(zip((140, 196), at, strict=True)):
        cells = (np.arange(light.shape[axis]) + 0.5) * side / light.shape[axis]
        assert abs((light.sum(1 - axis) * cells).sum() / light.sum() - centre) <= 0.5


def test_a_folder_of_smp_is_named_as_one(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"_model_class": "Unet", "encoder_name": "resnet18", "classes": 3}')
    with pytest.raises(ModelError, match="names none of transformers or timm") as raised:
        load_teacher(f"hf:{tmp_path}", SPLIT)
    assert f"smp:unet-resnet18@{tmp_path}" in raised.value.fix


def test_a_backbone_is_told_how_it_gets_classes(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="Nothing to learn: timm:resnet18") as raised:
        kdcache.train(tmp_path / "run", model="timm:resnet18", data="scenes:64x64,train=4,val=2", size=(64, 64))
    assert raised.value.fix == "Choose a model with classes: model='smp:unet-tu-resnet18'"


def test_a_file_of_timm_may_have_its_classifier(tmp_path: Path) -> None:
    """As the files that timm publishes."""
    whole = timm.create_model("resnet18", num_classes=1000)
    torch.save(whole.state_dict(), tmp_path / "whole.pth")
    model = build_model(f"timm:resnet18,weights={tmp_path / 'whole.pth'}", None, weights="default")
    own = model.state_dict()
    assert not any(name.startswith("fc.") for name in own)
    assert torch.equal(own["layer4.1.conv2.weight"], whole.state_dict()["layer4.1.conv2.weight"])
