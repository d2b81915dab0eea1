"""Deliberate bugs, to test the simulation. Each mutant breaks one line of a core, and the
simulation must notice every one.

A mutant is a text replacement in the source of one function, which is recompiled and replaces the
original while the mutant is active. If the text is not found, the mutant fails: the code has
changed, and the mutant must follow.
"""

from __future__ import annotations

import contextlib
import inspect
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import worker.core.credit
import worker.core.requests
import worker.core.streams
import worker.process.shelf
from broker.core import (
    admission,
    controller,
    endings,
    membership,
    recovery,
    sharing,
    suspicion,
    swapping,
)
from broker.core.controller import BrokerCore
from broker.core.state import BusState
from client.core.exchange import Exchange
from client.core.requests import Requests as ClientRequests
from tests.simulation import plan as plans
from tests.simulation.plan import FAULTS

_HANDLERS: tuple[dict[Any, Any], ...] = (controller._FROM_CLIENT, controller._FROM_WORKER)


@dataclass(frozen=True, slots=True)
class Mutant:
    """One bug."""

    name: str
    owner: Any
    function: str
    right: str
    wrong: str
    #: The kinds of faults that reveal it.
    kinds: tuple[str, ...] = FAULTS
    brokers: tuple[int, ...] = (1,)
    models: tuple[int, ...] = (1,)
    #: The first seed to run: near one that reveals it, for rare conditions.
    start: int = 0

    @contextlib.contextmanager
    def alive(self) -> Iterator[None]:
        """Run with the bug in the code."""
        original = inspect.getattr_static(self.owner, self.function)
        is_property = isinstance(original, property)
        plain = original.fget if is_property else original
        changed = _rewritten(plain, self.right, self.wrong)
        setattr(self.owner, self.function, property(changed) if is_property else changed)
        replaced = [
            (table, key) for table in _HANDLERS for key, value in table.items() if value is original
        ]
        for table, key in replaced:
            table[key] = changed
        try:
            yield
        finally:
            setattr(self.owner, self.function, original)
            for table, key in replaced:
                table[key] = original


def _rewritten(function: Any, right: str, wrong: str) -> Any:
    source = textwrap.dedent(inspect.getsource(function))
    found = source.count(right)
    if found != 1:
        raise LookupError(f"{function.__qualname__} contains {right!r} {found} times")
    code = compile(
        "from __future__ import annotations\n" + source.replace(right, wrong),
        f"<mutant of {function.__qualname__}>",
        "exec",
    )
    made: dict[str, Any] = {}
    exec(code, function.__globals__, made)
    return made[function.__name__]


_Requests = worker.core.requests.Requests
_Stream = worker.core.streams.Stream
_Pool = worker.core.credit.CreditPool

MUTANTS = (
    # --- the client -------------------------------------------------------------------------------
    Mutant(
        "the client accepts events of an older epoch",
        ClientRequests,
        "on_output",
        "event.epoch != exchange.epoch or ",
        "",
        ("odd_output", "cut_client"),
    ),
    Mutant(
        "the client accepts events at any offset",
        Exchange,
        "accept",
        "event.offset != have",
        "False",
        ("odd_output",),
    ),
    Mutant(
        "the client ignores INTERRUPTED",
        ClientRequests,
        "on_interrupted",
        "exchange = self.exchanges.get(request_id)",
        "return",
        plans.WORKER_DEATH,
    ),
    Mutant(
        "a RESUME forgets the tokens received",
        Exchange,
        "body",
        "token_ids=self.token_ids",
        "token_ids=[]",
        plans.CLIENT_CONNECTION,
    ),
    Mutant(
        "a RESUME miscounts the characters received",
        Exchange,
        "body",
        "text_characters=self.text_characters",
        "text_characters=max(0, self.text_characters - 1)",
        plans.CLIENT_CONNECTION,
    ),
    Mutant(
        "a RESUME does not count the characters of thoughts and calls",
        Exchange,
        "accept",
        "sum([len(piece.text) for piece in event.pieces])",
        "len(event.text)",
        plans.WORKER_DEATH,
    ),
    Mutant(
        "the client blames every worker that interrupts",
        ClientRequests,
        "on_interrupted",
        "interrupted.lost and ",
        "",
        plans.DRAIN,
    ),
    Mutant(
        "the client does not resume after a lost session",
        ClientRequests,
        "session_over",
        "self._recover(exchange, error, reconnecting=True)",
        "self.at_broker.add(exchange.id)",
        ("cut_client",),
    ),
    Mutant(
        "the client never sends its window",
        ClientRequests,
        "taken",
        "self._send(MessageType.WINDOW",
        "len or (MessageType.WINDOW",
        (),
    ),
    Mutant(
        "an ended request counts as in flight",
        ClientRequests,
        "_forget",
        "self.at_broker.discard(exchange.id)",
        "pass",
        ("drop",),
    ),
    # --- the broker -------------------------------------------------------------------------------
    Mutant(
        "the broker attaches a RESUME of an older epoch",
        recovery,
        "_resume",
        "facts.epoch <= existing.epoch",
        "facts.epoch < 0",
        ("stray", "cut_client"),
    ),
    Mutant(
        "the broker ignores a worker's sequence numbers",
        BrokerCore,
        "_on_message",
        "head.sequence != session.expected",
        "False",
        ("garble_worker",),
    ),
    Mutant(
        "a queued request never expires",
        admission,
        "on_queue_timer",
        "request.phase is not Phase.QUEUED",
        "True",
        (),
    ),
    Mutant(
        "a full queue accepts more",
        admission,
        "is_full",
        "crowded\n",
        "False\n",
        ("burst",),
    ),
    Mutant(
        "a cancelled request stays in the queue",
        endings,
        "_close",
        "bus.release(request)",
        "pass",
        ("drop", "burst"),
    ),
    Mutant(
        "a vanished client's request stays in the queue",
        endings,
        "orphan",
        "bus.release(request)",
        "pass",
        ("cut_client", "burst"),
    ),
    Mutant(
        "a finished request still counts for its client",
        BrokerCore,
        "_finish",
        "request.client.requests.pop(request.id, None)",
        "pass",
        (),
    ),
    Mutant(
        "orphans are never cancelled",
        endings,
        "_end_orphan",
        'cancel(bus, request, "its client did not come back")',
        "pass",
        ("kill_client",),
    ),
    Mutant(
        "routes outlive their client",
        endings,
        "drop_client",
        "bus.remove_route(route)",
        "pass",
        ("cut_client",),
    ),
    Mutant(
        "a superseded session keeps the request",
        recovery,
        "_detach_old_client",
        "old.requests.pop(request.id, None)",
        "pass",
        ("cut_client", "unplug_client"),
    ),
    Mutant(
        "a suspect shares its worker",
        BrokerCore,
        "_on_output",
        "suspicion.on_started(self, request)",
        "request.alone = False",
        ("kill_worker", "kill_engine"),
    ),
    Mutant(
        "a worker reserved for a suspect stays reserved",
        BusState,
        "free_cell",
        "cell.alone = None",
        "pass",
        ("kill_worker", "kill_engine"),
    ),
    Mutant(
        "a request is poison after two deaths",
        suspicion,
        "_proved",
        "len(request.lost_alone) >= VERDICT_ALONE",
        "len(request.lost_workers) >= 2",
        ("cut_worker", "kill_worker"),
        start=285,
    ),
    Mutant(
        "no client is told that the worker is gone",
        endings,
        "interrupt",
        "if client is not None:",
        "if client is not None and False:",
        plans.WORKER_DEATH,
    ),
    Mutant(
        "a heartbeat makes a worker ready",
        BrokerCore,
        "_on_worker_heartbeat",
        "self._grant(worker, beat.granted)",
        "self._grant(worker, beat.granted + (beat.state is WorkerState.READY))",
        (),
    ),
    Mutant(
        "a silent peer is never declared dead",
        membership,
        "watch",
        ">= session.dead_at_s",
        ">= 1e9",
        ("unplug_worker", "unplug_client"),
    ),
    Mutant(
        "a window is not passed on",
        BrokerCore,
        "_on_window",
        "request.worker is not None",
        "False",
        (),
    ),
    Mutant(
        "a broker does not report its waiting requests",
        sharing,
        "demand",
        "return sum(",
        "return 0 * sum(",
        ("kill_broker", "cut_client"),
        (2,),
    ),
    # --- the worker -------------------------------------------------------------------------------
    Mutant(
        "a cancelled job keeps its slot",
        _Requests,
        "_engine_event",
        "del self._jobs[job_id]",
        "self._jobs.pop(job_id) if fields[0] != 'cancelled' else None",
        ("drop",),
    ),
    Mutant(
        "a freed slot is granted twice",
        _Pool,
        "distribute",
        "taker.granted += 1",
        "taker.granted += 1 + (taker.granted > 4)",
        (),
    ),
    Mutant(
        "returned credit is ignored",
        _Pool,
        "heard",
        "account.returned = returned",
        "pass",
        (),
        (2,),
    ),
    Mutant(
        "an idle broker keeps its credit",
        _Pool,
        "recall",
        "spare = min(need, -account.wanted)",
        "spare = 0",
        ("kill_broker", "cut_client"),
        (2,),
    ),
    Mutant(
        "a resumed stream is sent from its start",
        _Stream,
        "attach",
        "self.sent = self.attached_at = count",
        "self.sent = self.attached_at = 0",
        plans.CLIENT_CONNECTION,
    ),
    Mutant(
        "a resumed stream's text starts at the wrong character",
        _Stream,
        "attach",
        "rest = characters - self.base_characters",
        "rest = characters",
        (*plans.WORKER_DEATH, "cut_client"),
    ),
    Mutant(
        "the text that was sent is sent again after a RESUME",
        _Stream,
        "attach",
        "piece += 1",
        "break",
        ("cut_client",),
    ),
    Mutant(
        "END overtakes tokens that wait for the window",
        _Stream,
        "send_ready",
        "return limit == total",
        "pass",
        (),
    ),
    Mutant(
        "tokens leave without a window",
        _Requests,
        "stepped",
        "and count <= stream.window",
        "",
        (),
    ),
    Mutant(
        "ended requests are kept forever",
        _Requests,
        "_fire",
        "stream.kept_since_s + self._kept_s <= when_s",
        "False",
        (),
    ),
    Mutant(
        "requests of a lost session are forgotten",
        _Requests,
        "orphan",
        "stream.orphaned_s = now_s",
        "self.abandon(stream)",
        ("cut_worker",),
    ),
    # --- thoughts and calls -----------------------------------------------------------------------
    Mutant(
        "texts of different kinds that waited become one",
        worker.core.streams,
        "_joined",
        "joined[-1][0] == kind and ",
        "",
        (),
    ),
    Mutant(
        "after a RESUME it is not shown that the answer is split",
        _Stream,
        "attach",
        "self.started = self.end_sent = self.shows_kinds = False",
        "self.started = self.end_sent = False",
        ("cut_client",),
    ),
    # --- models on demand -------------------------------------------------------------------------
    Mutant(
        "a swap is never over",
        swapping,
        "changed",
        "if swap.model in loaded:",
        "if False:",
        (),
        models=(2, 3),
    ),
    Mutant(
        "what ran on an engine that died beside others is forgotten",
        worker.process.shelf.Shelf,
        "_failed_jobs",
        "failed.append(engine_events.failed(job_id, error))",
        "pass",
        ("kill_engine",),
        models=(3,),
    ),
    Mutant(
        "a slot of a model that all its slots had filled is not used again",
        BrokerCore,
        "_finish",
        "self.dirty.add(request.model)",
        "pass",
        (),
        brokers=(2,),
        models=(2, 3),
    ),
    Mutant(
        "the shelf ends a process that has work",
        worker.process.shelf.Shelf,
        "load",
        "if any(e.busy if model else e.jobs for e in leaving):",
        "if False:",
        FAULTS + plans.ORDERS,
        brokers=(2,),
        models=(2, 3),
    ),
)
