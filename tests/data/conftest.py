"""Data folders made of real files."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

SIZE = (6, 8)


class Builder:
    """Writes images and labels below a folder; every default is valid."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def classes(self, text: str = "road\ncar\nsky\n") -> Builder:
        self.root.mkdir(exist_ok=True)
        (self.root / "classes.txt").write_text(text, encoding="utf-8")
        return self

    def image(self, name: str, split: str = "train", size: tuple[int, int] = SIZE, **options: object) -> Path:
        path = self._path("images", split, name)
        pixels = np.random.default_rng(len(name)).integers(0, 256, (*size, 3), dtype=np.uint8)
        kind = {"jpg": "JPEG", "tif": "TIFF"}.get(name.rpartition(".")[2].lower())
        Image.fromarray(pixels).save(path, format=kind, **options)
        return path

    def label(self, name: str, ids: np.ndarray | None = None, split: str = "train") -> Path:
        path = self._path("labels", split, name)
        Image.fromarray(np.ones(SIZE, np.uint8) if ids is None else ids).save(path, format="PNG")
        return path

    def pair(self, stem: str, split: str = "train") -> Builder:
        self.image(f"{stem}.png", split)
        self.label(f"{stem}.png", split=split)
        return self

    def _path(self, kind: str, split: str, name: str) -> Path:
        path = self.root / kind / split / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path


@pytest.fixture
def builder(tmp_path: Path) -> Builder:
    """An empty data folder with three classes."""
    return Builder(tmp_path / "data").classes()


@pytest.fixture
def new_builder(tmp_path: Path) -> Callable[[str], Builder]:
    """Further empty folders, without a class list."""
    return lambda name: Builder(tmp_path / name)


@pytest.fixture(scope="session")
def tiny() -> SimpleNamespace:
    """The writer of tiny data sets in each layout: tiny.write(layout, root) and what else tiny.py has."""
    return SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("tiny.py"))))
