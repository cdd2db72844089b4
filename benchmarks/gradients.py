"""Are the gradients from the store those of live distillation?

The student's gradient of the KL term alone, once from the store and once from the teacher run on its views, rendered
afresh from the data set, layer by layer, for T in 1, 2, 4. Views may be padded, cropped and flipped; what lies outside
the image counts in neither. The bound is |g_store - g_live| <= tolerance * (|g_layer| + 1e-3 |g|) with tolerance 2e-3
for a student at initialisation and 5e-3 for a trained one. Exits with 1 when a layer is beyond.

    python benchmarks/gradients.py --data camvid --cache camvid.zarr --teacher runs/teacher --student runs/student-kl
"""

import argparse
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import default_collate

from common import header, run, write
from kdcache.data import IGNORE_INDEX, Augmentation, render
from kdcache.distill import Batch, DistillLoss
from kdcache.models import SegmentationModel, build_model
from kdcache.models.run import load_run
from kdcache.store import Cache
from kdcache.store.records import Records
from kdcache.teacher import load_teacher
from kdcache.training import CacheDataset

TOLERANCE = {"initial": 2e-3, "trained": 5e-3}


def from_store(student: SegmentationModel, cache: Cache, batch: Batch, temperature: float) -> list[Tensor]:
    """Return the gradient of the loss on a batch from a cache, one tensor for each parameter of the student."""
    criterion = DistillLoss(cache, ce_weight=0.0, kl_weight=1.0, temperature=temperature)
    loss = criterion(student(student.normalise(batch.pixels)), batch).loss
    return list(torch.autograd.grad(loss, list(student.parameters())))


def rendered(records: Records, record: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the student's image, the mask of its pixels inside the image, and the teacher's image."""
    assert records.split is not None
    view = records.cache.manifest.view
    image, (window, flip) = records.split.image(record // view.views_per_sample), records.window(record)
    everywhere = np.zeros(image.shape[:2], np.uint8)
    pixels, label = render(image, everywhere, window, flip=flip, size=records.cache.view_size)
    taught = pixels if view.teacher_size is None else records.render(record, view.teacher_size)[0]
    return torch.from_numpy(pixels), torch.from_numpy(label != IGNORE_INDEX), torch.from_numpy(taught)


def from_teacher(
    student: SegmentationModel,
    teacher: SegmentationModel,
    pixels: Tensor,
    shown: Tensor,
    taught: Tensor,
    temperature: float,
) -> list[Tensor]:
    """Return the gradient by plain PyTorch, with the teacher run on `taught`.

    Both logits are upsampled to the view in float32. KL is the mean over the pixels inside the view.
    """
    size = (pixels.shape[1], pixels.shape[2])
    with torch.no_grad():
        teacher_logits = teacher.upsample(teacher(teacher.normalise(taught)).logits, size)
    logits = student.upsample(student(student.normalise(pixels)).logits, size)
    divergence = F.kl_div(
        F.log_softmax(logits / temperature, 1),
        F.log_softmax(teacher_logits / temperature, 1),
        reduction="none",
        log_target=True,
    )
    loss = temperature**2 * divergence.sum(1)[shown].mean()
    return list(torch.autograd.grad(loss, list(student.parameters())))


def compare(names: list[str], store: list[Tensor], live: list[Tensor]) -> tuple[float, str]:
    """Return the largest |difference| / (|g_layer| + 1e-3 |g|) over layers, and the layer's name. NaN is largest."""
    total = torch.stack([g.double().square().sum() for g in live]).sum().sqrt()
    errors = {
        name: float((a.double() - b.double()).norm() / (b.double().norm() + 1e-3 * total))
        for name, a, b in zip(names, store, live, strict=True)
    }
    where = max(errors, key=lambda name: math.inf if math.isnan(errors[name]) else errors[name])
    return errors[where], where


def is_met(rows: list[dict[str, Any]]) -> bool:
    """Return whether every error is within its bound. NaN is not."""
    return all(row["worst"] <= row["bound"] for row in rows)


def main() -> None:
    """Compare gradients from the cache with gradients of a live teacher, batch by batch, and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--split", help="default the one that the store was built from")
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
    records = Records.open(arguments.cache, arguments.data, arguments.split)
    cache, split = records.cache, records.split
    assert split is not None
    assert cache.head.dense, "the claim is about k = C"
    dataset = CacheDataset(records, augment="replay", augmentation=Augmentation.off())
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
            found = []
            for views in order.reshape(arguments.batches, -1):
                drawn = [(int(view) % len(dataset), int(view) // len(dataset)) for view in views]  # sample, epoch
                batch = default_collate([dataset.draw(*each, np.random.default_rng(0)) for each in drawn])
                afresh = default_collate([rendered(records, dataset.record(*each)) for each in drawn])
                pixels, inside, taught = (tensor.to(device) for tensor in afresh)
                stored = from_store(student, cache, batch.to(device), temperature)
                live = from_teacher(student, teacher, pixels, inside, taught, temperature)
                found.append(compare(names, stored, live))
            worst, where = max(found, key=lambda of: math.inf if math.isnan(of[0]) else of[0])
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
    sys.exit(not is_met(rows))


if __name__ == "__main__":
    run(main)
