"""`/v1/responses` over a WebSocket, with OpenAI's own client and a plain one."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai
import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection, connect

from client.gateway.keys import add_key
from tests.gateway.conftest import MODEL, GatewayProcess
from tests.harness import PATIENCE_S, Bus, wait_until

SLOW = "[[echo mode=sampled answer_tokens=30000 step_delay_ms=20]]x"
LAST = ("response.completed", "response.failed", "response.incomplete", "error")


def opened(gateway: GatewayProcess, path: str = "/v1/responses", **options: Any) -> Any:
    return connect(f"{gateway.url.replace('http', 'ws')}{path}", open_timeout=PATIENCE_S, **options)


def ask(socket: ClientConnection, **fields: Any) -> list[dict[str, Any]]:
    """All events of one response."""
    socket.send(json.dumps({"type": "response.create", "model": MODEL, **fields}))
    events: list[dict[str, Any]] = []
    while not events or events[-1]["type"] not in LAST:
        events.append(json.loads(socket.recv(PATIENCE_S)))
    return events


def text_of(events: list[dict[str, Any]]) -> str:
    said = [event["delta"] for event in events if event["type"] == "response.output_text.delta"]
    assert events[-1]["type"] == "response.completed", events[-1]
    return "".join(said)


def code_of(events: list[dict[str, Any]]) -> str:
    [event] = events
    assert event["type"] == "error" and event["status"] >= 400, event
    return str(event["error"]["code"])


@pytest.mark.filterwarnings("ignore:.*must be used as a context manager:DeprecationWarning")
def test_the_sdks_connection_gets_the_events_of_http(client: openai.OpenAI) -> None:
    def shape(event: Any) -> Any:
        return event.type, event.sequence_number, getattr(event, "delta", None)

    wanted = [
        shape(event) for event in client.responses.create(model=MODEL, input="hi", stream=True)
    ]
    with client.responses.connect() as connection:
        for _ in range(2):
            connection.response.create(model=MODEL, input="hi")
            events: list[Any] = []
            while not events or events[-1].type != "response.completed":
                events.append(connection.recv())
            assert [shape(event) for event in events] == wanted


def test_an_unstored_response_continues_in_its_own_connection_only(gateway: GatewayProcess) -> None:
    with opened(gateway) as socket, opened(gateway, "/responses") as other:
        first = ask(socket, input="one", store=False)[-1]["response"]
        follow = {"previous_response_id": first["id"], "store": False}
        assert code_of(ask(other, input="two", **follow)) == "previous_response_not_found"
        with gateway.http() as http:
            body = {"model": MODEL, "input": "two", **follow}
            assert http.post("/v1/responses", json=body).status_code == 400
            assert http.get(f"/v1/responses/{first['id']}").status_code == 404
        second = ask(socket, input="two", **follow)
        assert second[-1]["response"]["usage"]["input_tokens"] > first["usage"]["input_tokens"]
        # The latest alone.
        assert code_of(ask(socket, input="three", **follow)) == "previous_response_not_found"
    with opened(gateway) as socket:
        assert code_of(ask(socket, input="two", **follow)) == "previous_response_not_found"


def test_a_request_that_fails_ends_what_it_went_on_from(gateway: GatewayProcess) -> None:
    stray = [{"type": "function_call_output", "call_id": "stray", "output": "x"}]
    with opened(gateway) as socket:
        for store, code in ((False, "previous_response_not_found"), (True, "")):
            first = ask(socket, input="one", store=store)[-1]["response"]
            follow = {"previous_response_id": first["id"], "store": store}
            [error] = ask(socket, input=stray, **follow)
            assert error["status"] == 400 and error["error"]["param"] == "input[0].call_id"
            after = ask(socket, input="two", **follow)
            assert code_of(after) == code if code else text_of(after) == "two"


def test_a_stored_response_continues_anywhere(
    gateway: GatewayProcess, client: openai.OpenAI
) -> None:
    with opened(gateway) as socket:
        first = ask(socket, input="one")[-1]["response"]
        second = client.responses.create(model=MODEL, input="two", previous_response_id=first["id"])
        assert text_of(ask(socket, input="three", previous_response_id=second.id)) == "three"
    assert client.responses.retrieve(first["id"]).output_text == "one"


@pytest.mark.parametrize(
    ("message", "field"),
    [
        ("not JSON", None),
        ("[]", None),
        ('{"type": "response.cancel"}', "type"),
        ('{"model": "echo", "input": "x"}', "type"),
        (
            '{"type": "response.create", "model": "echo", "input": "x", "background": true}',
            "background",
        ),
        (
            '{"type": "response.create", "model": "echo", "input": "x", "generate": false}',
            "generate",
        ),
        ('{"type": "response.create", "model": "nope", "input": "x"}', "model"),
        ('{"type": "response.create", "model": "echo", "input": []}', "input"),
    ],
)
def test_a_wrong_message_is_an_error_and_the_connection_stays(
    gateway: GatewayProcess, message: str, field: str | None
) -> None:
    with opened(gateway) as socket:
        socket.send(message)
        error = json.loads(socket.recv(PATIENCE_S))
        assert (error["type"], error["error"]["param"]) == ("error", field)
        assert error["status"] in (400, 404) and error["error"]["request_id"].startswith("req-")
        assert text_of(ask(socket, input="still here")) == "still here"


def test_a_reader_that_leaves_cancels_its_request_at_the_worker(gateway: GatewayProcess) -> None:
    with opened(gateway) as socket:
        socket.send(json.dumps({"type": "response.create", "model": MODEL, "input": SLOW}))
        while json.loads(socket.recv(PATIENCE_S))["type"] != "response.output_text.delta":
            pass
        assert gateway.bus.running() == 1
    gateway.bus.wait_idle()


def test_requests_come_one_at_a_time(gateway: GatewayProcess) -> None:
    with opened(gateway) as socket:
        for text in (SLOW, "b", "c", "d"):
            socket.send(json.dumps({"type": "response.create", "model": MODEL, "input": text}))
        with pytest.raises(ConnectionClosed) as caught:
            while True:
                socket.recv(PATIENCE_S)
        assert caught.value.rcvd is not None and caught.value.rcvd.code == 1008
    gateway.bus.wait_idle()


def test_a_message_beyond_the_limit_of_a_body_closes_it(
    make_gateway: Callable[..., GatewayProcess],
) -> None:
    with opened(make_gateway("--body-bytes", "5000")) as socket:
        assert text_of(ask(socket, input="x" * 100)) == "x" * 100
        with pytest.raises(ConnectionClosed) as caught:
            ask(socket, input="x" * 6000)
        assert caught.value.rcvd is not None and caught.value.rcvd.code == 1009


def test_keys_origins_and_paths_are_checked_before_it_opens(
    make_gateway: Callable[..., GatewayProcess], tmp_path: Path
) -> None:
    keys = tmp_path / "keys.toml"
    key = add_key(keys, "alice")
    gateway = make_gateway("--keys", str(keys), "--cors-origins", "https://page.example")
    bearer = {"authorization": f"Bearer {key}"}
    with opened(gateway, additional_headers=bearer) as socket:
        assert text_of(ask(socket, input="mine")) == "mine"
    with opened(gateway, additional_headers=bearer, origin="https://page.example"):
        pass
    for status, options in (
        (401, {}),
        (401, {"additional_headers": {"authorization": "Bearer wrong"}}),
        (403, {"additional_headers": bearer, "origin": "https://other.example"}),
        (403, {"additional_headers": bearer, "path": "/v1/chat/completions"}),
    ):
        with pytest.raises(InvalidStatus) as caught, opened(gateway, **options):
            pass
        assert caught.value.response.status_code == status


def test_a_gateway_that_stops_closes_what_waits_and_ends_what_runs(
    make_gateway: Callable[..., GatewayProcess],
) -> None:
    gateway = make_gateway("--shutdown-s", "3600")
    text = "[[echo step_delay_ms=20]]" + "a word " * 20
    with opened(gateway) as idle, opened(gateway) as busy:
        assert text_of(ask(idle, input="x")) == "x"
        busy.send(json.dumps({"type": "response.create", "model": MODEL, "input": text}))
        while json.loads(busy.recv(PATIENCE_S))["type"] != "response.output_text.delta":
            pass
        gateway.process.signal(signal.SIGTERM)
        with pytest.raises(ConnectionClosed) as caught:
            idle.recv(PATIENCE_S)
        assert caught.value.rcvd is not None and caught.value.rcvd.code == 1012
        last: dict[str, Any] = {"type": ""}
        while last["type"] not in LAST:
            last = json.loads(busy.recv(PATIENCE_S))
        assert last["type"] == "response.completed"
    assert gateway.process.popen.wait(PATIENCE_S) == 0


def test_a_killed_worker_changes_nothing(
    make_gateway: Callable[..., GatewayProcess], tmp_path: Path
) -> None:
    text = "word " * 60
    with Bus(tmp_path) as own:
        own.start_broker()
        for name in ("one", "two"):
            own.start_worker(name, step_delay_ms=10)
        own.wait_ready(2)
        with opened(make_gateway(bus=own)) as socket:
            socket.send(json.dumps({"type": "response.create", "model": MODEL, "input": text}))
            events: list[dict[str, Any]] = []
            while not events or events[-1]["type"] not in LAST:
                events.append(json.loads(socket.recv(PATIENCE_S)))
                if len(events) == 20:
                    [running] = wait_until(
                        lambda: [row["name"] for row in own.rows() if row["running"]], "a worker"
                    )
                    own.workers.pop(running).kill()
            assert text_of(events) == text
            assert [event["sequence_number"] for event in events] == list(range(len(events)))


# --- compaction -----------------------------------------------------------------------------------


def test_a_conversation_is_compacted_and_goes_on(client: openai.OpenAI) -> None:
    """The echo's summary is the request for one."""
    first = client.responses.create(model=MODEL, input="keep the blue one")
    raw = client.responses.with_raw_response.compact(
        model=MODEL,
        previous_response_id=first.id,
        input=[{"role": "user", "content": [{"type": "input_text", "text": "and be quick"}]}],
    )
    compacted = raw.parse()
    assert compacted.object == "response.compaction" and compacted.usage.output_tokens > 0
    said: list[Any] = json.loads(raw.text)["output"]
    texts = [item["content"][0]["text"] for item in said[:-1]]
    assert texts == ["keep the blue one", "and be quick"]
    assert said[-1]["type"] == "compaction"
    history = [*said, {"role": "user", "content": "go on"}]
    more = client.responses.create(model=MODEL, input=history)
    assert more.output_text == "go on"
    assert more.usage is not None and more.usage.input_tokens > 300, "the summary is in the prompt"
    # Compacted again, the older summary is part of the new one.
    again = client.responses.compact(model=MODEL, input=history)
    assert [item.type for item in again.output] == ["message", "message", "message", "compaction"]


def test_a_summary_of_another_server_is_refused(client: openai.OpenAI) -> None:
    item: Any = {"type": "compaction", "encrypted_content": "gAAAA"}
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(model=MODEL, input=[item, {"role": "user", "content": "x"}])
    assert caught.value.param == "input[0].encrypted_content"


@pytest.mark.parametrize("body", [{"input": "x"}, {"model": MODEL}, {"model": MODEL, "tools": []}])
def test_a_compaction_needs_a_model_and_a_conversation(
    gateway: GatewayProcess, body: dict[str, Any]
) -> None:
    with gateway.http() as http:
        assert http.post("/v1/responses/compact", json=body).status_code == 400


def test_a_summary_that_does_not_fit_is_an_error(client: openai.OpenAI) -> None:
    context = client.models.retrieve(MODEL).to_dict()["context_tokens"]
    assert isinstance(context, int)
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.compact(model=MODEL, input="x" * (context - 400))
    assert caught.value.code == "context_length_exceeded"
