"""Splits the text of one answer, as it streams, into typed pieces: reasoning and content.

A `Splitter` knows how one family of models marks its text and cuts it at the marks; `AnswerParser`,
which engines use, also drops the white space around them. Both depend on the text alone: how it is
divided among calls of `feed` never changes the pieces, so a parser that is fed the tokens so far
reaches the state of the interrupted one. Only the marks and the white space beside them are
dropped: a mark that is cut off, a thought that never ends and text before a thought all come out as
text.

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
    "PieceParser",
    "Splitter",
    "first_of",
    "held_back",
    "merged",
    "unsplit",
]

CONTENT: Final = PieceKind.CONTENT.value
REASONING: Final = PieceKind.REASONING.value


class Splitter(Protocol):
    """Cuts a text at a family's marks. Emits everything but the marks, white space included."""

    @property
    def kind(self) -> str:
        """Kind of the text that follows, as far as it is known."""

    @property
    def speaks(self) -> bool:
        """Whether content follows, neither a thought nor part of a mark, as far as it is known."""

    def feed(self, text: str) -> list[Piece]:
        """The pieces that became certain with this text."""

    def finish(self) -> list[Piece]:
        """End the answer: what was held back."""


class PieceParser(Protocol):
    """Gives the pieces of an answer as they become certain."""

    @property
    def in_thought(self) -> bool:
        """Whether reasoning follows, as far as it is known."""

    def feed(self, text: str) -> list[Piece]:
        """The pieces that became certain with this text."""

    def finish(self) -> list[Piece]:
        """End the answer: what was held back."""


# --- marks around thoughts ------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Marks:
    """How a family marks a thought: any of `opens` begins one, any of `closes` ends it."""

    opens: tuple[str, ...]
    closes: tuple[str, ...]
    #: Marks that may stand around what is said after a thought: (`<answer>`, `</answer>`).
    wraps: tuple[str, str] | None = None


class MarkSplitter:
    """Thoughts between marks. `opened`: the prompt ends within a thought. `continues`: text, not a
    mark, stands at the end of the prompt."""

    def __init__(self, marks: Marks, *, opened: bool = False, continues: bool = False) -> None:
        self._marks = marks
        self._pending = ""
        self._kind = REASONING if opened else CONTENT
        #: Only white space has come in the current run.
        self._fresh = not continues
        #: A thought has ended, so the answer may be wrapped; the answer is inside its wrap.
        self._may_wrap = self._wrapped = False

    @property
    def kind(self) -> str:
        return self._kind

    @property
    def speaks(self) -> bool:
        return self._kind == CONTENT

    def passes(self, text: str) -> bool:
        """Whether `feed` would emit this text unchanged: it is content, and no character of it can
        begin a mark."""
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
        """Consume the text up to a mark, and the mark; False when more text is needed."""
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
        """Skip a mark that may stand only where a thought or its answer begins: an opening mark
        that the prompt already has, or a wrap. None: there is none; False: the text may become
        one."""
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

    `begun`: the prompt from its last `<|start|>` on. Text on the channel `analysis` is reasoning;
    all other text is content. A message to a tool is content that begins with its header; with
    `shows_calls` it keeps its marks, which no other text can contain.
    """

    MARKS: Final = (_START, _CHANNEL, _CONSTRAIN, _MESSAGE, *_ENDS)

    def __init__(self, begun: str = "", *, shows_calls: bool = False) -> None:
        self._pending = ""
        self._kind = CONTENT
        self._shows_calls = shows_calls
        #: The current message is addressed to a tool.
        self._calls = False
        #: The current header so far; None outside of headers.
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
            # A header that was cut off is dropped; text without a mark was not a header.
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
            # Not a header: the model writes without one.
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
    """Whether this may begin a header, before its channel: a role, and whom it addresses."""
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

    A thought loses the white space at both its ends. Content loses the white space that follows a
    thought, and is dropped before the first thought if it is only white space. `continues`: the
    answer continues a text in the prompt, so that its first white space is part of it. `settled`:
    its thought has ended in the prompt.
    """

    def __init__(
        self, splitter: Splitter, *, continues: bool = False, settled: bool = False
    ) -> None:
        self._splitter = splitter
        #: The answer itself has begun: no thought is expected any more.
        self.settled = settled or (continues and splitter.speaks)
        #: Thoughts come only before the answer, see `think_first`.
        self._thinks_first = False
        #: Kind of the current run; None before the first.
        self._kind: str | None = splitter.kind if continues else None
        #: Nothing but white space has come in it.
        self._blank = not continues
        #: Its leading white space is dropped.
        self._trims = False
        #: White space that is emitted only if more of the run follows.
        self._space = ""

    def think_first(self) -> None:
        """Once content has begun, take all that follows as content, whatever marks it contains: it
        is under a constraint, so the marks are ordinary text. Call before the first text."""
        self._thinks_first = True

    @property
    def in_thought(self) -> bool:
        """Whether reasoning follows, as far as it is known."""
        return self._splitter.kind == REASONING

    @property
    def speaks(self) -> bool:
        """Whether content follows, neither a thought nor part of a mark, as far as it is known."""
        return self._splitter.speaks

    def feed(self, text: str) -> list[Piece]:
        """The pieces that became certain with this text; neighbours differ in kind."""
        if (
            self._kind == CONTENT
            and not (self._trims or self._blank or self._space or self._thinks_first)
            and isinstance(self._splitter, MarkSplitter)
            and self._splitter.passes(text)
        ):
            # The usual case; every stream waits for this in each step.
            return [Piece(CONTENT, text)] if text else []
        pieces = merged(self._trimmed(self._splitter.feed(text)))
        if self._thinks_first and any(piece.kind == CONTENT for piece in pieces):
            pieces += self._trimmed(self._splitter.finish())
            self._splitter = _Plain()
        return merged(pieces)

    def finish(self) -> list[Piece]:
        """End the answer: the rest. An answer that ended within a thought keeps its last white
        space, so that it can be continued exactly."""
        pieces = self._trimmed(self._splitter.finish())
        if self._space and self._kind is not None and self.in_run:
            pieces.append(Piece(self._kind, self._space))
        self._space = ""
        return merged(pieces)

    @property
    def in_run(self) -> bool:
        """Whether no mark has ended the current run."""
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
    """Where the first of the marks begins in the text, and which it is; of several that begin at
    the same place, the longest. An empty mark: there is none."""
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
    """The pieces with neighbours of the same kind merged."""
    if len(pieces) < 2:
        return pieces
    out = pieces[:1]
    for piece in pieces[1:]:
        if piece.kind == out[-1].kind:
            out[-1] = Piece(piece.kind, out[-1].text + piece.text)
        else:
            out.append(piece)
    return out
