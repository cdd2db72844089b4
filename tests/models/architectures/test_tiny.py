"""kdcache's own networks, the interface, and the list of models."""

import subprocess
import sys

import pytest
import torch
from torch.nn import functional as F

from kdcache.errors import ModelError
from kdcache.models import build_model, list_models, missing_models
from kdcache.models.architectures import deeplab, hydra, segformer, smp, tiny, torchvision_heads


@pytest.mark.parametrize("name", tiny.NAMES)
@pytest.mark.parametrize("size", [(32, 32), (33, 47), (64, 96), (101, 70)])
def test_shapes_at_any_size(name: str, size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    model = build_model(f"kdcache:{name}", 7).eval()
    with torch.inference_mode():
        heads, features = model(torch.randn(2, 3, *size), model.taps)
        logits = heads["segmentation"]
    assert logits.shape == (2, 7, -(-size[0] // 4), -(-size[1] // 4))
    assert tuple(features) == model.taps == ("stage1", "stage2", "stage3", "stage4", "head")
    for i in range(4):
        stride = 4 * 2**i
        assert features[f"stage{i + 1}"].shape[-2:] == (-(-size[0] // stride), -(-size[1] // stride))
    assert features["head"].shape[-2:] == logits.shape[-2:]
    assert model.upsample(logits, size).shape == (2, 7, *size)


@pytest.mark.parametrize("name", tiny.NAMES)
def test_learns_a_batch(name: str) -> None:
    torch.manual_seed(0)
    model = build_model(f"kdcache:{name}", 3)
    pixels = torch.randint(0, 256, (4, 48, 64, 3), dtype=torch.uint8)
    x = model.normalise(pixels)
    labels = (x[:, 0] > 0).long() + 2 * (torch.arange(64) > 40).long()
    labels = labels.clamp_(max=2)[:, 2::4, 2::4]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(25):
        loss = F.cross_entropy(model(x).logits, labels)
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None for p in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert abs(losses[0] - torch.log(torch.tensor(3.0)).item()) < 0.1
    assert losses[-1] < 0.5 * losses[0]


def test_one_image_of_one_cell_trains() -> None:
    model = build_model("kdcache:tiny", 3)
    model(torch.randn(1, 3, 64, 64)).logits.sum().backward()


def test_same_seed_same_weights() -> None:
    logits = []
    for _ in range(2):
        torch.manual_seed(5)
        logits.append(build_model("kdcache:tiny", 3).eval()(torch.ones(1, 3, 32, 32)).logits)
    assert torch.equal(*logits)


def test_normalise() -> None:
    torch.manual_seed(0)
    model = build_model("kdcache:tiny", 3, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
    pixels = torch.randint(0, 256, (2, 5, 7, 3), dtype=torch.uint8)
    mean, std = torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.2, 0.3, 0.4])
    expected = ((pixels.float() / 255 - mean) / std).permute(0, 3, 1, 2)
    x = model.normalise(pixels)
    torch.testing.assert_close(x, expected)
    assert x.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(model.normalise(pixels[:, :, ::2]), expected[..., ::2])
    model.mean = (0.0, 0.0, 0.0)  # takes effect although the old one was used
    torch.testing.assert_close(model.normalise(pixels)[:, 0], pixels[..., 0] / 255 / 0.2)
    assert not any("mean" in k and "running" not in k for k in model.state_dict())


def test_normalise_refuses_other_input() -> None:
    model = build_model("kdcache:tiny", 3)
    for pixels in [torch.zeros(1, 4, 4, 3), torch.zeros(1, 3, 4, 4, dtype=torch.uint8)]:
        with pytest.raises(ModelError, match="uint8"):
            model.normalise(pixels)


@pytest.mark.parametrize("bad", [(1.0, 2.0), (0.0, 1.0, 1.0), (float("nan"), 1.0, 1.0)])
def test_bad_std(bad: tuple[float, ...]) -> None:
    with pytest.raises(ModelError, match="std"):
        build_model("kdcache:tiny", 3, std=bad)


def test_upsample_obeys_align_corners() -> None:
    model = build_model("kdcache:tiny", 3)
    logits = torch.randn(1, 3, 4, 5)
    for align in (False, True):
        model.align_corners = align
        expected = F.interpolate(logits, size=(13, 17), mode="bilinear", align_corners=align)
        assert torch.equal(model.upsample(logits, (13, 17)), expected)


def test_list_models() -> None:
    infos = {info.spec: info for info in list_models()}
    families = {
        "torchvision": torchvision_heads.NAMES,
        "kdcache": (*tiny.NAMES, *hydra.NAMES, *deeplab.NAMES),
        "segformer": segformer.NAMES,
        "smp": smp.NAMES,
    }
    assert set(missing_models()) <= {"pip install '.[ultralytics]'"}  # clients/ultralytics tests those
    assert set(infos) == {f"{family}:{name}" for family, names in families.items() for name in names}
    assert 0.1e6 < infos["kdcache:tiny"].parameters < 0.2e6
    assert 2.5e6 < infos["kdcache:base"].parameters < 3.5e6
    # torchvision publishes 35,322,218 with the auxiliary head, 2,365,205 of them
    assert infos["torchvision:fcn_resnet50"].parameters == 35_322_218 - 2_365_205
    for info in infos.values():
        assert list(info.taps)[-1] == "head"
        assert info.taps["head"].stride == info.stride


@pytest.mark.parametrize(
    ("spec", "near"),
    [
        ("torchvision:fcn_resnet5", "torchvision:fcn_resnet50"),
        ("deeplabv3_resnet50", "torchvision:deeplabv3_resnet50"),
        ("kdcache:tyny", "kdcache:tiny"),
        ("zzz", "kdcache:base"),
        ("kdcache:deeplab_mobilenet", "kdcache:deeplab-mobilenet"),
        ("segformer:b7", "segformer:b"),
        ("segfromer:b2", "segformer:b2"),
    ],
)
def test_unknown_spec_names_the_nearest(spec: str, near: str) -> None:
    with pytest.raises(ModelError, match=near):
        build_model(spec, 3)


def test_count_of_classes_must_be_known() -> None:
    with pytest.raises(ModelError, match="neither num_classes nor weights"):
        build_model("kdcache:tiny", None)
    with pytest.raises(ModelError, match="at least 0"):
        build_model("kdcache:tiny", -1)
    assert not build_model("kdcache:tiny", 0).head_kinds, "a backbone that learns features only"
    with pytest.raises(ModelError, match="No published weights of kdcache:tiny"):
        build_model("kdcache:tiny", 3, weights="default")


def test_importing_the_room_imports_no_model_zoo() -> None:
    zoos = {"torchvision", "transformers", "segmentation_models_pytorch", "timm", "huggingface_hub"}
    code = f"import sys, kdcache.models; print(sorted({zoos!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
