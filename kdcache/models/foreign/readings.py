"""Readings of the outputs of transformers' and timm's networks, built by kdcache or by the user."""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kdcache.errors import ModelError
from kdcache.heads import CategoricalHead, HeadKind, RegressionHead
from kdcache.models.foreign.answers import Reading
from kdcache.models.foreign.tokens import SUMMARY, maps_of
from kdcache.tasks import DEPTH, SEGMENTATION

_LEAST = 1e-12
_IN_METRES = ("glpn", "zoedepth")
"""Networks of transformers that predict metres, although their configuration does not say so."""


class Universal(Reading):
    """An adapter that turns the queries of a mask transformer into the log of each class's score at each position.

    A mask transformer (MaskFormer, Mask2Former, OneFormer) returns queries, each with class logits and a mask. The
    score is the sum over queries of the class's probability times the mask's probability at the position.

    Args:
        task: the tokens (1, N) of the sentence that names the task, for OneFormer. None for other networks.
    """

    def __init__(self, task: Tensor | None = None) -> None:
        super().__init__()
        self.task = task

    def call(self, network: nn.Module, x_B3HW: Tensor) -> object:
        """Return the network's return value for images (B, 3, H, W). OneFormer also gets the tokens of its task."""
        if self.task is None:
            return network(x_B3HW)
        return network(x_B3HW, task_inputs=self.task.to(x_B3HW.device).expand(len(x_B3HW), -1))

    def heads(self, spec: str, answer: Any) -> dict[str, Tensor]:
        """Return the log of each class's score, float32 (B, C, h, w), under the key `segmentation`.

        The score of a class is the sum over the queries of its probability * the query's mask. (h, w) is the size of
        these masks.

        Args:
            spec: the model's spec, for messages.
            answer: the result of `call`.
        Raises: ModelError if the network's return value has no queries.
        """
        classes, masks = (getattr(answer, f"{name}_queries_logits", None) for name in ("class", "masks"))
        if classes is None or masks is None:
            raise ModelError(
                f"Cannot read {type(answer).__name__} of {spec}: it has no class_queries_logits and "
                "masks_queries_logits",
                fix="Use another model, or ,task=features.",
            )
        p_BQC, mask_BQhw = classes.float().softmax(-1)[..., :-1], masks.float().sigmoid()
        return {SEGMENTATION: torch.einsum("bqc,bqhw->bchw", p_BQC, mask_BQhw).clamp_min(_LEAST).log()}

    def kinds(self, spec: str, heads: Mapping[str, Tensor]) -> dict[str, HeadKind]:
        """Return the kind of the head `segmentation`, with the number of classes.

        `heads` is the result of the method `heads`. `spec` is not used.
        """
        return {SEGMENTATION: CategoricalHead(heads[SEGMENTATION].shape[1])}


class DepthMap(Reading):
    """An adapter for a depth network of transformers. Depth is in metres if the configuration says so, else relative.

    Args:
        config: the network's configuration.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        metres = getattr(config, "depth_estimation_type", "") == "metric" or config.model_type in _IN_METRES
        most = getattr(config, "max_depth", None)
        self.kind = RegressionHead(
            unit="m" if metres else "relative",
            parameterisation="identity",
            max_depth=float(most) if metres and most else None,
        )

    def heads(self, spec: str, answer: Any) -> dict[str, Tensor]:
        """Return the depth (B, 1, h, w) in the network's return value, under the key `depth`.

        `answer` is the result of `call`. `spec` is not used.
        """
        depth = answer.predicted_depth
        return {DEPTH: depth if depth.ndim == 4 else depth[:, None]}

    def kinds(self, spec: str, heads: Mapping[str, Tensor]) -> dict[str, HeadKind]:
        """Return the kind of the head `depth`: values in metres, or relative ones. The arguments are not used."""
        return {DEPTH: self.kind}


class Maps(Reading):
    """An adapter for a backbone, which returns features and has no heads.

    Args:
        stages: names for the features, one for each stage of the backbone. Without names, features are numbered.
        hidden: True asks the network for the output of every block (`output_hidden_states`).
    """

    lists_modules = False

    def __init__(self, stages: Sequence[str] = (), *, hidden: bool = False) -> None:
        super().__init__({})
        self.stages = tuple(stages)
        self.hidden = hidden

    def call(self, network: nn.Module, x_B3HW: Tensor) -> object:
        """Return the network's return value for images (B, 3, H, W).

        If the attribute `hidden` is True, the network is asked to include the outputs of all its blocks.
        """
        return network(x_B3HW, output_hidden_states=True) if self.hidden else network(x_B3HW)

    def features(self, answer: object, size: tuple[int, int], patch: int | None) -> dict[str, Tensor]:
        """Return the features in a network's return value: tap -> (B, c, h, w).

        If `stages` has as many names as there are features, it names the taps. Otherwise, their names are those of
        `maps_of`, such as `stage1`.

        Args:
            answer: the network's return value, from `call`.
            size: (H, W) of the images.
            patch: the side in pixels of a transformer's patches. None if it has no patches.
        """
        maps = maps_of(answer, size, patch)
        return dict(zip(self.stages, maps.values(), strict=True)) if len(self.stages) == len(maps) else maps


class TimmMaps(Reading):
    """An adapter that calls a timm network without classifier for its intermediate features and a pooled feature."""

    lists_modules = False

    def __init__(self) -> None:
        super().__init__({})

    def call(self, network: Any, x_B3HW: Tensor) -> object:
        """Return the network's features for images (B, 3, H, W), as a dict: tap -> features.

        The tap `summary` has the pooled features, (B, c, 1, 1). The taps `stage1`, `stage2`, ... have (B, c, h, w).
        """
        names = network.forward_intermediates.__code__.co_varnames
        norm = {"norm": True} if "norm" in names else {}
        last, maps = network.forward_intermediates(x_B3HW, output_fmt="NCHW", **norm)
        return {SUMMARY: network.forward_head(last, pre_logits=True).flatten(1)[..., None, None]} | {
            f"stage{number}": y for number, y in enumerate(maps, start=1)
        }


def reading_of(network: nn.Module) -> Reading | None:
    """Return the adapter for a network of transformers or timm.

    Return None for other networks, and for networks that return logits.
    """
    library = type(network).__module__.partition(".")[0]
    if library == "timm" and hasattr(network, "forward_intermediates") and getattr(network, "num_classes", None) == 0:
        return TimmMaps()
    if library == "timm" and type(network).__module__ == "timm.models._features":
        return Maps()
    if "transformers" not in sys.modules:
        return None
    from transformers import PreTrainedModel

    if not isinstance(network, PreTrainedModel):
        return None
    return reading_as(task_of([type(network).__name__]), network)


def reading_as(task: str, network: Any, sentence: Tensor | None = None) -> Reading | None:
    """Return the adapter that calls a transformers network and reads its output, or None if it returns logits.

    Args:
        task: the network's task, as `task_of` returns it: `semantic` (logits, so the result is None), `depth`,
            `universal` (masks with classes) or `features` (only feature maps).
        network: the transformers model.
        sentence: the tokens (1, N) of the sentence that names the task, for OneFormer. None for other networks.
    Raises: ModelError for a OneFormer without `sentence`.
    """
    if task == "semantic":
        return None
    if task == "depth":
        return DepthMap(network.config)
    if task == "universal":
        if sentence is None and network.config.model_type == "oneformer":
            raise ModelError(
                f"Cannot run {type(network).__name__} without its tokenizer: it reads a sentence that names the task",
                fix="Save network and processor into one folder with save_pretrained, and give hf:FOLDER.",
            )
        return Universal(sentence)
    if hasattr(network, "out_features"):
        return Maps(network.out_features)
    return Maps(hidden=hasattr(network.config, "num_hidden_layers"))


def task_of(architectures: Sequence[str]) -> str:
    """Return the task of a network of transformers: `semantic`, `universal`, `depth`, or `features` for any other.

    `architectures` are names of transformers classes, as in the network's config.json. One known name is enough.
    """
    from transformers.models.auto import modeling_auto as tables

    for task, table in (
        ("semantic", tables.MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES),
        ("universal", tables.MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING_NAMES),
        ("depth", tables.MODEL_FOR_DEPTH_ESTIMATION_MAPPING_NAMES),
    ):
        if set(architectures) & set(table.values()):
            return task
    return "features"
