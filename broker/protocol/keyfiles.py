"""One rule for all files with keys, the same for brokers, workers, clients and gateways: who may
read them, and how they are changed."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # not a POSIX system: two changes at once may lose one
    fcntl = None  # type: ignore[assignment]


def exposed(path: Path) -> str:
    """Why the key in a file is not secret, and what to do about it; empty if only its owner may
    read the file. Raises OSError if that cannot be determined."""
    if path.stat().st_mode & 0o077:
        return f"{path} can be read by others; run: chmod 600 {path}"
    return ""


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Wait until nobody else has this lock, and hold it. Whoever reads a file, changes it and
    writes it back must hold one from before the first look, or another's change may be lost.
    Raises OSError.

    The lock is a file of its own, as the others are replaced, and it stays: without it, those who
    wait and those who come would not hold the same.
    """
    with os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o600), "rb") as file:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def replace_file(path: Path, text: str) -> None:
    """Write the whole file or nothing, readable only by its owner: whoever reads it at this moment
    sees the old or the new one. The caller must hold the lock. Raises OSError."""
    data = text.encode()
    part = path.with_name(f".{path.name}.{os.getpid()}")
    part.unlink(missing_ok=True)
    try:
        with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(data)
            file.flush()
            # A name that points to nothing after a power failure would shut everybody out.
            os.fsync(file.fileno())
        part.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            part.unlink()
        raise
