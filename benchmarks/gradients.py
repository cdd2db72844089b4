"""Are the gradients from the store those of live distillation?

The student's gradient of the KL term alone, once from the store and once from the teacher run on freshly rendered
pixels, layer by layer, for T in 1, 2, 4. The bound is |g_store - g_live| <= tolerance * (|g_layer| + 1e-3 |g|) with
tolerance 2e-3 for a student at initialisation and 5e-3 for a trained one. Exits with 1 when a layer is beyond.

    python benchmarks/gradients.py --data camvid --cache camvid.zarr --teacher runs/teacher --student runs/student-kl
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F
from torch.utils.data import default_collate

from common import header, write
from kdcache.data import Split, Window, open_split, render
from kdcache.distill import DistillLoss
from kdcache.models import SegmentationModel, build_model
from kdcache.models.run import load_run
from kdcache.store import Cache, open_cache
from kdcache.teacher import load_teacher
from kdcache.train import CacheDataset

TOLERANCE = {"initial": 2e-3, "trained": 5e-3}


def from_store(student: SegmentationModel, cache: Cache, records: list[int], temperature: float) -> list[torch.Tensor]:
    dataset = CacheDataset(cache, augment="none")
    batch = default_collate([dataset[record] for record in records])
    device = next(student.parameters()).device
    criterion = DistillLoss(cache, ce_weight=0.0, kl_weight=1.0, temperature=temperature)
    batch = batch.to(device)
    loss = criterion(student(student.normalise(batch.pixels)), batch).loss
    return list(torch.autograd.grad(loss, list(student.parameters())))


def from_teacher(
    student: SegmentationModel,
    teacher: SegmentationModel,
    split: Split,
    records: list[int],
    size: tuple[int, int],
    temperature: float,
) -> list[torch.Tensor]:
    """The gradient by plain torch: both upsampled to the image, float32, KL averaged over pixels."""
    images = [split.image(record) for record in records]
    pixels = np.stack([render(i, None, Window.full(*i.shape[:2]), flip=False, size=size)[0] for i in images])
    device = next(student.parameters()).device
    tensor = torch.from_numpy(pixels).to(device)
    with torch.no_grad():
        teacher_logits = teacher.upsample(teacher(teacher.normalise(tensor)).logits, size)
    logits = student.upsample(student(student.normalise(tensor)).logits, size)
    divergence = F.kl_div(
        F.log_softmax(logits / temperature, 1),
        F.log_softmax(teacher_logits / temperature, 1),
        reduction="none",
        log_target=True,
    )
    loss = temperature**2 * divergence.sum(1).mean()
    return list(torch.autograd.grad(loss, list(student.parameters())))


def compare(names: list[str], store: list[torch.Tensor], live: list[torch.Tensor]) -> tuple[float, str]:
    """Largest |difference| / (|g_layer| + 1e-3 |g|) over layers, and that layer's name."""
    total = torch.stack([g.double().square().sum() for g in live]).sum().sqrt()
    worst, where = 0.0, ""
    for name, a, b in zip(names, store, live, strict=True):
        error = (a.double() - b.double()).norm() / (b.double().norm() + 1e-3 * total)
        if float(error) > worst:
            worst, where = float(error), name
    return worst, where


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--split", default="train")
    parser.add_argument("--cache", required=True)
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--student", required=True, help="run of a trained student; its model is also tried untrained")
    parser.add_argument("--batches", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    torch.backends.cudnn.deterministic = True
    split = open_split(arguments.data, arguments.split)
    cache = open_cache(arguments.cache)
    assert cache.head.dense, "the claim is about k = C"
    teacher = load_teacher(arguments.teacher, split.classes).model.to(device)
    trained, description = load_run(arguments.student)
    torch.manual_seed(0)
    students = {"initial": build_model(description.spec, len(description.class_names)), "trained": trained}
    order = np.random.default_rng(0).permutation(len(cache))[: arguments.batches * arguments.batch_size]
    rows: list[dict[str, Any]] = []
    for state, student in students.items():
        student.to(device).train()
        names = [name for name, _ in student.named_parameters()]
        for temperature in (1.0, 2.0, 4.0):
            worst, where = 0.0, ""
            for records in order.reshape(arguments.batches, -1).tolist():
                stored = from_store(student, cache, records, temperature)
                live = from_teacher(student, teacher, split, records, cache.view_size, temperature)
                worst, where = max((worst, where), compare(names, stored, live))
            rows.append(
                {
                    "student": state,
                    "temperature": temperature,
                    "worst": worst,
                    "layer": where,
                    "bound": TOLERANCE[state],
                }
            )
            print(f"{state} student, T = {temperature:.0f}: {worst:.2e} at {where} (bound {TOLERANCE[state]:.0e})")
    if arguments.json:
        write(arguments.json, {**header("gradients"), "rows": rows})
    sys.exit(any(row["worst"] > row["bound"] for row in rows))


if __name__ == "__main__":
    main()
