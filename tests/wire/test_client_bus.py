"""The client library on a real bus: broker and echo worker processes on loopback."""

from __future__ import annotations

import asyncio
import gc
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from client import (
    AsyncClient,
    Client,
    ConnectTimeout,
    End,
    EngineError,
    InvalidRequest,
    ModelUnavailable,
    OutOfMemory,
    Recovering,
    Retry,
    Started,
    Timeout,
    Tokens,
    TotalTimeout,
    Unauthenticated,
)
from tests.harness import PATIENCE_S, ROOT, Bus, wait_until
from tests.wire.many_streams import WINDOW_TOKENS

MakeBus = Callable[..., Bus]


def sampled(tokens: int, delay_ms: float = 0, **more: Any) -> dict[str, Any]:
    """Parameters of a random answer of this many tokens, with this many milliseconds per step."""
    echo = {"mode": "sampled", "answer_tokens": tokens, "step_delay_ms": delay_ms, **more}
    return {"template_args": {"echo": {key: str(value) for key, value in echo.items()}}}


ENDLESS = sampled(100_000, 5)
#: Options of a stream that cannot end while nobody reads it.
IN_ITS_MIDDLE: dict[str, Any] = {"stream": True, "window": WINDOW_TOKENS}


def test_both_clients_read_the_workers_answer(bus: Bus) -> None:
    client = bus.client()

    async def the_same() -> str:
        async with AsyncClient(bus.front) as other:
            stream = await other.chat("echo", "héllo wörld", stream=True)
            return "".join([piece async for piece in stream.text])

    assert client.chat("echo", "héllo wörld").text == "héllo wörld"
    assert asyncio.run(the_same()) == "héllo wörld"


def test_every_kind_of_request_is_answered(bus: Bus) -> None:
    client = bus.client()
    ids = client.tokenize("hello")
    assert client.detokenize(ids) == "hello"
    assert client.tokenize("hello", add_special_tokens=False) == ids, "the echo engine has none"
    assert client.count("hello") == client.count(token_ids=ids) == len(ids)
    assert client.generate("raw prompt").text == "raw prompt"
    assert client.generate(token_ids=ids).text == "hello"
    assert "hello" in client.template([{"role": "user", "content": "hello"}])
    many = [f"text {n}" for n in range(40)]  # more than fit into one request
    vectors = client.embed(many)
    assert len(vectors.vectors) == 40
    assert {len(vector) for vector in vectors.vectors} == {vectors.dimensions}
    assert client.embed("text 39").vectors[0] == vectors.vectors[39]
    assert {row["name"] for row in client.workers()} == {"w1", "w2"}
    assert [row["name"] for row in client.models()] == ["echo"]
    assert client.query("bus.version")["protocol"] == 1


def test_sixty_four_streams_share_two_workers(bus: Bus) -> None:
    async def main() -> list[Any]:
        async with AsyncClient(bus.front) as client:
            calls = (client.chat("echo", f"question {n}", seed=n, **sampled(50)) for n in range(64))
            return list(await asyncio.gather(*calls))

    answers = asyncio.run(main())
    assert [len(answer.token_ids) for answer in answers] == [50] * 64
    assert len({answer.text for answer in answers}) == 64
    assert {answer.worker for answer in answers} == {"w1", "w2"}


def test_a_seed_gives_the_same_answer_again(bus: Bus) -> None:
    client = bus.client()
    first = client.chat("echo", "x", **sampled(40))
    again = client.chat("echo", "x", seed=first.seed, **sampled(40))
    other = client.chat("echo", "x", **sampled(40))
    assert first.text == again.text != other.text


def _break(client: Client) -> None:
    for event in client.chat("echo", "x", stream=True, **ENDLESS):
        if isinstance(event, Tokens):
            break


def _close_stream(client: Client) -> None:
    with client.chat("echo", "x", stream=True, **ENDLESS) as stream:
        next(stream.text)


def _close_client(client: Client) -> None:
    stream = client.chat("echo", "x", stream=True, **ENDLESS)
    next(stream.text)
    client.close()


def _forget(client: Client) -> None:
    stream = client.chat("echo", "x", stream=True, **ENDLESS)
    next(iter(stream))
    del stream
    gc.collect()


def _run_out_of_time(client: Client) -> None:
    with pytest.raises(TotalTimeout):
        client.chat("echo", "x", timeout=Timeout(total=0.3), **ENDLESS)


def _cancel_the_task(client: Client) -> None:
    async def main() -> None:
        async with AsyncClient(client.brokers[0]) as other:
            started = asyncio.Event()

            async def ask() -> None:
                async for event in await other.chat("echo", "x", stream=True, **ENDLESS):
                    if isinstance(event, Tokens):
                        started.set()

            task = asyncio.create_task(ask())
            await started.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    asyncio.run(main())


@pytest.mark.parametrize(
    "leave", [_break, _close_stream, _close_client, _forget, _run_out_of_time, _cancel_the_task]
)
def test_a_caller_that_stops_reading_frees_the_workers_slot(
    bus: Bus, leave: Callable[[Client], None]
) -> None:
    client = Client(bus.front)
    leave(client)
    bus.wait_idle()
    client.close()


@pytest.mark.parametrize(("fault", "cls"), [("error_at", EngineError), ("oom_at", OutOfMemory)])
def test_an_engine_failure_raises_its_error_after_the_tokens_before_it(
    bus: Bus, fault: str, cls: type[Exception]
) -> None:
    client = bus.client()
    stream = client.chat("echo", "x", stream=True, **sampled(50, **{fault: 5}))
    seen: list[int] = []
    with pytest.raises(cls) as caught:
        for event in stream:
            if isinstance(event, Tokens):
                seen += event.token_ids
    assert len(seen) == 5
    assert caught.value.partial  # type: ignore[attr-defined]
    assert caught.value.worker in ("w1", "w2")  # type: ignore[attr-defined]


def test_the_error_for_an_unknown_model_comes_at_once_and_lists_the_models(bus: Bus) -> None:
    with pytest.raises(ModelUnavailable, match="echo"):
        bus.client().chat("nope", "x")


def test_a_slow_reader_gets_everything_and_slows_no_other_stream(bus: Bus) -> None:
    client = bus.client()
    slow = client.chat("echo", "x", stream=True, window=16, seed=3, **sampled(400))
    events = iter(slow)
    while not isinstance(next(events), Tokens):
        pass
    for n in range(20):  # other streams are served meanwhile
        assert client.chat("echo", f"other {n}").text == f"other {n}"
    waiting = sum(
        len(item.token_ids)
        for item in list(slow._items)
        + [item for batch in _drained(slow._inbox._queue) for item in batch]
        if isinstance(item, Tokens)
    )
    assert waiting <= 16
    slow.close()
    whole = client.chat("echo", "x", window=16, seed=3, **sampled(400))
    assert whole.text == client.chat("echo", "x", seed=3, **sampled(400)).text
    assert len(whole.token_ids) == 400


def _drained(queue: Any) -> list[Any]:
    batches = []
    while not queue.empty():
        batches.append(queue.get())
    return batches


# --- things that die ------------------------------------------------------------------------------


def reference(bus: Bus, tokens: int, seed: int = 11) -> str:
    """The answer without any fault."""
    return bus.client().chat("echo", "x", seed=seed, **sampled(tokens)).text


def read_with(
    stream: Any, after_tokens: int, fault: Callable[[], None]
) -> tuple[str, list[Any], End]:
    """Read a stream to its end, and call `fault` once `after_tokens` tokens have arrived."""
    text, events, seen, done = "", [], 0, False
    for event in stream:
        events.append(event)
        if isinstance(event, Tokens | End):
            text += event.text
        if isinstance(event, Tokens):
            seen += len(event.token_ids)
            if seen >= after_tokens and not done:
                done = True
                fault()
    return text, events, stream.end


def test_a_killed_worker_costs_a_pause_and_no_token(make_bus: MakeBus) -> None:
    bus = make_bus(workers=2)
    expected = reference(bus, 300)
    stream = bus.client().chat("echo", "x", seed=11, **IN_ITS_MIDDLE, **sampled(300, 3))
    text, events, end = read_with(stream, 50, lambda: bus.workers[stream.worker].kill())
    assert text == expected
    assert end.resumed == 1
    first, second = (event.worker for event in events if isinstance(event, Started))
    assert {first, second} == {"w1", "w2"}
    assert sum(isinstance(event, Recovering) for event in events) == 1


def test_a_restarted_broker_costs_a_pause_and_no_token(make_bus: MakeBus) -> None:
    bus = make_bus(workers=1)
    expected = reference(bus, 300)
    stream = bus.client().chat("echo", "x", seed=11, **IN_ITS_MIDDLE, **sampled(300, 3))

    def restart() -> None:
        bus.broker.kill()
        bus.start_broker()

    text, _, end = read_with(stream, 50, restart)
    assert text == expected
    assert (end.resumed, end.worker) == (1, "w1")


def test_a_drained_worker_hands_its_streams_over(make_bus: MakeBus) -> None:
    bus = make_bus(workers=2)
    expected = reference(bus, 400)
    client = bus.client()
    stream = client.chat("echo", "x", seed=11, **IN_ITS_MIDDLE, **sampled(400, 5))
    text, _, end = read_with(
        stream, 20, lambda: client.drain(stream.worker, deadline_s=0.1) and None
    )
    assert text == expected
    assert end.resumed == 1


def test_fifty_streams_survive_a_killed_worker_and_a_killed_broker(make_bus: MakeBus) -> None:
    bus = make_bus(workers=2, slots=32)
    expected = {n: reference(bus, 300, seed=n) for n in range(50)}

    async def main() -> dict[int, Any]:
        async with AsyncClient(bus.front) as client:
            calls = {
                n: asyncio.create_task(client.chat("echo", "x", seed=n, **sampled(300, 30)))
                for n in range(50)
            }
            await asyncio.to_thread(wait_until, lambda: bus.running() == 50, "all streams running")
            bus.workers["w1"].kill()
            bus.broker.kill()
            await asyncio.to_thread(bus.start_broker)
            return {n: await call for n, call in calls.items()}

    answers = asyncio.run(main())
    assert {n: answer.text for n, answer in answers.items()} == expected
    assert all(answer.resumed >= 1 for answer in answers.values())


def test_without_retries_a_killed_worker_is_an_error(make_bus: MakeBus) -> None:
    bus = make_bus(workers=1)
    stream = bus.client().chat("echo", "x", stream=True, retry=Retry(attempts=0), **ENDLESS)
    with pytest.raises(Exception, match="w1") as caught:
        read_with(stream, 5, lambda: bus.workers["w1"].kill())
    assert type(caught.value).__name__ == "WorkerLost"


def test_a_broker_that_is_paused_for_a_while_loses_nothing(make_bus: MakeBus) -> None:
    bus = make_bus(workers=1)
    expected = reference(bus, 200)
    stream = bus.client().chat("echo", "x", seed=11, **IN_ITS_MIDDLE, **sampled(200, 3))

    def pause() -> None:
        broker = bus.broker
        broker.signal(signal.SIGSTOP)
        threading.Timer(0.7, broker.signal, (signal.SIGCONT,)).start()

    text, _, end = read_with(stream, 30, pause)
    assert text == expected
    assert end.resumed == 0


# --- keys -----------------------------------------------------------------------------------------


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    """The folder that `python -m broker keys` makes."""
    folder = tmp_path / "keys"
    command = [sys.executable, "-m", "broker", "keys", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return folder


def test_with_keys_a_client_on_the_list_is_served_and_others_learn_why_not(
    make_bus: MakeBus, keys: Path
) -> None:
    bus = make_bus(0, "--keys", str(keys))
    quick = Timeout(connect=PATIENCE_S)
    public, own = str(keys / "broker.key"), keys / "client.key_secret"
    with Client(bus.front, server_key=public, key_file=own, timeout=quick) as client:
        assert client.models() == []
    with (
        Client(bus.front, server_key=public, timeout=quick) as client,
        pytest.raises(Unauthenticated, match="allow-list"),
    ):
        client.models()
    keyless = Client(bus.front, timeout=Timeout(connect=5))
    with keyless, pytest.raises((Unauthenticated, ConnectTimeout), match=r"demands? CURVE"):
        keyless.models()
    with pytest.raises(InvalidRequest, match="nowhere"):
        Client(bus.front, server_key=public, key_file=keys / "nowhere")
    with pytest.raises(InvalidRequest, match="no secret key"):
        Client(bus.front, server_key=public, key_file=public)
