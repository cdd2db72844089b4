"""A training step on several processes that computes what one process would on the whole batch.

| what | how |
| --- | --- |
| gradients | averaged by DistributedDataParallel, while the backward runs |
| denominators of the loss | the whole batch's, divided by the number of processes: the average is then the sum |
| BatchNorm | statistics of the whole batch: torch's SyncBatchNorm on GPUs, `HostBatchNorm` on CPUs |

The model keeps the names and tensors of its state, so several processes can resume what one saved, and the reverse.
Random numbers that a model draws (dropout) differ between processes, and so from a single process's:
kdcache:tiny draws none, kdcache:base has dropout before its classifier.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from kdcache.distill import Streams
from kdcache.training.distributed import World
from kdcache.training.step.eager import EagerStep


def distribute(eager: EagerStep, batch: Streams, world: World) -> None:
    """Change an eager step into this process's part of a common step of all processes.

    Gradients, BatchNorm statistics and the denominators of the loss's means are then computed over all processes.

    Args:
        eager: the step, which is changed.
        batch: this process's part of a first batch. A trial step with it, which is undone, finds out whether some
            parameters get no gradient.
        world: the processes that train together.
    """
    eager.average = world.mean
    eager.criterion.share(world.rows)
    share_statistics(eager.model, eager.device)
    with eager.rehearsal():
        torch.autograd.backward(eager.forward(eager.to_device(eager.held(batch))).loss)
        idle = any(p.requires_grad and p.grad is None for p in eager.model.parameters())
    eager.network = DistributedDataParallel(
        eager.model,
        device_ids=[eager.device] if eager.device.type == "cuda" else None,
        find_unused_parameters=any(world.gather(idle)),
    )


def share_statistics(model: nn.Module, device: torch.device) -> None:
    """Replace the model's BatchNorms by layers that use the statistics of all processes' samples.

    `device` is where the model is trained: on CUDA, PyTorch's own layers are used.
    """
    if device.type == "cuda":
        nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]
        return
    for module in model.modules():
        if type(module) in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d):
            module.__class__ = HostBatchNorm  # the same parameters, buffers, hooks and names


class HostBatchNorm(_BatchNorm):
    """BatchNorm over all processes for CPU tensors, which nn.SyncBatchNorm does not support."""

    def _check_input_dim(self, x: Tensor) -> None:
        """Accept any number of dimensions, because this class replaces BatchNorms of several dimensions."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise `x` (N, C, ...) by the statistics of all processes, or in eval mode by the running statistics."""
        if not self.training:
            return super().forward(x)
        channels, shape = x.shape[1], [1, -1, *[1] * (x.ndim - 2)]
        wide = x.float()
        var, mean = torch.var_mean(wide, [dim for dim in range(x.ndim) if dim != 1], correction=0)
        var, mean = var.double(), mean.double()
        count = mean.new_full((1,), x.numel() // channels)
        sums: Tensor = _Sum.apply(torch.cat([count, count * mean, count * (var + mean.square())]))
        count, mean = sums[:1].detach(), sums[1 : channels + 1] / sums[:1].detach()
        var = (sums[channels + 1 :] / count - mean.square()).clamp_min(0)
        self._track(mean.detach(), var.detach() * count / (count - 1))
        scale = torch.rsqrt(var + self.eps).float()
        y = (wide - mean.float().view(shape)) * (scale if self.weight is None else scale * self.weight).view(shape)
        return (y if self.bias is None else y + self.bias.view(shape)).to(x.dtype)

    def _track(self, mean: Tensor, unbiased_var: Tensor) -> None:
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked.add_(1)
        factor = 1 / int(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), factor)
        self.running_var.lerp_(unbiased_var.to(self.running_var.dtype), factor)


class _Sum(torch.autograd.Function):
    """The sum over the processes. The gradient is also summed over the processes."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        total = tensor.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total
