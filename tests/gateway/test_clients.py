"""What clients of OpenAI's API send beyond the plain case: values that ask for nothing are
accepted, and other spellings of a request work."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2 as httpx
import openai
import pytest

from client.gateway import requests
from client.gateway.convert import chat_call
from client.gateway.errors import GatewayError, error_headers
from client.gateway.images import ImagePolicy
from client.gateway.openai import responses_body
from tests.gateway.conftest import MODEL, GatewayProcess
from tests.gateway.test_chat import CALL, image
from tests.harness import Bus, running_bus

HELLO = [{"role": "user", "content": "hello there"}]
HINT = {"cache_control": {"type": "ephemeral"}, "prompt_cache_breakpoint": {"mode": "explicit"}}
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}


def function(name: str = "get_weather") -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": SCHEMA}}


def named(name: str = "get_weather") -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


def chat(http: httpx.Client, **fields: object) -> dict[str, Any]:
    answer = http.post("/v1/chat/completions", json={"model": MODEL, "messages": HELLO, **fields})
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]


@pytest.mark.parametrize("empty", [None, {}, []])
def test_unknown_fields_that_are_empty_are_accepted(http: httpx.Client, empty: object) -> None:
    body = {"messages": [{**HELLO[0], "kwargs": empty}], "kwargs": empty}
    [choice] = http.post("/v1/chat/completions", json=body).json()["choices"]
    assert choice["message"]["content"] == "hello there"
    for asking in (0, False, "", {"a": 1}, [0]):
        refused = http.post("/v1/chat/completions", json={"messages": HELLO, "kwargs": asking})
        assert refused.status_code == 400 and refused.json()["error"]["param"] == "kwargs"


def test_a_completion_takes_both_names_of_its_longest_answer(http: httpx.Client) -> None:
    for words in ({"max_tokens": 16}, {}):
        body = {"prompt": "hello there", "max_completion_tokens": 5, **words}
        [choice] = http.post("/v1/completions", json=body).json()["choices"]
        assert (choice["text"], choice["finish_reason"]) == ("hello", "length")


def test_errors_have_the_words_that_programs_look_for(
    client: openai.OpenAI, http: httpx.Client
) -> None:
    """As OpenAI and servers like it say them."""
    with pytest.raises(openai.NotFoundError, match=r"The model 'nope' does not exist"):
        client.chat.completions.create(model="nope", messages=HELLO)
    with pytest.raises(openai.NotFoundError, match=r"The model 'nope' does not exist"):
        client.models.retrieve("nope")
    done = client.responses.create(model=MODEL, input="x")
    with pytest.raises(openai.BadRequestError, match="Cannot cancel a synchronous response"):
        client.responses.cancel(done.id)
    with pytest.raises(openai.NotFoundError, match=r"Response with id 'resp_\w+' not found"):
        client.responses.retrieve(client.responses.create(input="x", store=False, model=MODEL).id)
    with pytest.raises(
        openai.BadRequestError, match="background can only be used when `store` is true"
    ):
        client.responses.create(model=MODEL, input="x", background=True, store=False)
    bias = {"one": 1, "7": 1, "two": 2}
    with pytest.raises(openai.BadRequestError, match="'one', 'two', which are not token ids"):
        client.chat.completions.create(model=MODEL, messages=HELLO, logit_bias=bias)


NOTHING = {
    "no tools, as strands": {"tools": []},
    "a free choice of no tools": {"tools": [], "tool_choice": "auto"},
    "no choice of no tools": {"tool_choice": "none"},
    "no top_logprobs": {"top_logprobs": 0},
    "no functions of the older form": {"functions": [], "function_call": None},
    "no call of the older form": {"function_call": "none"},
    "no options of a stream": {"stream": False, "stream_options": {"include_usage": False}},
    "no modalities": {"modalities": []},
    "no structure": {"structured_outputs": {}},
    "one limit twice": {"max_tokens": 40, "max_completion_tokens": 40},
    "two limits": {"max_tokens": 4, "max_completion_tokens": 40},
    "a field of another server": {"guided_json": None, "thinking": None},
    "what answers are made faster by": {"prediction": {"type": "content", "content": "hello"}},
    "the common tier": {"service_tier": "scale"},
    "hints for a cache": {
        "messages": [
            {"role": "system", "content": [{"type": "text", "text": "Be.", **HINT}]},
            {
                "role": "user",
                "content": [{"type": "text", "text": "hello there", **HINT}],
                "cache_control": HINT["cache_control"],
            },
        ],
        "tools": [{**function(), "cache_control": HINT["cache_control"]}],
    },
}


@pytest.mark.parametrize("case", NOTHING)
def test_values_that_ask_for_nothing_are_accepted(http: httpx.Client, case: str) -> None:
    choice = chat(http, **NOTHING[case])
    assert choice["message"]["content"] == "hello there"
    assert "tool_calls" not in choice["message"] and choice["logprobs"] is None


@pytest.mark.parametrize("detail", ["auto", "high", "low", "original"])
def test_a_hint_on_an_image_does_not_hide_it(http: httpx.Client, detail: str) -> None:
    shown = {"type": "image_url", "image_url": {"url": image(), "detail": detail}, **HINT}
    said = [{"role": "user", "content": [shown, {"type": "text", "text": "what"}]}]
    assert chat(http, messages=said)["message"]["content"].startswith("1 image: 64x48")


NAMELESS: list[tuple[str, dict[str, Any]]] = [
    ("/v1/chat/completions", {"messages": HELLO}),
    ("/v1/completions", {"prompt": "hello"}),
    ("/v1/embeddings", {"input": "hello"}),
    ("/v1/responses", {"input": "hello"}),
    ("/v1/messages", {"messages": HELLO, "max_tokens": 9}),
    ("/v1/messages/count_tokens", {"messages": HELLO}),
]


@pytest.mark.parametrize(("path", "body"), NAMELESS)
def test_the_only_model_needs_no_name(http: httpx.Client, path: str, body: dict[str, Any]) -> None:
    answer = http.post(path, json=body)
    assert answer.status_code == 200, answer.text
    assert answer.json().get("model", MODEL) == MODEL


def test_a_choice_of_models_needs_a_name(
    make_bus: Callable[..., Bus], make_gateway: Callable[..., GatewayProcess]
) -> None:
    own = make_bus(workers=0)
    own.start_worker("a", "--model-name", "one")
    own.start_worker("b", "--model-name", "two")
    own.wait_ready(2)
    with make_gateway(bus=own).http() as http:
        answer = http.post("/v1/chat/completions", json={"messages": HELLO})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, "model")
    assert error["message"] == "`model` is required: name one of one, two."


BARE = [pair for pair in NAMELESS if "messages" not in pair[0]]


@pytest.mark.parametrize(("path", "body"), BARE)
def test_paths_are_found_without_their_prefix(
    http: httpx.Client, path: str, body: dict[str, Any]
) -> None:
    assert http.post(path.removeprefix("/v1"), json=body).status_code == 200
    assert http.get("/models").json() == http.get("/v1/models").json()


def test_an_answer_says_what_made_it(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model=MODEL, messages=HELLO)
    stream = client.chat.completions.create(model=MODEL, messages=HELLO, stream=True)
    text = client.completions.create(model=MODEL, prompt="x")
    found = {one.system_fingerprint for one in (whole, text, *stream)}
    assert len(found) == 1 and next(iter(found)).startswith("tokenbus-")


def test_the_last_message_is_continued_where_vllms_fields_say_so() -> None:
    said = [*HELLO, {"role": "assistant", "content": "So"}]
    fields = {"continue_final_message": True, "add_generation_prompt": False}
    body = {"model": "m", "messages": said, **fields}
    parsed = requests.parse(requests.ChatRequest, json.dumps(body).encode())
    call = asyncio.run(chat_call(parsed, ImagePolicy(), seed=1, user="u"))
    assert call.request.template_args == fields


def test_an_object_may_have_a_schema() -> None:
    """llama.cpp's form of structured output."""
    wanted = {"type": "json_object", "schema": SCHEMA}
    body = {"model": "m", "messages": HELLO, "response_format": wanted}
    parsed = requests.parse(requests.ChatRequest, json.dumps(body).encode())
    call = asyncio.run(chat_call(parsed, ImagePolicy(), seed=1, user="u"))
    constraint = call.request.params.constraint
    assert constraint is not None and (constraint.type, constraint.value) == ("json_schema", SCHEMA)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_continuous_usage_without_include_usage_has_no_effect(
    http: httpx.Client, path: str
) -> None:
    said = {"messages": HELLO} if "chat" in path else {"prompt": "hello"}
    options = {"continuous_usage_stats": True}
    body = {"model": MODEL, "stream": True, "stream_options": options, **said}
    answer = http.post(path, json=body)
    assert answer.status_code == 200 and answer.text.endswith("data: [DONE]\n\n")
    assert '"usage"' not in answer.text


def test_a_forced_tool_wins_over_a_format_for_text(http: httpx.Client) -> None:
    """The package instructor sends the schema twice, as a tool and as a format."""
    for forced in (named(), "required"):
        choice = chat(
            http,
            messages=[{"role": "user", "content": CALL}],
            tools=[function()],
            tool_choice=forced,
            response_format={
                "type": "json_schema",
                "json_schema": {"name": "other", "schema": {"type": "array"}},
            },
        )
        [call] = choice["message"]["tool_calls"]
        assert json.loads(call["function"]["arguments"]) == {"city": "Graz"}
    answer = http.post(
        "/v1/responses",
        json={
            "model": MODEL,
            "input": CALL,
            "tools": [{"type": "function", "name": "get_weather", "parameters": SCHEMA}],
            "tool_choice": {"type": "function", "name": "get_weather"},
            "text": {"format": {"type": "json_schema", "name": "n", "schema": {"type": "array"}}},
        },
    )
    assert [item["type"] for item in answer.json()["output"]] == ["function_call"]


def test_only_allowed_tools_are_called(http: httpx.Client) -> None:
    def choice(mode: str, *names: str) -> dict[str, Any]:
        allowed = {"mode": mode, "tools": [named(name) for name in names]}
        return chat(
            http,
            messages=[{"role": "user", "content": CALL}],
            tools=[function(), function("other")],
            tool_choice={"type": "allowed_tools", "allowed_tools": allowed},
        )

    for mode in ("auto", "required"):
        [call] = choice(mode, "get_weather")["message"]["tool_calls"]
        assert call["function"]["name"] == "get_weather"
    assert choice("auto", "other")["message"]["content"] == CALL


def test_an_sdks_own_objects_are_accepted(client: openai.OpenAI) -> None:
    """A parsed answer contains the parsed value; agents append it to the history unchanged."""
    answer = client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": CALL}], tools=[function()]
    )
    message = answer.choices[0].message.model_dump()
    message["parsed"] = {"city": "Graz"}
    message["tool_calls"][0]["function"]["parsed_arguments"] = {"city": "Graz"}
    result = {"role": "tool", "tool_call_id": message["tool_calls"][0]["id"], "content": "sunny"}
    thanks = {"role": "user", "content": "thanks"}
    again = client.chat.completions.create(model=MODEL, messages=[*HELLO, message, result, thanks])
    assert again.choices[0].message.content == "thanks"
    response = client.responses.create(model=MODEL, input=CALL, tools=[RESPONSE_TOOL])
    said = [item.model_dump() for item in response.output]
    said[0]["parsed_arguments"] = {"city": "Graz"}
    output = {"type": "function_call_output", "call_id": said[0]["call_id"], "output": "sunny"}
    third = client.responses.create(model=MODEL, input=[*said, output, thanks])
    assert third.output_text == "thanks"
    said = [item.model_dump() for item in third.output]
    assert client.responses.create(model=MODEL, input=[*said, thanks]).output_text == "thanks"


def test_verbosity_reaches_the_chat_template_as_the_effort_does() -> None:
    body = requests.ChatRequest(
        model="m",
        messages=[requests.ChatMessage(role="user", content="x")],
        verbosity="low",
        reasoning_effort="high",
    )
    call = asyncio.run(chat_call(body, ImagePolicy(), seed=0, user=""))
    assert call.request.template_args == {"verbosity": "low", "reasoning_effort": "high"}
    response = responses_body.ResponseRequest(
        model="m", input="x", text=responses_body.TextConfig(verbosity="high")
    )
    assert responses_body.as_chat(response, []).verbosity == "high"


RESPONSE_TOOL = {"type": "function", "name": "get_weather", "parameters": SCHEMA, "strict": True}


def test_an_item_may_be_named_where_it_is_kept(client: openai.OpenAI) -> None:
    """`@ai-sdk/openai` refers to the server's items by id instead of sending them."""
    first = client.responses.create(model=MODEL, input="one")
    called = client.responses.create(model=MODEL, input=CALL, tools=[RESPONSE_TOOL])

    def ask(*items: object) -> openai.types.responses.Response:
        return client.responses.create(
            model=MODEL, input=[*items, {"role": "user", "content": "two"}]
        )

    message, call = first.output[0], called.output[0]
    output = {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}
    written = ask(message.model_dump(), call.model_dump(), output)
    for reference in (
        lambda item: {"type": "item_reference", "id": item.id},
        lambda item: {"id": item.id},
        lambda item: {"id": item.id, "type": None},
    ):
        by_name = ask(reference(message), reference(call), output)
        assert by_name.output_text == "two"
        assert by_name.usage.input_tokens == written.usage.input_tokens
    with pytest.raises(openai.NotFoundError) as caught:
        ask({"type": "item_reference", "id": "msg_none"})
    assert caught.value.param == "input" and "msg_none" in caught.value.message


def test_an_item_of_another_key_or_not_stored_is_not_found(
    client: openai.OpenAI, make_gateway: Callable[..., GatewayProcess]
) -> None:
    unstored = client.responses.create(model=MODEL, input="one", store=False)
    with pytest.raises(openai.NotFoundError):
        client.responses.create(
            model=MODEL, input=[{"type": "item_reference", "id": unstored.output[0].id}]
        )


def test_an_item_at_another_gateway_is_asked_for_there(
    gateway: GatewayProcess, make_gateway: Callable[..., GatewayProcess]
) -> None:
    with gateway.openai() as there:
        kept = there.responses.create(model=MODEL, input="one")
    with make_gateway("--peers", gateway.url).openai() as here:
        said = [{"type": "item_reference", "id": kept.output[0].id}, *HELLO]
        assert here.responses.create(model=MODEL, input=said).output_text == "hello there"
        follow = here.responses.create(model=MODEL, input="x", previous_response_id=kept.id)
        assert follow.output_text == "x"


def test_tools_that_run_at_openai_are_left_out_beside_functions(http: httpx.Client) -> None:
    """Agents send them to every server; the answer lists the tools that there were."""
    body = {"model": MODEL, "input": CALL, "tools": [{"type": "web_search"}, RESPONSE_TOOL]}
    answer = http.post("/v1/responses", json=body).json()
    assert [item["type"] for item in answer["output"]] == ["function_call"]
    assert [tool["type"] for tool in answer["tools"]] == ["function"]


def test_what_agents_send_to_responses_is_accepted(client: openai.OpenAI) -> None:
    response = client.responses.create(
        model=MODEL,
        input="hello",
        include=["reasoning.encrypted_content", "web_search_call.action.sources"],
        reasoning={"effort": "medium", "summary": "auto", "context": "auto"},
        text={"verbosity": "low"},
        top_logprobs=0,
        tools=[],
        tool_choice="auto",
        max_tool_calls=3,
        extra_body={"client_metadata": {"x": "y"}, "unknown": None},
    )
    assert response.output_text == "hello"
    assert response.output[0].content[0].logprobs == []


def test_allowed_tools_of_a_response_are_the_only_ones(client: openai.OpenAI) -> None:
    other = {**RESPONSE_TOOL, "name": "other"}

    def ask(mode: str, name: str) -> list[str]:
        response = client.responses.create(
            model=MODEL,
            input=CALL,
            tools=[RESPONSE_TOOL, other],
            tool_choice={
                "type": "allowed_tools",
                "mode": mode,
                "tools": [{"type": "function", "name": name}],
            },
        )
        return [item.type for item in response.output]

    assert ask("auto", "get_weather") == ask("required", "get_weather") == ["function_call"]
    assert ask("auto", "other") == ["message"]


# --- codes that agents act on ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "field"),
    [
        ("/v1/chat/completions", "messages"),
        ("/v1/completions", "prompt"),
        ("/v1/responses", "input"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_full_context_has_openais_code_and_names_the_field(
    http: httpx.Client, path: str, field: str, stream: bool
) -> None:
    text = "x" * 40_000
    said: object = [{"role": "user", "content": text}] if field == "messages" else text
    body = {"model": MODEL, field: said, "stream": stream, "n": 2}
    if field == "input":
        del body["n"]
    answer = http.post(path, json=body)
    error = answer.json()["error"]
    assert answer.status_code == 400
    assert (error["code"], error["param"]) == ("context_length_exceeded", field)
    assert error["details"]["code"] == "context_overflow"


BEYOND = [
    ("/v1/chat/completions", {"messages": HELLO, "max_tokens": 1 << 20}),
    ("/v1/completions", {"prompt": "hello", "max_tokens": 1 << 20}),
    ("/v1/responses", {"input": "hello", "max_output_tokens": 1 << 20}),
]


@pytest.mark.parametrize(("path", "said"), BEYOND)
def test_an_answer_beyond_the_room_is_cut_to_it(
    http: httpx.Client, path: str, said: dict[str, Any]
) -> None:
    """Agents send the same limit, 32,000, to every model."""
    answer = http.post(path, json={"model": MODEL, **said})
    assert answer.status_code == 200, answer.text


def test_an_answer_cut_by_the_context_has_the_finish_reason_length(
    make_gateway: Callable[..., GatewayProcess], tmp_path: Path
) -> None:
    with running_bus(tmp_path, context_tokens=40) as small:
        body = {"model": MODEL, "messages": HELLO, "max_tokens": 32_000, "ignore_eos": True}
        with make_gateway(bus=small).http() as http:
            answer = http.post("/v1/chat/completions", json=body).json()
            assert answer["choices"][0]["finish_reason"] == "length"
            assert answer["usage"]["total_tokens"] == 40
        with make_gateway("--max-tokens-beyond", "refuse", bus=small).http() as http:
            answer = http.post("/v1/chat/completions", json=body)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert (error["code"], error["param"]) == ("context_length_exceeded", "messages")
    assert error["message"].startswith("This model's maximum context length is 40 tokens.")
    assert "32018 tokens (18 in the prompt, 32000 in the completion)" in error["message"]


def test_a_full_context_in_the_background_is_reported_too(client: openai.OpenAI) -> None:
    made = client.responses.create(model=MODEL, input="x" * 40_000, background=True)
    events = list(client.responses.retrieve(made.id, stream=True))
    assert events[-1].response.error.code == "context_length_exceeded"


def test_retry_after_is_never_longer_than_sdks_honour() -> None:
    slow = GatewayError("overloaded", "later", retryable=True, retry_after_ms=500_000)
    headers = error_headers(slow)
    assert (headers["retry-after"], headers["retry-after-ms"]) == ("60", "60000")


# --- every answer has its id ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/nothing", 404),
        ("POST", "/v1/responses/something", 404),
        ("GET", "/v1/responses/input_tokens", 405),
        ("POST", "/v1/chat/completions/x/cancel", 404),
        ("GET", "/v1/chat/completions", 200),
        ("PUT", "/v1/chat/completions", 405),
        ("DELETE", "/v1/models", 405),
        ("PATCH", "/v1/responses/resp_0", 405),
        ("GET", "/v1/responses/resp_0", 404),
        ("GET", "/v1/embeddings/", 307),
        ("GET", "/", 200),
        ("GET", "/health", 200),
    ],
)
def test_every_answer_names_the_request(
    http: httpx.Client, method: str, path: str, status: int
) -> None:
    answer = http.request(method, path, headers={"x-request-id": "mine"})
    assert answer.status_code == status
    assert answer.headers.get_list("x-request-id") == ["mine"]
    assert http.request(method, path).headers["x-request-id"].startswith("req-")
    if status in (404, 405):
        assert answer.json()["error"]["request_id"] == "mine"
    if status == 404 and path != "/v1/responses/resp_0":
        assert answer.json()["error"]["code"] == "unknown_url"


def test_a_refused_host_and_a_preflight_have_request_ids_too(
    http: httpx.Client, make_gateway: Callable[..., GatewayProcess], bus: Bus
) -> None:
    refused = http.get("/v1/models", headers={"host": "evil.example", "x-request-id": "mine"})
    assert (refused.status_code, refused.headers["x-request-id"]) == (400, "mine")
    asked = {"origin": "https://app.example", "access-control-request-method": "POST"}
    with make_gateway("--cors-origins", "https://app.example").http() as other:
        answer = other.options("/v1/chat/completions", headers=asked)
        assert answer.status_code == 200 and answer.headers["x-request-id"].startswith("req-")
