"""A broker as a worker of another: two brokers, the relay between them, echo workers below."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from broker import auth
from broker.protocol.limits import MAX_NAME_BYTES
from client import Client, EngineError, ModelUnavailable, Timeout, Tokens
from client.cli.local_bus import ManagedProcess
from tests.harness import PATIENCE_S, Bus, wait_until
from tests.wire.many_streams import WINDOW_TOKENS

MakeBus = Callable[..., Bus]


def sampled(tokens: int, delay_ms: float = 0, **more: Any) -> dict[str, Any]:
    """Parameters of a random answer of this many tokens, with this many milliseconds per step."""
    echo = {"mode": "sampled", "answer_tokens": tokens, "step_delay_ms": delay_ms, **more}
    return {"template_args": {"echo": {key: str(value) for key, value in echo.items()}}}


def relays(upper: Bus) -> list[dict[str, Any]]:
    """The workers of a broker that are brokers themselves."""
    return [row for row in upper.rows() if row["engine"] == "bus"]


def free(upper: Bus) -> int:
    """The relays' credit that the upper broker has not spent."""
    return sum(row["granted"] - row["assigned"] for row in relays(upper) if row["state"] == "ready")


def wait_free(upper: Bus, slots: int) -> None:
    wait_until(
        lambda: free(upper) == slots, f"{slots} free slots", story=lambda: f"{relays(upper)}"
    )


def relay_pid(lower: Bus) -> int:
    """Process id of the relay that the lower broker started last."""
    lines = [json.loads(line) for line in lower.broker.log().splitlines() if line.startswith("{")]
    return int([line["pid"] for line in lines if line["event"] == "relay starts"][-1])


@pytest.fixture
def pair(make_bus: MakeBus) -> tuple[Bus, Bus]:
    """An upper broker with no workers of its own; below it a bus with two workers of four slots."""
    upper = make_bus(0)
    lower = make_bus(2, "--upstream", upper.back, slots=4)
    wait_free(upper, 8)
    return upper, lower


def test_the_upper_bus_answers_as_the_lower_one_does(pair: tuple[Bus, Bus]) -> None:
    upper, lower = pair
    above, below = upper.client(), lower.client()
    for client in (above, below):
        assert client.chat("echo", "héllo wörld").text == "héllo wörld"
    asked: list[Callable[[Client], Any]] = [
        lambda client: client.tokenize("hello"),
        lambda client: client.count("hello"),
        lambda client: client.detokenize(client.tokenize("hello")),
        lambda client: client.template([{"role": "user", "content": "hello"}]),
        lambda client: client.embed(["one", "two"]).vectors,
    ]
    for ask in asked:
        assert ask(above) == ask(below)
    params = {"seed": 7, "logprobs": 3, "prompt_logprobs": 1, "echo": True, **sampled(40)}
    one, two = above.generate("prompt", **params), below.generate("prompt", **params)
    for fact in ("text", "token_ids", "logprobs", "finish_reason", "usage"):
        assert getattr(one, fact) == getattr(two, fact), fact
    assert one.prompt is not None and two.prompt is not None
    assert one.prompt.token_ids == two.prompt.token_ids
    assert one.prompt.logprobs == two.prompt.logprobs
    (row,) = relays(upper)
    assert row["models"] == ["echo"] and row["via"] == [row["name"].rpartition(".")[0]]
    wait_free(upper, 8)


def test_an_error_of_the_lower_bus_is_the_same_at_the_upper_one(pair: tuple[Bus, Bus]) -> None:
    upper, lower = pair
    errors = []
    for bus in (upper, lower):
        with pytest.raises(EngineError) as caught:
            bus.client().chat("echo", "x", seed=1, **sampled(50, error_at=5))
        errors.append((caught.value.code, caught.value.message, caught.value.retryable))
        assert caught.value.partial
    assert errors[0] == errors[1]
    with pytest.raises(ModelUnavailable, match="echo"):
        upper.client().chat("nope", "x")


def test_a_stream_that_is_dropped_above_frees_its_slot_below(pair: tuple[Bus, Bus]) -> None:
    upper, lower = pair
    stream = upper.client().chat("echo", "x", stream=True, **sampled(100_000, 5))
    wait_until(lambda: lower.running() == 1, "the stream below")
    stream.close()
    lower.wait_idle()
    wait_free(upper, 8)


def test_credit_above_follows_the_free_slots_of_the_lower_bus(pair: tuple[Bus, Bus]) -> None:
    upper, lower = pair
    direct = lower.client()
    streams = [direct.chat("echo", "x", stream=True, **sampled(100_000, 5)) for _ in range(6)]
    wait_until(lambda: lower.running() == 6, "six streams below")
    wait_free(upper, 2)
    for stream in streams[:3]:
        stream.close()
    wait_free(upper, 5)
    for stream in streams[3:]:
        stream.close()
    wait_free(upper, 8)


def test_nothing_waits_unseen_in_the_lower_broker(make_bus: MakeBus) -> None:
    """Models of different workers share one relay, and each gets its own slots."""
    upper = make_bus(0)
    lower = make_bus(0, "--upstream", upper.back)
    lower.start_worker("a", "--model-name", "one", slots=3)
    lower.start_worker("b", "--model-name", "two", slots=2)
    lower.wait_ready(2)
    wait_free(upper, 5)
    assert sorted(row["name"] for row in upper.client().models()) == ["one", "two"]
    watcher, over, queued = lower.client(), threading.Event(), []

    def watch() -> None:
        while not over.wait(0.01):
            queued.append(sum(row["queued"] for row in watcher.models()))

    thread = threading.Thread(target=watch)
    thread.start()
    client = upper.client()
    try:
        with ThreadPoolExecutor(32) as pool:
            answers = list(
                pool.map(
                    lambda n: client.chat("two" if n % 4 else "one", "x", seed=n, **sampled(20, 4)),
                    range(32),
                )
            )
    finally:
        over.set()
        thread.join()
    assert all(len(answer.token_ids) == 20 for answer in answers)
    assert len(queued) > 5 and max(queued) == 0
    wait_free(upper, 5)


# --- deaths in the middle of streams --------------------------------------------------------------

STREAMS = 6
LENGTH = 150


@pytest.fixture
def expected(pair: tuple[Bus, Bus]) -> list[list[int]]:
    """The answers to these streams if nothing fails."""
    client = pair[1].client()
    return [client.chat("echo", "x", seed=n, **sampled(LENGTH)).token_ids for n in range(STREAMS)]


def stream_through(upper: Bus, strike: Callable[[], None]) -> list[Any]:
    """The completions of streams that were all in the middle when `strike` was called."""
    client = upper.client(timeout=Timeout(total=PATIENCE_S))
    begun = threading.Barrier(STREAMS + 1)

    def read(seed: int) -> Any:
        # The window keeps each stream from ending before the slowest has begun.
        options = {"stream": True, "window": WINDOW_TOKENS, **sampled(LENGTH, 10)}
        stream = client.chat("echo", "x", seed=seed, **options)
        count = 0
        for event in stream:
            if isinstance(event, Tokens):
                if count < 10 <= count + len(event.token_ids):
                    begun.wait(PATIENCE_S)
                count += len(event.token_ids)
        return stream.result()

    with ThreadPoolExecutor(STREAMS) as pool:
        answers = [pool.submit(read, seed) for seed in range(STREAMS)]
        begun.wait(PATIENCE_S)
        strike()
        return [answer.result(PATIENCE_S) for answer in answers]


def _kill(process: ManagedProcess | None) -> None:
    assert process is not None
    process.kill()


def _kill_a_worker(upper: Bus, lower: Bus) -> None:
    _kill(lower.workers["w1"])


def _kill_the_lower_broker(upper: Bus, lower: Bus) -> None:
    # The broker alone: its relay is another process.
    lower.broker.signal(signal.SIGKILL)
    lower.broker.popen.wait()
    lower.start_broker()


def _kill_the_relay(upper: Bus, lower: Bus) -> None:
    os.kill(relay_pid(lower), signal.SIGKILL)


def _stop_the_relay_for_a_while(upper: Bus, lower: Bus) -> None:
    pid = relay_pid(lower)
    os.kill(pid, signal.SIGSTOP)
    try:
        wait_until(lambda: not relays(upper), "the upper broker to miss the relay")
    finally:
        os.kill(pid, signal.SIGCONT)


def _kill_the_upper_broker(upper: Bus, lower: Bus) -> None:
    _kill(upper.broker)
    upper.start_broker()


@pytest.mark.parametrize(
    "strike",
    [
        _kill_a_worker,
        _kill_the_lower_broker,
        _kill_the_relay,
        _stop_the_relay_for_a_while,
        _kill_the_upper_broker,
    ],
)
def test_whatever_dies_the_text_is_the_same(
    pair: tuple[Bus, Bus], expected: list[list[int]], strike: Callable[[Bus, Bus], None]
) -> None:
    upper, lower = pair
    answers = stream_through(upper, lambda: strike(upper, lower))
    assert [answer.token_ids for answer in answers] == expected
    if strike in (_kill_a_worker, _kill_the_lower_broker):
        assert {answer.resumed for answer in answers} == {0}, "the upper bus does not notice"
    if strike is _kill_the_relay:
        # The next relay attached to the running requests below; no worker restarted them.
        stats = lower.client().query("bus.stats")
        assert stats["attached_total"] == STREAMS
        assert stats["assigned_total"] == 2 * STREAMS, "these, and the expected answers"
    wait_free(upper, 4 if strike is _kill_a_worker else 8)
    lower.wait_idle()


def test_a_lower_broker_that_is_stopped_drains_upward(
    pair: tuple[Bus, Bus], expected: list[list[int]], make_bus: MakeBus
) -> None:
    upper, lower = pair
    answers = stream_through(upper, lambda: lower.broker.popen.terminate())  # type: ignore[union-attr]
    assert [answer.token_ids for answer in answers] == expected
    assert {answer.resumed for answer in answers} == {0}, "running streams were finished"
    assert lower.broker.popen.wait(PATIENCE_S) == 0
    assert not relays(upper)
    log = upper.broker.log()
    assert "worker drains" in log and '"why": "drained", "lost": false' in log


def test_streams_that_outlast_a_drain_move_to_other_workers(make_bus: MakeBus) -> None:
    upper = make_bus(1, slots=8)
    lower = make_bus(1, "--upstream", upper.back, "--shutdown-grace-s", "0.3", slots=8)
    wait_free(upper, 8)
    client = lower.client()
    wanted = [client.chat("echo", "x", seed=n, **sampled(LENGTH)).token_ids for n in range(STREAMS)]
    answers = stream_through(upper, lambda: lower.broker.popen.terminate())  # type: ignore[union-attr]
    assert [answer.token_ids for answer in answers] == wanted
    assert any(answer.resumed for answer in answers)
    assert {answer.worker for answer in answers} == {"w1"}


# --- topologies -----------------------------------------------------------------------------------


def test_a_lower_broker_without_workers_offers_nothing_until_it_has_some(
    make_bus: MakeBus,
) -> None:
    upper = make_bus(0)
    lower = make_bus(0, "--upstream", upper.back)
    wait_until(lambda: relays(upper) and relays(upper)[0]["state"] == "ready", "a relay")
    assert free(upper) == 0 and upper.client().models() == []
    lower.start_worker(slots=3)
    wait_free(upper, 3)
    assert upper.client().chat("echo", "hello").text == "hello"
    lower.workers["w1"].kill()
    wait_free(upper, 0)


def test_a_broker_of_the_longest_name_serves_above_too(make_bus: MakeBus) -> None:
    upper = make_bus(0)
    make_bus(1, "--upstream", upper.back, "--broker-name", "é" * 128, slots=2)
    wait_free(upper, 2)
    (row,) = relays(upper)
    assert row["name"].startswith("é" * 100) and len(row["name"].encode()) <= MAX_NAME_BYTES


def test_brokers_can_be_stacked(make_bus: MakeBus) -> None:
    top = make_bus(0)
    middle = make_bus(1, "--upstream", top.back, slots=2)
    make_bus(1, "--upstream", middle.back, slots=3)
    wait_free(top, 5)
    assert relays(top)[0]["via"] != relays(middle)[0]["via"]
    assert set(relays(middle)[0]["via"]) < set(relays(top)[0]["via"])
    client = top.client()
    with ThreadPoolExecutor(20) as pool:
        texts = list(pool.map(lambda n: client.chat("echo", f"text {n}").text, range(40)))
    assert texts == [f"text {n}" for n in range(40)]


def test_one_broker_serves_several_upper_brokers_from_one_pool_of_slots(make_bus: MakeBus) -> None:
    uppers = [make_bus(0), make_bus(0)]
    lower = make_bus(1, *(part for upper in uppers for part in ("--upstream", upper.back)), slots=6)
    wait_until(lambda: sum(map(free, uppers)) == 6, "six slots between the two")
    for upper in uppers:
        assert upper.client().chat("echo", "hello").text == "hello"
    assert lower.running() == 0


def test_a_loop_of_brokers_is_refused_and_both_still_serve(tmp_path: Path) -> None:
    buses = [_bus(tmp_path / name) for name in ("first", "second")]
    first, second = buses
    try:
        first.start_broker()  # to have addresses
        second.start_broker("--upstream", first.back)
        _kill(first.broker)
        first.start_broker("--upstream", second.back)
        for bus in buses:
            bus.start_worker(slots=2)

        def refused() -> bool:
            brokers = [bus.broker for bus in buses]
            return any("a loop of brokers" in broker.log() for broker in brokers)

        wait_until(refused, "a refusal", story=lambda: first.logs() + second.logs())
        for bus in buses:
            bus.wait_ready(1)
            assert bus.client().chat("echo", "hello").text == "hello"
        wait_until(lambda: sum(map(free, buses)) <= 2, "slots counted once")
    finally:
        for bus in buses:
            bus.stop()


def _bus(folder: Path) -> Bus:
    folder.mkdir()
    return Bus(folder)


@pytest.fixture
def keys(tmp_path: Path) -> Iterator[tuple[Path, Path]]:
    folders = tmp_path / "upper-keys", tmp_path / "lower-keys"
    for folder in folders:
        auth.keys_command([str(folder)], program="keys")
    yield folders


def test_both_brokers_may_require_keys(tmp_path: Path, keys: tuple[Path, Path]) -> None:
    above, below = keys
    upper, lower = _bus(tmp_path / "upper"), _bus(tmp_path / "lower")
    try:
        upper.start_broker("--keys", str(above))
        lower.start_broker(
            *("--keys", str(below), "--upstream", upper.back),
            *("--upstream-server-key", str(above / "broker.key")),
            *("--upstream-key", str(above / "worker.key_secret")),
        )
        certificate = ("--server-key", str(below / "broker.key"))
        lower.start_worker("w1", *certificate, "--key", str(below / "worker.key_secret"), slots=2)
        server = (above / "broker.key").read_text().split('public-key = "')[1].split('"')[0]
        client = upper.client(server_key=server, key_file=above / "operator.key_secret")
        wait_until(
            lambda: any(row["granted"] == 2 for row in client.workers()),
            "the relay's credit",
            story=lambda: lower.logs() + upper.logs(),
        )
        assert client.chat("echo", "hello").text == "hello"
        assert lower.broker.running
        for secret in (below / "broker.key_secret", above / "worker.key_secret"):
            assert secret.read_text().split('secret-key = "')[1][:40] not in lower.broker.log()
    finally:
        upper.stop()
        lower.stop()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--upstream", "nonsense"], "--upstream: 'nonsense' is not an address"),
        (["--upstream", "tcp://127.0.0.1:*"], "one broker's back address is needed"),
        (["--upstream-key", "x", "--upstream-server-key", "y"], "say for which broker"),
        (["--upstream", "tcp://127.0.0.1:5556", "--upstream-key", "x"], "give both"),
    ],
)
def test_a_wrong_option_is_an_error_at_once(tmp_path: Path, options: list[str], words: str) -> None:
    broker = Bus(tmp_path).launch("broker", "broker", "check", *options)
    assert broker.popen.wait(PATIENCE_S) == 2
    assert words in broker.log()
