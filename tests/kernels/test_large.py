"""What sizes cost: peak memory far below one tensor of label size times classes, and more than 2^31 logits."""

import subprocess
import sys

import pytest
import torch

from kdcache_kernels import PackedTarget, distill_loss

MIB = 2**20
B, C, SIDE, STRIDE = 2, 21, 512, 4

CALL = f"""
import torch
from kdcache.bench.kernels.memory import peak_in_process
from kdcache_kernels import PackedTarget, distill_loss

torch.set_num_threads(2)
B, C, SIDE, STRIDE = {B}, {C}, {SIDE}, {STRIDE}

def call(side):
    logits, values = torch.randn(2, B, C, side // STRIDE, side // STRIDE)
    target = PackedTarget(values.half(), None, None, C, (side, side))
    labels = torch.randint(0, C, (B, side, side), dtype=torch.uint8)
    logits.requires_grad_()
    return lambda: distill_loss(logits, labels, target, kl_weight=1.0, temperature=2.0).loss.backward()

call(16)()  # loads the code
print(peak_in_process(call(SIDE)))
"""


def test_memory_on_the_cpu():
    """In a process of its own: what one has freed before, the system does not take back."""
    done = subprocess.run([sys.executable, "-c", CALL], capture_output=True, text=True, check=True)
    peak_mib = float(done.stdout.split()[-1])
    one_tensor_mib = 4 * B * C * SIDE**2 / MIB
    assert 0 < peak_mib < one_tensor_mib


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
def test_memory_on_a_gpu():
    grid = SIDE // STRIDE
    logits, values = torch.randn(2, B, C, grid, grid, device="cuda")
    target = PackedTarget(values.half(), None, None, C, (SIDE, SIDE))
    labels = torch.randint(0, C, (B, SIDE, SIDE), dtype=torch.uint8, device="cuda")
    logits.requires_grad_()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    distill_loss(logits, labels, target, kl_weight=1.0, temperature=2.0).loss.backward()
    assert torch.cuda.max_memory_allocated() - before < 4 * B * C * SIDE**2 / 2


def has_memory(gib):
    return torch.cuda.is_available() and torch.cuda.mem_get_info()[0] > gib * 2**30


@pytest.mark.skipif(not has_memory(48), reason="takes 48 GiB of a CUDA device")
@pytest.mark.parametrize("size", [512, 500], ids=["cells", "tiles"])
def test_more_than_2_to_the_31_logits(size):
    """The last image of many against itself alone, to the bit: offsets that wrap would read another image."""
    images, classes, grid = 880, 150, 128
    generator = torch.Generator(device="cuda").manual_seed(0)
    logits = torch.empty(images, classes, grid, grid, dtype=torch.bfloat16, device="cuda").normal_(generator=generator)
    assert logits.numel() > 2**31
    values = torch.randn(images, 8, grid, grid, dtype=torch.float16, device="cuda", generator=generator)
    indices = torch.arange(8, dtype=torch.uint8, device="cuda")[None, :, None, None].expand(values.shape).contiguous()
    tail = torch.zeros(images, grid, grid, dtype=torch.float16, device="cuda")
    labels = torch.randint(0, classes, (images, size, size), dtype=torch.uint8, device="cuda", generator=generator)

    def gradient(first):
        part = logits[first:].detach().requires_grad_()
        target = PackedTarget(values[first:], indices[first:], tail[first:], classes, (size, size))
        options = {"kl_weight": 1.0, "temperature": 2.0, "ce_denominator": 1000.0, "kl_denominator": 1000.0}
        distill_loss(part, labels[first:], target, **options).loss.backward()
        return part.grad[-1].clone()

    assert torch.equal(gradient(0), gradient(images - 1))
