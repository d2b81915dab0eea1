"""`--models` on a real bus: models are loaded and unloaded on demand and by the operator."""

from __future__ import annotations

import os
import re
import signal
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from client import Queued, Tokens
from client.__main__ import main
from client.errors import ModelUnavailable
from tests.gateway.conftest import running_gateway
from tests.harness import PATIENCE_S, Bus, wait_until
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


def test_a_waiting_client_learns_the_progress_of_the_load(bus: Bus) -> None:
    bus.start_worker("w1", "--models", "a,b", load_ms=3500)
    bus.wait_ready(1)
    events = list(bus.client().generate("hello", model="b", stream=True))
    progress = [event.progress for event in events if isinstance(event, Queued)]
    assert progress[0] is None and any(progress)


def test_many_clients_of_two_models_all_get_their_answers(bus: Bus) -> None:
    bus.start_worker("w1", "--models", "a,b", load_ms=200)
    bus.wait_ready(1)
    client = bus.client()

    def ask(number: int) -> str:
        text = f"number {number}"
        return "" if client.generate(text, model="ab"[number % 2]).text == text else text

    with ThreadPoolExecutor(16) as pool:
        assert not any(pool.map(ask, range(48)))
    # Many requests for each model wait at the same time: one swap for each request would be 48.
    assert client.query("bus.stats")["swaps_total"] <= 16


def test_a_stream_goes_on_after_its_engine_was_killed(bus: Bus) -> None:
    worker = bus.start_worker("w1", "--models", "a,b", load_ms=100)
    bus.wait_ready(1)
    client = bus.client()
    whole = client.generate("one two three four five six", model="a").text
    killed = False
    stream = client.generate(
        "one two three four five six",
        model="a",
        stream=True,
        template_args={"echo": {"step_delay_ms": 20}},
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


def test_a_model_that_cannot_be_loaded_is_reported_and_the_others_are_served(
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
    # Each request may take far longer than a load, and a time-out would be another error.
    for _ in range(2):
        with pytest.raises(
            ModelUnavailable, match=r"'broken' cannot be loaded: .*config"
        ) as caught:
            client.generate("hello", model="broken", timeout=PATIENCE_S)
        assert caught.value.retry_after_ms and not caught.value.retryable
    assert "model unusable" in bus.workers["w1"].log()
    with running_gateway(bus) as gateway, gateway.http() as http:
        body = {"model": "broken", "messages": [{"role": "user", "content": "hello"}]}
        answer = http.post("/v1/chat/completions", json=body)
        assert answer.status_code == 503 and int(answer.headers["retry-after"]) > 0
        error = answer.json()["error"]
        assert (error["code"], error["param"]) == ("model_unavailable", "model")
        assert "cannot be loaded" in error["message"]
    assert client.generate("hello", model="demo", max_tokens=2).token_ids


def test_requests_for_the_only_model_fail_if_it_cannot_be_loaded(bus: Bus, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text("{}")
    client = bus.client()
    with ThreadPoolExecutor(1) as pool:
        waits = pool.submit(client.generate, "hello", model="broken", timeout=PATIENCE_S)
        bus.start_worker("w1", "--model-path", str(broken), engine="transformers")
        with pytest.raises(ModelUnavailable, match="cannot be loaded"):
            waits.result()


def test_a_client_that_waits_at_the_gateway_sees_the_progress_of_the_load(bus: Bus) -> None:
    bus.start_worker("w1", "--models", "a,b", load_ms=6000)
    bus.wait_ready(1)
    body = {"model": "b", "messages": [{"role": "user", "content": "hello"}], "stream": True}
    with (
        running_gateway(bus, "--keep-alive-s", "0.5") as gateway,
        gateway.http() as http,
        http.stream("POST", "/v1/chat/completions", json=body) as answer,
    ):
        lines = [line for line in answer.iter_lines() if line]
    comments = [line for line in lines if line.startswith(": waiting") and "loading" in line]
    assert comments and re.search(r"loading \d+ %$", comments[0]), lines
    assert lines[-1] == "data: [DONE]"


def occupied(bus: Bus) -> dict[str, int]:
    found: dict[str, int] = bus.rows()[0]["memory_bytes"]
    return found


def test_as_many_models_are_loaded_as_fit_into_the_memory(bus: Bus) -> None:
    first = bus.start_worker("w1", "--models", "a", "--models-memory", "100GiB")
    bus.wait_ready(1)
    assert bus.client().generate("hello", model="a").text == "hello"
    one = wait_until(lambda: occupied(bus).get("a"), "the engine's memory to be measured")
    first.stop()
    wait_until(lambda: not bus.rows(), "the worker to be gone")
    bus.start_worker("w2", "--models", "a,b,c", "--models-memory", str(int(2.6 * one)))
    bus.wait_ready(1)
    client = bus.client()
    for model in "abc":
        assert client.generate("hello", model=model).text == "hello"
        wait_until(lambda model=model: occupied(bus).get(model), "its memory to be measured")
    wait_until(lambda: loaded(bus) == ["b", "c"], "the least recently used to be unloaded")
    assert client.generate("again", model="a").text == "again"
    wait_until(lambda: loaded(bus) == ["a", "c"], "a to be loaded in place of b")


def test_the_operator_waits_for_a_load_and_unloads_one_of_several(
    bus: Bus, capsys: pytest.CaptureFixture[str]
) -> None:
    bus.start_worker("w1", "--models", "a,b", "--models-memory", "100GiB")
    bus.wait_ready(1)
    for model in "ab":
        assert main(["load", "w1", model, "--wait", "60", "--broker", bus.front]) == 0
    assert "worker w1: b is loaded" in capsys.readouterr().out
    assert loaded(bus) == ["a", "b"]
    assert main(["unload", "w1", "a", "--broker", bus.front]) == 0
    assert "worker w1: a is unloaded" in capsys.readouterr().out
    wait_until(lambda: loaded(bus) == ["b"], "a alone to be unloaded")
    assert main(["unload", "w1", "a", "--broker", bus.front]) == 0
    assert "a is not loaded" in capsys.readouterr().out


def test_the_death_of_one_engine_leaves_the_other_models_streams_alone(bus: Bus) -> None:
    worker = bus.start_worker("w1", "--models", "a,b", "--models-memory", "100GiB")
    bus.wait_ready(1)
    client = bus.client()
    words = "one two three four five six seven eight"
    assert client.generate(words, model="a").text == words
    of_a = engine_of(worker.pid)
    # Load b before the streams begin: on a busy machine, the first would end while b is loaded.
    assert client.generate(words, model="b").text == words
    slow = {"echo": {"step_delay_ms": 60}}
    streams = {
        model: client.generate(words, model=model, stream=True, template_args=slow)
        for model in "ab"
    }
    events = {model: iter(stream) for model, stream in streams.items()}
    for of_model in events.values():
        while not isinstance(next(of_model), Tokens):
            pass
    os.kill(of_a, signal.SIGKILL)
    for of_model in events.values():
        for _ in of_model:
            pass
    assert {stream.text_so_far for stream in streams.values()} == {words}
    assert streams["a"].end.resumed and not streams["b"].end.resumed


def test_adapters_of_a_folder_are_loaded_by_the_operator_or_on_demand(
    bus: Bus, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("peft")
    from tests.engines import tiny
    from tests.engines.tuned_models import generated, save, tuned

    base, folder = save(tmp_path / "base", tiny.llama()), tmp_path / "adapters"
    ids = [5, 6, 7, 8, 9]
    wanted = {"base": generated(tiny.llama(), ids)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for seed, name in enumerate(("one", "two"), 1):
            wanted[name] = generated(tuned(folder / name, tiny.llama(), seed=seed), ids)
        tuned(folder / "alien", tiny.llama(hidden=32))
    options = ["--model-path", str(base), "--model-name", "base", "--device", "cpu"]
    options += ["--dtype", "float32", "--engine-arg", f"adapters_folder={folder}"]
    worker = bus.start_worker("w1", *options, engine="transformers")
    bus.wait_ready(1)
    client = bus.client()

    def answer(model: str) -> list[int]:
        found = client.generate(
            token_ids=ids, model=model, max_tokens=12, temperature=0.0, ignore_eos=True
        )
        return found.token_ids

    assert loaded(bus) == ["base"]
    assert main(["load", "w1", "one", "--wait", "60", "--broker", bus.front]) == 0
    assert loaded(bus) == ["base", "one"]
    assert {name: answer(name) for name in ("base", "one")} == {
        name: wanted[name] for name in ("base", "one")
    }
    assert answer("two") == wanted["two"], "loaded because somebody asked for it"
    assert main(["unload", "w1", "one", "--broker", bus.front]) == 0
    wait_until(lambda: loaded(bus) == ["base", "two"], "one to be unloaded")
    assert main(["load", "w1", "alien", "--wait", "60", "--broker", bus.front]) == 1
    assert "alien was not loaded" in capsys.readouterr().err
    assert main(["load", "w1", "../one", "--broker", bus.front]) != 0
    assert answer("base") == wanted["base"]
    assert "engine starts" in worker.log() and worker.log().count("engine starts") == 1
