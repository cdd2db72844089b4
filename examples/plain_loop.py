"""Train a student from a cache in your own loop.

Distillation needs the three lines that are marked `distilled`. Without --cache, the loop learns from labels only.
`kdcache train-student --class-weights none` with the same settings has the same batches and losses.

    kdcache build-teacher-cache --data camvid --teacher runs/teacher --out camvid.zarr
    python examples/plain_loop.py --cache camvid.zarr --data camvid --iterations 1000
"""

import argparse

import torch

from kdcache import CacheDataset, DistillLoss, LabelledDataset, build_model, evaluate_model, open_cache, open_split
from kdcache.training import sample_loader

parser = argparse.ArgumentParser(description="Train kdcache:tiny on labels and on a cache's targets.")
parser.add_argument("--data", default="scenes", help="labelled images")
parser.add_argument("--val", help="labelled images to validate on at the end")
parser.add_argument("--cache", help="cache that build-teacher-cache wrote (default: train on labels only)")
parser.add_argument(
    "--size", type=int, nargs=2, default=(288, 384), help="height and width of the images, without a cache"
)
parser.add_argument("--iterations", type=int, default=1000)
parser.add_argument("--batch-size", type=int, default=8)
parser.add_argument("--lr", type=float, default=1e-3)
options = parser.parse_args()

device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
classes = open_split(options.data, "train").classes
torch.manual_seed(0)
model = build_model("kdcache:tiny", len(classes)).to(device).train()
optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr, weight_decay=0.0)

dataset = LabelledDataset(open_split(options.data, "train"), tuple(options.size))
criterion = DistillLoss().to(device)
if options.cache:
    cache = open_cache(options.cache)  # distilled
    dataset = CacheDataset(cache)  # distilled
    criterion = DistillLoss(cache, kl_weight=0.3).to(device)  # distilled

loader = sample_loader(dataset, batch_size=options.batch_size, iterations=options.iterations, seed=0)
for number, batch in enumerate(loader, 1):
    batch = batch.to(device)
    outputs = model(model.normalise(batch.pixels))
    losses = criterion(outputs, batch)
    losses.loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if number % 20 == 1 or options.iterations <= 20:
        print(f"iteration {number} loss {losses.loss.item():.8f} ce {losses.ce.item():.8f} kl {losses.kl.item():.8f}")
if options.val:
    metrics = evaluate_model(model.eval(), open_split(options.val, "val"), dataset.size, device=device)
    print(f"mIoU {metrics.miou:.4f}")
