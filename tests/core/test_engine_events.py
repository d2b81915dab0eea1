"""Engine events as arrays: one set of tags and one decoder."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from broker.protocol import messages
from broker.protocol.errors import ErrorInfo
from broker.protocol.messages import FinishReason, Usage
from worker.engines.base import Ended, EngineEvent, Failed, PromptFacts, Tokens
from worker.engines.events import END, FAIL, PROMPT, TOKENS, decode, failed

JOB = bytes([1]) * 16
EVENTS: list[EngineEvent] = [
    Tokens(JOB, [1, 2], "ab"),
    Ended(JOB, FinishReason.STOP, "c", Usage(prompt_tokens=3, completion_tokens=2)),
    Failed(JOB, ErrorInfo(code="out_of_memory", message="no")),
    PromptFacts(JOB, [7], "p"),
]


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: type(event).__name__)
def test_an_event_is_unchanged_after_the_pipe(event: EngineEvent) -> None:
    assert decode(msgspec.msgpack.decode(msgspec.msgpack.encode(event))) == event


def test_the_tags_are_those_of_output_events() -> None:
    """Streams pass the fields on with the same tag."""
    tags = {
        TOKENS: messages.TokensEvent,
        END: messages.EndEvent,
        FAIL: messages.FailEvent,
        PROMPT: messages.PromptEvent,
    }
    assert {tag: kind.__struct_config__.tag for tag, kind in tags.items()} == {
        tag: tag for tag in range(4)
    }


def test_a_failure_made_by_the_link_has_the_form_of_an_engines() -> None:
    error = ErrorInfo(code="overloaded", message="later", retryable=True)
    assert decode(failed(JOB, error)) == Failed(JOB, error)


@pytest.mark.parametrize("event", [[9, JOB], [TOKENS, JOB, "no ids", "", None], [], [END, JOB]])
def test_a_malformed_event_is_refused(event: list[Any]) -> None:
    with pytest.raises(msgspec.ValidationError):
        decode(event)
