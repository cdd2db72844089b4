"""Audits of depth, alone or beside classes: against float64 from the arrays and the labels."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from kdcache.data import open_split
from kdcache.errors import MismatchError
from kdcache.models import build_model
from kdcache.store import Records, open_cache
from kdcache.teacher import build_cache, load_teacher
from kdcache.teacher.audit.depth_audit import JOINT_BINS, map_at_view
from kdcache.teacher.audit.figures import REPORT, write_report
from kdcache.teacher.audit.store_audit import audit_store

SPEC = "kdcache:hydra,as=exp,max=40"
SIZE = (32, 48)


@pytest.fixture(scope="module")
def stores(tmp_path_factory, options):
    """Records of `both` heads, of `depth` alone, of `features` alone, and of depth without labels (`bare`)."""
    root = tmp_path_factory.mktemp("stores")
    torch.manual_seed(1)
    model = build_model(SPEC, 7)
    with torch.no_grad():
        model.depth_output.weight.normal_(std=0.3)
    save_file(dict(model.state_dict()), root / "w.safetensors")
    made = {}
    kinds = {
        "both": {},
        "depth": {"heads": ("depth",)},
        "features": {"features": ("stage2",), "features_only": True},
        "bare": {"heads": ("depth",)},
    }
    for name, changes in kinds.items():
        split = open_split("scenes:36x52,train=5" + ("" if name == "bare" else ",depth=sparse"), "train")
        teacher = load_teacher(f"{SPEC}@{root / 'w.safetensors'}", split.classes)
        build_cache(split, teacher, root / f"{name}.zarr", options(**changes))
        made[name] = Records(open_cache(root / f"{name}.zarr"), split)
    return made


@pytest.mark.parametrize("name", ["both", "depth"])
def test_errors_are_those_of_the_stored_depth_at_view_size(stores, name) -> None:
    records = stores[name]
    audit = audit_store(records, worst=2)
    depth = audit.regressions[0]
    assert (audit.classes is not None) == (name == "both")
    rmse, bins, relative = {}, np.zeros(JOINT_BINS), {}
    for number in range(5):
        values = records.cache.read(number, ["targets/depth/values"])["targets/depth/values"].astype(np.float64)
        up = F.interpolate(torch.from_numpy(np.log(values))[None], SIZE, mode="bilinear")[0, 0].exp().numpy()
        np.testing.assert_allclose(map_at_view(records, number, "depth").numpy(), up, rtol=1e-5)
        bins += np.histogram(np.minimum(up, 40), JOINT_BINS, (0, 40))[0]
        label = records.label(number, "depth").astype(np.float64)
        valid = (label > 0.001) & (label < 40)
        rmse[records.sample(number)] = np.sqrt(np.square(up - label)[valid].mean())
        for low, high in ((5, 10), (20, 40)):
            inside = valid & (label >= low) & (label < high)
            relative.setdefault(low, []).extend((np.abs(up - label)[inside] / label[inside]).tolist())
    assert depth.metrics.rmse == pytest.approx(np.mean(list(rmse.values())), rel=1e-5)
    assert np.abs(depth.predicted - bins).sum() <= 4  # float32 at an edge of a bin
    assert depth.joint.sum() == depth.labels.sum() == depth.metrics.pixels
    for part in depth.ranges:
        if part.low in relative:
            assert part.abs_rel == pytest.approx(np.mean(relative[part.low]), rel=1e-5)
    assert [scored.sample for scored in depth.worst] == sorted(rmse, key=rmse.__getitem__)[::-1][:2]


def test_features_alone_have_nothing_to_audit(stores) -> None:
    with pytest.raises(MismatchError, match="has no head of its teacher, only features") as caught:
        audit_store(stores["features"])
    assert "kdcache verify" in caught.value.fix


def test_every_kind_of_store_has_pictures(stores, tmp_path) -> None:
    """In one folder after the other: what an earlier kind left there goes."""
    expected = {
        "both": {"depth.png", "classes.png", "worst"},
        "depth": {"depth.png", "worst"},
        "bare": {"depth.png", "samples"},
    }
    for name, files in expected.items():
        written = write_report(audit_store(stores[name], worst=1), stores[name], tmp_path)
        assert all(path.is_file() for path in written)
        assert {path.relative_to(tmp_path).parts[0] for path in written} >= files
        content = json.loads((tmp_path / REPORT).read_text(), parse_constant=pytest.fail)
        assert set(content["regressions"]) == {"depth"}
    assert {path.name for path in tmp_path.rglob("*.png")} == {path.name for path in written}
