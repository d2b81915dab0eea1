"""The worker's core: sessions with a broker, the engine's life, and drain. No sockets."""

from __future__ import annotations

import pytest

from broker.protocol import codec
from broker.protocol.header import MessageType
from broker.protocol.messages import ModelInfo, WorkerState
from tests.core.worker_world import (
    OTHER_ROUTE,
    World,
    body,
    request_id,
    resume,
    serving,
)
from worker.core import events
from worker.engines.base import Capabilities, FailedLoad

# --- sessions -------------------------------------------------------------------------------------


def test_a_worker_sends_hello_then_reports_loading_and_grants_nothing() -> None:
    world = World()
    world.tell(events.Tick())
    (broker,) = world.brokers
    broker.connect()
    (hello,) = broker.came(MessageType.HELLO)
    assert (hello.role, hello.name, [m.name for m in hello.models]) == ("worker", "w", ["demo"])
    world.tell(events.EngineLoading(0.5, "weights"))
    world.advance(1.5)
    beat = broker.came(MessageType.HEARTBEAT)[-1]
    assert (beat.state, beat.progress, beat.note) == (WorkerState.LOADING, 0.5, "weights")
    assert broker.free == 0


def test_a_worker_that_cannot_load_its_model_says_why_before_it_leaves() -> None:
    world = World()
    world.tell(events.Tick())
    (broker,) = world.brokers
    broker.connect()
    world.tell(events.WorkerFailed("no config.json"))
    beat = broker.came(MessageType.HEARTBEAT)[-1]
    assert (beat.models, [(one.name, one.cause) for one in beat.failed]) == (
        [],
        [("demo", "no config.json")],
    )
    assert [head.type for head, _ in broker.messages][-1] is MessageType.GOODBYE


def test_a_worker_that_was_ready_once_may_be_started_again_with_its_model() -> None:
    world = serving()
    world.tell(events.EngineLost("killed by signal 9"))
    world.advance(1.0)
    world.tell(events.WorkerFailed("the engine died 5 times in a row"))
    beats = world.brokers[0].came(MessageType.HEARTBEAT)
    assert not any(beat.failed for beat in beats)


def test_a_failed_load_is_told_with_the_models_and_again_in_hello() -> None:
    world = World()
    world.tell(events.Tick())
    (broker,) = world.brokers
    broker.connect()
    failed = (FailedLoad("other", "no memory", world.now_s + 30.0), FailedLoad("third", "why"))
    known = Capabilities("echo", "cpu", (ModelInfo(name="demo"),), 2, failed)
    world.tell(events.EngineReady(known))
    world.advance(10.0)
    told = [beat for beat in broker.came(MessageType.HEARTBEAT) if beat.models is not None]
    assert [(one.name, one.retry_in_ms) for one in told[-1].failed] == [
        ("other", 30_000),
        ("third", None),
    ]
    broker.lose()
    world.advance(2.0)
    broker.connect()
    hello = broker.came(MessageType.HELLO)[-1]
    [other, _] = hello.failed
    assert (other.name, other.cause) == ("other", "no memory") and other.retry_in_ms <= 20_000


def test_a_loaded_engine_is_announced_once_with_models_then_granted() -> None:
    world = World(capacity=3)
    world.tell(events.Tick())
    (broker,) = world.brokers
    broker.connect()
    world.ready()
    beats = [b for b in broker.came(MessageType.HEARTBEAT) if b.models is not None]
    assert [(b.state, b.capacity, b.models[0].context_tokens) for b in beats] == [
        (WorkerState.READY, 3, 1000)
    ]
    assert [(b.engine, b.device) for b in beats] == [("echo", "cpu")]
    kinds = [head.type for head, _ in broker.messages]
    assert kinds.index(MessageType.CREDIT) > kinds.index(MessageType.HEARTBEAT)
    assert broker.free == 3


def test_a_worker_that_connects_after_loading_grants_at_once() -> None:
    world = World(capacity=3)
    world.ready()
    world.tell(events.Tick())
    world.brokers[0].connect()
    assert world.brokers[0].free == 3


def test_heartbeats_are_sent_every_interval_even_while_output_flows() -> None:
    world = serving()
    (broker,) = world.brokers
    broker.assign(1)
    before = len(broker.came(MessageType.HEARTBEAT))
    for token in range(40):
        world.generate(1, token)
        world.advance(0.1)
    assert len(broker.came(MessageType.HEARTBEAT)) - before in (3, 4, 5)


def test_a_silent_broker_is_lost_after_interval_times_liveness_and_tried_again() -> None:
    world = serving()
    (broker,) = world.brokers
    world.advance(4.9, brokers_live=False)
    assert world.sockets == {0}
    world.advance(0.2, brokers_live=False)
    assert world.sockets == set()
    world.advance(0.6, brokers_live=False)  # the first back-off is at most half a second
    assert world.sockets == {0}
    broker.connect()
    assert broker.free == 2


def test_a_worker_that_was_stopped_does_not_blame_the_broker() -> None:
    world = serving()
    world.core.deadline_s()
    world.now_s += 60.0
    world.tell(events.Tick())
    assert world.sockets == {0}
    world.core.deadline_s()
    world.advance(3.5, brokers_live=False)
    assert world.sockets == {0}


def _wait_s(world: World) -> float:
    return world.core.deadline_s() - world.now_s


def test_waits_between_attempts_grow_while_no_broker_answers() -> None:
    world = World()
    waits = []
    for _ in range(60):
        world.tell(events.Tick())
        world.tell(events.Disconnected(0, "refused"))
        waits.append(_wait_s(world))
        world.now_s = world.core.deadline_s()
    assert max(waits) <= 10.0
    assert max(waits[30:]) > 2.0


@pytest.mark.parametrize("lived_s", [0.05, 3.0, 11.0])
def test_however_often_a_broker_is_killed_its_worker_comes_back_at_once(lived_s: float) -> None:
    world = World()
    world.tell(events.Tick())
    for _ in range(20):
        world.brokers[0].connect()
        world.advance(lived_s)
        world.brokers[0].lose()
        assert _wait_s(world) <= 0.5
        world.advance(0.5, brokers_live=False)


def test_the_back_off_grows_for_a_broker_that_refuses_right_after_welcome() -> None:
    world = World()
    world.tell(events.Tick())
    waits = []
    for _ in range(12):
        world.brokers[0].connect()
        world.brokers[0].refuse(fatal=False)
        waits.append(_wait_s(world))
        world.now_s = world.core.deadline_s()
        world.tell(events.Tick())
    assert 5.0 < max(waits[6:]) <= 30.0


def test_the_back_off_grows_for_a_wrong_key() -> None:
    world = World()
    waits = []
    for _ in range(12):
        world.tell(events.Tick())
        world.tell(events.Disconnected(0, "the broker refuses this worker's key", refused=True))
        waits.append(_wait_s(world))
        world.now_s = world.core.deadline_s()
    assert 10.0 < max(waits[6:]) <= 30.0


def test_an_absent_broker_is_logged_once_at_a_visible_level() -> None:
    world = World()
    for _ in range(5):
        world.tell(events.Tick())
        world.tell(events.Disconnected(0, "refused"))
        world.now_s = world.core.deadline_s()
    assert [log.event for log in world.logs if log.level >= 20] == ["broker absent"]


def test_a_connection_attempt_without_progress_times_out() -> None:
    world = World()
    world.tell(events.Tick())
    world.advance(5.1)
    assert any("is the host's name right" in log.fields.get("cause", "") for log in world.logs)


def test_a_hello_without_an_answer_times_out() -> None:
    world = World()
    world.tell(events.Tick())
    world.brokers[0].connect(welcome=False)
    world.advance(5.1, brokers_live=False)
    assert any("no answer to HELLO" in log.fields.get("cause", "") for log in world.logs)


def test_a_broker_that_answers_hello_late_is_reached_at_the_second_attempt() -> None:
    world = World()
    world.tell(events.Tick())
    world.brokers[0].connect(welcome=False)
    world.advance(5.6, brokers_live=False)
    world.brokers[0].connect(welcome=False)
    world.advance(9.0, brokers_live=False)
    assert world.sockets == {0}, "it is still waited for"


@pytest.mark.parametrize("greeting", [False, True])
def test_a_starved_worker_reads_what_has_arrived_before_it_gives_up_an_attempt(
    greeting: bool,
) -> None:
    world = World()
    world.tell(events.Tick())
    if greeting:
        world.brokers[0].connect(welcome=False)
    world.core.deadline_s()
    world.now_s += 12.0  # neither the process nor its I/O thread ran
    world.tell(events.Tick())
    assert world.sockets == {0}, "nobody can know yet that nothing came"
    world.advance(1.1, brokers_live=False)
    assert world.sockets == set()


def test_after_a_refusal_the_worker_waits_as_long_as_the_broker_says() -> None:
    world = World()
    world.tell(events.Tick())
    world.brokers[0].connect(welcome=False)
    world.brokers[0].refuse(fatal=False, retry_after_ms=20_000)
    assert 20.0 <= _wait_s(world) <= 30.0


def test_unknown_session_is_not_a_protocol_error() -> None:
    world = serving()
    (broker,) = world.brokers
    broker.beat()
    broker._sent = 0  # the broker has no session
    broker.refuse(fatal=False, retry_after_ms=1000)
    assert not broker.came(MessageType.GOODBYE)
    lost = [log for log in world.logs if log.event == "broker lost"]
    assert [log.fields["cause"] for log in lost] == ["refused: no (forbidden)"]
    assert 1.0 <= _wait_s(world) <= 1.5


def test_a_refusal_is_logged_as_a_warning_and_the_instance_never_changes() -> None:
    world, said = World(instance=bytes(range(16))), []
    for _ in range(2):
        world.tell(events.Tick())
        world.brokers[0].connect(welcome=False)
        said.append(world.brokers[0].messages[-1][1].instance)
        world.brokers[0].refuse(fatal=False, retry_after_ms=1000)
        world.now_s = world.core.deadline_s()
    assert said == [bytes(range(16))] * 2
    assert [log.level for log in world.logs if log.event == "broker absent"] == [30, 10]


def test_a_fatal_refusal_by_every_broker_ends_the_worker_with_an_error() -> None:
    world = World(brokers=2)
    world.tell(events.Tick())
    world.brokers[0].connect(welcome=False)
    world.brokers[0].refuse(fatal=True)
    assert world.exit is None
    world.advance(60.0)
    assert 0 not in world.sockets
    world.brokers[1].connect(welcome=False)
    world.brokers[1].refuse(fatal=True)
    assert world.exit is not None
    assert world.exit.code == 1
    assert "refuses this worker" in world.exit.message


@pytest.mark.parametrize(
    "frames",
    [
        (b"garbage", b""),
        (b"",),
    ],
)
def test_garbage_ends_the_session_with_a_reason(frames: tuple[bytes, ...]) -> None:
    world = serving()
    world.tell(events.MessageReceived(0, frames))
    (goodbye,) = world.brokers[0].came(MessageType.GOODBYE)
    assert goodbye.reason == "protocol_error"
    assert world.sockets == set()


def test_a_gap_in_the_sequence_ends_the_session() -> None:
    world = serving()
    world.brokers[0]._sent += 1
    world.brokers[0].beat()
    (goodbye,) = world.brokers[0].came(MessageType.GOODBYE)
    assert "message 2 of the session came where 1 was due" in goodbye.message


def test_a_message_type_not_for_workers_ends_the_session() -> None:
    world = serving()
    world.brokers[0].say(MessageType.ACCEPTED, request_id(1), codec.pack({}))
    assert world.brokers[0].came(MessageType.GOODBYE)[0].reason == "protocol_error"


# --- engine ---------------------------------------------------------------------------------------


def test_a_dead_engine_is_reported_and_the_worker_is_loading_again() -> None:
    world = serving()
    (broker,) = world.brokers
    broker.assign(1)
    broker.assign(2)
    world.end(2)
    world.tell(events.EngineLost("killed by SIGKILL"))
    (goodbye,) = broker.came(MessageType.GOODBYE)
    assert (goodbye.reason, goodbye.message) == ("engine_dead", "killed by SIGKILL")
    world.advance(1.0)
    broker.connect()
    hello = broker.came(MessageType.HELLO)[-1]
    assert [(h.request_id, h.running) for h in hello.holds] == [(request_id(2), False)]
    assert broker.came(MessageType.HEARTBEAT)[-1].state == WorkerState.LOADING
    assert broker.free == 0
    world.jobs.clear()
    world.ready()
    assert broker.free == 2


def test_a_hung_engine_is_reported_killed_and_replaced() -> None:
    world = serving(stall_s=120.0)
    (broker,) = world.brokers
    world.advance(500.0)  # idle is not hanging
    broker.assign(1)
    world.advance(119.0)
    age_ms = broker.came(MessageType.HEARTBEAT)[-1].engine_age_ms
    assert 117_000 <= age_ms <= 119_000
    assert world.restarts == []
    world.advance(1.5)
    assert len(world.restarts) == 1
    assert broker.came(MessageType.GOODBYE)[0].reason == "stalled"


def test_a_busy_engine_that_makes_progress_is_left_alone() -> None:
    world = serving(stall_s=10.0)
    world.brokers[0].assign(1)
    for _ in range(20):
        world.advance(9.0)
        world.step()
    assert world.restarts == []


def test_an_engine_that_cannot_be_loaded_ends_the_worker() -> None:
    world = serving()
    world.tell(events.WorkerFailed("no such model"))
    assert world.brokers[0].came(MessageType.GOODBYE)[0].message == "no such model"
    assert world.exit is not None
    assert (world.exit.code, world.exit.message) == (1, "no such model")


# --- drain ----------------------------------------------------------------------------------------


def test_a_drained_worker_announces_it_finishes_and_says_goodbye() -> None:
    world = serving(capacity=2)
    (broker,) = world.brokers
    broker.assign(1)
    world.tell(events.StopRequested("SIGTERM"))
    (drain,) = broker.came(MessageType.DRAIN)
    assert drain.deadline_ms == 30_000
    assert broker.came(MessageType.HEARTBEAT)[-1].state == WorkerState.DRAINING
    broker.assign(2)
    assert broker.came(MessageType.REJECT)[0].error.code == "draining"
    granted = broker.granted
    world.generate(1, 0)
    assert world.exit is None
    world.end(1)
    assert broker.answer(1).text == "0 "
    assert broker.granted == granted, "a draining worker grants nothing more"
    assert broker.came(MessageType.GOODBYE)[0].reason == "drained"
    assert world.exit is not None
    assert world.exit.code == 0


def test_a_drain_ends_at_its_deadline_whatever_is_running() -> None:
    world = serving()
    (broker,) = world.brokers
    broker.assign(1)
    broker.drain(deadline_ms=2000)
    world.advance(1.9)
    assert world.exit is None
    world.advance(0.2)
    assert broker.came(MessageType.GOODBYE)[0].reason == "drained"
    assert world.exit is not None


def test_a_drain_without_a_deadline_takes_the_workers_own_and_one_of_0_is_at_once() -> None:
    for deadline_ms, leaves_s in ((None, 30.0), (0, 0.0)):
        world = serving()
        (broker,) = world.brokers
        broker.assign(1)
        broker.drain(deadline_ms)
        if leaves_s:
            world.advance(leaves_s - 0.1)
            assert world.exit is None
        world.advance(0.2)
        assert broker.came(MessageType.GOODBYE)[0].reason == "drained"
        assert world.exit is not None


def test_a_second_request_to_stop_does_not_wait() -> None:
    world = serving()
    world.brokers[0].assign(1)
    world.tell(events.StopRequested("SIGTERM"))
    assert world.exit is None
    world.tell(events.StopRequested("SIGTERM"))
    assert world.exit is not None
    assert world.exit.code == 0


def test_an_idle_or_loading_worker_stops_at_once() -> None:
    for world in (serving(), World()):
        world.tell(events.StopRequested("SIGTERM"))
        assert world.exit is not None


def test_a_running_request_can_be_resumed_while_its_worker_drains() -> None:
    world = serving()
    (broker,) = world.brokers
    broker.assign(1)
    world.generate(1, 0)
    world.tell(events.StopRequested("SIGTERM"))
    broker.assign(1, route=OTHER_ROUTE, attach=True, resume=resume(1, [0], 2))
    broker.answer(1).token_ids, broker.answer(1).text = [0], "0 "
    world.generate(1, 1)
    world.end(1)
    assert broker.answer(1).text == "0 1 "


def test_the_tests_bodies_have_the_form_that_clients_send() -> None:
    assert codec.unpack(body(window=3), 1000)["window"] == 3
