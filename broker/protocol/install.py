"""The command to install a missing extra, as it works in this installation."""

from __future__ import annotations

import shlex
from pathlib import Path

__all__ = ["install_hint"]

_ROOT = Path(__file__).resolve().parents[2]


def install_hint(*extras: str, root: Path = _ROOT) -> str:
    """The command that installs extras of this package: from the clone that this code runs in,
    otherwise by the package's name."""
    requirement = f"[{','.join(extras)}]"
    if (root / "pyproject.toml").is_file():
        return f"pip install -e {shlex.quote(f'{root}{requirement}')}"
    return f"pip install 'tokenbus{requirement}'"
