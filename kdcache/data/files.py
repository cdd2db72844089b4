"""Decode one image, label or depth file, and fail on files that would decode to something unintended.

Pillow is too forgiving for training: it clips 16-bit grey to white, keeps the high byte of 16-bit RGB (12-bit pictures
turn black), stretches the ids of 4-bit grey labels (5 becomes 85) and ignores the camera's rotation. This module
handles all of these.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, ImageFile, ImageOps, TiffImagePlugin

from kdcache.data.colour_codes import ColourCodes
from kdcache.data.sample import Pixels
from kdcache.errors import DataError, RecipeError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
"""Compared in lower case."""

LABEL_SUFFIXES = (".png", ".tif", ".tiff")
"""Formats that keep every number; in lower case."""

UNREAD_LABEL_SUFFIXES = (".gif", ".npy", ".npz", ".mat", ".pgm", ".ppm")
"""Formats that labels are kept in elsewhere, which are not read: named where nothing else is there."""

MEGAPIXELS = "KDCACHE_MAX_MEGAPIXELS"
"""The environment variable with the megapixels up to which a picture is read, instead of Pillow's limit (179)."""

_TIFF_SIGNATURES = (b"II*\x00", b"MM\x00*", b"II+\x00", b"MM\x00+")
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PNG_COLOUR_TYPES = {0: "grey", 2: "RGB", 3: "palette", 4: "grey with alpha", 6: "RGBA"}
_QUARTER_TURNS = (5, 6, 7, 8)
"""EXIF orientations that swap height and width."""


def read_image(path: Path, bits: int | None = None) -> Pixels:
    """Return an image file as RGB, uint8 (H, W, 3), rotated as its EXIF data say.

    Alpha is dropped. Grey and palette images become RGB.

    Args:
        path: the image file.
        bits: the number of significant bits, 9 to 16, in images with 16 bits per channel. They are scaled to 8 bits.
            None makes such images an error.

    Raises:
        DataError: a file that cannot be read, or an image with more than 8 bits per channel that is not scaled: without
            `bits`, of more than 16 bits, or with signed or float levels.
        RecipeError: a pixel value that needs more than `bits` bits.
    """
    stored, plain = _header_bits(path)
    if stored > 8:
        if bits is None or stored > 16 or not plain:
            raise _too_deep(path, stored, scaled=stored <= 16 and plain)
        return _scaled(_levels(path), bits, path)
    with _opened(path, "image") as image:
        if image.mode.startswith(("I", "F")):  # of another format than PNG and TIFF
            raise _too_deep(path, 16 if image.mode.startswith("I;16") else 32, scaled=False)
        ImageOps.exif_transpose(image, in_place=True)
        if image.mode == "P" and "transparency" in image.info:
            return np.array(image.convert("RGBA").convert("RGB"))  # straight to RGB, Pillow warns
        return np.array(image.convert("RGB"))


def channel_bits(path: Path) -> int:
    """Return the number of bits per channel in the header of a PNG or TIFF, or 8 for other or damaged files."""
    return _header_bits(path)[0]


def _header_bits(path: Path) -> tuple[int, bool]:
    """Return the number of bits per channel, and whether the levels are unsigned integers."""
    try:
        with path.open("rb") as file:
            header = file.read(26)
            if header.startswith(_PNG_SIGNATURE) and len(header) == 26:
                return header[24], True
            if header.startswith(_TIFF_SIGNATURES):
                directory = TiffImagePlugin.ImageFileDirectory_v2(header[: 16 if b"+" in header[:4] else 8])
                file.seek(directory.next)
                directory.load(file)
                kinds = {*directory.get(TiffImagePlugin.SAMPLEFORMAT, (1,))}
                return max(map(int, directory.get(TiffImagePlugin.BITSPERSAMPLE, (1,)))), kinds == {1}
    except Exception:  # Pillow says what is wrong with the file, where it is decoded
        pass
    return 8, True


def _levels(path: Path) -> npt.NDArray[np.uint16]:
    """Return an image with 9 to 16 bits per channel as uint16 (H, W, 3), RGB, rotated as its EXIF data say.

    Pillow keeps only the high byte of each level of RGB. With the byte order swapped, it keeps the low byte.

    Raises: DataError for a file that cannot be read, or a kind of image that Pillow decodes in another way.
    """
    planes: list[Pixels] = []
    for other_order in (False, True):
        with _opened(path, "image") as image:
            assert isinstance(image, ImageFile.ImageFile)
            grey = image.mode.startswith("I")
            if not (grey or all(_raw_mode(tile.args) for tile in image.tile)):
                raise _too_deep(path, channel_bits(path), scaled=False)
            if other_order:
                image.tile = [tile._replace(args=_other_order(tile.args)) for tile in image.tile]
            ImageOps.exif_transpose(image, in_place=True)
            if grey:
                grey_HW: npt.NDArray[np.uint16] = np.array(image).astype(np.uint16)
                return np.repeat(grey_HW[..., None], 3, axis=2)
            planes.append(np.array(image)[..., :3])
    high_HW3, low_HW3 = planes
    return np.stack([low_HW3, high_HW3], -1).view("<u2")[..., 0].astype(np.uint16)


def _raw_mode(args: Any) -> re.Match[str] | None:
    """Return the match of a raw mode such as `RGB;16B` in the arguments of Pillow's decoder, or None."""
    return re.fullmatch(r"(RGB[AX]?;16)([BLN])", args if isinstance(args, str) else args[0])


def _other_order(args: Any) -> Any:
    """Return the arguments of Pillow's decoder with the byte order swapped."""
    raw = _raw_mode(args)
    assert raw is not None, args
    little = raw[2] == "L" or (raw[2] == "N" and sys.byteorder == "little")
    swapped = raw[1] + ("B" if little else "L")
    return swapped if isinstance(args, str) else (swapped, *args[1:])


def _scaled(levels_HW3: npt.NDArray[np.uint16], bits: int, path: Path) -> Pixels:
    """Return levels of `bits` bits shifted to 8 bits. Raises: RecipeError for a level that needs more bits."""
    if (most := int(levels_HW3.max())) >= 1 << bits:
        raise RecipeError(
            f"Cannot scale {path} from {bits} bits: it has a level of {most}, above {(1 << bits) - 1}",
            fix=f"Give --bits {most.bit_length()}, or the number of bits that your camera writes.",
        )
    return (levels_HW3 >> (bits - 8)).astype(np.uint8)


def _too_deep(path: Path, bits: int, *, scaled: bool) -> DataError:
    fix = "Save it as 8-bit RGB, or as PNG of 16 bits in RGB or grey: kdcache data convert --bits N scales that."
    if scaled:
        fix = (
            "Scale the data once: kdcache data convert SRC DST --bits N, with N the bits in use (12 for many cameras, "
            "else 16). Then use DST."
        )
    return DataError(f"Cannot read image {path}: it has {bits} bits per channel, more than 8", fix=fix)


def image_size(path: Path, *, header_only: bool = False) -> tuple[int, int]:
    """Return the (height, width) in pixels of the array that `read_image` returns, from the file's header if possible.

    Args:
        path: the image file.
        header_only: never decode pixels. Then a rotation that a PNG stores after its pixels is missed.

    Raises: DataError for a file that cannot be read.
    """
    with _opened(path, "image") as image:
        exif = Image.Image.getexif(image) if header_only else image.getexif()
        turned = exif.get(ExifTags.Base.Orientation) in _QUARTER_TURNS
        width, height = image.size
        return (width, height) if turned else (height, width)


def read_label(path: Path, colours: ColourCodes | None = None) -> Pixels:
    """Return a label file (PNG or TIFF) as ids, uint8 (H, W).

    The ids are the values of an image with one channel, the indices of a palette image, or the colours' ids.

    Args:
        path: the label file.
        colours: maps the colours of an RGB label to class ids. None makes RGB labels an error.

    Raises: DataError for a file that cannot be read, another kind of picture, ids above 255, or colours without a
        class.
    """
    with _opened(path, "label") as image:
        kind, bits = _label_kind(path, image)
        if image.mode == "L" and bits in (2, 4):  # Pillow stretches grey levels to 0..255
            stretched: Pixels = np.array(image, dtype=np.uint8)
            return np.floor_divide(stretched, np.uint8(255 // (2**bits - 1)))
        if image.mode in ("1", "L", "P"):
            return np.array(image, dtype=np.uint8)
        if image.mode.startswith("I"):
            return _small_numbers(np.array(image), kind, path)
        if image.mode in ("RGB", "RGBA") and bits == 8:
            return _ids_of_colours(np.array(image), colours, kind, path)
        raise DataError(
            f"Cannot read label {path}: it is {kind}",
            fix="Save the class ids as an 8-bit single-channel PNG (255 = void), or the classes' colours as RGB.",
        )


def label_kind(path: Path) -> str:
    """Describe the kind of a label file's pixels, for example "8-bit palette".

    Raises: DataError if it is no PNG or TIFF.
    """
    with _opened(path, "label") as image:
        return _label_kind(path, image)[0]


def is_plain_label(path: Path) -> bool:
    """Return whether a label file is a PNG with 8-bit grey levels, or with a palette. Its pixels are then ids.

    Raises: DataError for a file that cannot be read.
    """
    kind = label_kind(path)
    return kind == "8-bit grey" or kind.endswith("-bit palette")


def _ids_of_colours(pixels: Pixels, colours: ColourCodes | None, kind: str, path: Path) -> Pixels:
    """Return the class ids (H, W) for colours, uint8 (H, W, 3), or (H, W, 4) without transparency.

    Raises: DataError.
    """
    if colours is None:
        raise DataError(
            f"Cannot read label {path}: it is {kind}, and classes.txt does not give every class its own colour",
            fix="Write `name r g b` for every class into classes.txt, no colour twice. Or save the ids, not their "
            "colours, as an 8-bit single-channel PNG (255 = void).",
        )
    if pixels.shape[2] == 4 and not (pixels[..., 3] == 255).all():
        raise DataError(
            f"Cannot read label {path}: {int((pixels[..., 3] != 255).sum())} of its pixels are transparent",
            fix="Save it as RGB, black where nothing is labelled.",
        )
    return colours.ids(pixels[..., :3], path)


def _small_numbers(numbers: npt.NDArray[Any], kind: str, path: Path) -> Pixels:
    """Return numbers with 16 bits or more as uint8 (H, W). Raises: DataError for numbers outside 0 to 255."""
    wrong = numbers[(numbers < 0) | (numbers > 255)]
    if wrong.size:
        raise DataError(
            f"Cannot read label {path}: {wrong.size} numbers are outside 0 to 255, such as {int(wrong.reshape(-1)[0])} "
            f"({kind})",
            fix="Save class ids. Larger numbers count instances (class * 1000 + number, as in Cityscapes' instanceIds) "
            "or are depth.",
        )
    return numbers.astype(np.uint8)


def _label_kind(path: Path, image: Image.Image) -> tuple[str, int]:
    """Return the kind of a label's pixels in words, and the number of bits per channel.

    Raises: DataError for another file format, or a TIFF with several pages of the same size.
    """
    if image.format == "PNG":
        kind = _png_kind(path)
        return kind, int(kind.partition("-")[0])
    if image.format == "TIFF":
        if (pages := getattr(image, "n_frames", 1)) > 1:
            first_size = image.size
            image.seek(1)
            if image.size == first_size:
                raise DataError(
                    f"Cannot read label {path}: it is a TIFF of {pages} pages",
                    fix="Save the page with the class ids as its own file.",
                )
            image.seek(0)
        bits = image.tag_v2.get(258, (1,))[0]  # type: ignore[attr-defined] # BitsPerSample
        return f"TIFF of {bits} bits, mode {image.mode}", int(bits)
    raise DataError(
        f"Cannot read label {path}: {image.format} is neither PNG nor TIFF",
        fix="Save the ids as an 8-bit single-channel PNG (255 = void). A JPEG changes ids: start from the original.",
    )


def read_numbers(path: Path) -> npt.NDArray[Any]:
    """Return a file with one number per pixel as an array (H, W), with the file's dtype.

    The file is a 16-bit grey PNG, a TIFF, an `.npy` file, or an `.npz` file with one array or an array "depth".

    Raises: DataError for a file that cannot be read, another kind of PNG, or an array that is not (H, W) or not of
        numbers.
    """
    if path.suffix.lower() in (".npy", ".npz"):
        numbers = _read_array(path)
    else:
        with _opened(path, "depth file") as image:
            kind = _png_kind(path) if path.suffix.lower() == ".png" else ""
            if kind not in ("", "16-bit grey") or (not kind and not image.mode.startswith(("I", "F"))):
                raise DataError(
                    f"Cannot read depth file {path}: it is {kind or f'of mode {image.mode}'}",
                    fix="Save the depth itself, not a picture that shows it: one channel, as PNG of 16 bits or TIFF of "
                    "16 bits or floats.",
                )
            numbers = np.array(image)
    if numbers.ndim != 2 or not numbers.size or numbers.dtype.kind not in "uif":
        raise DataError(
            f"Cannot read depth file {path}: it holds {numbers.dtype} {numbers.shape}",
            fix="Save one number for each pixel: an array (height, width) of floats or whole numbers.",
        )
    return numbers


def _read_array(path: Path) -> npt.NDArray[Any]:
    try:
        with path.open("rb") as file:  # numpy leaves a broken .npz open that it opened itself
            content = np.load(file, allow_pickle=False)
            if isinstance(content, np.ndarray):
                return content
            names = content.files
            if "depth" in names or len(names) == 1:
                array: npt.NDArray[Any] = content["depth" if "depth" in names else names[0]]
                return array
    except MemoryError:
        raise
    except Exception as error:  # as decoders of pictures: OSError, ValueError, EOFError, zipfile.BadZipFile ...
        raise _unreadable(path, "depth file", error) from error
    raise DataError(
        f"Cannot tell the depth in {path}: its arrays are {', '.join(names) or 'none'}",
        fix="Save one array, or rename it to depth.",
    )


def label_palette(path: Path) -> list[tuple[int, int, int]] | None:
    """Return the (r, g, b) of each index of a palette PNG, or None for another kind of PNG.

    Raises: DataError for a file that cannot be read.
    """
    with _opened(path, "label") as image:
        flat = image.getpalette("RGB") if image.mode == "P" else None
    return None if flat is None else list(zip(flat[::3], flat[1::3], flat[2::3], strict=True))


def file_digest(path: Path) -> str:
    """Return the SHA-256 (hex) of a file's bytes. Raises: DataError if it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise _unreadable(path, "file", error) from error


@contextmanager
def _opened(path: Path, what: str) -> Iterator[Image.Image]:
    limit = _most_pixels()
    if limit is not None:
        Image.MAX_IMAGE_PIXELS = limit
    try:
        with Image.open(path) as image:
            if limit is not None and image.width * image.height > limit:
                raise Image.DecompressionBombError(f"{image.width * image.height} pixels, the limit is {limit}")
            yield image
    except (DataError, MemoryError):
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _too_large(path, error) from error
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error, zlib.error ...
        raise _unreadable(path, what, error) from error


def _most_pixels() -> int | None:
    """Return the pixel limit from the environment, or None for Pillow's limit.

    Raises: DataError for an invalid number.
    """
    text = os.environ.get(MEGAPIXELS, "").strip()
    if not text:
        return None
    try:
        megapixels = float(text)
    except ValueError:
        megapixels = math.nan
    if not 0 < megapixels < math.inf:
        raise DataError(
            f"Invalid value of {MEGAPIXELS}: {text!r}",
            fix=f"Set it to the megapixels of your largest image, such as {MEGAPIXELS}=400, or unset it.",
        )
    return int(megapixels * 1e6)


def _too_large(path: Path, error: Exception | Warning) -> DataError:
    pixels = re.search(r"\d+", str(error))
    megapixels = math.ceil(int(pixels[0]) / 1e6) if pixels else 400
    return DataError(
        f"Cannot read {path}: it has {megapixels} megapixels, more than the limit ({error})",
        fix=f"Cut it into tiles. If you trust the file, raise the limit: export {MEGAPIXELS}={megapixels}",
    )


def _unreadable(path: Path, what: str, error: Exception) -> DataError:
    return DataError(
        f"Cannot read {what} {path}: {error or type(error).__name__}",
        fix="Restore the file from its source, or remove the sample. `kdcache data check` lists all such files.",
    )


def _png_kind(path: Path) -> str:
    """Return a PNG's bit depth and colour type in words, from its header.

    Pillow's mode does not tell 4-bit from 8-bit grey.
    """
    with path.open("rb") as file:
        header = file.read(26)
    if not header.startswith(_PNG_SIGNATURE):
        return "no PNG"
    depth, colour_type = header[24], header[25]
    return f"{depth}-bit {_PNG_COLOUR_TYPES.get(colour_type, f'colour type {colour_type}')}"
