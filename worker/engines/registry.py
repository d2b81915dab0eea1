"""Engines by name: built-in ones and those that other packages register.

A package adds an engine with an entry point of group `tokenbus.engines` whose object is an
`EngineFactory`. Only the engine that is asked for is imported. Must never import torch itself.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import entry_points
from typing import Final, cast

from worker.engines.base import EngineFactory, EngineLoadError

ENTRY_POINT_GROUP: Final = "tokenbus.engines"

BUILT_IN: Final = {
    "echo": "worker.engines.echo:build",
    "transformers": "worker.engines.transformers:build",
}


def names() -> list[str]:
    """Names of the engines that can be asked for."""
    return sorted({*BUILT_IN, *(entry.name for entry in entry_points(group=ENTRY_POINT_GROUP))})


def load(name: str) -> EngineFactory:
    """The factory of an engine. Raises `EngineLoadError` for one that is unknown or not installed.

    A package's engine goes before a built-in one of the same name.
    """
    found = entry_points(group=ENTRY_POINT_GROUP, name=name)
    target = next((entry.value for entry in found), BUILT_IN.get(name))
    if target is None:
        raise EngineLoadError(f"there is no engine {name!r}; there are: {', '.join(names())}")
    module, _, attribute = target.partition(":")
    try:
        return cast(EngineFactory, getattr(import_module(module), attribute))
    except ImportError as error:
        if error.name is None or error.name.split(".")[0] in ("worker", "broker"):
            raise
        raise EngineLoadError(
            f"engine {name!r} needs the package {error.name!r}, which is not installed; "
            "install it with: pip install 'tokenbus[worker]'"
        ) from error
