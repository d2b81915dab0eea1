"""Metrics by OpenTelemetry's names for generative AI: in Prometheus' form, and as its own SDK reads
them."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import httpx2 as httpx
import openai
import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

pytest.importorskip("opentelemetry.sdk")

from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader

from broker.protocol.errors import ErrorCode
from client.gateway.errors import GatewayError
from client.gateway.genai import GenAi, Operation
from tests.gateway.conftest import MODEL, GatewayProcess
from tests.harness import wait_until


class World:
    """The instruments, read by the SDK."""

    def __init__(self) -> None:
        self._reader = InMemoryMetricReader()
        self._provider = MeterProvider([self._reader])
        self.registry = CollectorRegistry()
        self.genai = GenAi(self.registry, self._provider.get_meter("tests"))

    def over(self, **facts: Any) -> None:
        """A request is over."""
        now_s = time.monotonic()
        usual = {
            "operation": Operation("chat", started_s=now_s - 1.5),
            "failure": None,
            "model": "m",
            "prompt_tokens": 10,
            "completion_tokens": 5,
            "unattended": False,
            "left": False,
            "started_s": now_s - 2,
            "first_token_s": 1.0,
        }
        self.genai.over(SimpleNamespace(**{**usual, **facts}))  # type: ignore[arg-type]

    def points(self) -> dict[str, list[Any]]:
        """The points of each instrument."""
        data = self._reader.get_metrics_data()
        return (
            {}
            if data is None
            else {
                metric.name: list(metric.data.data_points)
                for resource in data.resource_metrics
                for scope in resource.scope_metrics
                for metric in scope.metrics
            }
        )


@pytest.fixture
def world() -> World:
    return World()


def test_a_stream_is_recorded_under_every_name_once(world: World) -> None:
    operation = Operation("chat", started_s=time.monotonic() - 1.5, streamed=True)
    world.over(operation=operation)
    points = world.points()
    assert set(points) == {
        "gen_ai.server.request.duration",
        "gen_ai.server.time_to_first_token",
        "gen_ai.server.time_per_output_token",
        "gen_ai.client.operation.duration",
        "gen_ai.client.operation.time_to_first_chunk",
        "gen_ai.client.token.usage",
    }
    told = {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "tokenbus",
        "gen_ai.request.model": "m",
    }
    for name, seconds in (
        ("gen_ai.server.request.duration", 2.0),
        ("gen_ai.server.time_to_first_token", 1.0),
        ("gen_ai.server.time_per_output_token", 0.25),
        ("gen_ai.client.operation.duration", 1.5),
        ("gen_ai.client.operation.time_to_first_chunk", 0.5),
    ):
        [point] = points[name]
        assert dict(point.attributes) == told
        assert point.count == 1 and point.sum == pytest.approx(seconds, abs=0.2), name
    used = {p.attributes["gen_ai.token.type"]: p.sum for p in points["gen_ai.client.token.usage"]}
    assert used == {"input": 10, "output": 5}


def test_the_buckets_are_those_of_the_conventions(world: World) -> None:
    world.over()
    bounds = {name: list(points[0].explicit_bounds) for name, points in world.points().items()}
    duration = bounds["gen_ai.server.request.duration"]
    assert duration[:5] == pytest.approx([0.01, 0.02, 0.04, 0.08, 0.16])
    assert duration[-1] == pytest.approx(81.92) and len(duration) == 14
    assert bounds["gen_ai.client.token.usage"][-1] == 67108864
    assert bounds["gen_ai.server.time_per_output_token"][0] == 0.01


def test_an_answer_that_is_not_streamed_has_no_first_chunk(world: World) -> None:
    world.over()
    assert "gen_ai.client.operation.time_to_first_chunk" not in world.points()


def test_several_answers_at_once_share_the_time_of_their_tokens(world: World) -> None:
    operation = Operation("chat", choices=4, started_s=time.monotonic())
    world.over(operation=operation, completion_tokens=20)
    [point] = world.points()["gen_ai.server.time_per_output_token"]
    assert point.sum == pytest.approx(0.25, abs=0.1)


@pytest.mark.parametrize(
    ("facts", "error", "model"),
    [
        ({"failure": GatewayError(ErrorCode.OVERLOADED, "full")}, "overloaded", "m"),
        ({"failure": GatewayError(ErrorCode.MODEL_UNAVAILABLE, "none")}, "model_unavailable", None),
        ({"left": True}, "cancelled", "m"),
    ],
)
def test_a_failure_has_its_code_and_no_times_of_tokens(
    world: World, facts: dict[str, Any], error: str, model: str | None
) -> None:
    world.over(**facts)
    points = world.points()
    assert "gen_ai.server.time_to_first_token" not in points
    [point] = points["gen_ai.server.request.duration"]
    assert point.attributes["error.type"] == error
    assert point.attributes.get("gen_ai.request.model") == model


def test_what_nobody_waits_for_counts_its_tokens_only(world: World) -> None:
    world.over(unattended=True)
    assert set(world.points()) == {"gen_ai.client.token.usage"}


def test_what_no_model_answered_is_no_operation(world: World) -> None:
    world.over(operation=None)
    assert world.points() == {}


# --- at the gateway -------------------------------------------------------------------------------


def samples(http: httpx.Client) -> dict[tuple[str, str], tuple[float, dict[str, str]]]:
    """Value and labels of `/metrics`, by name and operation, of those of our model that are
    `gen_ai` and no error's."""
    text = http.get("/metrics", params={"scope": "gateway"}).text
    return {
        (sample.name, sample.labels["gen_ai_operation_name"]): (sample.value, sample.labels)
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name.startswith("gen_ai")
        and sample.name.endswith("_count")
        and sample.labels.get("gen_ai_request_model") == MODEL
        and not sample.labels.get("error_type")
    }


def test_the_gateway_shows_them_as_prometheus_names_them(
    gateway: GatewayProcess, client: openai.OpenAI, http: httpx.Client
) -> None:
    before = samples(http)
    hello: Any = [{"role": "user", "content": "the secret word"}]
    list(client.chat.completions.create(model=MODEL, messages=hello, stream=True))
    client.completions.create(model=MODEL, prompt="the secret word")
    client.embeddings.create(model=MODEL, input="the secret word")
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="nobody-serves-this", prompt="x")

    def rose(name: str, operation: str) -> float:
        key = (f"{name}_count", operation)
        return samples(http).get(key, (0.0, {}))[0] - before.get(key, (0.0, {}))[0]

    duration = "gen_ai_server_request_duration_seconds"
    for operation in ("chat", "text_completion", "embeddings"):
        wait_until(lambda operation=operation: rose(duration, operation) >= 1, operation)
    assert rose("gen_ai_server_time_to_first_token_seconds", "chat") == 1
    assert rose("gen_ai_server_time_per_output_token_seconds", "chat") == 1
    assert rose("gen_ai_client_operation_duration_seconds", "chat") == 1
    assert rose("gen_ai_client_operation_time_to_first_chunk_seconds", "chat") == 1
    assert rose("gen_ai_client_token_usage", "embeddings") == 1
    labels = samples(http)[f"{duration}_count", "chat"][1]
    assert labels["gen_ai_provider_name"] == "tokenbus"
    assert labels["gen_ai_request_model"] == MODEL
    text = http.get("/metrics", params={"scope": "gateway"}).text
    assert "secret" not in text and "nobody-serves-this" not in text
    assert 'error_type="model_unavailable"' in text
