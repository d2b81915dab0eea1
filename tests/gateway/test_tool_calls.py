"""Tool calls in both of OpenAI's APIs, streamed and not; the echo engine repeats its prompt."""

from __future__ import annotations

from typing import Any

import openai
import pytest
from openai.types.chat import ChatCompletionMessageFunctionToolCall

from tests.gateway.conftest import MODEL

ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}},
    },
}
FLAT = {"type": "function", "name": "add", **ADD["function"], "strict": False}  # type: ignore[dict-item]
CALL = '<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>'
BARE = '{"name": "add", "parameters": {"a": 1}}'

Said = tuple[str, list[tuple[str, str]], str]


def chat(client: openai.OpenAI, text: str, *, stream: bool, **options: Any) -> Said:
    """Text, calls and finish reason."""
    options = {"model": MODEL, "messages": [{"role": "user", "content": text}], **options}
    options.setdefault("tools", [ADD])
    if not stream:
        [choice] = client.chat.completions.create(**options).choices
        calls = choice.message.tool_calls or []
        assert all(isinstance(call, ChatCompletionMessageFunctionToolCall) for call in calls)
        return (
            choice.message.content or "",
            [(call.function.name, call.function.arguments) for call in calls],
            choice.finish_reason,
        )
    said, found, reason = "", {}, ""
    for chunk in client.chat.completions.create(stream=True, **options):
        [choice] = chunk.choices
        said += choice.delta.content or ""
        reason = choice.finish_reason or reason
        for call in choice.delta.tool_calls or []:
            name, arguments = found.get(call.index, ("", ""))
            found[call.index] = (
                name + (call.function.name or ""),
                arguments + (call.function.arguments or ""),
            )
    return said, list(found.values()), reason


def response(client: openai.OpenAI, asked: str, *, stream: bool, **options: Any) -> Any:
    options = {"model": MODEL, "input": asked, "tools": [FLAT], **options}
    if not stream:
        return client.responses.create(**options)
    return list(client.responses.create(stream=True, **options))[-1].response


def items(answer: Any) -> list[tuple[str, str]]:
    """Kind and text or arguments of each output item."""
    kinds = {"message": "text", "reasoning": "reasoning"}
    return [
        ("call", item.arguments)
        if item.type == "function_call"
        else (kinds[item.type], item.content[0].text)
        for item in answer.output
    ]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("text", "said"),
    [
        (CALL, ("", [("add", '{"a": 1}')], "tool_calls")),
        (BARE, ("", [("add", '{"a": 1}')], "tool_calls")),
        ('{"name": "add", "age": 30}', ('{"name": "add", "age": 30}', [], "stop")),
        (
            f"<think>or {CALL}?</think>{CALL}",
            ("", [("add", '{"a": 1}')], "tool_calls"),
        ),
        (f"<think>or {CALL}?</think>No.", ("No.", [], "stop")),
        (
            '[TOOL_CALLS]add[CALL_ID]abc[ARGS]{"a": 1}[TOOL_CALLS]add[CALL_ID]abd[ARGS]{"a": 2}',
            ("", [("add", '{"a": 1}'), ("add", '{"a": 2}')], "tool_calls"),
        ),
    ],
)
def test_calls_are_separated_from_text(
    client: openai.OpenAI, stream: bool, text: str, said: Said
) -> None:
    assert chat(client, text, stream=stream) == said
    expected = [("reasoning", f"or {CALL}?")] * text.startswith("<think>")
    expected += [("text", said[0])] * bool(said[0]) + [("call", given) for _, given in said[1]]
    assert items(response(client, text, stream=stream)) == expected


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("text", [BARE, f"[{BARE}]", CALL])
def test_an_answer_that_a_format_asked_for_is_content(
    client: openai.OpenAI, stream: bool, text: str
) -> None:
    schema = {"name": "x", "schema": {"type": "object"}}
    for options in (
        {"response_format": {"type": "json_object"}},
        {"response_format": {"type": "json_schema", "json_schema": schema}},
        {"extra_body": {"structured_outputs": {"json": {"type": "object"}}}},
    ):
        assert chat(client, text, stream=stream, **options) == (text, [], "stop")
    answer = response(
        client, text, stream=stream, text={"format": {"type": "json_schema", **schema}}
    )
    assert items(answer) == [("text", text)]


@pytest.mark.parametrize("stream", [False, True])
def test_without_parallel_calls_the_answer_ends_with_the_first(
    client: openai.OpenAI, stream: bool
) -> None:
    """Whatever the model would go on with, and whatever the limit: it is not waited for."""
    text = f"Sure. {CALL}" + " more words" * 2000
    once = ("Sure.", [("add", '{"a": 1}')], "tool_calls")
    assert chat(client, text, stream=stream, parallel_tool_calls=False) == once
    enough = len(f"Sure. {CALL}")
    for limit in (enough, enough + 40):
        options = {"parallel_tool_calls": False, "max_completion_tokens": limit}
        assert chat(client, text, stream=stream, **options) == once
    answer = response(
        client, text, stream=stream, parallel_tool_calls=False, max_output_tokens=enough + 40
    )
    assert answer.status == "completed"
    assert items(answer) == [("text", "Sure."), ("call", '{"a": 1}')]
    assert answer.usage.output_tokens <= enough
    assert answer.usage.input_tokens > 0


def test_the_usage_of_a_call_that_ended_the_answer_is_that_of_the_answer(
    client: openai.OpenAI,
) -> None:
    text = CALL + " more words" * 2000
    options = {"model": MODEL, "messages": [{"role": "user", "content": text}], "tools": [ADD]}
    whole = client.chat.completions.create(**options)
    several = client.chat.completions.create(**options, parallel_tool_calls=False, n=3)
    assert [len(choice.message.tool_calls or []) for choice in several.choices] == [1, 1, 1]
    assert several.usage is not None and whole.usage is not None
    assert several.usage.prompt_tokens == whole.usage.prompt_tokens
    assert several.usage.completion_tokens <= 3 * len(CALL)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("text", [CALL, '[TOOL_CALLS][{"name": "add", "arguments": {"a": 1}}]'])
def test_a_call_cut_by_a_stop_string_is_not_reported_as_complete(
    client: openai.OpenAI, stream: bool, text: str
) -> None:
    said, calls, reason = chat(client, text, stream=stream, stop=["1"])
    assert (said, calls, reason) == ("", [("add", '{"a": ')], "stop")
    answer = response(client, text, stream=stream, extra_body={"stop": ["1"]})
    assert [item.status for item in answer.output] == ["incomplete"]
    # The conversation goes on from there.
    again = client.responses.create(model=MODEL, input="well?", previous_response_id=answer.id)
    assert again.output_text == "well?"


def test_a_continued_message_may_end_within_reasoning(client: openai.OpenAI) -> None:
    """The echo engine repeats the last user message, whatever follows it."""
    body = {
        "model": MODEL,
        "tools": [ADD],
        "messages": [
            {"role": "user", "content": f"{CALL}</think>{CALL}"},
            {"role": "assistant", "content": "<think>Hm."},
        ],
        "extra_body": {"chat_template_kwargs": {"continue_final_message": True}},
    }
    [choice] = client.chat.completions.create(**body).choices  # type: ignore[call-overload]
    assert choice.message.content == f"{CALL}</think>"
    assert len(choice.message.tool_calls) == 1


def test_a_cut_answer_that_looked_like_a_call_is_text(client: openai.OpenAI) -> None:
    cut = len(BARE) - 3
    said = chat(client, BARE, stream=False, max_completion_tokens=cut)
    assert said == (BARE[:cut], [], "length")
