"""Large bodies: their size is checked before they are parsed, and they are read in short steps;
whatever a caller sends, the event loop goes on."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import random
import sys
from collections.abc import Callable, Iterator
from typing import Any

import httpx2 as httpx
import msgspec
import pytest

from client.gateway import bodies
from client.gateway.app import create_app
from client.gateway.bodies import from_base64, read_in_steps, slices
from client.gateway.config import parse_args
from client.gateway.errors import GatewayError
from client.gateway.requests import ChatRequest, parse
from tests.gateway.conftest import MODEL, GatewayProcess
from tests.harness import PATIENCE_S, Bus

MESSAGE = {"role": "user", "content": "x"}


def chat(**fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": [MESSAGE], **fields}


# --- reading --------------------------------------------------------------------------------------


def _value(generator: random.Random, depth: int = 0) -> Any:
    kind = generator.random()
    if kind < 0.25 and depth < 4:
        return [_value(generator, depth + 1) for _ in range(generator.randint(0, 4))]
    if kind < 0.5 and depth < 4:
        return {
            _text(generator, 30): _value(generator, depth + 1)
            for _ in range(generator.randint(0, 4))
        }
    return _text(generator, 120) if kind < 0.9 else generator.choice([None, True, 1.5, -3])


def _text(generator: random.Random, most: int) -> str:
    characters = 'ab"\\\n\u1234\U0001f600,{['
    return "".join(generator.choices(characters, k=generator.randint(0, most)))


def test_a_body_read_in_steps_is_unchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = random.Random(1)
    monkeypatch.setattr(bodies, "LONG_BYTES", 200)
    for slice_bytes in (5, 17, 64):
        monkeypatch.setattr(bodies, "SLICE_BYTES", slice_bytes)
        for _ in range(300):
            value = [_value(generator)]
            data = json.dumps(value, ensure_ascii=generator.random() < 0.5).encode()
            assert read_in_steps(data, msgspec.json.decode) == value
            assert b"".join(slices(data)) == data


def test_long_strings_are_not_decoded_with_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[int] = []
    decode = msgspec.json.decode

    def watched(data: bytes, **options: Any) -> Any:
        decoded.append(len(data))
        return decode(data, **options)

    image = "data:image/png;base64," + "A" * 3_000_000
    part = {"type": "image_url", "image_url": {"url": image}}
    data = json.dumps(chat(messages=[{"role": "user", "content": [part] * 4}])).encode()
    monkeypatch.setattr(msgspec.json, "decode", watched)
    body = read_in_steps(data, lambda data: parse(ChatRequest, data))
    assert isinstance(body.messages[0].content, list)
    assert [one.image_url.url == image for one in body.messages[0].content] == [True] * 4
    # Each image by itself, then all else.
    assert max(decoded) < 3_100_000 and sorted(decoded)[0] < 100_000


@pytest.mark.parametrize(
    "data",
    [
        b'{"model":"' + b"a" * 300_000 + b'","messages":[]}',
        b'{"' + b"a" * 300_000 + b'":1}',
        b'{"model":"m","messages":[],"user":"' + b"a" * 300_000 + b'\\q"}',
        b'{"model":"m","messages":[],"metadata":{"' + b"a" * 300_000 + b'":1}}',
        b'{"model":"m","user":"' + b"a" * 300_000,
    ],
    ids=["name", "field", "escape", "key", "cut"],
)
def test_a_long_string_in_the_wrong_place_is_refused(data: bytes) -> None:
    with pytest.raises(GatewayError) as caught:
        read_in_steps(data, lambda data: parse(ChatRequest, data))
    assert caught.value.status == 400
    assert len(caught.value.info.message) < 2500


def test_too_much_text_is_refused_before_it_is_parsed() -> None:
    def never(data: bytes) -> None:
        raise AssertionError("it was parsed")

    text = b'{"prompt":"' + b"many words " * 1_200_000 + b'"}'
    texts = b'["' + b'","'.join([b"some words " * 100] * 12_000) + b'"]'
    spaces = b"[" + b" " * (25 << 20) + b"]"
    many = b"[" + b",".join([b'{"a":1}'] * 200_000) + b"]"
    for data in (text, texts, spaces, many):
        with pytest.raises(GatewayError) as caught:
            read_in_steps(data, never)
        assert caught.value.info.code == "too_large" and caught.value.status == 413


def test_a_body_within_the_limits_of_the_bus_is_parsed() -> None:
    escaped = json.dumps({"a": "\u044f" * (4 << 20)}).encode()
    assert len(escaped) > 24 << 20
    assert read_in_steps(escaped, msgspec.json.decode) == {"a": "\u044f" * (4 << 20)}
    ids = json.dumps(list(range(1 << 20))).encode()
    assert read_in_steps(ids, len) == len(ids)


def test_base64_decoded_in_parts_is_unchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = random.Random(2)
    for at_once in (4, 8, 12):
        monkeypatch.setattr(bodies, "_DECODED_AT_ONCE", at_once)
        for _ in range(100):
            data = generator.randbytes(generator.randint(0, 50))
            text = base64.b64encode(data).decode()
            spaced = "".join(one + generator.choice(["", "\n", " "]) for one in text)
            assert from_base64(spaced) == data
        for wrong in ("AA==AA==", "A", "AA=", "@@@@", "AA==\nBBBB", "AAAABB==CCCC"):
            with pytest.raises(ValueError):
                from_base64(wrong)


# --- counts ---------------------------------------------------------------------------------------

PART = {"type": "text", "text": "x"}
TOOL = {"type": "function", "function": {"name": "f"}}
CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/chat/completions", chat(messages=[MESSAGE] * 8193), "messages"),
        (
            "/v1/chat/completions",
            chat(messages=[{"role": "user", "content": [PART] * 16_385}]),
            "messages",
        ),
        (
            "/v1/chat/completions",
            chat(messages=[{"role": "assistant", "tool_calls": [CALL] * 8193}]),
            "messages",
        ),
        ("/v1/chat/completions", chat(tools=[TOOL] * 129), "tools"),
        (
            "/v1/chat/completions",
            chat(logit_bias={str(i): 1 for i in range((1 << 17) + 1)}),
            "logit_bias",
        ),
        ("/v1/chat/completions", chat(stop_token_ids=[1] * 1025), "stop_token_ids"),
        ("/v1/completions", {"model": MODEL, "prompt": ["x"] * 33, "n": 128}, "n"),
        ("/v1/responses", {"model": MODEL, "input": [MESSAGE] * 8193}, "input"),
        ("/v1/embeddings", {"model": MODEL, "input": ["x"] * 4097}, "input"),
    ],
    ids=[
        "messages",
        "parts",
        "tool calls",
        "tools",
        "biases",
        "stop tokens",
        "choices",
        "items",
        "inputs",
    ],
)
def test_too_many_of_anything_is_refused_by_name(
    http: httpx.Client, path: str, body: dict[str, Any], param: str
) -> None:
    answer = http.post(path, json=body)
    assert answer.status_code in (400, 413), answer.text
    assert answer.json()["error"]["param"] == param


def test_the_memory_for_bodies_is_bounded(make_gateway: Callable[..., GatewayProcess]) -> None:
    gateway = make_gateway("--bodies-bytes", "100000")
    with gateway.http() as http:
        answer = http.post("/v1/chat/completions", json=chat(user="x" * 100_000))
        assert answer.status_code == 429 and answer.json()["error"]["code"] == "overloaded"
        assert answer.headers["x-should-retry"] == "true"
        for _ in range(3):
            # Memory that one request held is free for the next.
            answer = http.post("/v1/chat/completions", json=chat(user="x" * 60_000))
            assert answer.status_code == 200, answer.text


# --- the loop -------------------------------------------------------------------------------------


class Steps:
    """Counts function calls in each step of an event loop, as a measure of time without a clock."""

    def __init__(self) -> None:
        self.longest = 0
        self._count = 0

    @contextlib.contextmanager
    def counted(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[Steps]:
        run = asyncio.Handle._run

        def step(handle: asyncio.Handle) -> None:
            self._count = 0
            sys.setprofile(self._called)
            try:
                run(handle)
            finally:
                sys.setprofile(None)
            self.longest = max(self.longest, self._count)

        monkeypatch.setattr(asyncio.Handle, "_run", step)
        yield self
        monkeypatch.undo()

    def _called(self, frame: Any, event: str, argument: Any) -> None:
        self._count += event in ("call", "c_call")


async def longest_step(
    bus: Bus, asked: tuple[str, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> int:
    """The longest step of a gateway in this process that answers the request, after a small one."""
    path, body = asked
    data = json.dumps(body).encode()
    field = "messages" if "chat" in path else "input" if path.startswith("/v1/r") else "prompt"
    field = "input" if "embeddings" in path else field
    small = {"model": MODEL, field: [MESSAGE] if field == "messages" else "x"}
    app = create_app(parse_args(["--broker", bus.front, "--allowed-hosts", "gateway"], {}))
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(
            transport=httpx.ASGITransport(app=app), base_url="http://gateway", timeout=PATIENCE_S
        ) as http,
    ):
        assert (await http.post(path, json=small)).status_code == 200
        headers = {"content-type": "application/json"}
        with Steps().counted(monkeypatch) as steps:
            answer = await http.post(path, content=data, headers=headers)
        assert answer.status_code in (200, 400, 413), answer.text[:1000]
        return steps.longest


GREEDY: dict[str, tuple[str, dict[str, Any]]] = {
    "messages": ("/v1/chat/completions", chat(messages=[MESSAGE] * 8000)),
    "far too many messages": ("/v1/chat/completions", chat(messages=[MESSAGE] * 200_000)),
    "parts": (
        "/v1/chat/completions",
        chat(messages=[{"role": "user", "content": [PART] * 16_000}]),
    ),
    "tools": (
        "/v1/chat/completions",
        chat(
            tools=[
                {
                    "type": "function",
                    "function": {
                        "name": f"f{i}",
                        "parameters": {
                            "type": "object",
                            "properties": {f"p{j}": {"type": "string"} for j in range(100)},
                        },
                    },
                }
                for i in range(128)
            ]
        ),
    ),
    "biases": ("/v1/chat/completions", chat(logit_bias={str(i): 1 for i in range(100_000)})),
    "unknown fields": ("/v1/chat/completions", chat(messages=[{**MESSAGE, "y": None}] * 8000)),
    "token ids": ("/v1/completions", {"model": MODEL, "prompt": list(range(500_000))}),
    "prompts": ("/v1/completions", {"model": MODEL, "prompt": ["x"] * 4097}),
    "choices": (
        "/v1/completions",
        {"model": MODEL, "prompt": ["x"] * 32, "n": 16, "max_tokens": 1},
    ),
    "items": ("/v1/responses", {"model": MODEL, "input": [MESSAGE] * 8000}),
    "inputs": ("/v1/embeddings", {"model": MODEL, "input": ["some words"] * 4096}),
    # A small body with a large answer.
    "log-probabilities": (
        "/v1/chat/completions",
        chat(
            messages=[{"role": "user", "content": "some words " * 3000}],
            logprobs=True,
            top_logprobs=20,
        ),
    ),
    "turns": (
        "/worker_generate",
        {"model": MODEL, "prompt": [{"role": "user", "content": "x"}] * 8000},
    ),
}


@pytest.mark.parametrize("kind", GREEDY)
def test_no_body_makes_a_step_of_the_loop_long(
    bus: Bus, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # An ordinary request makes some hundred calls a step, each of a fraction of a microsecond.
    assert asyncio.run(longest_step(bus, GREEDY[kind], monkeypatch)) < 25_000


def test_the_loops_delay_is_a_metric(http: httpx.Client) -> None:
    text = http.get("/metrics", params={"scope": "gateway"}).text
    assert 'tokenbus_gateway_loop_delay_seconds_bucket{le="0.05"}' in text
