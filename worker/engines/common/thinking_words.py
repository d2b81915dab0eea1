"""Whether and how hard a model is to think, in the variables of its own chat template.

Clients send `enable_thinking` or `thinking` (true, false), or `reasoning_effort` (a word);
templates read one of these variables, another, or none. Which one is found out by trying. Must
never import torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Final

__all__ = ["EFFORT", "EFFORTS", "Asked", "ThinkingWords", "find_words"]

EFFORTS: Final = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
"""The efforts that clients may ask for, the least first."""

_ASKED: Final = ("enable_thinking", "thinking")
EFFORT: Final = "reasoning_effort"
_COMMON: Final = ("low", "medium", "high")

_SWITCHES: Final = ("enable_thinking", "thinking", "enable_reasoning", "reasoning")
"""Variables that templates read: Qwen3, GLM, SmolLM3, Hunyuan, Gemma 4; DeepSeek V3.1, Kimi K2.5,
Granite; Cohere."""

_BUDGETS: Final = ("thinking_budget",)
"""Variables that take a number of tokens, where 0 means no thought: Seed-OSS."""

Render = Callable[[dict[str, Any]], str | None]
"""Renders a short conversation with these variables; None if the template fails."""


@dataclass(frozen=True, slots=True)
class Asked:
    """What a request asks about thinking."""

    #: The template's variables.
    variables: dict[str, Any]
    #: Thinking is turned off, and the template has no variable for that.
    silent: bool = False


@dataclass(frozen=True, slots=True)
class ThinkingWords:
    """The variables about thinking that a chat template reads."""

    #: The variable that takes true or false.
    switch: str | None = None
    #: The variable that takes a number of tokens.
    budget: str | None = None
    #: The words that `reasoning_effort` takes; empty: the template does not read it.
    efforts: tuple[str, ...] = ()
    source: str = ""

    def asked(self, given: dict[str, Any]) -> Asked:
        """A request's variables, translated to the template's. Raises ValueError for a request that
        contradicts itself or names an unknown effort."""
        variables = dict(given)
        if not variables.keys() & {*_ASKED, EFFORT}:
            return Asked(variables)
        wish: bool | None = None
        for name in _ASKED:
            if isinstance(given.get(name), bool):
                if wish is not None and wish is not given[name]:
                    raise ValueError("enable_thinking and thinking contradict each other")
                wish = given[name]
                if name != self.switch:
                    del variables[name]
        effort = given.get(EFFORT)
        if isinstance(effort, str) and effort not in EFFORTS and _quoted(effort, self.source):
            effort = None  # a word of the template's own
        if effort is not None:
            if effort not in EFFORTS:
                raise ValueError(f"{EFFORT} {effort!r}: choose one of {', '.join(EFFORTS)}")
            wants = effort != "none"
            if wish is not None and wish is not wants:
                raise ValueError(f"{EFFORT} {effort!r} and enable_thinking contradict each other")
            wish = wants
            del variables[EFFORT]
        if wish is None:
            return Asked(variables)
        if self.switch is not None:
            variables[self.switch] = wish
        if wish:
            return Asked(variables | self._with_effort(effort))
        if "none" in self.efforts:
            return Asked(variables | {EFFORT: "none"})
        if self.switch is not None:
            return Asked(variables)
        if self.budget is not None:
            return Asked(variables | {self.budget: 0})
        return Asked(variables, silent=True)

    def _with_effort(self, effort: str | None) -> dict[str, Any]:
        thinking = [word for word in self.efforts if word != "none"]
        if not thinking:
            return {}
        if effort is None:
            # The default may be the word that turns thinking off, so another one must be given.
            return {EFFORT: thinking[-1]} if "none" in self.efforts else {}
        place = EFFORTS.index(effort)
        return {EFFORT: min(thinking, key=lambda word: abs(EFFORTS.index(word) - place))}


def find_words(source: str, render: Render) -> ThinkingWords:
    """Which variables about thinking the template with this source reads."""

    def differ(name: str, *values: Any) -> bool:
        texts = [render({name: value}) for value in values]
        return len({text for text in texts if text is not None}) > 1

    words = ThinkingWords(
        source=source,
        switch=next((n for n in _SWITCHES if n in source and differ(n, True, False)), None),
        budget=next((n for n in _BUDGETS if n in source and differ(n, 0, 4096)), None),
    )
    if EFFORT not in source:
        return words
    taken = [word for word in EFFORTS if render({EFFORT: word}) is not None]
    if len({render({EFFORT: word}) for word in taken}) < 2:
        return words
    named = [word for word in taken if _quoted(word, source)]
    # A template that names only its default writes the given word into the prompt as it is.
    known = named if len(named) > 1 else [w for w in taken if w in _COMMON or w in named]
    return replace(words, efforts=tuple(known))


def _quoted(word: str, source: str) -> bool:
    return f'"{word}"' in source or f"'{word}'" in source
