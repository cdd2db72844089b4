"""The fresh process of `memory.py`: warm a contestant up on a tiny shape, weigh one step, print the peak.

python -m kdcache.bench.kernels.peak_worker JSON
"""

import json
import sys
from dataclasses import replace
from typing import Any

import torch

from kdcache.bench.kernels.memory import peak_in_process
from kdcache.bench.kernels.rivals import prepare
from kdcache.bench.kernels.shapes import Case, Shape, make_inputs


def main(request: dict[str, Any]) -> None:
    """Weigh the contestant `name` on `case`, with `impl` and `threads`; the last line printed is JSON."""
    case = Case(**{**request["case"], "shape": Shape(**request["case"]["shape"])})
    name, impl, cpu = request["name"], request["impl"], torch.device("cpu")
    torch.set_num_threads(request["threads"])
    side = 4 * case.shape.stride
    tiny = replace(case, shape=Shape(1, case.shape.num_classes, side, side, case.shape.stride))
    prepare(name, tiny, make_inputs(tiny, cpu), impl).step()
    contestant = prepare(name, case, make_inputs(case, cpu), impl)
    if name.startswith("compile"):
        contestant.step()
    print(json.dumps({"peak_mib": peak_in_process(contestant.step)}))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
