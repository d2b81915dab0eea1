"""The broker's answer to each wrong message of wrong.json, without sockets."""

from __future__ import annotations

import json

import pytest

from broker.core.events import MessageReceived, Side
from broker.protocol.header import MessageType
from broker.protocol.messages import EndEvent, FailEvent
from tests.core.broker_facts import Bus, Message
from tests.protocol.make_golden import GOLDEN
from tests.protocol.wrong_base import ANSWERS, CANCELLED, FAILS, FOR_GOOD, REFUSES, Wrong
from tests.protocol.wrong_messages import to_broker

KNOWN = json.loads(GOLDEN.read_text())
ROUTING_ID = bytes(range(1, 17))


def answers(wrong: Wrong) -> tuple[list[Message], bool]:
    """The answers to the message itself, and whether its sender still has a session afterwards."""
    bus = Bus()
    side = Side.BACK if "hello_worker" in "".join(wrong.after) else Side.FRONT
    before = [tuple(map(bytes.fromhex, KNOWN[name])) for name in wrong.after]
    for frames in (*before, wrong.frames):
        bus.mail.clear()
        bus.handle(MessageReceived(side, ROUTING_ID, frames))
    return bus.mail.get((side, ROUTING_ID), []), bus.core.session(side, ROUTING_ID) is not None


@pytest.mark.parametrize("wrong", to_broker(), ids=lambda wrong: wrong.name)
def test_a_wrong_message_is_answered_as_the_page_says(wrong: Wrong) -> None:
    messages, open_ = answers(wrong)
    assert open_ == (wrong.does not in (REFUSES, FOR_GOOD))
    if wrong.does in (REFUSES, FOR_GOOD):
        (refused,) = messages
        assert refused.type is MessageType.REFUSE
        assert (refused.body.error.code, refused.body.fatal) == (
            wrong.code,
            # A broken HELLO may be refused for good even if it need not be.
            wrong.does == FOR_GOOD or (refused.body.fatal and not wrong.after),
        )
        return
    if wrong.does in (FAILS, CANCELLED):
        (message,) = messages
        (event,) = message.events
        assert event.request_id == wrong.frames[0][8:24]
        if wrong.does == FAILS:
            assert isinstance(event, FailEvent) and event.error.code == wrong.code
        else:
            assert isinstance(event, EndEvent) and event.finish_reason.value == "cancelled"
    elif wrong.does == ANSWERS:
        (message,) = messages
        assert message.plain["error"]["code"] == wrong.code
    else:
        assert messages == []
