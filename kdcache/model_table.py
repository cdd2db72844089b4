"""The models that come with kdcache, read from a table without building a model or importing torch.

`scripts/list-models` writes the table. `tests/models/test_listing.py` compares it with the models themselves.
"""

import importlib.util
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

NEEDS = {
    "segformer": "transformers",
    "smp": "segmentation_models_pytorch",
    "hf": "transformers",
    "timm": "timm",
    "ultralytics": "ultralytics",
}
"""A family of models (also the name of pip's extra that installs its library) -> the module that it imports."""

TABLE = Path(__file__).parent / "models" / "listed.json"


@dataclass(frozen=True)
class TapInfo:
    """A layer whose features can be stored: its number of channels, and its stride in pixels of the image."""

    channels: int
    stride: int


@dataclass(frozen=True)
class ModelInfo:
    """A model in the list of `kdcache models`.

    Attributes:
        spec: the name to build it by, such as `torchvision:fcn_resnet50`.
        parameters: the number of parameters, with 21 classes.
        stride: the native stride in pixels.
        align_corners: the flag `align_corners` of the model's last bilinear resize.
        taps: the layers whose features can be stored: name -> channels and stride.
        heads: the names of its heads, such as `segmentation`.
    """

    spec: str
    parameters: int
    stride: int
    align_corners: bool
    taps: Mapping[str, TapInfo]
    heads: tuple[str, ...]


def list_models(pattern: str = "") -> list[ModelInfo]:
    """Return the models whose libraries are installed, sorted as in `kdcache models`.

    `pattern` is a part of the spec, in upper or lower case. For `smp:` and other libraries with many models, the list
    holds examples only.
    """
    return [info for info in _table(pattern) if not lacks(info.spec.partition(":")[0])]


def missing_models(pattern: str = "") -> dict[str, list[str]]:
    """Return the models whose libraries are not installed: pip command that installs the library -> model specs.

    `pattern` is a part of the spec, in upper or lower case.
    """
    missing: dict[str, list[str]] = {}
    for info in _table(pattern):
        family = info.spec.partition(":")[0]
        if lacks(family):
            missing.setdefault(pip_command(family), []).append(info.spec)
    return missing


def listed_specs() -> list[str]:
    """Return the specs of all models that `kdcache models` can list, also if their libraries are not installed."""
    return [info.spec for info in _all_models()]


def lacks(family: str) -> bool:
    """Return True if a family of models, such as `timm`, needs a library that is not installed."""
    return family in NEEDS and importlib.util.find_spec(NEEDS[family]) is None


def pip_command(family: str) -> str:
    """Return the pip command, for a clone of kdcache, that installs the library of a family such as `timm`."""
    return f"pip install '.[{family}]'"


def _table(pattern: str) -> list[ModelInfo]:
    return [info for info in _all_models() if pattern.lower() in info.spec.lower()]


@cache
def _all_models() -> tuple[ModelInfo, ...]:
    rows = json.loads(TABLE.read_text(encoding="utf-8"))
    return tuple(
        ModelInfo(
            **row | {"taps": {tap: TapInfo(**info) for tap, info in row["taps"].items()}, "heads": tuple(row["heads"])}
        )
        for row in rows
    )
