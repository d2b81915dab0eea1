"""The causes of failures that an operator sees, which never contain a caller's text."""

from __future__ import annotations

import pytest

from broker.core import causes
from broker.protocol.errors import ErrorInfo
from broker.protocol.messages import FailEvent, Finished, Ledger
from tests.core.broker_facts import Bus


def test_a_failure_at_a_worker_is_listed_with_its_cause() -> None:
    bus = Bus()
    worker, client = bus.worker(), bus.client()
    client.request()
    (assign,) = worker.assigned()
    error = ErrorInfo(code="engine_error", message="the model failed: CUDA error 700")
    event = FailEvent(assign.id, 0, 3, error)
    ledger = Ledger(2, [Finished(assign.id, "engine_error", 3, 3)])
    worker.output(assign.assign.reply_to, event, ledger=ledger)
    [listed] = client.query("bus.requests")
    assert listed["outcome"] == "engine_error"
    assert listed["cause"] == "the model failed: CUDA error 700"


def test_a_failure_at_the_broker_is_listed_with_its_cause() -> None:
    bus = Bus()
    client = bus.client()
    bus.worker(grant=False)
    client.request(queue_ms=100)
    bus.wait(1)
    [listed] = client.query("bus.requests")
    assert listed["outcome"] == "deadline_exceeded" and listed["cause"]


def test_a_malformed_fail_has_no_cause_and_does_no_harm() -> None:
    assert causes.causes_in(b"\xc1", [Finished(b"x" * 16, "engine_error")]) == {}


@pytest.mark.parametrize(
    ("code", "message", "cause"),
    [
        ("invalid_request", "the pattern secret is none", ""),
        ("engine_error", "KeyError: 'secret' in \"more\" of `it`", "KeyError: … in … of …"),
        ("engine_error", "cannot read 'secret that was cut", "cannot read …"),
        ("worker_lost", "the worker's engine didn't answer", "the worker's engine didn't answer"),
        ("engine_error", "x" * 999, "x" * causes.MAX_CHARACTERS),
    ],
)
def test_text_from_a_caller_is_left_out(code: str, message: str, cause: str) -> None:
    assert causes.in_words(ErrorInfo(code=code, message=message)) == cause
