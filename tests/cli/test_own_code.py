"""Errors out of the user's own network are named as the network's, and a defect of kdcache stays one."""

from __future__ import annotations

from pathlib import Path

import pytest

from kdcache.errors import ModelError

NETWORKS = """
import torch
from torch import nn

from kdcache.models import SegmentationModel


class Plain(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.body, self.head = nn.Conv2d(3, 8, 3, 4, 1), nn.Conv2d(8, classes, 1)

    def forward(self, x):
        return self.head(self.middle(self.body(x)))

    def middle(self, x):
        return x


class Pooled(Plain):
    def __init__(self, classes):
        super().__init__(classes)
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8))

    def middle(self, x):
        return x + self.pool(x)


class Missing(Plain):
    def middle(self, x):
        return {}["attention"] if self.training else x


class InPlace(Plain):
    def forward(self, x):
        y = torch.sigmoid(self.body(x))
        z = self.head(y)
        y.add_(1)
        return z


class Detached(Plain):
    def middle(self, x):
        return x.detach()

    def forward(self, x):
        return super().forward(x).detach()


class OfOne(Plain):
    def middle(self, x):
        if len(x) > 1:
            raise ValueError("one image at a time")
        return x


class Bare(SegmentationModel):
    def __init__(self, classes):
        super().__init__(spec="", num_classes=classes, stride=4, taps=())
        self.plain = Plain(classes)

    def forward(self, x, taps=()):
        return self.plain(x)


def broken(num_classes):
    return Plain(num_classes + "0")

"""
KINDS = {"pooled": "Pooled", "missing": "Missing", "in_place": "InPlace", "detached": "Detached", "bare": "Bare"}
ONE_IMAGE = "ValueError in its layer pool.2 (BatchNorm2d)"


@pytest.fixture(scope="module")
def networks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("code") / "networks.py"
    functions = [
        f"\n\ndef {name}(num_classes):\n    return {kind}(num_classes)\n"
        for name, kind in (KINDS | {"of_one": "OfOne"}).items()
    ]
    path.write_text(NETWORKS + "".join(functions))
    return path


@pytest.mark.parametrize(
    ("name", "flags", "problem", "remedy"),
    [
        ("pooled", "--batch-size 1", ONE_IMAGE, "--batch-size 2 or more"),
        ("pooled", "--batch-size 2 --accumulate 2", ONE_IMAGE, "a smaller --accumulate"),
        ("missing", "--batch-size 2", "KeyError: 'attention', at ", "--debug"),
        ("in_place", "--batch-size 2", "Cannot go backward through the network", "operations in place"),
        ("detached", "--batch-size 2", "Cannot go backward through the network", "without a gradient"),
        ("bare", "--batch-size 2", "instead of Outputs", "torch.nn.Module"),
        ("broken", "--batch-size 2", "Cannot run your own code, at ", "--debug"),
    ],
)
def test_a_training_names_the_network(networks, cli, tmp_path, name, flags, problem, remedy) -> None:
    words = f"--data scenes:32x48,train=4,val=2 --model {networks}:{name} --size 32x48 --iterations 1 --device cpu"
    ended = cli("train-teacher", *words.split(), *flags.split(), "--out", tmp_path / "run")
    assert ended.code == 2
    assert problem in ended.err
    assert remedy in ended.err
    assert "defect of kdcache" not in ended.err
    assert "Traceback" not in ended.err


def test_builds_and_evaluations_name_the_network_and_debug_shows_its_traceback(networks, cli, tmp_path) -> None:
    from safetensors.torch import save_file

    from kdcache.models import build_model

    save_file(build_model(f"{networks}:of_one", 7).state_dict(), tmp_path / "w.safetensors")
    teacher = f"{networks}:of_one@{tmp_path / 'w.safetensors'}"
    words = ["--data", "scenes:32x48,train=4,val=2", "--size", "32x48", "--device", "cpu"]
    for verb in (("build-teacher-cache", "--teacher", teacher, "--out", tmp_path / "s.zarr"), ("evaluate", teacher)):
        ended = cli(*verb, *words)
        assert ended.code == 2
        assert f"Cannot run the network {networks}:of_one" in ended.err
        assert "ValueError" in ended.err
        assert "one image at a time, at " in ended.err
        with pytest.raises((ModelError, ValueError), match="one image at a time"):
            cli("--debug", *verb, *words)


def test_a_defect_of_kdcache_is_not_passed_on(cli, monkeypatch) -> None:
    monkeypatch.setattr("kdcache.data.check", divmod)
    ended = cli("data", "check", "scenes:32x48,train=4,val=2")
    assert ended.code == 2
    assert "defect of kdcache" in ended.err
