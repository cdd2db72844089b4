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
"""Family, which is also the name of the extra that brings it -> the module that it is made of."""

TABLE = Path(__file__).parent / "models" / "listed.json"


@dataclass(frozen=True)
class TapInfo:
    """An available feature: its channels and its stride in pixels."""

    channels: int
    stride: int


@dataclass(frozen=True)
class ModelInfo:
    """One line of the list of models. Parameters are counted at 21 classes."""

    spec: str
    parameters: int
    stride: int
    align_corners: bool
    taps: Mapping[str, TapInfo]
    heads: tuple[str, ...]


def list_models(pattern: str = "") -> list[ModelInfo]:
    """Return the models with an installed library, by spec. For `smp:` these are examples of many more.

    `pattern` is a part of the spec, in any case.
    """
    return [info for info in _table(pattern) if not lacks(info.spec.partition(":")[0])]


def missing_models(pattern: str = "") -> dict[str, list[str]]:
    """Return the specs of models without an installed library: pip command that installs it -> specs.

    `pattern` is a part of the spec, in any case.
    """
    missing: dict[str, list[str]] = {}
    for info in _table(pattern):
        family = info.spec.partition(":")[0]
        if lacks(family):
            missing.setdefault(pip_command(family), []).append(info.spec)
    return missing


def listed_specs() -> list[str]:
    """Return the specs of all models of the table, even if their library is not installed."""
    return [info.spec for info in _all_models()]


def lacks(family: str) -> bool:
    """Return whether the library of a family of models is not installed."""
    return family in NEEDS and importlib.util.find_spec(NEEDS[family]) is None


def pip_command(family: str) -> str:
    """Return the command that installs the extra of a family of models, in a clone of kdcache."""
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
