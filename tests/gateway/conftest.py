"""A gateway process in front of the shared bus, and OpenAI's own clients."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import httpx2 as httpx
import openai
import pytest

from client.cli.local_bus import ManagedProcess
from tests.harness import PATIENCE_S, Bus, wait_until

MODEL = "echo"


@dataclass
class GatewayProcess:
    """A running `python -m client.gateway`."""

    process: ManagedProcess
    url: str
    bus: Bus

    def openai(self, **options: object) -> openai.OpenAI:
        """OpenAI's client, by default without retries."""
        return openai.OpenAI(
            **{"base_url": f"{self.url}/v1", "api_key": "none", "max_retries": 0, **options}
        )

    def http(self, **options: object) -> httpx.Client:
        """A plain HTTP client."""
        return httpx.Client(base_url=self.url, timeout=PATIENCE_S, **options)

    def requests_logged(self) -> list[dict[str, Any]]:
        """The fields of the log lines about requests."""
        lines = [line for line in self.process.log().splitlines() if line.startswith("{")]
        return [line for line in map(json.loads, lines) if line["event"] == "request"]

    def logged(self, request_id: str, **fields: object) -> dict[str, Any]:
        """The log line about a request, once it has these fields."""

        def line() -> dict[str, Any] | None:
            lines = self.requests_logged()
            return next((x for x in lines if {**x, "id": request_id, **fields} == x), None)

        return wait_until(line, f"{fields} of {request_id} in the log", story=self.process.log)


@contextlib.contextmanager
def running_gateway(bus: Bus, *options: str) -> Iterator[GatewayProcess]:
    """A gateway in front of `bus`; ended in any case."""
    gateway = bus.start_gateway(*options)
    try:
        verify = not gateway.url.startswith("https")

        def answers() -> bool:
            gateway.process.check()
            with contextlib.suppress(httpx.TransportError):
                return httpx.get(f"{gateway.url}/health", verify=verify).status_code == 200
            return False

        wait_until(answers, "the gateway's health", story=gateway.process.log)
        yield GatewayProcess(gateway.process, gateway.url, bus)
    finally:
        gateway.process.kill()
        bus.gateways.remove(gateway)


@pytest.fixture(scope="session")
def shared_gateway(
    shared_bus: Bus, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[GatewayProcess]:
    folder = str(tmp_path_factory.mktemp("batches"))
    options = ("--keep-alive-s", "0.2", "--batch-folder", folder)
    with running_gateway(shared_bus, *options) as gateway:
        yield gateway


@pytest.fixture
def gateway(bus: Bus, shared_gateway: GatewayProcess) -> GatewayProcess:
    """A gateway with the echo engine. Shared: every test must leave it idle."""
    return shared_gateway


@pytest.fixture
def make_gateway(bus: Bus) -> Iterator[Callable[..., GatewayProcess]]:
    """Private gateways on the shared bus: `make_gateway("--keys", path)`."""
    with contextlib.ExitStack() as stack:

        def make(*options: str, bus: Bus = bus) -> GatewayProcess:
            return stack.enter_context(running_gateway(bus, *options))

        yield make


@pytest.fixture
def client(gateway: GatewayProcess) -> Iterator[openai.OpenAI]:
    """OpenAI's synchronous client."""
    with gateway.openai() as made:
        yield made


@pytest.fixture
def http(gateway: GatewayProcess) -> Iterator[httpx.Client]:
    """A plain HTTP client of the gateway."""
    with gateway.http() as made:
        yield made
