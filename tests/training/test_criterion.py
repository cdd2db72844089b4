"""The student is looked at before it is trained, and the look changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from kdcache.models import build_model
from kdcache.store import open_cache
from kdcache.training import CacheDataset, make_config, train
from kdcache.training.criterion import channel_moments, label_counts, tap_shapes


def test_a_look_at_the_taps_is_no_training(config, cache_path) -> None:
    student = config(
        verb="train-student", data=None, size="32x48", cache=str(cache_path), method="none", term=("pseudo",)
    )
    model = build_model("torchvision:lraspp_mobilenet_v3_large", 7).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    channels = {tap: shape[0] for tap, shape in tap_shapes(model, student).items()}
    assert set(channels) == set(model.taps)
    assert all(count > 0 for count in channels.values())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert torch.equal(torch.get_rng_state(), random)
    model.eval()
    tap_shapes(model, student)
    assert not model.training


def test_moments_are_those_of_the_stored_channels(make_cache: Callable[..., Path]) -> None:
    cache = open_cache(make_cache(features=("head",)))
    values = np.stack([cache.read(number, ["features/head"])["features/head"] for number in range(len(cache.ids))])
    mean, std = channel_moments(cache, "head", range(len(cache.ids)))
    assert np.allclose(mean, values.astype(np.float64).mean((0, 2, 3)), rtol=1e-6)
    expected = values.astype(np.float64).std((0, 2, 3))
    assert np.allclose(std, np.where(expected > 0, expected, 1), rtol=1e-5)


def test_a_run_with_standardised_features_resumes_to_the_bit(
    make_cache: Callable[..., Path], student: dict[str, Any], tmp_path: Path
) -> None:
    terms = ["hint,standardise=channels,distance=smooth-l1", "cosine,standardise=channels,projector=mlp"]
    settings = student | {"cache": str(make_cache(features=("head",))), "method": "none", "term": terms, "val": None}
    settings |= {"iterations": 4, "val_every": 2, "flip": True}
    train(make_config(**settings), tmp_path / "whole")
    train(make_config(**settings, keep_every=2), tmp_path / "kept")
    (tmp_path / "kept" / "checkpoints" / "step-000002.pt").replace(tmp_path / "kept" / "checkpoint.pt")
    train(make_config(**settings, keep_every=2), tmp_path / "kept", resume=True)
    one, two = (load_file(tmp_path / name / "last.safetensors") for name in ("whole", "kept"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_labels_are_counted_in_whole_images_only(make_cache: Callable[..., Path]) -> None:
    one, three = (open_cache(make_cache(views=views, view_scale=(1.5, 3.0))) for views in (1, 3))
    np.testing.assert_array_equal(label_counts(CacheDataset(three)), label_counts(CacheDataset(one)))
