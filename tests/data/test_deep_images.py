"""Images of 16 bits per channel, found by the file's header and scaled once, and images of many pixels."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import kdcache
from kdcache.data import check, convert, open_split
from kdcache.data.files import MEGAPIXELS, channel_bits, read_image
from kdcache.errors import DataError, RecipeError

PNG_COLOUR_TYPES = {1: 0, 3: 2, 4: 6}


def levels(channels: int, most: int = 4095) -> np.ndarray:
    """Levels of 12 bits, uint16 (9, 14, channels)."""
    return np.random.default_rng(channels).integers(0, most + 1, (9, 14, channels)).astype(np.uint16)


def write_png(path: Path, pixels: np.ndarray) -> None:
    """A PNG of 16 bits whose rows have the filters none, sub and up in turn: no library is asked."""
    height, width, channels = pixels.shape
    rows = pixels.astype(">u2").reshape(height, -1).view(np.uint8)
    lines = []
    for number, row in enumerate(rows):
        before = np.zeros_like(row)
        if number % 3 == 1:
            before[2 * channels :] = row[: -2 * channels]
        elif number % 3 == 2:
            before = rows[number - 1]
        lines.append(bytes([number % 3]) + (row - before).tobytes())
    header = struct.pack(">IIBBBBB", width, height, 16, PNG_COLOUR_TYPES[channels], 0, 0, 0)
    chunks = (b"IHDR", header), (b"IDAT", zlib.compress(b"".join(lines))), (b"IEND", b"")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + b"".join(struct.pack(">I", len(c)) + t + c + struct.pack(">I", zlib.crc32(t + c)) for t, c in chunks)
    )


def write_tiff(path: Path, pixels: np.ndarray, order: str = "<", sample_format: int = 1) -> None:
    """An uncompressed TIFF of the array's own bits, of one strip, in an order of bytes: no library is asked."""
    height, width, channels = pixels.shape
    data = pixels.astype(pixels.dtype.newbyteorder(order)).tobytes()
    tags = [(256, 4, width), (257, 4, height), (258, 3, None), (259, 3, 1), (262, 3, 2 if channels > 1 else 1)]
    tags += [(273, 4, 8), (277, 3, channels), (278, 4, height), (279, 4, len(data))]
    tags += [(338, 3, 2)] if channels == 4 else []
    tags += [(339, 3, sample_format)] if channels == 1 else []
    bits = struct.pack(f"{order}{channels}H", *[8 * pixels.itemsize] * channels)
    after = 8 + len(data)
    entries = b""
    for tag, kind, value in tags:
        count = 1 if value is not None else channels
        if value is None:
            field = bits.ljust(4, b"\0") if channels <= 2 else struct.pack(f"{order}I", after)
        else:
            field = struct.pack(f"{order}HH", value, 0) if kind == 3 else struct.pack(f"{order}I", value)
        entries += struct.pack(f"{order}HHI", tag, kind, count) + field
    start = after + len(bits)
    mark = b"II*\0" if order == "<" else b"MM\0*"
    directory = struct.pack(f"{order}H", len(tags)) + entries + bytes(4)
    path.write_bytes(mark + struct.pack(f"{order}I", start) + data + bits + directory)


def write_deep(path: Path, pixels: np.ndarray) -> None:
    if path.suffix == ".png":
        write_png(path, pixels)
    else:
        write_tiff(path, pixels, "<" if path.stem.endswith("little") else ">")


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("name", ["a.png", "a little.tif", "a big.tif"])
def test_16_bits_are_refused_with_the_fix_and_scaled_to_the_high_8_of_the_bits_in_use(name, channels, tmp_path) -> None:
    path, pixels = tmp_path / name, levels(channels)
    write_deep(path, pixels)
    assert channel_bits(path) == 16
    with pytest.raises(DataError, match="it has 16 bits per channel") as refused:
        read_image(path)
    assert "data convert SRC DST --bits N" in refused.value.fix
    rgb = np.broadcast_to(pixels[..., :3], (*pixels.shape[:2], 3))
    assert np.array_equal(read_image(path, 12), (rgb >> 4).astype(np.uint8))
    assert np.array_equal(read_image(path, 16), (rgb >> 8).astype(np.uint8))


def test_a_level_beyond_the_bits_names_the_bits_that_hold_it(tmp_path) -> None:
    write_png(tmp_path / "a.png", np.full((4, 4, 3), 4096, np.uint16))
    with pytest.raises(RecipeError, match="it has a level of 4096") as refused:
        read_image(tmp_path / "a.png", 12)
    assert "--bits 13" in refused.value.fix
    assert (read_image(tmp_path / "a.png", 13) == 128).all()


def test_floats_and_numbers_with_a_sign_are_not_scaled(tmp_path) -> None:
    write_tiff(tmp_path / "signed.tif", levels(1), sample_format=2)
    write_tiff(tmp_path / "float.tif", levels(1).astype(np.float32), sample_format=3)
    for name, bits in (("signed", 16), ("float", 32)):
        for given in (None, 16):
            with pytest.raises(DataError, match=f"it has {bits} bits") as refused:
                read_image(tmp_path / f"{name}.tif", given)
            assert "Save it as 8-bit RGB" in refused.value.fix


def test_8_bits_stay_as_they_are_also_with_bits(tmp_path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    for name in ("a.png", "a.tif", "a.webp"):
        Image.fromarray(pixels).save(tmp_path / name, lossless=True)
        assert np.array_equal(read_image(tmp_path / name, 12), pixels)


def test_pillow_images_of_16_bits_in_a_program_are_refused(tmp_path) -> None:
    write_png(tmp_path / "a.png", levels(3))
    with Image.open(tmp_path / "a.png") as image, pytest.raises(DataError, match="not 8-bit RGB") as refused:
        kdcache.from_dataset([{"image": image, "label": np.zeros((9, 14), np.uint8)}], classes=["a", "b"])
    assert "RGB;16B" in refused.value.problem


def folder(root: Path, tiny, most: int = 4095) -> Path:
    """A data set whose images have 16 bits, but for one."""
    tiny.write("folder", root)
    for number, path in enumerate(sorted(root.glob("images/*/*.jpg"))[1:]):
        path.unlink()
        pixels = np.random.default_rng(number).integers(0, most + 1, (*tiny.SIZE, 3)).astype(np.uint16)
        write_png(path.with_suffix(".png"), pixels)
    return root


def test_a_data_set_of_16_bits_is_named_by_the_check_and_right_once_converted(tiny, tmp_path) -> None:
    root = folder(tmp_path / "data", tiny)
    report = check(root)
    assert len(report.problems) == 2
    assert "has 16 bits per channel" in report.problems[0]
    assert "--bits N" in report.problems[0]
    convert(root, tmp_path / "out", bits=12)
    assert check(tmp_path / "out").problems == []
    split = open_split(tmp_path / "out", "train")
    before = {path.stem: path for path in (root / "images/train").iterdir()}
    for index, sample in enumerate(split.ids):
        assert np.array_equal(split.image(index), read_image(before[sample], 12))
    with pytest.raises(RecipeError, match="which was converted with bits 12"):
        convert(root, tmp_path / "out", bits=13)


def test_a_conversion_with_too_few_bits_leaves_nothing_out_silently(tiny, tmp_path) -> None:
    root = folder(tmp_path / "data", tiny, most=65535)
    with pytest.raises(RecipeError, match="Cannot scale") as refused:
        convert(root, tmp_path / "out", bits=12)
    assert "--bits 16" in refused.value.fix


@pytest.mark.parametrize("bits", [8, 17, 0, -3])
def test_bits_that_16_do_not_have_are_refused(bits, tiny, tmp_path) -> None:
    with pytest.raises(RecipeError, match=f"Invalid value of --bits: {bits}"):
        convert(tiny.write("folder", tmp_path / "data"), tmp_path / "out", bits=bits)


def test_large_images_are_read_up_to_the_limit_that_is_set(tmp_path, monkeypatch) -> None:
    path = tmp_path / "large.png"
    Image.new("L", (1500, 1200)).save(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500_000)
    with pytest.raises(DataError, match="it has 2 megapixels, more than the limit") as refused:
        read_image(path)
    assert f"export {MEGAPIXELS}=2" in refused.value.fix
    monkeypatch.setenv(MEGAPIXELS, "2")
    assert read_image(path).shape == (1200, 1500, 3)
    monkeypatch.setenv(MEGAPIXELS, "1.7")
    with pytest.raises(DataError, match="more than the limit"):
        read_image(path)


@pytest.mark.parametrize("value", ["many", "0", "-5", "inf", "nan"])
def test_a_limit_that_is_no_number_is_named(value, tmp_path, monkeypatch) -> None:
    Image.new("L", (8, 8)).save(tmp_path / "a.png")
    monkeypatch.setenv(MEGAPIXELS, value)
    with pytest.raises(DataError, match=f"Invalid value of {MEGAPIXELS}: '{value}'"):
        read_image(tmp_path / "a.png")
