"""examples/restyle.py: against the published algorithm with a full spectrum, and as a data set."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdcache.data import Window, check, open_split, render, write_scenes

FILE = Path(__file__).parents[2] / "examples" / "restyle.py"
SIDES = st.tuples(st.integers(2, 24), st.integers(2, 24))


def loaded() -> ModuleType:
    spec = importlib.util.spec_from_file_location("restyle_example", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


fourier_transfer = loaded().fourier_transfer


def noise(size: tuple[int, int], seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)


def published(source: np.ndarray, target: np.ndarray, beta: float) -> np.ndarray:
    """Both spectra whole, shifted, a square around the middle swapped; float64, neither rounded nor clipped."""
    height, width = source.shape[:2]
    reach = int(np.floor(min(height, width) * beta))
    result = np.empty(source.shape)
    for channel in range(3):
        own, other = (np.fft.fft2(image[..., channel].astype(np.float64)) for image in (source, target))
        amplitude, wanted = np.fft.fftshift(np.abs(own)), np.fft.fftshift(np.abs(other))
        y, x = height // 2, width // 2
        square = np.s_[max(y - reach, 0) : y + reach + 1, max(x - reach, 0) : x + reach + 1]
        amplitude[square] = wanted[square]
        back = np.fft.ifft2(np.fft.ifftshift(amplitude) * np.exp(1j * np.angle(own)))
        result[..., channel] = back.real
    return result


@given(size=SIDES, beta=st.sampled_from([0.01, 0.05, 0.09, 0.2, 0.33]), seed=st.integers(0, 99))
@settings(deadline=None)
def test_the_transfer_is_the_published_one(size: tuple[int, int], beta: float, seed: int) -> None:
    source, target = noise(size, seed), noise(size, seed + 100)
    source.flags.writeable = target.flags.writeable = False
    wanted = np.clip(published(source, target, beta), 0, 255)
    restyled = fourier_transfer(source, target, beta)
    assert restyled.dtype == np.uint8
    np.testing.assert_allclose(restyled, wanted, atol=0.5 + 1e-6)


def test_a_target_of_another_size_is_resized_to_the_source() -> None:
    source, target = noise((24, 32), 0), noise((50, 41), 1)
    resized = render(target, None, Window.full(50, 41), flip=False, size=(24, 32))[0]
    np.testing.assert_array_equal(fourier_transfer(source, target, 0.2), fourier_transfer(source, resized, 0.2))


def run(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", str(FILE), "game", "--like", "scenes:24x32,train=3,seed=9", *words]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def test_a_data_set_has_the_new_images_and_its_own_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_scenes(tmp_path / "game", "scenes:24x32,train=4,val=1")
    words = ("--beta", "0.1", "--out", "fda")
    assert "game,images=fda" in run(tmp_path, *words).stdout
    monkeypatch.chdir(tmp_path)
    source, new = open_split("game", "train"), open_split("game,images=fda", "train")
    assert all((new.label(n) == source.label(n)).all() for n in range(4))
    assert all((new.image(n) != source.image(n)).any() for n in range(4))
    assert check("game,images=fda", ["train"]).problems == []
    first = [path.read_bytes() for path in sorted((tmp_path / "fda/train").iterdir())]
    (tmp_path / "fda/train" / f"{source.ids[2]}.png").unlink()  # as after an interruption
    assert run(tmp_path, *words).returncode == 0
    assert [path.read_bytes() for path in sorted((tmp_path / "fda/train").iterdir())] == first
    other = run(tmp_path, "--beta", "0.2", "--out", "fda")
    assert (other.returncode, "other settings" in other.stderr) == (2, True)
    assert "at most 0.5, got 0.7" in run(tmp_path, "--beta", "0.7", "--out", "new").stderr
