"""Invariants that must hold between any two events. For tests and simulation: checking reads
the whole state."""

from __future__ import annotations

import math

from broker.core.phases import Phase
from broker.core.shares import DRIFT
from broker.core.state import BusState


def check(bus: BusState) -> None:
    """Raises AssertionError naming the table and the entry that contradict each other."""
    _check_workers(bus)
    _check_requests(bus)
    _check_queues(bus)
    _check_shares(bus)
    _check_clients(bus)
    _check_routes(bus)


def _check_workers(bus: BusState) -> None:
    for routing_id, worker in bus.workers.items():
        who = f"worker {worker.name}"
        assert worker.routing_id == routing_id, f"{who} stands under another routing id"
        assert worker.assigned >= 0 and worker.returned >= 0 and worker.unspent >= 0, (
            f"{who}: {worker.assigned} assigned and {worker.returned} given back of "
            f"{worker.granted} granted"
        )
        for request_id, request in worker.running.items():
            assert bus.requests.get(request_id) is request, (
                f"{who} runs a forgotten {request.story()}"
            )
            assert request.phase is Phase.RUNNING, f"{who} runs {request.story()}"
            assert request.worker is worker, f"{who} runs {request.story()} of another worker"
        for request_id, request in worker.ended.items():
            assert bus.requests.get(request_id) is request, (
                f"{who} keeps a forgotten {request.story()}"
            )
            assert request.phase is Phase.ENDED, f"{who} keeps {request.story()}"
            assert request.worker is worker, f"{who} keeps {request.story()} of another worker"
        alone = worker.alone
        assert alone is None or alone.cell is worker, f"{who} is kept for nobody"
        for model in worker.models:
            assert worker.id in bus.registry.serving(model), f"{who} is not indexed under {model}"
    for model in bus.registry.models():
        for worker in bus.registry.serving(model).values():
            assert bus.workers.get(worker.routing_id) is worker, f"{model} names a lost worker"


def _check_requests(bus: BusState) -> None:
    for request_id, request in bus.requests.items():
        assert request.id == request_id, f"{request.story()} stands under another id"
        match request.phase:
            case Phase.NEW | Phase.FORGOTTEN:
                raise AssertionError(f"{request.story()} stands in the table")
            case Phase.QUEUED:
                assert request.worker is None, f"{request.story()} has a worker"
                assert request.client is not None, f"{request.story()} waits for nobody"
                assert request.frames, f"{request.story()} lost its body"
            case Phase.PARKED:
                assert request.client is None, f"{request.story()} has a client"
                assert request.worker is None, f"{request.story()} has a worker"
            case Phase.RUNNING:
                assert request.worker is not None, f"{request.story()} runs nowhere"
                assert request.worker.running.get(request_id) is request, (
                    f"{request.story()} is lost"
                )
            case Phase.ENDED:
                assert request.worker is not None, f"{request.story()} ended nowhere"
                assert request.worker.ended.get(request_id) is request, f"{request.story()} is lost"
            case Phase.INTERRUPTED:
                assert request.client is None, f"{request.story()} has a client"
                assert request.worker is None, f"{request.story()} has a worker"
        suspects = bus.suspects.get(request.model, {})
        queued_alone = request.alone and request.phase is Phase.QUEUED
        assert (suspects.get(request_id) is request) == queued_alone, f"{request.story()} is alone"
        if request.cell is not None:
            assert request.cell.alone is request, f"{request.story()} lost its worker"
        if request.worker is not None:
            here = bus.workers.get(request.worker.routing_id)
            assert here is request.worker, f"{request.story()} is at a worker that left"
        if request.phase is not Phase.QUEUED:
            assert not request.frames, f"{request.story()} still holds its body"
        live = request.client is not None and request.phase in (Phase.QUEUED, Phase.RUNNING)
        if live and request.client is not None:
            assert bus.clients.get(request.client.routing_id) is request.client, (
                f"{request.story()} belongs to a client that left"
            )
            assert request.client.requests.get(request_id) is request, (
                f"{request.story()} is not counted"
            )


def _check_queues(bus: BusState) -> None:
    queued = [request for request in bus.requests.values() if request.phase is Phase.QUEUED]
    waiting = [request for queue in bus.queues.values() for request in queue.all()]
    assert {id(request) for request in queued} == {id(request) for request in waiting}, (
        f"{len(queued)} requests are queued, the queues hold {len(waiting)}"
    )
    for model, queue in bus.queues.items():
        entries = queue.all()
        assert entries, f"the queue of {model} is empty and was kept"
        assert queue.requests == len(entries), f"the queue of {model} miscounts its requests"
        new = sum(not entry.admitted for entry in entries)
        assert new <= bus.settings.queue_requests, f"{new} requests wait for {model}"
        assert queue.bytes == sum(entry.size_bytes for entry in entries), f"{model} miscounts bytes"
        waits = bus.policy is None  # a request may wait for a faster worker
        lasting = not waits and any(w.ends_s == math.inf for w in bus.registry.available(model))
        assert not lasting or all(entry.lost_workers or entry.holder for entry in entries), (
            f"requests wait for {model} while a worker has a free slot"
        )
    total = sum(queue.bytes for queue in bus.queues.values())
    assert bus.queued_bytes == total, f"{bus.queued_bytes} bytes counted, {total} queued"


def _check_shares(bus: BusState) -> None:
    running: dict[tuple[str, int, str], float] = {}
    for request in bus.requests.values():
        if request.unsettled:
            assert request.phase is Phase.RUNNING, f"{request.story()} is charged for a run"
            key = request.model, request.priority, request.user_key
            running[key] = running.get(key, 0.0) + request.unsettled
    for model, shares in bus.shares.items():
        for (priority, user), share in shares:
            due = running.get((model, priority, user), 0.0)
            assert abs(share.running - due) < DRIFT, (
                f"{user} is charged {share.running} tokens for what runs, which is {due}"
            )


def _check_clients(bus: BusState) -> None:
    for client in bus.clients.values():
        assert len(client.requests) <= bus.settings.inflight + sum(
            request.phase is Phase.RUNNING for request in client.requests.values()
        ), f"client {client.name} has {len(client.requests)} requests in flight"
        for request_id, request in client.requests.items():
            assert bus.requests.get(request_id) is request, f"{request.story()} is forgotten"
            assert request.client is client, f"{request.story()} belongs to another client"
            open_ = request.phase in (Phase.QUEUED, Phase.RUNNING)
            assert open_, f"{request.story()} still counts for its client"


def _check_routes(bus: BusState) -> None:
    for route in bus.routes.values():
        assert bus.workers.get(route.worker.routing_id) is route.worker, "a route from nowhere"
        assert bus.clients.get(route.client.routing_id) is route.client, "a route to nowhere"
        assert route.worker.routes.get(route.client.id) is route, "a route its worker forgot"
        assert route.client.routes.get(route.worker.id) is route, "a route its client forgot"
        fast = bus.fast_routes.get(route.key) is route
        assert fast == (not route.moved), f"a route with {len(route.moved)} moved requests"
    assert len(bus.fast_routes) <= len(bus.routes), "a fast route outlived its route"
