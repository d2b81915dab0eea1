"""Splits the text of one answer, as it streams, into typed pieces: what was thought, what is said.

A `Splitter` knows how one family of models marks its text and cuts it there; `AnswerParser` drops
the white space around the marks and is what engines hold. Both are functions of the text alone: how
it is cut into feeds never changes the pieces, so a parser that is fed the tokens so far stands
where the interrupted one stood. Nothing is lost but the marks and the white space beside them: a
mark that is cut off, a thought that never ends and text before a thought all come out as text.

Work per character is constant. Must never see a token and must never import torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from broker.protocol.messages import Piece, PieceKind

__all__ = [
    "CONTENT",
    "REASONING",
    "AnswerParser",
    "ChannelSplitter",
    "MarkSplitter",
    "Marks",
    "Splitter",
    "first_of",
    "held_back",
    "merged",
    "unsplit",
]

CONTENT: Final = PieceKind.CONTENT.value
REASONING: Final = PieceKind.REASONING.value


class Splitter(Protocol):
    """Cuts a text at a family's marks. Says everything but the marks, white space included."""

    @property
    def kind(self) -> str:
        """Of the text that follows, as far as it is known."""

    @property
    def speaks(self) -> bool:
        """What follows is said: it is neither a thought nor among marks, as far as it is known."""

    def feed(self, text: str) -> list[Piece]:
        """The pieces that became certain with this text."""

    def finish(self) -> list[Piece]:
        """The answer is over: what was held back."""


# --- marks around thoughts ------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Marks:
    """How a family marks a thought: any of `opens` begins one, any of `closes` ends it."""

    opens: tuple[str, ...]
    closes: tuple[str, ...]
    #: Marks that may stand around what is said after a thought: (`<answer>`, `</answer>`).
    wraps: tuple[str, str] | None = None


class MarkSplitter:
    """Thoughts between marks. `opened`: the prompt ends within one; `continues`: with more of it
    than the mark."""

    def __init__(self, marks: Marks, *, opened: bool = False, continues: bool = False) -> None:
        self._marks = marks
        self._pending = ""
        self._kind = REASONING if opened else CONTENT
        #: Of the run in hand, nothing but white space came yet.
        self._fresh = not continues
        #: A thought ended: its answer may be wrapped, and is within the wrap.
        self._may_wrap = self._wrapped = False

    @property
    def kind(self) -> str:
        return self._kind

    @property
    def speaks(self) -> bool:
        return self._kind == CONTENT

    def passes(self, text: str) -> bool:
        """Whether `feed` would only say this text, as it stands: it is content, and no character
        of it can begin a mark."""
        if self._kind != CONTENT or self._pending or self._fresh:
            return False
        return not any(mark[0] in text for mark in self._watched())

    def feed(self, text: str) -> list[Piece]:
        self._pending += text
        pieces: list[Piece] = []
        while self._pending and self._step(pieces):
            pass
        return pieces

    def finish(self) -> list[Piece]:
        rest, self._pending = self._pending, ""
        return [Piece(self._kind, rest)] if rest else []

    def _step(self, pieces: list[Piece]) -> bool:
        """Take the text up to a mark and the mark; False when more text is needed."""
        pending = self._pending
        if self._fresh:
            begun = self._begin()
            if begun is not None:
                return begun
        watched = self._watched()
        at, mark = first_of(pending, watched)
        if mark:
            self._say(pending[:at], pieces)
            self._pending = pending[at + len(mark) :]
            self._pass(mark)
            return True
        sure = len(pending) - held_back(pending, watched)
        self._say(pending[:sure], pieces)
        self._pending = pending[sure:]
        return False

    def _begin(self) -> bool | None:
        """Pass over a mark that may only stand where a thought or its answer begins: the opening
        that the prompt has already, a wrap. None: there is none; False: it may become one."""
        head = self._pending.lstrip()
        leading: tuple[str, ...] = ()
        if self._kind == REASONING:
            leading = self._marks.opens
        elif self._may_wrap and self._marks.wraps is not None:
            leading = self._marks.wraps[:1]
        if not leading:
            return None
        for mark in leading:
            if head.startswith(mark):
                self._pending = head[len(mark) :]
                if self._kind == CONTENT:
                    self._wrapped, self._may_wrap = True, False
                return True
        if any(mark.startswith(head) for mark in leading):
            return False
        return None

    def _watched(self) -> tuple[str, ...]:
        if self._kind == REASONING:
            return self._marks.closes
        if self._wrapped and self._marks.wraps is not None:
            close = self._marks.wraps[1]
            return ("\n" + close, close, *self._marks.opens)
        return self._marks.opens

    def _say(self, text: str, pieces: list[Piece]) -> None:
        if text:
            pieces.append(Piece(self._kind, text))
            self._fresh = self._fresh and text.isspace()

    def _pass(self, mark: str) -> None:
        if self._kind == REASONING:
            self._kind, self._may_wrap, self._fresh = CONTENT, True, True
        elif mark in self._marks.opens:
            self._kind, self._fresh = REASONING, True
        else:
            self._wrapped = False


# --- channels -------------------------------------------------------------------------------------

_START, _CHANNEL, _CONSTRAIN, _MESSAGE = "<|start|>", "<|channel|>", "<|constrain|>", "<|message|>"
_CALL_ENDS = "<|call|>"
_ENDS = ("<|end|>", "<|return|>", _CALL_ENDS)


class ChannelSplitter:
    """Messages with a header that names their channel, as gpt-oss writes them (harmony):

        <|channel|>analysis<|message|>...<|end|><|start|>assistant<|channel|>final<|message|>...

    `begun`: the prompt from its last `<|start|>` on. What is said on `analysis` is thought; the
    rest is said, but what is addressed to a tool, which stands there with its header, and with
    `shows_calls` between the marks that no other text can have.
    """

    MARKS: Final = (_START, _CHANNEL, _CONSTRAIN, _MESSAGE, *_ENDS)

    def __init__(self, begun: str = "", *, shows_calls: bool = False) -> None:
        self._pending = ""
        self._kind = CONTENT
        self._shows_calls = shows_calls
        #: A message to a tool is in hand.
        self._calls = False
        #: What the header in hand has so far; None outside of headers.
        self._header: str | None = "assistant"
        #: Between two messages.
        self._between = False
        if begun:
            self._header = None
            self.feed(begun)

    @property
    def kind(self) -> str:
        return self._kind

    @property
    def speaks(self) -> bool:
        return self._header is None and not self._between and self._kind == CONTENT

    def feed(self, text: str) -> list[Piece]:
        self._pending += text
        pieces: list[Piece] = []
        while self._pending and self._step(pieces):
            pass
        return pieces

    def finish(self) -> list[Piece]:
        rest, self._pending = self._pending, ""
        if self._header is not None:
            # A header that was cut off says nothing; what has no mark is no header.
            header, self._header = self._header + rest, None
            rest = "" if _CHANNEL in header or header == "assistant" else _bare(header)
        return [Piece(self._kind, rest)] if rest else []

    def _step(self, pieces: list[Piece]) -> bool:
        at, mark = first_of(self._pending, self.MARKS)
        if not mark:
            sure = len(self._pending) - held_back(self._pending, self.MARKS)
            self._take(self._pending[:sure], pieces)
            self._pending = self._pending[sure:]
            return False
        self._take(self._pending[:at], pieces)
        self._pending = self._pending[at + len(mark) :]
        self._pass(mark, pieces)
        return True

    def _take(self, text: str, pieces: list[Piece]) -> None:
        if self._header is None:
            if text:
                pieces.append(Piece(self._kind, text))
            return
        self._header += text
        if _CHANNEL not in self._header and not _may_be_role(self._header):
            # No header at all: the model speaks without one.
            said, self._header, self._kind = _bare(self._header), None, CONTENT
            if said:
                pieces.append(Piece(CONTENT, said))

    def _pass(self, mark: str, pieces: list[Piece]) -> None:
        self._between = mark in _ENDS
        if self._calls and mark in (_START, *_ENDS):
            self._calls = False
            pieces.append(Piece(CONTENT, _CALL_ENDS))
        if mark == _START:
            self._header, self._kind = "", CONTENT
        elif mark in _ENDS:
            self._header, self._kind = None, CONTENT
        elif mark in (_CHANNEL, _CONSTRAIN):
            self._header = (self._header or "") + mark
        elif self._header is not None:
            header, self._header = self._header, None
            channel = header.partition(_CHANNEL)[2].split("<|")[0].split()
            self._kind = REASONING if channel[:1] == ["analysis"] else CONTENT
            if " to=" in header:
                self._kind = CONTENT
                self._calls = self._shows_calls
                told = _bare(header).strip()
                if self._calls:
                    told = f"{_CHANNEL}{header.removeprefix('assistant')}{_MESSAGE}"
                pieces.append(Piece(CONTENT, told))


def _may_be_role(header: str) -> bool:
    """Of the beginning of a header without a channel yet: a role, and to whom it speaks."""
    role, space, rest = header.partition(" ")
    if not space:
        return "assistant".startswith(role.strip())
    return role == "assistant" and (" to=".startswith(f" {rest[:3]}") or not rest.strip())


def _bare(header: str) -> str:
    """A header's words without its marks and the role."""
    return header.replace(_CHANNEL, " ").replace(_CONSTRAIN, " ").removeprefix("assistant")


# --- what engines hold ----------------------------------------------------------------------------


class AnswerParser:
    """The pieces of one answer, without the white space around its marks.

    Of a thought, white space at either end is dropped; of what is said, that which follows a
    thought, and that which is all that stands before the first. `continues`: the answer goes on
    with a text of the prompt, so that its first white space is part of it. `settled`: its thought
    has ended in the prompt.
    """

    def __init__(
        self, splitter: Splitter, *, continues: bool = False, settled: bool = False
    ) -> None:
        self._splitter = splitter
        #: The answer itself has begun: a thought is not to be expected any more.
        self.settled = settled or (continues and splitter.speaks)
        #: Thoughts come only before the answer, see `think_first`.
        self._thinks_first = False
        #: Kind of the run in hand; None before the first.
        self._kind: str | None = splitter.kind if continues else None
        #: Nothing but white space was said of it.
        self._blank = not continues
        #: White space is dropped up to its first other character.
        self._trims = False
        #: White space that is said only if more of the run follows.
        self._space = ""

    def think_first(self) -> None:
        """Once something was said, all that follows is said, whatever marks stand in it: a
        constraint holds it, so the marks are words. To be called before the first text."""
        self._thinks_first = True

    @property
    def in_thought(self) -> bool:
        """What follows is thought, as far as it is known."""
        return self._splitter.kind == REASONING

    @property
    def speaks(self) -> bool:
        """What follows is said: it is neither a thought nor among marks, as far as it is known."""
        return self._splitter.speaks

    def feed(self, text: str) -> list[Piece]:
        """The pieces that became certain with this text; neighbours differ in kind."""
        if (
            self._kind == CONTENT
            and not (self._trims or self._blank or self._space or self._thinks_first)
            and isinstance(self._splitter, MarkSplitter)
            and self._splitter.passes(text)
        ):
            # Most of an answer, and the step of every stream waits for this.
            return [Piece(CONTENT, text)] if text else []
        pieces = merged(self._trimmed(self._splitter.feed(text)))
        if self._thinks_first and any(piece.kind == CONTENT for piece in pieces):
            pieces += self._trimmed(self._splitter.finish())
            self._splitter = _Plain()
        return merged(pieces)

    def finish(self) -> list[Piece]:
        """The answer is over: the rest. An answer that ended within a thought keeps its last white
        space, so that it can be continued exactly."""
        pieces = self._trimmed(self._splitter.finish())
        if self._space and self._kind is not None and self.in_run:
            pieces.append(Piece(self._kind, self._space))
        self._space = ""
        return merged(pieces)

    @property
    def in_run(self) -> bool:
        """The run in hand was not ended by a mark."""
        return self._kind == self._splitter.kind

    def _trimmed(self, pieces: list[Piece]) -> list[Piece]:
        trimmed: list[Piece] = []
        for piece in pieces:
            text = piece.text
            if piece.kind != self._kind:
                self._trims = self._kind is not None or piece.kind == REASONING
                self._kind, self._blank, self._space = piece.kind, True, ""
            if self._trims:
                text = text.lstrip()
                if not text:
                    continue
                self._trims = False
            text = self._space + text
            self._space = ""
            if self._kind == REASONING or (self._blank and text.isspace()):
                kept = text.rstrip()
                text, self._space = kept, text[len(kept) :]
            if text:
                self._blank = False
                trimmed.append(Piece(piece.kind, text))
        return trimmed


class _Plain:
    """A text in which nothing is marked."""

    kind = CONTENT
    speaks = True

    def feed(self, text: str) -> list[Piece]:
        return [Piece(CONTENT, text)] if text else []

    def finish(self) -> list[Piece]:
        return []


def unsplit(*, continues: bool = False) -> AnswerParser:
    """The parser of an answer that is all content."""
    return AnswerParser(_Plain(), continues=continues)


# --- helpers --------------------------------------------------------------------------------------


def first_of(text: str, marks: Sequence[str]) -> tuple[int, str]:
    """Where the first of the marks begins in the text, and which it is: of those that begin at one
    place, the longest. An empty mark: there is none."""
    best, found = len(text), ""
    for mark in marks:
        at = text.find(mark)
        if at >= 0 and (at < best or (at == best and len(mark) > len(found))):
            best, found = at, mark
    return best, found


def held_back(text: str, marks: Sequence[str]) -> int:
    """How many characters at the end of the text could be the beginning of a mark."""
    most = 0
    for mark in marks:
        at = text.find(mark[0], max(0, len(text) - len(mark) + 1))
        while at >= 0 and not mark.startswith(text[at:]):
            at = text.find(mark[0], at + 1)
        if at >= 0:
            most = max(most, len(text) - at)
    return most


def merged(pieces: list[Piece]) -> list[Piece]:
    """Neighbours of one kind as one piece."""
    if len(pieces) < 2:
        return pieces
    out = pieces[:1]
    for piece in pieces[1:]:
        if piece.kind == out[-1].kind:
            out[-1] = Piece(piece.kind, out[-1].text + piece.text)
        else:
            out.append(piece)
    return out
