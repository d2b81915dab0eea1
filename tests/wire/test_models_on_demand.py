"""`--models` on a real bus: models take turns at a worker, by demand and by the operator."""

from __future__ import annotations

import os
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from client import Queued
from client.__main__ import main
from client.errors import BusError
from tests.harness import Bus, wait_until
from tests.support.faults import engine_of


@pytest.fixture
def bus(tmp_path: Path):  # type: ignore[no-untyped-def]
    with Bus(tmp_path, "--swap-factor", "1") as started:
        started.start_broker()
        yield started


def loaded(bus: Bus) -> list[str]:
    rows = wait_until(bus.rows, "the broker's list of workers")
    names: list[str] = rows[0]["loaded"]
    return names


def test_models_are_loaded_as_they_are_asked_for(bus: Bus) -> None:
    bus.start_worker("w1", "--models", "a,b,c", load_ms=500)
    bus.wait_ready(1)
    client = bus.client()
    assert loaded(bus) == []
    for model in ("a", "b", "a", "c"):
        assert client.generate("hello", model=model).text == "hello"
        assert loaded(bus) == [model]


def test_those_who_wait_are_told_how_far_it_is(bus: Bus) -> None:
    bus.start_worker("w1", "--models", "a,b", load_ms=3500)
    bus.wait_ready(1)
    events = list(bus.client().generate("hello", model="b", stream=True))
    told = [event.progress for event in events if isinstance(event, Queued)]
    assert told[0] is None and any(told)


def test_many_clients_of_two_models_all_get_their_answers(bus: Bus) -> None:
    bus.start_worker("w1", "--models", "a,b", load_ms=200)
    bus.wait_ready(1)
    client = bus.client()

    def ask(number: int) -> str:
        text = f"number {number}"
        return "" if client.generate(text, model="ab"[number % 2]).text == text else text

    with ThreadPoolExecutor(16) as pool:
        assert not any(pool.map(ask, range(48)))
    # Sixteen wait for each at a time: a swap for every request would be forty-eight.
    assert client.query("bus.stats")["swaps_total"] <= 16


def test_a_stream_goes_on_after_its_engine_was_killed(bus: Bus) -> None:
    worker = bus.start_worker("w1", "--models", "a,b", load_ms=100)
    bus.wait_ready(1)
    client = bus.client()
    whole = client.generate("one two three four five six", model="a").text
    killed = False
    stream = client.generate(
        "one two three four five six", model="a", stream=True, template_args={"step_delay_ms": 20}
    )
    for _ in stream:
        if not killed and len(stream.text_so_far) > 3:
            killed = True
            os.kill(engine_of(worker.pid), signal.SIGKILL)
    assert killed and stream.text_so_far == whole
    assert loaded(bus) == ["a"]


def test_the_operator_loads_and_unloads(bus: Bus, capsys: pytest.CaptureFixture[str]) -> None:
    bus.start_worker("w1", "--models", "a,b", load_ms=100)
    bus.wait_ready(1)
    assert main(["load", "w1", "b", "--broker", bus.front]) == 0
    wait_until(lambda: loaded(bus) == ["b"], "b to be loaded")
    assert main(["unload", "w1", "--broker", bus.front]) == 0
    wait_until(lambda: loaded(bus) == [], "b to be unloaded")
    assert "worker w1: b is loading" in capsys.readouterr().out
    assert main(["load", "w1", "c", "--broker", bus.front]) != 0
    assert "has no model" in capsys.readouterr().err


def test_a_model_that_nobody_asks_for_is_unloaded(bus: Bus) -> None:
    bus.start_worker("w1", "--models", "a,b", "--unload-idle-s", "0.3")
    bus.wait_ready(1)
    assert bus.client().generate("hello", model="a").text == "hello"
    wait_until(lambda: loaded(bus) == [], "a to be unloaded")
    assert bus.client().generate("again", model="a").text == "again"


def test_a_model_that_cannot_be_loaded_is_told_and_the_others_are_served(
    bus: Bus, tmp_path: Path
) -> None:
    pytest.importorskip("torch")
    from worker.demo import model_path

    broken = tmp_path / "models" / "broken"
    broken.mkdir(parents=True)
    (broken / "config.json").write_text("{}")
    (tmp_path / "models" / "demo").symlink_to(model_path())
    bus.start_worker("w1", "--models", str(tmp_path / "models"), engine="transformers")
    bus.wait_ready(1)
    client = bus.client()
    with pytest.raises(BusError):
        client.generate("hello", model="broken", timeout=60)
    assert "model unusable" in bus.workers["w1"].log()
    assert client.generate("hello", model="demo", max_tokens=2).token_ids
