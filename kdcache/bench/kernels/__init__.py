"""Measure the loss kernels: time, memory and accuracy against rivals implemented here.

measure(Settings(...))   yield a row per case: ours and every rival, timed and weighed in one run
check(CheckSettings(...))  the accuracy grid against float64, point by point
"""

from kdcache.bench.kernels.accuracy import EVERY, GRADIENT_BOUND, CheckSettings, Judged, check, summary
from kdcache.bench.kernels.rivals import RIVALS, resolved
from kdcache.bench.kernels.roofline import Ceilings
from kdcache.bench.kernels.run import Measured, Row, Settings, measure, measure_ceilings
from kdcache.bench.kernels.shapes import DTYPES, KINDS, PRESETS, Case, Shape, parse_names, parse_shapes
from kdcache.bench.timing import Spread

__all__ = [
    "DTYPES",
    "EVERY",
    "GRADIENT_BOUND",
    "KINDS",
    "PRESETS",
    "RIVALS",
    "Case",
    "Ceilings",
    "CheckSettings",
    "Judged",
    "Measured",
    "Row",
    "Settings",
    "Shape",
    "Spread",
    "check",
    "measure",
    "measure_ceilings",
    "parse_names",
    "parse_shapes",
    "resolved",
    "summary",
]
