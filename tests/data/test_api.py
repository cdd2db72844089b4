"""What the package exports and what importing it costs."""

from __future__ import annotations

import subprocess
import sys

import kdcache.data


def test_exported_names() -> None:
    assert sorted(kdcache.data.__all__) == sorted(set(kdcache.data.__all__))
    for name in kdcache.data.__all__:
        assert hasattr(kdcache.data, name)
    assert {"open_split", "list_splits", "render", "Window", "prefetch", "check"} <= set(kdcache.data.__all__)


def test_importing_stays_light_and_one_way() -> None:
    code = (
        "import sys, kdcache.data;"
        "print(sorted({'.'.join(m.split('.')[:2]) for m in sys.modules if m.startswith('kdcache')}));"
        "print([m for m in ('torch', 'torchvision', 'triton', 'matplotlib', 'zarr') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.splitlines() == [
        "['kdcache', 'kdcache.bounded', 'kdcache.data', 'kdcache.errors', 'kdcache.files', 'kdcache.tasks']",
        "[]",
    ]
