"""What one wrong message is, and how to write one: the words of `wrong_messages`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, Literal

import msgpack

from broker.protocol import header
from broker.protocol.header import MessageType as T

SESSION: Final = bytes(range(0x10, 0x20))
REQUEST: Final = bytes(range(0x20, 0x30))
ROUTE: Final = bytes(range(0x30, 0x40))
STRANGE: Final = bytes(range(0x50, 0x60))
"""An id that the receiver has never seen."""

REFUSES: Final = "refuses"
FOR_GOOD: Final = "refuses for good"
FAILS: Final = "fails the request"
ANSWERS: Final = "answers with an error"
CANCELLED: Final = "ends it as cancelled"
ENDS: Final = "ends the session"
RESUMES: Final = "resumes"
DROPS: Final = "drops it"
TAKES: Final = "takes it"

MEANING: Final = {
    REFUSES: "REFUSE with `code`; the session, if there was one, is over",
    FOR_GOOD: "REFUSE with `code` and `fatal` true",
    FAILS: "FAIL with `code` (a worker may REJECT with it); the session goes on",
    ANSWERS: "ANSWER with `error` of `code`; the session goes on",
    CANCELLED: "END `cancelled` with offset 0; the session goes on",
    ENDS: "the connection is closed, GOODBYE `protocol_error` before or not; HELLO on a new one",
    RESUMES: "RESUME of the request, on this session or a new one",
    DROPS: "nothing is shown or answered (a client may send `bus.report`); the session goes on",
    TAKES: "as if it were a plain message of its type; the session goes on",
}
_CODES: Final = {REFUSES: "protocol_error", FOR_GOOD: "protocol_error", FAILS: "invalid_request"}


@dataclass(frozen=True, slots=True)
class Wrong:
    """One message, and what its receiver does."""

    name: str
    shows: str
    does: str
    #: The rule of SPEC.md, by number.
    rule: str
    frames: tuple[bytes, ...]
    to: Literal["broker", "worker", "client"]
    after: tuple[str, ...]
    #: Error code of the answer; empty where there is none or any will do.
    code: str


NAMES: Final = {"role": "client", "name": "laptop"}
ASK: Final = {"model": "demo", "kind": "complete", "prompt": "Once", "window": 16}
ERROR: Final = {"code": "draining", "message": "later", "retryable": True}


class Row:
    """A line of the tables below."""

    def __init__(
        self,
        name: str,
        shows: str,
        does: str,
        rule: str,
        frames: tuple[bytes, ...],
        code: str | None = None,
    ) -> None:
        self._fields = name, shows, does, rule, frames
        self._code = _CODES.get(does, "") if code is None else code

    def to(self, receiver: Literal["broker", "worker", "client"], *after: str) -> Wrong:
        """The whole."""
        return Wrong(*self._fields, receiver, after, self._code)


def message(
    type_: T, body: Any, sequence: int, *more: bytes, id_: bytes = SESSION, flags: int = 0
) -> tuple[bytes, ...]:
    """A message; `body` as bytes stands as it is."""
    data = body if isinstance(body, bytes) else msgpack.packb(body)
    return (header.encode(type_, id_, sequence, flags), data, *more)


def hello(body: Any, sequence: int = 0) -> tuple[bytes, ...]:
    """HELLO."""
    return message(T.HELLO, body, sequence, id_=header.NO_ID)


def ask(body: Any, *more: bytes, type_: T = T.REQUEST, id_: bytes = REQUEST) -> tuple[bytes, ...]:
    """REQUEST or RESUME of a client whose session has just begun."""
    return message(type_, body, 1, *more, id_=id_)


def output(body: Any, id_: bytes = ROUTE) -> tuple[bytes, ...]:
    """OUTPUT, as the fourth message of a broker."""
    return message(T.OUTPUT, body, 3, id_=id_)


def tokens(offset: int, epoch: int = 0, ids: tuple[int, ...] = (666,)) -> list[Any]:
    """A TOKENS event that nobody may see."""
    return [0, REQUEST, epoch, offset, list(ids), "WRONG"]


def bent(frames: tuple[bytes, ...], at: int, value: int) -> tuple[bytes, ...]:
    """The same with one byte of its header changed."""
    head = bytearray(frames[0])
    head[at] = value
    return (bytes(head), *frames[1:])


def nested(levels: int) -> Any:
    """A map in a map in a map ..."""
    value: Any = {}
    for _ in range(levels):
        value = {"a": value}
    return value
