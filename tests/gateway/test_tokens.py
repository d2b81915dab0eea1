"""Tokens and prompts without an answer: vLLM's, llama.cpp's and OpenAI's shapes."""

from __future__ import annotations

from typing import Any

import httpx2 as httpx
import openai
import pytest

from tests.gateway.conftest import MODEL, GatewayProcess
from tests.gateway.test_chat import CALL, image
from worker.engines.echo.tokens import tokenize

SAID = [{"role": "user", "content": "hello there"}]
TEMPLATED = "user: hello there\n"


def ask(http: httpx.Client, path: str, **body: Any) -> Any:
    answer = http.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


@pytest.mark.parametrize("prefix", ["", "/v1"])
def test_the_tokens_of_a_text(http: httpx.Client, prefix: str) -> None:
    told = ask(http, f"{prefix}/tokenize", model=MODEL, prompt="hello dada")
    ids = tokenize("hello dada")
    assert told == {"count": 6, "max_model_len": 32768, "tokens": ids, "token_strs": None}
    named = ask(http, f"{prefix}/tokenize", model=MODEL, prompt="ab", return_token_strs=True)
    assert named["token_strs"] == ["a", "b"]
    back = ask(http, f"{prefix}/detokenize", model=MODEL, tokens=ids)
    assert back["prompt"] == "hello dada"
    assert ask(http, f"{prefix}/detokenize", tokens=[])["prompt"] == ""


def test_the_tokens_and_the_prompt_of_a_conversation(http: httpx.Client) -> None:
    told = ask(http, "/tokenize", messages=SAID)
    assert told["tokens"] == tokenize(TEMPLATED) and told["count"] == len(told["tokens"])
    assert ask(http, "/apply-template", model=MODEL, messages=SAID) == {"prompt": TEMPLATED}
    chat = ask(http, "/v1/chat/completions", model=MODEL, messages=SAID)
    assert chat["usage"]["prompt_tokens"] == told["count"]
    shown = {"type": "image_url", "image_url": {"url": image()}}
    with_image = [{"role": "user", "content": [shown, {"type": "text", "text": "hello there"}]}]
    assert ask(http, "/tokenize", messages=with_image)["tokens"] == told["tokens"]


def test_llamacpps_shape(http: httpx.Client) -> None:
    told = ask(http, "/tokenize", content="ab", add_special=True)
    assert told == {"tokens": tokenize("ab")}
    pieces = ask(http, "/tokenize", content="ab", with_pieces=True)["tokens"]
    assert pieces == [{"id": 97, "piece": "a"}, {"id": 98, "piece": "b"}]
    assert ask(http, "/detokenize", tokens=[97, 98])["content"] == "ab"


@pytest.mark.parametrize("prefix", ["", "/v1"])
def test_the_tokens_of_a_chat(http: httpx.Client, prefix: str) -> None:
    path = f"{prefix}/chat/completions/input_tokens"
    told = ask(http, path, messages=SAID, temperature=0, max_tokens=5, tools=[])
    assert told == {"input_tokens": len(tokenize(TEMPLATED))}
    refused = http.post(path, json={"messages": SAID, "unknown": 1})
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "unknown"


def test_the_tokens_of_a_responses_input(client: openai.OpenAI) -> None:
    count = client.responses.input_tokens.count
    assert count(model=MODEL, input="hello there").input_tokens == len(tokenize(TEMPLATED))
    tool: Any = {"type": "function", "name": "get_weather", "parameters": {"type": "object"}}
    kept = client.responses.create(model=MODEL, input=CALL, instructions="Be.", tools=[tool])
    asked = count(model=MODEL, input=CALL, instructions="Be.", tools=[tool])
    assert asked.object == "response.input_tokens"
    assert asked.input_tokens == kept.usage.input_tokens
    again: Any = {"model": MODEL, "input": "thanks", "previous_response_id": kept.id}
    assert count(**again).input_tokens == client.responses.create(**again).usage.input_tokens


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "x", "messages": SAID}, "prompt"),
        ("/tokenize", {"prompt": 3}, "prompt"),
        ("/tokenize", {"content": "x", "parse_special": False}, "parse_special"),
        ("/tokenize", {"messages": SAID, "chat_template": "x"}, "chat_template"),
        (
            "/tokenize",
            {"messages": SAID, "add_generation_prompt": True, "continue_final_message": True},
            "continue_final_message",
        ),
        ("/detokenize", {"tokens": [-1]}, "tokens[0]"),
        ("/detokenize", {}, "tokens"),
        ("/apply-template", {"messages": []}, "messages"),
        ("/v1/responses/input_tokens", {"model": MODEL}, "input"),
        ("/v1/responses/input_tokens", {"model": MODEL, "input": [{"x": 1}]}, "input[0]"),
    ],
)
def test_a_body_that_is_wrong_is_refused_by_name(
    http: httpx.Client, path: str, body: dict[str, Any], param: str
) -> None:
    answer = http.post(path, json=body)
    assert answer.status_code == 400 and answer.json()["error"]["param"].startswith(param)


def test_a_tokenizer_that_does_not_tell_is_named(http: httpx.Client) -> None:
    for query, param in (("", "model"), (f"?model={MODEL}", "model"), ("?name=x", "name")):
        answer = http.get(f"/tokenizer_info{query}")
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
    assert http.get("/v1/tokenizer_info?model=nope").status_code == 404


def test_an_unknown_model_is_not_found(http: httpx.Client) -> None:
    for path, body in (("/tokenize", {"prompt": "x"}), ("/detokenize", {"tokens": [1]})):
        answer = http.post(path, json={"model": "nope", **body})
        assert answer.status_code == 404
        assert answer.json()["error"]["code"] == "model_not_found"


def test_a_request_is_accounted_for(gateway: GatewayProcess, http: httpx.Client) -> None:
    """With its model, and no tokens: none was read by a model."""
    answer = http.post("/tokenize", json={"model": MODEL, "prompt": "abc"})
    line = gateway.logged(answer.headers["x-request-id"], status=200, path="/tokenize")
    assert (line["prompt"], line["model"]) == (0, MODEL)
