"""The events fed to the session, the instructions that it returns, and the events that a caller
reads from a stream.

Only values: frozen, without behaviour. Events and instructions are structs rather than dataclasses:
a request makes a dozen of them, and a struct is ten times as fast to make.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from msgspec import Struct

from broker.protocol.messages import (
    FinishReason,
    Piece,
    PromptEvent,
    Request,
    Resume,
    Timings,
    TokensEvent,
    Usage,
)
from client.core.tools import ToolCall
from client.errors import BusError
from client.options import Retry, Timeout

# --- what a caller reads from a stream ------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Queued:
    """The request is in the broker's queue, with `position` others ahead of it. Comes again, about
    once a second, when that or the expected start has changed."""

    position: int
    #: When it should start, seconds from now, as measured speed says; None: not known.
    starts_in_s: float | None = None
    #: What it waits for, in words, such as a worker that is being started; empty: a free slot.
    why: str = ""
    #: How far its model is that is being loaded for it, 0 to 1; None: none is, or it is not known.
    progress: float | None = None

    @property
    def reason(self) -> str:
        """What it waits for, in words: `why`, or that its model is being loaded."""
        if self.why or self.progress is None:
            return self.why
        return f"loading {self.progress:.0%}".replace("%", " %")


@dataclass(frozen=True, slots=True)
class Started:
    """A worker runs the request. `resumed` counts how often the stream has been resumed so far."""

    worker: str
    model: str
    resumed: int
    #: Tokens that may wait unread; the worker holds back further ones.
    window_tokens: int
    #: How the worker goes on with what was received: empty, exactly; `ids`, after the same tokens,
    #: where the rest is another draw unless it is greedy; `text`, after the same text, and the rest
    #: may not be what the interrupted run would have written.
    continued: str = ""


@dataclass(frozen=True, slots=True)
class Recovering:
    """The stream was interrupted and is about to be resumed; nothing received is lost."""

    #: What happened, in words.
    reason: str
    #: The worker that was running it; empty if none was.
    worker: str


@dataclass(frozen=True, slots=True)
class End:
    """The answer is complete."""

    finish_reason: FinishReason
    #: The rest of the text, which was held back until now.
    text: str
    usage: Usage
    #: Measured at the worker.
    timings: Timings
    #: The result of embed, count, tokenize, detokenize and template.
    result: dict[str, Any] | None
    #: The stop string or token id that ended it.
    stopped_by: str | int | None
    model: str
    worker: str
    resumed: int
    #: Measured by the client, from the call; None if there was no token.
    first_token_s: float | None
    total_s: float
    #: As in `Tokens`: `text` split by kind; None if it is all content.
    pieces: list[Piece] | None = None
    #: The least exact way in which it was continued, as of `Started`; empty: always exactly.
    continued: str = ""


#: Tokens and text; straight from the wire, see `broker.protocol.messages`.
Tokens = TokensEvent
#: Token ids and logprobs of the prompt, if `echo` or `prompt_logprobs` asked for them.
Prompt = PromptEvent

StreamEvent = Queued | Started | Recovering | Prompt | Tokens | ToolCall | End


@dataclass(frozen=True, slots=True)
class Answered:
    """The result of a query."""

    result: Any


#: What a sink receives; an exception is raised where the caller reads it.
Item = StreamEvent | Answered | BusError


# --- events fed to the session --------------------------------------------------------------------


class RequestMade(Struct, frozen=True):
    """The application made a request. An empty `request.model` means the only one served."""

    request_id: bytes
    request: Request
    attachments: tuple[bytes, ...]
    timeout: Timeout
    retry: Retry
    #: Tokens that may wait unread; None: the broker's default.
    window_tokens: int | None = None
    #: The part of the answer already received through another bus; the request then begins as a
    #: RESUME.
    resume: Resume | None = None


class QueryMade(Struct, frozen=True):
    """The application made a query to the broker itself."""

    query_id: bytes
    verb: str
    args: dict[str, Any]
    timeout: Timeout


class TokensTaken(Struct, frozen=True):
    """The application has read all tokens below `offset`."""

    request_id: bytes
    offset: int


class RequestDropped(Struct, frozen=True):
    """The application no longer wants the answer, and receives nothing more of it."""

    request_id: bytes


class CloseRequested(Struct, frozen=True):
    """The application closes the client."""


class SocketOpened(Struct, frozen=True):
    """The socket is connected and its handshake done."""


class SocketLost(Struct, frozen=True):
    """The socket was refused or cut off; it will not come back."""

    reason: str
    #: The broker will never accept this client: wrong key, no key, or a key where none is
    #: expected.
    unauthenticated: bool = False


class MessageReceived(Struct, frozen=True):
    """A message arrived, header first."""

    frames: tuple[bytes, ...]


class Tick(Struct, frozen=True):
    """Time has passed; `deadline_s` may have been reached."""


Event = (
    RequestMade
    | QueryMade
    | TokensTaken
    | RequestDropped
    | CloseRequested
    | SocketOpened
    | SocketLost
    | MessageReceived
    | Tick
)


# --- instructions ---------------------------------------------------------------------------------


class OpenSocket(Struct, frozen=True):
    """Open a new socket with a new random routing id (SPEC.md section 2); none is open now.
    Answered by SocketOpened or SocketLost."""

    address: str


class CloseSocket(Struct, frozen=True):
    """Close the socket; ignore what it reports afterwards."""

    #: Whether to wait up to a second for queued messages to be sent.
    linger: bool = False


class Send(Struct, frozen=True):
    """Send on the open socket, in order and without loss."""

    frames: tuple[bytes, ...]


class Deliver(Struct, frozen=True):
    """Hand items to the caller that waits for this request or query."""

    id: bytes
    items: tuple[Item, ...]
    #: Nothing follows for this request or query.
    final: bool = False


class Arrived(Struct, frozen=True):
    """Hand tokens of many requests to their callers, in order of arrival."""

    tokens: list[TokensEvent]


class Stop(Struct, frozen=True):
    """The session is closed for good; the transport ends."""


Instruction = OpenSocket | CloseSocket | Send | Deliver | Arrived | Stop
