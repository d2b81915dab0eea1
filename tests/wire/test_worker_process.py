"""Worker processes on a real bus: broken engines and links, drains, the order of starts."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from client import BusError, Client, Stream
from client.cli.local_bus import ManagedProcess
from tests.harness import PATIENCE_S, ROOT, Bus, running_bus, wait_until
from tests.wire.many_streams import WINDOW_TOKENS
from worker.engines.echo import tokens as echo_tokens

PROMPT = "The quick brown fox jumps over the lazy dog."


def records(process: ManagedProcess, event: str) -> list[dict[str, Any]]:
    """The log records of an event."""
    found = []
    for line in process.log().splitlines():
        with contextlib.suppress(ValueError):
            record = json.loads(line)
            if isinstance(record, dict) and record.get("event") == event:
                found.append(record)
    return found


def engine_pid(worker: ManagedProcess, count: int = 1) -> int:
    """The process id of the worker's `count`-th engine process; waits for it."""
    wait_until(lambda: len(records(worker, "engine starts")) >= count, "an engine process")
    return int(records(worker, "engine starts")[count - 1]["pid"])


def is_alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    stat = Path(f"/proc/{pid}/stat")
    if Path("/proc/self/stat").exists():
        return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


class Begun:
    """A stream whose first piece of text has arrived."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        self._pieces = iter(stream.text)
        self._first = next(self._pieces)

    def text(self) -> str:
        """Read it to its end."""
        return self._first + "".join(self._pieces)


def begin(client: Client, prompt: str = PROMPT, **options: Any) -> Begun:
    """Begin a stream that cannot end before it is read; `options` are the echo engine's."""
    arguments = {"echo": {"step_delay_ms": 20, **options}}
    stream = client.generate(
        prompt, model="echo", template_args=arguments, stream=True, window=WINDOW_TOKENS
    )
    return Begun(stream)


@pytest.fixture
def one(tmp_path: Path) -> Iterator[Bus]:
    """A bus with one worker of two slots."""
    with running_bus(tmp_path, 1, slots=2) as bus:
        yield bus


# --- engines that break ---------------------------------------------------------------------------


def test_a_killed_engine_is_replaced_and_its_streams_go_on_unaltered(one: Bus) -> None:
    worker = one.workers["w1"]
    first = engine_pid(worker)
    stream = begin(one.client())
    os.kill(first, signal.SIGKILL)
    assert stream.text() == PROMPT
    assert engine_pid(worker, 2) != first
    (lost,) = records(worker, "engine lost")
    assert "SIGKILL" in lost["cause"]
    one.wait_idle()


def test_a_hung_engine_is_killed_and_replaced_and_the_link_lives_on(tmp_path: Path) -> None:
    with running_bus(tmp_path, 0) as bus:
        worker = bus.start_worker("w1", "--engine-stall-s", "1.5")
        bus.wait_ready(1)
        first = engine_pid(worker)
        client = bus.client()
        stream = begin(client, hang_at=3)
        wait_until(
            lambda: any(row["engine_age_ms"] > 500 for row in bus.rows()),
            "the engine's age in bus.workers",
        )
        assert stream.text() == PROMPT
        assert not is_alive(first)
        assert "no step" in records(worker, "engine lost")[0]["cause"]


def test_large_images_for_a_hung_engine_do_not_stall_the_heartbeats(one: Bus) -> None:
    client = one.client()
    hanging = begin(client, hang_at=2)
    image = b"\x89PNG\r\n\x1a\n" + bytes(12 << 20)
    blocked = client.generate("<image> " * 4, model="echo", images=[image] * 4, stream=True)
    wait_until(lambda: one.rows()[0]["running"] == 2, "both requests at the worker")
    before = records(one.workers["w1"], "broker lost")

    def heard_since() -> bool:
        rows = one.rows()
        return any(row["engine_age_ms"] > 3000 and row["silent_ms"] < 1500 for row in rows)

    wait_until(heard_since, "a heartbeat of the worker whose engine hangs")
    assert before == records(one.workers["w1"], "broker lost") == []
    blocked.close()
    hanging.stream.close()


@pytest.mark.parametrize(
    ("fault", "code"), [("error_at", "engine_error"), ("oom_at", "out_of_memory")]
)
def test_a_failing_request_has_its_error_code_and_the_worker_keeps_serving(
    bus: Bus, fault: str, code: str
) -> None:
    client = bus.client()
    with pytest.raises(BusError) as error:
        client.generate(PROMPT, model="echo", template_args={"echo": {fault: 3}})
    assert error.value.code == code
    assert client.generate(PROMPT, model="echo").text == PROMPT


@pytest.mark.parametrize("fault", ["raise_at", "exit_at", "kill_at"])
def test_an_engine_that_dies_by_itself_costs_its_streams_a_pause(one: Bus, fault: str) -> None:
    client = one.client()
    beside = begin(client)
    assert begin(client, **{fault: 3}).text() == PROMPT
    assert beside.text() == PROMPT
    one.wait_idle()


def test_a_prompt_that_breaks_every_engine_is_poison(one: Bus) -> None:
    with pytest.raises(BusError) as error:
        one.client().generate(
            PROMPT, model="echo", template_args={"echo": {"exit_at": 2, "fault_resumed": 1}}
        )
    assert error.value.code == "poison"
    one.wait_idle()


def test_an_engine_that_cannot_be_built_ends_the_worker_with_one_clear_line(one: Bus) -> None:
    worker = one.start_worker("bad", load_error="there-is-no-such-model")
    assert worker.popen.wait(PATIENCE_S) == 1
    assert "worker: there-is-no-such-model" in worker.log()
    assert "Traceback" not in worker.log()
    assert len(records(worker, "engine starts")) == 1


def test_an_engine_that_dies_again_and_again_ends_the_worker(one: Bus) -> None:
    worker = one.start_worker("bad", crash_on_load=1)
    assert worker.popen.wait(PATIENCE_S) == 1
    assert "died 5 times in a row" in worker.log()
    assert len(records(worker, "engine starts")) == 5


def test_a_second_worker_of_the_same_name_waits_and_says_why_until_the_name_is_free(
    one: Bus,
) -> None:
    first = one.workers["first of w1"] = one.workers["w1"]
    second = one.start_worker("w1")
    (refused,) = wait_until(lambda: records(second, "broker absent"), "the refusal in its log")
    assert refused["level"] == "warning" and "--worker-id" in refused["cause"]
    assert len(one.rows()) == 1
    assert begin(one.client()).text() == PROMPT
    first.kill()
    del one.workers["first of w1"]
    wait_until(lambda: records(second, "broker connected"), "the name's next worker")
    assert begin(one.client()).text() == PROMPT


# --- links that break -----------------------------------------------------------------------------


def test_no_engine_outlives_a_killed_link_even_a_hung_one(one: Bus) -> None:
    worker = one.workers["w1"]
    pid = engine_pid(worker)
    stream = begin(one.client(), hang_at=2)
    worker.signal(signal.SIGKILL)
    wait_until(lambda: not is_alive(pid), "the engine's end")
    one.start_worker("w2")
    assert stream.text() == PROMPT


def test_a_stopped_link_is_lost_within_the_liveness_limit_and_harmless_when_it_wakes(
    tmp_path: Path,
) -> None:
    with running_bus(tmp_path, 2, "--worker-heartbeat-s", "0.3") as bus:
        client = bus.client()
        streams = [begin(client) for _ in range(4)]
        stopped = bus.workers["w1"]
        stopped.signal(signal.SIGSTOP)
        try:
            assert [stream.text() for stream in streams] == [PROMPT] * 4
            assert sum(stream.stream.resumed for stream in streams) > 0
        finally:
            stopped.signal(signal.SIGCONT)
        wait_until(lambda: len(bus.rows()) == 2, "the stopped worker back")
        bus.wait_idle()


def test_a_stream_survives_a_broker_that_is_killed_and_is_not_run_twice(one: Bus) -> None:
    worker = one.workers["w1"]
    stream = begin(one.client(), step_delay_ms=100)
    one.broker.kill()
    wait_until(lambda: records(worker, "broker lost"), "the loss in the worker's log")
    one.start_broker()
    assert stream.text() == PROMPT
    one.wait_idle()
    (lost,) = records(worker, "broker lost")
    assert lost["requests_held"] == 1
    # The worker ran it once: the RESUME attached to it, without another prefill.
    assert one.rows()[0]["assigned"] == 0


def test_a_broker_that_is_stopped_for_a_while_costs_a_pause_and_nothing_else(
    tmp_path: Path,
) -> None:
    tokens, streams = 600, 16
    bus = Bus(tmp_path, "--worker-heartbeat-s", "3")
    # The kernel buffers far less of an ipc connection than of TCP, so it fills up soon.
    bus.backs[0] = f"ipc://{tmp_path}/back"
    try:
        bus.start_broker()
        worker = bus.start_worker("w1", "--log-level", "debug", slots=streams)
        bus.wait_ready(1)
        options = {"mode": "sampled", "answer_tokens": tokens, "step_delay_ms": 2}
        clients = [bus.client() for _ in range(streams)]
        begun = [
            Begun(
                client.generate(
                    f"p{index}", model="echo", seed=5, stream=True, template_args={"echo": options}
                )
            )
            for index, client in enumerate(clients)
        ]
        bus.broker.signal(signal.SIGSTOP)
        try:
            wait_until(lambda: records(worker, "broker reads slowly"), "a full socket")
        finally:
            bus.broker.signal(signal.SIGCONT)
        for index, stream in enumerate(begun):
            seeds = (5, zlib.crc32(f"p{index}".encode()))
            expected = [echo_tokens.sampled_token(*seeds, position) for position in range(tokens)]
            assert stream.text() == echo_tokens.detokenize(expected)
        assert not records(worker, "broker lost")
    finally:
        bus.stop()


# --- drain ----------------------------------------------------------------------------------------


def test_sigterm_lets_running_streams_finish_then_ends_with_status_0(one: Bus) -> None:
    worker = one.workers["w1"]
    pid = engine_pid(worker)
    stream = begin(one.client())
    worker.signal(signal.SIGTERM)
    assert stream.text() == PROMPT
    assert stream.stream.resumed == 0
    assert worker.popen.wait(PATIENCE_S) == 0
    assert not is_alive(pid)


def test_a_drain_hands_over_streams_that_do_not_finish_in_time(one: Bus) -> None:
    worker = one.start_worker("w2", "--drain-s", "0.5")
    one.wait_ready(2)
    client = one.client()
    streams = [begin(client, step_delay_ms=60) for _ in range(2)]
    worker.signal(signal.SIGTERM)
    assert worker.popen.wait(PATIENCE_S) == 0
    assert [stream.text() for stream in streams] == [PROMPT] * 2


def test_a_second_signal_does_not_wait(one: Bus) -> None:
    worker = one.workers["w1"]
    pid = engine_pid(worker)
    stream = begin(one.client(), step_delay_ms=1000)
    worker.signal(signal.SIGINT)
    wait_until(lambda: records(worker, "draining"), "the drain")
    worker.signal(signal.SIGINT)
    assert worker.popen.wait(PATIENCE_S) == 0
    assert not is_alive(pid)
    stream.stream.close()


def test_an_operators_drain_ends_the_worker(one: Bus) -> None:
    worker = one.workers["w1"]
    one.client().drain("w1")
    assert worker.popen.wait(PATIENCE_S) == 0


# --- start ----------------------------------------------------------------------------------------


def test_a_worker_started_before_its_broker_says_so_once_and_joins_later(tmp_path: Path) -> None:
    bus = Bus(tmp_path)
    try:
        broker = bus.start_broker()
        broker.kill()
        worker = bus.start_worker("early")
        wait_until(lambda: records(worker, "broker absent"), "a line about the absent broker")
        wait_until(
            lambda: records(worker, "engine ready"), "the engine, although there is no broker"
        )
        bus.start_broker()
        bus.wait_ready(1)
        assert len(records(worker, "broker absent")) == 1
        assert bus.client().generate("hello", model="echo").text == "hello"
    finally:
        bus.stop()


def test_a_loading_worker_is_listed_with_its_progress_and_gets_no_work(one: Bus) -> None:
    one.start_worker("slow", load_ms=3000)

    def loading() -> dict[str, Any] | None:
        rows = [row for row in one.rows() if row["name"] == "slow"]
        return rows[0] if rows and rows[0]["progress"] else None

    row = wait_until(loading, "progress in bus.workers")
    assert (row["state"], row["granted"]) == ("loading", 0)
    assert 0 < row["progress"] < 1
    assert "load" in row["note"]
    one.wait_ready(2)


def test_two_brokers_are_served_from_one_pool_of_slots(tmp_path: Path) -> None:
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
    with running_bus(folders[0], 0) as first, running_bus(folders[1], 0) as second:
        worker = first.start_worker("shared", "--broker", second.back, slots=4)
        for bus in (first, second):
            wait_until(
                lambda bus=bus: [row["granted"] for row in bus.rows()] == [2],
                "half of the slots",
                story=worker.log,
            )
        streams = [begin(bus.client()) for bus in (first, second)]
        assert [stream.text() for stream in streams] == [PROMPT] * 2


# --- command line ---------------------------------------------------------------------------------


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `python -m worker` to its end."""
    return subprocess.run(
        [sys.executable, "-m", "worker", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )


def test_no_register_checks_the_engine_and_exits() -> None:
    done = run("--no-register", "--engine", "echo", "--slots", "3")
    assert done.returncode == 0
    assert "echo: answers (8 tokens" in done.stdout
    assert "joined no broker" in done.stdout
    failed = run("--no-register", "--engine", "echo", "--engine-arg", "load_error=no-weights")
    assert (failed.returncode, failed.stdout) == (1, "")
    assert "worker: no-weights" in failed.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--broker", "http://localhost:21001"], "use tcp://HOST:PORT"),
        (["--engine", "nosuch", "--no-register"], "choose one of: echo"),
        (["--key", "nosuch"], "--server-key and --key go together"),
        (["--key", "nosuch", "--server-key", "nosuch"], "key file nosuch"),
    ],
)
def test_a_wrong_option_gets_one_clear_line(arguments: list[str], words: str) -> None:
    done = run(*arguments)
    assert done.returncode in (1, 2)
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_the_link_imports_neither_torch_nor_anything_of_the_engines() -> None:
    code = (
        "import sys, worker.loop, worker.__main__, worker.process.supervisor;"
        "print([m for m in ('torch', 'transformers', 'numpy', 'worker.engines.echo.engine')"
        " if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_many_streams_share_a_worker_and_each_gets_its_own_text(
    make_bus: Callable[..., Bus],
) -> None:
    bus = make_bus(workers=1, slots=16)
    client = bus.client()
    prompts = [f"{index}: {PROMPT * (1 + index % 5)}" for index in range(48)]
    texts: dict[int, str] = {}

    def ask(index: int) -> None:
        texts[index] = client.generate(prompts[index], model="echo").text

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
    assert [texts[index] for index in range(len(prompts))] == prompts
    bus.wait_idle()


# --- keys -----------------------------------------------------------------------------------------


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    """A folder of keys as the broker makes them."""
    folder = tmp_path / "keys"
    subprocess.run(
        [sys.executable, "-m", "broker", "keys", str(folder)],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    return folder


def test_a_worker_joins_with_its_key_and_others_learn_why_not(tmp_path: Path, keys: Path) -> None:
    bus = Bus(tmp_path, "--keys", str(keys))
    try:
        bus.start_broker()
        server = ["--server-key", str(keys / "broker.key")]
        good = bus.start_worker("good", *server, "--key", str(keys / "worker.key_secret"))
        wrong = bus.start_worker("wrong", *server, "--key", str(keys / "client.key_secret"))
        bare = bus.start_worker("bare")
        wait_until(
            lambda: records(good, "broker connected"), "the worker with its key", story=good.log
        )
        for worker, words in ((wrong, "refuses this worker's key"), (bare, "CURVE")):
            (absent,) = wait_until(
                lambda worker=worker: records(worker, "broker absent"), "a reason", story=worker.log
            )
            assert words in absent["cause"]
            assert not records(worker, "broker connected")
    finally:
        bus.stop()
