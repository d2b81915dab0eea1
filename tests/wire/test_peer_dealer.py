"""The socket of peers that dial out: what it reports, keeps and delivers."""

from __future__ import annotations

import select
import socket
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import zmq

from broker.peer.dealer import CannotConnect, Dealer, Party, Report
from broker.peer.keys import Keys
from client.io.driver import CLIENT
from tests.harness import PATIENCE_S, wait_until
from worker.loop import WORKER
from worker.relay.__main__ import RELAY

MakeDealer = Callable[..., Dealer]


@pytest.fixture
def context() -> Iterator[zmq.Context[Any]]:
    with zmq.Context() as made:
        yield made


@pytest.fixture
def router(context: zmq.Context[Any]) -> Iterator[zmq.Socket[bytes]]:
    with context.socket(zmq.ROUTER) as made:
        made.linger = 0
        made.rcvtimeo = 20_000
        yield made


@pytest.fixture
def make(context: zmq.Context[Any]) -> Iterator[MakeDealer]:
    made: list[Dealer] = []

    def dealer(address: str, keys: Keys | None = None, party: Party = CLIENT) -> Dealer:
        made.append(Dealer(context, address, keys, party))
        return made[-1]

    yield dealer
    for one in made:
        one.close()


def listening(router: zmq.Socket[bytes], host: str = "127.0.0.1") -> str:
    return f"tcp://{host}:{router.bind_to_random_port(f'tcp://{host}')}"


def reported(dealer: Dealer) -> Report:
    """The first report that is not empty."""
    report: Report = wait_until(
        lambda: next((r for r in (dealer.report(),) if r != Report()), None), "a report"
    )
    return report


def has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


def test_messages_go_both_ways_and_the_monitor_says_that_it_is_connected(
    router: zmq.Socket[bytes], make: MakeDealer
) -> None:
    dealer = make(listening(router))
    assert reported(dealer) == Report(connected=True)
    assert dealer.send((b"head", b"", b"body"))
    name, *frames = router.recv_multipart()
    assert frames == [b"head", b"", b"body"] and len(name) == 16
    router.send_multipart([name, b"one"])
    router.send_multipart([name, b"two", b"more"])
    got = [wait_until(dealer.receive, "a message") for _ in range(2)]
    assert got == [(b"one",), (b"two", b"more")]
    assert dealer.receive() is None


def readable(dealer: Dealer) -> bool:
    """What a loop waits for: something to do, or its descriptor."""
    return dealer.due() or bool(select.select([dealer.fd], [], [], PATIENCE_S)[0])


def test_no_message_is_missed_by_who_waits_for_the_descriptor(
    router: zmq.Socket[bytes], make: MakeDealer
) -> None:
    dealer = make(listening(router))
    assert reported(dealer).connected
    dealer.send((b"hello",))
    name, _ = router.recv_multipart()
    for burst in (1, 1, 2, 1, 5, 3, 1):
        for number in range(burst):
            router.send_multipart([name, b"%d" % number])
        if burst == 2:
            dealer.send((b"a send may take note of what came",))
        got: list[tuple[bytes, ...]] = []
        while len(got) < burst:
            assert readable(dealer), f"{got} of {burst}"
            while (frames := dealer.receive()) is not None:
                got.append(frames)
        assert got == [(b"%d" % number,) for number in range(burst)]
        assert not dealer.due()


def test_a_single_message_is_received_without_a_second_try(
    router: zmq.Socket[bytes], make: MakeDealer, monkeypatch: pytest.MonkeyPatch
) -> None:
    dealer = make(listening(router))
    assert reported(dealer).connected
    dealer.send((b"hello",))
    name, _ = router.recv_multipart()
    router.send_multipart([name, b"alone"])
    assert readable(dealer)
    tried: list[object] = []
    real = zmq.Socket.recv
    monkeypatch.setattr(
        zmq.Socket, "recv", lambda socket, *a, **k: tried.append(a) or real(socket, *a, **k)
    )
    assert dealer.receive() == (b"alone",)
    assert dealer.receive() is None
    assert len(tried) == 1


@pytest.mark.skipif(not has_ipv6(), reason="no IPv6 here")
@pytest.mark.parametrize("party", [WORKER, CLIENT, RELAY], ids=lambda party: party.role)
def test_every_party_reaches_an_ipv6_address(
    router: zmq.Socket[bytes], make: MakeDealer, party: Party
) -> None:
    router.ipv6 = True
    assert reported(make(listening(router, "[::1]"), party=party)).connected


def test_an_address_without_a_listener_is_lost_and_not_refused(make: MakeDealer) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, but it does not listen
        report = reported(make(f"tcp://127.0.0.1:{taken.getsockname()[1]}"))
    assert report == Report(lost="connection refused: nobody listens there")


@pytest.mark.parametrize("address", ["tcp://127.0.0.1", "udp://127.0.0.1:5555", "nothing"])
def test_a_malformed_address_is_named_and_leaves_no_socket(address: str) -> None:
    context: zmq.Context[Any] = zmq.Context()
    with pytest.raises(CannotConnect, match=f"cannot connect to {address}: "):
        Dealer(context, address, None, CLIENT)
    context.term()  # would hang if a socket were still open


@pytest.mark.parametrize("room", [1, 2])
def test_without_room_for_a_monitor_no_socket_is_left(room: int) -> None:
    context: zmq.Context[Any] = zmq.Context()
    context.max_sockets = room
    with pytest.raises(CannotConnect, match="cannot connect") as caught:
        Dealer(context, "tcp://127.0.0.1:5555", None, CLIENT)
    context.term()  # would hang if a socket were still open
    assert caught.traceback, "which, until here, kept what was made"


def test_messages_from_before_a_loss_can_still_be_received(
    router: zmq.Socket[bytes], make: MakeDealer
) -> None:
    dealer = make(listening(router))
    assert reported(dealer).connected
    dealer.send((b"hello",))
    name, _ = router.recv_multipart()
    for number in range(3000):
        router.send_multipart([name, b"%d" % number])
    router.close(linger=1000)
    wait_until(lambda: dealer.report().lost, "the end of the connection")
    got = []
    while (frames := dealer.receive()) is not None:
        got.append(frames[0])
    assert got == [b"%d" % number for number in range(len(got))]
    assert len(got) > 0


def test_messages_that_the_socket_does_not_accept_are_kept_in_order(
    router: zmq.Socket[bytes], make: MakeDealer
) -> None:
    dealer = make(listening(router))
    assert reported(dealer).connected
    sent = 0
    while dealer.send((b"%d" % sent, bytes(1 << 16))):
        sent += 1
    assert dealer.blocked
    assert dealer.send((b"last",)), "only the first message that does not fit is reported"
    heard: list[bytes] = []

    def drain() -> bool:
        while router.poll(0):
            heard.append(router.recv_multipart()[1])
        return dealer.flush() and heard[-1:] == [b"last"]

    wait_until(drain, "all of it")
    assert heard == [*(b"%d" % number for number in range(sent + 1)), b"last"]
    assert not dealer.blocked


@pytest.mark.parametrize("party", [WORKER, CLIENT, RELAY], ids=["worker", "client", "relay"])
@pytest.mark.parametrize("secured", [False, True])
def test_curve_on_one_side_only_is_reported_in_the_words_of_the_party(
    router: zmq.Socket[bytes], make: MakeDealer, party: Party, secured: bool
) -> None:
    public, secret = zmq.curve_keypair()
    if not secured:
        router.curve_server = True
        router.curve_secretkey = secret
    report = reported(make(listening(router), Keys.fresh(public) if secured else None, party))
    assert report.lost is not None
    assert party.server_key in report.lost
    assert "CURVE" in report.lost or party.door in report.lost


def test_a_message_larger_than_a_party_may_be_sent_ends_its_connection(
    router: zmq.Socket[bytes], make: MakeDealer
) -> None:
    dealer = make(listening(router), party=replace(CLIENT, max_frame_bytes=1000))
    assert reported(dealer).connected
    dealer.send((b"hello",))
    name, _ = router.recv_multipart()
    router.send_multipart([name, bytes(1001)])
    wait_until(lambda: dealer.report().lost, "the end of the connection")
    assert dealer.receive() is None
