"""Why a request failed, in words for operators. What a caller wrote must never be in them.

An error's message is for its caller and may quote the request. Here it is cut, what it quotes is
left out, and a message about a wrong request is not told at all: its code is enough.
"""

from __future__ import annotations

import re
from typing import Final

from broker.protocol import codec, limits
from broker.protocol.errors import ErrorCode, ErrorInfo, ProtocolError
from broker.protocol.messages import FailEvent, Finished, FinishReason

MAX_CHARACTERS: Final = 200

_ENDS: Final = frozenset(reason.value for reason in FinishReason)
#: To the end where a quotation is not closed; an apostrophe inside a word opens none.
_QUOTED: Final = re.compile(r"(?<!\w)(['\"`]).*?(?:\1(?!\w)|$)", re.DOTALL)


def in_words(error: ErrorInfo) -> str:
    """The cause of a failure; empty where it is the caller's own matter."""
    if error.code == ErrorCode.INVALID_REQUEST:
        return ""
    return _QUOTED.sub("…", error.message)[:MAX_CHARACTERS]


def told_in(body: bytes, finished: list[Finished]) -> dict[bytes, str]:
    """The causes of those of `finished` that failed, by request; read from the OUTPUT's body."""
    failed = {entry.request_id for entry in finished if entry.outcome not in _ENDS}
    if not failed:
        return {}
    try:
        events = codec.decode_events(body, limits.MAX_OUTPUT_BYTES)
    except ProtocolError:
        return {}  # the client's matter: the broker forwards bodies unread
    return {
        event.request_id: in_words(event.error)
        for event in events
        if isinstance(event, FailEvent) and event.request_id in failed
    }
