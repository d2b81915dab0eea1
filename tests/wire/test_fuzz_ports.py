"""Hostile bytes at both ports of a broker process while honest streams go on.

The codec and the core are fuzzed in `tests/protocol` and `tests/core`; `bench.chaos` sends hundreds
of thousands of these messages.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from broker.protocol import header
from broker.protocol.header import NO_ID, MessageType
from broker.protocol.messages import new_id
from client import Client
from tests.harness import Bus, running_bus
from tests.support import strangers
from tests.support.processes import memory_bytes
from tests.support.zmtp import Connection, encode as zmtp_message
from tests.wire.many_streams import read_all

HOSTILE_MESSAGES = 1500
"""Messages to each port."""


@pytest.fixture(scope="module")
def busy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bus]:
    """A bus only for these tests, so that their strangers do not disturb others."""
    with running_bus(tmp_path_factory.mktemp("fuzzed"), workers=2) as bus:
        yield bus


def both_ports(bus: Bus) -> list[tuple[str, str]]:
    return [(bus.front, "client"), (bus.back, "worker")]


def unharmed(bus: Bus, client: Client) -> None:
    """Assert that the broker still serves, with nothing left of the strangers."""
    assert bus.broker.running
    assert "Traceback" not in bus.broker.log()
    assert client.generate("still here", model="echo").text == "still here"
    bus.wait_idle()


def test_streams_beside_hostile_messages_of_every_kind_go_on_unaltered(busy: Bus) -> None:
    client = busy.client()

    def pester() -> None:
        for address, role in both_ports(busy):
            sent = strangers.pester(address, 17, HOSTILE_MESSAGES, role=role)
            assert sent > HOSTILE_MESSAGES / 2, "most of them were sent"
            strangers.talk_nonsense(address, 17, 60)

    assert read_all(client, 6, pester) == [0] * 6
    unharmed(busy, client)
    refusals = [line for line in busy.broker.log().splitlines() if '"refused"' in line]
    assert refusals, "the peer is told why"
    assert len(refusals) < 300, "a stranger must not fill the disk"


def test_a_message_of_200_000_frames_and_a_frame_of_40_mib_harm_nobody(busy: Bus) -> None:
    client = busy.client()
    before = memory_bytes(busy.broker.pid)

    def flood() -> None:
        for address, _ in both_ports(busy):
            strangers.flood_of_frames(address, 200_000)
            strangers.oversized_frame(address, 40 << 20)

    assert read_all(client, 6, flood) == [0] * 6
    unharmed(busy, client)
    assert memory_bytes(busy.broker.pid) - before < 64 << 20


@settings(
    max_examples=150,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    front=st.booleans(),
    welcomed=st.booleans(),
    messages=st.lists(
        st.tuples(
            st.sampled_from(sorted(MessageType)) | st.none(),
            st.lists(st.binary(max_size=40), min_size=1, max_size=25),
        ),
        min_size=1,
        max_size=4,
    ),
)
def test_whatever_frames_arrive_the_next_client_is_served(
    busy: Bus, front: bool, welcomed: bool, messages: list[tuple[MessageType | None, list[bytes]]]
) -> None:
    address, role = both_ports(busy)[0 if front else 1]
    with ExitStack() as stack:
        stranger = Connection(address, new_id(), 5.0)
        stack.callback(stranger.close)
        data, sequence = [], 0
        if welcomed:
            hello = strangers.hello(role)
            data.append(zmtp_message([header.encode(MessageType.HELLO, NO_ID, 0), hello]))
            sequence = 1
        for type_, frames in messages:
            if type_ is not None:
                frames = [header.encode(type_, new_id(), sequence), *frames]
                sequence += 1
            data.append(zmtp_message(frames))
        stranger.settle()
        stranger.send_encoded(data)
        assert strangers.come_and_go(busy.front, 1) == 1


def test_the_fuzzed_broker_is_unharmed_in_the_end(busy: Bus) -> None:
    unharmed(busy, busy.client())
