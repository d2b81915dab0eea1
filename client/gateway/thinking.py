"""What a chat's body says of thinking, in the words of the servers that its client came from.

The bus knows two variables of a chat template, `enable_thinking` and `reasoning_effort`, which the
worker puts into the words of the model's own template, and a budget. Must never guess: of two
fields that contradict each other one is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, Protocol, TypeVar

from msgspec import Meta, Struct

from client.gateway.errors import invalid

__all__ = [
    "Budgets",
    "ReasoningOptions",
    "ThinkingOptions",
    "Wish",
    "budget_of",
    "wish_of",
]

Budget = Annotated[int, Meta(ge=0, le=1 << 31)]


class ReasoningOptions(Struct, forbid_unknown_fields=True, kw_only=True):
    """As OpenRouter has them."""

    effort: str | None = None
    max_tokens: Budget | None = None
    #: Leave it out of the answer.
    exclude: bool | None = None
    enabled: bool | None = None
    #: Answers of the bus have the reasoning itself.
    summary: Any = None


class ThinkingOptions(Struct, forbid_unknown_fields=True, kw_only=True):
    """As DeepSeek, GLM and Kimi have them."""

    type: Literal["enabled", "disabled", "auto", "adaptive"]
    budget_tokens: Budget | None = None
    #: Which thoughts of earlier turns the model reads is up to its chat template.
    clear_thinking: Any = None


class Budgets(Struct, kw_only=True):
    """Fields of every endpoint that generates text."""

    #: Longest thought, tokens; then its end is forced and the answer follows.
    thinking_tokens: Budget | None = None
    #: vLLM's name of the same.
    thinking_token_budget: Budget | None = None


class Thinking(Protocol):
    """Fields of a chat's body."""

    reasoning_effort: str | None
    enable_thinking: bool | None
    thinking: ThinkingOptions | None
    reasoning: ReasoningOptions | None


@dataclass(frozen=True, slots=True)
class Wish:
    """The same in the bus's words."""

    #: Variables for the chat template.
    variables: dict[str, Any] = field(default_factory=dict)
    tokens: int | None = None


T = TypeVar("T")


def budget_of(body: Budgets) -> int | None:
    """The longest thought, tokens. Raises GatewayError."""
    return _one(
        {
            "thinking_tokens": body.thinking_tokens,
            "thinking_token_budget": body.thinking_token_budget,
        }
    )


def wish_of(body: Thinking, budget: int | None) -> Wish:
    """What a chat's body asks for. `budget`: see `budget_of`. Raises GatewayError."""
    reasoning, thinking = body.reasoning or ReasoningOptions(), body.thinking
    switches = {"enabled": True, "disabled": False}
    effort = _one({"reasoning_effort": body.reasoning_effort, "reasoning.effort": reasoning.effort})
    enabled = _one(
        {
            "enable_thinking": body.enable_thinking,
            "thinking.type": switches.get(thinking.type) if thinking else None,
            "reasoning.enabled": reasoning.enabled,
        }
    )
    tokens = _one(
        {
            "thinking_tokens": budget,
            "reasoning.max_tokens": reasoning.max_tokens,
            "thinking.budget_tokens": thinking.budget_tokens if thinking else None,
        }
    )
    variables: dict[str, Any] = {}
    if effort is not None:
        variables["reasoning_effort"] = effort
    if enabled is not None:
        variables["enable_thinking"] = enabled
    return Wish(variables, tokens)


def _one(given: Mapping[str, T | None]) -> T | None:
    """What the fields say, which is the same where several do."""
    said = [(name, value) for name, value in given.items() if value is not None]
    for name, value in said[1:]:
        if value != said[0][1]:
            raise invalid(
                name, f"`{said[0][0]}` is {said[0][1]!r} and `{name}` is {value!r}; send one."
            )
    return said[0][1] if said else None
