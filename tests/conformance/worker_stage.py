"""The stage for cases of a worker, at which the kit is its broker."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import msgpack

from broker.protocol import messages
from broker.protocol.header import MessageType as T
from tests.conformance.subject import Subject
from tests.conformance.verdicts import Broken, Skipped
from tests.conformance.wire import START_LIMIT_S, Got, KitBroker, Session, new_id

USEFUL_S: Final = 2.1
"""A session that ends sooner counts as a refusal, so the worker waits longer for the next (S10)."""


class WorkerStage:
    """The subject is a worker; the kit is its broker."""

    def __init__(self, command: Sequence[str], log: Path, patience_s: float) -> None:
        self.random = random.Random(0)
        self.broker = KitBroker("worker", patience_s, self.random)
        self.patience_s = patience_s
        address = self.broker.address
        try:
            self.subject = Subject(command, {"broker": address, "back": address}, log)
        except BaseException:
            self.broker.end()
            raise
        self.broker.alive = lambda: self.subject.running
        self.session: Session | None = None
        self.models: list[Any] = []
        self.granted = 0
        self.assigned = 0
        #: When the current session began, on the monotonic clock.
        self.begun_s = 0.0
        #: The worker was told to stop, or refused for good.
        self.drain = False

    def scene(self, name: str, seed: str) -> WorkerStage:
        """Prepare for one case: the worker has a session, is ready and idle."""
        self.random.seed(seed)
        self.ready()
        return self

    # --- sessions ---

    def begin(self, **more: Any) -> Session:
        """The worker's next session, up to WELCOME."""
        first = self.session is None
        session = self.broker.hello(first=first)
        self.broker.welcome(session, **more)
        self.entered(session)
        assert session.hello is not None
        if session.hello.models:
            self.models = session.hello.models
        return session

    def entered(self, session: Session) -> None:
        """Make this the worker's session."""
        self.session, self.granted, self.assigned = session, 0, 0
        self.begun_s = time.monotonic()

    def live(self) -> Session:
        """The current session; begins one if there is none."""
        session = self.session
        return self.begin() if session is None or session.over else session

    def ready(self, slots: int = 1) -> Session:
        """Wait until the worker has granted this many slots that are free."""
        session = self.live()
        until_s = time.monotonic() + START_LIMIT_S
        while self.granted - self.assigned < slots:
            if time.monotonic() > until_s:
                raise Broken("G1", f"{self.granted} slots granted, {self.assigned} used")
            if self.look(0.2) is None and session.over:
                session = self.live()
        return session

    def settled(self) -> None:
        """Wait until the session counts as useful (S10), so that its end causes no back-off."""
        while time.monotonic() < self.begun_s + USEFUL_S:
            self.look(0.1)

    def look(self, seconds: float) -> Got | None:
        """The next message that is neither HEARTBEAT nor CREDIT; counts the credit of all."""
        session = self.session
        assert session is not None
        until_s = time.monotonic() + seconds
        while True:
            while session.inbox:
                got = session.inbox.pop(0)
                self._count(got)
                if got.type not in (T.HEARTBEAT, T.CREDIT):
                    return got
            session.check()
            if session.over or time.monotonic() >= until_s:
                return None
            self.broker.pump(0.02)

    def _count(self, got: Got) -> None:
        granted = None
        if got.type is T.OUTPUT:
            granted = got.ledger.granted if got.ledger else None
        elif got.type in (T.HEARTBEAT, T.CREDIT, T.REJECT):
            granted = got.body.granted
        if got.type is T.HEARTBEAT and got.body.models:
            self.models = got.body.models
        if granted is None:
            return
        if granted < self.granted:
            raise Broken(
                "G1",
                f"{got.type.name} grants {granted} after {self.granted}: `granted` never falls",
            )
        self.granted = granted

    def expect(self, type_: T, rule: str, seconds: float | None = None) -> Got:
        """The next message but HEARTBEAT and CREDIT, which must be of this type."""
        got = self.look(self.patience_s if seconds is None else seconds)
        if got is None:
            raise Broken(rule, f"{type_.name} did not come")
        if got.type is not type_:
            raise Broken(
                rule, f"{got.type.name} {str(got.plain)[:200]} came instead of {type_.name}"
            )
        return got

    def past(self, stream: Stream, type_: T, rule: str, passing: T | None = None) -> Got:
        """The next message of this type; OUTPUT that comes before it goes to the stream."""
        until_s = time.monotonic() + self.patience_s
        while time.monotonic() < until_s:
            got = self.look(0.2)
            if got is None:
                continue
            if got.type is type_:
                return got
            if got.type is T.OUTPUT:
                stream.take(got)
            elif got.type is not passing:
                raise Broken(
                    rule, f"{got.type.name} {str(got.plain)[:200]} came; expected {type_.name}"
                )
        raise Broken(rule, f"{type_.name} did not come")

    # --- requests ---

    @property
    def model(self) -> str:
        """The name of a model with kind complete."""
        for info in self.models:
            if "complete" in [kind.value for kind in info.kinds]:
                return str(info.name)
        raise Skipped("the worker serves no model with kind complete")

    def body(self, tokens: int, **more: Any) -> dict[str, Any]:
        """The body of a request for this many tokens."""
        words = " ".join(self.random.choices(("once", "upon", "a", "time"), k=6))
        params = {"max_tokens": tokens, "ignore_eos": True, "seed": self.random.getrandbits(48)}
        params |= more.pop("params", {})
        base = {"model": self.model, "kind": "complete", "prompt": words, "window": 1 << 20}
        return base | {"params": params} | more

    def assign(self, id_: bytes, body: dict[str, Any] | bytes, **facts: Any) -> bytes:
        """Send ASSIGN; return its route."""
        session = self.live()
        route = facts.pop("reply_to", None) or new_id(self.random)
        if not facts.get("attach"):
            self.assigned += 1
        client_body = body if isinstance(body, bytes) else msgpack.packb(body)
        session.send(T.ASSIGN, id_, {"reply_to": route, **facts}, client_body)
        return route

    def new_id(self) -> bytes:
        """A new request id."""
        return new_id(self.random)

    def stream(self, id_: bytes, route: bytes, epoch: int = 0, offset: int = 0) -> Stream:
        """The stream of a request that was assigned."""
        return Stream(self, id_, route, epoch, offset)

    def close(self) -> None:
        """Check that the worker still runs."""
        if not self.subject.running and not self.drain:
            raise Broken("?", "the worker exited")

    def stop(self) -> None:
        """Stop the subject and the kit's broker."""
        self.subject.stop()
        self.broker.end()


class Stream:
    """The answer of a worker to one ASSIGN, checked as it arrives."""

    def __init__(
        self, stage: WorkerStage, id_: bytes, route: bytes, epoch: int, offset: int
    ) -> None:
        self._stage = stage
        self.id, self.route, self.epoch, self.offset = id_, route, epoch, offset
        self.tokens: list[int] = []
        self.text = ""
        self.events: list[Any] = []
        self.end: Any = None
        self.started = False
        self.finished: list[Any] = []

    def read(self, seconds: float) -> bool:
        """Read the next OUTPUT; False if none came in this time."""
        got = self._stage.look(seconds)
        if got is None:
            return False
        if got.type is T.REJECT:
            raise Broken("G4", f"REJECT {got.body.error.code}: {got.body.error.message}")
        if got.type is not T.OUTPUT:
            raise Broken("R10", f"{got.type.name} came instead of OUTPUT")
        self.take(got)
        return True

    def take(self, got: Got) -> None:
        """Check an OUTPUT, which must be of this stream alone."""
        if got.ledger is not None:
            self.finished += got.ledger.finished
            self.started = self.started or self.id in got.ledger.started
        for event in got.body:
            self.event(got, event)

    def event(self, got: Got, event: Any) -> None:
        """Check one event."""
        if event.request_id != self.id:
            raise Broken("R12", f"an event of another request: {event}")
        if got.id != self.route:
            raise Broken(
                "R12", f"OUTPUT under {got.id.hex()[:8]}; the route is {self.route.hex()[:8]}"
            )
        if event.epoch != self.epoch:
            raise Broken("M11", f"an event of epoch {event.epoch}; expected {self.epoch}")
        if self.end is not None:
            raise Broken("R13", f"an event after the end: {event}")
        have = self.offset + len(self.tokens)
        self.events.append(event)
        if isinstance(event, messages.TokensEvent):
            if event.offset != have:
                raise Broken("O1", f"TOKENS at offset {event.offset} after {have} tokens")
            self.tokens += event.token_ids
            self.text += event.text
        elif not isinstance(event, messages.PromptEvent):
            if isinstance(event, messages.EndEvent):
                if event.offset != have:
                    raise Broken("O1", f"END with offset {event.offset} after {have} tokens")
                self.text += event.text
            self.end = event
            named = [entry for entry in self.finished if entry.request_id == self.id]
            if len(named) != 1 or not got.ledger:
                raise Broken("G6", f"the end came with a ledger that names it {len(named)} times")
            code = (
                event.error.code if isinstance(event, messages.FailEvent) else event.finish_reason
            )
            if named[0].outcome != code:
                raise Broken("G7", f"the ledger says {named[0].outcome!r}, the event {code!r}")

    def until(self, tokens: int, rule: str = "R10") -> None:
        """Read until this many tokens have come."""
        until_s = time.monotonic() + self._stage.patience_s
        while len(self.tokens) < tokens and self.end is None:
            if not self.read(0.2) and time.monotonic() > until_s:
                raise Broken(rule, f"{len(self.tokens)} of {tokens} tokens came")

    def whole(self, rule: str = "R13") -> Any:
        """Read to the end; return the END or FAIL."""
        until_s = time.monotonic() + self._stage.patience_s
        while self.end is None:
            if not self.read(0.2) and time.monotonic() > until_s:
                raise Broken(rule, f"no END or FAIL after {len(self.tokens)} tokens")
        return self.end
