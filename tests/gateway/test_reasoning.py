"""Reasoning in OpenAI's chat, under the names that other servers use, and in `/v1/responses`, as
items: streamed and not, in the usage, and in the history that a client sends back."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from openai import BadRequestError, OpenAI

from client.gateway import requests as http
from client.gateway.convert import chat_call
from client.gateway.images import ImagePolicy

ASKED = "<think>\nhm, two\n</think>\n\nthree"


def ask(client: OpenAI, text: str = ASKED, **options: Any) -> Any:
    return client.chat.completions.create(
        model="echo", messages=[{"role": "user", "content": text}], **options
    )


def test_reasoning_is_apart_from_the_answer_under_both_names(client: OpenAI) -> None:
    answer = ask(client)
    [choice] = answer.choices
    assert choice.message.content == "three"
    assert choice.message.reasoning_content == choice.message.reasoning == "hm, two"
    details = answer.usage.completion_tokens_details
    assert 0 < details.reasoning_tokens < answer.usage.completion_tokens


def test_a_stream_separates_reasoning_from_the_answer(client: OpenAI) -> None:
    chunks = list(ask(client, stream=True, stream_options={"include_usage": True}))
    deltas = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
    assert "".join(delta.content or "" for delta in deltas) == "three"
    for name in ("reasoning_content", "reasoning"):
        assert "".join(getattr(delta, name, None) or "" for delta in deltas) == "hm, two"
    assert chunks[-1].usage.completion_tokens_details.reasoning_tokens > 0


def test_an_answer_without_reasoning_has_no_such_fields(client: OpenAI) -> None:
    [choice] = ask(client, "plain").choices
    assert choice.message.content == "plain"
    assert not {"reasoning", "reasoning_content"} & set(choice.message.model_dump())


def test_who_asks_in_sglangs_words_reads_the_field_in_any_case(client: OpenAI) -> None:
    for text, extra, thought in (
        ("plain", {"separate_reasoning": True}, None),
        (ASKED, {"separate_reasoning": False}, None),
        (ASKED, {"stream_reasoning": True}, "hm, two"),
    ):
        [choice] = ask(client, text, extra_body=extra).choices
        assert choice.message.reasoning_content == thought
        deltas = [one.choices[0].delta for one in ask(client, text, stream=True, extra_body=extra)]
        assert "".join(delta.reasoning_content or "" for delta in deltas) == (thought or "")
        assert "".join(delta.content or "" for delta in deltas) == choice.message.content


def test_a_thought_is_streamed_whole_on_request(client: OpenAI) -> None:
    extra = {"stream_reasoning": False}
    text = "<think>a b c</think>d e"
    for asked, thoughts, said in (
        (text, ["a b c"], "d e"),
        # Cut within the thought.
        ("<think>a b c", ["a b c"], ""),
    ):
        chunks = list(ask(client, asked, stream=True, logprobs=True, extra_body=extra))
        deltas = [chunk.choices[0].delta for chunk in chunks]
        assert [one.reasoning_content for one in deltas if one.reasoning_content] == thoughts
        assert "".join(one.content or "" for one in deltas) == said
        tokens = [
            token.token
            for chunk in chunks
            for token in (chunk.choices[0].logprobs and chunk.choices[0].logprobs.content) or ()
        ]
        [whole] = ask(client, asked, logprobs=True).choices
        assert tokens == [token.token for token in whole.logprobs.content]


def test_llamacpps_word_leaves_the_reasoning_in_the_text(client: OpenAI) -> None:
    [choice] = ask(client, extra_body={"reasoning_format": "none"}).choices
    assert choice.message.content == ASKED
    [choice] = ask(client, extra_body={"reasoning_format": "auto"}).choices
    assert choice.message.content == "three"


@pytest.mark.parametrize("name", ["reasoning", "reasoning_content"])
def test_reasoning_comes_back_in_the_history_under_either_name(client: OpenAI, name: str) -> None:
    messages: list[Any] = [
        {"role": "user", "content": "2 + 1?"},
        {"role": "assistant", "content": "three", name: "hm"},
        {"role": "user", "content": "sure?"},
    ]
    answer = client.chat.completions.create(model="echo", messages=messages)
    assert answer.choices[0].message.content == "sure?"


def test_a_stop_string_in_the_reasoning_does_not_stop(client: OpenAI) -> None:
    [choice] = ask(client, "<think>a stop b</think>c stop d", stop=["stop"]).choices
    assert (choice.message.content, choice.message.reasoning) == ("c ", "a stop b")
    assert choice.finish_reason == "stop"


# --- the words of other servers -------------------------------------------------------------------


@pytest.mark.parametrize("extra", [{"include_reasoning": False}, {"reasoning": {"exclude": True}}])
@pytest.mark.parametrize("stream", [False, True])
def test_reasoning_is_left_out_on_request(
    client: OpenAI, stream: bool, extra: dict[str, Any]
) -> None:
    answer = ask(client, stream=stream, extra_body=extra)
    if stream:
        said = [chunk.choices[0].delta.model_dump() for chunk in answer]
        assert "".join(delta["content"] or "" for delta in said) == "three"
        assert not any("reasoning" in name for delta in said for name in delta)
    else:
        assert answer.choices[0].message.content == "three"
        assert answer.usage.completion_tokens_details.reasoning_tokens > 0
        assert "reasoning" not in answer.choices[0].message.model_dump_json()


def test_reasoning_stays_in_the_text_on_request(client: OpenAI) -> None:
    [choice] = ask(client, extra_body={"separate_reasoning": False}).choices
    assert choice.message.content == ASKED


@pytest.mark.parametrize(
    "extra",
    [
        {"thinking_tokens": 3},
        {"thinking_token_budget": 3},
        {"reasoning": {"max_tokens": 3}},
        {"thinking": {"type": "enabled", "budget_tokens": 3}},
    ],
)
def test_a_budget_is_taken_under_every_name(client: OpenAI, extra: dict[str, Any]) -> None:
    [choice] = ask(client, extra_body=extra).choices
    assert (choice.message.content, choice.message.reasoning) == ("three", "hm")


@pytest.mark.parametrize(
    ("extra", "variables"),
    [
        ({"reasoning_effort": "low"}, {"reasoning_effort": "low"}),
        ({"reasoning": {"effort": "low"}}, {"reasoning_effort": "low"}),
        ({"enable_thinking": False}, {"enable_thinking": False}),
        ({"thinking": {"type": "disabled"}}, {"enable_thinking": False}),
        ({"reasoning": {"enabled": True}}, {"enable_thinking": True}),
        ({"chat_template_kwargs": {"enable_thinking": False, "x": 1}}, None),
        ({"continue_final_message": True}, {"continue_final_message": True}),
        ({"add_generation_prompt": False}, {"add_generation_prompt": False}),
    ],
)
def test_effort_and_switch_become_variables_of_the_template(
    extra: dict[str, Any], variables: dict[str, Any] | None
) -> None:
    body = {"model": "m", "messages": [{"role": "user", "content": "q"}], **extra}
    request = http.parse(http.ChatRequest, json.dumps(body).encode())
    call = asyncio.run(chat_call(request, ImagePolicy(), seed=1, user=""))
    expected = extra["chat_template_kwargs"] if variables is None else variables
    assert call.request.template_args == expected


@pytest.mark.parametrize("name", ["prefix", "partial"])
def test_an_answer_goes_on_with_a_given_thought(client: OpenAI, name: str) -> None:
    asked = {"role": "user", "content": "[[echo mode=sampled answer_tokens=5]]"}
    begun = {"role": "assistant", "reasoning_content": "hm", name: True}
    body = {"model": "m", "messages": [asked, begun]}
    request = http.parse(http.ChatRequest, json.dumps(body).encode())
    call = asyncio.run(chat_call(request, ImagePolicy(), seed=1, user=""))
    assert call.request.template_args == {"continue_final_message": True}
    [_, last] = call.request.messages or []
    assert (last.content, last.reasoning_content) == (None, "hm")
    with pytest.raises(BadRequestError) as failed:
        client.chat.completions.create(
            model="echo",
            messages=[begun, asked],  # type: ignore[list-item]
        )
    assert failed.value.param == f"messages[0].{name}"


@pytest.mark.parametrize(
    ("extra", "param"),
    [
        ({"reasoning_effort": "low", "reasoning": {"effort": "high"}}, "reasoning.effort"),
        ({"enable_thinking": True, "thinking": {"type": "disabled"}}, "thinking.type"),
        ({"thinking_tokens": 3, "thinking_token_budget": 4}, "thinking_token_budget"),
        ({"reasoning": {"efort": "low"}}, "reasoning.efort"),
    ],
)
def test_two_fields_that_contradict_each_other_are_refused(
    client: OpenAI, extra: dict[str, Any], param: str
) -> None:
    with pytest.raises(BadRequestError) as failed:
        ask(client, extra_body=extra)
    assert failed.value.param == param


def test_each_of_several_choices_has_its_own_reasoning(client: OpenAI) -> None:
    asked = "[[echo mode=sampled think_tokens=6 answer_tokens=4]]"
    alone = [ask(client, asked, seed=seed).choices[0].message for seed in (5, 6, 7)]
    together = [choice.message for choice in ask(client, asked, seed=5, n=3).choices]
    streamed = [["", ""] for _ in alone]
    for chunk in ask(client, asked, seed=5, n=3, stream=True):
        for choice in chunk.choices:
            streamed[choice.index][0] += getattr(choice.delta, "reasoning", None) or ""
            streamed[choice.index][1] += choice.delta.content or ""
    said = [[message.reasoning, message.content] for message in alone]
    assert said == [[message.reasoning, message.content] for message in together] == streamed
    assert len({thought for thought, _ in said}) == 3


# --- /v1/responses --------------------------------------------------------------------------------

TOOLS: list[Any] = [
    {
        "type": "function",
        "name": "get_weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        "strict": False,
    }
]


def respond(client: OpenAI, text: Any = ASKED, **options: Any) -> Any:
    return client.responses.create(model="echo", input=text, **options)


def test_a_thought_is_an_item_before_the_message(client: OpenAI) -> None:
    answer = respond(client)
    thought, message = answer.output
    assert (thought.type, thought.status, thought.summary) == ("reasoning", "completed", [])
    assert [(part.type, part.text) for part in thought.content] == [("reasoning_text", "hm, two")]
    assert thought.encrypted_content is None
    assert (message.type, answer.output_text) == ("message", "three")
    assert 0 < answer.usage.output_tokens_details.reasoning_tokens < answer.usage.output_tokens
    assert client.responses.retrieve(answer.id).output == answer.output


def test_a_stream_of_a_thought_tells_its_events_in_order(client: OpenAI) -> None:
    events = list(respond(client, stream=True))
    kinds = [event.type.removeprefix("response.") for event in events]
    told = [kind for i, kind in enumerate(kinds) if i == 0 or kind != kinds[i - 1]]
    assert told == [
        *("created", "in_progress"),
        *("output_item.added", "content_part.added", "reasoning_text.delta"),
        *("reasoning_text.done", "content_part.done", "output_item.done"),
        *("output_item.added", "content_part.added", "output_text.delta"),
        *("output_text.done", "content_part.done", "output_item.done"),
        "completed",
    ]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    thought = [event for event in events if event.type == "response.reasoning_text.delta"]
    assert "".join(event.delta for event in thought) == "hm, two"
    [done] = [event for event in events if event.type == "response.reasoning_text.done"]
    whole = events[-1].response
    assert done.text == "hm, two" and done.item_id == whole.output[0].id
    assert {event.output_index for event in thought} == {0}
    [added, _] = [event for event in events if event.type == "response.output_item.added"]
    assert added.item.content == [] and added.item.status == "in_progress"
    assert whole.output_text == "three"


def test_the_sdks_stream_helper_takes_thoughts_calls_and_formats(client: OpenAI) -> None:
    called = '<think>which</think>{"name": "get_weather", "arguments": {"city": "Graz"}}'
    with client.responses.stream(model="echo", input=called, tools=TOOLS) as stream:
        for _ in stream:
            pass
        answer = stream.get_final_response()
    assert [item.type for item in answer.output] == ["reasoning", "function_call"]
    with client.responses.stream(model="echo", input=ASKED) as stream:
        assert [e for e in stream if e.type == "response.output_text.delta"]
        assert stream.get_final_response().output_text == "three"


def test_a_response_that_ends_in_its_thought_is_incomplete_and_has_no_message(
    client: OpenAI,
) -> None:
    answer = respond(client, "[[echo mode=sampled think_tokens=50]]", max_output_tokens=20)
    [item] = answer.output
    assert (item.type, item.status, answer.status) == ("reasoning", "incomplete", "incomplete")
    assert answer.output_text == "" and item.content[0].text


def test_a_thought_without_an_answer_is_followed_by_an_empty_message(client: OpenAI) -> None:
    answer = respond(client, "<think>hm</think>")
    assert [item.type for item in answer.output] == ["reasoning", "message"]
    assert (answer.status, answer.output_text) == ("completed", "")


def test_logprobs_are_those_of_the_text_alone(client: OpenAI) -> None:
    asked = "<think>hm</think>ab"
    options: Any = {"include": ["message.output_text.logprobs"], "top_logprobs": 1}
    for extra in ("", "[[echo tokens_per_step=64]]"):
        thought, message = respond(client, extra + asked, **options).output
        assert thought.content[0].text == "hm"
        [content] = message.content
        assert [entry.token for entry in content.logprobs] == ["a", "b"]


def test_encrypted_content_is_there_when_asked_for_and_brings_the_thought_back(
    client: OpenAI,
) -> None:
    answer = respond(client, store=False, include=["reasoning.encrypted_content"])
    item = answer.output[0].model_dump(exclude_none=True)
    assert item["encrypted_content"]
    del item["content"]
    said = [{"role": "user", "content": "2 + 1?"}]
    last = {"role": "user", "content": "sure?"}
    with_thought, cut = (
        respond(client, [*said, {**item, **more}, answer.output[1].model_dump(), last])
        for more in ({}, {"encrypted_content": "gAAAA"})
    )
    assert with_thought.output_text == cut.output_text == "sure?"
    more = with_thought.usage.input_tokens - cut.usage.input_tokens
    assert more == len("<think>hm, two</think>"), "tokens of the echo engine's prompt"


def test_items_come_back_as_input_and_by_reference(client: OpenAI) -> None:
    called = '<think>which</think>{"name": "get_weather", "arguments": {"city": "Graz"}}'
    first = respond(client, called, tools=TOOLS)
    call = first.output[1]
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}
    again = {"role": "user", "content": "thanks"}
    whole = [item.model_dump(exclude_none=True) for item in first.output]
    referred = [{"type": "item_reference", "id": item.id} for item in first.output]
    used = set()
    for items in (whole, referred):
        answer = respond(
            client, [{"role": "user", "content": called}, *items, result, again], tools=TOOLS
        )
        assert answer.output_text == "thanks"
        used.add(answer.usage.input_tokens)
    stored = respond(client, [result, again], tools=TOOLS, previous_response_id=first.id)
    used.add(stored.usage.input_tokens)
    assert len(used) == 1, "each way says the same to the model"
    without = respond(
        client, [{"role": "user", "content": called}, whole[1], result, again], tools=TOOLS
    )
    assert used.pop() - without.usage.input_tokens == len("<think>which</think>")
