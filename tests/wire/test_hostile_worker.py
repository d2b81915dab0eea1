"""A worker that lies, on real sockets: its output is not shown, and it is cut off and named."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest

from broker.protocol import codec
from broker.protocol.header import Flag, MessageType, encode
from broker.protocol.messages import (
    Assign,
    EndEvent,
    FinishReason,
    Kind,
    Ledger,
    ModelInfo,
    Request,
    Timings,
    TokensEvent,
    Usage,
)
from client import Client, ClientClosed
from tests.harness import PATIENCE_S, wait_until
from tests.support.plain_peer import RawPeer
from tests.wire.broker_peers import BrokerProcess, running_broker

MODELS = [ModelInfo(name="m", kinds=(Kind.COMPLETE,), context_tokens=1000)]


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[BrokerProcess]:
    with running_broker(tmp_path, "--worker-heartbeat-s", "30") as broker:
        yield broker


@contextmanager
def worker(broker: BrokerProcess, name: str, slots: int) -> Iterator[RawPeer]:
    """A worker that sends what the test says."""
    peer = RawPeer(broker.back)
    try:
        yield ready(peer, name, slots)
    finally:
        peer.close()


def ready(peer: RawPeer, name: str, slots: int) -> RawPeer:
    peer.hello("worker", name, models=MODELS, capacity=slots)
    peer.ready(MODELS, slots)
    return peer


def say(peer: RawPeer, route: bytes, body: bytes, ledger: Ledger | None = None) -> None:
    head = encode(MessageType.OUTPUT, route, peer.sequence, Flag.LEDGER if ledger else 0)
    peer.connection.send((head, body, *([codec.encode(ledger)] if ledger else [])))
    peer.sequence += 1


class Stream(threading.Thread):
    """A caller of the client library that collects the text of one answer."""

    def __init__(self, client: Client, prompt: str) -> None:
        super().__init__(daemon=True)
        self._client, self._prompt = client, prompt
        self.text = ""
        self.start()

    def run(self) -> None:
        options = {"model": "m", "max_tokens": 50}
        with suppress(ClientClosed):  # the second request is never answered
            for event in self._client.generate(self._prompt, stream=True, **options):
                self.text += getattr(event, "text", "")


def forged(request_id: bytes, request: Request) -> bytes:
    """Tokens for a request that runs elsewhere, with the right epoch."""
    assert request.resume is not None
    return codec.encode_events([TokensEvent(request_id, request.resume.epoch, 1, [6], "EVIL ")])


def unreadable(request_id: bytes, request: Request) -> bytes:
    return codec.pack([[0, request_id, None]])


@pytest.mark.parametrize("lie", [forged, unreadable])
def test_a_worker_cannot_write_into_a_request_that_moved_away_and_is_cut_off(
    broker: BrokerProcess, lie: Callable[[bytes, Request], bytes]
) -> None:
    with (
        Client(broker.front, name="victim") as client,
        worker(broker, "first", 1) as first,
        ExitStack() as later,
    ):
        stream = Stream(client, "A")
        id_, assign, _ = first.assigned()
        tokens = codec.encode_events([TokensEvent(id_, 0, 0, [1], "a ")])
        say(first, assign.reply_to, tokens, Ledger(1, [], [id_]))
        wait_until(lambda: stream.text == "a ", "the first token")
        evil = later.enter_context(worker(broker, "evil", 1))
        Stream(client, "B")
        _, route, _ = evil.assigned()
        honest = later.enter_context(worker(broker, "honest", 2))
        first.close()  # the request moves
        id_again, moved, request = honest.assigned()
        assert id_again == id_ and isinstance(moved, Assign)
        say(evil, route.reply_to, lie(id_, request))
        # Output after the end of the request belongs to nobody and is not reported.
        wait_until(lambda: "worker cut off" in broker.log, "the worker's name in the log")
        epoch = moved.epoch
        end = EndEvent(id_, epoch, 2, FinishReason.STOP, "", Usage(), Timings())
        events = [TokensEvent(id_, epoch, 1, [2], "honest"), end]
        say(honest, moved.reply_to, codec.encode_events(events), Ledger(2, [], [id_]))
        stream.join(PATIENCE_S)
        assert stream.text == "a honest"
        (line,) = [line for line in broker.log.splitlines() if "worker cut off" in line]
        assert "evil" in line and "victim" in line
        names = {row["name"] for row in client.workers()}
        assert names == {"honest"}
