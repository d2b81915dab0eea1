"""What a worker answers: the events of OUTPUT, and the ledger for the broker (SPEC.md section 4.3).

Arrays, since there is one for each token; a field with a default may be appended.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Any, Final

from broker.protocol.errors import ErrorInfo
from broker.protocol.structs import ArrayStruct, Count, Id, MapStruct, TokenId


class FinishReason(StrEnum):
    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"


class PieceKind(StrEnum):
    """What a piece of an answer's text is."""

    #: The answer itself. The only kind in an answer that is not split.
    CONTENT = "content"
    #: What the model thought before or between parts of the answer.
    REASONING = "reasoning"
    #: A call of a tool begins: its name, whole. Who asks for it gets `ARGUMENTS` as well.
    CALL = "call"
    #: More of the JSON text of the arguments of the call that began last.
    ARGUMENTS = "arguments"


TEXT_IDS: Final = 1 << 30
"""Token ids from here on are no tokens of a model: they carry the text itself, of a worker that
knows no tokens."""


class TopLogprob(ArrayStruct, frozen=True):
    token_id: TokenId
    logprob: float
    token: bytes


class TokenLogprob(ArrayStruct, frozen=True):
    """Log probabilities at one token: natural logarithms of the distribution after penalties,
    before temperature."""

    logprob: float | None
    #: The token's own bytes (possibly only part of a character).
    token: bytes
    top: list[TopLogprob] = []
    #: Offset of the token in the text (of PROMPT, or of the answer), in characters; a token that is
    #: part of a character has that character's offset. If the answer is split into pieces, the
    #: offset in the text as the model wrote it, markers included. None if the worker did not send
    #: it.
    place: Count | None = None


class Piece(ArrayStruct, frozen=True, gc=False):
    """A run of text of one kind. Never empty."""

    #: A `PieceKind`, or a kind of a later version.
    kind: str
    text: str


class Usage(MapStruct, frozen=True, kw_only=True):
    prompt_tokens: Count = 0
    completion_tokens: Count = 0
    #: Of the completion, if the answer is split: tokens of the reasoning, its markers included.
    reasoning_tokens: Count = 0
    #: Prompt tokens taken from the prefix cache.
    cached_tokens: Count = 0
    image_tokens: Count = 0


class Timings(MapStruct, frozen=True, kw_only=True):
    """Measured at the worker, milliseconds."""

    queue_ms: float = 0.0
    prefill_ms: float = 0.0
    decode_ms: float = 0.0


#: gc=False: never part of a cycle, so the garbage collector need not track each token.
class TokensEvent(ArrayStruct, frozen=True, tag=0, gc=False):
    """New tokens, starting at token `offset`. `text` is the text that they completed; if the answer
    is split (`Params.pieces`), only its content."""

    request_id: Id
    epoch: Count
    offset: Count
    token_ids: list[TokenId]
    text: str
    #: One for each token, or empty.
    logprobs: list[TokenLogprob] | None = None
    #: All text of this event by kind, in order. None: all of it is content.
    pieces: list[Piece] | None = None


class EndEvent(ArrayStruct, frozen=True, tag=1):
    """The request ended; `offset` is the number of tokens of the whole answer."""

    request_id: Id
    epoch: Count
    offset: Count
    finish_reason: FinishReason
    #: The rest of the text, which was held back until now.
    text: str
    usage: Usage
    timings: Timings
    #: The answer to every kind but chat and complete.
    result: dict[str, Any] | None = None
    #: The stop string or token id that ended the answer.
    stopped_by: str | int | None = None
    #: As in TOKENS.
    pieces: list[Piece] | None = None


class FailEvent(ArrayStruct, frozen=True, tag=2):
    """The request failed after `offset` tokens."""

    request_id: Id
    epoch: Count
    offset: Count
    error: ErrorInfo


class PromptEvent(ArrayStruct, frozen=True, tag=3):
    """Facts about the prompt, sent once before the first token if requested by `echo`,
    `prompt_logprobs`, `keep_special` or `prompt_usage`. The first two bring token ids."""

    request_id: Id
    epoch: Count
    #: Always 0.
    offset: Count
    token_ids: list[TokenId]
    #: The prompt's text, if `echo` was requested.
    text: str
    logprobs: list[TokenLogprob] | None = None
    #: Those of `keep_special` that the model has as special tokens.
    special: list[str] = []
    #: With `keep_special`: the text of the prompt's last few tokens.
    tail: str = ""
    #: Number of tokens of the prompt; None from workers that do not know this field.
    usage: Usage | None = None


OutputEvent = TokensEvent | EndEvent | FailEvent | PromptEvent


class Finished(ArrayStruct, frozen=True):
    """A request that left its slot."""

    request_id: Id
    #: A finish reason or an error code.
    outcome: str
    prompt_tokens: Count = 0
    completion_tokens: Count = 0


class Ledger(ArrayStruct, frozen=True):
    """Last frame of an OUTPUT with the LEDGER flag; read and removed by the broker."""

    granted: Count
    finished: list[Finished] = []
    #: Requests whose first token is in this message.
    started: list[Id] = []
