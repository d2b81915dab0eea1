"""Batches at a bus of several models: lines that name none, and models that leave."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from client.gateway.keys import add_key
from tests.gateway.batch_caller import CHAT, Caller, Make, line
from tests.harness import Bus, wait_until


@pytest.fixture
def bus_of(make_bus: Callable[..., Bus]) -> Callable[..., Bus]:
    """A bus with a worker for each model, called as the model is; one that leaves is not waited
    for."""

    def make(*models: str) -> Bus:
        bus = make_bus(0, "--model-grace-s", "0.1")
        for model in models:
            serve(bus, model)
        bus.wait_ready(len(models))
        return bus

    return make


def serve(bus: Bus, model: str) -> None:
    bus.start_worker(model, "--model-name", model)


def end(bus: Bus, model: str) -> None:
    """The worker of a model leaves."""
    bus.workers[model].kill()
    wait_until(lambda: model not in models_of(bus), "the model is not served")


def models_of(bus: Bus) -> set[str]:
    return {model["name"] for model in bus.client().models()}


def unnamed(custom_id: str, **body: Any) -> dict[str, Any]:
    """A line without `model`."""
    made = line(custom_id, **body)
    del made["body"]["model"]
    return made


# --- lines that name no model ---------------------------------------------------------------------


def test_a_line_that_names_no_model_fails_at_once_where_there_is_a_choice(
    bus_of: Callable[..., Bus], make_gateway: Make, tmp_path: Path
) -> None:
    gateway = make_gateway("--batch-folder", str(tmp_path / "batches"), bus=bus_of("demo", "other"))
    caller = Caller(gateway)
    done = caller.over(caller.begin(unnamed("a"), line("b", model="demo"), line("c", model=5)))
    assert done.status == "completed"
    counts = done.request_counts
    assert counts and (counts.completed, counts.failed) == (1, 2)
    answers = caller.answers(done)
    told = answers["a"]["response"]["body"]["error"]
    assert told["param"] == "model" and "name one of demo, other" in told["message"]
    with gateway.http() as http:
        at_door = http.post(CHAT, json=unnamed("a")["body"]).json()["error"]
    assert told["message"] == at_door["message"]
    assert answers["c"]["response"]["body"]["error"]["param"] == "model"


def test_a_line_that_names_no_model_keeps_the_only_one_that_its_batch_began_with(
    bus_of: Callable[..., Bus], make_gateway: Make, tmp_path: Path
) -> None:
    bus = bus_of("demo")
    caller = Caller(make_gateway("--batch-folder", str(tmp_path / "batches"), bus=bus))
    slow = "[[echo mode=sampled answer_tokens=100000 step_delay_ms=10]] x"
    batch = caller.begin(unnamed("a", messages=[{"role": "user", "content": slow}]), unnamed("b"))
    caller.until(batch, lambda b: b.request_counts.completed == 1, "the quick one is answered")
    # Neither one that leaves nor one that comes is the line's fault.
    end(bus, "demo")
    serve(bus, "other")
    wait_until(lambda: models_of(bus) == {"other"}, "another model is served")
    serve(bus, "demo")
    wait_until(lambda: bus.running() == 1, "the line runs again")
    rows = bus.client().requests(limit=5)
    assert {row["model"] for row in rows} == {"demo"}
    caller.sdk.batches.cancel(batch.id)
    assert caller.over(batch).request_counts.failed == 1


def test_the_only_model_is_the_only_one_that_the_key_may_use(
    bus_of: Callable[..., Bus], make_gateway: Make, tmp_path: Path
) -> None:
    keys = tmp_path / "keys.toml"
    alice = add_key(keys, "alice", models=["demo"])
    options = ("--batch-folder", str(tmp_path / "batches"), "--keys", str(keys))
    caller = Caller(make_gateway(*options, bus=bus_of("demo", "other")), alice)
    done = caller.over(caller.begin(unnamed("a")))
    assert caller.answers(done)["a"]["response"]["body"]["model"] == "demo"


# --- models that leave ----------------------------------------------------------------------------


def test_a_batch_whose_model_has_left_holds_up_no_other_of_its_key(
    bus_of: Callable[..., Bus], make_gateway: Make, tmp_path: Path
) -> None:
    bus = bus_of("demo", "other")
    keys = tmp_path / "keys.toml"
    alice = add_key(keys, "alice", concurrency=1)
    options = ("--batch-folder", str(tmp_path / "batches"), "--keys", str(keys))
    caller = Caller(make_gateway(*options, bus=bus), alice)
    text = "[[echo mode=sampled answer_tokens=50 step_delay_ms=10]] x"
    body = {"model": "other", "messages": [{"role": "user", "content": text}]}
    first = caller.begin(*[line(f"l{number}", **body) for number in range(6)])
    wait_until(lambda: bus.running() == 1, "a line runs")
    end(bus, "other")
    second = caller.over(caller.begin(line("a", model="demo"), line("b", model="demo")))
    assert second.request_counts and second.request_counts.completed == 2
    assert caller.sdk.batches.retrieve(first.id).status == "in_progress"
    serve(bus, "other")
    done = caller.over(first)
    assert done.request_counts and done.request_counts.completed == 6
    assert len(caller.answers(done)) == 6
