"""Cases of a broker: sessions, names, drains, the operator's verbs (sections 2, 3, 5 and 10)."""

from __future__ import annotations

import time

import msgpack

from broker.protocol.header import NO_ID, MessageType as T
from tests.conformance.broker_stage import BrokerScene
from tests.conformance.verdicts import Broken, case
from tests.conformance.wire import Peer, new_id


def refused(peer: Peer, code: str, rule: str, fatal: bool | None = None) -> None:
    """Check that the next message is this REFUSE."""
    got = peer.expect(T.REFUSE, rule=rule)
    if got.body.error.code != code:
        raise Broken(rule, f"REFUSE {got.body.error.code}; expected {code}")
    if fatal is not None and got.body.fatal != fatal:
        raise Broken(rule, f"REFUSE {code} with fatal {got.body.fatal}; expected {fatal}")


@case("broker", "S3", "S4", "F4")
def broker_welcome(scene: BrokerScene) -> None:
    """A client that speaks versions 0 to 5 says HELLO: WELCOME with sequence 0 and version 1."""
    first = scene.client(min_version=0, max_version=5)
    if first.welcome.version != 1:
        raise Broken("S4", f"version {first.welcome.version}; expected 1, the only one that exists")
    second = scene.client()
    if first.id == second.id:
        raise Broken("S3", "two sessions with the same id")


@case("broker", "T1")
def broker_routing_id(scene: BrokerScene) -> None:
    """A client with a routing id of five bytes says HELLO: refused for good."""
    peer = scene.peer("client", routing_id=b"short")
    peer.connect()
    peer.send(T.HELLO, NO_ID, {"role": "client", "name": "x"})
    refused(peer, "protocol_error", "T1", fatal=True)


@case("broker", "S7")
def broker_beats(scene: BrokerScene) -> None:
    """An idle client gets HEARTBEATs at the broker's interval."""
    client = scene.client()
    begun_s, beats = time.monotonic(), 0
    while time.monotonic() - begun_s < 4 * client.interval_s + 1.0:
        client.pump(0.05)
        beats += sum(got.type is T.HEARTBEAT for got in client.inbox)
        client.inbox.clear()
        client.check()
    if beats < 3:
        raise Broken("S7", f"{beats} heartbeats in five intervals of {client.interval_s:g} s")


@case("broker", "S8", "S1")
def broker_silence(scene: BrokerScene) -> None:
    """A client falls silent: GOODBYE `silent`; what it sends later belongs to no session."""
    client = scene.client()
    client.beats = False
    limit_s = client.interval_s * client.welcome.liveness
    begun_s = time.monotonic()
    got = client.next(seconds=limit_s + scene.stage.patience_s)
    lasted_s = time.monotonic() - begun_s
    if got is None or got.type is not T.GOODBYE or got.body.reason != "silent":
        raise Broken(
            "S8", f"{got and got.type.name} after {lasted_s:.1f} s; expected GOODBYE silent"
        )
    if lasted_s < limit_s * 0.8:
        raise Broken(
            "S8", f"GOODBYE after only {lasted_s:.1f} s of silence; {limit_s:g} s are allowed"
        )
    client.send(T.HEARTBEAT, client.id)
    got = client.next(seconds=1.0)  # the broker MAY have closed the connection
    if got is not None and (got.type is not T.REFUSE or got.body.error.code != "unknown_session"):
        raise Broken("S1", f"{got.type.name} came; the session is over")


@case("broker", "S14")
def broker_goodbye_unknown_reason(scene: BrokerScene) -> None:
    """A client leaves with a reason that nobody knows: it counts as closed, and cancels."""
    worker, client = scene.worker(), scene.client()
    id_, _ = scene.running(client, worker)
    client.leave("x-unknown")
    if worker.expect(T.CANCEL, rule="S14").id != id_:
        raise Broken("S14", "CANCEL of another request")


@case("broker", "S15")
def broker_name_taken(scene: BrokerScene) -> None:
    """Another worker comes with the name of a connected one: refused for now, and the first is
    asked whether it lives. The first itself may come again."""
    first = scene.worker(instance=b"\1" * 16)
    first.rest(0.1)
    beats_before = sum(got.type is T.HEARTBEAT for got in first.inbox)
    other = scene.peer("worker")
    other.connect()
    hello = {"role": "worker", "name": f"worker-{scene.name}"}
    other.send(T.HELLO, NO_ID, {**hello, "instance": b"\2" * 16})
    got = other.expect(T.REFUSE, rule="S15")
    if (got.body.error.code, got.body.fatal, got.body.error.retry_after_ms) != (
        *("forbidden", False, 1000),
    ):
        raise Broken("S15", f"REFUSE {got.plain}")
    until_s = time.monotonic() + scene.stage.patience_s
    while sum(got.type is T.HEARTBEAT for got in first.inbox) <= beats_before:
        if time.monotonic() > until_s:
            raise Broken("S15", "the first worker was not asked whether it lives")
        first.pump(0.05)
        other.pump(0.0)
    again = scene.peer("worker")
    again.hello(f"worker-{scene.name}", instance=b"\1" * 16)


@case("broker", "G3", "S12")
def broker_worker_drains(scene: BrokerScene) -> None:
    """A worker with free slots says DRAIN: new requests go to another one."""
    leaving, staying = scene.worker("leaving", 4), scene.worker("staying", 1)
    leaving.send(T.DRAIN, leaving.id, {"reason": "test", "deadline_ms": 10_000})
    leaving.rest(0.2)
    client = scene.client()
    for round_ in range(3):
        id_ = scene.request(client)
        route = scene.assigned(staying, id_, "G3").body.reply_to
        scene.placed(client, id_)
        scene.finish(staying, id_, route)
        if not scene.output(client, "R15"):
            raise Broken("R15", f"no END in round {round_}")
    leaving.quiet("G3", "the worker drains")


@case("broker", "S12", "Q2")
def broker_drain_ordered(scene: BrokerScene) -> None:
    """`bus.drain`: the worker gets DRAIN with the deadline, and nothing new."""
    worker, client = scene.worker(slots=2), scene.client()
    name = f"worker-{scene.name}"
    answer = scene.query(client, "bus.drain", worker=name, deadline_ms=4321)
    if answer.error is not None or answer.result.get("worker") != name:
        raise Broken("Q2", f"bus.drain was answered with {answer}")
    got = worker.expect(T.DRAIN, rule="S12")
    if got.body.deadline_ms != 4321:
        raise Broken("S12", f"DRAIN with deadline {got.body.deadline_ms} ms")
    scene.request(client)
    worker.quiet("G3", "the worker drains")


@case("broker", "Q1")
def broker_verbs(scene: BrokerScene) -> None:
    """Every verb that only reads is answered with a value of its shape."""
    scene.worker(slots=3)
    client = scene.client()
    shapes = {"version": dict, "models": list, "workers": list, "clients": list, "stats": dict}
    for verb, shape in (shapes | {"metrics": dict, "requests": list}).items():
        answer = scene.query(client, f"bus.{verb}")
        if not isinstance(answer.result, shape):
            raise Broken("Q1", f"bus.{verb} was answered with {str(answer)[:100]}")
    rows = scene.query(client, "bus.models").result
    (mine,) = [row for row in rows if row["name"] == scene.model] or [{}]
    if mine.get("capacity") != 3 or mine.get("workers") != 1:
        raise Broken("Q1", f"bus.models describes a model with one worker of three slots as {mine}")


@case("broker", "Q2")
def broker_hold(scene: BrokerScene) -> None:
    """`bus.hold`: nothing new is assigned until `bus.release`."""
    worker, client = scene.worker(), scene.client()
    name = f"worker-{scene.name}"
    if (scene.query(client, "bus.hold", worker=name).result or {}).get("state") != "held":
        raise Broken("Q2", "bus.hold was not answered with state held")
    id_ = scene.request(client)
    worker.quiet("Q2", "the worker is held")
    scene.query(client, "bus.release", worker=name)
    scene.assigned(worker, id_, "Q2")


@case("broker", "E1", "L1")
def broker_garbage(scene: BrokerScene) -> None:
    """Bodies of random bytes: each is refused, and the broker goes on to serve other peers."""
    worker, client = scene.worker(), scene.client()
    for length in (0, 1, 7, 100, 5000):
        peer = scene.client("garbage")
        peer.send(T.CANCEL, new_id(scene.random), b"\xc1" + scene.random.randbytes(length))
        refused(peer, "protocol_error", "E1")
    peer = scene.client("large")
    peer.send(T.CANCEL, new_id(scene.random), msgpack.packb({"reason": "x" * 70_000}))
    refused(peer, "protocol_error", "L1")
    scene.running(client, worker)


@case("broker", "S12", "S13", alone=True)
def broker_shutdown(scene: BrokerScene) -> None:
    """`bus.shutdown` while a stream runs: its client gets DRAIN, a new client is refused
    `draining`, the stream ends, and all peers get GOODBYE `shutdown`."""
    worker, client = scene.worker(), scene.client()
    id_, route = scene.running(client, worker)
    scene.query(client, "bus.shutdown", deadline_ms=8000)
    client.expect(T.DRAIN, T.OUTPUT, rule="S12")
    newcomer = scene.peer("client")
    newcomer.connect()
    newcomer.send(T.HELLO, NO_ID, {"role": "client", "name": "late"})
    got = newcomer.expect(T.REFUSE, rule="S13")
    error = got.body.error
    if (error.code, got.body.fatal, error.retry_after_ms) != ("draining", False, 1000):
        raise Broken("S13", f"REFUSE {got.plain}")
    worker.quiet("S12", "workers are not told", seconds=0.2)
    scene.finish(worker, id_, route)
    scene.output(client, "S12")
    for peer in (client, worker):
        got = peer.expect(T.GOODBYE, T.OUTPUT, rule="S14")
        if got.body.reason != "shutdown":
            raise Broken("S14", f"GOODBYE {got.body.reason}; expected shutdown")
    if scene.subject.wait(scene.stage.patience_s) is None:
        raise Broken("S12", "the broker still runs")
    scene.leaves = True
