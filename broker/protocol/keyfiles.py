"""One rule for every file that holds a secret key, at brokers, workers and clients alike."""

from __future__ import annotations

from pathlib import Path


def exposed(path: Path) -> str:
    """Why a key file's secret is not secret, and what to do; empty where its owner alone
    may read it. Raises OSError where it cannot be looked at."""
    if path.stat().st_mode & 0o077:
        return f"{path} can be read by others; run: chmod 600 {path}"
    return ""
