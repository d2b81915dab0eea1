"""Measured speed: how long a request still needs, at a worker or anywhere.

Observed are requests that ended well: the time to their first token, the time between tokens, the
length of their answers. A worker that has ended none yet is taken to be as fast as its model is
elsewhere, or as its engine reports. Estimates only: nothing may become wrong by a bad one, only
late.

State and arithmetic; no rules (`ends`, `preemption` and `waiting` decide by it).
"""

from __future__ import annotations

from typing import Final

from broker.core.records import RequestState, WorkerSession
from broker.core.speed import ModelSpeed, Speed
from broker.core.state import BusState
from broker.protocol.messages import Finished, FinishReason, Kind

MAX_MODELS: Final = 256
"""Models whose speed is remembered; each took a worker that served it."""
HIGH: Final = 2.0
"""Mean deviations above the mean: an answer is hardly ever longer than that (RFC 6298 takes 4 for
its time-out, where a mistake costs more)."""
MAX_PREFIXES: Final = 256
"""Beginnings of prompts that a worker is taken to hold: as many conversations."""
STREAMED: Final = frozenset((Kind.CHAT.value, Kind.COMPLETE.value))
_WELL: Final = frozenset((FinishReason.STOP.value, FinishReason.LENGTH.value))


def observe(bus: BusState, worker: WorkerSession, request: RequestState, ended: Finished) -> None:
    """A request has left its slot at this worker."""
    if ended.outcome not in _WELL or request.assigned_s is None:
        return
    speeds = [worker.speeds.setdefault(request.model, Speed())]
    model = bus.speeds.get(request.model)
    if model is None and len(bus.speeds) < MAX_MODELS:
        model = bus.speeds[request.model] = ModelSpeed()
    if model is not None:
        speeds.append(model)
    if request.kind not in STREAMED:
        for speed in speeds:
            speed.whole(bus.now_s - request.assigned_s)
        return
    if model is not None:
        model.answered(ended.completion_tokens, request.most_tokens)
    if request.started_s is None:
        return
    fresh = ended.completion_tokens - request.offset
    for speed in speeds:
        speed.began(request.fresh_tokens, request.started_s - request.assigned_s)
        if fresh > 1:
            speed.stepped((bus.now_s - request.started_s) / (fresh - 1))


def token_s(bus: BusState, model: str, worker: WorkerSession | None) -> float | None:
    """Time between two tokens of a stream, seconds; None if nothing is known."""
    if worker is not None:
        own = worker.speeds.get(model)
        if own is not None and own.token_s is not None:
            return own.token_s
        metrics = worker.beat.metrics
        rate = metrics.get("tokens_per_s", 0.0)
        batch = metrics.get("batch") or metrics.get("running", 0.0)
        if rate > 0 and batch > 0:
            return batch / rate
    anywhere = bus.speeds.get(model)
    return None if anywhere is None else anywhere.token_s


def fresh_tokens(request: RequestState, worker: WorkerSession | None) -> float:
    """Tokens of its prompt that the worker must compute, roughly: without a beginning that it holds
    since an earlier request, if its engine is known to use such."""
    prompt = request.prompt_guess + request.offset
    if worker is None or not worker.beat.metrics.get("prefix_hit_tokens"):
        return prompt
    held = worker.prefixes.get(request.prefix_key, 0.0) if request.prefix_key else 0.0
    return max(1.0, prompt - held)


def begins_at(request: RequestState, worker: WorkerSession) -> None:
    """The worker computes its prompt now, and holds it for a while."""
    request.fresh_tokens = fresh_tokens(request, worker)
    if request.prefix_key:
        held = worker.prefixes
        held[request.prefix_key] = request.prompt_guess + request.offset
        held.move_to_end(request.prefix_key)
        if len(held) > MAX_PREFIXES:
            held.popitem(last=False)


def begin_s(
    bus: BusState,
    request: RequestState,
    worker: WorkerSession | None,
    *,
    extra_tokens: float = 0.0,
) -> float:
    """Time from ASSIGN to the first token, seconds; 0 if nothing is known. `extra_tokens`: to
    compute beside the prompt."""
    own = worker.speeds.get(request.model) if worker is not None else None
    fresh = fresh_tokens(request, worker) + extra_tokens
    for speed in (own, bus.speeds.get(request.model)):
        seconds = speed.begin.at(fresh) if speed is not None else None
        if seconds is not None:
            return seconds
    return 0.0


def done_tokens(bus: BusState, request: RequestState) -> float:
    """Tokens of its answer so far, those from earlier runs included. The broker does not read
    streams, so it reckons them from the time."""
    worker, started_s = request.worker, request.started_s
    each_s = token_s(bus, request.model, worker)
    if worker is None or started_s is None or each_s is None:
        return request.offset
    return request.offset + (bus.now_s - started_s) / max(each_s, 1e-6)


def needs_s(
    bus: BusState, request: RequestState, worker: WorkerSession | None, *, high: bool = True
) -> float | None:
    """How long the request still needs at this worker (where it may run already), or at any,
    seconds. `high`: hardly ever longer; otherwise as is to be expected. None: nothing is known."""
    model = bus.speeds.get(request.model)
    if request.kind not in STREAMED:
        own = worker.speeds.get(request.model) if worker is not None else None
        for speed in (own, model):
            if speed is not None and speed.whole_s is not None:
                return speed.whole_s
        return None
    each_s = token_s(bus, request.model, worker)
    runs = worker is not None and request.worker is worker and request.started_s is not None
    done = done_tokens(bus, request) if runs else request.offset
    begins_s = 0.0 if runs else begin_s(bus, request, worker)
    length: float | None = request.most_tokens
    if model is not None and not high:
        left = model.left(request.most_tokens, done)
    else:
        if model is not None:
            length = model.length(request.most_tokens, HIGH)
        left = None if length is None else max(1.0, length - done)
    if each_s is None or left is None:
        return None
    return begins_s + left * each_s
