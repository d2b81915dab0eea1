"""Without room for one more process, broker and worker serve on and try again later."""

from __future__ import annotations

import io
import json
import select

import pytest

from broker.config import Config
from broker.log import Logger
from broker.upstream import FIRST_RESTART_S, LOOK_S, Upstream
from tests.harness import PATIENCE_S
from tests.support.descriptors import opened, room_for
from worker.check import CheckFailed, check_engine
from worker.core import events
from worker.engines.base import EngineOptions
from worker.process import supervisor as supervising
from worker.process.display import LoadingDisplay
from worker.process.supervisor import Supervisor

FULL = "Too many open files"


def ready(engine: Supervisor) -> bool:
    assert engine.pipe is not None
    assert select.select([engine.pipe], [], [], PATIENCE_S)[0]
    return any(isinstance(event, events.EngineReady) for event in engine.read(0.0))


def test_an_engine_that_cannot_be_started_is_started_later() -> None:
    engine = Supervisor(EngineOptions(engine="echo"))
    before = opened()
    now_s, wait_s = 0.0, supervising.FIRST_RESTART_S
    for room in range(7):  # at each place where a descriptor is needed
        with room_for(room):
            if room:
                assert engine.tick(now_s) == [events.EngineLoading(None, "restarting the engine")]
            else:
                engine.start()
        assert (engine.pipes, engine.pid, engine.waiting) == ((), None, True)
        assert opened() == before
        (lost,) = engine.read(now_s)
        assert isinstance(lost, events.EngineLost) and FULL in lost.message
        assert not engine.waiting and engine.read(now_s) == []
        # As after a death; but however often it happens, the engine is not blamed.
        assert engine.deadline_s() == pytest.approx(now_s + wait_s)
        assert engine.tick(now_s + wait_s / 2) == []
        now_s, wait_s = engine.deadline_s(), 2 * wait_s
    try:
        engine.tick(now_s)
        while not ready(engine):
            pass
    finally:
        engine.stop()
    assert opened() == before


def test_a_check_says_that_the_engine_cannot_be_started() -> None:
    with room_for(1), pytest.raises(CheckFailed, match=FULL):
        check_engine(EngineOptions(engine="echo"), {}, LoadingDisplay(False))


def test_a_relay_that_cannot_be_started_is_started_later() -> None:
    said = io.StringIO()
    address = "tcp://127.0.0.1:9"
    config = Config(upstream=(address,))
    relay = Upstream(config, address, Logger(said, form="json"))
    before = opened()
    now_s, wait_s = 0.0, FIRST_RESTART_S
    for room in range(5):
        with room_for(room):
            relay.look(now_s, stopping=False)
        assert opened() == before
        line = json.loads(said.getvalue().splitlines()[-1])
        assert (line["event"], line["restart_in_s"]) == ("relay not started", wait_s)
        assert FULL in line["why"]
        relay.look(now_s + LOOK_S, stopping=False)
        assert len(said.getvalue().splitlines()) == room + 1
        now_s, wait_s = now_s + wait_s, 2 * wait_s
    try:
        relay.look(now_s, stopping=False)
        assert json.loads(said.getvalue().splitlines()[-1])["event"] == "relay starts"
    finally:
        relay.close()
    assert opened() == before
