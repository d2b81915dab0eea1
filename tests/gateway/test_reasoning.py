"""Reasoning in OpenAI's chat: under the names that other servers use, streamed and not, in the
usage, and in the history that a client sends back."""

from __future__ import annotations

from typing import Any

import pytest
from openai import OpenAI

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


def test_a_stream_tells_reasoning_from_the_answer(client: OpenAI) -> None:
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
