"""OpenAI's asynchronous client at every endpoint: answers, streams, errors, and disconnects."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import openai
import pytest

from tests.gateway.conftest import MODEL, GatewayProcess
from tests.gateway.test_chat import CALL, TOOLS, image
from tests.harness import wait_until

ENDLESS = "[[echo mode=sampled answer_tokens=30000 step_delay_ms=20]]x"
FAILING = "[[echo error_at=0]]x"

Client = openai.AsyncOpenAI
Ask = Callable[[Client, str, bool], Awaitable[Any]]


def said(text: str) -> list[Any]:
    return [{"role": "user", "content": text}]


#: How to ask each endpoint to answer a text.
ASK: dict[str, Ask] = {
    "chat": lambda client, text, stream: client.chat.completions.create(
        model=MODEL, messages=said(text), stream=stream
    ),
    "completions": lambda client, text, stream: client.completions.create(
        model=MODEL, prompt=text, max_tokens=5000, stream=stream
    ),
    "responses": lambda client, text, stream: client.responses.create(
        model=MODEL, input=text, stream=stream
    ),
}


def text_of(answer: Any) -> str:
    """The text of a whole answer, or of a piece of one."""
    if hasattr(answer, "output_text"):
        return str(answer.output_text)
    if hasattr(answer, "type"):
        return str(answer.delta) if answer.type == "response.output_text.delta" else ""
    [choice] = answer.choices
    for name in ("message", "delta"):
        if hasattr(choice, name):
            return getattr(choice, name).content or ""
    return str(choice.text)


@pytest.fixture
def run(gateway: GatewayProcess) -> Callable[[Callable[[Client], Awaitable[Any]]], Any]:
    """Runs a coroutine with its own client."""

    def start(work: Callable[[Client], Awaitable[Any]]) -> Any:
        async def main() -> Any:
            async with Client(
                base_url=f"{gateway.url}/v1", api_key="none", max_retries=0
            ) as client:
                return await work(client)

        return asyncio.run(main())

    return start


Run = Callable[[Callable[[Client], Awaitable[Any]]], Any]


@pytest.mark.parametrize("endpoint", ASK)
def test_the_whole_answer_and_its_pieces_are_the_same(run: Run, endpoint: str) -> None:
    async def work(client: Client) -> tuple[str, list[str]]:
        whole = text_of(await ASK[endpoint](client, "hello there", False))
        pieces = [text_of(part) async for part in await ASK[endpoint](client, "hello there", True)]
        return whole, pieces

    whole, pieces = run(work)
    assert whole == "hello there" == "".join(pieces) and len(pieces) > 1


@pytest.mark.parametrize("endpoint", ASK)
def test_errors_are_the_sdks_own_exceptions(run: Run, endpoint: str) -> None:
    async def work(client: Client) -> None:
        for stream in (False, True):
            with pytest.raises(openai.InternalServerError) as caught:
                await ASK[endpoint](client, FAILING, stream)
            assert caught.value.code == "engine_error" and caught.value.request_id

    run(work)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("endpoint", ASK)
def test_a_cancelled_task_frees_the_slot(
    run: Run, gateway: GatewayProcess, endpoint: str, stream: bool
) -> None:
    async def read(client: Client) -> None:
        answer = await ASK[endpoint](client, ENDLESS, stream)
        async for _ in answer:
            pass

    async def work(client: Client) -> None:
        reading = asyncio.create_task(read(client))
        await asyncio.to_thread(wait_until, lambda: gateway.bus.running() == 1, "a start")
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading

    run(work)
    wait_until(lambda: gateway.bus.running() == 0, "a free slot")


def test_images_logprobs_and_tools_work(run: Run) -> None:
    async def work(client: Client) -> None:
        shown = [
            {"type": "image_url", "image_url": {"url": image()}},
            {"type": "text", "text": "what"},
        ]
        seen, scored, called = await asyncio.gather(
            client.chat.completions.create(model=MODEL, messages=said(shown)),  # type: ignore[arg-type]
            client.chat.completions.create(
                model=MODEL, messages=said("ab"), logprobs=True, top_logprobs=2
            ),
            client.chat.completions.create(model=MODEL, messages=said(CALL), tools=TOOLS),
        )
        assert text_of(seen) == "1 image: 64x48. what"
        assert [entry.token for entry in scored.choices[0].logprobs.content] == ["a", "b"]
        assert called.choices[0].finish_reason == "tool_calls"

    run(work)


def test_models_and_embeddings_work(run: Run) -> None:
    async def work(client: Client) -> None:
        assert [model.id async for model in client.models.list()] == [MODEL]
        assert (await client.models.retrieve(MODEL)).id == MODEL
        with pytest.raises(openai.NotFoundError):
            await client.models.retrieve("nope")
        made = await client.embeddings.create(model=MODEL, input=["a", "b"])
        assert len(made.data) == 2 and made.usage.prompt_tokens > 0
        with pytest.raises(openai.NotFoundError):
            await client.embeddings.create(model="nope", input="a")

    run(work)


def test_a_response_lives_in_the_background(run: Run, gateway: GatewayProcess) -> None:
    async def work(client: Client) -> None:
        made = await client.responses.create(model=MODEL, input=ENDLESS, background=True)
        stream = await client.responses.retrieve(made.id, stream=True)
        async for event in stream:
            if event.type == "response.output_text.delta":
                break
        await stream.close()
        assert (await client.responses.cancel(made.id)).status == "cancelled"
        await client.responses.delete(made.id)

    run(work)
    wait_until(lambda: gateway.bus.running() == 0, "a free slot")
