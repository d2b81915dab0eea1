"""Sits between the session and a stream whose answer may call tools: takes what a worker sends, and
returns text and complete calls. Pure, and never raises, whatever a model or a worker writes.

A worker separates calls from text. Older workers do not; their text is searched for calls here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Final

import msgspec

from broker.protocol import messages
from broker.protocol.messages import PieceKind, PromptEvent, TokensEvent
from broker.protocol.tool_parser import CallStart, ObjectReader, Piece, Text, ToolCallParser
from client.core.events import End, Item
from client.core.tools import Reading, Tool, ToolCall

__all__ = ["CallReader"]

_CONTENT: Final = PieceKind.CONTENT.value


class CallReader:
    """Reads what the session delivers for one request."""

    def __init__(self, reading: Reading, ids: str, hand_on: Callable[[Item], None]) -> None:
        """`ids`: the prefix of the ids of its calls."""
        self._tools = {tool.name: tool for tool in reading.tools}
        self._shows_prompt = reading.shows_prompt
        self._ids = ids
        self._hand_on = hand_on
        self._parser = ToolCallParser(
            self._tools, forced=reading.forced, shows_special=reading.shows_special
        )
        #: Kept until the first text shows whether the worker separates calls from text.
        self._prompt: PromptEvent | None = None
        #: Name and arguments of each call so far, and how many of them were delivered.
        self._calls: list[tuple[str, list[str]]] = []
        self._delivered = 0
        #: The worker separates calls from text; the reader of the current call's arguments.
        self._split = False
        self._reader: ObjectReader | None = None
        #: Behind the last tokens.
        self._offset = 0

    def add(self, item: Item) -> None:
        """Deliver everything that is certain after this item."""
        match item:
            case TokensEvent() | End():
                # A worker that separates calls from text does so from its first text on.
                self._split = self._split or item.pieces is not None
                if self._split:
                    self._add_split(item)
                else:
                    self._add_whole(item)
            case PromptEvent():
                self._prompt = item
                if self._shows_prompt:
                    self._hand_on(item)
            case _:
                self._hand_on(item)

    def _add_whole(self, item: TokensEvent | End) -> None:
        """An event of an older worker, which does not separate calls from text."""
        if self._prompt is not None and item.text:
            prompt, self._prompt = self._prompt, None
            self._parser.begin(special=prompt.special, tail=prompt.tail)
        text = self._text_of(self._parser.feed(item.text))
        if isinstance(item, TokensEvent):
            # Token ids count when they arrive, even if their text is held back.
            self._hand_on(msgspec.structs.replace(item, text=text))
            self._tell(self._complete)
            return
        text += self._text_of(self._parser.finish())
        self._tell(len(self._calls))
        self._hand_on(dataclasses.replace(item, text=text))

    def _add_split(self, item: TokensEvent | End) -> None:
        """Texts and calls in the order in which they were written, whatever came together."""
        pieces = item.pieces
        if pieces is None:
            pieces = [messages.Piece(_CONTENT, item.text)] if item.text else []
        token_ids = item.token_ids if isinstance(item, TokensEvent) else []
        others: list[messages.Piece] = []
        for piece in pieces:
            said = self._collect(piece)
            if self._complete > self._delivered:
                if others or token_ids:
                    self._hand_on(self._event(item, token_ids, others))
                    token_ids, others = [], []
                self._tell(self._complete)
            if said:
                others.append(piece)
        if isinstance(item, TokensEvent):
            if others or token_ids or not pieces:
                self._hand_on(self._event(item, token_ids, others))
            return
        if len(self._calls) > self._delivered and others:
            self._hand_on(self._event(item, [], others))
            others = []
        self._tell(len(self._calls))
        kept = None if item.pieces is None else others
        self._hand_on(dataclasses.replace(item, text=_content(others), pieces=kept))

    def _event(
        self, item: TokensEvent | End, token_ids: list[int], pieces: list[messages.Piece]
    ) -> TokensEvent:
        """A part of an event."""
        text, kept = _content(pieces), None if item.pieces is None else pieces
        if isinstance(item, End):
            return TokensEvent(b"", 0, self._offset, [], text, None, kept)
        if not token_ids and item.token_ids:
            # The second part of it: its tokens have been handed on.
            offset = item.offset + len(item.token_ids)
            return msgspec.structs.replace(
                item, offset=offset, token_ids=[], text=text, logprobs=None, pieces=kept
            )
        self._offset = item.offset + len(item.token_ids)
        return msgspec.structs.replace(item, text=text, pieces=kept)

    @property
    def _complete(self) -> int:
        """How many calls are complete."""
        if not self._split:
            return self._parser.complete_calls
        # Complete arguments end the call, whatever follows.
        is_open = self._reader is not None and not self._reader.complete
        return len(self._calls) - is_open

    def _collect(self, piece: messages.Piece) -> bool:
        """Take what belongs to a call; True for everything else, which ends a call."""
        if piece.kind == PieceKind.CALL:
            self._calls.append((piece.text, []))
            self._reader = ObjectReader((), piece.text)
        elif piece.kind == PieceKind.ARGUMENTS:
            if self._reader is not None:
                self._calls[-1][1].append(piece.text)
                self._reader.feed(piece.text)
        else:
            self._reader = None
            return True
        return False

    def _text_of(self, pieces: Iterable[Piece]) -> str:
        """The text of the pieces that do not belong to calls; collects the others."""
        texts: list[str] = []
        for piece in pieces:
            if isinstance(piece, Text):
                texts.append(piece.text)
            elif isinstance(piece, CallStart):
                self._calls.append((piece.name, []))
            else:
                self._calls[piece.index][1].append(piece.text)
        return "".join(texts)

    def _tell(self, complete: int) -> None:
        """Deliver the first `complete` calls, unless that has been done."""
        calls = self._calls
        while self._delivered < min(complete, len(calls)):
            name, arguments = calls[self._delivered]
            self._delivered += 1
            is_cut = self._parser.cut or self._complete < len(calls)
            self._hand_on(
                ToolCall(
                    id=f"call_{self._ids}_{self._delivered - 1}",
                    name=name,
                    arguments_json="".join(arguments),
                    tool=self._tools.get(name) or Tool(name, None),
                    cut=is_cut and self._delivered == len(calls),
                )
            )


def _content(pieces: list[messages.Piece]) -> str:
    return "".join(piece.text for piece in pieces if piece.kind == _CONTENT)
