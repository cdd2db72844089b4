"""A folder of compiled kernels that was made on one machine and is used on another.

Triton reads it by `TRITON_CACHE_DIR`. Two things stand in the way. Its entries name their files by absolute paths, so
that a folder in another place holds nothing for Triton until the paths are written anew. And it looks entries up by a
digest that covers Triton itself: another version, or the same for another Python, compiles everything again without a
word. A note in the folder says which one made it.
"""

import json
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kdcache.errors import RecipeError
from kdcache.files import write_whole

NOTE = "kdcache-kernels.json"
ARCHITECTURES = (
    *("sm_75", "sm_80", "sm_86", "sm_87", "sm_89", "sm_90", "sm_100", "sm_103", "sm_120"),
    *("gfx90a", "gfx942", "gfx950", "gfx1100"),
)
"""GPUs of NVIDIA by compute capability (sm_90: H100 and H200), and of AMD."""


def write_note(folder: Path, arch: str) -> None:
    """Note in a folder what fills it. Raises: RecipeError for a folder that another Triton filled."""
    here = _this_triton()
    if (note := read_note(folder)) is not None:
        _check_triton(folder, note, here)
        arch = " ".join(dict.fromkeys([*str(note["arch"]).split(), arch]))
    write_whole(folder / NOTE, json.dumps({"arch": arch, **here}, indent=1) + "\n")


def read_note(folder: Path) -> dict[str, Any] | None:
    """Return the note of a folder; None where there is none."""
    try:
        note = json.loads((folder / NOTE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return note if isinstance(note, dict) else None


def adopt(folder: Path) -> int:
    """Make a folder that was carried here usable in this place; return its number of kernels.

    Raises: RecipeError for a folder without a note, or one that another Triton filled.
    """
    note = read_note(folder)
    if note is None:
        raise RecipeError(
            "a folder of compiled kernels has a note of what filled it",
            received=f"{folder}, without {NOTE}",
            remedy="name the folder that kdcache kernels compile --out wrote, with all that is in it",
        )
    _check_triton(folder, note, _this_triton())
    groups = sorted(folder.glob("*/__grp__*.json"))
    for group in groups:
        names = json.loads(group.read_text(encoding="utf-8"))["child_paths"]
        here = {name: str(group.parent.resolve() / name) for name in names}
        write_whole(group, json.dumps({"child_paths": here}))
    return len(groups)


def folder_bytes(folder: Path) -> int:
    """Return the sum of the sizes of a folder's files."""
    return sum((Path(top) / name).stat().st_size for top, _, names in os.walk(folder) for name in names)


def _check_triton(folder: Path, note: dict[str, Any], here: dict[str, str]) -> None:
    there = {name: note.get(name) for name in here}
    if there != here:
        raise RecipeError(
            "a folder of compiled kernels serves the Triton that filled it",
            received=f"{folder}, filled by {_describe(there)}; here is {_describe(here)}",
            remedy="compile another folder with this Triton, here or in a virtual environment that has it",
        )


def _describe(note: Mapping[str, Any]) -> str:
    return f"Triton {note['triton']} for Python {note['python']}, {str(note['digest'])[:8]}"


def _this_triton() -> dict[str, str]:
    """Version, Python and digest of the Triton of this process. Raises: RecipeError where there is none."""
    try:
        import triton
        from triton.runtime.cache import triton_key
    except ImportError as error:
        raise RecipeError(
            "compiling needs Triton", received=str(error), remedy="pip install triton, which there is for Linux"
        ) from error
    python = ".".join(platform.python_version_tuple()[:2])
    return {"triton": triton.__version__, "python": python, "digest": str(triton_key())}
