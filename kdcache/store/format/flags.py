"""One flag per sample as text for JSON: bits from the lowest of the first byte on, then zlib, then Base64."""

import base64
import zlib

import numpy as np
import numpy.typing as npt

from kdcache.errors import CorruptError

Flags = npt.NDArray[np.bool_]


def pack_flags(flags_N: Flags) -> str:
    """Return boolean flags (N,) as compressed Base64 text of at most about N / 6 characters."""
    return base64.b64encode(zlib.compress(np.packbits(flags_N, bitorder="little").tobytes(), 9)).decode("ascii")


def unpack_flags(text: str, count: int, where: object) -> Flags:
    """Return the boolean flags (count,) from a text of `pack_flags`.

    `where` names the text's origin in error messages.

    Raises: CorruptError if the text is malformed or has another number of flags.
    """
    size = -(-count // 8)
    inflater = zlib.decompressobj()
    try:
        content = inflater.decompress(base64.b64decode(text, validate=True), size + 1)
    except (ValueError, zlib.error) as error:
        raise _corrupt(where, str(error)) from error
    if len(content) != size or not inflater.eof:
        raise _corrupt(where, f"a text of {len(text)} characters, which is not of {count} samples")
    return np.unpackbits(np.frombuffer(content, np.uint8), count=count, bitorder="little").astype(np.bool_)


def _corrupt(where: object, what: str) -> CorruptError:
    return CorruptError(
        f"Cannot read which samples had labels in {where}: {what}",
        fix="Restore the cache from a copy, or build it again from the teacher's run.",
    )
