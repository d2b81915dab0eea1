"""The version of this library, as `python -m client version` and HELLO tell it."""

from __future__ import annotations

from importlib import metadata


def _installed() -> str:
    try:
        return metadata.version("tokenbus")
    except metadata.PackageNotFoundError:
        return "0+source"  # run from a source tree that is not installed


VERSION = _installed()
SOFTWARE = f"tokenbus-python/{VERSION}"
