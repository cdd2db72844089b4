"""Every flag of a verb arrives in the function that the verb calls, as the keyword of its name."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import kdcache.verbs
from kdcache.errors import RecipeError
from kdcache_cli.console import ERRORS

JUDGED = {"weights": "last", "size": "16x24", "fit": "squash", "window": "8x8", "stride": "4x4", "batch_size": 3}
COPIES = {"cache_dir": "c", "cache_bytes": "1MB"}
DATA = {"data": "d", "split": "s"}
FLAGS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "evaluate": (
        "evaluate run --data a --data b --split x --fold 0/2 --folds-by (.) --class-map m --at-size --min-depth 1 "
        "--max-depth 9 --depth-crop garg --fresh --threads 3 --device cpu --json j --markdown k --listing l",
        "evaluate",
        {
            **{"split": ["x"], "fold": "0/2", "folds_by": "(.)", "class_map": Path("m"), "at_size": True},
            **{"min_depth": 1.0, "max_depth": 9.0, "depth_crop": "garg", "fresh": True, "threads": 3, "device": "cpu"},
            **{"json_file": Path("j"), "markdown": Path("k"), "listing": Path("l"), **JUDGED},
        },
    ),
    "predict": (
        "predict run image --out o --depth-format npy --classes c --threads 3 --device cpu",
        "predict",
        {"depth_format": "npy", "classes": Path("c"), "threads": 3, "device": "cpu", **JUDGED},
    ),
    "verify": (
        "verify s --teacher t --teacher u --records 3 --seal z --data d --split s --class-map m --device cpu "
        "--cache-dir c --cache-bytes 1MB",
        "verify",
        {
            **{"teacher": ["t", "u"], "records": 3, "seal": "z", "class_map": Path("m"), "device": "cpu"},
            **DATA,
            **COPIES,
        },
    ),
    "inspect": ("inspect s --cache-dir c --cache-bytes 1MB", "inspect", COPIES),
    "card": ("inspect s --card --cache-dir c --cache-bytes 1MB", "card", COPIES),
    "audit": (
        "inspect s --teacher-report --data d --split s --out o --cache-dir c --cache-bytes 1MB",
        "audit",
        {"out": Path("o"), **DATA, **COPIES},
    ),
    "export": (
        "export run --out o.pt2 --format onnx --raw --weights last --size 16x24 --classes c --tolerance 0.5",
        "export",
        {
            **{"format": "onnx", "raw": True, "weights": "last", "size": "16x24", "classes": Path("c")},
            "tolerance": 0.5,
        },
    ),
    "export-pseudo-labels": (
        "export-pseudo-labels s --out o --quantile 0.5 --images --data d --split s --cache-dir c --cache-bytes 1MB",
        "export_pseudo_labels",
        {"threshold": None, "quantile": 0.5, "images": True, **DATA, **COPIES},
    ),
    "copy": (
        "copy s t --codec small --shard-records 8 --samples 3 --features a,b --feature-dtype uint8 --pixels source "
        "--license mit --private --worker 1/2 --take-over --cache-dir c --cache-bytes 1MB",
        "copy",
        {
            **{"codec": "small", "shard_records": 8, "samples": 3, "features": "a,b", "feature_dtype": "uint8"},
            **{"pixels": "source", "license": "mit", "private": True, "worker": "1/2", "take_over": True, **COPIES},
        },
    ),
}
_OF_JUDGED = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in JUDGED.items())


def plain(value: Any) -> Any:
    """A value as one types it: the parser may have read it already."""
    return "x".join(map(str, value)) if isinstance(value, tuple) else value


@pytest.mark.parametrize("name", FLAGS)
def test_every_flag_arrives(name: str, cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    line, function, expected = FLAGS[name]
    received: dict[str, Any] = {}

    def spy(*_: Any, **settings: Any) -> None:
        received.update(settings)
        ERRORS.print("a note of the work")
        raise RecipeError("Stopped by the spy", fix="Nothing.")

    monkeypatch.setattr(kdcache.verbs, function, spy)
    words = shlex.split(f"{line} {_OF_JUDGED if 'window' in expected else ''}")
    ended = cli(*words)
    assert "Stopped by the spy" in ended.err, ended.err
    assert "a note of the work" in ended.err
    assert {key: plain(received[key]) for key in expected} == {key: plain(value) for key, value in expected.items()}
    quiet = cli(*words, "--quiet")
    assert "Stopped by the spy" in quiet.err
    assert "a note of the work" not in quiet.err
