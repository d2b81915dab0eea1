"""Functions in groups (`namespace`) of `/v1/responses`, as agents send those of their servers."""

from __future__ import annotations

import json
from typing import Any

import httpx2 as httpx
import openai
import pytest

from client.gateway.errors import GatewayError
from client.gateway.openai.responses_tools import functions_of, told_tools
from tests.gateway.conftest import MODEL

FILES = {
    "type": "namespace",
    "name": "mcp__files",
    "description": "Files of the project.",
    "tools": [
        {"type": "function", "name": "read", "description": "Reads one.", "parameters": {}},
        {"type": "function", "name": "list", "parameters": {}},
    ],
}
PLAIN = {"type": "function", "name": "read", "parameters": {}}


def call(name: str, **arguments: Any) -> str:
    return f"<tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>"


@pytest.mark.parametrize("stream", [False, True])
def test_a_call_has_its_group_apart_from_its_name(client: openai.OpenAI, stream: bool) -> None:
    tools: Any = [FILES, PLAIN]
    said = call("mcp__files__read", path="a") + call("read", path="b")
    asked: Any = {"model": MODEL, "input": said, "tools": tools}
    if stream:
        events = list(client.responses.create(stream=True, **asked))
        response: Any = events[-1].response
        added = [e.item for e in events if e.type == "response.output_item.added"]
        done = [e for e in events if e.type == "response.function_call_arguments.done"]
        assert [(one.namespace, one.name) for one in added] == [
            ("mcp__files", "read"),
            (None, "read"),
        ]
        assert [one.name for one in done] == ["read", "read"]
    else:
        response = client.responses.create(**asked)
    first, second = response.output
    assert (first.namespace, first.name) == ("mcp__files", "read")
    assert json.loads(first.arguments) == {"path": "a"}
    assert (second.namespace, second.name) == (None, "read")
    group, alone = response.tools
    assert (group.type, group.name, alone.name) == ("namespace", "mcp__files", "read")
    assert [tool.name for tool in group.tools] == ["read", "list"]


def test_a_call_of_the_history_has_the_name_that_the_model_knows(http: httpx.Client) -> None:
    """Given back as items, or named as the previous response: the prompt is the same."""
    said = call("mcp__files__read", path="a")
    first = http.post("/v1/responses", json={"input": said, "tools": [FILES]}).json()
    [item] = first["output"]
    assert item["namespace"] == "mcp__files"
    result = {"type": "function_call_output", "call_id": item["call_id"], "output": "x"}
    again = {"input": [{"role": "user", "content": said}, item, result], "tools": [FILES]}
    following = {"input": [result], "tools": [FILES], "previous_response_id": first["id"]}
    counts = [
        http.post("/v1/responses/input_tokens", json=body).json()["input_tokens"]
        for body in (again, following)
    ]
    assert counts[0] == counts[1] > 0
    flat = {**item, "name": "mcp__files__read"}
    del flat["namespace"]
    body = {"input": [{"role": "user", "content": said}, flat, result], "tools": [FILES]}
    assert http.post("/v1/responses/input_tokens", json=body).json()["input_tokens"] == counts[0]


def test_what_the_model_sees_of_a_group() -> None:
    read, listed, alone = functions_of([FILES, PLAIN])
    assert [one.name for one in (read, listed, alone)] == [
        *("mcp__files__read", "mcp__files__list", "read")
    ]
    assert read.shown.function.description == "Files of the project. Reads one."
    assert listed.shown.function.description == "Files of the project."
    assert alone.shown.function.description is None
    assert [one["type"] for one in told_tools([read, listed, alone])] == ["namespace", "function"]


@pytest.mark.parametrize(
    ("tools", "param"),
    [
        ([{**FILES, "tools": []}], "tools[0].tools"),
        ([{**FILES, "name": "a b"}], "tools[0].name"),
        ([{**FILES, "tools": [{"type": "function"}]}], "tools[0].tools[0].name"),
        ([{**FILES, "tools": [{"type": "custom", "name": "x"}]}], "tools[0].tools[0].type"),
        ([{**FILES, "tools": [{"type": "other", "name": "x"}]}], "tools[0].tools[0].type"),
        ([FILES, {**PLAIN, "name": "mcp__files__read"}], "tools"),
        ([{**FILES, "more": 1}], "tools[0].more"),
    ],
)
def test_a_group_that_is_wrong_is_named(tools: list[dict[str, Any]], param: str) -> None:
    with pytest.raises(GatewayError) as raised:
        functions_of(tools)
    assert raised.value.param == param


def test_other_tools_of_a_group_are_left_out_beside_functions() -> None:
    mixed = {**FILES, "tools": [{"type": "custom", "name": "x"}, PLAIN]}
    assert [one.name for one in functions_of([mixed])] == ["mcp__files__read"]
