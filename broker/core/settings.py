"""Options of the core, each once: name, default, unit, reason; `broker.config` makes flags of them.

Plain data; the core never reads an environment or a file.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from broker.protocol.limits import (
    DEFAULT_WINDOW_TOKENS,
    MAX_ATTACHMENT_BYTES,
    MAX_ATTACHMENTS,
    MAX_ATTACHMENTS_BYTES,
    MAX_INTEGER,
    MAX_REQUEST_BYTES,
    MAX_SECONDS,
    MAX_WINDOW_TOKENS,
)


def option(default: Any, unit: str, reason: str, **more: Any) -> Any:
    """A dataclass field with the text that `--help` shows for it.

    `more` may contain `low` and `high` (bounds), `choices`, and `name` (it is one on the wire).
    """
    if isinstance(default, int | float) and not isinstance(default, bool):
        # Peers are told most of them: one beyond the wire's own bounds would end every session.
        more.setdefault("high", MAX_INTEGER if isinstance(default, int) else MAX_SECONDS)
    return field(default=default, metadata={"unit": unit, "reason": reason, **more})


@dataclass(frozen=True, slots=True, kw_only=True)
class CoreSettings:
    """Options of the core. The defaults suit one broker with a few hundred workers."""

    broker_name: str = option(
        "broker", "", "shown to peers in WELCOME and in bus.version", name=True
    )

    worker_heartbeat_s: float = option(
        1.0, "s", "a dead worker is found in heartbeat x liveness", low=0.01, high=3600
    )
    worker_liveness: int = option(
        5, "", "silent heartbeats until a worker is lost; 3 to 5 in PPP and MDP", low=1, high=1000
    )
    client_heartbeat_s: float = option(
        5.0, "s", "clients are many, and noticing a lost one late costs little", low=0.01, high=3600
    )
    client_liveness: int = option(
        3, "", "silent heartbeats until a client is lost", low=1, high=1000
    )

    max_clients: int = option(4096, "", "one file descriptor and about 30 kB each", low=1)
    max_workers: int = option(1024, "", "one file descriptor and about 30 kB each", low=1)
    inflight: int = option(
        1024, "", "requests of one client queued or running; a gateway is one client", low=1
    )

    queue_requests: int = option(
        4096, "", "per model; more would wait longer than people are willing to", low=1
    )
    queue_bytes: int = option(
        256 << 20, "bytes", "per model; images wait in the broker's memory", low=1
    )
    queue_total_bytes: int = option(1 << 30, "bytes", "all models together", low=1)
    queue_s: float = option(
        120.0, "s", "longest wait for a worker where the request names none (queue_ms)", low=0.001
    )
    ttl_s: float = option(
        3600.0, "s", "longest life of a request where it names none (ttl_ms)", low=0.001
    )
    model_grace_s: float = option(
        30.0,
        "s",
        "how long to wait for a model that nobody serves (yet, or any more); a worker's longest "
        "back-off",
        low=0,
    )
    placement: str = option(
        "least_loaded",
        "",
        "which free worker takes a request",
        choices=("least_loaded", "shortest_queue", "lottery", "affinity", "fastest_finish"),
    )

    orphan_grace_s: float = option(
        30.0,
        "s",
        "how long the requests of a vanished client live; as long as its longest back-off",
        low=0,
    )
    ended_keep_s: float = option(
        60.0, "s", "how long an ended request can be resumed; workers keep them as long", low=0
    )
    ended_keep: int = option(20_000, "", "ended requests remembered; about 1 kB each", low=0)
    settle_s: float = option(
        5.0, "s", "how long a new broker waits for the worker that still runs a request", low=0
    )
    poison_wait_s: float = option(
        15.0,
        "s",
        "before a request is called poison: its workers may only have lost connections and "
        "come back; half the time that they keep it",
        low=0,
    )
    stall_no_work_s: float = option(
        30.0, "s", "an engine without progress gets no new work; a long prefill is faster", low=0.01
    )
    stall_lost_s: float = option(
        120.0, "s", "a worker whose engine makes no progress is lost", low=0.01
    )
    move_s: float = option(
        15.0,
        "s",
        "how long before a worker's known end its streams begin to move to others",
        low=0,
    )
    preempt: bool = option(
        True,
        "",
        "where all slots are taken, a stream of lower priority gives way and goes on later",
    )
    preempt_floor_s: float = option(
        0.1,
        "s",
        "a stream gives way once it has made tokens for this long, and for as long as it has spent "
        "on beginning, in all its slots together",
        low=0,
    )
    preempt_again_s: float = option(
        0.1, "s", "a stream that gave way is left alone for this long", low=0
    )
    swap_factor: float = option(
        5.0,
        "",
        "a model that is loaded on demand keeps its turn for so many times what a load takes, "
        "while others wait",
        low=0.1,
    )
    drain_s: float = option(30.0, "s", "deadline of a drain that names none", low=0)

    window_tokens: int = option(
        DEFAULT_WINDOW_TOKENS,
        "tokens",
        "default window of a stream, sent in WELCOME",
        low=1,
        high=MAX_WINDOW_TOKENS,
    )
    request_bytes: int = option(
        MAX_REQUEST_BYTES,
        "bytes",
        "body of a request; at most the protocol's own bound",
        low=1024,
        high=MAX_REQUEST_BYTES,
    )
    attachment_bytes: int = option(
        MAX_ATTACHMENT_BYTES,
        "bytes",
        "one image; at most the protocol's own bound",
        low=0,
        high=MAX_ATTACHMENT_BYTES,
    )
    attachments_bytes: int = option(
        MAX_ATTACHMENTS_BYTES,
        "bytes",
        "all images of a request together",
        low=0,
        high=MAX_ATTACHMENTS_BYTES,
    )
    attachments: int = option(
        MAX_ATTACHMENTS, "", "images of a request", low=0, high=MAX_ATTACHMENTS
    )
