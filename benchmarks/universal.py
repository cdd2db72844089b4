"""Compare a mask transformer's stored logarithms of scores, after resizing, with its resized scores.

A cache keeps the log of the classes' scores at the masks' stride, and a training resizes the logs. The network itself
resizes scores. Both are compared at the images' size: the share of pixels with another best class, within 4 pixels
of a class's edge also, and the gradient of the KL term, relative. Two kinds of masks: of a tiny Mask2Former with random
weights, and smooth ones, whose probability is the share of a cell that shows the class in a label, blurred.

    python benchmarks/universal.py --data camvid --json benchmarks/results/universal-cpu.json
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

from common import header, run, write
from kdcache.data import Split, open_split
from kdcache.models.foreign.readings import Universal
from kdcache.store import evenly_spread

SIZE, STRIDE, EDGE = (288, 384), 4, 4
SURE, CERTAIN = 0.9, 4.0
"""A query's probability of its class, and how steep its mask's logits are."""


def resized(x_BChw: Tensor) -> Tensor:
    """Return maps resized bilinearly to the size of the labels."""
    return F.interpolate(x_BChw, size=SIZE, mode="bilinear", align_corners=False)


def smooth(shares_BCHW: Tensor) -> SimpleNamespace:
    """Return the output of a network with a query for each class, whose masks are certain except near edges."""
    share_BChw = F.avg_pool2d(shares_BCHW, STRIDE)
    share_BChw = F.avg_pool2d(F.pad(share_BChw, (1, 1, 1, 1), mode="replicate"), 3, 1)
    classes = share_BChw.shape[1]
    noise_BC = torch.randn(len(share_BChw), classes, 1) * 0.5
    logits_BCC1 = torch.zeros(len(share_BChw), classes, classes + 1)
    logits_BCC1[:, range(classes), range(classes)] = torch.tensor(SURE / (1 - SURE) * classes).log()
    masks = CERTAIN * share_BChw.clamp(1e-3, 1 - 1e-3).logit()
    return SimpleNamespace(class_queries_logits=logits_BCC1 + noise_BC, masks_queries_logits=masks)


def tiny(classes: int) -> Callable[[Tensor], Any]:
    """Return a Mask2Former with random weights."""
    stages = ["stage1", "stage2", "stage3", "stage4"]
    sizes = {"embed_dim": 12, "depths": [1, 1, 1, 1], "num_heads": [1, 2, 2, 4], "window_size": 4}
    width = {"hidden_dim": 32, "encoder_layers": 1, "decoder_layers": 2, "num_attention_heads": 2, "num_queries": 20}
    width |= {"dim_feedforward": 32, "encoder_feedforward_dim": 32, "mask_feature_size": 32, "feature_size": 32}
    config = Mask2FormerConfig(backbone_config=SwinConfig(**sizes, out_features=stages), num_labels=classes, **width)
    return Mask2FormerForUniversalSegmentation(config).eval()


def gradient(student_BChw: Tensor, teacher_BCHW: Tensor, temperature: float) -> Tensor:
    """Return the gradient of the KL term on the student's logits. The teacher's logits are at the images' size."""
    student_BChw = student_BChw.clone().requires_grad_()
    log_s, log_t = (x.div(temperature).log_softmax(1) for x in (resized(student_BChw), teacher_BCHW))
    (log_t.exp() * (log_t - log_s)).sum(1).mean().backward()
    assert student_BChw.grad is not None
    return student_BChw.grad


def compare(answers: list[Any], edges: list[Tensor], student: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    """Compare resized logarithms of scores with logarithms of resized scores."""
    differing, at_edge, edge, total, errors = 0.0, 0.0, 0.0, 0, {1.0: [0.0, 0.0], 2.0: [0.0, 0.0]}
    for answer, edge_BHW in zip(answers, edges, strict=True):
        logs_BChw = Universal().heads("masks", answer)["segmentation"]
        stored, exact = resized(logs_BChw), resized(logs_BChw.exp()).log()
        differs = stored.argmax(1) != exact.argmax(1)
        differing, total = differing + differs.sum().item(), total + differs.numel()
        at_edge, edge = at_edge + differs[edge_BHW].sum().item(), edge + edge_BHW.sum().item()
        student_BChw = student(logs_BChw)
        for temperature, sums in errors.items():
            ours, theirs = (gradient(student_BChw, teacher, temperature) for teacher in (stored, exact))
            sums[0] += (ours - theirs).square().sum().item()
            sums[1] += theirs.square().sum().item()
    relative = {f"T={t:g}": round((error / size) ** 0.5, 4) for t, (error, size) in errors.items()}
    share, near = round(differing / total, 5), round(at_edge / edge, 5)
    return {"other_best_class": share, "other_best_class_at_edges": near, "gradient_error": relative}


def shares(split: Split, number: int) -> Tensor:
    """Return a mask for each class, (1, C, H, W), at the size of the comparison. Void pixels are in none."""
    label = torch.from_numpy(split.label(number))[None, None].float()
    label_1HW = F.interpolate(label, size=SIZE, mode="nearest").long()[:, 0]
    classes = len(split.classes)
    return F.one_hot(label_1HW.clamp(max=classes), classes + 1)[..., :classes].movedim(-1, 1).float()


def near_edges(shares_1CHW: Tensor) -> Tensor:
    """Return the mask (1, H, W) of the pixels near another class."""
    wide = F.max_pool2d(shares_1CHW, 2 * EDGE + 1, 1, EDGE)
    return wide.sum(1) > 1


def main() -> None:
    """Compare both orders of resizing on a split, print the differences, and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="scenes:360x480,train=4,val=32")
    parser.add_argument("--split", default="val")
    parser.add_argument("--take", type=int, default=32)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    split = open_split(arguments.data, arguments.split)
    torch.manual_seed(0)
    numbers = evenly_spread(len(split), arguments.take)
    labels = [shares(split, number) for number in numbers]
    edges = [near_edges(label) for label in labels]
    network = tiny(len(split.classes))
    pixels = [torch.from_numpy(split.image(number)).movedim(-1, 0)[None] / 255 for number in numbers]
    with torch.no_grad():
        masks = {"smooth": [smooth(label) for label in labels], "random": [network(resized(x)) for x in pixels]}
    students = {
        "untrained": torch.zeros_like,
        "near": lambda logs: logs.clamp_min(-8) + torch.randn_like(logs),
    }
    rows = {f"{kind}, {name} student": compare(answers, edges, student)
            for kind, answers in masks.items() for name, student in students.items()}  # fmt: skip
    for name, row in rows.items():
        print(name, json.dumps(row), flush=True)
    if arguments.json is not None:
        content = {"images": len(labels), "size": list(SIZE), "stride": STRIDE, "masks": rows}
        write(arguments.json, {**header("universal"), **content})


if __name__ == "__main__":
    run(main)
