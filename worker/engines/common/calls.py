"""Finds tool calls in what a model writes, and emits them as pieces: name, then arguments.

`CallParser` reads the content of one answer in the syntax of its model's family (`call_families`);
`DetectedCalls` is for models of unknown families and for calls that `tool_choice` forces. Both
depend on the text alone: how it is divided among calls of `feed` never changes the pieces. Only the
name of one of the request's tools makes a call; what turns out not to be a call stays text. Only
the markup of calls and the white space around them are dropped. A call that is cut off has the
arguments so far.

Must never see a token, never import torch, and never raise, whatever a model writes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any, Final, Protocol

from broker.protocol.messages import Piece, PieceKind
from broker.protocol.tool_parser import Arguments, CallStart, ObjectReader, Text, ToolCallParser
from worker.engines.common.answer_parser import CONTENT, Marks, first_of, held_back
from worker.engines.common.typed_arguments import Tools, is_text, typed

__all__ = ["ARGUMENTS", "CALL", "CallParser", "Calls", "DetectedCalls", "Reader"]

CALL: Final = PieceKind.CALL.value
ARGUMENTS: Final = PieceKind.ARGUMENTS.value
_SPACE: Final = " \t\r\n"


class Calls(Protocol):
    """Splits the content of an answer into text and calls."""

    def feed(self, text: str) -> list[Piece]:
        """The pieces that became certain with this text."""

    def pause(self) -> list[Piece]:
        """Called before anything but content: what can no longer become part of a call."""

    def finish(self) -> list[Piece]:
        """End the answer: what was held back."""


Steps = Generator[None, None, bool]
"""Consumes text of a `CallParser`, and yields when more is needed. Returns whether the region of
calls ended as it should; otherwise what follows is text."""

Reader = Callable[["CallParser"], Steps]
"""Reads what follows a mark that begins calls."""


class CallParser:
    """Calls in the syntax of a family. `syntaxes`: the reader of the calls after each mark.

    `bare`: the reader of calls at the beginning of an answer that have no mark. `thoughts`: marks
    of thoughts in the text, within which calls are not looked for; `opened`: the text begins within
    a thought. `special`: marks that are special tokens of the model, which are dropped from the
    text even if they begin no call.
    """

    def __init__(
        self,
        syntaxes: dict[str, Reader],
        tools: Tools,
        *,
        bare: Reader | None = None,
        special: Sequence[str] = (),
        thoughts: Marks | None = None,
        opened: bool = False,
    ) -> None:
        self.tools = tools
        self._syntaxes = syntaxes
        self._bare = bare
        self._special = special
        self._thoughts = thoughts
        self._opened = opened
        #: Text not consumed yet, and how many of its characters `until` has searched in vain.
        self.text = ""
        self._searched = 0
        #: Whether the answer is over.
        self.over = False
        #: Consumed since the region began or its last call ended: text if it yields no call.
        self._taken = ""
        self._in_region = False
        #: The tool that is being called, and whether any of its arguments has been emitted.
        self._tool: str | None = None
        self._has_arguments = False
        #: Number of calls begun.
        self._calls = 0
        self._pieces: list[Piece] = []
        self._steps = self._run()

    def feed(self, text: str) -> list[Piece]:
        """The pieces that became certain with this text."""
        self.text += text
        next(self._steps, None)
        return self._said()

    def pause(self) -> list[Piece]:
        """Called before anything but content: what can no longer become part of a call."""
        if not self._in_region:
            self._say(self._consume(len(self.text)))
        return self._said()

    def finish(self) -> list[Piece]:
        """End the answer: what was held back."""
        self.over = True
        next(self._steps, None)
        return self._said()

    def _said(self) -> list[Piece]:
        pieces, self._pieces = self._pieces, []
        return pieces

    # --- text and regions of calls ----------------------------------------------------------------

    def _run(self) -> Iterator[None]:
        if self._opened and self._thoughts is not None:
            yield from self._pass_over(self._thoughts.closes)
        opens = self._thoughts.opens if self._thoughts is not None else ()
        called = False
        if self._bare is not None:
            first = yield from self.skip()
            if first in ("[", "{"):
                called = yield from self._region(self._bare)
            else:
                self._say(self._taken)
        while True:
            mark = yield from self._say_until((*self._syntaxes, *opens), called)
            if not mark:
                return
            if mark in self._syntaxes:
                called = yield from self._region(self._syntaxes[mark])
                continue
            self._say(self._taken)
            assert self._thoughts is not None
            yield from self._pass_over(self._thoughts.closes)
            called = False

    def _region(self, reader: Reader) -> Steps:
        """Read calls; returns whether there were any, with nothing else after them."""
        before, self._in_region = self._calls, True
        ended = yield from reader(self)
        self._in_region, self._tool = False, None
        called = self._calls > before
        if called and not ended:
            # What the region has after its calls.
            self._say(self._taken.lstrip(_SPACE))
            called = not self._taken.strip(_SPACE)
        elif not called:
            self._say(self._taken)
        return called

    def _say_until(self, marks: tuple[str, ...], trims: bool) -> Generator[None, None, str]:
        """Emit the text before the next of the marks, without the white space at its end, and with
        `trims` without that at its beginning; consume and return the mark."""
        self._taken = ""
        while True:
            if trims:
                self._consume(len(self.text) - len(self.text.lstrip(_SPACE)))
                trims = not self.text
            at, mark = first_of(self.text, marks)
            if mark and not self._may_grow(at, mark, marks):
                kept = len(self.text[:at].rstrip(_SPACE))
                self._say(self._consume(kept))
                self._taken = self._consume(at + len(mark) - kept)
                return mark
            if self.over:
                self._say(self._consume(len(self.text)))
                return ""
            sure = len(self.text) - held_back(self.text, (*marks, *self._special))
            self._say(self._consume(len(self.text[:sure].rstrip(_SPACE))))
            yield

    def _may_grow(self, at: int, mark: str, marks: Sequence[str]) -> bool:
        """Whether a longer mark may begin at the same place."""
        rest = self.text[at:]
        return not self.over and any(
            len(other) > len(rest) and other.startswith(rest) for other in marks if other != mark
        )

    def _pass_over(self, closes: tuple[str, ...]) -> Iterator[None]:
        """Emit a thought as it stands, including the mark that ends it."""
        while True:
            at, mark = first_of(self.text, closes)
            if mark or self.over:
                self._say(self._consume(at + len(mark)))
                return
            self._say(self._consume(len(self.text) - held_back(self.text, closes)))
            yield

    def _say(self, text: str) -> None:
        for mark in self._special:
            text = text.replace(mark, "")
        if text:
            self._pieces.append(Piece(CONTENT, text))

    def _consume(self, count: int) -> str:
        taken, self.text = self.text[:count], self.text[count:]
        self._searched = 0
        return taken

    # --- for readers ------------------------------------------------------------------------------

    def take(self, count: int) -> str:
        """Consume and return this many characters of the text."""
        taken = self._consume(count)
        if self._tool is None:
            self._taken += taken
        return taken

    def give_back(self, text: str) -> None:
        """Return text that was consumed but does not belong to a call."""
        self.text = text + self.text
        self._searched = 0

    def skip(self, characters: str = _SPACE) -> Generator[None, None, str]:
        """Skip these characters; returns the next one, empty at the end of the answer."""
        while True:
            self.take(len(self.text) - len(self.text.lstrip(characters)))
            if self.text or self.over:
                return self.text[:1]
            yield

    def comes(self, *marks: str) -> Generator[None, None, str]:
        """Consume and return the one of these marks that comes next, even if the end of the answer
        cuts it off; empty if none does."""
        while True:
            for mark in marks:
                if self.text.startswith(mark):
                    return self.take(len(mark))
            begun = self.text and [mark for mark in marks if mark.startswith(self.text)]
            if begun and self.over:
                self.take(len(self.text))
                return begun[0]
            if self.over or not (begun or not self.text):
                return ""
            yield

    def until(self, *marks: str, keeps: bool = False) -> Generator[None, None, tuple[str, str]]:
        """The text before the next of the marks, and the mark. Both are consumed, but with `keeps`
        the mark is left. At the end of the answer: all that is left, and no mark."""
        longest = max(map(len, marks))
        while True:
            start = max(0, self._searched - longest + 1)
            at, mark = first_of(self.text[start:], marks)
            if mark and not self._may_grow(start + at, mark, marks):
                before = self.take(start + at)
                return before, mark if keeps else self.take(len(mark))
            if self.over:
                return self.take(len(self.text)), ""
            self._searched = len(self.text)
            yield

    def forget(self) -> None:
        """What was consumed is markup: it is not text, even if it yields no call."""
        self._taken = ""

    def start_call(self, name: str) -> bool:
        """Begin a call; False if there is no tool of that name."""
        if name not in self.tools:
            return False
        self._tool, self._has_arguments, self._taken = name, False, ""
        self._calls += 1
        self._pieces.append(Piece(CALL, name))
        return True

    def add_arguments(self, text: str) -> None:
        """Add more of the JSON of the arguments."""
        if text:
            self._has_arguments = True
            self._pieces.append(Piece(ARGUMENTS, text))

    def add_argument(self, key: str, text: str, *, cut: bool = False, json: bool = False) -> None:
        """Add one argument that the model wrote as text, or with `json` as JSON. `cut`: the answer
        ended within it."""
        assert self._tool is not None
        schema = self.tools[self._tool]
        head = ("{" if not self._has_arguments else ", ") + _json(key) + ": "
        if json:
            self.add_arguments(head + (text if cut or _is_json(text) else _json(text)))
        elif not cut:
            self.add_arguments(head + _json(typed(text, key, schema)))
        elif is_text(key, schema):
            self.add_arguments(head + _json(text)[:-1])
        else:
            self.add_arguments(head + text.strip(_SPACE))

    def end_call(self, *, closes: bool = False) -> None:
        """End the call. `closes`: its arguments were added one by one."""
        if closes:
            self.add_arguments("}" if self._has_arguments else "{}")
        self._tool = None

    def read_call(self, *, strict: bool = False) -> Steps:
        """Read a JSON object with name and arguments. False: it is not one, or the answer ended in
        it. `strict`: it is a call only once it is complete, and if it contains nothing else."""
        reader = ObjectReader(self.tools, strict=strict)
        return (yield from self._read(reader, told=False, strict=strict))

    def read_arguments(self) -> Steps:
        """Read the JSON object with the arguments of the current call. False: the answer ended in
        it."""
        return (yield from self._read(ObjectReader((), self._tool), told=True, strict=False))

    def _read(self, reader: ObjectReader, *, told: bool, strict: bool) -> Steps:
        while not (reader.complete or reader.refused):
            if not self.text:
                if self.over:
                    return False
                yield
                continue
            rest = reader.feed(self.text)
            self.take(len(self.text) - len(rest))
            if strict and not reader.complete:
                continue
            if not told and reader.name is not None and not reader.refused:
                told = self.start_call(reader.name)
            if told:
                self.add_arguments(reader.new_arguments())
        if reader.complete:
            self.end_call()
        return reader.complete


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


class DetectedCalls:
    """Calls in any of the common formats; see `ToolCallParser`."""

    def __init__(self, parser: ToolCallParser) -> None:
        self._parser = parser

    def feed(self, text: str) -> list[Piece]:
        return self._pieces(self._parser.feed(text))

    def pause(self) -> list[Piece]:
        return []

    def finish(self) -> list[Piece]:
        return self._pieces(self._parser.finish())

    @staticmethod
    def _pieces(found: list[Text | CallStart | Arguments]) -> list[Piece]:
        pieces: list[Piece] = []
        for piece in found:
            if isinstance(piece, CallStart):
                pieces.append(Piece(CALL, piece.name))
            elif piece.text:
                pieces.append(Piece(CONTENT if isinstance(piece, Text) else ARGUMENTS, piece.text))
        return pieces
