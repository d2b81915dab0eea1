"""What an answer must conform to, in each server's words, and what vLLM adds to an answer."""

from __future__ import annotations

import json
from typing import Any

import httpx2 as httpx
import openai
import pytest

from client.gateway import requests
from client.gateway.convert import completion_calls
from client.gateway.errors import GatewayError
from client.gateway.structured import constraint_of
from tests.gateway.conftest import MODEL

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
GBNF = 'root ::= "yes" | "no"'
ASK = {"role": "user", "content": "x"}


def chat(**fields: Any) -> requests.ChatRequest:
    data = json.dumps({"model": MODEL, "messages": [ASK], **fields}).encode()
    return requests.parse(requests.ChatRequest, data)


@pytest.mark.parametrize(
    ("field", "value", "kind", "wanted"),
    [
        ("regex", "a+", "regex", "a+"),
        ("ebnf", GBNF, "grammar", GBNF),
        ("grammar", GBNF, "grammar", GBNF),
        ("json_schema", SCHEMA, "json_schema", SCHEMA),
        ("json_schema", json.dumps(SCHEMA), "json_schema", SCHEMA),
        ("guided_json", SCHEMA, "json_schema", SCHEMA),
        ("guided_json", json.dumps(SCHEMA), "json_schema", SCHEMA),
        ("guided_regex", "a+", "regex", "a+"),
        ("guided_choice", ["a", "b"], "choice", ["a", "b"]),
        ("guided_grammar", GBNF, "grammar", GBNF),
        ("structured_outputs", {"regex": "a+"}, "regex", "a+"),
    ],
)
def test_each_servers_words_are_one_constraint(
    field: str, value: Any, kind: str, wanted: Any
) -> None:
    body = chat(**{field: value}, guided_decoding_backend="outlines")
    made = constraint_of(None, body)
    assert made is not None and (made.type, made.value) == (kind, wanted)
    data = json.dumps({"model": MODEL, "prompt": "x", field: value}).encode()
    [call] = completion_calls(requests.parse(requests.CompletionRequest, data), seed=0, user="")
    assert call.request.params.constraint == made


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"regex": "a", "grammar": GBNF}, "grammar"),
        ({"structured_outputs": {"regex": "a"}, "guided_regex": "b"}, "guided_regex"),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs"),
        ({"guided_json": "{"}, "guided_json"),
        ({"json_schema": "[]"}, "json_schema"),
    ],
)
def test_two_wishes_or_no_schema_are_refused(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(GatewayError) as caught:
        constraint_of(None, chat(**fields))
    assert caught.value.param == param


def test_what_is_empty_asks_for_nothing() -> None:
    assert constraint_of(None, chat(regex="", guided_json=None, ebnf="", json_schema={})) is None


@pytest.mark.parametrize("stream", [False, True])
def test_echo_repeats_the_message_that_the_answer_goes_on_with(
    client: openai.OpenAI, stream: bool
) -> None:
    messages: list[Any] = [ASK, {"role": "assistant", "content": "It begins"}]
    goes_on = {"continue_final_message": True, "add_generation_prompt": False}

    def answer(asked: list[Any], **extra: Any) -> str:
        made: Any = client.chat.completions.create(
            model=MODEL, messages=asked, stream=stream, seed=1, extra_body=extra
        )
        if not stream:
            return str(made.choices[0].message.content)
        return "".join(chunk.choices[0].delta.content or "" for chunk in made if chunk.choices)

    plain = answer(messages, **goes_on)
    assert answer(messages, **goes_on, echo=True) == f"It begins{plain}"
    assert answer(messages, **goes_on, echo=False) == plain
    assert answer([ASK], echo=True) == "x"


def test_prompt_logprobs_have_vllms_shape(http: httpx.Client, client: openai.OpenAI) -> None:
    ids = http.post("/tokenize", json={"model": MODEL, "prompt": "abc"}).json()["tokens"]
    body = {"model": MODEL, "max_tokens": 1}
    for path, asked in (
        ("/v1/completions", {"prompt": "abc"}),
        ("/v1/completions", {"prompt": "abc", "echo": True, "logprobs": 1}),
        ("/v1/chat/completions", {"messages": [ASK]}),
    ):
        answer = http.post(path, json={**body, **asked, "prompt_logprobs": 2}).json()
        told = (answer if "chat" in path else answer["choices"][0])["prompt_logprobs"]
        assert told[0] is None and len(told) == answer["usage"]["prompt_tokens"]
        for entries in told[1:]:
            (_, own), *others = entries.items()
            assert own["logprob"] <= 0 and len(entries) in (2, 3)
            assert {other["rank"] for _, other in others} <= {1, 2}
        if "chat" not in path:
            assert [next(iter(entries)) for entries in told[1:]] == [str(i) for i in ids[1:]]
            assert "".join(next(iter(e.values()))["decoded_token"] for e in told[1:]) == "bc"
    told = answer["prompt_logprobs"]
    shown = client.completions.create(
        model=MODEL, prompt="abc", echo=True, logprobs=1, max_tokens=1
    )
    assert shown.choices[0].logprobs is not None
    assert not hasattr(shown.choices[0], "prompt_logprobs")
    streamed = http.post(
        "/v1/completions", json={**body, "prompt": "a", "stream": True, "prompt_logprobs": 1}
    )
    assert streamed.json()["error"]["param"] == "prompt_logprobs"
    assert (
        "prompt_logprobs" not in http.post("/v1/completions", json={**body, "prompt": "a"}).json()
    )


# --- fields that are known and not served ---------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("use_beam_search", False),
        ("length_penalty", 1.0),
        ("documents", []),
        ("mm_processor_kwargs", {}),
        ("vllm_xargs", {}),
        ("bad_words", []),
        ("logits_processors", []),
        ("add_special_tokens", True),
        ("spaces_between_special_tokens", True),
        ("request_id", "mine"),
        ("truncate_prompt_tokens", -1),
    ],
)
def test_what_other_servers_clients_send_by_default_is_taken(
    http: httpx.Client, field: str, value: Any
) -> None:
    for path, asked in (
        ("/v1/chat/completions", {"messages": [ASK]}),
        ("/v1/completions", {"prompt": "x"}),
    ):
        answer = http.post(path, json={"model": MODEL, **asked, field: value})
        assert answer.status_code == 200, answer.text


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("use_beam_search", True, "beam search"),
        ("documents", [{"text": "a"}], "chat_template_kwargs"),
        ("bad_words", ["a"], "logit_bias"),
        ("cache_salt", "s", "prefixes"),
        ("lora_path", "a", "model"),
        ("chat_template", "x", "own"),
        ("truncate_prompt_tokens", 5, "-1"),
    ],
)
def test_what_would_change_the_answer_is_refused_with_its_reason(
    http: httpx.Client, field: str, value: Any, words: str
) -> None:
    body = {"model": MODEL, "messages": [ASK], field: value}
    error = http.post("/v1/chat/completions", json=body).json()["error"]
    assert error["param"] == field and words in error["message"], error


def test_truncation_goes_to_the_worker() -> None:
    data = json.dumps({"model": MODEL, "prompt": "x", "truncate_prompt_tokens": -1}).encode()
    [call] = completion_calls(requests.parse(requests.CompletionRequest, data), seed=0, user="")
    assert call.request.params.overflow == "truncate_left"
