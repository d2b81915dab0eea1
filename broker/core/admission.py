"""Admission of requests: checks the body, once (SPEC.md sections 4.2, 6.1 and 9), then whether
there is room in the queue and any prospect of an answer. Then queues the request.

Bytes in; out comes a typed value, or a `RequestError` whose message names the field.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from typing import Final

from broker.core import dispatch, endings, failed_loads, fairness, placement, shutdown, waiting
from broker.core.events import Frames
from broker.core.instructions import Log
from broker.core.phases import Phase
from broker.core.queue import ModelQueue
from broker.core.records import ClientSession, RequestState, short
from broker.core.settings import CoreSettings
from broker.core.state import BusState
from broker.protocol import decisions
from broker.protocol.codec import check_free_forms, decode, unpack
from broker.protocol.errors import ErrorCode, ErrorInfo, ProtocolError, RequestError
from broker.protocol.header import Header
from broker.protocol.messages import (
    TEXT_IDS,
    FailEvent,
    ImagePart,
    Kind,
    Message,
    Request,
    VideoPart,
)

INPUTS: Final[dict[Kind, tuple[str, ...]]] = {
    Kind.CHAT: ("messages",),
    Kind.COMPLETE: ("prompt", "token_ids"),
    Kind.COUNT: ("messages", "prompt", "token_ids"),
    Kind.TOKENIZE: ("prompt", "messages"),
    Kind.DETOKENIZE: ("token_ids",),
    Kind.TEMPLATE: ("messages",),
    Kind.EMBED: ("inputs",),
    Kind.DECIDE: ("questions",),
    Kind.RERANK: ("pairs",),
    Kind.CLASSIFY: ("inputs", "pairs"),
}
"""Inputs that each kind accepts; exactly one of them must be given."""

_ALL_INPUTS: Final = ("messages", "prompt", "token_ids", "inputs", "pairs", "questions")


def read_request(
    body: bytes, attachments: tuple[bytes, ...], *, resumed: bool, settings: CoreSettings
) -> Request:
    """Decode and check a request. Raises `RequestError` (invalid_request or too_large)."""
    _check_sizes(body, attachments, settings)
    try:
        request = decode(Request, body, settings.request_bytes)
        check_free_forms(request)
    except ProtocolError as error:
        raise _invalid(f"the request cannot be read: {error}") from None
    if resumed and request.resume is None:
        raise _invalid("a RESUME must carry `resume`: the epoch, and what was received so far")
    if not resumed and request.resume is not None:
        raise _invalid("a REQUEST must not carry `resume`; RESUME does")
    _check_input(request)
    _check_attachments(request, len(attachments))
    if request.kind is Kind.DECIDE:
        decisions.check(request)
    return request


def resume_facts(body: bytes, settings: CoreSettings) -> tuple[int, int]:
    """Epoch and offset of a body that may be malformed, so that its FAIL reaches the right
    stream."""
    try:
        resume = unpack(body, settings.request_bytes)["resume"]
        epoch, tokens = resume["epoch"], resume.get("token_ids", ())
    except (ProtocolError, KeyError, TypeError, AttributeError):
        return 0, 0
    offset = len(tokens) if isinstance(tokens, list) else 0
    return (epoch if isinstance(epoch, int) and 0 <= epoch < 1 << 63 else 0), offset


def _check_sizes(body: bytes, attachments: tuple[bytes, ...], settings: CoreSettings) -> None:
    if len(body) > settings.request_bytes:
        raise _too_large("body", len(body), settings.request_bytes)
    if len(attachments) > settings.attachments:
        raise RequestError(
            ErrorCode.TOO_LARGE,
            f"{len(attachments)} attachments; this broker takes {settings.attachments}",
            details={"limit": settings.attachments},
        )
    for index, attachment in enumerate(attachments):
        if len(attachment) > settings.attachment_bytes:
            raise _too_large(f"attachment {index}", len(attachment), settings.attachment_bytes)
    total = sum(map(len, attachments))
    if total > settings.attachments_bytes:
        raise _too_large("attachments together", total, settings.attachments_bytes)


def _check_input(request: Request) -> None:
    if request.kind is not Kind.DECIDE and (request.state is not None or request.assets):
        raise _invalid(f"kind {request.kind.value} takes no `state` and no `assets`; decide does")
    allowed = INPUTS[request.kind]
    given = [name for name in _ALL_INPUTS if getattr(request, name) is not None]
    if len(given) == 1 and given[0] in allowed:
        return
    expected = " or ".join(f"`{name}`" for name in allowed)
    got = " and ".join(f"`{name}`" for name in given) or "none"
    raise _invalid(f"kind {request.kind.value} takes exactly one input, {expected}; got {got}")


def _check_attachments(request: Request, frames: int) -> None:
    described = len(request.attachments)
    if described != frames:
        raise _invalid(
            f"`attachments` describes {described} attachments, but {frames} frames came with it"
        )
    for index, message in enumerate(request.messages or ()):
        for attachment in _indices(message):
            if attachment >= described:
                raise _invalid(
                    f"messages[{index}] shows attachment {attachment}, but there are {described}"
                )


def _indices(message: Message) -> Iterator[int]:
    if not isinstance(message.content, list):
        return
    for part in message.content:
        if isinstance(part, ImagePart):
            yield part.attachment
        elif isinstance(part, VideoPart):
            yield from part.attachments


def _invalid(message: str) -> RequestError:
    return RequestError(ErrorCode.INVALID_REQUEST, message)


def _too_large(what: str, size: int, limit: int) -> RequestError:
    return RequestError(
        ErrorCode.TOO_LARGE,
        f"{what}: {size} bytes; this broker takes {limit}",
        details={"size": size, "limit": limit},
    )


def admit(bus: BusState, client: ClientSession, request: RequestState) -> None:
    """Raises RequestError when there is no room, or no prospect of an answer."""
    if bus.shutdown_until_s is not None:
        raise shutdown.draining_error()
    if request.ttl_until_s <= bus.now_s:
        raise RequestError(ErrorCode.DEADLINE_EXCEEDED, "the request arrived with no time left")
    if len(client.requests) >= bus.settings.inflight:
        raise RequestError(
            ErrorCode.QUOTA,
            f"{len(client.requests)} requests of this client are queued or running, "
            f"the most that this broker allows; wait for one to end",
            retryable=True,
            retry_after_ms=retry_after_ms(bus, request.model),
            details={"limit": bus.settings.inflight},
        )
    check_model(bus, request)
    queue = bus.queues.get(request.model)
    if queue is None:
        queue = ModelQueue(bus.shares_of(request.model))
    while is_full(bus, queue, request):
        # Longest queue drop: the user with the most waiting requests makes room, so that nobody can
        # fill the queue for all others (Suter et al., "Buffer management schemes", 1999).
        victim = queue.longest_line(request.priority)
        mine = queue.waiting(request.priority, request.user_key)
        if victim is None or victim[0] == request.user_key:
            raise overloaded(bus, request)
        theirs = queue.waiting(victim[1].priority, victim[0])
        if victim[1].priority == request.priority and theirs <= mine + 1:
            raise overloaded(bus, request)
        endings.fail(bus, victim[1], overloaded(bus, victim[1]).info)


def is_full(bus: BusState, queue: ModelQueue, request: RequestState) -> bool:
    settings = bus.settings
    crowded = queue.requests >= settings.queue_requests and not request.admitted
    return (
        crowded
        or queue.bytes + request.size_bytes > settings.queue_bytes
        or bus.queued_bytes + request.size_bytes > settings.queue_total_bytes
    )


def overloaded(bus: BusState, request: RequestState) -> RequestError:
    return RequestError(
        ErrorCode.OVERLOADED,
        f"the queue of model {request.model} is full; send the request again later",
        retryable=True,
        retry_after_ms=retry_after_ms(bus, request.model),
    )


def check_model(bus: BusState, request: RequestState) -> None:
    """Refuse a request for a model that nobody serves, unless a worker may come (back) for it."""
    model = request.model
    failed = failed_loads.error_of(bus, model, begun=request.epoch > 0)
    if failed is not None:
        raise failed
    if bus.registry.serving(model) or not any(bus.registry.models()) or request.epoch > 0:
        return
    again_s = failed_loads.offered_again_s(bus, model)
    if max(bus.expected.get(model, -math.inf), again_s) > bus.now_s:
        return
    gone_s = bus.registry.gone_s(model)
    if gone_s is None or gone_s + bus.settings.model_grace_s <= bus.now_s:
        raise endings.model_unavailable(bus, model, retryable=gone_s is not None)


def retry_after_ms(bus: BusState, model: str) -> int:
    """Estimate, from observed service times, when there should be room in the model's queue."""
    queue = bus.queues.get(model)
    slots = sum(worker.capacity for worker in bus.registry.serving(model).values())
    rounds = ((queue.requests if queue else 0) + 1) / max(slots, 1)
    return round(1000 * min(60.0, max(0.1, rounds * bus.service_s.get(model, 1.0))))


def read_body(
    bus: BusState, client: ClientSession, head: Header, frames: Frames, *, resumed: bool
) -> Request:
    """The checked body of REQUEST or RESUME. Raises RequestError."""
    if head.id[0] == 0:
        raise RequestError(ErrorCode.INVALID_REQUEST, "a request id must not begin with zero")
    return read_request(frames[1], frames[2:], resumed=resumed, settings=bus.settings)


def fail_unqueued(
    bus: BusState, client: ClientSession, head: Header, frames: Frames, error: RequestError
) -> None:
    """Answer a request that is not queued."""
    epoch, offset = resume_facts(frames[1], bus.settings)
    bus.counters["requests_refused"] += 1
    bus.count_failure(error.info)
    bus.figures.refused(error.info.code)
    bus.send_events(client, FailEvent(head.id, epoch, offset, error.info))
    bus.instruct(
        Log(
            "info",
            "request refused",
            {"request": short(head.id), "client": client.name, "code": error.info.code},
        )
    )


def _workers_of(bus: BusState, model: str) -> str:
    states = Counter(worker.state_name for worker in bus.registry.serving(model).values())
    counts = ", ".join(f"{count} {state}" for state, count in sorted(states.items()))
    return f"workers of {model[:100]}: {counts or 'none'}"


def enqueue(
    bus: BusState, client: ClientSession, request: RequestState, body: Request, frames: Frames
) -> None:
    """Put a request into its model's queue, from which `dispatch` takes it. `frames`: body and
    attachments. Raises RequestError when it cannot be queued."""
    request.client = client
    request.kind = body.kind.value
    request.priority = body.priority
    request.user_key = f"user {body.user}" if body.user else f"session {client.id.hex()}"
    request.window = request.window_sent = body.window
    request.most_tokens = body.params.max_tokens
    request.frames = frames
    request.size_bytes = sum(map(len, frames))
    if body.resume is not None:
        request.epoch = body.resume.epoch
        request.offset = len(body.resume.token_ids)
        request.carries_text = bool(request.offset) and body.resume.token_ids[-1] >= TEXT_IDS
        request.holder = body.resume.holder
    if bus.settings.placement in placement.BY_PREFIX:
        request.prefix_key = placement.prefix_key(body)
    queue_s = bus.settings.queue_s if body.queue_ms is None else body.queue_ms / 1000
    ttl_s = bus.settings.ttl_s if body.ttl_ms is None else body.ttl_ms / 1000
    if body.queue_ms is None and request.preempted_s > -math.inf:
        queue_s = math.inf  # it has waited its turn before, and gave it up for others
    request.queue_until_s = bus.now_s + queue_s
    request.ttl_until_s = bus.now_s + ttl_s
    admit(bus, client, request)
    request.to(Phase.QUEUED, bus.now_s)
    bus.requests[request.id] = request
    client.requests[request.id] = request
    queue = bus.queues.get(request.model)
    if queue is None:
        queue = bus.queues[request.model] = ModelQueue(bus.shares_of(request.model))
    fairness.expect(bus, request)
    queue.add(request)
    bus.queued_bytes += request.size_bytes
    bus.counters["requests"] += 1
    bus.counters["request_bytes"] += request.size_bytes
    bus.dirty.add(request.model)
    dispatch.run(bus)
    if request.phase is Phase.QUEUED and bus.requests.get(request.id) is request:
        bus.at(min(request.queue_until_s, request.ttl_until_s), on_queue_timer, request)
        if not bus.registry.serving(request.model):
            grace_s = bus.settings.model_grace_s
            bus.at(bus.now_s + grace_s, endings.on_model_grace, request.model)
        if dispatch.awaits_worker(bus, request):
            settled_s = bus.started_s + bus.settings.settle_s
            bus.at(settled_s, dispatch.on_settled, request.model)
        refuse_hopeless(bus, request, body)
    if request.phase is Phase.QUEUED and bus.requests.get(request.id) is request:
        waiting.queued(bus, request)
        bus.log_request("debug", "queued", request, position=request.position)


def refuse_hopeless(bus: BusState, request: RequestState, body: Request) -> None:
    """Fail a new request at once that will not start before its own limits are over."""
    limits_ms = [limit for limit in (body.queue_ms, body.ttl_ms) if limit is not None]
    if body.resume is not None or not limits_ms or min(limits_ms) == 0:
        return
    limit_s = min(limits_ms) / 1000
    if waiting.surely_after_s(bus, request) <= limit_s:
        return
    expects_s = waiting.start_s(bus, request) or limit_s
    error = ErrorInfo(
        code=ErrorCode.OVERLOADED,
        message=f"{bus.queues[request.model].position(request)} requests wait for model "
        f"{request.model} before this one: it would start in about {expects_s:.0f} s, "
        f"and may wait for {limit_s:g} s at most",
        retryable=True,
        retry_after_ms=round(1000 * (expects_s - limit_s)),
    )
    bus.counters["refused_hopeless"] += 1
    endings.fail(bus, request, error)


def on_queue_timer(bus: BusState, request: RequestState) -> None:
    """Timer: a queued request has exceeded its queue time or its time to live."""
    if request.phase is not Phase.QUEUED or bus.requests.get(request.id) is not request:
        return
    waited_s = bus.now_s - request.queued_s
    if bus.now_s >= request.ttl_until_s:
        what = f"the request's time to live ended after {waited_s:.1f} s in the queue"
    elif bus.now_s >= request.queue_until_s:
        what = f"no worker was free for {waited_s:.1f} s ({_workers_of(bus, request.model)})"
    else:
        bus.at(min(request.queue_until_s, request.ttl_until_s), on_queue_timer, request)
        return
    endings.fail(bus, request, ErrorInfo(code=ErrorCode.DEADLINE_EXCEEDED, message=what))
