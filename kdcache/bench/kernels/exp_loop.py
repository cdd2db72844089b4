# mypy: allow-untyped-decorators, allow-untyped-defs, allow-incomplete-defs
"""A Triton loop of exponentials, for the ceiling of a GPU's special function units.

x = 2**-x has its fixed point at 0.64, so nothing overflows and no compiler can shorten it. A thread carries eight
independent chains, enough to hide the latency of one.
"""

import triton
import triton.language as tl

BLOCK, WARPS = 1024, 4


@triton.jit
def exp2_loop(out_ptr, rounds, BLOCK: tl.constexpr):
    """Write x after `rounds` exponentials to (programs * BLOCK,) float32."""
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = (offs % 64).to(tl.float32) * 0.01
    for _ in range(rounds):
        x = tl.exp2(-x)
    tl.store(out_ptr + offs, x)
