"""One rule for all files with secret keys, the same for brokers, workers and clients."""

from __future__ import annotations

from pathlib import Path


def exposed(path: Path) -> str:
    """Why the key in a file is not secret, and what to do about it; empty if only its owner may
    read the file. Raises OSError if that cannot be determined."""
    if path.stat().st_mode & 0o077:
        return f"{path} can be read by others; run: chmod 600 {path}"
    return ""
