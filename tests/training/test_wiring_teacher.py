"""What settings say of the teacher is what the criterion that trains does: class weights, trust, samples."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import default_collate

from kdcache.data import open_split, write_scenes
from kdcache.store import Cache, Records, open_cache
from kdcache.training import CacheDataset, criterion, make_config, train
from kdcache.training.class_trust import trust_from_run
from kdcache.training.sources import open_dataset
from kdcache.training.trainer import Trainer

Counts = np.ndarray[Any, Any]
SAMPLES = 6


def of_teacher(cache: Cache, samples: list[int]) -> Counts:
    """Pixels per class of the teacher's best class, from the arrays of the store."""
    counts = np.zeros(cache.num_classes, np.int64)
    for number in samples:
        row = cache.read(cache.manifest.record(number), cache.target_paths())
        best = row["targets/segmentation/values"].argmax(0)
        if "targets/segmentation/indices" in row:
            best = np.take_along_axis(row["targets/segmentation/indices"], best[None], 0)[0]
        counts += np.bincount(best.ravel(), minlength=cache.num_classes)
    return counts


def of_labels(data: str, samples: list[int], classes: int) -> Counts:
    labels = [open_split(data, "train").label(number) for number in samples]
    actual: Counts = sum(
        np.bincount(label[label < 255].ravel(), minlength=classes) for label in labels if label is not None
    )
    return actual


def balanced(counts: Counts, kind: str) -> Tensor:
    """Median frequency over frequency, or its root; the mean over pixels is 1."""
    frequency = counts / counts.sum()
    present = frequency[frequency > 0]
    raw = (np.median(present) / present) ** (0.5 if kind == "sqrt" else 1.0)
    weights = np.ones(len(counts))
    weights[frequency > 0] = raw / (raw * present).sum()
    return torch.from_numpy(weights)


def kl_of(trainer: Trainer, weight: Tensor) -> tuple[float, float]:
    """KL of random logits: as the criterion that trains has it, and in float64 with a weight per teacher's class."""
    dataset = trainer.streams[0].draws.dataset
    assert isinstance(dataset, CacheDataset)
    batch = default_collate([dataset[number] for number in range(len(dataset))])
    generator = torch.Generator().manual_seed(4)
    student = 2 * torch.randn(len(dataset), len(weight), 8, 12, generator=generator)
    actual = trainer.criterion(student, (batch,)).kl.item()
    size, T = batch.label.shape[1:], trainer.config.loss.temperature
    s, t = (F.interpolate(x.double(), size, mode="bilinear") for x in (student, batch.target.values))
    kl = F.kl_div((s / T).log_softmax(1), (t / T).softmax(1), reduction="none").sum(1)
    return actual, (T**2 * kl * weight[t.argmax(1)]).mean().item()


@pytest.mark.parametrize("kind", ["sqrt", "median"])
@pytest.mark.parametrize("limit", [None, 3], ids=["all samples", "half of them"])
def test_class_balance_goes_by_the_teacher_s_classes(
    kind: str, limit: int | None, begin: Callable[..., Trainer], cache: Cache, scenes: str
) -> None:
    trainer = begin(class_balance=kind, limit_samples=limit)
    dataset = trainer.streams[0].draws.dataset
    assert isinstance(dataset, CacheDataset)
    assert len(dataset) == (limit or SAMPLES)
    weight = balanced(of_teacher(cache, dataset.indices), kind)
    assert trainer.criterion.losses[0].gate.class_weight.tolist() == pytest.approx(weight.tolist(), rel=1e-6)
    actual, expected = kl_of(trainer, weight)
    assert actual == pytest.approx(expected, rel=1e-4)
    by_labels = balanced(of_labels(scenes, dataset.indices, cache.num_classes), kind)
    for other in (by_labels, torch.ones_like(weight)):  # both far beyond what passes above
        assert actual != pytest.approx(kl_of(trainer, other)[1], rel=0.002), "the test could not tell"


def test_class_balance_of_a_top_k_store(begin: Callable[..., Trainer], source_path: Path, scenes: str) -> None:
    """Where the place of a value does not say its class."""
    trainer = begin(cache=str(source_path), data=scenes, class_balance="sqrt")
    weight = balanced(of_teacher(open_cache(source_path), list(range(SAMPLES))), "sqrt")
    assert trainer.criterion.losses[0].gate.class_weight.tolist() == pytest.approx(weight.tolist(), rel=1e-6)


def test_class_balance_of_a_store_of_views_goes_by_the_whole_images(
    begin: Callable[..., Trainer], make_cache: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of three samples that are spread over the store."""
    monkeypatch.setattr(criterion, "COUNTED_TARGETS", 3)
    path = make_cache(views=2)
    trainer = begin(cache=str(path), augment="replay", class_balance="sqrt")
    weight = balanced(of_teacher(open_cache(path), [0, 2, 5]), "sqrt")
    assert trainer.criterion.losses[0].gate.class_weight.tolist() == pytest.approx(weight.tolist(), rel=1e-6)


def test_measured_trust_weighs_the_kl_that_trains(
    begin: Callable[..., Trainer], student: dict[str, Any], cache: Cache, tmp_path: Path
) -> None:
    plain = tmp_path / "plain"
    alone = {"method": "none", "fold": "0/3", "val": None, "iterations": 3, "lr": 1e-3}
    train(make_config(**(student | alone)), plain)
    trust = torch.tensor(trust_from_run(Records(cache), str(plain), torch.device("cpu"), lambda _: None))
    assert 0 < trust.double().mean() < 1, "the test could not tell"
    trainer = begin(class_trust="auto", trust_against=str(plain))
    assert trainer.criterion.losses[0].gate.class_weight.tolist() == trust.tolist()
    actual, expected = kl_of(trainer, trust.double())
    assert actual == pytest.approx(expected, rel=1e-4)
    assert actual != pytest.approx(kl_of(trainer, torch.ones_like(trust))[1], rel=0.02)


def test_trust_and_balance_multiply(begin: Callable[..., Trainer], cache: Cache, tmp_path: Path) -> None:
    names = cache.manifest.dataset.class_names
    trust = [number / len(names) for number in range(len(names))]
    file = tmp_path / "trust.toml"
    file.write_text("".join(f'"{name}" = {value}\n' for name, value in zip(names, trust, strict=True)))
    trainer = begin(class_trust=str(file), class_balance="sqrt")
    weight = balanced(of_teacher(cache, list(range(SAMPLES))), "sqrt") * torch.tensor(trust)
    actual, expected = kl_of(trainer, weight)
    assert actual == pytest.approx(expected, rel=1e-4)


@pytest.fixture(scope="module")
def partly(tmp_path_factory: pytest.TempPathFactory, make_cache: Callable[..., Path]) -> Path:
    """A store of six images of which two have no label."""
    data = write_scenes(tmp_path_factory.mktemp("partly") / "data", "scenes:32x48,train=6,val=1")
    for path in sorted((data / "labels/train").iterdir())[1:3]:
        path.unlink()
    return make_cache(str(data))


@pytest.mark.parametrize("method", ["kl", "none"])
@pytest.mark.parametrize("on", ["labelled", "all"])
def test_distill_on_says_which_samples_teach(on: str, method: str, partly: Path, student: dict[str, Any]) -> None:
    cache = open_cache(partly)
    config = make_config(**(student | {"cache": str(partly), "method": method, "distill_on": on}))
    dataset = open_dataset(config, cache)
    assert isinstance(dataset, CacheDataset)
    everything = on == "all" and method != "none"  # labels alone have nothing to learn from the others
    assert list(dataset.indices) == ([0, 1, 2, 3, 4, 5] if everything else [0, 3, 4, 5])
    void = [number for number in range(len(dataset)) if bool((dataset[number].label == 255).all())]
    assert void == ([1, 2] if everything else [])
