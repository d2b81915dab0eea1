"""Placement policies: which of the free workers takes a request. Pure functions, by name; one that
reckons with measured speed, and may let a request wait, is `finish`.

A policy is given workers that all serve the model and have credit, and must return one of them. It
must not change anything; randomness comes from the generator argument.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from hashlib import blake2b
from types import MappingProxyType
from typing import Final

from broker.core.records import RequestState, WorkerSession
from broker.protocol.messages import Message, Request, TextPart

PREFIX_CHARACTERS: Final = 4096
"""Length of the prompt's beginning that decides affinity: enough to distinguish system prompts,
cheap to hash."""

Policy = Callable[
    [RequestState, Sequence[WorkerSession], Sequence[WorkerSession], random.Random], WorkerSession
]
"""(request, workers with credit, all of the model, generator) → one of those with credit."""


def least_loaded(
    request: RequestState,
    free: Sequence[WorkerSession],
    serving: Sequence[WorkerSession],
    generator: random.Random,
) -> WorkerSession:
    """The worker with the smallest share of its slots in use; among equals, the
    least recently used."""
    # Written out: with a thousand workers, `min` with a key function would take twice as long.
    best, least = free[0], math.inf
    for worker in free:
        load = len(worker.running) / (worker.capacity or 1)
        if load < least or (load == least and worker.last_assigned < best.last_assigned):
            best, least = worker, load
    return best


def shortest_queue(
    request: RequestState,
    free: Sequence[WorkerSession],
    serving: Sequence[WorkerSession],
    generator: random.Random,
) -> WorkerSession:
    """FastChat's rule: queue length over speed."""
    return min(free, key=lambda worker: (len(worker.running) / worker.speed, worker.last_assigned))


def lottery(
    request: RequestState,
    free: Sequence[WorkerSession],
    serving: Sequence[WorkerSession],
    generator: random.Random,
) -> WorkerSession:
    """FastChat's other rule: at random, weighted by speed."""
    return generator.choices(free, weights=[worker.speed for worker in free])[0]


def affinity(
    request: RequestState,
    free: Sequence[WorkerSession],
    serving: Sequence[WorkerSession],
    generator: random.Random,
) -> WorkerSession:
    """Send prompts with the same beginning to the same worker while it has credit, so that its
    prefix cache is used; otherwise to the least loaded.

    Rendezvous hashing: it needs no table, and a worker that comes or goes moves only its own share.
    """
    if request.prefix_key:
        home = max(serving, key=lambda worker: _weight(request.prefix_key, worker.name))
        if any(worker is home for worker in free):
            return home
    return least_loaded(request, free, serving, generator)


def _weight(prefix_key: bytes, worker_name: str) -> bytes:
    return blake2b(worker_name.encode(), digest_size=8, key=prefix_key).digest()


def prefix_key(body: Request) -> bytes:
    """Digest of the beginning of a prompt: everything up to and including the first user turn, so
    that all turns of a conversation have the same digest."""
    digest = blake2b(body.model.encode(), digest_size=16)
    for piece in _beginning(body):
        digest.update(piece[:PREFIX_CHARACTERS].encode(errors="surrogatepass"))
        digest.update(b"\x00")
    return digest.digest()


def _beginning(body: Request) -> list[str]:
    if body.prompt is not None:
        return [body.prompt]
    if body.token_ids is not None:
        return [repr(body.token_ids[: PREFIX_CHARACTERS // 4])]
    pieces = []
    for message in body.messages or ():
        pieces.append(message.role)
        pieces.extend(_texts(message))
        if message.role == "user":
            break
    return pieces


def _texts(message: Message) -> list[str]:
    if isinstance(message.content, str):
        return [message.content]
    return [part.text for part in message.content or () if isinstance(part, TextPart)]


BY_PREFIX: Final = ("affinity", "fastest_finish")
"""Placements that look at the prompt's beginning."""

POLICIES: Final[Mapping[str, Policy]] = MappingProxyType(
    {
        "least_loaded": least_loaded,
        "shortest_queue": shortest_queue,
        "lottery": lottery,
        "affinity": affinity,
    }
)
