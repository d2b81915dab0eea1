"""The model's correct answer to a prompt, and what an application's call saw of it."""

from __future__ import annotations

import functools
import hashlib
import math
from dataclasses import dataclass, field
from typing import Any

from broker.protocol.messages import Kind, Question, Request
from client.errors import BusError

EMBEDDING = {"embeddings": [[0.5, 0.25]]}
DECISIONS = {"answers": {"right": {"type": "noul", "noul": 0.75}}}


def result_of(prompt: str) -> tuple[Kind, dict[str, Any]]:
    """The kind of a request that is answered as a whole, and its answer; every other one is a
    decision."""
    if hashlib.blake2b(prompt.encode()).digest()[0] % 2:
        return Kind.DECIDE, DECISIONS
    return Kind.EMBED, EMBEDDING


def whole_request(prompt: str) -> dict[str, Any]:
    """The fields of the `Request` for that answer."""
    kind, _ = result_of(prompt)
    if kind is Kind.DECIDE:
        return {"kind": kind, "state": prompt, "questions": {"right": Question(type="noul")}}
    return {"kind": kind, "inputs": [prompt]}


@dataclass(frozen=True, slots=True)
class Answer:
    """The model's answer to a prompt, which depends only on prompt, seed and position."""

    prompt: str
    seed: int
    length: int
    #: The token at which the engine fails, and whether that happens only once.
    fails_at: int | None = None
    fails_once: bool = False
    #: What dies at that token: the engine process ("engine") or the whole worker ("worker").
    kills: str = ""

    @classmethod
    def of(cls, request: Request) -> Answer:
        """The answer to a request as it arrived over the wire."""
        if request.kind is Kind.EMBED:
            assert request.inputs is not None
            return cls(str(request.inputs[0]), 0, 0)
        if request.kind is Kind.DECIDE:
            return cls(str(request.state), 0, 0)
        assert request.prompt is not None and request.params.max_tokens is not None
        _, fails_at, how = request.prompt.split("|")
        return cls(
            request.prompt,
            request.params.seed,
            request.params.max_tokens,
            int(fails_at) if fails_at else None,
            how == "once",
            how if how in ("engine", "worker") else "",
        )

    def token(self, position: int) -> int:
        return _tokens(self.prompt, self.seed, self.length)[position]

    def sure_until(self, count: int) -> int:
        """How many of the first `count` tokens have certain text: every fifth id is half a
        character."""
        while count and self.token(count - 1) % 5 == 0:
            count -= 1
        return count

    def text(self, count: int) -> str:
        """The text of the first `count` tokens."""
        return _texts(self.prompt, self.seed, self.length)[count]


@functools.lru_cache(maxsize=256)
def _tokens(prompt: str, seed: int, length: int) -> list[int]:
    data = hashlib.shake_128(f"{prompt}/{seed}".encode()).digest(2 * length)
    return [int.from_bytes(data[2 * i : 2 * i + 2]) % 5000 for i in range(length)]


@functools.lru_cache(maxsize=256)
def _texts(prompt: str, seed: int, length: int) -> list[str]:
    texts = [""]
    for token in _tokens(prompt, seed, length):
        texts.append(texts[-1] + f"{token} ")
    return texts


@dataclass(slots=True)
class Call:
    """One request of an application, and everything that it saw."""

    request_id: bytes
    answer: Answer
    #: Whether it is answered as a whole, without tokens.
    whole: bool
    priority: int
    #: Seconds that the application needs to read a token; 0 reads at once.
    read_s: float
    #: The application's time limits, seconds.
    total_s: float | None = None
    queue_s: float | None = None
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    made_s: float = 0.0
    ended_s: float = 0.0
    #: When it was last queued; its longest time in the queue.
    queued_s: float = math.inf
    waited_s: float = 0.0
    #: When it was last interrupted; its longest time from there to a worker or the end.
    lost_s: float = math.inf
    away_s: float = 0.0
    #: It runs at a worker that has sent nothing yet; how often it was interrupted like this.
    begun: bool = False
    unheard: int = 0
    #: Workers that its client counts as lost while they ran it.
    blamed: set[str] = field(default_factory=set)
    dropped: bool = False
    #: Its client was killed.
    gone: bool = False
    #: "end", or the code of the error.
    outcome: str = ""
    error: BusError | None = None
    result: Any = None
    resumed: int = 0
    #: How often it was preempted by a request of higher priority.
    gave_way: int = 0

    @property
    def name(self) -> str:
        return self.request_id.hex()[:8]
