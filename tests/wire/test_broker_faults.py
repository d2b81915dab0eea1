"""The broker on real sockets: keys, slow readers, hostile frames, dead and stopped parties."""

from __future__ import annotations

import contextlib
import math
import os
import random
import select
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import zmq
import zmq.auth
from zmq.utils import z85

from broker import auth
from broker.config import Config
from broker.connections import Connections
from broker.core.controller import BrokerCore
from broker.core.events import Side
from broker.log import Logger
from broker.loop import SKIP_BATCH, BrokerLoop
from broker.peer.keys import KeyFileError, Keys
from broker.protocol import codec, header
from broker.protocol.header import MessageType
from broker.protocol.messages import Hello, TokensEvent, new_id
from client.errors import InvalidRequest
from client.io.keys import keys_of
from client.options import Connection as ClientConnection
from tests.harness import PATIENCE_S, wait_until
from tests.support.strangers import hello
from tests.support.zmtp import Connection
from tests.wire.broker_peers import (
    BrokerProcess,
    RawClient,
    RawPeer,
    RawWorker,
    peers_context,
    running_broker,
    stream_works,
)

SOMAXCONN_FILE = Path("/proc/sys/net/core/somaxconn")
SOMAXCONN = int(SOMAXCONN_FILE.read_text()) if SOMAXCONN_FILE.exists() else 128


@pytest.fixture
def context() -> Iterator[zmq.Context[Any]]:
    with peers_context() as context:
        yield context


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[BrokerProcess]:
    with running_broker(tmp_path) as broker:
        yield broker


def pair(context: zmq.Context[Any], broker: BrokerProcess) -> tuple[RawWorker, RawClient]:
    worker, client = RawWorker(context, broker.back), RawClient(context, broker.front)
    worker.join()
    client.hello(role="client", name="client")
    return worker, client


# --- loss -----------------------------------------------------------------------------------------


def test_the_client_is_told_that_its_workers_connection_broke(
    context: zmq.Context[Any], broker: BrokerProcess
) -> None:
    """The closed connection reveals it: silence would be noticed only long after the time limit."""
    worker, client = pair(context, broker)
    client.request()
    worker.take()
    accepted = client.expect(MessageType.ACCEPTED)[1]
    if not accepted.get("worker"):  # it was queued until the worker's CREDIT was read
        client.expect(MessageType.ACCEPTED)
    worker.close()
    _, body = client.expect(MessageType.INTERRUPTED)
    assert (body["worker"], body["lost"]) == ("worker", True)


def test_a_broker_that_was_stopped_loses_no_peer(tmp_path: Path, context: zmq.Context[Any]) -> None:
    options = ("--worker-heartbeat-s", "0.5", "--client-heartbeat-s", "0.5")
    with running_broker(tmp_path, *options) as broker:
        worker, client = pair(context, broker)
        broker.signal(signal.SIGSTOP)
        time.sleep(2.5)  # longer than any liveness limit; the test needs this long a stop
        broker.signal(signal.SIGCONT)
        worker.beat()
        client.beat()
        stream_works(client, worker)
        assert "late" in broker.log


@pytest.mark.skipif(SOMAXCONN < 700, reason="the kernel's own limit is lower: net.core.somaxconn")
def test_hundreds_of_peers_connect_to_a_busy_broker_at_the_first_attempt(
    broker: BrokerProcess,
) -> None:
    # The backlog was once 256: the other peers' kernels retried after 1, 3 and 7 s, so 11,000 peers
    # took 7 s to come back.
    address = broker.back.removeprefix("tcp://").rpartition(":")
    broker.signal(signal.SIGSTOP)
    with contextlib.ExitStack() as opened:
        waiting = select.poll()
        for _ in range(600):
            one = opened.enter_context(socket.socket())
            one.setblocking(False)
            one.connect_ex((address[0], int(address[2])))
            waiting.register(one, select.POLLOUT)
        # On one machine, whoever has a place in the backlog is connected when connect() returns.
        assert len(waiting.poll(0)) == 600
        broker.signal(signal.SIGCONT)


# --- slow readers ---------------------------------------------------------------------------------


def test_a_clients_last_messages_are_read_even_if_a_send_to_it_failed_first(
    context: zmq.Context[Any], broker: BrokerProcess
) -> None:
    worker, client = pair(context, broker)
    request_id = client.request()
    _, assign, _ = worker.take()
    client.expect(MessageType.ACCEPTED)
    broker.process.send_signal(signal.SIGSTOP)
    client.send(MessageType.CANCEL, request_id, codec.pack({}))
    client.close()
    # On waking, the broker reads the back first and finds the client gone.
    for offset in range(20):
        worker.tokens(request_id, assign.reply_to, offset, "x")
    broker.process.send_signal(signal.SIGCONT)
    assert worker.receive()[0].type is MessageType.CANCEL


def test_a_client_that_does_not_read_is_cut_off_and_no_other_peer_is_affected(
    tmp_path: Path, context: zmq.Context[Any]
) -> None:
    options = ("--high-water-mark", "10", "--outgoing-messages", "20", "--orphan-grace-s", "0.2")
    with running_broker(tmp_path, *options) as broker:
        worker, good = pair(context, broker)
        slow = RawClient(context, broker.front, receive_limit=1)
        slow.hello(role="client", name="slow")
        request_id = slow.request()
        _, assign, _ = worker.take()
        text = "x" * 200_000
        for offset in range(10_000):
            worker.tokens(request_id, assign.reply_to, offset, text)
            if offset % 50 == 0:
                good.beat()
                if "slow" not in {client["name"] for client in good.query("bus.clients")}:
                    break
        else:
            pytest.fail("it was never cut off")
        stats = good.query("bus.stats")
        assert stats["peers_overflowed_total"] == 1
        assert worker.receive()[0].type is MessageType.CANCEL, "its request was an orphan"
        stream_works(good, worker)
        last = header.decode(slow.socket.recv_multipart()[0])
        while last.type is not MessageType.GOODBYE:
            previous, last = last.sequence, slow.receive()[0]
            assert last.sequence == previous + 1, "not a single message was dropped"


# --- hostile frames -------------------------------------------------------------------------------


def test_garbage_of_every_shape_ends_only_the_connection_that_sent_it(
    context: zmq.Context[Any], broker: BrokerProcess
) -> None:
    worker, client = pair(context, broker)
    generator = random.Random(17)
    for address in (broker.front, broker.back):
        role = "client" if address == broker.front else "worker"
        for _ in range(40):
            peer = RawPeer(context, address)
            if generator.random() < 0.5:
                peer.hello(role=role, name="fuzz")
            for _ in range(5):
                frames = [generator.randbytes(generator.choice((0, 5, 32, 900))) for _ in range(3)]
                if generator.random() < 0.6:
                    type_ = generator.choice(list(MessageType))
                    frames[0] = header.encode(
                        type_, new_id(), peer.sequence, generator.randrange(4)
                    )
                peer.socket.send_multipart(frames[: generator.randrange(1, 4)])
            peer.close()
        RawPeer(context, address).socket.send_multipart([b""] * 5000)
        host, _, port = address.removeprefix("tcp://").partition(":")
        with socket.create_connection((host, int(port))) as raw:
            raw.sendall(b"GET / HTTP/1.1\r\n\r\n" + generator.randbytes(500))
    stream_works(client, worker)
    assert broker.process.poll() is None
    assert "Traceback" not in broker.log


@pytest.mark.parametrize("side", list(Side), ids=lambda side: side.value)
def test_a_message_of_endless_frames_is_discarded_in_batches_between_other_work(
    context: zmq.Context[Any], side: Side
) -> None:
    routers = {side: context.socket(zmq.ROUTER) for side in Side}
    with routers[Side.FRONT] as front, routers[Side.BACK] as back:
        address = f"tcp://127.0.0.1:{routers[side].bind_to_random_port('tcp://127.0.0.1')}"
        loop = BrokerLoop(Config(), BrokerCore(Config()), front, back, Logger(level="warning"))
        drain = loop._drain_front if side is Side.FRONT else loop._drain_back
        stranger, peer = RawPeer(context, address), RawPeer(context, address)
        stranger.socket.send_multipart([b""] * (3 * SKIP_BATCH))
        assert routers[side].poll(int(PATIENCE_S * 1000))
        assert [drain(0.0) for _ in range(3)] == [False, False, True]
        role = "client" if side is Side.FRONT else "worker"
        peer.send(MessageType.HELLO, header.NO_ID, Hello(role=role, name="next"))
        assert routers[side].poll(int(PATIENCE_S * 1000))
        assert drain(0.0)
        assert peer.expect(MessageType.WELCOME)
        loop._signals.close()


def test_a_frame_that_is_too_large_ends_only_its_connection(
    context: zmq.Context[Any], broker: BrokerProcess
) -> None:
    worker, client = pair(context, broker)
    for address, size in ((broker.front, 17 << 20), (broker.back, 5 << 20)):
        peer = RawPeer(context, address)
        peer.socket.send_multipart([bytes(32), bytes(size)])
    stream_works(client, worker)


@pytest.mark.parametrize(
    ("shape", "ended"),
    [
        ("header only", True),
        ("too large", True),
        ("empty body and a frame more", True),
        ("one frame more", False),
        ("two frames more", False),
        ("three frames more", False),
    ],
)
def test_a_worker_that_breaks_the_framing_of_output_harms_no_other_peer(
    context: zmq.Context[Any], broker: BrokerProcess, shape: str, ended: bool
) -> None:
    """The fast path reads as few frames as possible, but still finds the end of a message."""
    worker, client = pair(context, broker)
    hostile = RawWorker(context, broker.back)
    hostile.join("hostile", models=("evil",))
    request_id = client.request("evil")
    _, assign, _ = hostile.take()
    client.expect(MessageType.ACCEPTED)
    head = header.encode(MessageType.OUTPUT, assign.reply_to, hostile.sequence)
    body = codec.encode_events([TokensEvent(request_id, 0, 0, [1], "x")])
    frames = {
        "header only": [head],
        "too large": [head, bytes(2 << 20)],
        "empty body and a frame more": [head, b"\x90", b"x"],
        "one frame more": [head, body, b"x"],
        "two frames more": [head, body, b"x", head],
        "three frames more": [head, body, *[worker.socket.getsockopt(zmq.ROUTING_ID)[:15]] * 3],
    }[shape]
    hostile.socket.send_multipart(frames)
    for _ in range(20):
        worker.beat()
    newcomer = RawWorker(context, broker.back)
    newcomer.join("newcomer", models=("new",))
    came, events = client.expect(MessageType.OUTPUT)
    assert came.sequence == 2, "the client's sequence goes on"
    assert events == ([] if ended else codec.unpack(body, 1000))
    if ended:
        assert hostile.expect(MessageType.REFUSE)[1]["error"]["code"] == "protocol_error"
        assert client.expect(MessageType.INTERRUPTED)[0].id == request_id
    stream_works(client, worker)


# --- connections without a session ----------------------------------------------------------------


def ends(connection: Connection) -> bool:
    """Whether the broker closes the connection, whatever else it sends."""
    try:
        while connection.receive():
            pass
    except ConnectionError:
        return True
    return False


def descriptors(broker: BrokerProcess) -> int:
    return sum(1 for _ in Path(f"/proc/{broker.process.pid}/fd").iterdir())


@pytest.mark.parametrize("role", ["client", "worker"])
def test_connections_without_a_session_cannot_hold_descriptors(
    tmp_path: Path, context: zmq.Context[Any], role: str
) -> None:
    options = ("--stranger-s", "0.3", "--client-heartbeat-s", "1", "--worker-heartbeat-s", "1")
    with running_broker(tmp_path, *options) as broker:
        worker, client = pair(context, broker)
        address = broker.front if role == "client" else broker.back
        before = descriptors(broker)
        speechless, silent, odd = (Connection(address, new_id()) for _ in range(3))
        silent.send([header.encode(MessageType.HELLO, header.NO_ID, 0), hello(role)])
        odd.send([bytes(32), b"x"])
        try:
            closed: list[bool] = []
            waits = threading.Thread(
                target=lambda: closed.extend(map(ends, (speechless, silent, odd)))
            )
            waits.start()
            while waits.is_alive():
                worker.beat(), client.beat()
                time.sleep(0.02)
            assert closed == [True] * 3
        finally:
            for stranger in (speechless, silent, odd):
                stranger.close()
        # Peers with a session stay.
        stream_works(client, worker)
        wait_until(lambda: descriptors(broker) <= before, "their descriptors to be closed")
        assert client.query("bus.stats")["loop_strangers_closed_total"] == 3


def test_a_descriptor_that_now_belongs_to_another_connection_is_left_alone() -> None:
    connections = Connections(1.0)
    here, there = socket.socketpair()
    with here, there:
        number = here.fileno()
        connections.accepted(Side.FRONT, number)
        assert connections.sweep(0.0, {Side.FRONT: set()}) == 0
        other, far = socket.socketpair()
        with other, far:
            os.dup2(other.fileno(), number)
            assert connections.sweep(1.5, {Side.FRONT: set()}) == 0
            far.sendall(b"x")
            assert other.recv(1) == b"x"


def test_the_time_limit_restarts_for_peers_that_could_not_be_read() -> None:
    connections = Connections(1.0)
    here, there = socket.socketpair()
    with here, there:
        connections.accepted(Side.FRONT, here.fileno())
        nobody: dict[Side, set[bytes]] = {Side.FRONT: set()}
        assert connections.sweep(0.0, nobody) == 0
        assert connections.sweep(100.0, nobody) == 0, "the broker was stopped"
        assert connections.sweep(100.9, {}) == 0, "its messages are not read yet"
        connections.named(Side.FRONT, here.fileno(), b"peer")
        assert connections.sweep(101.5, {Side.FRONT: {b"peer"}}) == 0
        assert connections.sweep(101.9, nobody) == 0, "its session has just ended"
        assert connections.sweep(102.9, nobody) == 1
        assert there.recv(1) == b""


# --- keys -----------------------------------------------------------------------------------------


def certificate(folder: Path, name: str) -> tuple[bytes, bytes, bytes]:
    server, _ = zmq.auth.load_certificate(folder / "broker.key")
    public, secret = zmq.auth.load_certificate(folder / f"{name}.key_secret")
    assert secret is not None
    return server, public, secret


def test_only_keys_on_the_list_are_accepted_and_the_log_names_the_others(
    tmp_path: Path, context: zmq.Context[Any]
) -> None:
    keys = tmp_path / "keys"
    output = auth.keys_command([str(keys)], program="keys")
    assert "broker.key" in output
    assert {path.stat().st_mode & 0o777 for path in keys.iterdir()} == {0o600}
    with running_broker(tmp_path, "--keys", str(keys)) as broker:
        worker = RawWorker(context, broker.back, keys=certificate(keys, "worker"))
        worker.join()
        client = RawClient(context, broker.front, keys=certificate(keys, "client"))
        assert not client.hello(role="client", name="c").get("operator", False)
        operator = RawClient(context, broker.front, keys=certificate(keys, "operator"))
        assert operator.hello(role="client", name="o")["operator"]
        stream_works(client, worker)
        assert client.query("bus.drain", worker="worker")["code"] == "forbidden"

        stranger_public, stranger_secret = zmq.curve_keypair()
        server = certificate(keys, "client")[0]
        for address, pair_, side in (
            (broker.front, (stranger_public, stranger_secret), "front"),
            (broker.back, certificate(keys, "client")[1:], "back"),
        ):
            stranger = RawPeer(context, address, keys=(server, *pair_))
            stranger.send(MessageType.HELLO, header.NO_ID, {"role": "client", "name": "x"})
            line = pair_[0].decode()
            wait_until(lambda line=line: line in broker.log, "a log line with the refused key")
            assert f'"side": "{side}"' in broker.log
            assert not stranger.socket.poll(100)
        plain = RawPeer(context, broker.front)
        plain.send(MessageType.HELLO, header.NO_ID, {"role": "client", "name": "plain"})
        wait_until(lambda: "handshake_failed" in broker.log, "a log line")
        assert not plain.socket.poll(100)


def test_the_delay_for_wrong_keys_grows_and_affects_no_other_peer(
    tmp_path: Path, context: zmq.Context[Any]
) -> None:
    keys = tmp_path / "keys"
    auth.keys_command([str(keys)], program="keys")
    _, public, _ = certificate(keys, "client")
    gate = auth.Gate(context, keys, lambda *_: None)

    def peer(key: bytes, address: bytes = b"1.2.3.4") -> zmq.Socket[bytes]:
        socket = context.socket(zmq.REQ)
        socket.connect(auth.ZAP_ENDPOINT)
        tail = [b"front", address, b"", b"CURVE", z85.decode(key)]
        socket.send_multipart([auth.ZAP_VERSION, b"1", *tail])
        return socket

    try:
        wrong = []
        for count, address in enumerate((b"1.2.3.4", b"1.2.3.4", b"1.2.3.4", b"5.6.7.8"), 1):
            wrong.append(peer(zmq.curve_keypair()[0], address))
            wait_until(lambda count=count: gate.answer(10.0) or gate.refused == count, "a refusal")
        assert gate.due_s == 11.0
        right = peer(public)
        wait_until(lambda: gate.answer(10.5) or right.poll(10), "the answer to a right key")
        assert right.recv_multipart()[2] == b"200"
        assert not any(socket.poll(10) for socket in wrong)
        gate.answer(11.0)
        for socket in (wrong[0], wrong[3]):
            assert socket.recv_multipart()[2] == b"400", "the first of its address"
        assert gate.due_s == 12.0
        gate.answer(12.0)
        assert wrong[1].recv_multipart()[2] == b"400"
        assert gate.due_s == 14.0
        gate.answer(14.0)
        assert wrong[2].recv_multipart()[2] == b"400"
        assert gate.due_s == math.inf
        for socket in (*wrong, right):
            socket.close(linger=0)
    finally:
        gate.socket.close(linger=0)


def test_the_number_of_delayed_refusals_is_limited(
    tmp_path: Path, context: zmq.Context[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = tmp_path / "keys"
    auth.keys_command([str(keys)], program="keys")
    monkeypatch.setattr(auth, "MAX_DELAYED", auth.GATE_BATCH)
    gate = auth.Gate(context, keys, lambda *_: None)
    socket = context.socket(zmq.DEALER)
    socket.connect(auth.ZAP_ENDPOINT)
    try:
        for number in range(2):
            head = [b"", auth.ZAP_VERSION, b"%d" % number]
            socket.send_multipart([*head, b"front", b"", b"", b"CURVE", bytes(32)])
            wait_until(
                lambda number=number: gate.answer(0.0) or gate.refused == number + 1, "a refusal"
            )
        assert socket.recv_multipart()[2:4] == [b"0", b"400"]
    finally:
        socket.close(linger=0)
        gate.socket.close(linger=0)


def test_the_allow_lists_are_reloaded_without_a_restart(
    tmp_path: Path, context: zmq.Context[Any]
) -> None:
    keys = tmp_path / "keys"
    auth.keys_command([str(keys)], program="keys")
    with running_broker(tmp_path, "--keys", str(keys)) as broker:
        goes = RawClient(context, broker.front, keys=certificate(keys, "client"))
        goes.hello(role="client", name="goes")
        auth.keys_command([str(keys), "--add", "client", "--name", "alice"], program="keys")
        operator = RawClient(context, broker.front, keys=certificate(keys, "operator"))
        operator.hello(role="client", name="operator")
        assert operator.query("bus.reload") == {}
        alice = RawClient(context, broker.front, keys=certificate(keys, "alice"))
        alice.hello(role="client", name="alice")

        listed = keys / "clients.allow"
        lines = listed.read_text().splitlines()
        listed.write_text("\n".join(line for line in lines if not line.endswith(" client")) + "\n")
        broker.signal(signal.SIGHUP)
        _, refused = goes.expect(MessageType.REFUSE)
        assert (refused["error"]["code"], refused["fatal"]) == ("unauthenticated", True)
        assert alice.query("bus.version")["protocol"] == 1

        listed.write_text("not a key\n")
        broker.signal(signal.SIGHUP)
        wait_until(lambda: "not reloaded" in broker.log, "a warning")
        assert alice.query("bus.version")["protocol"] == 1, "the old list stays in force"


def test_a_secret_key_that_others_can_read_is_refused(tmp_path: Path) -> None:
    auth.keys_command([str(tmp_path)], program="keys")
    (tmp_path / "broker.key_secret").chmod(0o644)
    with pytest.raises(auth.KeyFileError, match="chmod 600"):
        auth.load_broker_key(tmp_path)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o644])
def test_clients_and_workers_refuse_a_secret_key_that_others_can_read(
    tmp_path: Path, mode: int
) -> None:
    auth.keys_command([str(tmp_path)], program="keys")
    server, own = tmp_path / "broker.key", {}
    for role in ("client", "worker"):
        own[role] = tmp_path / f"{role}.key_secret"
        own[role].chmod(mode)
    connection = ClientConnection.resolve(server_key=str(server), key_file=own["client"])
    with pytest.raises(InvalidRequest, match="chmod 600"):
        keys_of(connection)
    with pytest.raises(KeyFileError, match="chmod 600"):
        Keys.load(server, own["worker"])
    server.chmod(0o644)  # the broker's public key is public
    for path in own.values():
        path.chmod(0o600)
    keys_of(connection)
    Keys.load(server, own["worker"])


def test_the_error_for_a_missing_allow_list_says_what_to_do(tmp_path: Path) -> None:
    auth.keys_command([str(tmp_path)], program="keys")
    (tmp_path / "clients.allow").unlink()
    with pytest.raises(auth.KeyFileError, match=r"clients\.allow: No such file.*broker keys"):
        auth.load_allow_lists(tmp_path)


def test_a_name_without_a_kind_of_peer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        auth.keys_command([str(tmp_path / "new"), "--name", "alice"], program="keys")
    assert not (tmp_path / "new").exists()


def test_keys_are_never_overwritten(tmp_path: Path) -> None:
    auth.keys_command([str(tmp_path)], program="keys")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    auth.keys_command([str(tmp_path)], program="keys")
    with pytest.raises(auth.KeyFileError):
        auth.keys_command([str(tmp_path), "--add", "worker", "--name", "client"], program="keys")
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
