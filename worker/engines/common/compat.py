"""What differs between releases of transformers, found by looking at signatures and attributes.

The rest of the engine asks here and knows one spelling. Must never compare version strings: a
release candidate, a fork or a model's own remote code has the signature it has, whatever its
version says.
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
"""Oldest and newest minor release of transformers that passed all tests; only ever told to people.
A test keeps it equal to what `pyproject.toml` allows and to what the lock holds."""

CACHE_WORDS = ("cache", "past_key_values")
"""The argument of `forward` that takes the key/value cache, newest first: renamed in 5.24, the old
word goes in 5.40. Remote code keeps the word it was written with."""

ROPE_WORDS = ("rope_parameters", "rope_scaling")
"""The configuration field that holds the rope type and its factors; renamed in 5.0."""


def forward_parameters(model: Any) -> frozenset[str]:
    """Names of the arguments that the model's `forward` declares."""
    return frozenset(inspect.signature(model.forward).parameters)


def cache_argument(parameters: frozenset[str]) -> str | None:
    """The word for the key/value cache among the arguments of a `forward`; None where it takes
    no such cache."""
    return next((word for word in CACHE_WORDS if word in parameters), None)


def rope_owner(model: Any) -> Any:
    """The module that keeps `rope_deltas` (Qwen-VL and its kin), or None."""
    inner = getattr(model, "model", None)
    return inner if hasattr(inner, "rope_deltas") else None


def rope_parameters(text_config: Any) -> dict[str, Any]:
    """The rope type and factors of a text configuration; empty where it states none. Models with
    several kinds of layers may have a dict of them for each kind."""
    for word in ROPE_WORDS:
        value = getattr(text_config, word, None)
        if isinstance(value, dict):
            return value
    return {}
