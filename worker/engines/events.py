"""Engine events as they travel from the engine process to the link: arrays, tag first.

Only this module knows their tags; their fields are those of the classes in `worker.engines.base`,
in that order. The tags are also those of the events in OUTPUT (SPEC.md section 6.1), because
streams pass the fields on unread: every token takes this path. Code that reads an event decodes it.
"""

from __future__ import annotations

from typing import Any, Final

import msgspec

from broker.protocol.errors import ErrorInfo
from worker.engines.base import Ended, EngineEvent, Failed, PromptFacts, Tokens

__all__ = ["END", "FAIL", "PROMPT", "TOKENS", "decode", "failed"]


def _tag(event: type[EngineEvent]) -> int:
    tag = event.__struct_config__.tag
    assert isinstance(tag, int)
    return tag


TOKENS: Final = _tag(Tokens)
END: Final = _tag(Ended)
FAIL: Final = _tag(Failed)
PROMPT: Final = _tag(PromptFacts)


def decode(event: list[Any]) -> EngineEvent:
    """Decode an engine's event. Raises `msgspec.ValidationError` if it is malformed."""
    decoded: EngineEvent = msgspec.convert(event, EngineEvent)
    return decoded


def failed(job_id: bytes, error: ErrorInfo) -> list[Any]:
    """The failure of a job, as an engine would send it."""
    return [FAIL, job_id, msgspec.to_builtins(error), {}]
