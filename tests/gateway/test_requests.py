"""Bodies: every field is honoured or refused by name, and the OpenAPI document lists them."""

from __future__ import annotations

import importlib
import inspect
import json
import pkgutil
import socket
from typing import Literal, get_args, get_origin, get_type_hints

import httpx2 as httpx
import msgspec
import openai.types.chat as chat
import openai.types.chat.completion_create_params as chat_params
import openai.types.completion_create_params as completion_params
import openai.types.embedding_create_params as embedding_params
import openai.types.responses as responses
import openai.types.responses.response_create_params as response_params
import pytest
from hypothesis import example, given, strategies as st
from openai.types.shared_params import Reasoning
from typing_extensions import is_typeddict

import client.gateway
from client.gateway import requests, unserved
from client.gateway.errors import GatewayError
from client.gateway.openai import responses_body, responses_input, responses_tools
from client.gateway.openai.responses_body import ResponseRequest
from client.gateway.requests import (
    ChatRequest,
    CompletionRequest,
    EmbeddingRequest,
    number_of,
    parse,
    texts_of,
)
from tests.gateway.conftest import MODEL, GatewayProcess
from tests.harness import PATIENCE_S

BODIES = {
    ChatRequest: chat_params.CompletionCreateParamsBase,
    CompletionRequest: completion_params.CompletionCreateParamsBase,
    EmbeddingRequest: embedding_params.EmbeddingCreateParams,
    ResponseRequest: response_params.ResponseCreateParamsBase,
}


@pytest.mark.parametrize("body", BODIES, ids=lambda body: body.__name__)
def test_every_field_of_openais_is_known_or_refused_by_its_name(body: type[msgspec.Struct]) -> None:
    """OpenAI's package gets new fields every few days; none may be silently ignored."""
    theirs = set(BODIES[body].__annotations__)
    unknown = theirs - set(body.__struct_fields__)
    assert len(unknown) <= len(theirs) / 4, "their package has left ours behind"
    for field in unknown:
        with pytest.raises(GatewayError, match=f"`{field}` is not a field") as refused:
            parse(body, json.dumps({field: 1}).encode())
        assert refused.value.param == field


#: OpenAI's types within the bodies, and ours.
PARTS = {
    requests.ChatMessage: [
        chat.ChatCompletionAssistantMessageParam,
        chat.ChatCompletionDeveloperMessageParam,
        chat.ChatCompletionSystemMessageParam,
        chat.ChatCompletionToolMessageParam,
        chat.ChatCompletionUserMessageParam,
    ],
    requests.TextPart: [chat.ChatCompletionContentPartTextParam],
    requests.ImagePart: [chat.ChatCompletionContentPartImageParam],
    requests.RefusalPart: [chat.ChatCompletionContentPartRefusalParam],
    requests.AudioPart: [chat.ChatCompletionContentPartInputAudioParam],
    requests.Tool: [chat.ChatCompletionFunctionToolParam],
    requests.ToolCall: [chat.ChatCompletionMessageFunctionToolCallParam],
    requests.StreamOptions: [chat.ChatCompletionStreamOptionsParam],
    responses_input.InputText: [responses.ResponseInputTextParam],
    responses_input.InputImage: [responses.ResponseInputImageParam],
    responses_input.InputFile: [responses.ResponseInputFileParam],
    responses_input.OutputText: [responses.ResponseOutputTextParam],
    responses_input.MessageItem: [
        responses.EasyInputMessageParam,
        responses.ResponseOutputMessageParam,
    ],
    responses_input.FunctionCallItem: [responses.ResponseFunctionToolCallParam],
    responses_input.FunctionOutputItem: [responses.response_input_param.FunctionCallOutput],
    responses_input.ReasoningItem: [responses.ResponseReasoningItemParam],
    responses_input.ItemReference: [responses.response_input_param.ItemReference],
    responses_tools.FunctionTool: [responses.FunctionToolParam],
    responses_body.TextConfig: [responses.ResponseTextConfigParam],
    responses_body.Reasoning: [Reasoning],
}


@pytest.mark.parametrize("ours", PARTS, ids=lambda ours: ours.__name__)
def test_every_field_within_a_body_of_openais_client_is_known(ours: type[msgspec.Struct]) -> None:
    theirs = {field for kind in PARTS[ours] for field in get_type_hints(kind)}
    assert theirs - {*ours.__struct_encode_fields__, "type"} == set()


@pytest.mark.parametrize("body", BODIES, ids=lambda body: body.__name__)
def test_every_literal_of_openais_client_is_accepted_or_refused_by_its_field(
    body: type[msgspec.Struct],
) -> None:
    inputs = {
        ChatRequest: {"messages": [{"role": "user", "content": "x"}]},
        CompletionRequest: {"prompt": "x"},
        EmbeddingRequest: {"input": "x"},
        ResponseRequest: {"input": "x"},
    }
    known = {"model": "m", **inputs[body]}
    words = [
        (field, word)
        for field, hint in get_type_hints(BODIES[body]).items()
        for word in words_of(hint)
        if field not in known
    ]
    assert words or body is CompletionRequest
    for field, word in words:
        try:
            requests.refuse_unserved(parse(body, json.dumps({**known, field: word}).encode()))
        except GatewayError as error:
            assert error.param == field


def words_of(hint: object) -> list[object]:
    """The literals that a type hint allows at its top level."""
    if get_origin(hint) is Literal:
        return list(get_args(hint))
    return [] if is_typeddict(hint) else [w for one in get_args(hint) for w in words_of(one)]


def test_every_refused_field_has_its_reason() -> None:
    names = [one.name for one in pkgutil.walk_packages(client.gateway.__path__, "client.gateway.")]
    modules = [importlib.import_module(n) for n in names if not n.endswith("__main__")]
    kinds = {
        kind
        for module in modules
        for _, kind in inspect.getmembers(module, inspect.isclass)
        if issubclass(kind, msgspec.Struct)
    }
    refused = {field for kind in kinds for field in unserved._refused_fields(kind)}
    assert "audio" in refused and "functions" in refused
    assert refused == set(unserved._UNSERVED)


@given(st.dictionaries(st.sampled_from(ChatRequest.__struct_fields__), st.none() | st.integers()))
def test_every_body_gives_a_value_or_an_error_that_names_a_field(fields: dict[str, object]) -> None:
    data = json.dumps({"model": "m", "messages": [{"role": "user"}], **fields}).encode()
    try:
        requests.refuse_unserved(parse(ChatRequest, data))
    except GatewayError as error:
        assert error.status == 400 and error.param is not None


@given(st.binary(max_size=200))
@example(b'{"":')
def test_bytes_that_are_not_a_request_are_refused(data: bytes) -> None:
    with pytest.raises(GatewayError):
        parse(ChatRequest, data)


@pytest.mark.parametrize(
    ("kind", "fields", "param", "allowed"),
    [
        (ChatRequest, {"messages": [{"role": "robot"}]}, "messages[0].role", "'assistant', 'deve"),
        (ChatRequest, {"service_tier": "slow"}, "service_tier", "'auto', 'default'"),
        (EmbeddingRequest, {"encoding_format": "int"}, "encoding_format", "'base64', 'float'"),
        (ResponseRequest, {"tool_choice": "never"}, "tool_choice", "'auto', 'none', 'required'"),
        (
            ChatRequest,
            {"messages": [{"role": "user", "content": [{"type": "video"}]}]},
            "messages[0].content[0].type",
            "'text', 'image_url', ",
        ),
        (ResponseRequest, {"text": {"format": {"type": "xml"}}}, "text.format.type", "'text', "),
    ],
)
def test_the_error_for_a_wrong_literal_lists_the_allowed_ones(
    kind: type[msgspec.Struct], fields: dict[str, object], param: str, allowed: str
) -> None:
    with pytest.raises(GatewayError) as refused:
        parse(kind, json.dumps(fields).encode())
    assert refused.value.param == param
    assert f"; allowed are {allowed}" in refused.value.info.message


def test_kinds_of_prompts_are_distinguished() -> None:
    assert texts_of("prompt", "a") == ["a"]
    assert texts_of("prompt", [1, 2]) == [[1, 2]]
    assert texts_of("prompt", ["a", "b"]) == ["a", "b"]
    assert texts_of("prompt", [[1], [2]]) == [[1], [2]]
    # A text may have more tokens than a request may have texts.
    assert texts_of("prompt", [1] * 10_000) == [[1] * 10_000]
    for wrong in (["a", 1], ["a", [1]], [[1], []], ["a"] * 4097):
        with pytest.raises(GatewayError):
            texts_of("prompt", wrong)


def test_a_number_is_a_few_plain_digits() -> None:
    assert (number_of("0"), number_of("42"), number_of("9" * 18)) == (0, 42, 10**18 - 1)
    assert [number_of(text) for text in ("", "-1", "1.0", " 1", "\u0663", "9" * 5000)] == [None] * 6


def test_errors_do_not_repeat_long_input() -> None:
    with pytest.raises(GatewayError) as refused:
        parse(ChatRequest, json.dumps({"z" * 100_000: 1}).encode())
    assert len(refused.value.info.message) < 2100 and len(refused.value.param or "") < 250
    assert refused.value.info.message.endswith("remove it or correct its spelling.")


def test_the_document_describes_what_is_accepted(http: httpx.Client) -> None:
    document = http.get("/openapi.json").json()
    assert document["openapi"].startswith("3.1")
    chat = document["components"]["schemas"]["ChatRequest"]
    assert set(chat["properties"]) == set(ChatRequest.__struct_fields__)
    assert chat["additionalProperties"] is False
    for path, operations in document["paths"].items():
        for method in operations:
            asked = http.request(method, path.replace("{id}", "resp_x"))
            # Every described path and method exists.
            assert asked.status_code != 405, path
            missing = asked.status_code == 404 and "{id}" not in path
            # Usage is kept by option only, and says so.
            assert not missing or "--usage" in asked.json()["error"]["message"], path


def test_a_null_field_counts_as_absent(http: httpx.Client) -> None:
    optional = {
        field.name: None
        for field in msgspec.structs.fields(ChatRequest)
        if not field.required and field.name != "model"
    }
    body = {"model": MODEL, "messages": [{"role": "user", "content": "hello"}], **optional}
    answer = http.post("/v1/chat/completions", json=body)
    assert answer.json()["choices"][0]["message"]["content"] == "hello"


NULLS = {"unknown": None}
SCHEMA = {"type": "object", "properties": {"a": {"default": None}}, "unknown": None}


def test_an_unknown_field_that_is_null_is_ignored() -> None:
    given = {
        "model": "m",
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "x", **NULLS}], **NULLS},
            {
                "role": "assistant",
                "tool_calls": [
                    {
                        "id": "c",
                        "type": "function",
                        "function": {"name": "f", "arguments": "{}", **NULLS},
                        **NULLS,
                    }
                ],
            },
        ],
        "tools": [{"type": "function", "function": {"name": "f", "parameters": SCHEMA, **NULLS}}],
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "n", "schema": SCHEMA, **NULLS},
            **NULLS,
        },
        "stream_options": NULLS,
        "metadata": NULLS,
        **NULLS,
    }
    body = parse(ChatRequest, json.dumps(given).encode())
    [tool] = body.tools or []
    # What holds any fields is passed on as it came.
    assert tool.function.parameters == SCHEMA and body.metadata == NULLS
    assert body.response_format.json_schema.schema == SCHEMA
    with pytest.raises(GatewayError) as refused:
        given["messages"][1]["tool_calls"][0]["function"]["other"] = 0
        parse(ChatRequest, json.dumps(given).encode())
    assert refused.value.param == "messages[1].tool_calls[0].function.other"


def test_null_fields_in_the_input_of_a_response_count_as_absent() -> None:
    body = ResponseRequest(
        model="m",
        input=[
            {"type": None, "role": "user", "content": [{"type": "input_text", "text": "x"} | NULLS]}
        ],
        tools=[{"type": "function", "name": "f", "parameters": SCHEMA, **NULLS}],
    )
    chat = responses_body.as_chat(body, [])
    [message], [tool] = chat.messages, chat.tools or []
    assert message.content == [requests.TextPart(text="x")]
    assert tool.function.parameters == SCHEMA


def deep(levels: int) -> str:
    return "[" * levels + "]" * levels


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        ("/v1/chat/completions", {"logit_bias": {"9" * 5000: 1}}, "logit_bias"),
    ],
)
def test_a_value_beyond_reason_is_the_callers_fault(
    http: httpx.Client, path: str, fields: dict[str, object], param: str
) -> None:
    body = {"model": MODEL, "messages": [{"role": "user", "content": "x"}], **fields}
    answer = http.post(path, json=body)
    assert answer.status_code == 400 and answer.json()["error"]["param"] == param


ODD_ARGUMENTS = {
    "cut": '{"city": "Gr',
    "cut in a character": '{"city": "\\u00',
    "nothing": "",
    "blanks": " \n",
    "null": "null",
    "a list": "[1]",
    "a text": '"Graz"',
    "no JSON": "city=Graz",
    "two objects": "{}{}",
    "deep": deep(5000),
    "a large number": '{"v": 1%s}' % ("0" * 5000),
}


@pytest.mark.parametrize("case", ODD_ARGUMENTS)
def test_a_history_with_a_cut_or_odd_call_is_taken(http: httpx.Client, case: str) -> None:
    """Our own answers contain such calls if they were cut."""
    function = {"name": "f", "arguments": ODD_ARGUMENTS[case]}
    call = {"id": "c", "type": "function", "function": function}
    item = {"type": "function_call", "call_id": "c", **function, "status": "incomplete"}
    for path, field, turns in (
        (
            "chat/completions",
            "messages",
            [
                {"role": "assistant", "content": None, "tool_calls": [call, call]},
                {"role": "tool", "tool_call_id": "c", "content": "not run"},
            ],
        ),
        (
            "responses",
            "input",
            [item, item, {"type": "function_call_output", "call_id": "c", "output": "not run"}],
        ),
    ):
        turns = [{"role": "user", "content": "go"}, *turns, {"role": "user", "content": "on"}]
        answer = http.post(f"/v1/{path}", json={"model": MODEL, field: turns})
        assert answer.status_code == 200, answer.text


def test_a_body_that_would_be_too_long_is_refused_before_it_is_sent(
    gateway: GatewayProcess,
) -> None:
    host, _, port = gateway.url.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), timeout=PATIENCE_S) as connection:
        connection.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\n"
            b"content-type: application/json\r\ncontent-length: 1000000000000000000\r\n\r\n{"
        )
        head = connection.recv(4096).decode()
    assert head.startswith("HTTP/1.1 413 ")


def test_a_compressed_body_is_refused_with_the_reason(http: httpx.Client) -> None:
    headers = {"content-type": "application/json", "content-encoding": "gzip"}
    answer = http.post("/v1/chat/completions", content=b"\x1f\x8b", headers=headers)
    assert answer.status_code == 400 and "content-encoding" in answer.json()["error"]["message"]


@pytest.mark.parametrize("value", ["1" + "0" * 30, '{"a":' * 960 + "1" + "}" * 960])
@pytest.mark.parametrize(
    ("path", "field"),
    [
        (
            "chat/completions",
            '"messages":[{"role":"user","content":"x"}],"chat_template_kwargs":{"v":%s}',
        ),
        (
            "chat/completions",
            '"messages":[{"role":"user","content":"x"}],"tools":[{"type":"function","function":'
            '{"name":"f","parameters":{"v":%s}}}]',
        ),
        ("completions", '"prompt":"x","structured_outputs":{"json":{"v":%s}}'),
        (
            "responses",
            '"input":"x","text":{"format":{"type":"json_schema","name":"n","schema":{"v":%s}}}',
        ),
    ],
)
def test_a_value_that_cannot_travel_is_refused_and_no_other_request_suffers(
    http: httpx.Client, path: str, field: str, value: str
) -> None:
    body = f'{{"model":"{MODEL}",{field % value}}}'
    headers = {"content-type": "application/json"}
    refused = http.post(f"/v1/{path}", content=body.encode(), headers=headers)
    assert refused.status_code == 400 and refused.json()["error"]["code"] == "invalid_request"
    assert http.post("/v1/completions", json={"model": MODEL, "prompt": "y"}).status_code == 200
