"""The relay between two buses, in virtual time: credit, windows, cancels, resumes, failures."""

from __future__ import annotations

import pytest

from broker.core.events import Side
from broker.protocol import codec, header
from broker.protocol.header import MessageType
from broker.protocol.messages import FinishReason, Kind, Params, Request, Resume
from client.core.events import Answered, End, QueryMade
from client.errors import BusError
from tests.core.relay_world import Relay, TwoBuses, Worker, answer
from worker.core import events as worker_events
from worker.engines.base import FailedLoad
from worker.relay import core as relay, survey

TWO_MODELS = ((3, ("one",)), (2, ("two",)))


def test_slots_of_the_lower_bus_become_credit_above() -> None:
    buses = TwoBuses(workers=((4, ("model",)), (3, ("model",))))
    assert buses.credit == 7
    (row,) = buses.upper.query("bus.workers")
    assert (row["engine"], row["capacity"], row["via"]) == ("bus", 7, ["lower"])


def test_an_answer_passes_unchanged() -> None:
    buses = TwoBuses()
    request = buses.above.ask(5, 30, user="alice", priority=7, trace={"traceparent": "00-ab"})
    buses.steps(31)
    assert buses.above.tokens[request] == answer(5, 30)
    assert buses.above.texts[request] == "".join(f"{token} " for token in answer(5, 30))
    end = buses.above.ends[request]
    assert isinstance(end, End)
    assert end.finish_reason is FinishReason.LENGTH
    assert (end.usage.prompt_tokens, end.usage.completion_tokens) == (1, 30)
    assert end.timings.decode_ms == 1.5
    (ran,) = buses.workers[0].ran
    assert (ran.user, ran.priority, ran.trace) == ("alice", 7, {"traceparent": "00-ab"})
    buses.world.advance(1.0)
    assert buses.credit == 4


@pytest.mark.parametrize("limit_ms", [0, 1 << 40])
def test_extreme_time_limits_do_no_harm(limit_ms: int) -> None:
    """No request may end the relay, whether its limits are the shortest or the longest."""
    buses = TwoBuses()
    job = Request(
        model="model",
        kind=Kind.COMPLETE,
        prompt="x",
        params=Params(max_tokens=3),
        window=1 << 62,
        queue_ms=limit_ms,
        ttl_ms=limit_ms,
        resume=Resume(epoch=1 << 31),
    )
    buses.relay.join(relay.JobAdded(bytes((1,)) * 16, codec.encode(job), ()))
    buses.steps(5)
    assert buses.relay.relay._jobs == {}


def test_requests_beyond_the_slots_wait_above_and_never_below() -> None:
    buses = TwoBuses()
    requests = [buses.above.ask(n, 20) for n in range(20)]
    for _ in range(150):
        buses.steps()
        assert buses.queued_below == 0
        assert len(buses.workers[0].jobs) <= 4
    for n, request in enumerate(requests):
        assert buses.above.tokens[request] == answer(n, 20)


def test_credit_for_a_slot_that_others_take_below_is_recalled_above() -> None:
    buses = TwoBuses()
    direct = [buses.below.ask(n, 1000) for n in range(3)]
    buses.world.advance(1.5)
    assert buses.credit == 1
    for request in direct:
        buses.below.drop(request)
    buses.world.settle()
    buses.steps(1)
    buses.world.advance(1.5)
    assert buses.credit == 4


def test_a_slot_that_others_wait_for_is_not_granted_above_again() -> None:
    buses = TwoBuses()
    for n in range(4):
        buses.above.ask(n, 20)
    buses.world.advance(0.5)
    direct = [buses.below.ask(n, 20) for n in range(4)]
    waits = buses.above.ask(9, 20)
    buses.world.advance(1.5)
    buses.steps(21)
    assert buses.queued_below == 0
    assert buses.credit == 0
    assert {request.params.seed for request in buses.workers[0].ran[4:]} == {0, 1, 2, 3}
    buses.steps(21)
    assert all(request in buses.below.ends for request in direct)
    buses.world.advance(1.5)
    buses.steps(21)
    assert buses.above.tokens[waits] == answer(9, 20)


def test_a_serial_model_below_is_reported_as_serial_above() -> None:
    models = [{"name": "model", "serial": "layers of type recurrent"}]
    assert survey.read([], models).models[0].serial == "layers of type recurrent"


def test_each_model_gets_the_slots_of_its_own_workers() -> None:
    buses = TwoBuses(workers=TWO_MODELS)
    assert buses.credit == 5
    for n in range(6):
        buses.above.ask(n, 10, model="two")
    late = buses.above.ask(9, 10, model="one")
    for _ in range(80):
        buses.steps()
        assert buses.queued_below == 0
    assert buses.above.tokens[late] == answer(9, 10)
    assert all(isinstance(end, End) for end in buses.above.ends.values())
    assert len(buses.above.ends) == 7


def test_a_lower_bus_without_a_ready_worker_offers_nothing() -> None:
    buses = TwoBuses()
    buses.workers[0].tell(worker_events.EngineLost("the engine process was killed by SIGKILL"))
    buses.world.advance(1.5)
    assert buses.credit == 0
    assert [row["name"] for row in buses.upper.query("bus.models")] == ["model"]


def test_a_cancel_frees_the_slot_below_and_then_the_credit() -> None:
    buses = TwoBuses()
    request = buses.above.ask(1, 1000)
    buses.steps(5)
    buses.above.drop(request)
    buses.world.advance(0.02)
    assert buses.workers[0].cancelled, "it reached the worker that runs it"
    assert buses.credit == 3, "whose slot is not free yet"
    buses.steps(1)
    buses.world.advance(1.0)
    assert buses.workers[0].jobs == {}
    assert buses.credit == 4


def test_the_window_below_is_the_window_above() -> None:
    buses = TwoBuses()
    request = buses.above.ask(1, 100, window=10)
    buses.steps(60)
    assert len(buses.above.tokens[request]) == 10
    (job,) = buses.relay.relay._jobs.values()
    assert job.have == 10, "the rest waits at the worker that made it"
    reads = 0
    while request not in buses.above.ends:
        buses.above.read(request)
        buses.steps(1)
        reads += 1
        assert reads < 100
        assert job.have <= len(buses.above.tokens[request]) + 10
    assert buses.above.tokens[request] == answer(1, 100)


def test_a_failure_passes_with_its_code_and_message() -> None:
    buses = TwoBuses()
    request = buses.above.ask(1, 100)
    buses.world.settle()
    buses.steps(3)
    buses.workers[0].error = {
        "code": "overloaded",
        "message": "no memory for the cache",
        "retryable": False,
        "retry_after_ms": 1234,
        "details": {"bytes": 5},
    }
    buses.steps(1)
    error = buses.above.ends[request]
    assert isinstance(error, BusError)
    assert (error.code, error.message, error.retryable) == (
        "overloaded",
        "no memory for the cache",
        False,
    )
    assert (error.retry_after_ms, error.details) == (1234, {"bytes": 5})
    assert buses.above.tokens[request] == answer(1, 3)


def test_a_request_resumed_above_continues_below_from_the_tokens_so_far() -> None:
    buses = TwoBuses()
    request = buses.above.ask(1, 50)
    buses.steps(10)
    for _ in range(2):  # so that its epoch below differs from the one above
        buses.lower.restart()
        buses.world.advance(8.0)
    buses.steps(10)
    assert buses.above.resumed == 0
    # The upper broker and the relay die; a new relay starts without any state.
    buses.relay.caller.broker.lines.clear()
    _remove(buses, buses.relay)
    buses.upper.restart()
    buses.relay = Relay(buses.world, [buses.upper], buses.lower, "relay 2")
    buses.world.advance(8.0)
    buses.steps(40)
    assert buses.above.tokens[request] == answer(1, 50)
    assert buses.above.texts[request] == "".join(f"{token} " for token in answer(1, 50))
    assert buses.above.resumed >= 1
    assert len(buses.workers[0].ran) == 1, "it ran on below, and was attached to by its id"


def _remove(buses: TwoBuses, gone: Relay) -> None:
    """Like SIGKILL: it sends and receives nothing any more."""
    parties = buses.world.parties
    parties[:] = [
        party
        for party in parties
        if party is not gone
        and party is not gone.caller
        and getattr(party, "_owner", None) is not gone
    ]
    gone.tell = lambda event: None  # type: ignore[method-assign]
    gone.join = lambda event: None  # type: ignore[method-assign]
    gone.caller.tell = lambda event: None  # type: ignore[method-assign]


def test_a_worker_that_dies_below_is_not_noticed_above() -> None:
    buses = TwoBuses(workers=((4, ("model",)), (4, ("model",))))
    requests = [buses.above.ask(n, 40) for n in range(4)]
    buses.steps(10)
    dead = buses.workers[0]
    assert dead.jobs
    dead.jobs.clear()
    dead.tell(worker_events.EngineLost("the engine process was killed by SIGKILL"))
    buses.world.advance(2.0)
    buses.steps(60)
    for n, request in enumerate(requests):
        assert buses.above.tokens[request] == answer(n, 40)
    assert buses.above.resumed == 0


# --- known ends of the workers below --------------------------------------------------------------


def relay_end_s(buses: TwoBuses) -> float | None:
    """In how long the relay ends, as the upper bus knows it."""
    row = next(row for row in buses.upper.query("bus.workers") if row["name"] == "relay")
    return None if row["ends_in_ms"] is None else row["ends_in_ms"] / 1000


def test_the_end_of_the_last_worker_below_is_the_end_of_the_relay() -> None:
    buses = TwoBuses(workers=((2, ("model",)), (2, ("model",))))
    first, second = buses.workers
    first.tell(worker_events.EndKnown(buses.world.now_s + 60, "Slurm job 7"))
    buses.world.advance(2.5)
    assert relay_end_s(buses) is None, "the other one stays"
    second.tell(worker_events.EndKnown(buses.world.now_s + 30, "Slurm job 8"))
    buses.world.advance(2.5)
    assert relay_end_s(buses) == pytest.approx(55.0, abs=2.0)
    (row,) = [r for r in buses.upper.query("bus.workers") if r["name"] == "relay"]
    assert row["ends_why"] == "Slurm job 7"
    Worker(buses.world, buses.lower, "successor", 2, ("model",))
    buses.world.advance(2.5)
    assert relay_end_s(buses) is None


def test_streams_leave_a_lower_bus_whose_workers_all_end() -> None:
    buses = TwoBuses()
    request = buses.above.ask(1, 3000)
    buses.steps(10)
    other = Worker(buses.world, buses.upper, "other", 2, ("model",))
    buses.workers.append(other)
    below = buses.workers[0]
    assert below.jobs
    below.tell(worker_events.EndKnown(buses.world.now_s + 20, "spot notice"))
    buses.steps(1000)
    assert other.jobs, "it moved before the end"
    assert not below.jobs
    buses.world.advance(20.0)
    assert below.exit is not None
    assert buses.relay.exit is None, "another worker may come to its bus"
    buses.steps(3000)
    assert buses.above.tokens[request] == answer(1, 3000)


def failure_of(buses: TwoBuses, request: bytes) -> BusError:
    error = buses.above.ends.pop(request)
    assert isinstance(error, BusError)
    return error


def test_a_model_that_cannot_be_loaded_below_is_told_above_at_once() -> None:
    """Who waits above, and who asks later, has the cause and when to ask again; once the model is
    offered again it is served."""
    buses = TwoBuses(workers=((2, ("model", "other")),))
    worker = buses.workers[0]
    waiting = [buses.above.ask(n, 20) for n in range(5)]
    buses.world.advance(0.5)
    retry_s = buses.world.now_s + 60.0
    worker.offers("other", failed=(FailedLoad("model", "no config.json", retry_s),))
    buses.world.advance(1.5)
    later = buses.above.ask(9, 3)
    buses.world.advance(0.1)
    for request in (waiting[-1], later):
        error = failure_of(buses, request)
        assert error.code == "model_unavailable" and error.details["load_failed"] is True
        assert "no config.json" in error.message and "(worker w0)" in error.message
        assert error.retry_after_ms is not None and 57_000 < error.retry_after_ms <= 60_000
    # It is told once, not with every survey.
    told = [one for one in buses.relay.reports if isinstance(one, worker_events.EngineChanged)]
    buses.world.advance(20.0)
    again = [one for one in buses.relay.reports if isinstance(one, worker_events.EngineChanged)]
    assert {one.capabilities.failed for one in again[len(told) :]} <= {told[-1].capabilities.failed}
    # Its time has come: who asks waits for the offer, as at the lower broker.
    buses.world.advance(40.0)
    asked = buses.above.ask(7, 3)
    buses.world.advance(1.0)
    assert asked not in buses.above.ends
    worker.offers("model", "other")
    buses.steps(300)
    assert buses.above.tokens[asked] == answer(7, 3)
    assert not buses.upper.core.failed_loads


def test_a_model_that_others_below_serve_is_no_failure_above() -> None:
    buses = TwoBuses(workers=((1, ("model",)), (1, ("model",))))
    buses.workers[0].offers(failed=(FailedLoad("model", "no config.json"),))
    buses.world.advance(2.0)
    request = buses.above.ask(3, 4)
    buses.steps(10)
    assert buses.above.tokens[request] == answer(3, 4)
    assert not buses.upper.core.failed_loads


def test_a_worker_below_that_never_served_its_model_is_told_above() -> None:
    """It says so and leaves: what it said holds for as long as the lower broker waits for it."""
    buses = TwoBuses(workers=((1, ("other",)),))
    gone = Worker(buses.world, buses.lower, "gone", 1, ("model",))
    gone.offers(failed=(FailedLoad("model", "no such folder"),))
    buses.world.advance(1.0)
    gone.tell(worker_events.StopRequested("stopped"))
    buses.world.advance(2.0)
    request = buses.above.ask(3, 4)
    buses.world.advance(0.1)
    error = failure_of(buses, request)
    assert error.details["load_failed"] is True and "no such folder" in error.message


def test_a_lower_broker_that_does_not_tell_failed_loads_is_served_as_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from broker.core import queries

    monkeypatch.delitem(queries._VERBS, "bus.failed_loads")
    buses = TwoBuses()
    request = buses.above.ask(5, 3)
    buses.steps(5)
    assert buses.above.tokens[request] == answer(5, 3)


def test_a_restarted_lower_broker_is_only_a_pause() -> None:
    buses = TwoBuses()
    requests = [buses.above.ask(n, 40) for n in range(4)]
    buses.steps(10)
    buses.lower.restart()
    buses.world.advance(10.0)
    buses.steps(40)
    for n, request in enumerate(requests):
        assert buses.above.tokens[request] == answer(n, 40)
    assert buses.above.resumed == 0
    buses.world.advance(5.0)
    assert buses.credit == 4


def test_while_the_lower_broker_is_away_no_credit_is_granted() -> None:
    buses = TwoBuses()
    buses.lower.restart()
    buses.lower.hear = lambda *_: None  # type: ignore[method-assign]
    buses.world.advance(5.0)
    assert buses.credit == 0
    request = buses.above.ask(1, 5)
    buses.steps(20)
    assert not buses.above.tokens[request]
    assert buses.relay.relay._jobs == {}


def test_a_relay_that_is_stopped_drains_and_then_leaves() -> None:
    buses = TwoBuses()
    request = buses.above.ask(1, 30)
    buses.steps(5)
    buses.relay.tell(worker_events.StopRequested("SIGTERM"))
    buses.world.settle()
    (row,) = buses.upper.query("bus.workers")
    assert row["state"] == "draining"
    assert buses.relay.exit is None
    buses.steps(30)
    assert buses.above.tokens[request] == answer(1, 30)
    assert buses.relay.exit is not None and buses.relay.exit.code == 0
    assert buses.upper.query("bus.workers") == []


def test_a_broker_that_would_be_a_worker_of_itself_reports_it_and_grants_nothing() -> None:
    buses = TwoBuses()
    Relay(buses.world, [buses.lower], buses.upper, "back again")
    buses.world.advance(2.0)
    assert buses.credit == 0
    reports = buses.relay.reports
    failed = [event for event in reports if isinstance(event, worker_events.WorkerFailed)]
    assert failed and "a loop of brokers: lower would be its own worker" in failed[0].message


def test_relays_in_a_loop_grant_nothing_until_one_of_them_has_left() -> None:
    core = relay.RelayCore(relay.RelaySettings(mark="b", lower="tcp://b"))
    models = [{"name": "model", "kinds": ["chat"], "queued": 0, "details": {}}]
    worker = {"name": "w", "models": ["model"], "state": "ready", "granted": 4, "assigned": 0}

    def look(now_s: float, via: list[str]) -> list[object]:
        """The reports that follow when the lower bus shows a worker reached via these brokers."""
        event = relay.Begun() if now_s == 0 else relay.Tick()
        asked = [each.event for each in core.handle(event, now_s) if isinstance(each, relay.Ask)]
        reports: list[object] = []
        for query in asked:
            assert isinstance(query, QueryMade)
            workers = [{**worker, "via": via}]
            result = {"bus.models": models, "bus.workers": workers}.get(query.verb, [])
            arrived = relay.ItemsArrived(query.query_id, (Answered(result),))
            instructions = core.handle(arrived, now_s)
            reports += [each.event for each in instructions if isinstance(each, relay.Report)]
        return reports

    look(0.0, [])
    assert core.capacity == 4
    failures = [look(now_s, ["a", "b"])[-1] for now_s in (2.0, 4.0, 6.0)]
    assert core.capacity == 0
    assert not any(isinstance(event, worker_events.WorkerFailed) for event in failures)
    assert any(isinstance(event, worker_events.WorkerFailed) for event in look(8.0, ["a", "b"]))
    look(10.0, ["a"])
    assert core.capacity == 4


@pytest.mark.parametrize("share", [1.0, 0.75])
@pytest.mark.parametrize("seed", range(4))
def test_in_any_order_of_events_texts_are_exact_and_credit_is_correct(
    seed: int, share: float
) -> None:
    """Callers above (a `share` of all) and below arrive, read slowly and leave. Nothing waits below
    if nobody else takes slots and each worker's slots belong to its own models."""
    mixed = ("one", "two") if share < 1 else ("one",)
    buses = TwoBuses(seed, workers=((3, mixed), (2, ("two",)), (2, ("one",))))
    rng = buses.world.random
    asked: dict[bytes, tuple[int, int, bool]] = {}
    for n in range(80):
        above = rng.random() < share
        caller = buses.above if above else buses.below
        length = rng.randrange(1, 30)
        window = rng.choice([3, 10, 1000])
        model = rng.choice(["one", "two"])
        asked[caller.ask(n, length, model=model, window=window)] = n, length, above
        for _ in range(rng.randrange(6)):
            buses.steps(1, pause_s=rng.choice([0.0, 0.01, 0.3]))
            assert share < 1 or buses.queued_below == 0
            for reader in (buses.above, buses.below):
                for id_ in list(reader.tokens):
                    if id_ not in reader.ends and rng.random() < 0.3:
                        reader.read(id_)
        if rng.random() < 0.1:
            ids = [id_ for id_ in caller.tokens if id_ not in caller.ends]
            if ids:
                caller.drop(rng.choice(ids))
    left_s = 60.0
    while len(buses.above.ends) + len(buses.below.ends) < len(asked):
        left_s -= 0.05
        assert left_s > 0, "what can be served is served in time"
        buses.steps(1, pause_s=0.05)
        for reader in (buses.above, buses.below):
            for id_ in list(reader.tokens):
                if id_ not in reader.ends:
                    reader.read(id_)
    for id_, (n, length, above) in asked.items():
        caller = buses.above if above else buses.below
        if isinstance(caller.ends[id_], End):
            assert caller.tokens[id_] == answer(n, length)
        else:
            assert str(caller.ends[id_]) == "dropped"
            assert caller.tokens[id_] == answer(n, len(caller.tokens[id_]))
    buses.world.advance(2.0)
    assert buses.credit == 7
    assert buses.relay.relay._jobs == {}


@pytest.mark.parametrize("nonsense", [{}, [[9, b"x"]], [[0, None, 0, 0, [1], "EVIL"]]])
def test_a_worker_below_whose_output_is_broken_is_cut_off_and_the_answer_goes_on(
    nonsense: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The relay is a client of the lower bus, and checks what a client must."""
    buses = TwoBuses(workers=((4, ("model",)), (4, ("model",))))
    request = buses.above.ask(5, 30)
    buses.steps(5)
    hear = buses.lower.hear
    lies: list[bytes] = []

    def broken_once(side: Side, routing_id: bytes, frames: tuple[bytes, ...]) -> None:
        if side is Side.BACK and header.decode(frames[0]).type is MessageType.OUTPUT and not lies:
            lies.append(routing_id)
            frames = (frames[0], codec.pack(nonsense), *frames[2:])
        hear(side, routing_id, frames)

    monkeypatch.setattr(buses.lower, "hear", broken_once)
    buses.steps(1)
    assert lies[0] not in buses.lower.core.workers, "cut off"
    buses.steps(100, pause_s=0.05)
    assert buses.above.tokens[request] == answer(5, 30)
    assert "EVIL" not in buses.above.texts[request]
    end = buses.above.ends[request]
    assert isinstance(end, End) and end.finish_reason is FinishReason.LENGTH
