"""Measuring the loss kernels: time, memory and accuracy against rivals whose code is here.

measure(Settings(...))   one row per case: ours and every rival, timed and weighed in one run
check(CheckSettings(...))  the accuracy grid against float64
"""

from kdcache.evaluate.bench.accuracy import GRADIENT_BOUND, CheckSettings, Judged, check, summary
from kdcache.evaluate.bench.header import header
from kdcache.evaluate.bench.rivals import RIVALS, resolved
from kdcache.evaluate.bench.roofline import Ceilings
from kdcache.evaluate.bench.run import Measured, Row, Settings, measure
from kdcache.evaluate.bench.shapes import DTYPES, LAYOUTS, PRESETS, Case, Shape, parse_names, parse_shapes
from kdcache.evaluate.bench.timing import Spread

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
