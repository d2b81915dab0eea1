"""The `--engine-arg KEY=VALUE` of an engine beside transformers: some shared, some its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from worker.engines.base import EngineLoadError
from worker.engines.transformers.settings import EngineSettings, parse_settings

__all__ = ["SHARED", "boolean", "split_arguments", "whole"]

SHARED = ("context_tokens", "preprocess_threads", "image_pixels", "image_bytes")
"""Settings of the transformers engine that mean the same here."""


def boolean(text: str) -> bool:
    """`true` or `false`, in the usual spellings. Raises ValueError."""
    word = text.strip().lower()
    if word in ("1", "true", "yes", "on"):
        return True
    if word in ("0", "false", "no", "off"):
        return False
    raise ValueError("expected true or false")


def whole(minimum: int) -> Callable[[str], int]:
    """A parser of whole numbers from `minimum` on; it raises ValueError."""

    def parse(text: str) -> int:
        value = int(text)
        if value < minimum:
            raise ValueError(f"at least {minimum}")
        return value

    return parse


def split_arguments(
    engine: str, engine_args: Mapping[str, str], own: Mapping[str, Callable[[str], Any]]
) -> tuple[EngineSettings, dict[str, Any]]:
    """Shared settings, and the engine's own arguments parsed by `own`.

    Raises `EngineLoadError` for an unknown name or a bad value.
    """
    shared: dict[str, str] = {}
    values: dict[str, Any] = {}
    for given, text in engine_args.items():
        name = given.replace("-", "_")
        if name in own:
            try:
                values[name] = own[name](text)
            except ValueError as error:
                raise EngineLoadError(f"--engine-arg {given}={text}: {error}") from None
        elif name in SHARED:
            shared[name] = text
        else:
            raise EngineLoadError(
                f"unknown --engine-arg {given!r}: engine {engine} knows "
                + ", ".join(sorted({*own, *SHARED}))
            )
    return parse_settings(shared), values
