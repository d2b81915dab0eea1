"""`--engine-arg KEY=VALUE`: arguments that mean the same on all engines, and the parsing of all.

Parses text into checked values and nothing else; must never import torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, TypeVar

from broker.protocol.options import parse_bool
from worker.engines.base import EngineLoadError, EngineOptions

__all__ = [
    "SHARED",
    "SharedSettings",
    "boolean",
    "refuse_options",
    "settings_from",
    "split_arguments",
    "whole",
]


@dataclass(frozen=True, slots=True)
class SharedSettings:
    """Settings that mean the same on every engine that runs a model."""

    #: Longest prompt plus answer, tokens; 0: as in the model's configuration.
    context_tokens: int = 0
    #: Threads that decode images and tokenise prompts outside the step loop.
    preprocess_threads: int = 2
    #: Largest image, pixels (width times height), checked before it is decoded.
    image_pixels: int = 50_000_000
    #: Largest image, bytes.
    image_bytes: int = 32 * 1024 * 1024


SHARED = tuple(field.name for field in fields(SharedSettings))
"""Names of the shared settings."""

_MINIMUM: Mapping[str, float] = {
    "context_tokens": 0,
    "preprocess_threads": 1,
    "image_pixels": 1,
    "image_bytes": 1,
}


Settings = TypeVar("Settings", bound=SharedSettings)


def settings_from(
    engine_args: Mapping[str, str],
    kind: type[Settings],
    engine: str,
    *,
    choices: Mapping[str, tuple[str, ...]] | None = None,
    minimum: Mapping[str, float] | None = None,
) -> Settings:
    """Parse texts into an engine's settings. `choices` and `minimum` map names of settings to the
    values that are allowed, and to the lowest.

    Raises `EngineLoadError` for an unknown name or a bad value.
    """
    known = {field.name: field for field in fields(kind)}
    choices, minimum = choices or {}, {**_MINIMUM, **(minimum or {})}
    values: dict[str, Any] = {}
    for given, text in engine_args.items():
        name = given.replace("-", "_")
        if name not in known:
            raise EngineLoadError(
                f"unknown --engine-arg {given!r}: the {engine} engine knows "
                + ", ".join(sorted(known))
            )
        default = known[name].default
        parse: Callable[[str], Any] = boolean if isinstance(default, bool) else type(default)
        try:
            value = parse(text)
        except ValueError as error:
            raise EngineLoadError(f"--engine-arg {given}={text}: {error}") from None
        if name in choices and value not in choices[name]:
            raise EngineLoadError(
                f"--engine-arg {given}={text}: choose one of {', '.join(choices[name])}"
            )
        if name in minimum and value < minimum[name]:
            raise EngineLoadError(
                f"--engine-arg {given}={text}: must be at least {minimum[name]:g}"
            )
        values[name] = value
    return kind(**values)


def boolean(text: str) -> bool:
    """A boolean as in `parse_bool`, except that an empty text is refused. Raises ValueError."""
    if not text.strip():
        raise ValueError("expected true or false")
    return parse_bool(text)


def whole(minimum: int) -> Callable[[str], int]:
    """A parser for integers of at least `minimum`; it raises ValueError."""

    def parse(text: str) -> int:
        value = int(text)
        if value < minimum:
            raise ValueError(f"must be at least {minimum}")
        return value

    return parse


def shared_and_others(
    engine: str, engine_args: Mapping[str, str]
) -> tuple[SharedSettings, dict[str, str]]:
    """Shared settings, and what is left for a library that reads its arguments itself.

    Raises `EngineLoadError` for a bad value.
    """
    shared: dict[str, str] = {}
    others: dict[str, str] = {}
    for given, text in engine_args.items():
        name = given.replace("-", "_")
        if name in SHARED:
            shared[name] = text
        else:
            others[given] = text
    return settings_from(shared, SharedSettings, engine), others


def split_arguments(
    engine: str, engine_args: Mapping[str, str], own: Mapping[str, Callable[[str], Any]]
) -> tuple[SharedSettings, dict[str, Any]]:
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
    return settings_from(shared, SharedSettings, engine), values


def refuse_options(options: EngineOptions, reasons: Mapping[str, str]) -> None:
    """Refuse worker options that this engine cannot honour; `reasons` maps the field's name to what
    to do instead. Raises `EngineLoadError`."""
    neutral = EngineOptions()
    for name, reason in reasons.items():
        if getattr(options, name) != getattr(neutral, name):
            flag = "--" + name.replace("_", "-")
            raise EngineLoadError(f"engine {options.engine} does not take {flag}: {reason}")
