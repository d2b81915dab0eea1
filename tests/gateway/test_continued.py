"""An answer that was not continued exactly says so in every API: the server behind the worker
sends text without token ids, so the answer was continued from its text.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx2 as httpx
import pytest

from tests.gateway.conftest import GatewayProcess, running_gateway
from tests.harness import PATIENCE_S, Bus
from tests.support.openai_process import StandIn

WORDS = 12


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayProcess]:
    """In front of a server whose connection breaks where a question says `#cut`, once."""
    with Bus(tmp_path_factory.mktemp("bus")) as bus, StandIn(delay_ms=5) as server:
        bus.start_broker()
        bus.start_worker("one", engine="openai", base_url=server.url)
        bus.wait_ready(1)
        with running_gateway(bus) as gateway:
            yield gateway


def told(text: str, media_type: str) -> list[dict[str, Any]]:
    """The objects of an answer, streamed or not."""
    if "event-stream" in media_type:
        lines = [line[6:] for line in text.splitlines() if line.startswith("data: ")]
        return [json.loads(line) for line in lines if line != "[DONE]"]
    return [json.loads(line) for line in text.replace("\0", "\n").splitlines()]


def ask(gateway: GatewayProcess, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    body = {"model": "stand-in", **body}
    answer = httpx.post(f"{gateway.url}{path}", json=body, timeout=PATIENCE_S)
    assert answer.status_code == 200, answer.text
    return told(answer.text, answer.headers["content-type"])


def chat(text: str, **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}], "max_tokens": WORDS, **more}


@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_went_on_from_its_text_says_so(
    gateway: GatewayProcess, stream: bool, cut: bool
) -> None:
    def question(door: str) -> str:
        return f"{door} {stream} {'#cut=5' if cut else 'whole'} ?"

    wanted = {"continued": "text"} if cut else {}

    def check(objects: list[dict[str, Any]], *where: str | int) -> None:
        """The last object says it there, and the others nowhere."""
        found: Any = objects[-1]
        for key in where:
            found = found[key]
        assert {k: v for k, v in found.items() if k == "continued"} == wanted
        assert "continued" not in json.dumps(objects[:-1])

    for path, body, where in (
        ("/v1/chat/completions", chat(question("chat")), ("choices", 0)),
        ("/v1/completions", {"prompt": question("text"), "max_tokens": WORDS}, ("choices", 0)),
        (
            "/v1/responses",
            {"input": question("response"), "max_output_tokens": WORDS},
            ("response",) if stream else (),
        ),
        ("/api/chat", {"messages": chat(question("ollama"))["messages"]}, ()),
    ):
        check(ask(gateway, path, {**body, "stream": stream}), *where)
    objects = ask(gateway, "/v1/messages", {**chat(question("anthropic")), "stream": stream})
    check(objects[:-1] if stream else objects, *(["delta"] if stream else []))
    path = "/worker_generate_stream" if stream else "/worker_generate"
    check(ask(gateway, path, {"prompt": question("older"), "max_new_tokens": WORDS}))


def test_one_that_the_reader_leaves_early_says_so_too(gateway: GatewayProcess) -> None:
    """A forced call is enough: the gateway itself ends the stream."""
    tool = {"type": "function", "function": {"name": "go", "parameters": {"type": "object"}}}
    [answer] = ask(
        gateway,
        "/v1/chat/completions",
        chat("#call #cut=2", tools=[tool], parallel_tool_calls=False),
    )
    assert answer["choices"][0]["finish_reason"] == "tool_calls"
    assert answer["choices"][0]["continued"] == "text"


def test_usage_comes_with_each_chunk_where_the_server_tells_it(gateway: GatewayProcess) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = ask(
        gateway, "/v1/chat/completions", chat("count", stream=True, stream_options=options)
    )
    assert {chunk["usage"]["prompt_tokens"] for chunk in chunks} == {2}
