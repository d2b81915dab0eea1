"""The version of what runs, for HELLO, WELCOME and `--version`."""

from __future__ import annotations

import functools

__all__ = ["version"]


@functools.cache
def version() -> str:
    """Of the installed distribution. Slow enough to be asked for only when it is needed."""
    from importlib import metadata

    try:
        return metadata.version("tokenbus")
    except metadata.PackageNotFoundError:
        return "0+source"  # run from a source tree that is not installed
