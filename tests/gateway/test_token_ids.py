"""Tokens in, tokens out: `return_token_ids` and `return_tokens_as_token_ids` of chat and
completions, in the places where vLLM has them."""

from __future__ import annotations

import json
from typing import Any

import httpx2 as httpx
import openai
import pytest

from broker.protocol.messages import TEXT_IDS
from client.gateway.errors import GatewayError
from client.gateway.openai.generation import Delta, check_token_ids
from tests.gateway.conftest import MODEL
from tests.gateway.test_chat import CALL
from worker.engines.echo.tokens import detokenize, tokenize

TEXT = "hello dadana there"
SAID = [{"role": "user", "content": TEXT}]
PROMPT = tokenize(f"user: {TEXT}\n")
IDS = {"return_token_ids": True}


def test_a_chat_tells_the_ids_of_prompt_and_answer(client: openai.OpenAI) -> None:
    answer: Any = client.chat.completions.create(model=MODEL, messages=SAID, extra_body=IDS, n=2)
    assert answer.prompt_token_ids == PROMPT
    assert [choice.token_ids for choice in answer.choices] == [tokenize(TEXT)] * 2
    plain = client.chat.completions.create(model=MODEL, messages=SAID)
    assert "token_ids" not in plain.model_dump_json()


@pytest.mark.parametrize("options", [{}, {"logprobs": True}])
def test_a_stream_of_a_chat_tells_them_once(client: openai.OpenAI, options: Any) -> None:
    stream: Any = client.chat.completions.create(
        model=MODEL, messages=SAID, extra_body=IDS, stream=True, **options
    )
    first, *others = chunks = list(stream)
    assert first.prompt_token_ids == PROMPT
    assert not any(hasattr(chunk, "prompt_token_ids") for chunk in others)
    ids = [id_ for chunk in chunks for id_ in getattr(chunk.choices[0], "token_ids", None) or ()]
    assert ids == tokenize(TEXT)


def test_calls_and_thoughts_have_their_ids_too(client: openai.OpenAI) -> None:
    text = f"<think>hm</think>{CALL}"
    tool: Any = {"type": "function", "function": {"name": "get_weather"}}
    ask: dict[str, Any] = {
        "model": MODEL,
        "messages": [{"role": "user", "content": text}],
        "tools": [tool],
        "extra_body": IDS,
    }
    whole: Any = client.chat.completions.create(**ask)
    assert whole.choices[0].message.tool_calls and whole.choices[0].token_ids == tokenize(text)
    chunks: list[Any] = list(client.chat.completions.create(stream=True, **ask))
    told = [chunk.choices[0] for chunk in chunks if chunk.choices]
    ids = [id_ for one in told for id_ in getattr(one, "token_ids", None) or ()]
    assert ids == tokenize(text)


def test_a_completion_takes_ids_and_tells_them(client: openai.OpenAI) -> None:
    prompts = [tokenize(" dada dadi"), tokenize("xyz")]
    answer: Any = client.completions.create(model=MODEL, prompt=prompts, extra_body=IDS)
    assert [choice.prompt_token_ids for choice in answer.choices] == prompts
    assert [choice.token_ids for choice in answer.choices] == prompts
    assert [detokenize(choice.token_ids) for choice in answer.choices] == [
        choice.text for choice in answer.choices
    ]
    stream: Any = client.completions.create(
        model=MODEL, prompt=prompts, extra_body=IDS, stream=True
    )
    told: dict[int, Any] = {0: [], 1: []}
    for chunk in stream:
        for choice in chunk.choices:
            told[choice.index].append(choice)
    for index, choices in told.items():
        assert choices[0].prompt_token_ids == prompts[index]
        assert not any(hasattr(choice, "prompt_token_ids") for choice in choices[1:])
        assert [id_ for choice in choices for id_ in choice.token_ids] == prompts[index]


def test_an_echo_keeps_the_ids_of_prompt_and_answer_apart(client: openai.OpenAI) -> None:
    more = {"extra_body": {**IDS, "return_tokens_as_token_ids": True}, "logprobs": 1, "echo": True}
    answer: Any = client.completions.create(model=MODEL, prompt="abc", **more)
    [choice] = answer.choices
    assert choice.text == "abcabc"
    assert choice.prompt_token_ids == choice.token_ids == tokenize("abc")
    named = [f"token_id:{id_}" for id_ in tokenize("abcabc")]
    assert choice.logprobs.tokens == named
    assert choice.logprobs.text_offset == [0, 1, 2, 3, 4, 5]
    nothing: Any = client.completions.create(
        model=MODEL, prompt="abc", echo=True, max_tokens=0, extra_body=IDS
    )
    assert nothing.choices[0].text == "abc" and nothing.choices[0].token_ids == []


def test_tokens_of_log_probabilities_are_named_by_their_ids(client: openai.OpenAI) -> None:
    ask: dict[str, Any] = {"model": MODEL, "messages": SAID, "logprobs": True, "top_logprobs": 2}
    ask["extra_body"] = {"return_tokens_as_token_ids": True}
    named = [f"token_id:{id_}" for id_ in tokenize(TEXT)]
    whole = client.chat.completions.create(**ask).choices[0].logprobs
    assert whole is not None and [token.token for token in whole.content or ()] == named
    assert all(t.token.startswith("token_id:") for one in whole.content for t in one.top_logprobs)
    told = [
        token.token
        for chunk in client.chat.completions.create(stream=True, **ask)
        for token in (chunk.choices[0].logprobs.content if chunk.choices[0].logprobs else ())
    ]
    assert told == named


def test_ids_that_carry_text_are_not_reported_as_token_ids() -> None:
    with pytest.raises(GatewayError) as caught:
        check_token_ids(Delta(0, "x", 1, None, token_ids=[TEXT_IDS]))
    assert caught.value.param == "return_token_ids"
    check_token_ids(Delta(0, "x", 1, None, token_ids=[TEXT_IDS - 1]))


@pytest.mark.parametrize("logprobs", [False, True])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_reading_on_repeats_no_id(http: httpx.Client, path: str, logprobs: bool) -> None:
    text = "[[echo mode=sampled answer_tokens=12]]x"
    body: dict[str, Any] = {"model": MODEL, "stream": True, "seed": 3, **IDS}
    if "chat" in path:
        body |= {"messages": [{"role": "user", "content": text}], "logprobs": logprobs}
    else:
        body |= {"prompt": text} | ({"logprobs": 1} if logprobs else {})

    def read(**headers: str) -> list[tuple[str, dict[str, Any]]]:
        found, id_ = [], ""
        for line in http.post(path, json=body, headers=headers).text.splitlines():
            name, _, value = line.partition(": ")
            if name == "id":
                id_ = value
            elif name == "data" and value != "[DONE]":
                found.append((id_, json.loads(value)))
        return found

    def ids(chunks: list[tuple[str, dict[str, Any]]]) -> list[int]:
        told = [one.get("token_ids") or [] for _, chunk in chunks for one in chunk["choices"]]
        return [id_ for some in told for id_ in some]

    def prompts(chunks: list[tuple[str, dict[str, Any]]]) -> int:
        return json.dumps(chunks).count("prompt_token_ids")

    whole = read()
    assert len(ids(whole)) == 12 and prompts(whole) == 1
    for cut in range(1, len(whole)):
        rest = read(**{"last-event-id": whole[cut - 1][0]})
        assert ids(whole[:cut]) + ids(rest) == ids(whole), cut
        assert prompts(rest) == 0
