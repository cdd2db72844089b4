"""Models with a depth head: its spelling, its place, its weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdcache.errors import ModelError
from kdcache.heads import CategoricalHead, RegressionHead
from kdcache.metrics.cost import count_flops
from kdcache.models import ClassMapped, build_model, list_models, load_weights
from kdcache.models.added_heads import split_depth
from kdcache.models.run import load_run, write_run_model, write_weights
from kdcache.models.trust import check_trusted
from kdcache.run_folder import RunModel

SPEC = "kdcache:tiny+depth,tap=stage2,as=exp,max=10"


@pytest.mark.parametrize(
    ("spec", "model", "added", "tap", "head"),
    [
        ("kdcache:tiny+depth", "kdcache:tiny", True, None, RegressionHead()),
        (SPEC, "kdcache:tiny", True, "stage2", RegressionHead(parameterisation="exp", max_depth=10)),
        ("kdcache:hydra,max=5.5", "kdcache:hydra", False, None, RegressionHead(max_depth=5.5)),
        ("a+b,c/m.py:f+depth,tap=x.1", "a+b,c/m.py:f", True, "x.1", RegressionHead()),
        ("timm:net,weights=a/f.pth+depth,tap=s4", "timm:net,weights=a/f.pth", True, "s4", RegressionHead()),
        ("hf:a+depths/net,task=features+depth", "hf:a+depths/net,task=features", True, None, RegressionHead()),
    ],
)
def test_the_spelling(spec, model, added, tap, head) -> None:
    base, depth = split_depth(spec)
    assert depth is not None
    assert (base, depth.added, depth.tap, depth.head) == (model, added, tap, head)


@pytest.mark.parametrize("spec", ["kdcache:tiny", "a+b,c/m.py:f", "smp:unet-tu-resnet18", "hf:a+depth/net"])
def test_a_spec_without_depth_is_left_as_it_is(spec) -> None:
    assert split_depth(spec) == (spec, None)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("kdcache:tiny+dept", "For example kdcache:tiny.depth"),
        ("kdcache:tiny+depth,mx=3", "'mx=3'"),
        ("kdcache:tiny+depth,max=", "'max='"),
        ("kdcache:tiny+depth,max=3,max=4", "'max=4'"),
        ("kdcache:tiny+depth,max=far", "far"),
        ("kdcache:tiny+depth,max=-1", "above 0"),
        ("kdcache:tiny+depth,as=relu", "softplus or exp, not relu"),
        ("kdcache:hydra,tap=head", "'tap=head'"),
        ("kdcache:tiny+depth,tap=hed", "Did you mean head"),
        ("kdcache:tiny,max=10", "Write kdcache:tiny.depth"),
        ("kdcache:hydra+depth", "Write kdcache:hydra"),
        ("timm:resnet18+depth,tp=stage4", "'tp=stage4'"),
    ],
)
def test_mistakes_are_named(spec, message) -> None:
    with pytest.raises(ModelError, match=message):
        build_model(spec, 3)


def test_the_model_stays_as_it_is_under_its_depth_head() -> None:
    torch.manual_seed(0)
    plain = build_model("kdcache:tiny", 5).eval()
    torch.manual_seed(0)
    model = build_model(SPEC, 5).eval()
    x = torch.randn(2, 3, 64, 96)
    with torch.inference_mode():
        outputs, alone = model(x, ["stage1"]), plain(x, ["stage1", "stage2"])
        torch.testing.assert_close(outputs.logits, alone.logits)
        assert list(outputs.features) == ["stage1"]
        torch.testing.assert_close(outputs.heads["depth"], model.depth_head(alone.features["stage2"]))
    assert outputs.heads["depth"].shape == (2, 1, 8, 12)
    assert model.head_kinds["segmentation"] == CategoricalHead(5)
    assert model.regressions == {"depth": RegressionHead(parameterisation="exp", max_depth=10)}
    own = [name for name in model.state_dict() if name.startswith("depth_head.")]
    assert set(model.state_dict()) == {*plain.state_dict(), *own}
    assert own


@pytest.mark.parametrize(
    "spec", ["kdcache:tiny+depth", "kdcache:tiny+depth,as=exp", "kdcache:hydra", "kdcache:hydra,max=8"]
)
def test_a_head_begins_at_an_eighth_of_the_largest_depth(spec) -> None:
    torch.manual_seed(1)
    model = build_model(spec, 3).eval()
    head = model.regressions["depth"]
    with torch.inference_mode():
        depth = head.values(model(torch.randn(2, 3, 64, 64)).heads["depth"])
    assert head.max_depth is not None
    torch.testing.assert_close(depth, torch.full_like(depth, head.max_depth / 8), rtol=0.5, atol=0)


def test_both_heads_learn() -> None:
    """Every parameter of a shared network gets a gradient, and both losses fall."""
    for spec in ("kdcache:hydra,as=exp,max=10", "kdcache:tiny+depth,as=exp,max=10"):
        torch.manual_seed(0)
        model = build_model(spec, 2)
        x = torch.randn(4, 3, 48, 64)
        label = (F.avg_pool2d(x[:, 0], 4) > 0).long()
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        losses = []
        for _ in range(30):
            outputs = model(x)
            depth = model.regressions["depth"].values(outputs.heads["depth"])[:, 0]
            seg, reg = F.cross_entropy(outputs.logits, label), (depth - 1 - label).abs().mean()
            optimizer.zero_grad()
            (seg + reg).backward()
            assert all(p.grad is not None for p in model.parameters())
            optimizer.step()
            losses.append((seg.item(), reg.item()))
        assert all(last < 0.9 * first for first, last in zip(losses[0], losses[-1], strict=True))


def test_hydra_costs_little_more_than_one_network() -> None:
    two, one = ("kdcache:tiny", "kdcache:tiny+depth"), "kdcache:hydra"
    for size in ((96, 128), (288, 384)):
        flops = {spec: count_flops(build_model(spec, 11).eval(), size) for spec in (*two, one)}
        assert flops[one] <= 0.6 * sum(flops[spec] for spec in two)


def test_hydra_is_listed_with_its_heads_and_taps() -> None:
    info = {info.spec: info for info in list_models()}["kdcache:hydra"]
    assert info.heads == ("segmentation", "depth")
    assert list(info.taps) == ["stage1", "stage2", "stage3", "stage4", "depth", "head"]
    assert (info.taps["depth"].channels, info.taps["depth"].stride) == (24, 4)


@pytest.mark.parametrize("spec", [SPEC, "timm:test_resnet+depth,tap=stage2,max=10"])
def test_a_run_keeps_its_heads(tmp_path: Path, spec: str) -> None:
    model = build_model(spec, 2)
    description = RunModel(
        spec=spec, class_names=("a", "b"), class_colours=((0, 0, 0), (1, 1, 1)), size=(64, 64),
        mean=model.mean, std=model.std, heads=model.regressions,
    )  # fmt: skip
    write_run_model(tmp_path, description)
    write_weights(tmp_path, "best", model)
    again, description_again = load_run(tmp_path)
    assert description_again == description
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(again(x).heads["depth"], model.eval()(x).heads["depth"])
    content = json.loads((tmp_path / "model.json").read_text())
    assert content["heads"]["depth"]["max_depth"] == 10
    content["heads"]["depth"]["max_depth"] = 20
    (tmp_path / "model.json").write_text(json.dumps(content))
    with pytest.raises(ModelError, match="builds the heads"):
        load_run(tmp_path)


def test_weights_of_segmentation_alone_begin_a_model_with_depth() -> None:
    plain, model = build_model("kdcache:tiny", 4), build_model("kdcache:tiny+depth", 4)
    report = load_weights(model, plain.state_dict(), strict_head=False)
    assert all(name.startswith("depth_head.") for name in report.reinitialised)
    with pytest.raises(ModelError, match="depth_head"):
        load_weights(model, plain.state_dict(), strict_head=True)


class TwoHeads(nn.Module):
    def __init__(self, num_classes: int = 3) -> None:
        super().__init__()
        self.body = nn.Conv2d(3, 6, 4, stride=4)
        self.classes, self.far = nn.Conv2d(6, num_classes, 1), nn.Conv2d(6, 1, 2, stride=2)
        self.kdcache_heads: dict[str, object] = {
            "segmentation": "categorical",
            "depth": {"kind": "regression", "max_depth": 5},
        }

    def forward(self, x: Tensor) -> object:
        y = self.body(x)
        return {"segmentation": self.classes(y), "depth": self.far(y), "aux": y}


def two_heads(num_classes: int = 3) -> nn.Module:
    return TwoHeads(num_classes)


def depth_alone(num_classes: int = 3) -> nn.Module:
    network = TwoHeads(num_classes)
    network.kdcache_heads = {"depth": "regression"}
    return network


def features_alone(num_classes: int = 3) -> nn.Module:
    network = TwoHeads(num_classes)
    network.kdcache_heads = {}
    return network


def lacking(num_classes: int = 3) -> nn.Module:
    network = TwoHeads(num_classes)
    network.kdcache_heads["normals"] = "regression"
    return network


def misdeclared(num_classes: int = 3) -> nn.Module:
    network = TwoHeads(num_classes)
    network.kdcache_heads["depth"] = {"kind": "regression", "channels": 3}
    return network


def swapped(num_classes: int = 3) -> nn.Module:
    network = TwoHeads(num_classes)
    network.kdcache_heads["depth"] = "categorical"
    return network


def test_a_function_declares_the_heads_of_its_network() -> None:
    model = build_model(f"{__name__}:two_heads", 4).eval()
    assert model.head_kinds == {"segmentation": CategoricalHead(4), "depth": RegressionHead(max_depth=5)}
    outputs = model(torch.randn(1, 3, 32, 32), ["body"])
    assert {name: tuple(head.shape) for name, head in outputs.heads.items()} == {
        "segmentation": (1, 4, 8, 8),
        "depth": (1, 1, 4, 4),
    }
    mapped = ClassMapped(model, torch.tensor([0, 0, 1, -1]))
    assert mapped.head_kinds == {"segmentation": CategoricalHead(2), "depth": RegressionHead(max_depth=5)}
    assert set(mapped(torch.randn(1, 3, 32, 32)).heads) == {"segmentation", "depth"}


def test_a_network_may_have_no_classes() -> None:
    for function, heads in (("depth_alone", {"depth": RegressionHead()}), ("features_alone", {})):
        model = build_model(f"{__name__}:{function}", None)
        assert (model.num_classes, model.head_kinds) == (0, heads)
        outputs = model(torch.randn(1, 3, 32, 32), ["body"])
        assert set(outputs.heads) == set(heads)
        with pytest.raises(ModelError, match=r"No logits: the model has .*no head segmentation"):
            _ = outputs.logits


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("lacking", "no tensor 'normals'"),
        ("misdeclared", "3 channels are declared, 1 are returned"),
        ("swapped", "segmentation is categorical"),
    ],
)
def test_heads_that_are_not_as_declared_are_refused(function, message) -> None:
    with pytest.raises(ModelError, match=message):
        build_model(f"{__name__}:{function}", 3)


def test_a_depth_head_is_added_to_a_function_and_its_names_stay(tmp_path: Path) -> None:
    (tmp_path / "plain.py").write_text(
        "from torch import nn\ndef build(num_classes):\n"
        "    return nn.Sequential(nn.Conv2d(3, 4, 2, 2), nn.Conv2d(4, num_classes, 1))\n"
    )
    spec = f"{tmp_path}/plain.py:build+depth,tap=0"
    model = build_model(spec, 3)
    assert {"0.weight", "1.weight", "depth_head.0.weight"} <= set(model.state_dict())
    again = build_model(spec, 3)
    load_weights(again, model.state_dict(), strict_head=True)
    x = torch.randn(1, 3, 16, 16)
    assert torch.equal(again.eval()(x).heads["depth"], model.eval()(x).heads["depth"])
    with pytest.raises(ModelError, match="would be imported"):  # of a head as of the function
        check_trusted(spec, "model.json")
