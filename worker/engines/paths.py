"""Checks what a model's path refers to without loading anything.

Mistakes are thus reported before torch is imported.
"""

from __future__ import annotations

import os
from pathlib import Path

from worker.engines.base import EngineLoadError

__all__ = ["local_folder"]


def local_folder(path: str) -> Path | None:
    """The folder that `path` names, or None if it must be a hub id. Raises `EngineLoadError` for a
    local path that is not a folder, and for files that another engine serves."""
    folder = Path(path).expanduser()
    if folder.is_dir():
        files = sorted(folder.glob("*.gguf"))
        if files and not any((folder / name).is_file() for name in _CONFIGURATIONS):
            raise _gguf(files[0])
        return folder
    if folder.suffix == ".gguf" and folder.is_file():
        raise _gguf(folder)
    looks_local = path.startswith((".", "/", "~")) or os.sep * 2 in path or path.count("/") > 1
    if folder.exists() or looks_local:
        raise EngineLoadError(f"there is no folder {path}: give a model's folder or a hub id")
    return None


_CONFIGURATIONS = ("config.json", "adapter_config.json")


def _gguf(file: Path) -> EngineLoadError:
    return EngineLoadError(
        f"{file} is a GGUF file: serve it with --engine llamacpp --model-path {file}"
    )
