"""Streams an answer that is split into pieces: the counterpart of `TextStream`.

`PieceText` takes text as it becomes certain and returns the pieces that may be sent; `PieceStream`
does the same for tokens, and engines hold one per request. Like the parser inside them, they depend
on their input alone, so replaying the tokens so far restores the state of an interrupted answer.
Must never import torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import msgspec

from broker.protocol.messages import Params, Piece, PieceKind
from broker.protocol.tool_parser import ObjectReader
from worker.engines.common.answer_parser import PieceParser, merged
from worker.engines.common.calls import ARGUMENTS, CALL, Calls
from worker.engines.common.text import Detokenizer, StopBuffer

__all__ = ["PieceStream", "PieceText"]

CONTENT: Final = PieceKind.CONTENT.value


class PieceText:
    """Pieces of one answer. Stop strings are looked for in its content only, including calls as the
    model writes them, and never across a mark.

    `calls` finds calls in the content; `single`: the first one ends the answer. The first
    `prior_characters` characters, of whatever kind, were received: they are not emitted again.
    """

    def __init__(
        self,
        parser: PieceParser,
        params: Params,
        prior_characters: int = 0,
        *,
        calls: Calls | None = None,
        single: bool = False,
    ) -> None:
        self._parser = parser
        self._calls = calls
        self._single = single
        #: Reads the arguments of the only call allowed.
        self._reader: ObjectReader | None = None
        #: That call is complete: the answer is over, and nothing more is emitted.
        self.called = False
        self._stops = StopBuffer(params.stop, include_stop=params.include_stop)
        self._skip = prior_characters
        self._shows_kinds = False
        #: Nothing but marks is looked for: no stop string, no call.
        self.plain = calls is None and not single and not params.stop
        #: The stop string that ended the answer, after which nothing more is emitted.
        self.stopped_by: str | None = None

    @property
    def in_thought(self) -> bool:
        """Whether reasoning follows, as far as it is known."""
        return self._parser.in_thought

    def add(self, text: str, *, may_stop: bool) -> list[Piece]:
        """The pieces that became certain with this text."""
        pieces = self._parser.feed(text)
        if self.plain and not self._skip:
            return pieces
        return self._unreceived(self._allowed(self._checked(pieces, may_stop)))

    def finish(self, *, may_stop: bool) -> list[Piece]:
        """The rest: what was held back, and nothing after a stop string."""
        if self.stopped_by is not None:
            return []
        pieces = self._checked(self._parser.finish(), may_stop)
        if self.stopped_by is None:
            self._said(self._stops.flush(), pieces)
            if self._calls is not None:
                pieces += self._calls.finish()
        return self._unreceived(self._allowed(pieces))

    def event(self, pieces: list[Piece]) -> tuple[str, list[Piece] | None]:
        """What an event carries for these pieces: their content, and the pieces themselves if that
        is not all of them. The first event with text always carries them, which shows that the
        answer is split."""
        if len(pieces) == 1 and self._shows_kinds and pieces[0].kind == CONTENT:
            return pieces[0].text, None  # nearly every token
        pieces = merged(pieces)
        content = "".join([piece.text for piece in pieces if piece.kind == CONTENT])
        if not pieces or (self._shows_kinds and all(piece.kind == CONTENT for piece in pieces)):
            return content, None
        self._shows_kinds = True
        return content, pieces

    def _checked(self, pieces: list[Piece], may_stop: bool) -> list[Piece]:
        checked: list[Piece] = []
        for piece in pieces:
            if piece.kind != CONTENT:
                self._said(self._stops.flush(), checked)
                if self._calls is not None:
                    checked += self._calls.pause()
                checked.append(piece)
                continue
            text, self.stopped_by = self._stops.add(piece.text, may_stop=may_stop)
            self._said(text, checked)
            if self.stopped_by is not None:
                if self._calls is not None:
                    checked += self._calls.finish()
                break
        return checked

    def _said(self, text: str, pieces: list[Piece]) -> None:
        if not text:
            return
        if self._calls is None:
            pieces.append(Piece(CONTENT, text))
        else:
            pieces += self._calls.feed(text)

    def _allowed(self, pieces: list[Piece]) -> list[Piece]:
        """The pieces up to the end of the first call, if that ends the answer."""
        if not self._single:
            return pieces
        allowed: list[Piece] = []
        for piece in pieces:
            if self._reader is not None and piece.kind != ARGUMENTS:
                self.called = True
            if self.called:
                break
            allowed.append(piece)
            if piece.kind == CALL:
                self._reader = ObjectReader((), piece.text)
            elif piece.kind == ARGUMENTS and self._reader is not None:
                self._reader.feed(piece.text)
                self.called = self._reader.complete
        return allowed

    def _unreceived(self, pieces: list[Piece]) -> list[Piece]:
        while self._skip and pieces:
            first, *rest = pieces
            if self._skip < len(first.text):
                pieces = [msgspec.structs.replace(first, text=first.text[self._skip :]), *rest]
                self._skip = 0
            else:
                self._skip -= len(first.text)
                pieces = rest
        return pieces


class PieceStream:
    """The pieces of one answer, token by token. See `TextStream` for what the arguments mean.

    `marks` are special tokens that the parser must see, whatever the request says about special
    tokens.
    """

    def __init__(
        self,
        tokenizer: Any,
        params: Params,
        parser: PieceParser,
        marks: Sequence[str],
        *,
        prior_ids: Sequence[int] = (),
        prior_characters: int = 0,
        context_ids: Sequence[int] = (),
        calls: Calls | None = None,
        single: bool = False,
    ) -> None:
        self._detokenizer = Detokenizer(
            tokenizer,
            skip_special_tokens=params.skip_special_tokens,
            keep_special=[*params.keep_special, *marks],
            prior_ids=context_ids,
        )
        self._text = PieceText(parser, params, prior_characters, calls=calls, single=single)
        self._include_stop = params.include_stop
        self._min_tokens = params.min_tokens
        self._tokens = 0
        #: Characters that the model has written before the next token.
        self.place = 0
        #: Tokens spent on thoughts, including marks as far as they were recognised as such.
        self.reasoning_tokens = 0
        #: Pieces of the prior tokens that the client has not received.
        self._owed: list[Piece] = []
        for token_id in prior_ids:
            if self.over:
                break
            self._owed += self._advance(token_id)

    @property
    def stopped_by(self) -> str | None:
        """The stop string that ended the answer."""
        return self._text.stopped_by

    @property
    def over(self) -> bool:
        """Whether a stop string or the only call allowed has ended the answer."""
        return self._text.stopped_by is not None or self._text.called

    def add(self, token_id: int) -> list[Piece]:
        """Take the next token of the answer; returns the pieces that are certain now."""
        return self._with_owed(self._advance(token_id))

    def finish(self, ending_token: int | None = None) -> list[Piece]:
        """The rest of the pieces. `ending_token`: the token that ended the answer, not added."""
        pieces: list[Piece] = []
        if not self.over and ending_token is not None and self._include_stop:
            pieces = self._advance(ending_token)
        if not self.over:
            pieces += self._text.add(self._detokenizer.flush(), may_stop=self._may_stop)
        pieces += self._text.finish(may_stop=self._may_stop)
        return self._with_owed(pieces)

    def event(self, pieces: list[Piece]) -> tuple[str, list[Piece] | None]:
        """What an event carries for these pieces, see `PieceText.event`."""
        return self._text.event(pieces)

    @property
    def _may_stop(self) -> bool:
        return self._tokens >= self._min_tokens

    def _advance(self, token_id: int) -> list[Piece]:
        self._tokens += 1
        text = self._detokenizer.add(token_id)
        self.place += len(text)
        thought = self._text.in_thought
        pieces = self._text.add(text, may_stop=self._may_stop)
        self.reasoning_tokens += thought or self._text.in_thought
        return pieces

    def _with_owed(self, pieces: list[Piece]) -> list[Piece]:
        owed, self._owed = self._owed, []
        return [*owed, *pieces]
