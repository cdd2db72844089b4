"""The models that come with kdcache, read from a table: no model is built and torch is not imported.

`scripts/list-models` writes the table; `tests/models/test_listing.py` compares it with the models themselves.
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
"""Family, which is also the name of the extra that brings it -> the module that it is made of."""

TABLE = Path(__file__).parent / "models" / "listed.json"


@dataclass(frozen=True)
class TapInfo:
    """A feature on offer: its channels and its stride in pixels."""

    channels: int
    stride: int


@dataclass(frozen=True)
class ModelInfo:
    """One line of the list of models; parameters are counted at 21 classes."""

    spec: str
    parameters: int
    stride: int
    align_corners: bool
    taps: Mapping[str, TapInfo]
    heads: tuple[str, ...]


def list_models(pattern: str = "") -> list[ModelInfo]:
    """Models whose library is installed, by spec. For `smp:` these are examples: it has many more.

    Args:
        pattern: a part of the spec, any case.
    """
    return [info for info in _table(pattern) if not lacks(info.spec.partition(":")[0])]


def missing_models(pattern: str = "") -> dict[str, list[str]]:
    """Specs that need an extra, by the pip command that installs it; empty when all are there."""
    missing: dict[str, list[str]] = {}
    for info in _table(pattern):
        family = info.spec.partition(":")[0]
        if lacks(family):
            missing.setdefault(pip_command(family), []).append(info.spec)
    return missing


def listed_specs() -> list[str]:
    """The specs of all models of the table, also of those whose library is not installed."""
    return [info.spec for info in _all_models()]


def lacks(family: str) -> bool:
    """Whether the library that a family of models is made of is not installed."""
    return family in NEEDS and importlib.util.find_spec(NEEDS[family]) is None


def pip_command(family: str) -> str:
    """Return what installs the extra of a family of models, in a clone of kdcache."""
    return f"pip install '.[{family}]'"


def _table(pattern: str) -> list[ModelInfo]:
    return [info for info in _all_models() if pattern.lower() in info.spec.lower()]


@cache
def _all_models() -> tuple[ModelInfo, ...]:
    rows = json.loads(TABLE.read_text(encoding="utf-8"))
    return tuple(
        ModelInfo(
            **row | {"taps": {tap: TapInfo(**own) for tap, own in row["taps"].items()}, "heads": tuple(row["heads"])}
        )
        for row in rows
    )
