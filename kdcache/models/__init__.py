"""Segmentation networks: logits at their native stride, feature taps, weights.

    build_model("torchvision:fcn_resnet50", None, weights="default")     # a published teacher, 21 classes
    build_model("kdcache:tiny", 11)                                      # a small student
    build_model("my_models:build", 11, weights="run/best.safetensors")   # anything else

Importing this package imports torch, but no model zoo.
"""

from kdcache.model_table import ModelInfo, TapInfo, list_models, missing_models
from kdcache.models.class_map import ClassMapped, ClassMerge, count_sources, read_class_map
from kdcache.models.ensemble import EnsembleModel, Tta
from kdcache.models.foreign.wrapped import WrappedModel
from kdcache.models.logits import AsLogits
from kdcache.models.native import LoadReport, Outputs, SegmentationModel
from kdcache.models.probe import NotLogits, not_logits
from kdcache.models.registry import build_model, is_function
from kdcache.models.trust import trusting
from kdcache.models.weights import load_weights, read_state_dict, state_digest

__all__ = [
    "AsLogits",
    "ClassMapped",
    "ClassMerge",
    "EnsembleModel",
    "LoadReport",
    "ModelInfo",
    "NotLogits",
    "Outputs",
    "SegmentationModel",
    "TapInfo",
    "Tta",
    "WrappedModel",
    "build_model",
    "count_sources",
    "is_function",
    "list_models",
    "load_weights",
    "missing_models",
    "not_logits",
    "read_class_map",
    "read_state_dict",
    "state_digest",
    "trusting",
]
