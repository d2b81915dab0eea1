"""Sits between the session and a stream whose answer may call tools: takes what a worker sends, and
returns text and complete calls. Pure, and never raises, whatever a model or a worker writes.

A worker separates calls from text. Older workers do not; their text is searched for calls here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable

import msgspec

from broker.protocol import messages
from broker.protocol.messages import PieceKind, PromptEvent, TokensEvent
from broker.protocol.tool_parser import CallStart, ObjectReader, Piece, Text, ToolCallParser
from client.core.events import End, Item
from client.core.tools import Reading, Tool, ToolCall

__all__ = ["CallReader"]


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

    def add(self, item: Item) -> None:
        """Deliver everything that is certain after this item."""
        match item:
            case TokensEvent():
                # Token ids count when they arrive, even if their text is held back.
                text, pieces = self._read(item)
                self._hand_on(msgspec.structs.replace(item, text=text, pieces=pieces))
                self._tell(self._complete)
            case End():
                text, pieces = self._read(item)
                rest = "" if self._split else self._text_of(self._parser.finish())
                if rest and pieces is not None:
                    pieces = [*pieces, messages.Piece(PieceKind.CONTENT.value, rest)]
                self._tell(len(self._calls))
                self._hand_on(dataclasses.replace(item, text=text + rest, pieces=pieces))
            case PromptEvent():
                self._prompt = item
                if self._shows_prompt:
                    self._hand_on(item)
            case _:
                self._hand_on(item)

    @property
    def _complete(self) -> int:
        """How many calls are complete."""
        if not self._split:
            return self._parser.complete_calls
        # Complete arguments end the call, whatever follows.
        is_open = self._reader is not None and not self._reader.complete
        return len(self._calls) - is_open

    def _read(self, item: TokensEvent | End) -> tuple[str, list[messages.Piece] | None]:
        """The text of an event without its calls; also its pieces, if it has them."""
        if item.pieces is not None:
            self._split = True
        if self._split:
            return item.text, self._without_calls(item.pieces)
        # An older worker, which does not separate calls from text.
        if self._prompt is not None and item.text:
            prompt, self._prompt = self._prompt, None
            self._parser.begin(special=prompt.special, tail=prompt.tail)
        return self._text_of(self._parser.feed(item.text)), None

    def _without_calls(self, pieces: list[messages.Piece] | None) -> list[messages.Piece] | None:
        """The pieces that do not belong to calls; the others are collected in `_calls`."""
        if pieces is None:
            return None
        others: list[messages.Piece] = []
        for piece in pieces:
            if piece.kind == PieceKind.CALL:
                self._calls.append((piece.text, []))
                self._reader = ObjectReader((), piece.text)
            elif piece.kind == PieceKind.ARGUMENTS:
                if self._reader is not None:
                    self._calls[-1][1].append(piece.text)
                    self._reader.feed(piece.text)
            else:
                others.append(piece)
                self._reader = None
        return others

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
