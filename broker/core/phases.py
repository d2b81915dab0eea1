"""The life of a request, from REQUEST to a minute after its end.

    REQUEST ─▶ QUEUED ─▶ RUNNING ─▶ ENDED ─▶ FORGOTTEN
                │  ▲         │
    client gone ▼  │ RESUME  ▼ worker gone
               PARKED     INTERRUPTED ─▶ FORGOTTEN

The picture shows the main ways, `MOVES` all of them. `RequestState.to` is the only way to another
phase, and a move that is not in the table is a bug of the broker. A RESUME that must be queued
makes a new `RequestState`, which takes over the story of the old one.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from types import MappingProxyType
from typing import Final


class Phase(StrEnum):
    """Where a request is."""

    #: Is being looked at: nobody else knows it yet.
    NEW = "new"
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
    #: In no table any more; the operator's history may still show it.
    FORGOTTEN = "forgotten"


MOVES: Final[Mapping[Phase, frozenset[Phase]]] = MappingProxyType(
    {
        # A worker that comes (back) brings along what it runs and what it has finished.
        Phase.NEW: frozenset((Phase.QUEUED, Phase.RUNNING, Phase.ENDED)),
        # Interrupted where the broker stops: the next one will queue it.
        Phase.QUEUED: frozenset((Phase.RUNNING, Phase.PARKED, Phase.INTERRUPTED, Phase.FORGOTTEN)),
        Phase.PARKED: frozenset((Phase.RUNNING, Phase.ENDED, Phase.FORGOTTEN)),
        # From RUNNING to RUNNING: a RESUME attached another session, at another epoch.
        Phase.RUNNING: frozenset((Phase.RUNNING, Phase.ENDED, Phase.INTERRUPTED, Phase.FORGOTTEN)),
        # A RESUME has the end sent again; until then it is open. Or its END, which still waited for
        # the window, was lost with the worker.
        Phase.ENDED: frozenset((Phase.RUNNING, Phase.INTERRUPTED, Phase.FORGOTTEN)),
        Phase.INTERRUPTED: frozenset((Phase.RUNNING, Phase.ENDED, Phase.FORGOTTEN)),
        Phase.FORGOTTEN: frozenset(),
    }
)
"""Where a request may go from each phase."""

Move = tuple[float, Phase, int, str]
"""(time on the broker's clock in seconds, phase, epoch, name of the worker that it was at last or
empty). A plain tuple: every request makes some, and hardly anybody reads them."""


class IllegalMoveError(Exception):
    """A request was to go where `MOVES` does not let it; the message is its story."""
