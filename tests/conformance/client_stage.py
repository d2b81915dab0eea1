"""The stage for cases of a client, at which the kit is its broker."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from broker.protocol.header import MessageType as T
from tests.conformance.subject import Subject
from tests.conformance.verdicts import Broken
from tests.conformance.wire import Got, KitBroker, Session, new_id


class ClientStage:
    """The subject is a client; the kit is its broker. Each case has a client of its own."""

    def __init__(self, command: Sequence[str], log: Path, patience_s: float) -> None:
        self.random = random.Random(0)
        self.patience_s = patience_s
        self.broker = KitBroker("client", patience_s, self.random)
        address = self.broker.address
        try:
            self.subject = Subject(command, {"broker": address, "front": address}, log, talks=True)
        except BaseException:
            self.broker.end()
            raise
        self.broker.alive = lambda: self.subject.running
        self.text: dict[str, str] = {}
        self.ends: dict[str, str] = {}
        self.fails: dict[str, str] = {}

    def scene(self, name: str, seed: str) -> ClientStage:
        """Prepare for one case."""
        self.random.seed(seed)
        return self

    # --- the script ---

    def ask(self, name: str = "a", tokens: int = 64, **more: Any) -> None:
        """Tell the client to send a request."""
        words = " ".join(self.random.choices(("once", "upon", "a", "time"), k=5))
        order = {"do": "ask", "name": name, "model": "demo", "prompt": words, "max_tokens": tokens}
        self.subject.tell(**order | {"seed": self.random.getrandbits(48)} | more)

    def listen(self, seconds: float = 0.0) -> bool:
        """Read one line that the client writes; False if there was none in this time."""
        said = self.subject.said(seconds)
        if said is None:
            return False
        name = str(said.get("name", ""))
        if "text" in said:
            self.text[name] = self.text.get(name, "") + str(said["text"])
        if "end" in said:
            self.ends[name] = str(said["end"])
        if "fail" in said:
            self.fails[name] = str(said["fail"])
        return True

    def _until(self, done: Any, what: str, rule: str) -> None:
        until_s = time.monotonic() + self.patience_s
        while not done():
            if not self.listen(0.02) and time.monotonic() > until_s:
                raise Broken(
                    rule, f"{what}; it said text {self.text}, end {self.ends}, fail {self.fails}"
                )
            self.broker.pump(0.0)

    def shown(self, text: str, rule: str, name: str = "a") -> None:
        """Wait until the client has shown exactly this."""
        self._until(lambda: len(self.text.get(name, "")) >= len(text), f"expected {text!r}", rule)
        if self.text[name] != text:
            raise Broken(rule, f"the client shows {self.text[name]!r}; expected {text!r}")

    def ended(self, reason: str, rule: str, name: str = "a") -> None:
        """Wait for the end of an answer."""
        self._until(
            lambda: name in self.ends or name in self.fails, f"expected end {reason!r}", rule
        )
        if self.ends.get(name) != reason:
            raise Broken(
                rule,
                f"the client says end {self.ends.get(name)}, fail "
                f"{self.fails.get(name)}; expected end {reason!r}",
            )

    def failed(self, code: str, rule: str, name: str = "a") -> None:
        """Wait for the failure of an answer."""
        self._until(
            lambda: name in self.ends or name in self.fails, f"expected fail {code!r}", rule
        )
        if self.fails.get(name) != code:
            raise Broken(
                rule,
                f"the client says end {self.ends.get(name)}, fail "
                f"{self.fails.get(name)}; expected fail {code!r}",
            )

    # --- the broker ---

    def session(self, first: bool = False, **more: Any) -> Session:
        """The client's next session."""
        session = self.broker.hello(first=first)
        self.broker.welcome(session, **more)
        return session

    def asked(self, session: Session, type_: T = T.REQUEST, rule: str = "R4") -> Got:
        """The client's REQUEST or RESUME."""
        got = session.expect(type_, T.QUERY, T.WINDOW, rule=rule)
        if got.id[0] == 0:
            raise Broken("R4", f"request id {got.id.hex()}; its first byte is not zero")
        return got

    def run(self, session: Session, got: Got, worker: str = "w1") -> Answer:
        """Tell the client by ACCEPTED that a worker runs its request."""
        route = new_id(self.random)
        session.send(T.ACCEPTED, got.id, {"worker": worker, "route": route})
        return Answer(self, session, got, route)

    def begun(self, tokens: int = 2, **more: Any) -> tuple[Session, Answer]:
        """A session with one request whose first tokens the client has shown."""
        self.ask(**more)
        session = self.session(first=True)
        answer = self.run(session, self.asked(session))
        answer.tokens(tokens)
        self.shown(answer.text, "R10")
        return session, answer

    def close(self) -> None:
        """Nothing to do: the next case has another client."""

    def stop(self) -> None:
        """Stop the subject and the kit's broker."""
        self.subject.stop()
        self.broker.end()


class Answer:
    """The kit's answer to a request of the client, token by token."""

    def __init__(self, stage: ClientStage, session: Session, got: Got, route: bytes) -> None:
        self.stage, self.session, self.got, self.route = stage, session, got, route
        self.id = got.id
        self.epoch = got.body.resume.epoch if got.body.resume else 0
        #: All that was sent for the request, with which its RESUMEs are compared.
        self.ids: list[int] = []
        self.text = ""

    def goes_on(self, session: Session, got: Got, worker: str = "w1") -> Answer:
        """The same answer, continued after a RESUME."""
        after = self.stage.run(session, got, worker)
        after.ids, after.text = list(self.ids), self.text
        return after

    def tokens(self, count: int = 1) -> None:
        """Send TOKENS: words that nobody can guess, with characters of one to four bytes."""
        draw = self.stage.random
        ids = [draw.randrange(1, 50_000) for _ in range(count)]
        text = "".join(f" {draw.choice(('w', 'ä', '🙂', '漢'))}{token}" for token in ids)
        self.session.events(self.route, [0, self.id, self.epoch, len(self.ids), ids, text])
        self.ids += ids
        self.text += text

    def end(self, reason: str = "length", text: str = "") -> None:
        """Send END."""
        self.text += text
        self.session.events(
            self.route, [1, self.id, self.epoch, len(self.ids), reason, text, {}, {}]
        )

    def fail(self, code: str, **more: Any) -> None:
        """Send FAIL, as the broker itself does."""
        error = {"code": code, "message": f"the kit says {code}", **more}
        self.session.events(self.session.id, [2, self.id, self.epoch, len(self.ids), error])

    def interrupt(
        self, *, lost: bool = False, alone: bool = False, worker: str = "w1", **error: Any
    ) -> None:
        """Send INTERRUPTED."""
        code = "worker_lost" if lost else "draining"
        info = {"code": code, "message": "the kit interrupts", "retryable": True, **error}
        body = {"epoch": self.epoch, "worker": worker, "lost": lost, "error": info}
        self.session.send(T.INTERRUPTED, self.id, body | ({"alone": True} if alone else {}))
