"""The version of this library, as `python -m client version` and HELLO tell it."""

from __future__ import annotations


def version() -> str:
    """Of the installed distribution. Slow enough to be asked for only when it is needed."""
    from importlib import metadata

    try:
        return metadata.version("tokenbus")
    except metadata.PackageNotFoundError:
        return "0+source"  # run from a source tree that is not installed


def software() -> str:
    """As HELLO tells it."""
    return f"tokenbus-python/{version()}"
