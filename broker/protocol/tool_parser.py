"""Finds tool calls in a model's text as it streams, in any of the common formats.

A request does not say which format the model was trained on, so it is detected:

    <tool_call>{"name": ..., "arguments": {...}}</tool_call>     Hermes, Qwen; anywhere in the text
    [TOOL_CALLS][{"name": ..., "arguments": {...}}, ...]         Mistral
    [TOOL_CALLS]name[ARGS]{...}                                  Mistral, newer
    [TOOL_CALLS]name[CALL_ID]id[ARGS]{...}                       Mistral, newest
    <|python_tag|>{"name": ..., "parameters": {...}}; {...}      Llama 3; the tag is optional
    [{"name": ..., "arguments": {...}}, ...]                     a forced call, or a skipped tag

JSON without a marker counts only at the very start of the answer and only if the whole answer
consists of calls: objects with the name of one of the request's tools, its arguments, and nothing
else. So it is held back until it is complete, unless the call was forced. Anything else stays text,
and so does everything inside reasoning (`<think>` and the like). Arguments are passed on as the
model writes them. Pure: fed text, returns pieces. How the text is split into feeds never changes
the result, and nothing is lost but the markup of calls and the white space around it.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from enum import Enum, auto
from typing import Final

from msgspec import Struct

__all__ = ["MARKS", "Arguments", "CallStart", "ObjectReader", "Piece", "Text", "ToolCallParser"]


class Text(Struct, frozen=True, gc=False):
    """Text outside of any call."""

    text: str


class CallStart(Struct, frozen=True, gc=False):
    """A call of the tool `name` begins; `index` counts the calls of the answer."""

    index: int
    name: str


class Arguments(Struct, frozen=True, gc=False):
    """More of the JSON text of the arguments of call `index`."""

    index: int
    text: str


Piece = Text | CallStart | Arguments

_HERMES, _HERMES_END = "<tool_call>", "</tool_call>"
_MISTRAL, _MISTRAL_ID, _MISTRAL_ARGS = "[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"
_LLAMA = "<|python_tag|>"
_CALLS = (_HERMES, _MISTRAL, _LLAMA)
#: How models mark the beginning and the end of reasoning.
_THOUGHTS = {
    "<think>": "</think>",
    "<thinking>": "</thinking>",
    "<thought>": "</thought>",
    "<thoughts>": "</thoughts>",
    "<reasoning>": "</reasoning>",
    "<reflection>": "</reflection>",
    "<longcat_think>": "</longcat_think>",
    "<|begin_of_thought|>": "<|end_of_thought|>",
    "<|inner_prefix|>": "<|inner_suffix|>",
    "<seed:think>": "</seed:think>",
    "[THINK]": "[/THINK]",
    "<|START_THINKING|>": "<|END_THINKING|>",
    "◁think▷": "◁/think▷",
}
_OPENINGS = (*_CALLS, *_THOUGHTS)
#: Markers needed in the text for finding calls, even if they are special tokens of a model.
MARKS: Final = (*_OPENINGS, _HERMES_END, _MISTRAL_ID, _MISTRAL_ARGS, *_THOUGHTS.values())
_SPACE = " \t\r\n"
_SEPARATORS = _SPACE + ",;"
#: Keys under which models put the arguments, and other keys that a call may have.
_ARGUMENTS = ("arguments", "parameters")
_BESIDE = ("id", "type", "index", "tool_call_id")
#: Keys under which models put the name.
_NAMES = ("name", "function", "tool_name")
#: Longer than any call id that Mistral's models write.
_ID_CHARACTERS = 64


class ObjectReader:
    """Parses one JSON object that may be a call; the name is known before the object is complete.

    With `name` given, the object is the arguments themselves. `strict`: an object with anything but
    a name and arguments is refused, even at its end.
    """

    def __init__(
        self, names: Collection[str], name: str | None = None, *, strict: bool = False
    ) -> None:
        self._names = names
        self._bare_arguments = name is not None
        self._strict = strict
        self.name = name
        #: All text taken so far.
        self.raw = ""
        self.complete = False
        self.refused = False
        self._arguments = ""  # known but not yet handed out
        self._had_arguments = False
        self._arguments_over = False
        self._key: str | None = None  # None: a key is expected
        self._from: int | None = None  # where the current key or value begins in `raw`
        self._in_string = False
        self._escaped = False
        self._depth = 0

    def feed(self, text: str) -> str:
        """Take text until the object is complete or refused; returns the rest."""
        for position, character in enumerate(text):
            self.raw += character
            if self._is_streamed(character):
                self._had_arguments = True
                self._arguments += character
            self._take(character)
            if self.complete or self.refused:
                return text[position + 1 :]
        return ""

    def new_arguments(self) -> str:
        """Text of the arguments since the last call; empty until the name is known."""
        if self.name is None:
            return ""
        new, self._arguments = self._arguments, ""
        return new

    def _is_streamed(self, character: str) -> bool:
        if self._bare_arguments:
            return True
        if self._key not in _ARGUMENTS or self._arguments_over:
            return False
        if self._in_string and self._depth == 1:
            return False
        return self._depth >= 2 or (character in "{[" and self._from is None)

    def _take(self, character: str) -> None:
        if self._in_string:
            if self._escaped:
                self._escaped = False
            elif character == "\\":
                self._escaped = True
            elif character == '"':
                self._in_string = False
            return
        if self._from is None and character not in _SPACE + ":,}]" and self._depth:
            self._from = len(self.raw) - 1
        if character == '"':
            self._in_string = True
        elif character in "{[":
            self._depth += 1
        elif character in "}]":
            self._depth -= 1
            if self._depth == 0:
                self._close()
        elif self._depth == 1 and not self._bare_arguments:
            if character == ":" and self._key is None:
                self._key_ends()
            elif character == ",":
                self._value_ends()

    def _cut(self) -> str:
        """The key or value that ended before the character just taken."""
        cut = "" if self._from is None else self.raw[self._from : -1].strip(_SPACE)
        self._from = None
        return cut

    def _key_ends(self) -> None:
        key = _string(self._cut())
        if key in (*_NAMES, *_ARGUMENTS, *_BESIDE):
            self._key = key
        else:
            self._refuse()

    def _value_ends(self) -> None:
        key, value = self._key, self._cut()
        self._key = None
        if key in _NAMES:
            name = _string(value)
            if name not in self._names or (self._strict and self.name is not None):
                self._refuse()
            elif self.name is None:
                self.name = name
        elif key in _ARGUMENTS:
            if self._strict and (self._arguments_over or not _may_be_arguments(value)):
                self._refuse()
            elif not self._had_arguments:
                # Null, or a string containing the JSON; an object was streamed.
                self._had_arguments = True
                self._arguments += _string(value) or "{}"
            self._arguments_over = True
        elif key is None or (self._strict and key == "type" and _string(value) != "function"):
            self._refuse()

    def _close(self) -> None:
        if not self._bare_arguments:
            self._value_ends()
            if self.name is None or (self._strict and not self._had_arguments):
                self._refuse()
            elif not self._had_arguments:
                self._arguments += "{}"
        self.complete = not self.refused

    def _refuse(self) -> None:
        # Once the name was reported, the rest of the object belongs to that call.
        self.refused = self.refused or self._strict or self.name is None


def _may_be_arguments(value: str) -> bool:
    """Whether it is an object, a string containing one, or null."""
    try:
        found = json.loads(_string(value) or value)
    except (ValueError, RecursionError):
        return False
    return found is None or isinstance(found, dict)


def _string(text: str) -> str | None:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, str) else None


class _State(Enum):
    START = auto()  # only white space so far
    TEXT = auto()
    THOUGHT = auto()
    CALLS = auto()  # in a region of calls: a call, a separator, or the end
    NAME = auto()  # Mistral's newer form: the name comes before the object
    READING = auto()  # inside the object of a call


class ToolCallParser:
    """Splits the text of one answer into text and calls of `names`.

    `forced`: the answer must be a call or a list of calls. `shows_special`: markers are text even
    if they are special tokens. `said`: the part of the answer that the request already contains.
    """

    def __init__(
        self,
        names: Collection[str],
        *,
        parallel: bool = True,
        forced: bool = False,
        shows_special: bool = False,
        said: str = "",
    ) -> None:
        self._names = frozenset(names)
        self._parallel = parallel
        self._forced = forced
        self._shows_special = shows_special
        #: Markers that are never part of the text.
        self._hidden: tuple[str, ...] = ()
        self._state = _State.START
        self._closing = ""  # end marker of the current reasoning
        self._pending = ""  # not yet decided
        self._region = ""  # text since the region of calls began, while it has no call
        self._marker = ""  # marker with which the region began
        self._in_list = False
        self._unsure: list[Piece] = []  # calls of a list that may still turn out to be text
        self._reader: ObjectReader | None = None
        self._told = False  # whether the current call was reported
        self._trim = False  # whether to drop white space after a call
        #: Calls found so far.
        self.calls = 0
        #: Whether the answer ended inside a call.
        self.cut = False
        for opening, closing in _THOUGHTS.items():
            if said.rfind(opening) > said.rfind(closing):
                self._state, self._closing = _State.THOUGHT, closing

    def begin(self, *, special: Collection[str], tail: str) -> None:
        """To be called before the first text: `special` are the markers that are special tokens of
        the model, `tail` is the end of its prompt. Without this call there are none, and no
        reasoning is open."""
        if not self._shows_special:
            self._hidden = tuple(mark for mark in MARKS if mark in special)
        tail = tail.rstrip(_SPACE)
        for opening, closing in _THOUGHTS.items():
            if tail.endswith(opening):
                self._state, self._closing = _State.THOUGHT, closing

    @property
    def complete_calls(self) -> int:
        """Calls of which nothing more will come."""
        return self.calls - (self._reader is not None and self._told)

    @property
    def in_calls(self) -> bool:
        """Whether what follows is looked at as calls."""
        return self._state in (_State.CALLS, _State.NAME, _State.READING)

    @property
    def between_calls(self) -> bool:
        """Whether the last call is over and the next has not begun."""
        return self._state is _State.CALLS

    @property
    def pending(self) -> str:
        """What was taken and is not decided yet."""
        return self._pending

    @property
    def satisfied(self) -> bool:
        """Whether the only call allowed is complete, so that the rest of the answer
        is not needed."""
        return not self._parallel and self.calls > 0 and self._reader is None

    def feed(self, text: str) -> list[Piece]:
        """Take text; returns the pieces that are now certain."""
        self._pending += text
        pieces: list[Piece] = []
        while self._pending and not self.satisfied and self._step(pieces):
            pass
        return _merged(pieces)

    def finish(self) -> list[Piece]:
        """The answer is over: text held back is returned, unless it belongs to a call."""
        rest = self._pending
        if self._reader is not None:
            self.cut = self._told
            rest = "" if self._told else self._region + self._reader.raw
        elif self._state in (_State.CALLS, _State.NAME):
            rest = self._region + rest if self._region else rest.strip(_SEPARATORS + "]")
        elif self._trim:
            rest = rest.lstrip(_SPACE)
        done = self.satisfied
        self._pending, self._region, self._reader = "", "", None
        self._forget_unsure()
        return [] if done else _merged([self._shown(rest)])

    def _step(self, pieces: list[Piece]) -> bool:
        """Decide about the beginning of the pending text; False if more text is needed."""
        match self._state:
            case _State.START:
                return self._start()
            case _State.TEXT:
                return self._text(pieces)
            case _State.THOUGHT:
                return self._thought(pieces)
            case _State.CALLS:
                return self._between(pieces)
            case _State.NAME:
                return self._name(pieces)
            case _State.READING:
                return self._read(pieces)

    def _shown(self, text: str) -> Text:
        for mark in self._hidden:
            text = text.replace(mark, "")
        return Text(text)

    def _start(self) -> bool:
        head = self._pending.lstrip(_SPACE)
        if not head:
            return False
        if head[0] == "{" or (head[0] == "[" and head[1:].lstrip(_SPACE).startswith("{")):
            self._enter("")
        elif head[0] == "[" and not head[1:].strip(_SPACE):
            return False
        else:
            self._state = _State.TEXT
        return True

    def _text(self, pieces: list[Piece]) -> bool:
        if self._trim:
            self._pending = self._pending.lstrip(_SPACE)
            self._trim = not self._pending
        found = [at for at in (self._pending.find(mark) for mark in _OPENINGS) if at >= 0]
        sure = min(found) if found else self._certain(_OPENINGS)
        kept = self._pending[:sure].rstrip(_SPACE)
        if not found:
            pieces.append(self._shown(kept))
            self._pending = self._pending[len(kept) :]
            return False
        marker = next(m for m in _OPENINGS if self._pending.startswith(m, sure))
        end = sure + len(marker)
        if marker in _THOUGHTS:
            pieces.append(self._shown(self._pending[:end]))
            self._state, self._closing = _State.THOUGHT, _THOUGHTS[marker]
        else:
            pieces.append(self._shown(kept))
            # White space before a marker is text if the marker turns out not to begin a call.
            self._enter(self._pending[len(kept) : end])
            self._marker = marker
        self._pending = self._pending[end:]
        return True

    def _thought(self, pieces: list[Piece]) -> bool:
        at = self._pending.find(self._closing)
        end = at + len(self._closing) if at >= 0 else self._certain((self._closing,))
        pieces.append(self._shown(self._pending[:end]))
        self._pending = self._pending[end:]
        if at >= 0:
            self._state = _State.START
        return at >= 0

    def _certain(self, marks: Collection[str]) -> int:
        """How much of the pending text cannot belong to one of the markers, or to a hidden one."""
        return len(self._pending) - _held_back(self._pending, (*marks, *self._hidden))

    def _enter(self, taken: str) -> None:
        self._state = _State.CALLS
        self._region, self._marker, self._in_list = taken, "", False

    def _leave(self, pieces: list[Piece]) -> bool:
        self._forget_unsure()
        pieces.append(self._shown(self._region))
        self._trim = not self._region
        self._region = ""
        self._state = _State.TEXT
        return True

    def _forget_unsure(self) -> None:
        self.calls -= sum(isinstance(piece, CallStart) for piece in self._unsure)
        self._unsure = []

    def _swallow(self, count: int) -> bool:
        if self._region or not self.calls:
            self._region += self._pending[:count]
        self._pending = self._pending[count:]
        return True

    @property
    def _strict(self) -> bool:
        """Whether only a pure call counts as one, since neither a marker nor the
        request announces it."""
        return not (self._marker or self._forced)

    def _between(self, pieces: list[Piece]) -> bool:
        head = self._pending.lstrip(_SEPARATORS)
        before = len(self._pending) - len(head)
        if not head:
            return False
        for tag in (_HERMES_END, _MISTRAL):
            if tag.startswith(head[: len(tag)]) and (tag != _HERMES_END or self._marker == _HERMES):
                if len(head) < len(tag) and head != "[":
                    return False
                if len(head) >= len(tag):
                    self._swallow(before + len(tag))
                    if tag == _HERMES_END:
                        return self._leave(pieces)
                    self._marker = _MISTRAL
                    return True
        if head[0] == "{":
            self._swallow(before)
            self._reader, self._told = ObjectReader(self._names, strict=self._strict), False
            self._state = _State.READING
            return True
        if head[0] == "[" and not self._in_list and self._marker != _HERMES:
            if head == "[":
                return False
            self._in_list = True
            return self._swallow(before + 1)
        if head[0] == "]" and self._in_list:
            self._swallow(before + 1)
            if self._unsure:
                pieces += self._unsure
                self._unsure, self._region = [], ""
            return self._leave(pieces)
        if self._marker == _MISTRAL and not self._in_list:
            self._swallow(before)
            self._state = _State.NAME
            return True
        return self._leave(pieces)

    def _name(self, pieces: list[Piece]) -> bool:
        name, brace, _ = self._pending.partition("{")
        if not brace:
            longest = max(map(len, self._names), default=0) + _ID_CHARACTERS + 2 * len(_SPACE)
            longest += len(_MISTRAL_ID) + len(_MISTRAL_ARGS)
            return len(name) > longest and self._leave(pieces)
        called = name.strip(_SPACE).removesuffix(_MISTRAL_ARGS).partition(_MISTRAL_ID)[0]
        called = called.strip(_SPACE)
        if called not in self._names:
            return self._leave(pieces)
        self._swallow(len(name))
        self._reader, self._told = ObjectReader(self._names, called), False
        self._state = _State.READING
        return True

    def _read(self, pieces: list[Piece]) -> bool:
        reader = self._reader
        assert reader is not None
        self._pending = reader.feed(self._pending)
        if reader.refused:
            self._region += reader.raw
            self._reader = None
            return self._leave(pieces)
        if self._strict and not reader.complete:
            return False
        # Either all entries of a list are calls, or none is.
        is_unsure = self._strict and self._in_list and self._parallel
        out = self._unsure if is_unsure else pieces
        if reader.name is not None and not self._told:
            self._told = True
            self._region = self._region + reader.raw if is_unsure else ""
            out.append(CallStart(self.calls, reader.name))
            self.calls += 1
        out.append(Arguments(self.calls - 1, reader.new_arguments()))
        if not reader.complete:
            return False
        self._reader = None
        self._state = _State.CALLS
        return True


def _held_back(text: str, marks: Collection[str]) -> int:
    """How many characters at the end could be the beginning of a marker."""
    for count in range(min(max(map(len, marks)) - 1, len(text)), 0, -1):
        if any(mark.startswith(text[-count:]) for mark in marks):
            return count
    return 0


def _merged(pieces: list[Piece]) -> list[Piece]:
    """Merge adjacent pieces of the same kind, dropping empty ones."""
    merged: list[Piece] = []
    for piece in pieces:
        last = merged[-1] if merged else None
        if isinstance(piece, Text | Arguments) and not piece.text:
            continue
        if isinstance(piece, Text) and isinstance(last, Text):
            merged[-1] = Text(last.text + piece.text)
        elif (
            isinstance(piece, Arguments)
            and isinstance(last, Arguments)
            and (last.index == piece.index)
        ):
            merged[-1] = Arguments(last.index, last.text + piece.text)
        else:
            merged.append(piece)
    return merged
