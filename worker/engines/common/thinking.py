"""Where the next token of an answer stands: in a thought, or in what is said.

The sampler asks before every token: a constraint holds what is said and not the thought, and a
thought that has used up its budget is closed, token by token. Like the parser that it reads with it
is a function of the tokens alone, so an interrupted answer goes on as it would have. Must never
import torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from worker.engines.common.answer_parser import CONTENT, AnswerParser
from worker.engines.common.text import Detokenizer

__all__ = ["Closing", "ThoughtGate"]


@dataclass(frozen=True, slots=True)
class Closing:
    """How many tokens a thought may have, and those that close it."""

    limit: int
    token_ids: Sequence[int]


class ThoughtGate:
    """The thoughts of one answer as its tokens come.

    `opening_ids`: each begins a thought, where none is open yet. `constrained`: what is said is
    held to a constraint, so a thought can only come before it. `whole`: a constraint holds thoughts
    and marks too.
    """

    def __init__(
        self,
        tokenizer: Any,
        parser: AnswerParser,
        marks: Sequence[str],
        *,
        opening_ids: frozenset[int] = frozenset(),
        closing: Closing | None = None,
        constrained: bool = False,
        whole: bool = False,
    ) -> None:
        self._detokenizer = Detokenizer(tokenizer, skip_special_tokens=True, keep_special=marks)
        self._parser = parser
        self._closing = closing
        self._constrained = constrained
        self._whole = whole
        #: What is said has begun, and is constrained: nothing is looked at any more.
        self._over = False
        #: Tokens that may begin a thought now, though no constraint has them.
        may_open = constrained and parser.speaks and not parser.settled
        self.opening_ids = opening_ids if may_open else frozenset()
        #: Tokens of the thought in hand, without the mark that began it.
        self._spent = 0
        #: What is still to come of the tokens that close it.
        self._due: list[int] = []
        self._spend(0)

    @property
    def suspends(self) -> bool:
        """The next token is not part of what is said: no constraint counts for it."""
        return not (self._over or self._whole or self._parser.speaks)

    @property
    def forced(self) -> int | None:
        """The token that must come next: the budget is used up."""
        return self._due[0] if self._due else None

    def takes(self, token_id: int) -> bool:
        """Whether this token is no part of what is said, or begins a thought."""
        return self.suspends or token_id in self.opening_ids

    def append(self, token_id: int) -> str:
        """Take the next token of the answer. Returns what it says behind the mark that ends a
        thought: of a constrained answer, its beginning."""
        if self._over:
            return ""
        thought, suspended = self._parser.in_thought, self.suspends
        if self._constrained and not self.takes(token_id):
            self._over, self.opening_ids = True, frozenset()
            return ""
        self.opening_ids = frozenset()
        if self._due:
            self._due = self._due[1:] if token_id == self._due[0] else []
        pieces = self._parser.feed(self._detokenizer.add(token_id))
        self._spend(int(thought))
        if not (self._constrained and suspended and self._parser.speaks):
            return ""
        # White space that was to follow the mark is for the constraint to allow.
        self._over, self._due = True, []
        return "".join(
            piece.text for piece in [*pieces, *self._parser.finish()] if piece.kind == CONTENT
        )

    def _spend(self, tokens: int) -> None:
        """Count tokens of the thought in hand; at its limit the tokens that close it are due."""
        if not self._parser.in_thought:
            self._spent = 0
            return
        self._spent += tokens
        if self._closing is not None and not self._due and self._spent >= self._closing.limit:
            self._due = list(self._closing.token_ids)
