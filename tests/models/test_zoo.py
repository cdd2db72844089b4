"""Tiny random networks of the real libraries build into caches through the front door, and caches hold their values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import kdcache
from kdcache.data import from_dataset
from kdcache.teacher import load_teacher
from kdcache_kernels import pack

T = pytest.importorskip("transformers")
timm = pytest.importorskip("timm")
smp = pytest.importorskip("segmentation_models_pytorch")
torchvision = pytest.importorskip("torchvision")

C = 7
HALF = 2**-10
"""The rounding of float16, relative to a value."""
SWIN = {"embed_dim": 12, "depths": [1, 1, 1, 1], "num_heads": [1, 2, 2, 4], "window_size": 4, "image_size": 64}
FOUR = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]}
VIT = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
WIDE = VIT | {"intermediate_size": 64}
DPT = WIDE | {"num_hidden_layers": 4, "backbone_out_indices": [0, 1, 2, 3], "neck_hidden_sizes": [16, 16, 24, 32]}
DPT |= {"fusion_hidden_size": 16, "patch_size": 16, "image_size": 128}
BEIT = WIDE | {"num_hidden_layers": 4, "image_size": 128, "patch_size": 16, "out_indices": [1, 2, 3, 4]}
MASKS = {"hidden_dim": 32, "encoder_layers": 1, "decoder_layers": 2, "num_attention_heads": 2, "num_queries": 9}
MASKS |= {"dim_feedforward": 32, "encoder_feedforward_dim": 32}
LABELS = {"num_labels": C}


def swin(**stages: Any) -> Any:
    return T.SwinConfig(**SWIN, **stages)


def stages() -> list[str]:
    return ["stage1", "stage2", "stage3", "stage4"]


def depth_anything(**kind: Any) -> Any:
    backbone = T.Dinov2Config(
        **VIT | {"num_hidden_layers": 4}, image_size=70, patch_size=14, out_indices=[1, 2, 3, 4],
        reshape_hidden_states=False,
    )  # fmt: skip
    return T.DepthAnythingForDepthEstimation(
        T.DepthAnythingConfig(
            backbone_config=backbone, reassemble_hidden_size=32, neck_hidden_sizes=[8, 16, 24, 32],
            fusion_hidden_size=16, head_in_channels=16, head_hidden_size=8, patch_size=14, **kind,
        )
    )  # fmt: skip


def maskformer() -> Any:
    resnet = T.ResNetConfig(embedding_size=8, hidden_sizes=[8] * 4, depths=[1] * 4, out_features=["stage4"])
    detr = T.DetrConfig(
        d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=32, decoder_ffn_dim=32, num_queries=9, backbone_config=resnet, **LABELS,
        use_timm_backbone=False, use_pretrained_backbone=False,
    )  # fmt: skip
    config = {"backbone_config": swin(out_features=stages()), "decoder_config": detr}
    return T.MaskFormerForInstanceSegmentation(
        T.MaskFormerConfig(**config, fpn_feature_size=32, mask_feature_size=32, **LABELS)
    )


def upernet(backbone: Any, channels: int) -> Any:
    config = T.UperNetConfig(backbone_config=backbone, hidden_size=32, auxiliary_in_channels=channels, **LABELS)
    return T.UperNetForSemanticSegmentation(config)


@dataclass(frozen=True)
class Case:
    """A network, how its values are found without kdcache, and the size of its images."""

    make: Callable[[], nn.Module]
    live: Callable[[Any, Tensor], dict[str, Tensor]]
    size: tuple[int, int] = (96, 128)
    where: str = "hf"
    processor: Any = None


def logits(net: Any, x: Tensor) -> dict[str, Tensor]:
    answer = net(x)
    answer = answer["out"] if isinstance(answer, dict) and "out" in answer else getattr(answer, "logits", answer)
    return {"segmentation": answer}


def masks(net: Any, x: Tensor, **sentence: Tensor) -> dict[str, Tensor]:
    answer = net(x, **sentence)
    scores = answer.class_queries_logits.softmax(-1)[..., :-1], answer.masks_queries_logits.sigmoid()
    return {"segmentation": torch.einsum("bqc,bqhw->bchw", *scores).clamp(min=1e-12).log()}


def depth(net: Any, x: Tensor) -> dict[str, Tensor]:
    return {"depth": net(x).predicted_depth[:, None]}


def tokens(prefix: int) -> Callable[[Any, Tensor], dict[str, Tensor]]:
    def last(net: Any, x: Tensor) -> dict[str, Tensor]:
        base = getattr(net, "vit", net)
        patch = net.config.patch_size
        grid = x.shape[-2] // patch, x.shape[-1] // patch
        return {"last": base(x).last_hidden_state[:, prefix:].transpose(1, 2).unflatten(2, grid)}

    return last


def last_map(net: Any, x: Tensor) -> dict[str, Tensor]:
    return {"last": net(x).last_hidden_state}


def backbone(kind: str) -> Callable[[Any, Tensor], dict[str, Tensor]]:
    """The last stage of the library's backbone with the same weights."""

    def last(net: Any, x: Tensor) -> dict[str, Tensor]:
        net.config.out_features = net.config.stage_names[-1:]
        own = getattr(T, kind)(net.config).eval()
        names = set(own.state_dict())
        state = {name.removeprefix(f"{net.base_model_prefix}."): value for name, value in net.state_dict().items()}
        state = {name if name in names else f"{net.base_model_prefix}.{name}": value for name, value in state.items()}
        missing, _ = own.load_state_dict(state, strict=False)
        assert all("norm" in name for name in missing)
        return {f"stage{len(net.config.stage_names) - 1}": own(x).feature_maps[-1]}

    return last


def timm_last(net: Any, x: Tensor) -> dict[str, Tensor]:
    y = net.forward_features(x)
    if y.ndim == 3:
        grid = x.shape[-2] // 16, x.shape[-1] // 16
        y = y[:, net.num_prefix_tokens :].transpose(1, 2).unflatten(2, grid)
        return {"stage3": y}
    return {"": y if y.shape[1] == net.num_features else y.movedim(-1, 1)}


def listed(net: Any, x: Tensor) -> dict[str, Tensor]:
    return {f"stage{number}": y for number, y in enumerate(net(x), start=1)}


ONLY = (128, 128)
PATCH14 = (98, 126)
SMALL_VIT = {"img_size": 128, "embed_dim": 32, "depth": 3, "num_heads": 2}
SEMANTIC = {
    "segformer": Case(lambda: T.SegformerForSemanticSegmentation(T.SegformerConfig(
        hidden_sizes=[8, 16, 24, 32], depths=[1] * 4, decoder_hidden_size=32, **LABELS)), logits,
        processor=T.SegformerImageProcessor),
    "upernet-convnext": Case(lambda: upernet(T.ConvNextConfig(**FOUR, out_features=stages()), 24), logits),
    "upernet-swin": Case(lambda: upernet(swin(out_features=stages()), 48), logits),
    "beit": Case(lambda: T.BeitForSemanticSegmentation(T.BeitConfig(
        **BEIT, **LABELS, use_relative_position_bias=True, auxiliary_channels=16)), logits,
        processor=T.BeitImageProcessor),
    "data2vec": Case(lambda: T.Data2VecVisionForSemanticSegmentation(T.Data2VecVisionConfig(
        **BEIT, **LABELS, auxiliary_channels=16)), logits, ONLY),
    "dpt": Case(lambda: T.DPTForSemanticSegmentation(T.DPTConfig(**DPT, **LABELS)), logits,
        ONLY, processor=T.DPTImageProcessor),
    "mobilenet-v2": Case(lambda: T.MobileNetV2ForSemanticSegmentation(T.MobileNetV2Config(
        depth_multiplier=0.25, **LABELS)), logits, processor=T.MobileNetV2ImageProcessor),
    "mobilevit": Case(lambda: T.MobileViTForSemanticSegmentation(T.MobileViTConfig(
        hidden_sizes=[16, 16, 16], neck_hidden_sizes=[8, 8, 8, 8, 8, 8, 16], aspp_out_channels=16, **LABELS)), logits,
        processor=T.MobileViTImageProcessor),
    "mobilevit-v2": Case(lambda: T.MobileViTV2ForSemanticSegmentation(T.MobileViTV2Config(
        width_multiplier=0.25, aspp_out_channels=16, **LABELS)), logits),
    "mask2former": Case(lambda: T.Mask2FormerForUniversalSegmentation(T.Mask2FormerConfig(
        backbone_config=swin(out_features=stages()), feature_size=32, mask_feature_size=32, **MASKS, **LABELS)), masks,
        processor=T.Mask2FormerImageProcessor),
    "maskformer": Case(maskformer, masks),
    "oneformer": Case(lambda: T.OneFormerForUniversalSegmentation(T.OneFormerConfig(
        backbone_config=swin(out_features=stages()), conv_dim=32, mask_dim=32, **MASKS, **LABELS, is_training=False)),
        lambda net, x: masks(net, x, task_inputs=sentence())),
    "eomt": Case(lambda: T.EomtForUniversalSegmentation(T.EomtConfig(
        **VIT | {"num_hidden_layers": 4}, image_size=128, patch_size=16, num_queries=9, num_blocks=2,
        num_upscale_blocks=2, **LABELS)), masks, ONLY),
    "smp-unet": Case(lambda: smp.Unet("resnet18", encoder_weights=None, classes=C), logits, where="memory"),
    "smp-fpn": Case(lambda: smp.FPN("resnet18", encoder_weights=None, classes=C), logits, where="memory"),
    "smp-pspnet": Case(lambda: smp.PSPNet("resnet18", encoder_weights=None, classes=C), logits, where="memory"),
    "smp-dpt": Case(lambda: smp.DPT("tu-vit_tiny_patch16_224", encoder_weights=None, classes=C, dynamic_img_size=True,
        decoder_intermediate_channels=(16, 16, 24, 32), decoder_fusion_channels=16), logits, where="memory"),
    "torchvision-lraspp": Case(lambda: torchvision.models.segmentation.lraspp_mobilenet_v3_large(
        weights=None, weights_backbone=None, num_classes=C), logits, where="memory"),
}  # fmt: skip
DEPTH = {
    "dpt-depth": Case(lambda: T.DPTForDepthEstimation(T.DPTConfig(**DPT)), depth, ONLY),
    "depth-anything": Case(depth_anything, depth, PATCH14),
    "depth-anything-metric": Case(lambda: depth_anything(depth_estimation_type="metric", max_depth=20), depth, PATCH14),
    "glpn": Case(lambda: T.GLPNForDepthEstimation(T.GLPNConfig(
        hidden_sizes=[8, 16, 20, 32], depths=[1] * 4, decoder_hidden_size=16)), depth, processor=T.GLPNImageProcessor),
}  # fmt: skip
FEATURES = {
    "dinov2": Case(lambda: T.Dinov2Model(T.Dinov2Config(**VIT, image_size=70, patch_size=14)), tokens(1), PATCH14,
        processor=T.BitImageProcessor),
    "dinov2-backbone": Case(lambda: T.Dinov2Backbone(T.Dinov2Config(**VIT, image_size=70, patch_size=14)),
        lambda net, x: {"last": net(x).feature_maps[-1]}, PATCH14),
    "dinov2-registers": Case(lambda: T.Dinov2WithRegistersModel(T.Dinov2WithRegistersConfig(
        **VIT, image_size=70, patch_size=14)), tokens(5), PATCH14),
    "dinov3": Case(lambda: T.DINOv3ViTModel(T.DINOv3ViTConfig(
        **WIDE, image_size=64, patch_size=16, num_register_tokens=4)), tokens(5)),
    "dinov3-convnext": Case(lambda: T.DINOv3ConvNextModel(T.DINOv3ConvNextConfig(**FOUR)),
        backbone("DINOv3ConvNextBackbone")),
    "sam": Case(lambda: T.SamVisionModel(T.SamVisionConfig(
        hidden_size=32, output_channels=16, num_hidden_layers=2, num_attention_heads=2, image_size=128, patch_size=16,
        mlp_dim=64, global_attn_indexes=[1], window_size=4)), last_map, ONLY, processor=T.SamImageProcessor),
    "clip": Case(lambda: T.CLIPVisionModel(T.CLIPVisionConfig(**WIDE, image_size=128, patch_size=16)), tokens(1), ONLY,
        processor=T.CLIPImageProcessor),
    "siglip": Case(lambda: T.SiglipVisionModel(T.SiglipVisionConfig(**WIDE, image_size=128, patch_size=16)), tokens(0),
        ONLY, processor=T.SiglipImageProcessor),
    "vit": Case(lambda: T.ViTModel(T.ViTConfig(**WIDE, image_size=128)), tokens(1), ONLY,
        processor=T.ViTImageProcessor),
    "vit-classifier": Case(lambda: T.ViTForImageClassification(T.ViTConfig(**WIDE, image_size=128)), tokens(1), ONLY),
    "deit": Case(lambda: T.DeiTModel(T.DeiTConfig(**WIDE, image_size=128)), tokens(2), ONLY),
    "swin": Case(lambda: T.SwinModel(swin()), backbone("SwinBackbone")),
    "convnext": Case(lambda: T.ConvNextModel(T.ConvNextConfig(**FOUR)), backbone("ConvNextBackbone")),
    "convnext-v2": Case(lambda: T.ConvNextV2Model(T.ConvNextV2Config(**FOUR)), backbone("ConvNextV2Backbone")),
    "resnet": Case(lambda: T.ResNetModel(T.ResNetConfig(embedding_size=8, **FOUR)), backbone("ResNetBackbone")),
    "timm-vit": Case(lambda: timm.create_model(
        "vit_tiny_patch16_224", num_classes=0, dynamic_img_size=True, **SMALL_VIT), timm_last, where="timm"),
    "timm-resnet": Case(lambda: timm.create_model("resnet18", num_classes=0), timm_last, where="timm"),
    "timm-efficientnet": Case(lambda: timm.create_model("efficientnet_lite0", num_classes=0, global_pool=""),
        lambda net, x: {"stage5": net.forward_intermediates(x)[1][-1]}, where="timm"),
    "timm-convnext": Case(lambda: timm.create_model(
        "convnext_atto", num_classes=0, depths=[1] * 4, dims=[8, 16, 24, 32]), timm_last, where="timm"),
    "timm-vit-in-memory": Case(lambda: timm.create_model("vit_tiny_patch16_224", num_classes=0, **SMALL_VIT), timm_last,
        ONLY, where="memory"),
    "timm-features-only": Case(lambda: timm.create_model("resnet18", features_only=True), listed, where="memory"),
}  # fmt: skip
ZOO = SEMANTIC | DEPTH | FEATURES
QUICK = ("segformer", "upernet-convnext", "oneformer", "depth-anything", "dinov2", "sam", "convnext", "timm-vit")


class Pictures(torch.utils.data.Dataset[Any]):
    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> Any:
        rng = np.random.default_rng(index)
        return rng.integers(0, 255, (100, 130, 3), dtype=np.uint8), rng.integers(0, C, (100, 130), dtype=np.uint8)


def tokenizer() -> Any:
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    return T.CLIPTokenizer(vocab={word: number for number, word in enumerate(words)}, merges=[])


def sentence() -> Tensor:
    """What OneFormer's own processor makes of its task."""
    found = tokenizer()(["the task is semantic"], padding="max_length", max_length=77, truncation=True)
    return torch.tensor(found["attention_mask"]) * torch.tensor(found["input_ids"])


def saved(case: Case, name: str, folder: Path) -> tuple[Any, nn.Module]:
    """What a user gives as the teacher, and the network itself."""
    torch.manual_seed(0)
    net = case.make().eval()
    for layer in net.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):  # the libraries' own beginnings are so small that nothing shows
            nn.init.kaiming_normal_(layer.weight)
    if case.where == "memory":
        return net, net
    if case.where == "timm":
        from timm.models import save_for_hf

        arguments = SMALL_VIT if "vit" in name else {"depths": [1] * 4, "dims": [8, 16, 24, 32]}
        save_for_hf(
            net, str(folder), model_args=None if name in ("timm-resnet", "timm-efficientnet") else arguments,
            safe_serialization=True,
        )  # fmt: skip
        return f"hf:{folder}" if name == "timm-resnet" else f"timm:{folder}", net
    net.save_pretrained(folder)
    if case.processor is not None:
        case.processor().save_pretrained(folder)
    if name == "oneformer":
        tokenizer().save_pretrained(folder)
    return f"hf:{folder}", net


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in ZOO])
def test_a_network_builds_into_a_cache_of_its_own_values(name: str, tmp_path: Path) -> None:
    case = ZOO[name]
    split = from_dataset(Pictures(), classes=[f"class {number}" for number in range(C)])
    origin, net = saved(case, name, tmp_path / "model")
    classified = name in SEMANTIC
    teacher = load_teacher(origin, split, classified=classified)
    model = teacher.model
    with torch.inference_mode():
        found = case.live(net, torch.zeros(1, 3, *case.size))
    features = [tap or model.taps[-1] for tap in found] if name in FEATURES else []
    kdcache.build_cache(
        split, teacher, tmp_path / "c.zarr", size=case.size, views=1, progress=False, features=tuple(features),
        features_only=name in FEATURES, fit="pad" if name == "sam" else "squash",
    )  # fmt: skip
    cache = kdcache.open_cache(tmp_path / "c.zarr")
    pixels = torch.from_numpy(cache.read(1, ["pixels/image"])["pixels/image"])[None]
    with torch.inference_mode():
        x = own_input(case, net, pixels)
        live = case.live(net, x)
        for tap, value in live.items():
            if name in SEMANTIC:
                native = model(model.normalise(pixels)).logits
                resized = model.upsample(native, value.shape[-2:])
                torch.testing.assert_close(resized, value, rtol=1e-4, atol=1e-4 * float(value.abs().max()))
                if model.peeled:
                    assert native.shape[-1] < value.shape[-1]
                    again = nn.functional.interpolate(
                        native, value.shape[-2:], mode="bilinear", align_corners=model.align_corners
                    )
                    assert torch.equal(again, case.live(model.network, model.normalise(pixels))["segmentation"])
                stored, expected = cache.read(1, ["targets/segmentation/values"]), pack(native, C)[0]
            elif name in DEPTH:
                stored, expected = cache.read(1, ["targets/depth/values"]), value
            else:
                stored, expected = cache.read(1, [f"features/{tap or model.taps[-1]}"]), value
            (kept,) = (torch.from_numpy(array.astype(np.float32)) for array in stored.values())
            largest = float(expected.abs().max())
            assert largest > 0
            torch.testing.assert_close(kept, expected[0].float(), rtol=2 * HALF, atol=HALF * largest)


def own_input(case: Case, net: nn.Module, pixels: Tensor) -> Tensor:
    """What the library's own processor makes of pixels, which are not to be resized."""
    image = pixels[0].permute(2, 0, 1)
    if case.processor is not None:
        processor = case.processor()
        off = {name: False for name in ("do_resize", "do_center_crop", "do_pad") if hasattr(processor, name)}
        return processor(images=[image], return_tensors="pt", **off)["pixel_values"]
    published = getattr(net, "pretrained_cfg", {}) if "timm.models" in type(net).__module__ else {}
    mean = torch.tensor(published.get("mean", (0.485, 0.456, 0.406)))
    std = torch.tensor(published.get("std", (0.229, 0.224, 0.225)))
    return ((image / 255 - mean[:, None, None]) / std[:, None, None])[None]
