"""A step of the engine as it crosses to the link: tokens in the very octets that OUTPUT carries.

The engine process encodes each event of tokens once, as TOKENS of epoch 0 (SPEC.md section 4.3);
the link keeps and sends these octets unread, and changes their head where it must (`with_head`).
Everything else (ends, prompts, log probabilities) travels as plain arrays. Must never know a
session or a socket.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Final

import msgspec

from broker.protocol.errors import ErrorCode, ErrorInfo
from broker.protocol.limits import ID_OCTETS
from worker.engines.base import EngineEvent, Failed, PromptFacts, Tokens

TOKENS: Final = 0
PLAIN: Final = 1 << 62
"""In place of the offset behind its last token: the event is a plain array."""

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder().decode

_HEAD: Final = b"\x96\x00\xc4" + bytes((ID_OCTETS,))
"""An array of six, its tag, and what announces the request's id."""
_EPOCH_AT: Final = len(_HEAD) + ID_OCTETS
_OFFSET_AT: Final = _EPOCH_AT + 1
"""Epoch 0 is one octet."""


class StepEncoder:
    """The engine process's end: knows how many tokens each of its jobs has."""

    def __init__(self, cancel: Callable[[bytes], None]) -> None:
        self._cancel = cancel
        self._counts: dict[bytes, int] = {}

    def begin(self, job_id: bytes, count: int) -> None:
        """A job, and the tokens that its answer has already."""
        self._counts[job_id] = count

    def encode(self, events: Iterable[EngineEvent]) -> tuple[list[bytes], list[int], list[Any]]:
        """Of each event: its job, the offset behind its last token, its octets; or its job, `PLAIN`
        and itself. What the engine says of a job that it does not have is left out; a job whose
        tokens are none fails."""
        counts = self._counts
        jobs: list[bytes] = []
        ends: list[int] = []
        made: list[Any] = []
        for event in events:
            job_id = event.request_id
            offset = counts.get(job_id)
            if offset is None:
                continue
            end: int = PLAIN
            form: Any = event
            if type(event) is Tokens:
                ids, text = event.token_ids, event.text
                if type(text) is not str or type(ids) is not list:
                    form = self._refused(job_id, ids, text)
                elif ids:
                    behind = counts[job_id] = offset + len(ids)
                    if event.logprobs is None:
                        end, form = behind, _encode((TOKENS, job_id, 0, offset, ids, text))
            elif type(event) is not PromptFacts:
                del counts[job_id]
            jobs.append(job_id)
            ends.append(end)
            made.append(form)
        return jobs, ends, made

    def _refused(self, job_id: bytes, ids: object, text: object) -> Failed:
        """The job's failure; whatever else its engine says of it is left out."""
        del self._counts[job_id]
        self._cancel(job_id)
        message = (
            f"the engine gave tokens as {type(ids).__name__} and text as {type(text).__name__}, "
            "not as a list and a str: it is at fault"
        )
        return Failed(job_id, ErrorInfo(code=ErrorCode.ENGINE_ERROR.value, message=message))


def tokens(job_id: bytes, offset: int, token_ids: list[int], text: str) -> bytes:
    """The octets of one event, as `StepEncoder` makes them."""
    return _encode((TOKENS, job_id, 0, offset, token_ids, text))


def opened(octets: bytes) -> tuple[list[int], str]:
    """Token ids and text of an event."""
    _, _, _, _, token_ids, text = _decode(octets)
    return token_ids, text


def head(request_id: bytes, epoch: int) -> bytes:
    """What an event begins with, up to its offset."""
    return _HEAD + request_id + _encode(epoch)


def with_head(head_: bytes, octets: bytes) -> bytes:
    """The event, as that request's and in that epoch."""
    return head_ + octets[_OFFSET_AT:]
