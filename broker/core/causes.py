"""Why a request failed, as text for operators. It must never contain what a caller wrote.

An error's message is for its caller and may quote the request. Here it is shortened and quotations
are removed; for an invalid request there is no message at all, its code is enough.
"""

from __future__ import annotations

import re
from typing import Final

from broker.protocol import codec, limits
from broker.protocol.errors import ErrorCode, ErrorInfo, ProtocolError
from broker.protocol.messages import FailEvent, Finished, FinishReason

MAX_CHARACTERS: Final = 200

_ENDS: Final = frozenset(reason.value for reason in FinishReason)
#: An unclosed quotation extends to the end; an apostrophe inside a word does not open one.
_QUOTED: Final = re.compile(r"(?<!\w)(['\"`]).*?(?:\1(?!\w)|$)", re.DOTALL)


def in_words(error: ErrorInfo) -> str:
    """The cause of a failure; empty where it only concerns the caller."""
    if error.code == ErrorCode.INVALID_REQUEST:
        return ""
    return _QUOTED.sub("…", error.message)[:MAX_CHARACTERS]


def causes_in(body: bytes, finished: list[Finished]) -> dict[bytes, str]:
    """The causes, by request id, of those in `finished` that failed; read from the OUTPUT body."""
    failed = {entry.request_id for entry in finished if entry.outcome not in _ENDS}
    if not failed:
        return {}
    try:
        events = codec.decode_events(body, limits.MAX_OUTPUT_BYTES)
    except ProtocolError:
        return {}  # malformed: left to the client, the broker forwards bodies unread
    return {
        event.request_id: in_words(event.error)
        for event in events
        if isinstance(event, FailEvent) and event.request_id in failed
    }
