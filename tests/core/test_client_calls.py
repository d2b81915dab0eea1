"""Requests built by another API: checked once, then sent unchanged."""

from __future__ import annotations

import pytest

from broker.protocol.messages import Attachment, Kind, Message, Params, Request
from client import InvalidRequest, Retry, Timeout, calls

DEFAULTS = calls.Defaults(Timeout(total=9), Retry(attempts=1))
HELLO = Request(model="m", messages=[Message(role="user", content="hi")], window=1)


def asked(**fields: object) -> Request:
    return Request(**{"model": "m", "prompt": "x", "kind": Kind.COMPLETE, "window": 1, **fields})


def nested(levels: int) -> dict[str, object]:
    value: dict[str, object] = {}
    for _ in range(levels):
        value = {"a": value}
    return value


@pytest.mark.parametrize(
    ("request_", "told"),
    [
        (asked(params=Params(temperature=-1.0)), "temperature: Expected `float` >= 0.0"),
        (asked(params=Params(stop=["x"] * 99)), "stop: Expected `array` of length <="),
        (asked(priority=101), "priority: Expected `int` <= 100"),
        (asked(user="u" * 300), "user: Expected `str` of length <="),
        (asked(template_args=nested(99)), "template_args is nested deeper"),
        (Request(model="m", messages=[Message(role="usr")], window=1), "did you mean 'user'?"),
    ],
)
def test_values_beyond_the_wires_limits_are_refused_before_sending(
    request_: Request, told: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        calls.checked(request_)
    assert told in str(caught.value)


def test_a_request_within_all_limits_is_unchanged() -> None:
    assert calls.checked(HELLO) == HELLO
    image = asked(prompt="<image>", attachments=[Attachment(media_type="image/png")])
    assert calls.checked(image) == image


def test_a_ready_request_is_sent_as_it_is() -> None:
    call = calls.ready(DEFAULTS, HELLO, [b"png"], None, None)
    assert call.request is HELLO and call.attachments == (b"png",)
    assert (call.timeout, call.retry) == (DEFAULTS.timeout, DEFAULTS.retry)
    other = Retry(attempts=7)
    call = calls.ready(DEFAULTS, HELLO, (), 3, other)
    assert (call.timeout, call.retry) == (Timeout(total=3), other)


def test_a_requests_own_limits_take_precedence() -> None:
    given = Timeout(queue=60, total=60)
    call = calls.ready(DEFAULTS, asked(queue_ms=1500, ttl_ms=2500), (), given, None)
    assert call.timeout == Timeout(queue=1.5, total=2.5)
    # 0 is a limit too: do not wait at all.
    assert calls.ready(DEFAULTS, asked(queue_ms=0), (), None, None).timeout.queue == 0.001
