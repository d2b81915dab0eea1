"""Collects the bus's events into answers, before an API gives them its form: choices, ids, seeds,
vectors.

Shared by the gateway's endpoints. Must never import what only the extra `gateway` installs.
"""

from __future__ import annotations

import base64
import secrets
import sys
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Final, Literal

import msgspec

from broker.protocol import tool_parser as tools
from broker.protocol.messages import FinishReason, PieceKind, TokenLogprob, Usage
from client import Embeddings
from client.gateway.bodies import aside
from client.gateway.convert import Generation
from client.gateway.openai.generation import ChoiceEvent, Delta, Finish, Prompted
from client.gateway.openai.logprobs import Places, named_by_id

__all__ = [
    "IMPOSSIBLE",
    "ChatChoice",
    "ChatReason",
    "Progress",
    "TextChoice",
    "Thought",
    "ToolCallDraft",
    "best_of",
    "new_id",
    "packed",
    "parser_for",
    "pick_seed",
    "with_thoughts",
    "written_vectors",
]

#: Stands for minus infinity, as in OpenAI's API.
IMPOSSIBLE: Final = -9999.0

_JSON: Final = msgspec.json.encode
#: Size of one number of a vector as text; used to estimate how long writing takes.
_NUMBER_BYTES: Final = 20

ChatReason = Literal["stop", "length", "tool_calls"]


def new_id(prefix: str) -> str:
    """An id that cannot be guessed, since anyone who knows it may read the answer again."""
    return f"{prefix}{secrets.token_hex(16)}"


def pick_seed(given: int | None) -> int:
    """The caller's seed, or a random one that JSON can represent exactly."""
    return secrets.randbelow(1 << 53) if given is None else given


def packed(vector: array[float]) -> str:
    """A vector as base64 of little-endian 32-bit floats."""
    if sys.byteorder == "big":
        vector = array("f", vector)
        vector.byteswap()
    return base64.b64encode(vector.tobytes()).decode()


async def written_vectors(made: Embeddings, *, as_text: bool) -> list[bytes]:
    """Each vector as JSON: base64 if `as_text`, otherwise numbers. Large ones are written in
    another thread, one by one."""

    def write() -> list[bytes]:
        return [_JSON(packed(v) if as_text else v.tolist()) for v in made.vectors]

    return await aside(sum(map(len, made.vectors)) * _NUMBER_BYTES, write)


# --- chat -----------------------------------------------------------------------------------------


def parser_for(call: Generation) -> tools.ToolCallParser | None:
    """A parser if the answer may contain tool calls."""
    reading = call.reading
    if reading is None:
        return None
    return tools.ToolCallParser(
        reading.names,
        parallel=reading.parallel,
        forced=reading.forced,
        shows_special=reading.shows_special,
        said=reading.said,
    )


class Thought(msgspec.Struct, frozen=True, gc=False):
    """Reasoning of the model."""

    text: str


Part = tools.Piece | Thought
"""A part that an event adds to a chat's answer."""


def with_thoughts(call: Generation) -> Generation:
    """The same generation, with reasoning separate from the answer."""
    params = call.request.params
    pieces = [*params.pieces, PieceKind.REASONING.value]
    params = msgspec.structs.replace(params, pieces=pieces)
    return replace(call, request=msgspec.structs.replace(call.request, params=params))


class Progress:
    """Translates the events of one choice of a chat into the API's terms. Keeps no text."""

    def __init__(self, parser: tools.ToolCallParser | None) -> None:
        self._parser = parser
        #: The prompt's usage, if the worker sent it before the first token.
        self.prompt_usage: Usage | None = None
        #: The prompt's event, until the first text shows whether the reasoning is separate.
        self._begun: Prompted | None = None
        #: Calls that the worker has separated from text, and the reader of the last one's
        #: arguments. None: no worker has done so yet, so the text is searched for calls here.
        self._separated: int | None = None
        self._reader: tools.ObjectReader | None = None
        #: Tokens of the answer so far.
        self._tokens = 0
        self.usage: Usage | None = None
        self.finish_reason: FinishReason | None = None
        #: The stop string or token id that ended the answer.
        self.stopped_by: str | int | None = None
        #: How it went on after its worker was lost, as of `client.core.events.Started`.
        self.continued = ""

    def take(self, event: ChoiceEvent) -> list[Part]:
        """Account for an event; returns what is new."""
        parser = self._parser
        match event:
            case Delta():
                if parser is None and event.pieces is None:
                    # Every token of most chats.
                    self._tokens += event.tokens
                    return [tools.Text(event.text)]
                if not self._is_satisfied:
                    self._tokens += event.tokens
                    return self._read(event)
            case Prompted():
                self.prompt_usage = event.prompt.usage
                self._begun = event
            case Finish():
                self.usage, self.finish_reason = event.end.usage, event.end.finish_reason
                self.stopped_by, self.continued = event.end.stopped_by, event.end.continued
                if self.prompt_usage is not None and self._is_satisfied:
                    # Tokens generated after that do not belong to the answer.
                    self.usage = msgspec.structs.replace(
                        self.prompt_usage, completion_tokens=self._tokens
                    )
                if parser is not None and self._separated is None:
                    return [*parser.finish()]
        return []

    def _read(self, event: Delta) -> list[Part]:
        """The text of an event as calls, reasoning and content."""
        parser = self._parser
        if parser is not None and event.pieces is not None and self._separated is None:
            self._separated = 0
        if parser is not None and self._begun is not None and (event.text or event.pieces):
            # If reasoning is separate, the text has no reasoning that the prompt began.
            prompt, self._begun = self._begun.prompt, None
            tail = prompt.tail if event.pieces is None else ""
            parser.begin(special=prompt.special, tail=tail)
        parts: list[Part] = []
        for kind, text in (
            [(PieceKind.CONTENT.value, event.text)]
            if event.pieces is None
            else [(piece.kind, piece.text) for piece in event.pieces]
        ):
            if kind == PieceKind.REASONING:
                parts.append(Thought(text))
            elif kind == PieceKind.CONTENT:
                looks = parser is not None and self._separated is None
                parts += parser.feed(text) if parser and looks else [tools.Text(text)]
            elif self._separated is not None:
                parts += self._of_call(kind, text)
        return parts

    def _of_call(self, kind: str, text: str) -> list[Part]:
        """The parts that one piece of a call adds."""
        assert self._separated is not None
        if kind == PieceKind.CALL:
            self._separated += 1
            self._reader = tools.ObjectReader((), text)
            return [tools.CallStart(self._separated - 1, text)]
        if kind == PieceKind.ARGUMENTS and self._reader is not None:
            self._reader.feed(text)
            return [tools.Arguments(self._separated - 1, text)]
        return []

    @property
    def _is_satisfied(self) -> bool:
        return self._parser is not None and self._parser.satisfied

    @property
    def has_enough(self) -> bool:
        """Whether the answer is complete and its usage known, so that the rest is not needed."""
        return self._is_satisfied and self.prompt_usage is not None

    @property
    def is_cut(self) -> bool:
        """Whether the answer ended in the middle of a call."""
        if self._separated is not None:
            return self._reader is not None and not self._reader.complete
        return self._parser is not None and self._parser.cut

    @property
    def openai_finish_reason(self) -> ChatReason:
        """The finish reason in OpenAI's words."""
        if self.finish_reason is FinishReason.LENGTH and not self._is_satisfied:
            return "length"
        calls = self._separated
        if calls is None:
            calls = self._parser.calls if self._parser is not None else 0
        return "tool_calls" if calls and not self.is_cut else "stop"


@dataclass(slots=True)
class ToolCallDraft:
    """A tool call of an answer, as far as it has arrived."""

    id: str
    name: str
    arguments: str = ""


class ChatChoice(Progress):
    """One choice of a chat, as far as it has arrived, with its text."""

    def __init__(self, parser: tools.ToolCallParser | None) -> None:
        super().__init__(parser)
        self.texts: list[str] = []
        self.thoughts: list[str] = []
        self.calls: list[ToolCallDraft] = []
        self.logprobs: list[TokenLogprob] = []
        self.token_ids: list[int] = []

    def take(self, event: ChoiceEvent) -> list[Part]:
        """Account for an event; returns what is new."""
        if isinstance(event, Delta) and not self._is_satisfied:
            self.logprobs += event.logprobs or ()
            self.token_ids += event.token_ids
        pieces = super().take(event)
        for part in pieces:
            if isinstance(part, tools.Text):
                self.texts.append(part.text)
            elif isinstance(part, Thought):
                self.thoughts.append(part.text)
            elif isinstance(part, tools.CallStart):
                self.calls.append(ToolCallDraft(new_id("call_"), part.name))
            else:
                self.calls[part.index].arguments += part.text
        return pieces

    @property
    def text(self) -> str:
        """All text so far."""
        return "".join(self.texts)

    @property
    def reasoning(self) -> str:
        """All reasoning so far."""
        return "".join(self.thoughts)


# --- completions ----------------------------------------------------------------------------------


@dataclass(slots=True)
class TextChoice:
    """One choice of a completion, as far as it has arrived."""

    #: With `max_tokens: 0`, the one token that the bus generates is not part of the answer.
    prompt_only: bool = False
    #: Tokens of log probabilities are told by their ids.
    by_id: bool = False
    texts: list[str] = field(default_factory=list)
    prompt_token_ids: Sequence[int] = ()
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    #: The logprobs of its tokens, with their positions in the text.
    logprobs: list[TokenLogprob] = field(default_factory=list)
    _places: Places = field(default_factory=Places)
    usage: Usage = field(default_factory=Usage)
    finish_reason: Literal["stop", "length"] = "stop"
    #: As of `Progress`.
    continued: str = ""

    def take(self, event: ChoiceEvent) -> tuple[str, list[TokenLogprob]]:
        """Account for an event; returns the new text and logprobs."""
        text, logprobs = "", []
        match event:
            case Prompted():
                ids, prompt = event.prompt.token_ids, event.prompt
                text, logprobs = prompt.text, self._placed(ids, prompt.logprobs or [])
                self._places.begin(len(text))
            case Delta() if not self.prompt_only:
                text, logprobs = event.text, self._placed(event.token_ids, event.logprobs or [])
                self.token_ids += event.token_ids
            case Finish():
                self.usage, self.continued = event.end.usage, event.end.continued
                if self.prompt_only:
                    self.usage = Usage(prompt_tokens=event.end.usage.prompt_tokens)
                stopped = event.end.finish_reason is FinishReason.STOP
                self.finish_reason = "stop" if stopped else "length"
        self.texts.append(text)
        self.logprobs += logprobs
        return text, logprobs

    def _placed(self, ids: Sequence[int], logprobs: list[TokenLogprob]) -> list[TokenLogprob]:
        placed = self._places.of(logprobs)
        return named_by_id(ids, placed) if self.by_id and placed else placed

    @property
    def text(self) -> str:
        """All text so far."""
        return "".join(self.texts)

    @property
    def mean_logprob(self) -> float:
        """The mean logprob of the tokens, by which `best_of` chooses."""
        known = [token.logprob for token in self.logprobs if token.logprob is not None]
        return sum(known) / len(known) if known else IMPOSSIBLE


def best_of(choices: Sequence[TextChoice], candidates: int, wanted: int) -> list[TextChoice]:
    """The best `wanted` choices of each prompt; every prompt has `candidates` choices in a row."""
    kept: list[TextChoice] = []
    for first in range(0, len(choices), candidates):
        of_prompt = list(choices[first : first + candidates])
        if candidates > wanted:
            of_prompt.sort(key=lambda choice: -choice.mean_logprob)
        kept += of_prompt[:wanted]
    return kept
