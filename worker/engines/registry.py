"""Engines by name: built-in ones and those that other packages register.

A package adds an engine with an entry point of group `tokenbus.engines` whose object is an
`EngineFactory`. Only the requested engine is imported. Must never import torch itself.
"""

from __future__ import annotations

import contextlib
from importlib import import_module
from importlib.metadata import entry_points
from importlib.util import find_spec
from typing import Final, cast

from broker.protocol.install import install_hint
from worker.engines.base import EngineFactory, EngineLoadError, EngineOptions, adapter_paths

ENTRY_POINT_GROUP: Final = "tokenbus.engines"

BUILT_IN: Final = {
    "echo": "worker.engines.echo.engine:build",
    "transformers": "worker.engines.transformers:build",
    "vllm": "worker.engines.vllm:build",
    "mlx": "worker.engines.mlx:build",
    "llamacpp": "worker.engines.llamacpp:build",
    "sglang": "worker.engines.sglang:build",
    "openai": "worker.engines.openai:build",
}

EXTRAS: Final = {
    "transformers": "worker",
    "vllm": "vllm",
    "mlx": "mlx",
    "llamacpp": "llamacpp",
    "sglang": "sglang",
    "openai": "openai",
}
"""The extra of this package that installs what each built-in engine needs."""

NEED_MODEL: Final = frozenset({"vllm", "mlx", "llamacpp", "sglang"})
"""Built-in engines that need a model to be named."""


def names() -> list[str]:
    """Names of the available engines."""
    return sorted({*BUILT_IN, *(entry.name for entry in entry_points(group=ENTRY_POINT_GROUP))})


def announced(options: EngineOptions) -> tuple[str, ...]:
    """Names that will be served once the engine is ready, including adapters: announced while it
    loads, so that requests for them wait."""
    found = [name for group in options.model_names for name in group]
    if options.engine == "transformers":
        with contextlib.suppress(EngineLoadError):  # the engine reports what is wrong with them
            found += adapter_paths(options.engine_args.get("adapters", ""))
    return tuple(found)


def load(name: str) -> EngineFactory:
    """The factory of an engine. Raises `EngineLoadError` if it is unknown or not installed.

    A package's engine takes precedence over a built-in one with the same name.
    """
    found = entry_points(group=ENTRY_POINT_GROUP, name=name)
    target = next((entry.value for entry in found), BUILT_IN.get(name))
    if target is None:
        raise EngineLoadError(f"there is no engine {name!r}; choose one of: {', '.join(names())}")
    module, _, attribute = target.partition(":")
    try:
        return cast(EngineFactory, getattr(import_module(module), attribute))
    except ImportError as error:
        if error.name is None or error.name.split(".")[0] in ("worker", "broker"):
            raise
        raise _missing(name, error.name) from error


def require(name: str, *packages: str) -> None:
    """Check that the packages of a built-in engine are installed, without importing them.

    Raises `EngineLoadError` naming the first missing one and the extra that installs it.
    """
    for package in packages:
        if find_spec(package) is None:
            raise _missing(name, package)


def _missing(name: str, package: str) -> EngineLoadError:
    return EngineLoadError(
        f"engine {name!r} needs the package {package!r}, which is not installed; "
        f"install it with: {install_hint(EXTRAS.get(name, 'worker'))}"
    )
