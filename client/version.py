"""What this library is, as HELLO says it."""

from __future__ import annotations

from broker.protocol.version import version

__all__ = ["software", "version"]


def software() -> str:
    """Name and version of this library."""
    return f"tokenbus-python/{version()}"
