"""The stage for cases of a broker, at which the kit plays clients and workers."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import zmq

from broker.protocol import messages
from broker.protocol.header import MessageType as T
from tests.conformance.subject import Subject, free_port, wait_for_port
from tests.conformance.verdicts import Broken
from tests.conformance.wire import START_LIMIT_S, Got, Peer, new_id


class BrokerStage:
    """The subject is a broker; the kit plays clients and workers."""

    def __init__(self, command: Sequence[str], log: Path, patience_s: float) -> None:
        self.front = f"tcp://127.0.0.1:{free_port()}"
        self.back = f"tcp://127.0.0.1:{free_port()}"
        self.patience_s = patience_s
        self.subject = Subject(command, {"front": self.front, "back": self.back}, log)
        try:
            for address in (self.front, self.back):
                wait_for_port(int(address.rpartition(":")[2]), self.subject, START_LIMIT_S)
        except BaseException:
            self.subject.stop()
            raise

    def scene(self, name: str, seed: str) -> BrokerScene:
        """The scene of one case."""
        return BrokerScene(self, name, seed)

    def stop(self) -> None:
        """Stop the subject."""
        self.subject.stop()


class BrokerScene:
    """What one case of a broker sees: its own peers, its own model."""

    def __init__(self, stage: BrokerStage, name: str, seed: str) -> None:
        self.stage = stage
        self.subject = stage.subject
        self.random = random.Random(seed)
        self.name = f"{name}-{self.random.randrange(1 << 20):05x}"
        self.model = f"model-{self.name}"
        self.context: zmq.Context[Any] = zmq.Context()
        self.peers: list[Peer] = []
        #: The case has told the broker to stop.
        self.leaves = False

    def peer(self, role: str, routing_id: bytes | None = None) -> Peer:
        """A connection to the front or the back, not dialled yet."""
        address = self.stage.front if role == "client" else self.stage.back
        peer = Peer(self.context, address, role, self.stage.patience_s, self.random, routing_id)
        self.peers.append(peer)
        peer.others = self.peers
        return peer

    def client(self, name: str = "client", **more: Any) -> Peer:
        """A client with a session."""
        peer = self.peer("client")
        peer.hello(f"{name}-{self.name}", **more)
        return peer

    def worker(self, name: str = "worker", slots: int = 1, **more: Any) -> Peer:
        """A worker that is ready; `slots` are granted."""
        peer = self.peer("worker")
        models = [{"name": self.model, "kinds": ["chat", "complete"], "images": True}]
        instance = new_id(self.random)
        peer.hello(
            f"{name}-{self.name}",
            **{"models": models, "capacity": slots, "instance": instance} | more,
        )
        peer.send(T.HEARTBEAT, peer.id, {"state": "ready", "models": models, "capacity": slots})
        if slots:
            self.grant(peer, slots)
        return peer

    def grant(self, worker: Peer, more: int = 1) -> None:
        """CREDIT for `more` slots."""
        worker.granted += more
        worker.send(T.CREDIT, worker.id, {"granted": worker.granted})

    def body(self, **more: Any) -> dict[str, Any]:
        """The body of a request."""
        words = " ".join(self.random.choices(("once", "upon", "a", "time"), k=5))
        return {
            "model": self.model,
            "kind": "complete",
            "prompt": words,
            "params": {"max_tokens": 64, "seed": self.random.getrandbits(62)},
            "window": 1 << 20,
        } | more

    def request(self, client: Peer, *attachments: bytes, **more: Any) -> bytes:
        """Send a REQUEST; return its id."""
        id_ = new_id(self.random)
        client.send(T.REQUEST, id_, self.body(**more), *attachments)
        return id_

    def resume(self, client: Peer, id_: bytes, epoch: int, **more: Any) -> None:
        """Send a RESUME with these fields."""
        facts = {"epoch": epoch, **more}
        client.send(T.RESUME, id_, self.body(resume=facts))

    def running(self, client: Peer, worker: Peer) -> tuple[bytes, bytes]:
        """A request that runs at the worker: its id and route. Both inboxes are read."""
        id_ = self.request(client)
        assign = self.assigned(worker, id_)
        self.placed(client, id_)
        return id_, assign.body.reply_to

    def assigned(self, worker: Peer, id_: bytes, rule: str = "R15") -> Got:
        """The ASSIGN of this request."""
        got = worker.expect(T.ASSIGN, rule=rule)
        if got.id != id_:
            raise Broken(rule, f"ASSIGN of {got.id.hex()[:8]} instead of {id_.hex()[:8]}")
        return got

    def placed(self, client: Peer, id_: bytes) -> Got:
        """The ACCEPTED that names a worker. One about the place in the queue may precede it."""
        while True:
            got = client.expect(T.ACCEPTED, rule="R16")
            if got.id != id_:
                raise Broken("R16", f"ACCEPTED of {got.id.hex()[:8]}")
            if got.body.worker:
                return got

    def output(self, client: Peer, rule: str) -> list[Any]:
        """The events of the next OUTPUT."""
        events: list[Any] = client.expect(T.OUTPUT, T.ACCEPTED, rule=rule).body
        return events

    def failed(self, client: Peer, id_: bytes, code: str, rule: str) -> messages.FailEvent:
        """The FAIL of this request."""
        events = self.output(client, rule)
        (event,) = events if len(events) == 1 else (None,)
        if not isinstance(event, messages.FailEvent) or event.request_id != id_:
            raise Broken(rule, f"{events} came instead of FAIL {code}")
        if code and event.error.code != code:
            raise Broken(rule, f"FAIL {event.error.code} ({event.error.message}); expected {code}")
        return event

    def finish(
        self,
        worker: Peer,
        id_: bytes,
        route: bytes,
        tokens: int = 0,
        epoch: int = 0,
        reason: str = "stop",
    ) -> None:
        """Send END with its ledger, which grants the slot again."""
        worker.granted += 1
        end = [1, id_, epoch, tokens, reason, "", {}, {}]
        worker.events(route, end, ledger=[worker.granted, [[id_, reason, 1, tokens]]])

    def query(self, client: Peer, verb: str, **args: Any) -> Any:
        """Send a QUERY; return the body of its ANSWER."""
        id_ = new_id(self.random)
        client.send(T.QUERY, id_, {"verb": verb, "args": args})
        got = client.expect(T.ANSWER, T.ACCEPTED, T.OUTPUT, rule="Q1")
        if got.id != id_:
            raise Broken("Q1", f"ANSWER with id {got.id.hex()}; the query's is {id_.hex()}")
        return got.body

    def close(self) -> None:
        """Disconnect all peers of the case, and check that the broker still runs."""
        for peer in list(self.peers):
            if peer.over:
                peer.vanish()
            else:
                peer.leave("closed")
        self.context.destroy(linger=500)
        if not self.subject.running and not self.leaves:
            raise Broken("?", "the broker exited")
