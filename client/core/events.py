"""The vocabulary of the client: events fed to the session, instructions that it returns, and the
events that a caller reads from a stream.

Only values: frozen, without behaviour. Events and instructions are structs rather than dataclasses:
a request makes a dozen of them, and a struct takes a tenth of the time.
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
    """The broker has the request; `position` others are ahead of it."""

    position: int


@dataclass(frozen=True, slots=True)
class Started:
    """A worker has the request. `resumed` counts how often the stream was continued so far."""

    worker: str
    model: str
    resumed: int
    #: Tokens that may wait unread; the worker coalesces further ones.
    window_tokens: int


@dataclass(frozen=True, slots=True)
class Recovering:
    """The stream was interrupted and is about to be resumed; nothing received is lost."""

    #: What happened, for people.
    reason: str
    #: The worker that was running it; empty if none was.
    worker: str


@dataclass(frozen=True, slots=True)
class End:
    """The answer is complete."""

    finish_reason: FinishReason
    #: The rest of the text, held back until now.
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
    #: Measured here, from the call; None if there was no token.
    first_token_s: float | None
    total_s: float
    #: As of `Tokens`: all of `text` by kind, where it is not all content.
    pieces: list[Piece] | None = None


#: Tokens and text; straight from the wire, see `broker.protocol.messages`.
Tokens = TokensEvent
#: Facts about the prompt, if `echo` or `prompt_logprobs` asked for them.
Prompt = PromptEvent

StreamEvent = Queued | Started | Recovering | Prompt | Tokens | ToolCall | End


@dataclass(frozen=True, slots=True)
class Answered:
    """The result of a query."""

    result: Any


#: What a sink receives; an exception is raised where the caller reads it.
Item = StreamEvent | Answered | BusError


# --- events fed to the session
# ----------------------------------------------------------------------------------------


class RequestMade(Struct, frozen=True):
    """The application made a request. An empty `request.model` means the only one served."""

    request_id: bytes
    request: Request
    attachments: tuple[bytes, ...]
    timeout: Timeout
    retry: Retry
    #: Tokens that may wait unread; None: the broker's default.
    window_tokens: int | None = None
    #: The part of the answer already received from another bus; the request then begins
    #: as a RESUME.
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
    """The application is no longer interested, and receives nothing more of the request."""

    request_id: bytes


class CloseRequested(Struct, frozen=True):
    """The application closes the client."""


class ConnectionOpened(Struct, frozen=True):
    """The socket is connected and its handshake done."""


class ConnectionLost(Struct, frozen=True):
    """The socket was refused or cut off; it will not come back."""

    reason: str
    #: The broker will never accept us like this: wrong key, no key, or a key where
    #: none is expected.
    unauthenticated: bool = False


class MessageReceived(Struct, frozen=True):
    """A message arrived, header first."""

    frames: tuple[bytes, ...]


class Tick(Struct, frozen=True):
    """Time has passed: `deadline_s` may be due."""


Event = (
    RequestMade
    | QueryMade
    | TokensTaken
    | RequestDropped
    | CloseRequested
    | ConnectionOpened
    | ConnectionLost
    | MessageReceived
    | Tick
)


# --- instructions
# ---------------------------------------------------------------------------------------


class OpenSocket(Struct, frozen=True):
    """Open a new socket with a new random routing id (SPEC.md section 2); there is none open.
    Answered by ConnectionOpened or ConnectionLost."""

    address: str


class CloseSocket(Struct, frozen=True):
    """Close the socket; ignore what it reports afterwards."""

    #: Whether what was sent must still leave, within a second.
    linger: bool = False


class Send(Struct, frozen=True):
    """Send on the open socket, in order, leaving nothing out."""

    frames: tuple[bytes, ...]


class Deliver(Struct, frozen=True):
    """Hand items to whoever waits for this request or query."""

    id: bytes
    items: tuple[Item, ...]
    #: Nothing follows for this request or query.
    final: bool = False


class Arrived(Struct, frozen=True):
    """Hand tokens of many requests, in order of arrival, to whoever waits for them."""

    tokens: list[TokensEvent]


class Stop(Struct, frozen=True):
    """The session is closed for good; the transport ends."""


Instruction = OpenSocket | CloseSocket | Send | Deliver | Arrived | Stop
