"""The phases of a request, from REQUEST until a minute after its end.

    REQUEST ─▶ QUEUED ─▶ RUNNING ─▶ ENDED ─▶ FORGOTTEN
                │  ▲         │
    client gone ▼  │ RESUME  ▼ worker gone
               PARKED     INTERRUPTED ─▶ FORGOTTEN

The diagram shows the main transitions, `MOVES` all of them. `RequestState.to` is the only way to
change the phase; a move that is not in the table is a bug in the broker. A RESUME that must be
queued makes a new `RequestState`, which inherits the story of the old one.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from types import MappingProxyType
from typing import Final


class Phase(StrEnum):
    """Where a request is."""

    #: Being checked; nothing else refers to it yet.
    NEW = "new"
    #: Waits in its model's queue.
    QUEUED = "queued"
    #: Was waiting when its client vanished; its age is kept for a RESUME, its body is not.
    PARKED = "parked"
    #: A worker has it (`attach` or a spent credit) and has not reported that it left its slot.
    RUNNING = "running"
    #: Left its slot; the worker still keeps its events for a RESUME.
    ENDED = "ended"
    #: Its worker is gone and its client was told. Only its age is kept, for the RESUME.
    INTERRUPTED = "interrupted"
    #: In no table any more; the operator's history may still show it.
    FORGOTTEN = "forgotten"


MOVES: Final[Mapping[Phase, frozenset[Phase]]] = MappingProxyType(
    {
        # A worker that comes (back) brings along the requests that it runs or has finished.
        Phase.NEW: frozenset((Phase.QUEUED, Phase.RUNNING, Phase.ENDED)),
        # Interrupted because the broker stops: the next broker will queue it.
        Phase.QUEUED: frozenset((Phase.RUNNING, Phase.PARKED, Phase.INTERRUPTED, Phase.FORGOTTEN)),
        Phase.PARKED: frozenset((Phase.RUNNING, Phase.ENDED, Phase.FORGOTTEN)),
        # From RUNNING to RUNNING: a RESUME attached another session, at another epoch.
        Phase.RUNNING: frozenset((Phase.RUNNING, Phase.ENDED, Phase.INTERRUPTED, Phase.FORGOTTEN)),
        # A RESUME asks for the end again, and the request is open until then. Or its END, which
        # still waited for the window, was lost with the worker.
        Phase.ENDED: frozenset((Phase.RUNNING, Phase.INTERRUPTED, Phase.FORGOTTEN)),
        Phase.INTERRUPTED: frozenset((Phase.RUNNING, Phase.ENDED, Phase.FORGOTTEN)),
        Phase.FORGOTTEN: frozenset(),
    }
)
"""The phases to which a request may move from each phase."""

Move = tuple[float, Phase, int, str]
"""(time on the broker's clock in seconds, phase, epoch, name of its latest worker or empty). A
plain tuple, because every request makes several and they are hardly ever read."""


class IllegalMoveError(Exception):
    """A request attempted a move that `MOVES` does not allow; the message is its story."""
