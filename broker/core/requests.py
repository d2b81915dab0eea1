"""A request as the broker knows it, from REQUEST to a minute after its end.

State only; the transitions are the controller's:

    REQUEST ─▶ QUEUED ─▶ RUNNING ─▶ ENDED ─▶ (forgotten)
                │  ▲         │
    client gone ▼  │ RESUME  ▼ worker gone
               PARKED     INTERRUPTED ─▶ (forgotten)
"""

from __future__ import annotations

import math
from enum import Enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from broker.core.sessions import ClientSession
    from broker.core.workers import Route, WorkerSession


class Phase(Enum):
    """Where a request is."""

    #: Waits in its model's queue.
    QUEUED = "queued"
    #: Waited when its client vanished; its age is kept for a RESUME, its body is not.
    PARKED = "parked"
    #: A worker has it (`attach` or a spent credit) and has not said that it left its slot.
    RUNNING = "running"
    #: Left its slot; the worker still keeps its events for a RESUME.
    ENDED = "ended"
    #: Its worker is gone and its client was told. Only its age is kept, for the RESUME.
    INTERRUPTED = "interrupted"


class RequestState:
    """One request. The body is held only while it is queued."""

    __slots__ = (
        "admitted",
        "alone",
        "assigned_s",
        "cancelled",
        "cause",
        "cell",
        "client",
        "deaths",
        "diverted",
        "end_held",
        "ended_s",
        "epoch",
        "epoch_before",
        "frames",
        "holder",
        "id",
        "keep_until_s",
        "kind",
        "lost_alone",
        "lost_workers",
        "model",
        "offset",
        "order",
        "orphan_until_s",
        "outcome",
        "phase",
        "prefix_key",
        "priority",
        "queue_until_s",
        "queued_s",
        "returned",
        "size_bytes",
        "started_s",
        "suspect_until_s",
        "ttl_until_s",
        "user_key",
        "window",
        "window_told",
        "worker",
        "worker_name",
    )

    def __init__(self, request_id: bytes, model: str, phase: Phase, now_s: float) -> None:
        self.id = request_id
        self.model = model
        self.kind = ""
        self.phase = phase
        #: Who gets its output; None: an orphan (its client vanished, or a worker brought it along).
        self.client: ClientSession | None = None
        #: Where it runs or ended; None while it is queued.
        self.worker: WorkerSession | None = None
        #: Outlives the worker's session, for the operator's list.
        self.worker_name = ""
        self.epoch = 0
        #: The one before, if the same worker was told of both: it may know only that.
        self.epoch_before: int | None = None
        #: Tokens that the client already has (RESUME).
        self.offset = 0
        #: Whose turn it takes in the queue.
        self.user_key = ""
        self.priority = 0
        #: Age: lower came earlier. Kept when the request is resumed.
        self.order = 0
        #: Body and attachments as the client sent them; empty once assigned.
        self.frames: tuple[bytes, ...] = ()
        self.size_bytes = 0
        #: It was let in before (it waited here, or a worker had it): only memory can refuse it now.
        self.admitted = False
        #: Highest window told by the client.
        self.window = 0
        #: The window that stands in the body; where it moved meanwhile, WINDOW follows ASSIGN.
        self.window_told = 0
        #: Workers that were lost while they ran it, as often, less those that came back with it.
        self.lost_workers: tuple[str, ...] = ()
        #: Those of them that ran nothing else.
        self.lost_alone: tuple[str, ...] = ()
        #: How many of the lost workers are surely dead: they said so.
        self.deaths = 0
        #: Lost workers that came back with it, as often, of which the client was not told yet.
        self.returned: tuple[str, ...] = ()
        #: It is suspected and waits so long for lost workers to come back; None: it does not.
        self.suspect_until_s: float | None = None
        #: It is suspected: it runs alone next, or does so now.
        self.alone = False
        #: The worker that is kept for it alone.
        self.cell: WorkerSession | None = None
        #: The worker that ran it last and may still have it, by the client's word; empty: none.
        self.holder = ""
        #: Of the affinity placement: equal for prompts that start alike.
        self.prefix_key = b""
        #: CANCEL was passed on to the worker.
        self.cancelled = False
        self.outcome = ""
        #: Why it failed, for the operator's list.
        self.cause = ""
        #: It left its slot, but its END waits at the worker until the client's window opens.
        self.end_held = False
        #: Routes of earlier owners on which its events are held back.
        self.diverted: list[Route] = []
        self.queued_s = now_s
        self.queue_until_s = math.inf
        self.ttl_until_s = math.inf
        self.orphan_until_s = math.inf
        #: When a request that is over is forgotten; moved on while somebody still reads its end.
        self.keep_until_s = -math.inf
        self.assigned_s: float | None = None
        self.started_s: float | None = None
        self.ended_s: float | None = None
