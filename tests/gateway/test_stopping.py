"""A gateway that stops: what its open streams are told, and what a second signal does."""

from __future__ import annotations

import signal
from collections.abc import Callable

import openai
import pytest

from tests.gateway.conftest import GatewayProcess
from tests.harness import PATIENCE_S

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


def test_streams_that_outlive_the_time_to_stop_are_told(
    make_gateway: Callable[..., GatewayProcess],
) -> None:
    gateway = make_gateway("--shutdown-s", "1")
    error = _stopped_in_the_middle(gateway, signals=1)
    assert "This gateway stops" in error.message
    assert error.code == "draining"
    assert gateway.process.popen.wait(PATIENCE_S) == 0


def test_a_second_signal_does_not_wait(make_gateway: Callable[..., GatewayProcess]) -> None:
    gateway = make_gateway("--shutdown-s", "3600")
    assert "This gateway stops" in _stopped_in_the_middle(gateway, signals=2).message
    assert gateway.process.popen.wait(PATIENCE_S) == 0
