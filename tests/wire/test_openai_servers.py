"""Workers in front of running OpenAI-compatible servers, on a real bus.

Servers are killed in the middle of streams, come back or refuse, and clients learn how their
answers went on.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("httpx2")

from client import Client, Started, Tokens
from client.errors import BusError
from tests.harness import Bus, wait_until
from tests.support.openai_process import StandIn


@pytest.fixture
def bus(tmp_path: Path) -> Iterator[Bus]:
    with Bus(tmp_path) as started:
        started.start_broker()
        yield started


def front(bus: Bus, name: str, server: StandIn, **args: Any) -> None:
    bus.start_worker(name, engine="openai", base_url=server.url, **args)


def ask(client: Client, text: str, **fields: Any) -> Any:
    return client.chat([{"role": "user", "content": text}], model="stand-in", **fields)


def killed_in_the_middle(bus: Bus, servers: dict[str, StandIn], **fields: Any) -> Any:
    """Kill the server of an answer after some tokens; return its text, how it went on, its end."""
    texts: list[str] = []
    continued: list[str] = []
    fields = {"temperature": 0, "max_tokens": 20, "seed": 7, **fields}
    stream = bus.client().chat(
        [{"role": "user", "content": "tell me #long"}], model="stand-in", stream=True, **fields
    )
    with stream:
        for event in stream:
            if isinstance(event, Started):
                continued.append(event.continued)
            elif isinstance(event, Tokens):
                texts.append(event.text)
                if len(texts) == 6:
                    servers[stream.worker].kill()
    return stream.text_so_far, continued, stream.end


@pytest.mark.parametrize("manner", ["flag", "none"])
def test_a_stream_survives_its_server_and_says_how(bus: Bus, manner: str) -> None:
    with (
        StandIn(delay_ms=30, manner=manner) as one,
        StandIn(delay_ms=30, manner=manner) as other,
    ):
        front(bus, "one", one)
        front(bus, "other", other)
        bus.wait_ready(2)
        whole = ask(bus.client(), "tell me #long", temperature=0, max_tokens=20)
        text, continued, end = killed_in_the_middle(bus, {"one": one, "other": other})
        assert text == whole.text
        assert continued == ["", "text"]
        assert (end.continued, end.resumed) == ("text", 1)
        assert whole.continued == ""
        assert bus.client().query("bus.stats")["resumes_inexact_total"] == 1
        (row,) = bus.client().query("bus.models")
        assert (row["name"], row["resume"]) == ("stand-in", "text")


def test_a_server_that_comes_back_is_served_again(bus: Bus) -> None:
    """With one server, the stream waits for it and goes on; the worker says what it waits for."""
    with StandIn(delay_ms=30) as server:
        front(bus, "one", server)
        bus.wait_ready(1)
        client = bus.client()
        whole = ask(client, "tell me #long", temperature=0, max_tokens=20)
        stream = client.chat(
            [{"role": "user", "content": "tell me #long"}],
            model="stand-in",
            temperature=0,
            max_tokens=20,
            stream=True,
        )
        with stream:
            seen = 0
            for event in stream:
                if isinstance(event, Tokens):
                    seen += 1
                if seen == 5 and isinstance(event, Tokens):
                    server.kill()
                    note = wait_until(
                        lambda: next((r["note"] for r in bus.rows() if "waiting" in r["note"]), ""),
                        "the worker to say that it waits",
                    )
                    assert "127.0.0.1" in note and "connect" in note
                    server.start()
        assert stream.text_so_far == whole.text
        assert "Traceback" not in bus.workers["one"].log()
        assert "is gone" in bus.workers["one"].log()


def test_a_request_to_a_busy_server_is_retried(bus: Bus) -> None:
    with StandIn() as server:
        front(bus, "one", server)
        bus.wait_ready(1)
        assert ask(bus.client(), "#busy", temperature=0, max_tokens=4).text
        assert len([b for b in server.bodies() if "#busy" in str(b)]) == 2


def test_an_answer_whose_connection_breaks_goes_on_at_the_same_server(bus: Bus) -> None:
    with StandIn(delay_ms=5) as server:
        front(bus, "one", server)
        bus.wait_ready(1)
        answer = ask(bus.client(), "#cut=5", temperature=0, max_tokens=12)
        assert len(answer.text.split()) == 12
        assert answer.continued == "text"


def test_in_a_mixed_pool_an_answer_moves_only_to_a_worker_that_can_continue_it(bus: Bus) -> None:
    """Ids that carry text never reach a worker that would read them as its model's own."""
    with StandIn(delay_ms=30) as server:
        front(bus, "one", server)
        bus.wait_ready(1)
        stream = bus.client().chat(
            [{"role": "user", "content": "tell me #long"}],
            model="stand-in",
            temperature=0,
            max_tokens=20,
            stream=True,
        )
        with stream:
            seen = 0
            for event in stream:
                seen += isinstance(event, Tokens)
                if seen == 4 and isinstance(event, Tokens):
                    # An echo worker of the same name would answer something else.
                    bus.start_worker("echo", "--model-name", "stand-in")
                    bus.wait_ready(2)
                    server.kill()
                    wait_until(lambda: any(r["state"] != "ready" for r in bus.rows()), "the loss")
                    server.start()
        assert stream.worker == "one"
        assert len(stream.text_so_far.split()) == 20


def test_what_the_server_refuses_is_the_callers_fault_and_not_poison(bus: Bus) -> None:
    with StandIn() as server:
        front(bus, "one", server)
        bus.wait_ready(1)
        with pytest.raises(BusError, match="that parameter is wrong") as caught:
            ask(bus.client(), "#bad")
        assert caught.value.code == "invalid_request"
