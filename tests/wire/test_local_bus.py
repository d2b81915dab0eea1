"""A bus as processes: `LocalBus` says why something failed, and leaves nothing behind."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from client import Client
from client.cli.local_bus import LocalBus, ManagedProcess, ProcessFailed
from tests.harness import PATIENCE_S, wait_until
from tests.support.processes import family


@pytest.fixture
def local(tmp_path: Path) -> Iterator[LocalBus]:
    with LocalBus(tmp_path, start_s=PATIENCE_S, stop_s=PATIENCE_S) as bus:
        yield bus


def python(program: str) -> list[str]:
    return [sys.executable, "-c", program]


def exists(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def test_a_bus_with_keys_serves_and_leaves_no_process_behind(tmp_path: Path) -> None:
    with LocalBus(tmp_path, keys=True, start_s=PATIENCE_S, stop_s=PATIENCE_S) as bus:
        bus.start_broker()
        bus.start_worker("w1")
        bus.wait_ready(1)
        gateway = bus.start_gateway()
        assert gateway.url.startswith("http://127.0.0.1:")
        with Client(bus.front, **bus.client_options) as client:
            assert client.generate("hello", model="echo").text == "hello"
        pids = [pid for process in bus.processes for pid in family(process.pid)]
        assert len(pids) == 4  # the worker's engine is a process of its own
    assert [process.popen.returncode for process in bus.processes] == [0, 0, 0]
    wait_until(lambda: not any(map(exists, pids)), "the end of all of them")


def test_a_broker_that_is_started_again_has_the_same_addresses(local: LocalBus) -> None:
    local.start_broker()
    local.start_broker(index=1)
    before = list(zip(local.fronts, local.backs, strict=True))
    assert len(set(before)) == 2
    local.broker.kill()
    local.start_broker()
    assert list(zip(local.fronts, local.backs, strict=True)) == before
    assert [broker.running for broker in local.brokers] == [True, True]


def test_the_error_for_a_worker_that_ends_quotes_its_last_line(local: LocalBus) -> None:
    local.start_broker()
    local.start_worker("w1", "--slots", "none")
    with pytest.raises(ProcessFailed, match="the worker ended with status 2: ") as caught:
        local.wait_ready(1)
    assert "--slots: must be 1 or more, got 'none'" in caught.value.__notes__[0]


def test_a_process_that_ends_early_fails_at_once(tmp_path: Path) -> None:
    process = ManagedProcess("early", python("print('no luck'); raise SystemExit(3)"), tmp_path)
    with pytest.raises(ProcessFailed, match="the early ended with status 3: no luck"):
        process.wait_line("ready", PATIENCE_S)


def test_a_log_holds_what_this_process_wrote(tmp_path: Path) -> None:
    for said in ("one", "two"):
        process = ManagedProcess("again", python(f"print({said!r})"), tmp_path)
        process.wait(PATIENCE_S)
        assert process.log() == f"{said}\n"
    assert (tmp_path / "again.log").read_text() == "one\ntwo\n"
    unnamed = ManagedProcess("unnamed", python("print('three')"))
    unnamed.wait(PATIENCE_S)
    assert unnamed.log() == "three\n"


def test_a_process_that_does_not_end_is_killed_with_its_children(tmp_path: Path) -> None:
    program = (
        "import signal, subprocess, sys\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "print('child', child.pid, flush=True)\n"
        "child.wait()"
    )
    process = ManagedProcess("deaf", python(program), tmp_path)
    child = int(process.wait_line(r"^child (\d+)$", PATIENCE_S)[1])
    process.stop(grace_s=0.1)
    assert process.popen.returncode == -signal.SIGKILL
    wait_until(lambda: not exists(child), "the end of its child")


def test_environment_settings_of_the_caller_do_not_reach_a_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOKENBUS_WORKER_SLOTS", "3")
    program = "import os; print(sorted(key for key in os.environ if key.startswith('TOKENBUS')))"
    process = ManagedProcess("clean", python(program), tmp_path)
    process.wait(PATIENCE_S)
    assert process.log() == "[]\n"
