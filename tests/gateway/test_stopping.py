"""A gateway that stops: the last event of its open streams, and the effect of a second signal."""

from __future__ import annotations

import json
import signal
import socket
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

import httpx2 as httpx
import openai
import pytest

from tests.gateway.conftest import GatewayProcess
from tests.harness import PATIENCE_S, wait_until

SLOW = "[[echo mode=sampled answer_tokens=100000 step_delay_ms=20]] x"


def _stopped_in_the_middle(gateway: GatewayProcess, signals: int) -> openai.APIError:
    """Read a stream until its end, which must be an error; the signals come after a few events."""
    client = openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="none", max_retries=0)
    stream = client.chat.completions.create(
        model="echo", messages=[{"role": "user", "content": SLOW}], stream=True
    )
    with client, stream, pytest.raises(openai.APIError) as caught:
        for number, _ in enumerate(stream):
            if number in range(5, 5 + 20 * signals, 20):
                gateway.process.signal(signal.SIGTERM)
    return caught.value


def test_streams_that_outlast_the_shutdown_time_end_with_an_error(
    make_gateway: Callable[..., GatewayProcess],
) -> None:
    gateway = make_gateway("--shutdown-s", "1")
    error = _stopped_in_the_middle(gateway, signals=1)
    assert "This gateway is stopping" in error.message
    assert error.code == "draining"
    assert gateway.process.popen.wait(PATIENCE_S) == 0


def _listens(gateway: GatewayProcess) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", urlsplit(gateway.url).port)) == 0


def _read(http: httpx.Client, chat: dict[str, Any], begun: threading.Event) -> str:
    """A whole stream; `begun`: its first event has come."""
    text = ""
    with http.stream("POST", "/v1/chat/completions", json=chat) as answer:
        for part in answer.iter_text():
            text += part
            begun.set()
    return text


@pytest.mark.parametrize("signals", [1, 2])
def test_answers_of_every_kind_end_with_an_error_and_their_requests_are_cancelled(
    make_gateway: Callable[..., GatewayProcess], signals: int
) -> None:
    """At the end of the shutdown time, or at once after a second signal."""
    gateway = make_gateway("--shutdown-s", "1" if signals == 1 else "3600")
    chat = {"model": "echo", "messages": [{"role": "user", "content": SLOW}]}
    legacy = {"model": "echo", "prompt": SLOW, "max_new_tokens": 5000}
    asked: list[tuple[str, dict[str, Any]]] = [
        ("/v1/chat/completions", chat),
        ("/v1/responses", {"model": "echo", "input": SLOW}),
        ("/v1/completions", {"model": "echo", "prompt": SLOW, "max_tokens": 5000}),
        ("/worker_generate_stream", legacy),
        ("/worker_generate", legacy),
    ]
    with ThreadPoolExecutor() as threads, gateway.http() as http:
        answers = [threads.submit(http.post, path, json=body) for path, body in asked]
        begun = threading.Event()
        events = threads.submit(_read, http, {**chat, "stream": True}, begun)
        wait_until(lambda: gateway.bus.running() == len(asked) + 1, "running requests")
        assert begun.wait(PATIENCE_S)
        gateway.process.signal(signal.SIGTERM)
        if signals == 2:
            wait_until(lambda: not _listens(gateway), "a closed port")  # two at once are one
            gateway.process.signal(signal.SIGTERM)
        whole, response, completion, frames, frame = (one.result() for one in answers)
        stream = events.result()
    for answer in (whole, response, completion):
        assert answer.status_code == 503, answer.text
        assert answer.json()["error"]["code"] == "draining"
        assert answer.headers["x-should-retry"] == "true"
    *_, error, done = stream.split("\n\n")[:-1]
    assert json.loads(error.partition("data: ")[2])["error"]["code"] == "draining"
    assert done == "data: [DONE]"
    for answer in (frames, frame):
        last = json.loads(answer.content.split(b"\0")[-2 if answer is frames else 0])
        assert last["error_code"] == 1 and "NETWORK ERROR" in last["text"]
    assert gateway.process.popen.wait(PATIENCE_S) == 0
    assert "Traceback" not in gateway.process.log()
    wait_until(lambda: gateway.bus.running() == 0, "free slots")


def test_a_second_signal_does_not_wait(make_gateway: Callable[..., GatewayProcess]) -> None:
    gateway = make_gateway("--shutdown-s", "3600")
    assert "This gateway is stopping" in _stopped_in_the_middle(gateway, signals=2).message
    assert gateway.process.popen.wait(PATIENCE_S) == 0
