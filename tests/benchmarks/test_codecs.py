"""benchmarks/codecs.py, feature_bytes.py, collect.py, universal.py: what is built, and sizes and errors as they are."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from kdcache.data import open_split
from kdcache.store import open_cache, summarise


def test_each_codec_is_built_and_told_of(script, call, monkeypatch, teacher_run, scenes, tmp_path) -> None:
    path = Path(script("common").__file__).with_name("codecs.py")
    spec = importlib.util.spec_from_file_location("codec_sizes", path)  # Python has a module of this name
    codecs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(codecs)
    built: list[Any] = []
    make = codecs.build_cache

    def watched(split: Any, teacher: Any, out: Any, options: Any) -> Any:
        result = make(split, teacher, out, options)
        built.append((options, summarise(open_cache(out))))
        return result

    monkeypatch.setattr(codecs, "build_cache", watched)
    words = ["--data", scenes, "--teacher", teacher_run, "--json", tmp_path / "codecs.json"]
    assert call(codecs, *words) == 0
    told = json.loads((tmp_path / "codecs.json").read_text(encoding="utf-8"))
    assert [row["codec"] for row in told["codecs"]] == ["default", "small", "none"]
    assert told["size"] == [32, 48]
    for row, (options, summary) in zip(told["codecs"], built, strict=True):
        assert (options.codec, options.views, tuple(options.size)) == (row["codec"], 1, (32, 48))
        assert (row["records"], row["fidelity"]) == (8, summary.manifest.fidelity.model_dump(mode="json"))
        assert row["bytes_per_record"] == round(summary.bytes_per_record)
        assert row["target_bytes_per_record"] == round(summary.target_bytes_per_record)
        assert row["full_resolution_bytes"] == summary.full_resolution_bytes
        ratios = {array.path: array.ratio for array in summary.arrays}
        assert row["compression"] == {path: pytest.approx(ratios[path], abs=1e-3) for path in row["compression"]}
        assert "targets/segmentation/values" in row["compression"]


# feature_bytes.py


@pytest.fixture
def features(script: Callable[[str], ModuleType]) -> ModuleType:
    return script("feature_bytes")


def test_planned_bytes_are_over_those_on_the_disk(features) -> None:
    plan = SimpleNamespace(chosen=SimpleNamespace(bytes=1020, seconds=12.34), taught=7, error=0.00123)
    arrays = [SimpleNamespace(path="features/last", bytes_on_disk=900)]
    manifest = SimpleNamespace(feature_fidelity={"last": SimpleNamespace(model_dump=lambda: {"error": 0.5})})
    summary = SimpleNamespace(bytes_on_disk=1000, bytes_per_record=99.6, arrays=arrays, manifest=manifest)
    found = features.compare(plan, 25.06, summary)
    assert (found["planned_bytes"], found["bytes"], found["planned_over_built"]) == (1020, 1000, 1.02)
    assert (found["planned_seconds"], found["seconds"], found["bytes_per_record"]) == (12.3, 25.1, 100)
    assert found["arrays"] == {"features/last": 900}
    assert found["fidelity"] == {"last": {"error": 0.5}}
    assert (found["planned_records"], found["planned_standard_error"]) == (7, 0.0012)


def test_three_forms_of_one_tap_of_the_same_images(features, call, monkeypatch, scenes, tmp_path) -> None:
    jobs: list[Any] = []
    monkeypatch.setattr(features, "job", lambda split, teacher, options, out: jobs.append((split, options)) or {})
    monkeypatch.setattr(features, "load_teacher", lambda *_, **__: None)
    assert call(features, "--data", scenes, "--take", 6, "--json", tmp_path / "a.json") == 0
    told = json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))
    assert list(told["jobs"]) == ["fp16", "uint8", "similarity"]
    assert (told["images"], told["of"], told["size"]) == (6, 10, [224, 224])
    fp16, uint8, similarity = (options for _, options in jobs)
    assert [len(split) for split, _ in jobs] == [6, 6, 6]
    assert all(options.features_only and options.pixels == "source" for _, options in jobs)
    assert tuple(fp16.features) == tuple(uint8.features) == ("last",)
    assert (uint8.feature_dtype, tuple(similarity.features)) == ("uint8", ())
    assert tuple(similarity.statistics) == ("similarity:last",)


def test_the_teacher_answers_with_tokens_and_their_summary(features) -> None:
    with torch.no_grad():
        answer = features.network().eval()(torch.zeros(1, 3, 224, 224))
    assert answer.last_hidden_state.shape == (1, 1 + 14 * 14, 384)
    assert answer.pooler_output.shape == (1, 384)


# collect.py


def test_runs_are_collected_with_their_scores_and_without_paths(
    script, call, store, teacher_run, tmp_path, capsys
) -> None:
    collect = script("collect")
    for name, miou in (("student-none", 0.25), ("student-kl", 0.5)):
        shutil.copytree(teacher_run, tmp_path / name)
        (tmp_path / name / "recipe.toml").write_text('model = "kdcache:tiny"\nlr = 0.5\nval = "/private/camvid"\n')
        (tmp_path / name / "result.json").write_text(json.dumps({"seconds": 5}))
        judged = {"miou": miou, "macc": miou + 0.1, "aacc": miou + 0.2, "run": "/private/run", "data": "/private"}
        (tmp_path / name / "evaluation-val.json").write_text(json.dumps(judged))
    (tmp_path / "camvid.zarr").symlink_to(store)
    assert call(collect, tmp_path, "--data", "camvid", "--json", tmp_path / "all.json") == 0
    text = (tmp_path / "all.json").read_text(encoding="utf-8")
    told = json.loads(text)
    assert {name: of["evaluation"]["miou"] for name, of in told["runs"].items()} == {
        "student-none": 0.25,
        "student-kl": 0.5,
    }
    assert told["runs"]["student-kl"]["result"] == {"seconds": 5}
    assert told["runs"]["student-kl"]["recipe"]["lr"] == 0.5
    assert told["store"]["records_written"] == 8
    assert "/private" not in text
    shown = capsys.readouterr().out
    assert [cell.strip() for cell in shown.splitlines()[2].strip("|").split("|")] == [
        "student-kl",
        "50.00",
        "60.00",
        "70.00",
    ]


# universal.py


@pytest.fixture
def universal(script: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = script("universal")
    monkeypatch.setattr(module, "SIZE", (16, 16))
    monkeypatch.setattr(module, "Universal", lambda: SimpleNamespace(heads=lambda kind, x: {"segmentation": x}))
    return module


def bilinear(x: torch.Tensor) -> torch.Tensor:
    return F.interpolate(x, size=(16, 16), mode="bilinear", align_corners=False)


def test_the_gradient_is_that_of_the_kl_term(universal) -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(1, 3, 4, 4), torch.randn(1, 3, 16, 16)
    for temperature in (1.0, 2.0):
        leaf = student.clone().requires_grad_()
        kl = F.kl_div(
            (bilinear(leaf) / temperature).log_softmax(1),
            (teacher / temperature).log_softmax(1),
            reduction="none",
            log_target=True,
        )
        kl.sum(1).mean().backward()
        assert torch.allclose(universal.gradient(student, teacher, temperature), leaf.grad, atol=1e-7)


def test_errors_are_shares_of_pixels_and_relative_gradients(universal) -> None:
    torch.manual_seed(1)
    answers = [(3 * torch.randn(1, 3, 4, 4)).log_softmax(1) for _ in range(2)]
    edges = [torch.rand(1, 16, 16) < 0.3 for _ in answers]
    found = universal.compare(answers, edges, torch.zeros_like)
    pairs = [(bilinear(logs), bilinear(logs.exp()).log()) for logs in answers]
    differ = torch.cat([stored.argmax(1) != exact.argmax(1) for stored, exact in pairs])
    assert differ.any()
    assert found["other_best_class"] == round(differ.float().mean().item(), 5)
    assert found["other_best_class_at_edges"] == round(differ[torch.cat(edges)].float().mean().item(), 5)
    for temperature in (1.0, 2.0):
        ours, theirs = (
            torch.stack([universal.gradient(torch.zeros(1, 3, 4, 4), pair[side], temperature) for pair in pairs])
            for side in (0, 1)
        )
        relative = ((ours - theirs).norm() / theirs.norm()).item()
        assert found["gradient_error"][f"T={temperature:g}"] == pytest.approx(relative, abs=1e-4)
    flat = torch.tensor([0.5, 0.3, 0.2]).log()[None, :, None, None].expand(1, 3, 4, 4)
    same = universal.compare([flat], edges[:1], torch.zeros_like)
    assert (same["other_best_class"], same["other_best_class_at_edges"]) == (0, 0)
    assert max(same["gradient_error"].values()) < 1e-3


def test_void_shows_no_class_and_edges_are_four_pixels_wide(universal, scenes, monkeypatch) -> None:
    split = open_split(scenes, "train")
    label = torch.zeros(16, 16, dtype=torch.uint8)
    label[:, 8:] = 1
    label[0] = 255
    monkeypatch.setattr(type(split), "label", lambda self, number: label.numpy())
    shares = universal.shares(split, 0)
    assert shares.shape == (1, len(split.classes), 16, 16)
    assert shares[0, :, 0].sum() == 0
    assert shares[0, :, 1:].sum() == 15 * 16
    near = universal.near_edges(shares)[0]
    assert near[8].nonzero().flatten().tolist() == [4, 5, 6, 7, 8, 9, 10, 11]


def test_smooth_masks_answer_with_a_query_for_each_class(universal) -> None:
    torch.manual_seed(0)
    label = F.one_hot((torch.arange(16) // 8).expand(1, 16, 16), 3).movedim(-1, 1).float()
    answer = universal.smooth(label)
    assert answer.masks_queries_logits.shape == (1, 3, 4, 4)
    assert answer.class_queries_logits.shape == (1, 3, 4)
    assert (answer.masks_queries_logits.argmax(1)[0, 0] == torch.tensor([0, 0, 1, 1])).all()
    sure = answer.class_queries_logits.softmax(2)
    assert (sure.argmax(2) == torch.arange(3)).all()
