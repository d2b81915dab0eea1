"""Between the session and a stream whose answer may call tools: what a worker sends as text goes
in, text and whole calls come out. Pure, and never raises, whatever a model writes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable

import msgspec

from broker.protocol import messages
from broker.protocol.messages import PieceKind, PromptEvent, TokensEvent
from client.core.events import End, Item
from broker.protocol.tool_parser import CallStart, Piece, Text, ToolCallParser
from client.core.tools import Reading, ToolCall

__all__ = ["CallReader"]


class CallReader:
    """Takes what the session delivers of one request."""

    def __init__(self, reading: Reading, ids: str, hand_on: Callable[[Item], None]) -> None:
        """`ids`: how the ids of its calls begin."""
        self._tools = {tool.name: tool for tool in reading.tools}
        self._shows_prompt = reading.shows_prompt
        self._ids = ids
        self._hand_on = hand_on
        self._parser = ToolCallParser(
            self._tools, forced=reading.forced, shows_special=reading.shows_special
        )
        #: What the prompt is known by, until the first text shows whether thoughts come apart.
        self._prompt: PromptEvent | None = None
        #: Name and arguments of each call so far, and how many of them were handed on.
        self._calls: list[tuple[str, list[str]]] = []
        self._told = 0

    def add(self, item: Item) -> None:
        """Hand on what is certain with this item."""
        parser, hand_on = self._parser, self._hand_on
        match item:
            case TokensEvent():
                # The ids are counted where they arrive, though their text may be held back.
                text, pieces = self._read(item)
                hand_on(msgspec.structs.replace(item, text=text, pieces=pieces))
                self._tell(parser.complete_calls)
            case End():
                text, pieces = self._read(item)
                rest = self._text_of(parser.finish())
                if rest and pieces is not None:
                    pieces = [*pieces, messages.Piece(PieceKind.CONTENT.value, rest)]
                self._tell(len(self._calls))
                hand_on(dataclasses.replace(item, text=text + rest, pieces=pieces))
            case PromptEvent():
                self._prompt = item
                if self._shows_prompt:
                    hand_on(item)
            case _:
                hand_on(item)

    def _read(self, item: TokensEvent | End) -> tuple[str, list[messages.Piece] | None]:
        """The text of an event without its calls, and all of it by kind where it came so."""
        if self._prompt is not None and (item.text or item.pieces):
            # Where thoughts come apart, one that the prompt has begun is no matter of the text.
            prompt, self._prompt = self._prompt, None
            tail = prompt.tail if item.pieces is None else ""
            self._parser.begin(special=prompt.special, tail=tail)
        if item.pieces is None:
            return self._text_of(self._parser.feed(item.text)), None
        texts: list[str] = []
        pieces: list[messages.Piece] = []
        for piece in item.pieces:
            if piece.kind == PieceKind.CONTENT:
                texts.append(self._text_of(self._parser.feed(piece.text)))
                piece = messages.Piece(piece.kind, texts[-1])
            if piece.text:
                pieces.append(piece)
        return "".join(texts), pieces

    def _text_of(self, pieces: Iterable[Piece]) -> str:
        """Their text; what belongs to calls is kept."""
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
        """Hand on the calls up to this one."""
        calls = self._calls
        while self._told < min(complete, len(calls)):
            name, arguments = calls[self._told]
            self._told += 1
            self._hand_on(
                ToolCall(
                    id=f"call_{self._ids}_{self._told - 1}",
                    name=name,
                    arguments_json="".join(arguments),
                    tool=self._tools[name],
                    cut=self._parser.cut and self._told == len(calls),
                )
            )
