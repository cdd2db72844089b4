"""SegFormer B0 to B5 from transformers' modules (`pip install '.[segformer]'`), built from a configuration.

Tensors have the names of the published checkpoints (`segformer.encoder.block.0.0...`) in every state dict, whatever the
installed transformers calls its modules. So a run and a teacher's fingerprint survive its upgrades, the hub's files
load directly, and `from_pretrained` reads what is saved here.

The forward walks the stages, so taps need no hooks. transformers is imported when a model is built.
Source: Xie et al. 2021, arXiv 2105.15203, table 6.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdcache.errors import ModelError
from kdcache.models.native import Outputs, SegmentationModel
from kdcache.tasks import SEGMENTATION


@dataclass(frozen=True)
class _Size:
    widths: tuple[int, int, int, int]
    depths: tuple[int, int, int, int]
    decoder: int


_NARROW, _WIDE = (32, 64, 160, 256), (64, 128, 320, 512)
SIZES = {
    "b0": _Size(_NARROW, (2, 2, 2, 2), 256),
    "b1": _Size(_WIDE, (2, 2, 2, 2), 256),
    "b2": _Size(_WIDE, (3, 4, 6, 3), 768),
    "b3": _Size(_WIDE, (3, 4, 18, 3), 768),
    "b4": _Size(_WIDE, (3, 8, 27, 3), 768),
    "b5": _Size(_WIDE, (3, 6, 40, 3), 768),
}
NAMES = tuple(SIZES)
_STAGES = ("stage1", "stage2", "stage3", "stage4")

# Names in transformers 5 -> names in the published files, in this order.
_PUBLISHED = [
    (re.compile(pattern), name)
    for pattern, name in (
        (r"^segformer\.stages\.(\d+)\.patch_embeddings\.", r"segformer.encoder.patch_embeddings.\1."),
        (r"^segformer\.stages\.(\d+)\.blocks\.", r"segformer.encoder.block.\1."),
        (r"^segformer\.stages\.(\d+)\.layer_norm\.", r"segformer.encoder.layer_norm.\1."),
        (r"\.attention\.q_proj\.", ".attention.self.query."),
        (r"\.attention\.k_proj\.", ".attention.self.key."),
        (r"\.attention\.v_proj\.", ".attention.self.value."),
        (r"\.attention\.sequence_reduction\.sequence_reduction\.", ".attention.self.sr."),
        (r"\.attention\.sequence_reduction\.layer_norm\.", ".attention.self.layer_norm."),
        (r"\.attention\.o_proj\.", ".attention.output.dense."),
        (r"\.mlp\.fc1\.", ".mlp.dense1."),
        (r"\.mlp\.fc2\.", ".mlp.dense2."),
        (r"\.layernorm_before\.", ".layer_norm_1."),
        (r"\.layernorm_after\.", ".layer_norm_2."),
        (r"^decode_head\.linear_projections\.", "decode_head.linear_c."),
    )
]


class SegFormer(SegmentationModel):
    """A SegFormer: a Mix Transformer encoder and an all-MLP head, with logits at stride 4.

    Taps: `stage1` to `stage4` at strides 4, 8, 16 and 32, and `head`, the classifier's input before dropout. Stochastic
    depth (up to 0.1) and dropout (0.1) are active in training mode only.

    Args:
        name: the part of a spec after the colon, such as `b0`.
        num_classes: the number of classes.
        network: the network of transformers, whose encoder and head become attributes.
    """

    segformer: nn.Module
    decode_head: nn.Module

    def __init__(self, name: str, num_classes: int, network: nn.Module) -> None:
        super().__init__(
            spec=f"segformer:{name}",
            num_classes=num_classes,
            stride=4,
            taps=(*_STAGES, "head"),
            backbone_prefix="segformer.",
            classifier_keys=classifier_keys(name),
        )
        self.segformer = network.get_submodule("segformer")
        self.decode_head = network.get_submodule("decode_head")
        self.register_state_dict_post_hook(_publish)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(_unpublish)  # type: ignore[no-untyped-call]

    def forward(self, x_B3HW: Tensor, taps: Sequence[str] = ()) -> Outputs:
        """Return the logits (B, C, h, w) at stride 4, and the features of the given taps.

        `x_B3HW` is normalised float RGB.
        """
        self.check_taps(taps)
        features: dict[str, Tensor] = {}
        x = x_B3HW
        for name, stage in zip(_STAGES, self.segformer.stages, strict=True):  # type: ignore[arg-type]
            x = features[name] = stage(x)
        logits, features["head"] = self._head([features[name] for name in _STAGES])
        return Outputs({SEGMENTATION: logits}, {tap: features[tap] for tap in taps})

    def _head(self, stages: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Return the logits, and the features that the classifier reads.

        This repeats transformers' SegformerDecodeHead, which returns the logits only.
        """
        head: Any = self.decode_head
        size = stages[0].shape[-2:]
        same = []
        for x_Bchw, project in zip(stages, head.linear_projections, strict=True):
            x = project(x_Bchw).transpose(1, 2).reshape(x_Bchw.shape[0], -1, *x_Bchw.shape[-2:])
            same.append(F.interpolate(x, size=size, mode="bilinear", align_corners=False))
        fused = head.activation(head.batch_norm(head.linear_fuse(torch.cat(same[::-1], dim=1))))
        return head.classifier(head.dropout(fused)), fused

    def adopt_names(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors `state` of a weights file (name -> tensor), renamed to NVIDIA's names.

        Files that transformers 5 wrote have other names.
        """
        return {_published(name): value for name, value in state.items()}


def classifier_keys(name: str) -> tuple[str, ...]:
    """Return the prefixes, in the state dict, of the layers whose output channels are the classes.

    `name` is the part of a spec after the colon, such as `b0`.
    """
    return ("decode_head.classifier.",)


def build(name: str, num_classes: int) -> SegmentationModel:
    """Build a SegFormer with random weights. Nothing is downloaded.

    `name` is the part of a spec after the colon: `b0` to `b5`. Any other name raises KeyError.

    Raises: ModelError if the installed transformers is too old.
    """
    from transformers import SegformerConfig, SegformerForSemanticSegmentation

    size = SIZES[name]
    settings: dict[str, Any] = {
        "hidden_sizes": size.widths,
        "depths": size.depths,
        "decoder_hidden_size": size.decoder,
        "num_labels": num_classes,
        "drop_path_rate": 0.1,
        "classifier_dropout_prob": 0.1,
    }
    network = SegformerForSemanticSegmentation(SegformerConfig(**settings))
    if not hasattr(network.segformer, "stages"):
        import transformers

        raise ModelError(
            f"Cannot build segformer:* with transformers {transformers.__version__}: its modules have other names",
            fix="In a clone of kdcache: pip install -U '.[segformer]'",
        )
    return SegFormer(name, num_classes, network)


def default_state(name: str, whole: bool) -> dict[str, Tensor]:
    """Return NVIDIA's published weights (for research only): name -> tensor. They are downloaded once.

    Args:
        name: the part of a spec after the colon, such as `b0`.
        whole: True asks for encoder and head, trained on ADE20K's 150 classes. False asks for the encoder only, trained
            on ImageNet.
    Raises: ModelError if they cannot be downloaded.
    """
    from kdcache.models.architectures.hub import download_state

    return download_state(_repository(name, whole))


def default_names(name: str) -> tuple[str, ...]:
    """Return the class names of the model's published weights, in the order of the class ids.

    `name` is the part of a spec after the colon, such as `b0`. The names are downloaded from the Hugging Face Hub.
    Returns () if that fails, or if the Hub has no names.
    """
    from kdcache.models.architectures.hub import download_names

    return download_names(_repository(name, whole=True))


def _repository(name: str, whole: bool) -> str:
    side = 640 if name == "b5" else 512
    return f"nvidia/segformer-{name}-finetuned-ade-{side}-{side}" if whole else f"nvidia/mit-{name}"


def _published(name: str) -> str:
    for pattern, replacement in _PUBLISHED:
        name = pattern.sub(replacement, name)
    return name


def _publish(_module: nn.Module, state: dict[str, Any], prefix: str, _metadata: dict[str, Any]) -> None:
    for key in [k for k in state if k.startswith(prefix)]:
        state[prefix + _published(key[len(prefix) :])] = state.pop(key)


def _unpublish(module: nn.Module, state: dict[str, Any], prefix: str, *_rest: object) -> None:
    names = [name for name, _ in (*module.named_parameters(), *module.named_buffers())]
    for name in names:
        if (key := prefix + _published(name)) in state:
            state[prefix + name] = state.pop(key)
