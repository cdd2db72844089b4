"""The cost to run a model: parameters, arithmetic, time per image.

FLOPs count convolutions, matrix products and attention, two for each multiply-add (MACs are half of them), as
`torch.utils.flop_counter` does. Normalisations, activations and resizes do not count, as in most published tables.

A cost is stored with its run, in `cost-HxW-DIGEST.json`, for each network, size, device, number of threads and torch
version, and reused on the same machine.

Latency is the time from one normalised image on the device to logits at the image's size, without decoding and without
the copy to the device. It is a property of the network, whatever it was trained on.
"""

import hashlib
import json
import math
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from kdcache.files import read_object, write_whole
from kdcache.metrics.timing import cpu_name, no_garbage_collection
from kdcache.models import SegmentationModel
from kdcache.models.native import in_eval_mode
from kdcache.settings.shared import JudgeSettings

REPEATS, WARM_UP = JudgeSettings.repeats, 10
LEAST_REPEATS = 5
MOST_SECONDS = 10.0
"""A slow model is timed less often."""


@dataclass(frozen=True)
class Latency:
    """A model's time per image in milliseconds, at batch size 1.

    Attributes:
        mean_ms, std_ms, median_ms: over the timed calls. The standard deviation is NaN for a single call.
        repeats, warm_up: the number of timed calls, and of untimed calls before them.
        device: the name of the GPU or processor.
        threads: CPU threads that torch used.
    """

    mean_ms: float
    std_ms: float
    median_ms: float
    repeats: int
    warm_up: int
    device: str
    threads: int

    @property
    def fps(self) -> float:
        """Images per second, one after the other."""
        return 1000 / self.mean_ms


@dataclass(frozen=True)
class Cost:
    """A model's cost for one image.

    Attributes:
        size: (H, W) of the image in pixels.
        parameters: number of parameters.
        flops: floating-point operations, two for each multiply-add.
        latency: time per image, or None if it was not measured.
        reused: whether the latency was measured by an earlier comparison, on the same kind of machine.
    """

    size: tuple[int, int]
    parameters: int
    flops: int
    latency: Latency | None
    reused: bool = False

    @property
    def macs(self) -> int:
        """The number of multiply-adds for one image."""
        return self.flops // 2

    def to_json(self) -> dict[str, Any]:
        """Return the attributes and `macs` as JSON values. A `latency` also has `fps`, the images per second."""
        latency = None if self.latency is None else {**asdict(self.latency), "fps": self.latency.fps}
        return {**asdict(self), "size": list(self.size), "macs": self.macs, "latency": latency}


def measure_cost(
    model: SegmentationModel, size: tuple[int, int], *, device: torch.device | str = "cpu", repeats: int = REPEATS
) -> Cost:
    """Return a model's cost for one image: its parameters, operations and time.

    The model moves to `device`. It is measured in eval mode, and then returns to the mode that it had.

    Args:
        model: the model.
        size: (H, W) of the image in pixels.
        device: such as "cpu" or "cuda".
        repeats: the largest number of timed calls. 0 measures no latency.
    """
    with in_eval_mode(model.to(device)):
        latency = measure_latency(model, size, repeats=repeats) if repeats else None
        parameters = sum(parameter.numel() for parameter in model.parameters())
        return Cost(size, parameters, count_flops(model, size), latency)


def count_flops(model: SegmentationModel, size: tuple[int, int]) -> int:
    """Return the floating-point operations for one image of `size` (H, W), two for each multiply-add.

    The model should be in eval mode.
    """
    # Attention as plain products: the counter knows not every fused kernel, that of the CPU for one.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 3, *size, device=_device(model)))
    return int(counter.get_total_flops())


def measure_latency(model: SegmentationModel, size: tuple[int, int], *, repeats: int = REPEATS) -> Latency:
    """Measure a model's time in milliseconds on one image of `size` (H, W), on the model's device.

    The model should be in eval mode. A timed call includes the resize of the outputs to the image's size, and waits for
    the GPU. `repeats` is the number of timed calls. A slow model is timed less often.
    """
    device = _device(model)
    x_13HW = torch.rand(1, 3, *size, device=device).contiguous(memory_format=torch.channels_last)
    with torch.inference_mode(), no_garbage_collection():
        warmed = _calls(model, x_13HW, size, least=1, most=WARM_UP, seconds=MOST_SECONDS / 5)
        samples_ms = _calls(model, x_13HW, size, least=min(LEAST_REPEATS, repeats), most=repeats, seconds=MOST_SECONDS)
    return Latency(
        mean_ms=statistics.fmean(samples_ms),
        std_ms=statistics.stdev(samples_ms) if len(samples_ms) > 1 else math.nan,
        median_ms=statistics.median(samples_ms),
        repeats=len(samples_ms),
        warm_up=len(warmed),
        device=hardware_name(device),
        threads=torch.get_num_threads(),
    )


def hardware_name(device: torch.device) -> str:
    """Return the GPU's name for a CUDA device, or the processor's name for any other device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()


def _calls(
    model: SegmentationModel, x_13HW: Tensor, size: tuple[int, int], *, least: int, most: int, seconds: float
) -> list[float]:
    """Time calls of a model until `seconds` have passed, at least `least` and at most `most`. Return milliseconds."""
    samples_ms: list[float] = []
    first = time.perf_counter()
    while len(samples_ms) < most and (len(samples_ms) < least or time.perf_counter() - first < seconds):
        began = time.perf_counter()
        for head_1Chw in model(x_13HW).heads.values():
            model.upsample(head_1Chw, size)
        if x_13HW.is_cuda:
            torch.cuda.synchronize(x_13HW.device)
        samples_ms.append(1e3 * (time.perf_counter() - began))
    return samples_ms


def _device(model: SegmentationModel) -> torch.device:
    return next(model.parameters(), torch.empty(0)).device


@dataclass(frozen=True)
class CostKey:
    """The facts that a stored latency depends on. A latency is reused only if all of them are equal.

    Attributes:
        spec: the model's spec.
        classes: number of classes.
        size: (H, W) of the image in pixels.
        device: the name of the GPU or processor.
        threads: CPU threads that torch uses.
        torch: torch's version.
    """

    spec: str
    classes: int
    size: tuple[int, int]
    device: str
    threads: int
    torch: str

    @classmethod
    def of(cls, spec: str, classes: int, size: tuple[int, int], device: str) -> "CostKey":
        """Return the key for a model on this machine, with the current number of threads and version of torch.

        Args:
            spec: the model's spec.
            classes: number of classes.
            size: (H, W) of the image in pixels.
            device: such as "cpu" or "cuda".
        """
        return cls(spec, classes, size, hardware_name(torch.device(device)), torch.get_num_threads(), torch.__version__)

    def path(self, folder: Path) -> Path:
        """Return the path of the JSON file in a run's folder that stores the cost for this key."""
        digest = hashlib.sha256(json.dumps(asdict(self)).encode()).hexdigest()
        return folder / f"cost-{self.size[0]}x{self.size[1]}-{digest[:8]}.json"


def kept_cost(folder: Path, key: CostKey, repeats: int) -> Cost | None:
    """Read the cost that an earlier comparison stored in a run's folder.

    Return None if no cost is stored for `key`, if the file is damaged, or if that comparison asked for fewer `repeats`.
    """
    content = read_object(key.path(folder))
    try:
        if content["key"] != json.loads(json.dumps(asdict(key))) or content["asked"] < repeats:
            return None
        latency = Latency(**content["latency"])
        return Cost(key.size, int(content["parameters"]), int(content["flops"]), latency, reused=True)
    except (KeyError, TypeError):
        return None


def keep_cost(folder: Path, key: CostKey, cost: Cost, repeats: int) -> str | None:
    """Store the cost for `key` in a run's folder, completely or not at all. A cost without a latency is not stored.

    `repeats` is the number of timed calls that was asked for, even if fewer were made. Return a warning if the file
    cannot be written, else None.
    """
    if cost.latency is None:
        return None
    content: dict[str, Any] = {
        "key": asdict(key),
        "asked": repeats,
        "parameters": cost.parameters,
        "flops": cost.flops,
        "latency": asdict(cost.latency),
    }
    try:
        write_whole(key.path(folder), json.dumps(content, indent=1) + "\n")
    except OSError as error:  # it costs the next comparison, no more
        return f"the timing of {folder} could not be kept there ({error.strerror})"
    return None
