"""An operator checks, starts, watches and empties a bus. What the examples of deployment say to
Prometheus and compose stands in `wire/test_deploy.py`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.gateway.conftest import running_gateway
from tests.harness import PATIENCE_S, ROOT, Bus, running_bus, wait_until
from tests.wire.test_client_cli import run


def program(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, **environment},
        timeout=PATIENCE_S,
    )


def test_a_configuration_is_checked_before_it_runs() -> None:
    assert program("broker", "check").returncode == 0
    misspelt = program("broker", "check", TOKENBUS_FRNT="tcp://127.0.0.1:7000")
    assert misspelt.returncode == 2 and "did you mean TOKENBUS_FRONT?" in misspelt.stderr
    port = "tcp://127.0.0.1:7000"
    both = program("broker", "check", "--front", port, "--back", port)
    assert both.returncode == 2 and "one port" in both.stderr
    wrong = program("broker", "check", "--frnt", port, "--colour")
    assert "did you mean --front?" in wrong.stderr and "--colour" in wrong.stderr


@pytest.fixture
def bus_with_logs(tmp_path: Path) -> Iterator[tuple[Bus, Path]]:
    style = ("--log-format", "json", "--log-level", "info", "--log-file")
    with running_bus(tmp_path, 0, *style, str(tmp_path / "broker.json")) as bus:
        for name in ("w1", "w2"):
            bus.start_worker(name, *style, str(tmp_path / f"{name}.json"))
        bus.wait_ready(2)
        yield bus, tmp_path


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_a_day_with_a_bus(bus_with_logs: tuple[Bus, Path]) -> None:
    bus, folder = bus_with_logs
    gateway_log = folder / "gateway.json"
    options = ("--log-format", "json", "--log-level", "info", "--log-file", str(gateway_log))
    with running_gateway(bus, *options) as gateway:
        client = gateway.openai()
        asked = client.chat.completions.create(
            model="echo", messages=[{"role": "user", "content": "hello"}]
        )
        assert asked.choices[0].message.content == "hello"
        wait_until(
            lambda: any(line["event"] == "request" for line in lines(gateway_log)), "the request"
        )
    # One style: every line of everybody is JSON with the same fields first.
    for name in ("broker", "w1", "w2", "gateway"):
        written = lines(folder / f"{name}.json")
        assert written and all(list(line)[:3] == ["time", "level", "event"] for line in written)

    at = ("--broker", bus.front)
    assert "w1" in run("status", *at).stdout and "w2" in run("workers", *at).stdout
    figures = run("metrics", *at).stdout
    assert "tokenbus_" in figures

    # A worker is held for a while, and works again.
    held = run("drain", *at, "w1", "--hold", "--wait")
    assert held.stdout.splitlines() == ["worker w1: held", "worker w1: idle"], held.stderr
    assert run("generate", *at, "x").returncode == 0
    assert run("undrain", *at, "w1").returncode == 0

    # A misspelt name is told with those that there are.
    wrong = run("drain", *at, "w3")
    assert wrong.returncode == 2 and "w1" in wrong.stderr and "w2" in wrong.stderr

    # One leaves for good; what it ran goes on elsewhere, and its process ends well.
    gone = run("drain", *at, "w1", "--wait")
    assert gone.stdout.splitlines() == ["worker w1: draining", "worker w1: gone"], gone.stderr
    assert bus.workers["w1"].popen.wait(PATIENCE_S) == 0
    assert run("generate", *at, "still there").stdout == "still there\n"


def test_every_command_explains_itself(make_bus: Callable[..., Bus]) -> None:
    for words in (
        ("broker",),
        ("broker", "keys"),
        ("broker", "check"),
        ("worker",),
        ("client",),
        ("client.gateway",),
        ("client.gateway", "keys"),
    ):
        shown = program(*words, "--help")
        assert shown.returncode == 0 and shown.stdout.startswith("usage: "), words
