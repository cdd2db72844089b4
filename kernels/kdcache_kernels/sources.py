"""The digest of this package's source files, which compiled code in a cache is valid for."""

import hashlib
from pathlib import Path

_PACKAGE = Path(__file__).parent


def digest_of(*patterns: str) -> str:
    """Return the SHA-256 of the names and contents of this package's files that match any of the glob patterns."""
    digest = hashlib.sha256()
    for path in sorted({path for pattern in patterns for path in _PACKAGE.glob(pattern)}):
        digest.update(path.relative_to(_PACKAGE).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()
