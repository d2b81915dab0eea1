"""Whether the next token of an answer belongs to a thought or to the content.

The sampler asks before every token: a constraint applies to content but not to a thought, and a
thought that has used up its budget is closed, token by token. Like the parser that it uses, the
gate depends on the tokens alone, so an interrupted answer continues as it would have. Must never
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
    """How many tokens a thought may have, and the tokens that close it."""

    limit: int
    token_ids: Sequence[int]


class ThoughtGate:
    """Follows the thoughts of one answer as its tokens come.

    `opening_ids`: tokens that begin a thought if none is open. `constrained`: the content is under
    a constraint, so a thought can only come before it. `whole`: a constraint applies to thoughts
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
        #: Constrained content has begun: no more thoughts are looked for.
        self._over = False
        #: Tokens that may begin a thought now, although the constraint does not allow them.
        may_open = constrained and parser.speaks and not parser.settled
        self.opening_ids = opening_ids if may_open else frozenset()
        #: Number of tokens in the current thought, without the mark that began it.
        self._spent = 0
        #: The rest of the tokens that must close it.
        self._due: list[int] = []
        self._spend(0)

    @property
    def suspends(self) -> bool:
        """Whether the next token is not content, so that no constraint applies to it."""
        return not (self._over or self._whole or self._parser.speaks)

    @property
    def forced(self) -> int | None:
        """The token that must come next because the budget is used up."""
        return self._due[0] if self._due else None

    def takes(self, token_id: int) -> bool:
        """Whether this token is not content, or begins a thought."""
        return self.suspends or token_id in self.opening_ids

    def append(self, token_id: int) -> str:
        """Take the next token of the answer. Returns the text that it has after the mark that ends
        a thought, with which a constrained answer begins."""
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
        # Of the tokens due, white space after the mark is left to the constraint.
        self._over, self._due = True, []
        return "".join(
            piece.text for piece in [*pieces, *self._parser.finish()] if piece.kind == CONTENT
        )

    def _spend(self, tokens: int) -> None:
        """Count tokens of the current thought; at its limit the tokens that close it are due."""
        if not self._parser.in_thought:
            self._spent = 0
            return
        self._spent += tokens
        if self._closing is not None and not self._due and self._spent >= self._closing.limit:
            self._due = list(self._closing.token_ids)
