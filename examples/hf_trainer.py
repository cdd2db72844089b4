"""Train a SegFormer of transformers from a cache, with the Trainer of transformers.

Distillation needs the three lines that are marked `distilled`. Without --cache, the network learns from labels only.
The Trainer needs batches as dictionaries.

    python examples/hf_trainer.py --cache camvid.zarr --data camvid --iterations 1000
"""

import argparse
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import default_collate
from transformers import SegformerConfig, SegformerForSemanticSegmentation, Trainer, TrainingArguments, set_seed

import kdcache
from kdcache import Batch, CacheDataset, DistillLoss, LabelledDataset, open_cache, open_split

MEAN, STD = (torch.tensor(values).view(1, 3, 1, 1) for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))


def normalised(pixels: Tensor) -> Tensor:
    """Return images, uint8 (B, H, W, 3), as the network's input: normalised float32 (B, 3, H, W)."""
    return (pixels.permute(0, 3, 1, 2).float() / 255 - MEAN.to(pixels.device)) / STD.to(pixels.device)


class LossTrainer(Trainer):
    """A Trainer that uses a DistillLoss."""

    def __init__(self, criterion: DistillLoss, **named: Any) -> None:
        super().__init__(data_collator=lambda samples: default_collate(samples).to_dict(), **named)
        self.criterion = criterion.to(self.args.device)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the distillation loss of a batch, or (loss, outputs) if `return_outputs` is set."""
        batch = Batch.from_dict(inputs)
        outputs = model(pixel_values=normalised(batch.pixels))
        losses = self.criterion(outputs.logits, batch)
        print(f"iteration {self.state.global_step + 1} loss {losses.loss.item():.8f} kl {losses.kl.item():.8f}")
        return (losses.loss, outputs) if return_outputs else losses.loss


def main() -> None:
    """Train a SegFormer with the settings of the command line, then validate it."""
    parser = argparse.ArgumentParser(description="Train a small SegFormer on labels and on a cache's targets.")
    parser.add_argument("--data", default="scenes", help="labelled images")
    parser.add_argument("--val", help="labelled images to validate on at the end")
    parser.add_argument("--cache", help="cache that build-teacher-cache wrote (default: train on labels only)")
    parser.add_argument(
        "--size", type=int, nargs=2, default=(288, 384), help="height and width of the images, without a cache"
    )
    parser.add_argument("--iterations", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--out", default="runs/hf", help="where the Trainer keeps what it writes")
    options = parser.parse_args()

    set_seed(0)
    classes = open_split(options.data, "train").classes
    model = SegformerForSemanticSegmentation(SegformerConfig(num_labels=len(classes)))  # of the size of a B0

    dataset = LabelledDataset(open_split(options.data, "train"), tuple(options.size))
    criterion = DistillLoss()
    if options.cache:
        cache = open_cache(options.cache)  # distilled
        dataset = CacheDataset(cache)  # distilled
        criterion = DistillLoss(cache, kl_weight=0.3)  # distilled

    arguments = TrainingArguments(
        output_dir=options.out,
        max_steps=options.iterations,
        per_device_train_batch_size=options.batch_size,
        learning_rate=options.lr,
        remove_unused_columns=False,  # a dataset's own names, which the Trainer compares with the model's
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    LossTrainer(criterion, model=model, args=arguments, train_dataset=dataset).train()
    if options.val:  # normalised by ImageNet's moments, as above
        metrics = kdcache.evaluate(model, options.val, size=dataset.size)
        print(f"mIoU {metrics.segmentation.miou:.4f}")


if __name__ == "__main__":
    main()
