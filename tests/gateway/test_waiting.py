"""What the gateway tells somebody whose request waits: place and expected start as headers and in
the comments of a stream of events; and at once that it will not start in time."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import httpx2 as httpx
import pytest

from tests.gateway.conftest import GatewayProcess
from tests.harness import Bus, wait_until

PLACE, START = "x-queue-position", "x-expected-start-ms"


def body(tokens: int, **more: object) -> dict[str, object]:
    """A chat whose answer has so many tokens, one every 20 ms."""
    prompt = f"[[echo mode=sampled answer_tokens={tokens}]] x"
    messages = [{"role": "user", "content": prompt}]
    return {"model": "echo", "messages": messages, "max_tokens": tokens, **more}


@pytest.fixture
def one_slot(
    make_bus: Callable[..., Bus], make_gateway: Callable[..., GatewayProcess]
) -> Iterator[httpx.Client]:
    """A gateway before one slot, whose speed is known."""
    bus = make_bus(workers=1, slots=1, step_delay_ms=20)
    with make_gateway("--keep-alive-s", "0.2", bus=bus).http() as http:
        for _ in range(6):
            assert http.post("/v1/chat/completions", json=body(10)).status_code == 200
        yield http


def comments(lines: Iterator[str], most: int) -> list[dict[str, str]]:
    """The comments about waiting with which a stream of events begins."""
    found = []
    for line in lines:
        if line.startswith(": waiting "):
            words = line.removeprefix(": waiting ").split()
            found.append(dict(word.split("=", 1) for word in words))
            if len(found) == most:
                break
        assert not line.startswith("data:"), line
    return found


def test_a_waiting_stream_tells_its_place_and_start_in_headers_and_comments(
    one_slot: httpx.Client,
) -> None:
    with ExitStack() as stack:

        def stream(tokens: int) -> httpx.Response:
            sent = body(tokens, stream=True)
            return stack.enter_context(
                one_slot.stream("POST", "/v1/chat/completions", json=sent, timeout=None)
            )

        runs = stream(100_000)
        assert PLACE not in runs.headers and START not in runs.headers
        lines = runs.iter_lines()
        assert next(line for line in lines if line.startswith("data:"))
        first, second = stream(10), stream(10)
        for place, response in enumerate((first, second)):
            assert response.status_code == 200
            assert response.headers[PLACE] == str(place)
            assert int(response.headers[START]) > 0
        # The second has a longer wait than the first, since it waits for the first too.
        assert int(second.headers[START]) > int(first.headers[START]) / 2
        told = comments(second.iter_lines(), 3)
        assert [comment[PLACE] for comment in told] == ["1"] * 3
        assert all(int(comment[START]) >= 0 for comment in told)
        runs.close()
        rest = list(first.iter_lines())
        assert json.loads(next(line for line in rest if line.startswith("data:"))[5:])
        assert rest[-2:] == ["data: [DONE]", ""] or "data: [DONE]" in rest
        assert not any(line.startswith(": waiting") for line in rest[-4:])


def test_what_cannot_start_in_time_is_refused_at_once_with_the_reason_and_when_to_come_back(
    one_slot: httpx.Client,
) -> None:
    def ask(_: int = 0, **more: object) -> httpx.Response:
        return one_slot.post("/v1/chat/completions", json=body(25, **more), timeout=None)

    stop = threading.Event()

    def asks(_: int) -> int:
        count = 0
        while not stop.is_set():
            assert ask().status_code == 200
            count += 1
        return count

    with ThreadPoolExecutor(12) as pool:
        # Twelve ask again as soon as they are answered, so eleven wait all the time: until the
        # broker knows its own waits well enough, a request with a short limit fails at its limit.
        done = [pool.submit(asks, number) for number in range(12)]
        try:
            refusals = []

            def refused() -> bool:
                answer = ask(queue_ms=50)
                if answer.status_code == 200:
                    return False
                error = answer.json()["error"]
                if error["code"] == "deadline_exceeded":
                    return False
                assert error["code"] == "overloaded", error
                refusals.append(answer)
                return True

            wait_until(refused, "a refusal at once")
        finally:
            stop.set()
        assert sum(future.result() for future in done) >= 8
    (answer,) = refusals
    message = answer.json()["error"]["message"]
    assert "requests wait for model echo before this one" in message
    # The client watches its own limit; the one that it gives the broker is a second longer.
    assert "may wait for 1.05 s at most" in message
    after_ms = int(answer.headers["retry-after-ms"])
    assert after_ms > 500, "eleven answers of half a second are before it"
    assert int(answer.headers["retry-after"]) == -(-after_ms // 1000)
