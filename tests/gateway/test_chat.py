"""`/v1/chat/completions` as OpenAI's own client sees it."""

from __future__ import annotations

import asyncio
import base64
import io
import json

import httpx2 as httpx
import openai
import pytest
from PIL import Image

from tests.gateway.conftest import MODEL, GatewayProcess
from tests.harness import wait_until

STREAM = openai.Stream[object]

HELLO = [{"role": "user", "content": "hello there"}]


def image(width: int = 64, height: int = 48) -> str:
    """A PNG as a data URL."""
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), "red").save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def with_image(*urls: str, text: str = "what is this") -> list[dict[str, object]]:
    parts: list[dict[str, object]] = [{"type": "text", "text": text}]
    parts += [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return [{"role": "user", "content": parts}]


def test_an_answer_has_openais_shape_and_exact_usage(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=HELLO)
    [choice] = answer.choices
    assert choice.message.role == "assistant"
    assert choice.message.content == "hello there"
    assert choice.finish_reason == "stop"
    assert answer.object == "chat.completion" and answer.model == MODEL
    assert answer.usage is not None
    assert answer.usage.prompt_tokens > 0
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_a_stream_gives_the_same_answer_in_pieces(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model=MODEL, messages=HELLO)
    chunks = list(
        client.chat.completions.create(
            model=MODEL, messages=HELLO, stream=True, stream_options={"include_usage": True}
        )
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == "hello there"
    assert len(chunks) > 3
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"
    assert [c.usage for c in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage
    assert len({c.id for c in chunks}) == 1


def test_without_include_usage_a_stream_has_no_usage(http: httpx.Client) -> None:
    body = {"model": MODEL, "messages": HELLO, "stream": True}
    text = http.post("/v1/chat/completions", json=body).text
    assert "usage" not in text and text.endswith("data: [DONE]\n\n")


def test_the_asynchronous_client_streams_many_at_once(gateway: GatewayProcess) -> None:
    async def one(client: openai.AsyncOpenAI, number: int) -> str:
        messages = [{"role": "user", "content": f"number {number}"}]
        stream = await client.chat.completions.create(model=MODEL, messages=messages, stream=True)
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    async def all_of_them() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key="none") as client:
            return await asyncio.gather(*(one(client, number) for number in range(20)))

    assert asyncio.run(all_of_them()) == [f"number {number}" for number in range(20)]


def test_length_and_stop_are_distinguished(client: openai.OpenAI) -> None:
    cut = client.chat.completions.create(model=MODEL, messages=HELLO, max_completion_tokens=3)
    assert cut.choices[0].finish_reason == "length"
    assert cut.usage is not None and cut.usage.completion_tokens == 3
    stopped = client.chat.completions.create(model=MODEL, messages=HELLO, stop=["there", "x"])
    assert stopped.choices[0].finish_reason == "stop"
    assert stopped.choices[0].message.content == "hello "


def sampled(text: str = "", tokens: int = 6) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"[[echo mode=sampled answer_tokens={tokens}]]{text}"}]


def test_choices_differ_and_a_seed_repeats_them(client: openai.OpenAI) -> None:
    def texts(seed: int, n: int = 3) -> list[str | None]:
        answer = client.chat.completions.create(model=MODEL, messages=sampled(), n=n, seed=seed)
        assert [choice.index for choice in answer.choices] == list(range(n))
        assert answer.usage is not None and answer.usage.completion_tokens == 6 * n
        return [choice.message.content for choice in answer.choices]

    first = texts(7)
    assert len(set(first)) == 3
    assert texts(7) == first
    # The i-th choice has seed + i.
    assert texts(8, n=1) == first[1:2]


def test_choices_of_a_stream_come_interleaved_with_their_index(client: openai.OpenAI) -> None:
    texts = ["", ""]
    for chunk in client.chat.completions.create(
        model=MODEL, messages=sampled(), n=2, seed=7, stream=True
    ):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    whole = client.chat.completions.create(model=MODEL, messages=sampled(), n=2, seed=7)
    assert texts == [choice.message.content for choice in whole.choices]


def test_images_are_passed_on_in_order(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=with_image(image(), image(32, 32))
    )
    assert answer.choices[0].message.content == "2 images: 64x48, 32x32. what is this"
    assert answer.usage is not None and answer.usage.prompt_tokens_details is not None


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_come_for_every_token(client: openai.OpenAI, stream: bool) -> None:
    options = {"model": MODEL, "messages": HELLO, "logprobs": True, "top_logprobs": 2}
    if stream:
        entries = [
            entry
            for chunk in client.chat.completions.create(**options, stream=True)
            for choice in chunk.choices
            if choice.logprobs
            for entry in choice.logprobs.content or []
        ]
    else:
        answer = client.chat.completions.create(**options)
        assert answer.choices[0].logprobs is not None
        entries = answer.choices[0].logprobs.content or []
    assert b"".join(bytes(entry.bytes or []) for entry in entries) == b"hello there"
    assert all(len(entry.top_logprobs) == 2 and entry.logprob <= 0 for entry in entries)


CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Graz"}}\n</tool_call>'
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
]


def test_a_tool_call_in_the_text_becomes_a_tool_call(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": f"Let me see. {CALL}"}], tools=TOOLS
    )
    [choice] = answer.choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "Let me see."
    [call] = choice.message.tool_calls or []
    assert call.type == "function" and call.function.name == "get_weather"
    assert json.loads(call.function.arguments) == {"city": "Graz"}


def test_a_tool_call_streams_its_arguments(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": CALL}], tools=TOOLS, stream=True
    )
    deltas = [
        call
        for chunk in stream
        for choice in chunk.choices
        for call in choice.delta.tool_calls or []
    ]
    assert deltas[0].id and deltas[0].function and deltas[0].function.name == "get_weather"
    assert {call.index for call in deltas} == {0}
    pieces = [call.function.arguments or "" for call in deltas if call.function]
    assert len([p for p in pieces if p]) > 1
    assert json.loads("".join(pieces)) == {"city": "Graz"}


def test_without_tools_the_same_text_is_text(client: openai.OpenAI) -> None:
    for extra in ({}, {"tools": TOOLS, "tool_choice": "none"}):
        answer = client.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": CALL}], **extra
        )
        assert answer.choices[0].message.content == CALL
        assert answer.choices[0].message.tool_calls is None


def test_a_conversation_with_tool_results_is_accepted(client: openai.OpenAI) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "get_weather", "arguments": "{}"}}
    answer = client.chat.completions.create(
        model=MODEL,
        tools=TOOLS,
        messages=[
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": "first"},
            {"role": "assistant", "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "c1", "content": "sunny"},
            {"role": "user", "content": "and now?"},
        ],
    )
    assert answer.choices[0].message.content == "and now?"


WRONG = {
    "temperature": ({"temperature": 3}, "temperature"),
    "an unknown field": ({"temprature": 1}, "temprature"),
    "an unknown role": ({"messages": [{"role": "x", "content": "a"}]}, "messages[0].role"),
    "no messages": ({"messages": []}, "messages"),
    "audio": ({"modalities": ["text", "audio"]}, "modalities"),
    "functions": ({"functions": [{"name": "f"}]}, "functions"),
    "too many stops": ({"stop": ["a"] * 17}, "stop"),
    "top_logprobs alone": ({"top_logprobs": 2}, "top_logprobs"),
    "too many top_logprobs": ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    "a bias of no token": ({"logit_bias": {"x": 1}}, "logit_bias"),
    "options of no stream": ({"stream_options": {"include_usage": True}}, "stream_options"),
    "a choice without tools": ({"tool_choice": "required"}, "tool_choice"),
    "a remote picture": (
        {"messages": with_image("http://example.com/a.png")},
        "messages[0].content[1].image_url.url",
    ),
    "a broken picture": (
        {"messages": with_image("data:image/png;base64,@@@")},
        "messages[0].content[1].image_url.url",
    ),
    "a file": (
        {
            "messages": [
                {"role": "user", "content": [{"type": "file", "file": {"file_id": "file-1"}}]}
            ]
        },
        "messages[0].content[0].file",
    ),
    "verbosity": ({"verbosity": "chatty"}, "verbosity"),
    "a seed past 64 bits": ({"seed": 1 << 63}, "seed"),
    "a seed past 64 bits below": ({"seed": -(1 << 63) - 1}, "seed"),
    "a tool that is no function": (
        {"tools": [{"type": "custom", "custom": {"name": "f"}}]},
        "tools[0].type",
    ),
    "tools that are not there": (
        {
            "tool_choice": {
                "type": "allowed_tools",
                "allowed_tools": {
                    "mode": "auto",
                    "tools": [{"type": "function", "function": {"name": "f"}}],
                },
            }
        },
        "tool_choice",
    ),
    "n": ({"n": 0}, "n"),
}


@pytest.mark.parametrize("case", WRONG)
def test_unsupported_parameters_are_refused_by_name(client: openai.OpenAI, case: str) -> None:
    change, param = WRONG[case]
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(
            **{"model": MODEL, "messages": HELLO}, extra_body=dict(change)
        )
    assert caught.value.param == param
    assert caught.value.code == "invalid_request"
    assert caught.value.type == "invalid_request_error"
    assert param.rpartition(".")[2].partition("[")[0] in caught.value.message


def test_labels_are_accepted_without_effect(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL,
        messages=HELLO,
        metadata={"a": "b"},
        store=True,
        user="me",
        prompt_cache_key="x",
        safety_identifier="y",
    )
    assert answer.choices[0].message.content == "hello there"


def test_an_unknown_model_is_a_404_with_openais_code_and_that_of_the_bus_in_the_details(
    client: openai.OpenAI,
) -> None:
    for stream in (False, True):
        with pytest.raises(openai.NotFoundError) as caught:
            client.chat.completions.create(model="nope", messages=HELLO, stream=stream)
        assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
        assert caught.value.body["details"]["code"] == "model_unavailable"
        assert "nope" in caught.value.message


def test_an_error_before_the_first_token_has_its_status(client: openai.OpenAI) -> None:
    failing = [{"role": "user", "content": "[[echo oom_at=0]] x"}]
    with pytest.raises(openai.APIStatusError) as caught:
        client.chat.completions.create(model=MODEL, messages=failing, stream=True)
    assert caught.value.status_code == 507
    assert caught.value.response.headers["x-should-retry"] == "false"


def test_an_error_within_a_stream_is_raised_where_it_happens(client: openai.OpenAI) -> None:
    failing = [{"role": "user", "content": "[[echo error_at=2]]a longer text than that"}]
    text = ""
    with pytest.raises(openai.APIError) as caught:
        for chunk in client.chat.completions.create(model=MODEL, messages=failing, stream=True):
            text += chunk.choices[0].delta.content or ""
    assert text and caught.value.code == "engine_error"


SLOW = [{"role": "user", "content": "[[echo step_delay_ms=20]]again and again"}]


def test_a_reader_that_leaves_frees_the_slot(gateway: GatewayProcess) -> None:
    with gateway.openai() as client:
        stream = client.chat.completions.create(
            model=MODEL, messages=SLOW, stream=True, extra_body={"ignore_eos": True}
        )
        next(iter(stream))
        assert gateway.bus.running() == 1
        stream.close()
    wait_until(lambda: gateway.bus.running() == 0, "a free slot")


def test_a_client_that_gives_up_waiting_frees_the_slot_too(gateway: GatewayProcess) -> None:
    body = {"model": MODEL, "messages": SLOW, "ignore_eos": True}
    with gateway.http() as client, pytest.raises(httpx.ReadTimeout):
        client.post("/v1/chat/completions", json=body, timeout=0.5)
    wait_until(lambda: gateway.bus.running() == 0, "a free slot")


def test_a_stream_that_waits_gets_comments(gateway: GatewayProcess) -> None:
    waiting = [{"role": "user", "content": "[[echo prefill_ms=2000]]late"}]
    body = {"model": MODEL, "messages": waiting, "stream": True}
    with gateway.http() as client:
        text = client.post("/v1/chat/completions", json=body).text
    assert text.startswith(": keep-alive\n")
    assert '"finish_reason":"stop"' in text


@pytest.mark.parametrize("path", ["chat/completions", "completions", "responses"])
def test_openais_client_ignores_a_pause_between_tokens(gateway: GatewayProcess, path: str) -> None:
    prompt = "[[echo step_delay_ms=1500]]ab"
    asked = {
        "chat/completions": {"messages": [{"role": "user", "content": prompt}]},
        "completions": {"prompt": prompt},
        "responses": {"input": prompt},
    }[path]
    body = {"model": MODEL, "stream": True, **asked}
    with gateway.http() as http:
        # Comments after events with ids.
        behind = http.post(f"/v1/{path}", json=body).text.partition("\ndata: ")[2]
        assert ": keep-alive\n" in behind
    with gateway.openai() as client:
        heard = [
            *client.post(f"/{path}", cast_to=object, body=body, stream=True, stream_cls=STREAM)
        ]
    assert len(heard) >= 2
