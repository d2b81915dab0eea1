"""Random runs of a worker with two brokers: whatever happens, every text is exact or a prefix, no
slot leaks, and the core's invariants hold after each event.

The test plays the brokers, the engine and the clients. A client resumes where it stopped, through
any broker. The seed decides on lost connections, blocked sockets, small windows, cancels, stale
epochs and slow clocks. To debug a failure, run its seed alone.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest

from broker.protocol import codec
from broker.protocol.header import MessageType
from broker.protocol.messages import EndEvent, Request
from tests.core.worker_world import Answer, Broker, World, request_id, serving
from worker.core import events
from worker.engines.events import END, TOKENS

STEPS = 250
CAPACITY = 3


def token(number: int, position: int) -> int:
    return 1000 * number + position


def reference(number: int, length: int) -> str:
    return "".join(f"{token(number, position)} " for position in range(length))


@dataclass
class Job:
    """A job, as the simulated engine knows it."""

    number: int
    position: int
    #: Text of the resumed tokens that the client does not have yet.
    owed: str
    length: int


class Client:
    """One request, and the broker that has it."""

    def __init__(self, number: int, length: int) -> None:
        self.number = number
        self.length = length
        self.answer = Answer()
        self.broker: Broker | None = None
        self.session = 0
        self.window = 0
        self.cancelled = False

    @property
    def over(self) -> bool:
        return self.answer.end is not None


class Life:
    """One random run."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.world: World = serving(brokers=2, capacity=CAPACITY)
        self.clients: list[Client] = []
        self.jobs: dict[bytes, Job] = {}
        self.blocked: set[int] = set()
        answers: dict[bytes, Answer] = {}
        for broker in self.world.brokers:
            broker.answers = answers
        self.answers = answers

    # --- what happens -----------------------------------------------------------------------------

    def run(self) -> None:
        happenings = [
            (self.step, 40),
            (self.new_request, 12),
            (self.widen, 15),
            (self.resume, 12),
            (self.obey_cancels, 8),
            (self.wait, 8),
            (self.cancel, 2),
            (self.lose, 3),
            (self.connect, 8),
            (self.block, 2),
            (self.unblock, 4),
        ]
        does, weights = zip(*happenings, strict=True)
        for does_it in self.random.choices(does, weights, k=STEPS):
            does_it()
            self.check()

    def finish(self) -> None:
        """All clients come back and ask for the rest."""
        for _ in range(400):
            self.unblock()
            self.connect()
            for client in self.clients:
                self.resume(client)
                self.widen(client)
            self.step()
            self.obey_cancels()
            self.world.advance(0.5)
            self.check()
            if all(client.over for client in self.clients) and not self.world.jobs:
                return
        raise AssertionError("a request never ended")

    def check(self) -> None:
        for client in self.clients:
            whole = reference(client.number, client.length)
            assert whole.startswith(client.answer.text), "the text was altered"
            end = client.answer.end
            if isinstance(end, EndEvent) and end.finish_reason == "stop":
                assert client.answer.text == whole, "the text was cut"
        busy = len(self.world.jobs)
        assert busy <= CAPACITY + len(self.world.cancels)

    # --- clients ----------------------------------------------------------------------------------

    def up(self) -> list[Broker]:
        return [broker for broker in self.world.brokers if broker.up]

    def new_request(self) -> None:
        brokers = [broker for broker in self.up() if broker.free > 0]
        if not brokers:
            return
        number = len(self.clients) + 1
        client = Client(number, self.random.randint(1, 30))
        self.clients.append(client)
        self.answers[request_id(number)] = client.answer
        client.broker = self.random.choice(brokers)
        client.session = client.broker.sessions
        client.window = self.random.choice([1, 3, 100])
        client.broker.assign(number, window=client.window)
        self.take_jobs()

    def lost(self, client: Client) -> bool:
        broker = client.broker
        return not client.over and (
            broker is None or not broker.up or client.session != broker.sessions
        )

    def resume(self, client: Client | None = None) -> None:
        candidates = [c for c in self.clients if not c.over]
        if client is None:
            if not candidates:
                return
            client = self.random.choice(candidates)
            if not self.lost(client) and self.random.random() < 0.8:
                return
        elif not self.lost(client):
            return
        self._resume(client)

    def _resume(self, client: Client) -> None:
        brokers = self.up()
        if not brokers:
            return
        broker = self.random.choice(brokers)
        attach = broker.free == 0 or self.random.random() < 0.5
        rejects = len(broker.came(MessageType.REJECT))
        client.window = max(client.window, len(client.answer.token_ids) + 1)
        broker.assign(
            client.number, attach=attach, resume=client.answer.resume(), window=client.window
        )
        client.broker, client.session = broker, broker.sessions
        client.cancelled = False
        if len(broker.came(MessageType.REJECT)) > rejects:
            client.broker = None  # INTERRUPTED: it must be resumed again
        self.take_jobs()

    def widen(self, client: Client | None = None) -> None:
        open_ones = [c for c in self.clients if not c.over and not self.lost(c)]
        if client is not None:
            open_ones = [c for c in open_ones if c is client]
        if not open_ones:
            return
        chosen = self.random.choice(open_ones)
        chosen.window = len(chosen.answer.token_ids) + self.random.choice([1, 2, 50])
        assert chosen.broker is not None
        chosen.broker.window(chosen.number, chosen.window)

    def cancel(self) -> None:
        open_ones = [c for c in self.clients if not c.over and not self.lost(c)]
        if open_ones:
            chosen = self.random.choice(open_ones)
            chosen.cancelled = True
            assert chosen.broker is not None
            chosen.broker.cancel(chosen.number)

    # --- engine -----------------------------------------------------------------------------------

    def take_jobs(self) -> None:
        for job_id, content in self.world.jobs.items():
            if job_id in self.jobs:
                continue
            request = codec.decode(Request, content, 1 << 20)
            resumed = request.resume
            prior = resumed.token_ids if resumed else []
            characters = resumed.text_characters if resumed else 0
            # The body does not name the request; the newest client that waits for a job does.
            number = self._number_of(job_id)
            client = self.clients[number - 1]
            text = reference(number, len(prior))
            self.jobs[job_id] = Job(number, len(prior), text[characters:], client.length)

    def _number_of(self, job_id: bytes) -> int:
        stream = self.world.core._requests._jobs[job_id]
        return int.from_bytes(stream.request_id[1:], "big")

    def step(self) -> None:
        step: list[list[object]] = []
        ended: list[bytes] = []
        for job_id in list(self.world.jobs):
            job = self.jobs[job_id]
            if job_id in self.world.cancels and self.random.random() < 0.5:
                continue
            count = min(self.random.choice([0, 1, 1, 3]), job.length - job.position)
            if count:
                ids = [token(job.number, job.position + index) for index in range(count)]
                text = job.owed + "".join(f"{one} " for one in ids)
                job.owed = ""
                job.position += count
                step.append([TOKENS, job_id, ids, text, None])
            if job.position >= job.length:
                step.append([END, job_id, "stop", job.owed, {}, {}, None, None])
                ended.append(job_id)
        for job_id in ended:
            self.world._gone(job_id)
            del self.jobs[job_id]
        self.world.step(*step)

    def obey_cancels(self) -> None:
        for job_id in self.world.cancels:
            self.jobs.pop(job_id, None)
        self.world.obey_cancels()

    # --- connections and time ---------------------------------------------------------------------

    def lose(self) -> None:
        if self.up():
            broker = self.random.choice(self.up())
            self.blocked.discard(broker.index)
            broker.lose()

    def connect(self) -> None:
        for broker in self.world.brokers:
            if not broker.up and broker.index in self.world.sockets:
                self.blocked.discard(broker.index)
                broker.connect()

    def block(self) -> None:
        if self.up():
            broker = self.random.choice(self.up())
            self.blocked.add(broker.index)
            self.world.tell(events.SendBlocked(broker.index))

    def unblock(self) -> None:
        for index in sorted(self.blocked):
            if self.world.brokers[index].up:
                self.world.tell(events.SendUnblocked(index))
        self.blocked.clear()

    def wait(self) -> None:
        self.world.advance(self.random.choice([0.1, 1.0, 3.0, 12.0]))
        self.obey_cancels()


@pytest.mark.parametrize("seed", range(60))
def test_whatever_happens_texts_are_exact_and_slots_come_back(seed: int) -> None:
    life = Life(seed)
    life.run()
    life.finish()
    for _ in range(100):
        life.world.advance(1.0)
        life.connect()
        if sum(broker.free for broker in life.up()) == CAPACITY:
            break
    assert life.world.core.running == 0
    assert sum(broker.free for broker in life.up()) == CAPACITY
