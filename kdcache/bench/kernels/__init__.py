"""Measuring the loss kernels: time, memory and accuracy against rivals whose code is here.

measure(Settings(...))   one row per case: ours and every rival, timed and weighed in one run
check(CheckSettings(...))  the accuracy grid against float64
"""

from kdcache.bench.header import header
from kdcache.bench.kernels.accuracy import GRADIENT_BOUND, CheckSettings, Judged, check, summary
from kdcache.bench.kernels.rivals import RIVALS, resolved
from kdcache.bench.kernels.roofline import Ceilings
from kdcache.bench.kernels.run import Measured, Row, Settings, measure
from kdcache.bench.kernels.shapes import DTYPES, LAYOUTS, PRESETS, Case, Shape, parse_names, parse_shapes
from kdcache.bench.timing import Spread

__all__ = [
    "DTYPES",
    "GRADIENT_BOUND",
    "LAYOUTS",
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
    "header",
    "measure",
    "parse_names",
    "parse_shapes",
    "resolved",
    "summary",
]
