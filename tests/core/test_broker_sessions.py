"""Sessions of the broker core: HELLO, sequences, liveness, stalled engines, keys, garbage."""

from __future__ import annotations

import random

import pytest

from broker.core.events import (
    AccessChanged,
    DisconnectReported,
    LoopWasLate,
    MessageReceived,
    PeerOverflowed,
    PeerUnreachable,
    ShutdownRequested,
    Side,
    Tick,
)
from broker.core.instructions import ForgetPeer
from broker.protocol import codec, header
from broker.protocol.header import MessageType
from broker.protocol.messages import Hello, Refuse, WorkerState
from tests.core.broker_facts import Bus, ClientPeer, Peer, WorkerPeer, types


def hello(bus: Bus, side: Side, **body: object) -> Peer:
    peer = Peer(bus, side)
    peer.send(MessageType.HELLO, header.NO_ID, Hello(**{"name": "peer"} | body))  # type: ignore[arg-type]
    peer.begin()
    return peer


def refusal(peer: Peer) -> Refuse:
    (message,) = peer.first
    assert message.type is MessageType.REFUSE
    body: Refuse = message.body
    return body


def test_welcome_binds_both_sides_to_the_broker_s_values() -> None:
    bus = Bus(worker_heartbeat_s=0.5, worker_liveness=4, client_heartbeat_s=2.0, inflight=9)
    worker, client = bus.worker(), bus.client()
    told = worker.first[0].body
    assert (told.heartbeat_interval_ms, told.liveness) == (500, 4)
    told = client.first[0].body
    assert (told.heartbeat_interval_ms, told.liveness, told.limits.inflight) == (2000, 3, 9)


def test_an_unknown_connection_is_told_to_send_hello() -> None:
    bus = Bus()
    peer = Peer(bus, Side.FRONT)
    peer.send(MessageType.REQUEST, bus.new_id(), {})
    peer.begin()
    assert refusal(peer).error.code == "unknown_session"
    assert not refusal(peer).fatal


def test_no_other_worker_may_use_the_name_of_a_live_one() -> None:
    bus = Bus()
    first = hello(bus, Side.BACK, role="worker", name="w1", instance=bytes([1] * 16))
    other = hello(bus, Side.BACK, role="worker", name="w1", instance=bytes([2] * 16))
    refused = refusal(other)
    assert (refused.error.code, refused.fatal) == ("forbidden", False)
    assert (refused.error.retryable, refused.error.retry_after_ms) == (True, 1000)
    assert "'w1'" in refused.error.message and "--worker-id" in refused.error.message
    # The first was probed. The same process may come back at any time.
    first.receive()
    assert len(first.beats) == 1
    again = hello(bus, Side.BACK, role="worker", name="w1", instance=bytes([1] * 16))
    assert types(again.first) == ["WELCOME"]
    for peer in (first, again):
        peer.send(MessageType.GOODBYE, peer.id, {})
    other = hello(bus, Side.BACK, role="worker", name="w1", instance=bytes([2] * 16))
    assert types(other.first) == ["WELCOME"]


def test_a_dead_worker_s_name_is_free_as_soon_as_it_is_found_dead() -> None:
    bus = Bus()
    dead = hello(bus, Side.BACK, role="worker", name="w1", instance=bytes([1] * 16))
    refusal(hello(bus, Side.BACK, role="worker", name="w1", instance=bytes([2] * 16)))
    bus.handle(PeerUnreachable(Side.BACK, dead.routing_id))
    again = hello(bus, Side.BACK, role="worker", name="w1", instance=bytes([2] * 16))
    assert types(again.first) == ["WELCOME"]


def test_workers_of_one_name_without_an_instance_are_accepted_with_a_warning() -> None:
    bus = Bus()
    bus.worker("w1")
    assert types(hello(bus, Side.BACK, role="worker", name="w1").first) == ["WELCOME"]
    (told,) = [log for log in bus.logs if log.event == "two workers of one name"]
    assert (told.level, told.fields["peer"]) == ("warning", "w1")


def test_a_peer_at_the_wrong_socket_is_refused_for_good() -> None:
    peer = hello(Bus(), Side.FRONT, role="worker")
    assert refusal(peer).fatal
    assert "other address" in refusal(peer).error.message


def test_a_peer_of_another_version_is_refused_for_good() -> None:
    peer = hello(Bus(), Side.FRONT, role="client", min_version=2, max_version=3)
    assert refusal(peer).fatal
    assert "2 to 3" in refusal(peer).error.message


def test_a_message_framed_as_another_version_is_refused_for_good() -> None:
    bus = Bus()
    peer = Peer(bus, Side.FRONT)
    head = header.encode(MessageType.HELLO, header.NO_ID, 0)
    peer.send_frames(head[:2] + b"\x02" + head[3:], codec.encode(Hello(role="client", name="new")))
    peer.begin()
    assert refusal(peer).fatal
    client = bus.client()
    head = header.encode(MessageType.HEARTBEAT, client.id, client.sequence)
    client.send_frames(head[:2] + b"\x02" + head[3:], b"\x80")
    assert client.only(MessageType.REFUSE).body.fatal


def test_a_peer_that_speaks_newer_versions_too_is_welcome() -> None:
    assert hello(Bus(), Side.FRONT, role="client", min_version=1, max_version=9).welcomed


def test_a_full_broker_refuses_and_says_when_to_try_again() -> None:
    bus = Bus(max_clients=1, max_workers=1)
    bus.client(), bus.worker()
    for side, role in ((Side.FRONT, "client"), (Side.BACK, "worker")):
        refused = refusal(hello(bus, side, role=role))
        assert (refused.error.code, refused.fatal) == ("overloaded", False)
        assert refused.error.retry_after_ms is not None


def test_a_draining_broker_asks_peers_to_try_again_in_a_second_however_long_it_drains() -> None:
    bus = Bus()
    busy = bus.client()
    bus.worker()
    busy.request()
    bus.handle(ShutdownRequested(600.0))
    for side, role in ((Side.FRONT, "client"), (Side.BACK, "worker")):
        refused = refusal(hello(bus, side, role=role))
        assert (refused.error.code, refused.fatal) == ("draining", False)
        assert refused.error.retry_after_ms == 1000


@pytest.mark.parametrize("routing_id", [b"\x00abcd", b"\x00" + bytes(15), b"a" * 15, b"a" * 17])
def test_a_routing_id_that_is_not_16_bytes_is_refused_for_good(routing_id: bytes) -> None:
    bus = Bus()
    peer = Peer(bus, Side.BACK)
    peer.routing_id = routing_id
    peer.send(MessageType.HELLO, header.NO_ID, Hello(role="worker", name="w"))
    peer.begin()
    assert refusal(peer).fatal


def test_a_second_hello_ends_the_session() -> None:
    bus = Bus()
    client = bus.client()
    client.send(MessageType.HELLO, header.NO_ID, Hello(role="client", name="again"))
    assert client.only(MessageType.REFUSE).body.error.code == "protocol_error"
    assert not client.known


@pytest.mark.parametrize("skipped", [1, -1])
def test_a_gap_or_a_repetition_in_the_sequence_ends_the_session(skipped: int) -> None:
    bus = Bus()
    client = bus.client()
    client.beat()
    client.sequence += skipped
    client.beat()
    assert "sequence" in client.only(MessageType.REFUSE).body.error.message
    assert not client.known


def test_garbage_ends_only_the_session_that_sent_it() -> None:
    bus = Bus()
    worker, client = bus.worker(), bus.client()
    request_id = client.request()
    (assign,) = worker.assigned()
    generator = random.Random(5)
    for _ in range(300):
        peer = ClientPeer(bus, generator.choice(list(Side)))
        if generator.random() < 0.5:
            role = "client" if peer.side is Side.FRONT else "worker"
            peer.send(MessageType.HELLO, header.NO_ID, Hello(role=role, name="fuzz"))
        data = [generator.randbytes(generator.choice((0, 3, 32, 40))) for _ in range(3)]
        if generator.random() < 0.7:
            type_ = generator.choice(list(MessageType))
            data[0] = header.encode(type_, bus.new_id(), peer.sequence, generator.randrange(4))
        peer.send_frames(*data[: generator.randrange(4)])
    worker.tokens(assign)
    worker.finish(assign, tokens=1)
    assert [event.request_id for event in client.events()] == [request_id] * 2


def test_a_broken_control_message_ends_the_session_and_names_the_field() -> None:
    bus = Bus()
    worker = bus.worker()
    worker.send(MessageType.CREDIT, worker.id, {"granted": -1})
    assert "granted" in worker.only(MessageType.REFUSE).body.error.message


def test_a_broken_request_fails_alone_and_names_the_field() -> None:
    bus = Bus()
    client = bus.client()
    client.send(MessageType.REQUEST, bus.new_id(), {"model": "demo", "window": 0})
    (event,) = client.events()
    assert event.error.code == "invalid_request"
    assert "window" in event.error.message
    assert client.known


# --- liveness -------------------------------------------------------------------------------------


def test_a_silent_worker_is_lost_after_its_liveness_and_its_clients_are_told() -> None:
    bus = Bus()
    worker, client = bus.worker(), bus.client()
    client.request()
    client.receive()
    bus.wait(4.9)
    assert worker.known
    bus.wait(0.2)
    assert not worker.known
    interrupted = client.only(MessageType.INTERRUPTED).body
    assert interrupted.worker == "worker"
    assert interrupted.error.code == "worker_lost"
    assert worker.receive()[-1].type is MessageType.GOODBYE


def test_a_network_failure_of_all_workers_makes_no_request_poison() -> None:
    """One after the other falls silent while it has the request, but none of them died."""
    bus = Bus()
    first, client = bus.worker("first"), bus.client()
    bus.wait(1)
    second = bus.worker("second")
    request_id = client.request()
    assert first.assigned_ids() == [request_id]
    for wait_s, next_epoch in ((4.5, 1), (1.0, 2)):
        bus.wait(wait_s)
        (told,) = [m.body for m in client.receive() if m.type is MessageType.INTERRUPTED]
        assert not told.lost
        client.resume(request_id, epoch=next_epoch)
    assert not second.known
    assert bus.worker("first").assigned_ids() == [request_id]


def test_any_message_counts_as_life_output_on_the_fast_path_too() -> None:
    bus = Bus()
    worker, client = bus.worker(), bus.client()
    client.request()
    (assign,) = worker.assigned()
    for offset in range(10):
        bus.wait(4.0)
        worker.tokens(assign, offset)
        client.beat()
    assert worker.known


def test_the_broker_sends_heartbeats_when_it_sends_nothing_else() -> None:
    bus = Bus()
    worker = bus.worker()
    bus.wait(3.05)
    beats = bus.mail[(Side.BACK, worker.routing_id)]
    assert types(beats) == ["HEARTBEAT"] * 3


def test_a_broker_that_was_late_forgives_the_silence_of_that_time() -> None:
    bus = Bus()
    worker = bus.worker()
    bus.now_s += 60.0
    bus.handle(LoopWasLate(60.0))
    bus.handle(Tick())
    assert worker.known
    bus.wait(5.5)
    assert not worker.known, "but not the silence that follows"


def test_a_small_delay_is_no_excuse() -> None:
    bus = Bus()
    worker = bus.worker()
    bus.wait(4.5)
    bus.handle(LoopWasLate(0.9))
    bus.wait(0.6)
    assert not worker.known


def test_silence_counts_only_up_to_the_last_read() -> None:
    bus = Bus()
    worker = bus.worker()
    read_s = bus.now_s
    bus.now_s += 6.0
    bus.handle(Tick(read_s, read_s))
    assert worker.known, "its heartbeats may wait behind data"
    bus.handle(Tick(bus.now_s, bus.now_s))
    bus.wait(1.1)
    assert not worker.known


def test_an_unreachable_worker_is_lost_at_once() -> None:
    bus = Bus()
    worker, client = bus.worker(), bus.client()
    client.request()
    client.receive()
    bus.handle(PeerUnreachable(Side.BACK, worker.routing_id))
    assert client.only(MessageType.INTERRUPTED).body.lost
    assert bus.others == [ForgetPeer(Side.BACK, worker.routing_id)]


def test_a_reported_disconnect_probes_every_worker_at_once_but_not_in_a_storm() -> None:
    bus = Bus()
    workers = [bus.worker(name) for name in "abc"]
    for worker in workers:
        worker.receive()
    for _ in range(100):
        bus.handle(DisconnectReported(Side.BACK))
    bus.wait(0.2)
    for worker in workers:
        probes = bus.mail[(Side.BACK, worker.routing_id)]
        assert types(probes) == ["HEARTBEAT"] * 2


def test_a_disconnect_reported_too_early_is_found_by_the_second_probe() -> None:
    bus = Bus()
    worker = bus.worker()
    worker.receive()
    bus.handle(DisconnectReported(Side.BACK))
    probes = bus.mail[(Side.BACK, worker.routing_id)]
    assert types(probes) == ["HEARTBEAT"], "sent, since ZeroMQ had not noticed yet"
    bus.wait(0.1)
    assert types(probes) == ["HEARTBEAT"] * 2


def test_a_slow_consumer_is_refused_and_its_requests_wait_for_a_resume() -> None:
    bus = Bus()
    worker, client = bus.worker(), bus.client()
    request_id = client.request()
    worker.receive()
    client.receive()
    bus.handle(PeerOverflowed(Side.FRONT, client.routing_id))
    assert client.only(MessageType.GOODBYE).body.reason == "slow_consumer"
    assert worker.receive() == [], "not cancelled"
    again = bus.client()
    again.resume(request_id)
    assert worker.assigned()[0].assign.attach


# --- engines --------------------------------------------------------------------------------------


def test_an_engine_without_progress_gets_no_new_work_until_it_moves() -> None:
    bus = Bus()
    worker, client = bus.worker(slots=2), bus.client()
    worker.beat(state=WorkerState.READY, engine_age_ms=30_000)
    client.request()
    assert worker.assigned() == []
    worker.beat(state=WorkerState.READY, engine_age_ms=10)
    assert len(worker.assigned()) == 1


def test_an_engine_that_is_merely_slow_is_left_alone() -> None:
    bus = Bus()
    worker, client = bus.worker(slots=2), bus.client()
    worker.beat(state=WorkerState.READY, engine_age_ms=29_000)
    client.request()
    assert len(worker.assigned()) == 1


def test_a_worker_whose_engine_makes_no_progress_for_long_is_lost() -> None:
    bus = Bus()
    worker, client = bus.worker(), bus.client()
    client.request()
    client.receive()
    worker.receive()
    worker.beat(state=WorkerState.READY, engine_age_ms=120_000)
    assert worker.only(MessageType.GOODBYE).body.reason == "stalled"
    assert client.only(MessageType.INTERRUPTED).body.lost


@pytest.mark.parametrize(
    ("reason", "lost"),
    [("engine_dead", True), ("stalled", True), ("drained", False), ("closed", False)],
)
def test_a_goodbye_says_whether_the_worker_died(reason: str, lost: bool) -> None:
    bus = Bus()
    worker, client = bus.worker(), bus.client()
    client.request()
    client.receive()
    worker.goodbye(reason)
    assert client.only(MessageType.INTERRUPTED).body.lost is lost


def test_a_loading_worker_gets_no_requests_but_its_model_is_known() -> None:
    bus = Bus()
    worker, client = bus.worker(grant=False), bus.client()
    worker.beat(state=WorkerState.LOADING, progress=0.4, note="reading weights")
    client.request()
    client.receive()
    (told,) = client.query("bus.workers")
    assert (told["state"], told["progress"], told["note"]) == ("loading", 0.4, "reading weights")
    assert client.query("bus.models")[0]["queued"] == 1


def test_a_heartbeat_may_change_the_models() -> None:
    bus = Bus()
    worker, client = bus.worker(models=("old",), grant=False), bus.client()
    worker.beat(models=[{"name": "new", "context_tokens": 128}], capacity=3)
    worker.grant(3)
    (model,) = client.query("bus.models")
    assert (model["name"], model["context_tokens"], model["capacity"]) == ("new", 128, 3)
    client.request("new")
    assert len(worker.assigned()) == 1


def test_a_heartbeat_reports_engine_and_device_once_loaded() -> None:
    bus = Bus()
    worker, client = bus.worker(grant=False), bus.client()
    worker.beat(state=WorkerState.READY, engine="transformers", device="cuda:1")
    worker.beat(state=WorkerState.READY)
    (row,) = client.query("bus.workers")
    assert (row["engine"], row["device"]) == ("transformers", "cuda:1")


def test_what_models_compute_in_is_told_with_their_worker() -> None:
    bus = Bus()
    worker, client = bus.worker(grant=False), bus.client()
    details = {"numbers": "bfloat16, weights of 4 bits"}
    worker.beat(models=[{"name": "a", "details": details}, {"name": "b"}])
    (row,) = client.query("bus.workers")
    assert row["numbers"] == {"a": "bfloat16, weights of 4 bits"}


# --- keys -----------------------------------------------------------------------------------------


def test_operator_verbs_need_an_operator_s_key_where_curve_is_on() -> None:
    bus = Bus(access=AccessChanged(frozenset({"some", "op"}), frozenset({"w"}), frozenset({"op"})))
    bus.worker(key="w")
    guest, operator = bus.client(key="some"), bus.client(key="op")
    assert not guest.first[0].body.operator
    assert operator.first[0].body.operator
    assert guest.query("bus.drain", worker="worker")["code"] == "forbidden"
    assert guest.query("bus.version")["protocol"] == 1
    assert operator.query("bus.drain", worker="worker") == {"worker": "worker", "state": "draining"}


def test_a_key_taken_off_the_list_ends_its_sessions() -> None:
    bus = Bus(access=AccessChanged(frozenset("ab"), frozenset("w"), frozenset()))
    stays, goes = bus.client(key="a"), bus.client(key="b")
    worker = bus.worker(key="w")
    bus.handle(AccessChanged(frozenset("a"), frozenset("w"), frozenset("a")))
    assert goes.only(MessageType.REFUSE).body.error.code == "unauthenticated"
    assert stays.known and worker.known
    assert stays.query("bus.reload") == {}, "it is an operator's key now"
    goes.sequence = 0
    goes.send(MessageType.HELLO, header.NO_ID, Hello(role="client", name="on the old connection"))
    goes.begin()
    assert refusal(goes).fatal


# --- nothing is left ------------------------------------------------------------------------------


def test_nothing_is_left_when_everyone_has_gone() -> None:
    bus = Bus(orphan_grace_s=5, ended_keep_s=5, model_grace_s=5)
    generator = random.Random(3)
    peers: list[Peer] = []
    for _ in range(400):
        match generator.randrange(6):
            case 0:
                peers.append(bus.client())
            case 1:
                peers.append(bus.worker(slots=generator.randrange(1, 4)))
            case 2 if peers:
                peer = peers.pop(generator.randrange(len(peers)))
                if peer.known and generator.random() < 0.5:
                    peer.goodbye()
                elif peer.known:
                    bus.handle(PeerUnreachable(peer.side, peer.routing_id))
            case _ if peers:
                peer = generator.choice(peers)
                if isinstance(peer, ClientPeer) and peer.known:
                    request_id = peer.request()
                    if generator.random() < 0.3:
                        peer.cancel(request_id)
                if isinstance(peer, WorkerPeer) and peer.known:
                    for assign in peer.assigned():
                        if generator.random() < 0.6:
                            peer.finish(assign)
        bus.wait(generator.random() * 0.2)
    for peer in peers:
        if peer.known:
            peer.goodbye()
    bus.wait(130)
    core = bus.core
    for table in (
        core.clients,
        core.workers,
        core.requests,
        core.queues,
        core.routes,
        core.fast_routes,
        core.kept,
        core.service_s,
        core.timers,
        list(core.registry.models()),
    ):
        assert not table, table
    assert core.queued_bytes == 0


def test_a_peer_s_message_is_never_in_the_log() -> None:
    bus = Bus()
    worker, client = bus.worker(), bus.client()
    client.request(prompt="a secret of the user")
    worker.finish(worker.assigned()[0])
    client.send(MessageType.REQUEST, bus.new_id(), codec.encode({"prompt": "a secret"}))
    bus.handle(MessageReceived(Side.FRONT, client.routing_id, (b"a secret",)))
    assert "secret" not in repr(bus.logs)
