"""Decides how many jobs there should be, and which. Must never touch Slurm, a socket or a clock.

`Fleet.decide` takes what the broker and Slurm report and returns what to do: submit jobs, cancel
those that still wait in Slurm's queue, drain workers that nobody needs; and a note for clients that
wait.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Final

AT_ONCE: Final = 4
"""Most jobs submitted at once: a mistake in the numbers must not flood a cluster."""
ENDED: Final = frozenset(
    ("COMPLETED", "CANCELLED", "FAILED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY")
)
FAILING_S: Final = 30.0
"""After a job that ended before its worker came, the next one waits for this long, which doubles
each time."""
FAILING_MOST_S: Final = 600.0


@dataclass(frozen=True, slots=True)
class Job:
    """A job as `squeue` shows it."""

    id: str
    #: PENDING, CONFIGURING, RUNNING, COMPLETING, ...
    state: str
    #: Why it is pending: Resources, Priority, ...
    reason: str = ""


@dataclass(frozen=True, slots=True)
class WorkerRow:
    """A worker as the broker shows it."""

    name: str
    state: str
    capacity: int
    running: int
    #: Seconds until it will be gone; None: no end is known.
    ends_in_s: float | None = None


@dataclass(frozen=True, slots=True)
class Sight:
    """What broker and Slurm say at one moment. `waiting` and `running` count requests."""

    now_s: float
    waiting: int
    running: int
    workers: tuple[WorkerRow, ...]
    jobs: tuple[Job, ...]


@dataclass(frozen=True, slots=True)
class Bounds:
    """The launcher's options."""

    least: int = 0
    most: int = 4
    #: Requests that one worker runs at once, until workers say their own number.
    slots: int = 8
    #: A worker that has had nothing to do for this long is ended.
    idle_s: float = 60.0
    #: A job with less time left needs a successor, if there is work for one.
    lead_s: float = 60.0


@dataclass(slots=True)
class Plan:
    """What to do."""

    submit: int = 0
    cancel: list[str] = field(default_factory=list)
    drain: list[str] = field(default_factory=list)
    note: str = ""


def worker_name(prefix: str, job: str) -> str:
    """The name of a job's worker on the bus."""
    return f"{prefix}-{job}"


class Fleet:
    """Remembers what one `Sight` does not show: since when workers are idle, and what failed."""

    def __init__(self, bounds: Bounds, prefix: str) -> None:
        self._bounds = bounds
        self._prefix = prefix
        self._idle_since_s: dict[str, float] = {}
        #: Jobs whose worker has come to the bus.
        self._came: set[str] = set()
        self._known: set[str] = set()
        self._failed = 0
        self._not_before_s = -math.inf
        self._drained: set[str] = set()

    def decide(self, sight: Sight) -> Plan:
        """Decide what to do now."""
        bounds, plan = self._bounds, Plan()
        rows = {row.name: row for row in sight.workers}
        jobs = [job for job in sight.jobs if job.state not in ENDED and job.state != "COMPLETING"]
        self._note_ends(sight, jobs, rows)
        slots = max((row.capacity for row in rows.values() if row.capacity), default=bounds.slots)
        others = sum(
            row.capacity
            for row in rows.values()
            if row.state == "ready" and not row.name.startswith(f"{self._prefix}-")
        )
        demand = sight.waiting + sight.running
        wanted = math.ceil(max(0, demand - others) / slots)
        wanted = min(bounds.most, max(bounds.least, wanted))
        lasting = [job for job in jobs if self._lasts(rows.get(worker_name(self._prefix, job.id)))]
        missing = wanted - len(lasting)
        # One that ends soon does not count: its successor must be there before it is gone.
        room = bounds.most - len(lasting)
        need = sight.waiting > 0 or len(lasting) < bounds.least or len(lasting) < len(jobs)
        if missing > 0 and need and sight.now_s >= self._not_before_s:
            plan.submit = max(0, min(missing, room, AT_ONCE))
        elif missing < 0:
            self._shrink(plan, sight, jobs, rows, -missing)
        self._idle(sight, rows)
        plan.note = self._note(jobs, rows, plan.submit, sight)
        return plan

    def _lasts(self, row: WorkerRow | None) -> bool:
        if row is None:
            return True
        if row.state == "draining" or row.name in self._drained:
            return False
        return row.ends_in_s is None or row.ends_in_s > self._bounds.lead_s

    def _note_ends(self, sight: Sight, jobs: list[Job], rows: dict[str, WorkerRow]) -> None:
        """Note jobs that ended before their workers came: the next ones are delayed."""
        here = {job.id for job in jobs}
        for job in here:
            if worker_name(self._prefix, job) in rows:
                self._came.add(job)
                self._failed = 0
        for job in self._known - here:
            if job not in self._came:
                wait_s = min(FAILING_MOST_S, FAILING_S * 2.0**self._failed)
                self._failed += 1
                self._not_before_s = sight.now_s + wait_s
        self._came &= here
        self._known = {job.id for job in jobs if job.state == "RUNNING" or job.id in self._known}
        self._drained &= rows.keys()

    def _shrink(
        self,
        plan: Plan,
        sight: Sight,
        jobs: list[Job],
        rows: dict[str, WorkerRow],
        surplus: int,
    ) -> None:
        """End what nobody needs: first jobs that have not begun, then idle workers."""
        if sight.waiting:
            return
        pending = [job.id for job in jobs if job.state == "PENDING"]
        plan.cancel = pending[len(pending) - min(surplus, len(pending)) :]
        # A cancelled job is not a failure.
        self._known -= set(plan.cancel)
        surplus -= len(plan.cancel)
        for job in jobs:
            name = worker_name(self._prefix, job.id)
            since_s = self._idle_since_s.get(name)
            if surplus <= 0 or since_s is None or name in self._drained or name not in rows:
                continue
            if sight.now_s - since_s >= self._bounds.idle_s:
                plan.drain.append(name)
                self._drained.add(name)
                surplus -= 1

    def _idle(self, sight: Sight, rows: dict[str, WorkerRow]) -> None:
        idle = {name for name, row in rows.items() if row.state == "ready" and not row.running}
        self._idle_since_s = {
            name: self._idle_since_s.get(name, sight.now_s) for name in sorted(idle)
        }

    def _note(
        self, jobs: list[Job], rows: dict[str, WorkerRow], submitted: int, sight: Sight
    ) -> str:
        """A note for waiting clients; empty if workers serve and only slots are missing."""
        starting = []
        for job in jobs:
            row = rows.get(worker_name(self._prefix, job.id))
            if row is not None and row.state == "ready":
                continue
            if job.state == "RUNNING":
                what = "loading" if row is not None else "starting"
                how = f"runs, its worker is {what}"
            else:
                how = job.state.lower() + (f" ({job.reason})" if job.reason else "")
            starting.append(f"job {job.id} {how}")
        if starting:
            more = f" and {len(starting) - 1} more" if len(starting) > 1 else ""
            return f"starting: {starting[0]}{more}"
        if submitted:
            return "starting: a job was submitted"
        if sight.waiting and sight.now_s < self._not_before_s:
            left_s = self._not_before_s - sight.now_s
            return f"jobs end before their workers come; next attempt in {left_s:.0f} s"
        return ""
