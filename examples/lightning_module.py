"""Train a student from a cache with Lightning. Any network that maps images to class logits works.

Distillation needs the three lines that are marked `distilled`. Without --cache, the network learns from labels only.
Its logits may have any size, because the loss resizes them to the size of the labels.

    python examples/lightning_module.py --cache camvid.zarr --data camvid --iterations 1000
"""

import argparse
from typing import Any

import lightning
import torch
from torch import Tensor, nn

import kdcache
from kdcache import Batch, CacheDataset, DistillLoss, LabelledDataset, open_cache, open_split
from kdcache.training import sample_loader

MEAN, STD = (torch.tensor(values).view(1, 3, 1, 1) for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))


def normalised(pixels: Tensor) -> Tensor:
    """Return images, uint8 (B, H, W, 3), as the network's input: normalised float32 (B, 3, H, W)."""
    return (pixels.permute(0, 3, 1, 2).float() / 255 - MEAN.to(pixels.device)) / STD.to(pixels.device)


class Student(lightning.LightningModule):
    """A LightningModule with a network and its distillation loss."""

    def __init__(self, network: nn.Module, criterion: DistillLoss, lr: float) -> None:
        super().__init__()
        self.network = network
        self.criterion = criterion
        self.lr = lr

    def training_step(self, batch: Batch, number: int) -> Tensor:
        """Return the loss of a batch, which Lightning differentiates."""
        logits = self.network(normalised(batch.pixels))
        losses = self.criterion(logits, batch)
        self.log("loss", losses.loss, batch_size=len(logits))
        print(f"iteration {number + 1} loss {losses.loss.item():.8f} kl {losses.kl.item():.8f}")
        return losses.loss

    def configure_optimizers(self) -> Any:
        """Return AdamW for all parameters."""
        return torch.optim.AdamW(self.parameters(), lr=self.lr)


def small_network(classes: int) -> nn.Module:
    """Return a small network that maps (B, 3, H, W) to logits (B, classes, H/4, W/4)."""
    layers: list[nn.Module] = []
    for before, after, stride in ((3, 24, 2), (24, 48, 2), (48, 48, 1), (48, 48, 1)):
        layers += [nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
    return nn.Sequential(*layers, nn.Conv2d(48, classes, 1))


def main() -> None:
    """Train the student with the settings of the command line, then validate it."""
    parser = argparse.ArgumentParser(description="Train a small network on labels and on a cache's targets.")
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

    lightning.seed_everything(0, verbose=False)
    classes = open_split(options.data, "train").classes

    dataset = LabelledDataset(open_split(options.data, "train"), tuple(options.size))
    criterion = DistillLoss()
    if options.cache:
        cache = open_cache(options.cache)  # distilled
        dataset = CacheDataset(cache)  # distilled
        criterion = DistillLoss(cache, kl_weight=0.3)  # distilled

    student = Student(small_network(len(classes)), criterion, options.lr)
    loader = sample_loader(dataset, batch_size=options.batch_size, iterations=options.iterations)
    trainer = lightning.Trainer(
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(student, loader)
    if options.val:  # normalised by ImageNet's moments, as above
        metrics = kdcache.evaluate(student.network, options.val, size=dataset.size)
        print(f"mIoU {metrics.segmentation.miou:.4f}")


if __name__ == "__main__":
    main()
