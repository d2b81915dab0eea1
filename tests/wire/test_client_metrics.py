"""What Prometheus reads from a live bus: `python -m client metrics`, the gateway's `/metrics`."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from client.__main__ import main
from client.cli.local_bus import ManagedProcess
from tests.gateway.conftest import running_gateway
from tests.harness import PATIENCE_S, Bus, wait_until


def families(text: str) -> dict[str, float]:
    """The sum of each family's samples, read by Prometheus' own parser."""
    return {
        family.name: sum(sample.value for sample in family.samples)
        for family in text_string_to_metric_families(text)
    }


def read(url: str) -> str:
    with urllib.request.urlopen(url, timeout=PATIENCE_S) as answer:
        assert answer.headers["content-type"].startswith("text/plain")
        return answer.read().decode()


def test_the_metrics_of_a_real_answer_are_printed(
    bus: Bus, capsys: pytest.CaptureFixture[str]
) -> None:
    bus.client().generate("one two three four", model="echo")
    wait_until(lambda: bus.running() == 0, "the slot to be free")
    assert main(["metrics", "--broker", bus.front]) == 0
    found = families(capsys.readouterr().out)
    assert found["tokenbus_tokens"] >= 4
    assert found["tokenbus_time_to_first_token_seconds"] > 0
    assert found["tokenbus_forwarded_bytes"] > 0
    assert found["tokenbus_worker_ready"] == 2


def test_an_exporter_serves_them_and_says_when_the_broker_is_away(
    make_bus: Callable[..., Bus], tmp_path: Path
) -> None:
    bus = make_bus(workers=1)
    options = ["--connect-timeout", "0.3", "--serve", "127.0.0.1:0"]
    command = bus.command("client", "metrics", "--broker", bus.front, *options)
    exporter = ManagedProcess("exporter", command, tmp_path)
    try:
        found = wait_until(
            lambda: re.search(r"http://\S+/metrics", exporter.log()), "its address", PATIENCE_S
        )
        assert families(read(found[0]))["tokenbus_worker_ready"] == 1
        with pytest.raises(urllib.error.HTTPError) as elsewhere:
            read(found[0].replace("/metrics", "/else"))
        assert elsewhere.value.code == 404
        elsewhere.value.close()
        bus.broker.kill()
        with pytest.raises(urllib.error.HTTPError) as away:
            read(found[0])
        assert away.value.code == 503
        away.value.close()
        bus.start_broker()

        def back() -> bool:
            try:
                return "tokenbus_uptime_seconds" in read(found[0])
            except urllib.error.HTTPError as error:
                error.close()
                return False

        wait_until(back, "the exporter to find the new broker")
    finally:
        exporter.kill()


@pytest.mark.parametrize("address", ["nowhere", "127.0.0.1:99999", ":x"])
def test_a_malformed_address_is_refused(address: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "client", "metrics", "--serve", address],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert done.returncode == 2 and "127.0.0.1:9464" in done.stderr


def test_the_error_for_a_port_in_use_is_in_words(
    bus: Bus, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        where = f"127.0.0.1:{other.getsockname()[1]}"
        assert main(["metrics", "--broker", bus.front, "--serve", where]) == 1
    errors = capsys.readouterr().err
    assert f"cannot listen at {where}: Address already in use; choose" in errors


def test_the_gateway_adds_the_metrics_of_the_bus_to_its_own(bus: Bus, tmp_path: Path) -> None:
    with running_gateway(bus) as gateway:
        both = families(read(f"{gateway.url}/metrics"))
        assert both["tokenbus_worker_ready"] == 2
        assert both["tokenbus_gateway_broker_up"] == 1
        own = families(read(f"{gateway.url}/metrics?scope=gateway"))
        assert "tokenbus_gateway_running_requests" in own
        assert not any(name.startswith("tokenbus_worker") for name in own)
        with pytest.raises(urllib.error.HTTPError) as wrong:
            read(f"{gateway.url}/metrics?scope=moon")
        assert wrong.value.code == 400
        wrong.value.close()
