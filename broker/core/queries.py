"""Answers to QUERY: the state of the bus, and the operator's verbs (SPEC.md section 10)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, Final, TypeVar

import msgspec

from broker.core import endings, exposition, failed_loads, shutdown, swapping
from broker.core.events import Frames
from broker.core.instructions import ReloadAccess
from broker.core.phases import Phase
from broker.core.records import ClientSession, RequestState, WorkerSession
from broker.core.state import BusState
from broker.protocol import codec, limits
from broker.protocol.errors import ErrorCode, ErrorInfo, ProtocolError, RequestError
from broker.protocol.header import Header, MessageType
from broker.protocol.messages import Answer, Continuation, ModelInfo, Query, Refuse

T = TypeVar("T")

_OPERATOR_VERBS: Final = frozenset(
    (
        "bus.drain",
        "bus.expect",
        "bus.hold",
        "bus.release",
        "bus.load",
        "bus.unload",
        "bus.shutdown",
        "bus.reload",
    )
)
_EXPECTED: Final = 256
"""Models that are expected at once."""
REPORTS: Final = 3
REPORTS_S: Final = 60.0
"""How many workers one client may have cut off in this time: a hostile client must not
empty the bus."""
_ANSWER_DELAY_S: Final = 0.05
"""A shutdown begins this long after its ANSWER, so that the answer leaves first."""


class _RequestsArgs(msgspec.Struct, frozen=True):
    limit: int = 100


class _DrainArgs(msgspec.Struct, frozen=True):
    worker: str
    deadline_ms: int | None = None
    reason: str = "drained by the operator"


class _WorkerArgs(msgspec.Struct, frozen=True):
    worker: str


class _LoadArgs(msgspec.Struct, frozen=True):
    worker: str
    model: str


class _UnloadArgs(msgspec.Struct, frozen=True):
    worker: str
    #: Empty: whatever is loaded.
    model: str = ""


class _ShutdownArgs(msgspec.Struct, frozen=True):
    deadline_ms: int | None = None


class _ReportArgs(msgspec.Struct, frozen=True):
    sequence: int
    why: str = ""


class _ExpectArgs(msgspec.Struct, frozen=True):
    models: list[str]
    note: str = ""
    ttl_ms: int = 30_000


class _NoArgs(msgspec.Struct, frozen=True):
    pass


def answer(bus: BusState, client: ClientSession, head: Header, frames: Frames) -> None:
    """Answer a QUERY. Raises ProtocolError for a malformed body."""
    if len(frames) != 2:
        raise ProtocolError(f"{len(frames)} frames; QUERY has 2")
    query = codec.decode(Query, frames[1], limits.MAX_CONTROL_BYTES)
    bus.counters["queries"] += 1
    try:
        body = codec.encode(Answer(result=_result(bus, client, query)))
        if len(body) > limits.MAX_ANSWER_BYTES:
            raise RequestError(
                ErrorCode.TOO_LARGE,
                f"the answer has {len(body)} bytes; the limit is {limits.MAX_ANSWER_BYTES}",
            )
    except RequestError as error:
        body = codec.encode(Answer(error=error.info))
    bus.send(client, MessageType.ANSWER, head.id, body)


def _result(bus: BusState, client: ClientSession, query: Query) -> Any:
    if query.verb == "bus.report":
        return _report(bus, client, _args(query, _ReportArgs))
    verb = _VERBS.get(query.verb)
    if verb is None:
        known = ", ".join(_VERBS)
        raise RequestError(
            ErrorCode.INVALID_REQUEST, f"unknown verb {query.verb[:100]!r}; known verbs: {known}"
        )
    if query.verb in _OPERATOR_VERBS and not client.operator:
        raise RequestError(
            ErrorCode.FORBIDDEN, f"{query.verb} needs an operator's key; this session has none"
        )
    args_type, act = verb
    return act(bus, _args(query, args_type))


def _args(query: Query, args_type: type[T]) -> T:
    try:
        return codec.convert(query.args, args_type)
    except ProtocolError as error:
        raise RequestError(ErrorCode.INVALID_REQUEST, f"args of {query.verb}: {error}") from None


def _version(bus: BusState, _: _NoArgs) -> dict[str, Any]:
    return {
        "broker": bus.settings.broker_name,
        "software": bus.software,
        "protocol": limits.PROTOCOL_VERSION,
    }


def _models(bus: BusState, _: _NoArgs) -> list[dict[str, Any]]:
    return [_model(bus, name) for name in sorted(bus.registry.models())]


def _model(bus: BusState, name: str) -> dict[str, Any]:
    workers = list(bus.registry.serving(name).values())
    infos = [worker.models[name] for worker in workers]
    queue = bus.queues.get(name)
    known = [info.context_tokens for info in infos if info.context_tokens is not None]
    return {
        "name": name,
        "kinds": [*infos[0].kinds, *infos[0].further_kinds],
        "images": any(info.images for info in infos),
        "context_tokens": min(known, default=None),
        "workers": len(workers),
        "ready": sum(worker.state_name == "ready" for worker in workers),
        "capacity": sum(worker.capacity for worker in workers),
        "running": sum(
            request.model == name for worker in workers for request in worker.running.values()
        ),
        "queued": queue.requests if queue else 0,
        "details": _details(infos),
        "serial": next((info.serial for info in infos if info.serial), ""),
        "resume": weakest(info.resume for info in infos),
    }


def _failed_loads(bus: BusState, _: _NoArgs) -> list[dict[str, Any]]:
    return [
        {
            "model": model,
            "cause": cause,
            "retry_in_ms": None if again_s == math.inf else round(1000 * again_s),
        }
        for model, cause, again_s in failed_loads.unserved(bus)
    ]


def weakest(names: Iterable[str]) -> str:
    """Of several kinds of `Continuation`, the one that promises least."""
    order = list(Continuation)
    known = [Continuation(name) if name in order else Continuation.TEXT for name in names]
    return max(known, key=order.index, default=Continuation.EXACT).value


def _details(infos: list[ModelInfo]) -> dict[str, Any]:
    return next((info.details for info in infos if info.details), {})


def _workers(bus: BusState, _: _NoArgs) -> list[dict[str, Any]]:
    return [_worker(bus, worker) for worker in bus.workers.values()]


def _worker(bus: BusState, worker: WorkerSession) -> dict[str, Any]:
    beat = worker.beat
    return {
        "name": worker.name,
        "models": list(worker.models),
        "state": worker.state_name,
        "capacity": worker.capacity,
        "granted": worker.granted,
        "assigned": worker.assigned + worker.returned,
        "running": len(worker.running),
        "waiting": beat.waiting,
        "engine": worker.engine,
        "device": worker.device,
        "via": worker.via,
        "progress": beat.progress,
        "note": beat.note,
        "engine_age_ms": beat.engine_age_ms,
        "silent_ms": round(worker.silent_s(bus.now_s) * 1000),
        "metrics": beat.metrics,
        "serial": {info.name: info.serial for info in worker.models.values() if info.serial},
        "numbers": {
            info.name: str(info.details["numbers"])
            for info in worker.models.values()
            if info.details.get("numbers")
        },
        "loaded": [info.name for info in worker.models.values() if info.loaded],
        "memory_bytes": {
            info.name: info.memory_bytes for info in worker.models.values() if info.memory_bytes
        },
        "swap": worker.swap.model if worker.swap is not None else None,
        "ends_in_ms": _ends_in_ms(bus, worker),
        "ends_why": worker.end_why,
    }


def _ends_in_ms(bus: BusState, worker: WorkerSession) -> int | None:
    if worker.ends_s == math.inf:
        return None
    return max(0, round((worker.ends_s - bus.now_s) * 1000))


def _clients(bus: BusState, _: _NoArgs) -> list[dict[str, Any]]:
    return [
        {
            "name": client.name,
            "inflight": len(client.requests),
            "queued": sum(entry.phase is Phase.QUEUED for entry in client.requests.values()),
            "silent_ms": round(client.silent_s(bus.now_s) * 1000),
        }
        for client in bus.clients.values()
    ]


def stats(bus: BusState) -> dict[str, float]:
    """Counters and gauges by name, from the core's state."""
    gauges: dict[str, float] = {
        "uptime_s": bus.now_s - bus.started_s,
        "clients": len(bus.clients),
        "workers": len(bus.workers),
        "models": sum(1 for _ in bus.registry.models()),
        "queued": sum(queue.requests for queue in bus.queues.values()),
        "queued_bytes": bus.queued_bytes,
        "running": sum(len(worker.running) for worker in bus.workers.values()),
        "granted_free": sum(max(0, worker.free) for worker in bus.workers.values()),
        "capacity": sum(worker.capacity for worker in bus.workers.values()),
        "requests_known": len(bus.requests),
        "routes": len(bus.routes),
    }
    counters = {f"{name}_total": count for name, count in sorted(bus.counters.items())}
    return gauges | counters | {f"loop_{name}": n for name, n in bus.loop_figures.items()}


def _stats(bus: BusState, _: _NoArgs) -> dict[str, float]:
    return stats(bus)


def _metrics(bus: BusState, _: _NoArgs) -> dict[str, str]:
    return {"content_type": exposition.CONTENT_TYPE, "text": exposition.text(bus)}


def _requests(bus: BusState, args: _RequestsArgs) -> list[dict[str, Any]]:
    live = [
        request
        for request in bus.requests.values()
        if request.phase not in (Phase.ENDED, Phase.INTERRUPTED)
    ]
    latest = sorted([*bus.history, *live], key=lambda request: request.queued_s, reverse=True)
    return [_request(bus, request) for request in latest[: max(0, min(args.limit, 1000))]]


def _request(bus: BusState, request: RequestState) -> dict[str, Any]:
    over_s = request.ended_s if request.ended_s is not None else bus.now_s
    queued = request.phase is Phase.QUEUED
    left_queue_s = request.assigned_s if request.assigned_s is not None else over_s
    return {
        "id": request.id[:4].hex(),
        "model": request.model,
        "kind": request.kind,
        "state": "ended" if request.ended_s is not None else request.phase.value,
        "outcome": request.outcome,
        "cause": request.cause,
        "worker": request.worker_name,
        "resumed": request.epoch > 0,
        "priority": request.priority,
        "age_ms": round((bus.now_s - request.queued_s) * 1000),
        "queued_ms": round((left_queue_s - request.queued_s) * 1000),
        "position": request.position if queued else None,
        "starts_in_ms": _ms_left(request.expects_s, bus.now_s - request.told_at_s)
        if queued
        else None,
        "took_ms": round((over_s - request.queued_s) * 1000),
        "cancelled": request.cancelled,
    }


def _ms_left(expects_s: float | None, since_s: float) -> int | None:
    return None if expects_s is None else max(0, round((expects_s - since_s) * 1000))


def _named(bus: BusState, name: str) -> list[WorkerSession]:
    """The workers with that name. Raises `RequestError` if there are none."""
    workers = [worker for worker in bus.workers.values() if worker.name == name]
    if not workers:
        names = ", ".join(sorted({worker.name for worker in bus.workers.values()})[:10]) or "none"
        raise RequestError(
            ErrorCode.INVALID_REQUEST, f"there is no worker {name[:100]!r}; connected: {names}"
        )
    return workers


def _hold(bus: BusState, args: _WorkerArgs) -> dict[str, Any]:
    for worker in _named(bus, args.worker):
        worker.held = True
    # Bounded: only the names of workers that were connected are kept.
    bus.held.add(args.worker)
    return {"worker": args.worker, "state": "held"}


def _release(bus: BusState, args: _WorkerArgs) -> dict[str, Any]:
    if args.worker not in bus.held:
        _named(bus, args.worker)  # releasing a worker that was not held is no error
    bus.held.discard(args.worker)
    for worker in bus.workers.values():
        if worker.name != args.worker:
            continue
        if worker.draining:
            raise RequestError(
                ErrorCode.INVALID_REQUEST,
                f"worker {args.worker[:100]} is leaving and cannot be kept: start it again "
                "(a worker that is held, and not drained, stays)",
            )
        worker.held = False
        bus.dirty.update(worker.models)
    return {"worker": args.worker, "state": "released"}


def _drain(bus: BusState, args: _DrainArgs) -> dict[str, Any]:
    workers = _named(bus, args.worker)
    deadline_s = bus.settings.drain_s if args.deadline_ms is None else args.deadline_ms / 1000
    for worker in workers:
        shutdown.drain_worker(bus, worker, min(max(deadline_s, 0.0), 1e6), args.reason[:200])
    return {"worker": args.worker, "state": "draining"}


def _load(bus: BusState, args: _LoadArgs) -> dict[str, Any]:
    (worker,) = _named(bus, args.worker)[:1]
    info = worker.models.get(args.model)
    if info is None:
        raise _no_such_model(bus, worker, args.model)
    if not info.loaded:
        swapping.ask(bus, worker, args.model)
    state = "loaded" if info.loaded else "loading"
    return {"worker": args.worker, "model": args.model, "state": state}


def _unload(bus: BusState, args: _UnloadArgs) -> dict[str, Any]:
    (worker,) = _named(bus, args.worker)[:1]
    if args.model and args.model not in worker.models:
        raise _no_such_model(bus, worker, args.model)
    if not any(info.load_ms for info in worker.models.values()):
        raise RequestError(
            ErrorCode.INVALID_REQUEST,
            f"worker {args.worker[:100]} does not load models on demand (--models)",
        )
    going = swapping.ask_unload(bus, worker, args.model)
    return {"worker": args.worker, "model": ", ".join(going), "state": "unloading"}


def _no_such_model(bus: BusState, worker: WorkerSession, model: str) -> RequestError:
    names = sorted(worker.models)
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    failed = bus.failed_loads.get(model, {}).get(worker.name)
    if failed is not None:
        return RequestError(
            ErrorCode.INVALID_REQUEST,
            f"worker {worker.name[:100]} cannot load model {model[:100]!r}: {failed.cause}",
        )
    return RequestError(
        ErrorCode.INVALID_REQUEST,
        f"worker {worker.name[:100]} has no model {model[:100]!r}; it has "
        + ", ".join(names[:10])
        + more,
    )


def _shutdown(bus: BusState, args: _ShutdownArgs) -> dict[str, Any]:
    grace_s = bus.settings.drain_s if args.deadline_ms is None else args.deadline_ms / 1000
    grace_s = min(max(grace_s, 0.0), 1e6)
    bus.at(
        bus.now_s + _ANSWER_DELAY_S,
        lambda bus, _: shutdown.begin(bus, grace_s, "the operator stops this broker"),
        None,
    )
    return {}


def _reload(bus: BusState, _: _NoArgs) -> dict[str, Any]:
    bus.instruct(ReloadAccess())
    return {}


def _expect(bus: BusState, args: _ExpectArgs) -> dict[str, Any]:
    """Somebody starts workers of these models where requests wait, and says how far that is."""
    until_s = bus.now_s + min(max(args.ttl_ms, 0), 3_600_000) / 1000
    for name in args.models[:_EXPECTED]:
        if len(bus.expected) >= _EXPECTED:
            bus.expected = {m: s for m, s in bus.expected.items() if s > bus.now_s}
        if name in bus.expected or len(bus.expected) < _EXPECTED:
            bus.expected[name] = until_s
            bus.notes[name] = (args.note[:200], until_s)
    bus.notes = {name: note for name, note in bus.notes.items() if name in bus.expected}

    def waiting(model: str) -> int:
        queue = bus.queues.get(model)
        return queue.requests if queue else 0

    workers = bus.workers.values()
    return {
        "waiting": {model: waiting(model) for model in args.models},
        "running": {
            model: sum(r.model == model for w in workers for r in w.running.values())
            for model in args.models
        },
        "workers": [
            {
                "name": worker.name,
                "models": list(worker.models),
                "state": worker.state_name,
                "capacity": worker.capacity,
                "running": len(worker.running),
                "ends_in_ms": _ends_in_ms(bus, worker),
            }
            for worker in workers
        ],
    }


def _report(bus: BusState, client: ClientSession, args: _ReportArgs) -> dict[str, Any]:
    """A client received a malformed OUTPUT: the worker that sent it is cut off."""
    worker = client.source(args.sequence)
    if worker is None:
        raise RequestError(
            ErrorCode.INVALID_REQUEST,
            f"message {args.sequence} of this session did not come from a worker, or is too long "
            "ago",
        )
    if bus.now_s >= bus.reports_until_s:
        bus.reports.clear()
        bus.reports_until_s = bus.now_s + REPORTS_S
    who = client.key or client.name
    bus.reports[who] += 1
    if bus.reports[who] > REPORTS:
        bus.log("warning", "report ignored", client, worker=worker.name, why="too many reports")
        raise RequestError(
            ErrorCode.QUOTA, f"more than {REPORTS} reports of this client within {REPORTS_S:g} s"
        )
    bus.counters["workers_cut_off"] += 1
    if bus.workers.get(worker.routing_id) is worker:
        why = args.why[:200]
        bus.log("warning", "worker cut off", worker, reported_by=client.name, why=why)
        error = ErrorInfo(
            code=ErrorCode.PROTOCOL_ERROR, message=f"client {client.name} reports its output: {why}"
        )
        endings.end_session(
            bus, worker, "its output was reported by a client", farewell=Refuse(error=error)
        )
    return {"worker": worker.name}


_VERBS: Final[dict[str, tuple[type[Any], Callable[[BusState, Any], Any]]]] = {
    "bus.version": (_NoArgs, _version),
    "bus.models": (_NoArgs, _models),
    "bus.failed_loads": (_NoArgs, _failed_loads),
    "bus.workers": (_NoArgs, _workers),
    "bus.clients": (_NoArgs, _clients),
    "bus.stats": (_NoArgs, _stats),
    "bus.metrics": (_NoArgs, _metrics),
    "bus.requests": (_RequestsArgs, _requests),
    "bus.drain": (_DrainArgs, _drain),
    "bus.expect": (_ExpectArgs, _expect),
    "bus.hold": (_WorkerArgs, _hold),
    "bus.release": (_WorkerArgs, _release),
    "bus.load": (_LoadArgs, _load),
    "bus.unload": (_UnloadArgs, _unload),
    "bus.shutdown": (_ShutdownArgs, _shutdown),
    "bus.reload": (_NoArgs, _reload),
}
