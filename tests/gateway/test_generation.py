"""How the gateway runs the bus requests made from an HTTP request."""

from __future__ import annotations

import asyncio
import base64
import io
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest
from PIL import Image

from broker.protocol.messages import Attachment, ImagePart, Request
from client import AsyncClient, Retry, Timeout
from client.core.events import StreamEvent, Tokens
from client.gateway.convert import Generation, chat_call, completion_calls, seeded
from client.gateway.errors import GatewayError
from client.gateway.images import ImagePolicy
from client.gateway.openai.generation import RETRY, Delta, Finish, generate
from client.gateway.requests import ChatRequest, CompletionRequest
from tests.harness import Bus


def image(kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (20, 10)).save(buffer, kind)
    return buffer.getvalue()


def chat(**fields: Any) -> Generation:
    body = {"model": "echo", "messages": [{"role": "user", "content": "hi"}], **fields}
    return asyncio.run(
        chat_call(msgspec.convert(body, ChatRequest), ImagePolicy(), seed=5, user="me")
    )


def shown(*images: bytes) -> list[dict[str, Any]]:
    urls = [f"data:image/x;base64,{base64.b64encode(data).decode()}" for data in images]
    parts: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": "what"}]}]


class Recorder:
    """Stands in for a client: records the requests, and starts none."""

    class NotStartedError(Exception):
        pass

    def __init__(self) -> None:
        self.started: list[tuple[Request, tuple[bytes, ...], dict[str, Any]]] = []

    async def start(self, request: Request, attachments: tuple[bytes, ...], **how: Any) -> None:
        self.started.append((request, attachments, how))
        raise self.NotStartedError


@pytest.mark.parametrize("choices", [1, 2])
def test_the_bus_gets_the_request_made_from_the_body(choices: int) -> None:
    made = chat(messages=shown(image("PNG")), queue_ms=7, temperature=0.5)
    bus = Recorder()
    limits = Timeout(total=3)

    async def run() -> None:
        asked = [seeded(made, i) for i in range(choices)]
        batches = generate(bus, asked, lambda stream: None, limits=limits)  # type: ignore[arg-type]
        with pytest.raises(Recorder.NotStartedError):
            await anext(batches)

    asyncio.run(run())
    request, attachments, how = bus.started[0]
    assert request is made.request
    assert attachments is made.attachments
    assert how == {"timeout": limits, "retry": RETRY}
    assert [one.params.seed for one, *_ in bus.started] == [5, 6][:choices]


class Arrived:
    """Stands in for a client whose streams get these batches."""

    def __init__(self, *batches: list[StreamEvent]) -> None:
        self._batches = batches

    async def start(self, request: Request, attachments: tuple[bytes, ...], **how: Any) -> Arrived:
        return self

    @property
    async def batches(self) -> AsyncIterator[list[StreamEvent]]:
        for batch in self._batches:
            yield batch

    async def aclose(self) -> None:
        pass


def piece(offset: int, text: str, **more: Any) -> Tokens:
    return Tokens(bytes(16), 0, offset, [offset], text, **more)


TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}


@pytest.mark.parametrize("choices", [1, 2])
@pytest.mark.parametrize("tools", [False, True])
def test_tokens_that_arrived_together_are_one_event_unless_calls_are_looked_for(
    choices: int, tools: bool
) -> None:
    bus = Arrived(
        [piece(0, "a")],
        [piece(1, "b"), piece(2, "c"), piece(3, "d", logprobs=[]), piece(4, "e"), piece(5, "f")],
    )
    made = chat(messages=[{"role": "user", "content": "x"}], **({"tools": [TOOL]} if tools else {}))

    async def read() -> list[list[tuple[str, list[int]]]]:
        events = generate(bus, [made] * choices, lambda stream: None)  # type: ignore[arg-type]
        return [
            [(event.text, list(event.token_ids)) for event in batch if isinstance(event, Delta)]
            for batch in [await anext(events) for _ in range(2 * choices)]
            if batch[0].choice == 0
        ]

    together = [("bc", [1, 2]), ("d", [3]), ("ef", [4, 5])]
    apart = [("b", [1]), ("c", [2]), ("d", [3]), ("e", [4]), ("f", [5])]
    assert asyncio.run(read()) == [[("a", [0])], apart if tools else together]


def test_images_are_described_by_their_first_bytes() -> None:
    png, jpeg = image("PNG"), image("JPEG")
    made = chat(messages=shown(jpeg, png))
    assert made.attachments == (jpeg, png)
    assert made.request.attachments == [
        Attachment(media_type="image/jpeg"),
        Attachment(media_type="image/png"),
    ]
    content = made.request.messages and made.request.messages[0].content
    assert content and content[:2] == [ImagePart(attachment=0), ImagePart(attachment=1)]


def test_a_body_beyond_the_limits_of_the_bus_is_refused() -> None:
    with pytest.raises(GatewayError) as caught:
        chat(chat_template_kwargs={"n": 1 << 70})
    assert caught.value.status == 400
    assert "template_args holds an integer past 64 bits" in caught.value.info.message


def test_prompts_are_checked_against_the_limits_of_the_bus_too() -> None:
    schema: dict[str, Any] = {}
    for _ in range(100):
        schema = {"properties": schema}
    body = msgspec.convert(
        {"model": "m", "prompt": "x", "structured_outputs": {"json": schema}}, CompletionRequest
    )
    with pytest.raises(GatewayError, match="nested deeper"):
        completion_calls(body, seed=0, user="")


def test_a_ready_made_request_is_answered(bus: Bus) -> None:
    made = chat(messages=shown(image("PNG")))

    async def run() -> tuple[str, str]:
        async with AsyncClient(bus.front) as client:
            batches = generate(client, [made], lambda stream: None, retry=Retry(attempts=0))
            events = [event async for batch in batches for event in batch]
            (finish,) = [event for event in events if isinstance(event, Finish)]
            text = "".join(event.text for event in events if isinstance(event, Delta))
            return text, finish.end.model

    text, model = asyncio.run(run())
    assert "20x10" in text and text.endswith("what") and model == "echo"
