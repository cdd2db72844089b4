"""A training loop without distillation: its own data set, augmentation, CE + Dice loss, and validation.

It looks like a loop with segmentation_models_pytorch, mmsegmentation or transformers. docs/loops.md shows the lines
that add distillation. A test applies and runs them.

    python examples/own_loop.py --data camvid --iterations 1000
"""

import argparse

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2

import kdcache

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Photos(Dataset):
    """A PyTorch data set of augmented images and masks. Any other source of files works, too."""

    def __init__(self, data, split, augment):
        self.files, self.augment = kdcache.open_split(data, split), augment

    def __len__(self):
        return len(self.files)

    def __getitem__(self, index):
        image = tv_tensors.Image(torch.from_numpy(self.files.image(index)).permute(2, 0, 1))
        mask = tv_tensors.Mask(torch.from_numpy(self.files.label(index)).long())
        return self.augment(image, mask)


def network(classes):
    """Return a network with logits at a quarter of the image's size. smp.Unet or a SegFormer works, too."""
    layers = []
    for before, after, stride in ((3, 24, 2), (24, 48, 2), (48, 48, 1)):
        layers += [nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
    return nn.Sequential(*layers, nn.Conv2d(48, classes, 1))


def ce_and_dice(logits, masks):
    """Return the sum of cross-entropy and Dice loss. Pixels of the void class 255 do not count."""
    logits = F.interpolate(logits, size=masks.shape[-2:], mode="bilinear", align_corners=False)
    known = (masks != 255)[:, None]
    one_hot = F.one_hot(masks.where(masks != 255, 0), logits.shape[1]).movedim(-1, 1) * known
    chances = logits.softmax(1) * known
    dice = 1 - (2 * (chances * one_hot).sum((0, 2, 3)) + 1) / (chances.sum((0, 2, 3)) + one_hot.sum((0, 2, 3)) + 1)
    return F.cross_entropy(logits, masks, ignore_index=255) + dice.mean()


@torch.no_grad()
def mean_iou(model, loader, classes):
    """Return the mIoU over the pixels of all images in the loader, 0 to 1."""
    counts = torch.zeros(classes, classes, dtype=torch.int64)
    for images, masks in loader:
        logits = F.interpolate(model.eval()(images), size=masks.shape[-2:], mode="bilinear", align_corners=False)
        known = masks != 255
        pairs = masks[known] * classes + logits.argmax(1)[known]
        counts += torch.bincount(pairs, minlength=classes**2).view(classes, classes)
    union = counts.sum(0) + counts.sum(1) - counts.diag()
    return (counts.diag() / union)[union > 0].mean().item()


def main():
    """Train the network with the settings of the command line, and print its mIoU."""
    parser = argparse.ArgumentParser(description="Train a small network on labels, in your own loop.")
    parser.add_argument("--data", default="scenes", help="labelled images")
    parser.add_argument("--size", type=int, nargs=2, default=(288, 384), help="height and width of the crops")
    parser.add_argument("--iterations", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--lr", type=float, default=1e-3)
    options = parser.parse_args()

    torch.manual_seed(0)
    np.random.seed(0)
    size = tuple(options.size)
    end = [v2.ToDtype({tv_tensors.Image: torch.float32, "others": None}, scale=True), v2.Normalize(MEAN, STD)]
    crops = v2.RandomResizedCrop(size, scale=(0.25, 1.0))
    augment = v2.Compose([crops, v2.RandomHorizontalFlip(), v2.ColorJitter(0.3, 0.3, 0.3), *end])
    train = Photos(options.data, "train", augment)
    val = Photos(options.data, "val", v2.Compose([v2.Resize(size), *end]))
    classes = len(train.files.classes)
    loader = DataLoader(train, batch_size=options.batch_size, shuffle=True, drop_last=True)
    val_loader = DataLoader(val, batch_size=options.batch_size)
    model = network(classes)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr)

    step = 0
    while step < options.iterations:
        for images, masks in loader:
            logits = model.train()(images)
            loss = ce_and_dice(logits, masks)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            print(f"iteration {step} loss {loss.item():.6f}")
            if step == options.iterations:
                break
    print(f"mIoU {mean_iou(model, val_loader, classes):.4f}")


if __name__ == "__main__":
    main()
