"""Choose the family for a problem on the CPU: torch if a table of measured times says that it is faster.

`choice.json` has numba's time relative to torch's, by the label pixels of a cell along an axis ("one cell" for images
of one pixel), the classes, and the label pixels of a batch. `benchmarks/choice.py` measures it. A problem has the value
of the largest measured one that exceeds it in neither classes nor pixels. Unmeasured strides use numba. So the choice
depends only on the problem and the file, not on clock, machine or threads.
"""

import json
from bisect import bisect_right
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from ..problem import LossProblem

LEAST = 1.1
"""How many times as long numba takes from where torch is chosen: what is closer is noise."""
MOST = 1_200_000
"""Classes times label pixels up to which maps were measured; torch would need much memory for larger ones."""
ONE_CELL = "one cell"
FILE = Path(__file__).parent / "choice.json"


def prefers_torch(problem: LossProblem) -> bool:
    """Return True if the "torch" implementation is faster for a problem than "numba", by a table of measured times.

    It is False for problems with windows or flips.
    """
    if problem.window is not None or problem.flip is not None:
        return False
    B, C, h, w = problem.student.shape
    target = (h, w) if problem.target is None else tuple(problem.target.values.shape[2:])
    H, W = problem.size
    one_cell = (h, w) == target == (H, W) == (1, 1)
    return torch_is_faster(ONE_CELL if one_cell else str(min(H // h, W // w)), C, B * H * W)


@lru_cache(maxsize=256)
def torch_is_faster(kind: str, classes: int, pixels: int) -> bool:
    """Look up in a table of measured times whether "torch" is faster than "numba".

    Args:
        kind: label pixels per logit along an axis as text, such as "4", or "one cell" for images of one pixel.
        classes: C.
        pixels: label pixels of the batch.
    """
    table = _table()
    measured = table["kinds"].get(kind)
    if measured is None or (kind != ONE_CELL and classes * pixels > MOST):
        return False
    row, column = bisect_right(table["classes"], classes) - 1, bisect_right(measured["pixels"], pixels) - 1
    if row < 0 or column < 0:
        return False
    while measured["ratios"][row][column] is None:
        column -= 1  # too large to be measured: the largest that was
    return float(measured["ratios"][row][column]) >= LEAST


@cache
def _table() -> dict[str, Any]:
    table: dict[str, Any] = json.loads(FILE.read_text(encoding="utf-8"))
    return table
