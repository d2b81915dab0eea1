"""How to install what is missing, in words that work where they are read."""

from __future__ import annotations

import shlex
from pathlib import Path

__all__ = ["install_hint"]

_ROOT = Path(__file__).resolve().parents[2]


def install_hint(*extras: str, root: Path = _ROOT) -> str:
    """The command that installs extras of this package: from the clone that this code runs in, else
    by the package's name."""
    wanted = f"[{','.join(extras)}]"
    if (root / "pyproject.toml").is_file():
        return f"pip install -e {shlex.quote(f'{root}{wanted}')}"
    return f"pip install 'tokenbus{wanted}'"
