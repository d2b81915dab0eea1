"""Differences between releases of transformers, detected from signatures and attributes.

The rest of the engine asks here and knows only one spelling. Must never compare version strings:
the signature of a release candidate, a fork or a model's remote code need not match its version.
"""

from __future__ import annotations

import inspect
from typing import Any

__all__ = [
    "KNOWN_RELEASES",
    "cache_argument",
    "forward_parameters",
    "rope_owner",
    "rope_parameters",
]

KNOWN_RELEASES = ("5.23", "5.24")
"""Oldest and newest minor release of transformers that passed all tests; only shown to people. A
test keeps it equal to what `pyproject.toml` allows and the lock contains."""

CACHE_WORDS = ("cache", "past_key_values")
"""Names of the argument of `forward` that takes the key/value cache, newest first: it was renamed
in 5.24, and 5.40 removes the old name. Remote code keeps the name it was written with."""

ROPE_WORDS = ("rope_parameters", "rope_scaling")
"""The configuration field with the rope type and its factors; renamed in 5.0."""


def forward_parameters(model: Any) -> frozenset[str]:
    """Names of the arguments that the model's `forward` declares."""
    return frozenset(inspect.signature(model.forward).parameters)


def cache_argument(parameters: frozenset[str]) -> str | None:
    """The name of `forward`'s argument for the key/value cache; None if it takes no such cache."""
    return next((word for word in CACHE_WORDS if word in parameters), None)


def rope_owner(model: Any) -> Any:
    """The module that keeps `rope_deltas` (Qwen-VL and similar models), or None."""
    inner = getattr(model, "model", None)
    return inner if hasattr(inner, "rope_deltas") else None


def rope_parameters(text_config: Any) -> dict[str, Any]:
    """The rope type and factors of a text configuration; empty if it has none. Models with several
    kinds of layers may have one dict for each kind."""
    for word in ROPE_WORDS:
        value = getattr(text_config, word, None)
        if isinstance(value, dict):
            return value
    return {}
