"""`/v1/chat/completions/batch`: several conversations in one request, as vLLM has it."""

from __future__ import annotations

import json
from typing import Any

import httpx2 as httpx
import pytest

from tests.gateway.conftest import MODEL, GatewayProcess
from tests.gateway.test_chat import CALL
from worker.engines.echo.tokens import tokenize

PATH = "/v1/chat/completions/batch"


def said(*texts: str) -> list[list[dict[str, Any]]]:
    return [[{"role": "user", "content": text}] for text in texts]


def ask(http: httpx.Client, **body: Any) -> Any:
    answer = http.post(PATH, json={"model": MODEL, **body})
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_every_conversation_is_answered_in_its_place(http: httpx.Client) -> None:
    told = ask(http, messages=said("one", "two two", "three"))
    assert told["object"] == "chat.completion" and told["id"].startswith("chatcmpl-")
    assert [c["message"]["content"] for c in told["choices"]] == ["one", "two two", "three"]
    assert [c["index"] for c in told["choices"]] == [0, 1, 2]
    alone = [
        http.post("/v1/chat/completions", json={"messages": one}).json()["usage"]
        for one in said("one", "two two", "three")
    ]
    for name in ("prompt_tokens", "completion_tokens", "total_tokens"):
        assert told["usage"][name] == sum(usage[name] for usage in alone)


def test_each_has_its_n_answers_with_the_seeds_that_it_would_have_alone(
    http: httpx.Client,
) -> None:
    drawn = said(*("[[echo mode=sampled answer_tokens=8]]" + text for text in "xy"))
    told = ask(http, messages=drawn, n=2, seed=5)
    assert [c["index"] for c in told["choices"]] == [0, 1, 2, 3]
    for place, one in enumerate(drawn):
        body = {"messages": one, "n": 2, "seed": 5}
        alone = http.post("/v1/chat/completions", json=body).json()
        mine = told["choices"][2 * place : 2 * place + 2]
        assert [c["message"] for c in mine] == [c["message"] for c in alone["choices"]]
    counted = http.post(
        "/v1/chat/completions", json={"messages": drawn[0], "n": 2, "seed": 5}
    ).json()["usage"]
    assert told["usage"]["prompt_tokens"] == 2 * counted["prompt_tokens"]


def test_fields_of_a_chat_are_honoured(http: httpx.Client) -> None:
    told = ask(http, messages=said("ab", "cd"), logprobs=True, return_token_ids=True)
    for choice, text in zip(told["choices"], ("ab", "cd"), strict=True):
        assert [one["token"] for one in choice["logprobs"]["content"]] == list(text)
        assert choice["prompt_token_ids"] == tokenize(f"user: {text}\n")
    assert "prompt_token_ids" not in told
    tool = {"type": "function", "function": {"name": "get_weather"}}
    [choice] = ask(http, messages=said(CALL), tools=[tool])["choices"]
    assert choice["finish_reason"] == "tool_calls"
    assert json.loads(choice["message"]["tool_calls"][0]["function"]["arguments"])


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"stream": True}, "stream"),
        ({"store": True}, "store"),
        ({"messages": []}, "messages"),
        ({"messages": [[]]}, "messages[0]"),
        ({"messages": said("x")[0]}, "messages[0]"),
        (
            {"messages": [*said("x"), [{"role": "tool", "content": "y"}]]},
            "messages[1][0].tool_call_id",
        ),
        ({"unknown": 1}, "unknown"),
        ({"top_logprobs": 2}, "top_logprobs"),
    ],
)
def test_what_is_wrong_is_named(http: httpx.Client, change: dict[str, Any], param: str) -> None:
    answer = http.post(PATH, json={"messages": said("x"), **change})
    assert answer.status_code == 400 and answer.json()["error"]["param"] == param


def test_one_that_fails_fails_the_request_and_ends_the_others(
    http: httpx.Client, gateway: GatewayProcess
) -> None:
    slow = "[[echo step_delay_ms=50 mode=sampled answer_tokens=4000]]x"
    answer = http.post(PATH, json={"messages": said(slow, "[[echo oom_at=0]]x")})
    assert answer.status_code >= 500 and answer.json()["error"]["code"] == "out_of_memory"
    gateway.bus.wait_idle()
