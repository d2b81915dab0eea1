"""The life of a request, from REQUEST to a minute after its end:

REQUEST ─▶ QUEUED ─▶ RUNNING ─▶ ENDED ─▶ (forgotten)
            │  ▲         │
client gone ▼  │ RESUME  ▼ worker gone
           PARKED     INTERRUPTED ─▶ (forgotten)
"""

from __future__ import annotations

from enum import Enum


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
