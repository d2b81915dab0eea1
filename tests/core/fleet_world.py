"""A broker and workers of unlike speed, with a clock: how long requests take, and where they go."""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from broker.protocol import codec
from broker.protocol.header import MessageType
from broker.protocol.messages import (
    Params,
    WorkerState,
)
from tests.core.broker_facts import Bus, Message, WorkerPeer

PATIENT: dict[str, Any] = {"client_liveness": 10_000, "worker_liveness": 10_000, "queue_s": 1e6}


@dataclass(frozen=True)
class Gpu:
    """A worker's true speed, which the broker has to find out."""

    name: str
    token_s: float
    #: For each token of a prompt.
    prefill_s: float
    slots: int = 2
    #: Whether it holds the prompts of earlier requests.
    caches: bool = False
    #: For each prefill, whatever its length.
    begin_s: float = 0.0


FAST = Gpu("fast", token_s=0.01, prefill_s=0.0005)
SLOW = Gpu("slow", token_s=0.1, prefill_s=0.005)


class Fleet:
    """A broker, workers of given speed, and a clock. Slots of a worker do not slow each other."""

    def __init__(self, placement: str, gpus: Sequence[Gpu] = (FAST, SLOW), **settings: Any) -> None:
        self.bus = Bus(placement=placement, **(PATIENT | settings))
        self.client = self.bus.client()
        self.gpus = {gpu.name: gpu for gpu in gpus}
        self.peers: dict[str, WorkerPeer] = {}
        self._gone: dict[bytes, tuple[str, Message]] = {}
        #: Tokens that streams had when they were moved.
        self._had: dict[bytes, int] = {}
        for gpu in gpus:
            self.peers[gpu.name] = self.bus.worker(gpu.name, slots=gpu.slots)
        #: Prompt tokens and answer tokens by request.
        self.sizes: dict[bytes, tuple[int, int]] = {}
        self.where: dict[bytes, str] = {}
        self.asked_s: dict[bytes, float] = {}
        self.first_s: dict[bytes, float] = {}
        self.ended_s: dict[bytes, float] = {}
        self.moves = 0
        #: Peers read what the broker told them this often, at least.
        self.look_s = 2.0
        #: The worker that alone takes requests; empty: all do.
        self.only = ""
        self._seen: dict[str, set[str]] = {gpu.name: set() for gpu in gpus}
        self._bodies: dict[bytes, dict[str, Any]] = {}
        #: Running requests: worker, tokens that they came with, and when their first token was.
        self._runs: dict[bytes, tuple[str, Message, int, float | None]] = {}
        self._due: list[tuple[float, int, str, bytes, int]] = []
        self._count = itertools.count()

    def ask(
        self,
        answer: int,
        prompt: int = 20,
        text: str = "",
        *,
        known: bool = True,
        priority: int = 0,
    ) -> bytes:
        """A request. `known`: its `max_tokens` is the length of its answer."""
        text = text or f"{next(self._count)} " + "x" * (4 * prompt)
        body: dict[str, Any] = {
            "prompt": text,
            "params": Params(max_tokens=answer) if known else Params(),
            "priority": priority,
        }
        request = self.client.request(**body)
        self.asked_s[request] = self.bus.now_s
        self.sizes[request], self._bodies[request] = (prompt, answer), body
        self._read()
        return request

    def _read(self) -> None:
        """What the broker told everybody."""
        came = True
        while came:
            came = False
            for message in self.client.receive():
                if message.type is MessageType.INTERRUPTED:
                    came = True
                    self.moves += 1
                    name, assign, had, begun_s = self._runs.pop(message.id)
                    done = had
                    if begun_s is not None:
                        ran_s = self.bus.now_s - begun_s
                        done += 1 + int(ran_s / self.gpus[name].token_s)
                    self._gone[message.id] = name, assign
                    self._had[message.id] = done
                    epoch = assign.assign.epoch + 1
                    self.client.resume(message.id, epoch, tokens=done, **self._bodies[message.id])
            for name, peer in self.peers.items():
                for message in peer.receive():
                    came = True
                    if message.type is MessageType.ASSIGN:
                        self._begin(name, message)
                    elif message.type is MessageType.CANCEL:
                        self._leave(message.id)

    def _begin(self, name: str, assign: Message) -> None:
        gpu = self.gpus[name]
        prompt, _ = self.sizes[assign.id]
        had = len(codec.unpack(assign.frames[2], 1 << 20).get("resume", {}).get("token_ids", ()))
        text = self._bodies[assign.id]["prompt"]
        if gpu.caches and text in self._seen[name]:
            prompt = 1
        self._seen[name].add(text)
        self.where[assign.id] = name
        self._runs[assign.id] = name, assign, had, None
        self._later(gpu.begin_s + (prompt + had) * gpu.prefill_s, "begin", assign)

    def _leave(self, request: bytes) -> None:
        """A worker stops a stream that was moved away."""
        name, assign = self._gone.pop(request)
        self.peers[name].stopped(request, assign.assign.reply_to)

    def _later(self, after_s: float, what: str, assign: Message) -> None:
        entry = (self.bus.now_s + after_s, next(self._count), what, assign.id, assign.assign.epoch)
        heapq.heappush(self._due, entry)

    def run(self, until_s: float = math.inf) -> None:
        """Time goes on until all have ended, or until then."""
        while self._due and self._due[0][0] <= until_s:
            due_s, _, what, request, epoch = heapq.heappop(self._due)
            while self.bus.now_s < due_s:
                self._wait(due_s)
            name, assign, had, _ = self._runs.get(request, ("", None, 0, None))
            if assign is None or assign.assign.epoch != epoch:
                continue  # it moved
            peer, (prompt, answer) = self.peers[name], self.sizes[request]
            if what == "begin":
                self._runs[request] = name, assign, had, self.bus.now_s
                self.first_s.setdefault(request, self.bus.now_s)
                peer.first_token(assign, had)
                left = max(0, answer - had - 1)
                self._later(left * self.gpus[name].token_s, "end", assign)
            else:
                del self._runs[request]
                peer.finish(assign, prompt=prompt, tokens=answer, outcome="length")
                self.ended_s[request] = self.bus.now_s
            self._read()
        while self.bus.now_s < until_s < math.inf:
            self._wait(until_s)

    def _wait(self, until_s: float) -> None:
        self.bus.wait(min(self.look_s, until_s - self.bus.now_s))
        self.beat()

    def made(self, request: bytes) -> int:
        """Tokens of its answer so far."""
        if request in self.ended_s:
            return self.sizes[request][1]
        name, _, had, begun_s = self._runs.get(request, ("", None, 0, None))
        if not name or begun_s is None:
            return self._had.get(request, had)
        return had + 1 + int((self.bus.now_s - begun_s) / self.gpus[name].token_s)

    def beat(self) -> None:
        """Heartbeats of all workers."""
        for name, peer in self.peers.items():
            hits = {"prefix_hit_tokens": 1.0} if self.gpus[name].caches else {}
            away = self.only not in ("", name)
            state = WorkerState.LOADING if away else WorkerState.READY
            peer.beat(state=state, metrics=hits)
        self._read()

    def learn(self) -> None:
        """Answers at each worker, from which its speed is known; alone, one after the other."""
        for name in self.peers:
            for prompt in (20, 400, 100, 800, 20, 200):
                self.only = name
                self.beat()
                self.ask(30, prompt)
                self.run()
        self.only = ""
        self.beat()
        assert set(self.where.values()) == set(self.peers)

    def shortest_s(self, requests: Sequence[bytes]) -> float:
        """No schedule takes less: all slots busy all the time, each request split at will between
        them; and the longest request at the fastest worker."""
        gpus = self.gpus.values()

        def takes_s(request: bytes, gpu: Gpu) -> float:
            prompt, answer = self.sizes[request]
            return prompt * gpu.prefill_s + (answer - 1) * gpu.token_s

        fastest = min(gpus, key=lambda gpu: gpu.token_s)
        work_s = sum(takes_s(request, fastest) for request in requests)
        power = sum(gpu.slots * fastest.token_s / gpu.token_s for gpu in gpus)
        return max(work_s / power, max(takes_s(request, fastest) for request in requests))
