"""`/v1/responses` as OpenAI's own client sees it."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from typing import Any

import httpx2 as httpx
import openai
import pytest

from tests.gateway.conftest import MODEL, GatewayProcess
from tests.gateway.test_chat import CALL, image
from tests.harness import wait_until

TOOL = {
    "type": "function",
    "name": "get_weather",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    "strict": False,
}
CALLED = {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}
SLOW = "[[echo mode=sampled answer_tokens=30000 step_delay_ms=20]]x"


def test_an_answer_has_openais_shape(client: openai.OpenAI) -> None:
    response = client.responses.create(model=MODEL, input="hello", instructions="Be kind.")
    assert response.output_text == "hello"
    assert response.status == "completed" and response.object == "response"
    assert response.usage is not None
    assert response.usage.total_tokens == response.usage.input_tokens + response.usage.output_tokens
    assert response.instructions == "Be kind."


def test_a_stream_tells_the_whole_story_in_order(client: openai.OpenAI) -> None:
    events = list(client.responses.create(model=MODEL, input="hello", stream=True))
    kinds = [event.type for event in events]
    assert kinds[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert kinds[-4:] == [
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert set(kinds[4:-4]) == {"response.output_text.delta"}
    text = "".join(e.delta for e in events if e.type == "response.output_text.delta")
    assert text == "hello" == events[-1].response.output_text
    assert [event.sequence_number for event in events] == list(range(len(events)))


def test_the_sdks_own_stream_helper_accepts_it(client: openai.OpenAI) -> None:
    with client.responses.stream(model=MODEL, input="hello") as stream:
        for _ in stream:
            pass
        assert stream.get_final_response().output_text == "hello"


def test_images_and_items_are_taken(client: openai.OpenAI) -> None:
    response = client.responses.create(
        model=MODEL,
        input=[
            {"role": "developer", "content": "Be brief."},
            {
                "role": "user",
                "content": [
                    {"type": "input_text", "text": "what"},
                    {"type": "input_image", "image_url": image(), "detail": "auto"},
                ],
            },
        ],
    )
    assert response.output_text == "1 image: 64x48. what"


def test_a_follow_up_stands_on_what_was_said(client: openai.OpenAI) -> None:
    first = client.responses.create(model=MODEL, input="one", instructions="Only now.")
    second = client.responses.create(
        model=MODEL, input="two", previous_response_id=first.id, store=False
    )
    alone = client.responses.create(model=MODEL, input="two")
    assert second.usage is not None and alone.usage is not None
    assert second.usage.input_tokens > alone.usage.input_tokens
    with pytest.raises(openai.BadRequestError):
        client.responses.create(model=MODEL, input="x", previous_response_id=second.id)


def test_tool_calls_are_items_of_their_own(client: openai.OpenAI) -> None:
    events = list(client.responses.create(model=MODEL, input=CALL, tools=[TOOL], stream=True))
    done = next(e for e in events if e.type == "response.function_call_arguments.done")
    assert json.loads(done.arguments) == {"city": "Graz"}
    [item] = events[-1].response.output
    assert item.type == "function_call" and item.name == "get_weather"
    answer = client.responses.create(
        model=MODEL,
        tools=[TOOL],
        input=[
            {"role": "user", "content": "weather?"},
            item.model_dump(exclude_none=True),
            {"type": "function_call_output", "call_id": item.call_id, "output": "sunny"},
            {"role": "user", "content": "thanks"},
        ],
    )
    assert answer.output_text == "thanks"


@pytest.mark.parametrize("named", [{"name": "get_weather"}, {"function": {"name": "get_weather"}}])
def test_a_tool_is_chosen_in_either_apis_words(http: httpx.Client, named: dict[str, Any]) -> None:
    asked = {"model": MODEL, "input": CALL, "tools": [TOOL]}
    answer = http.post(
        "/v1/responses", json={**asked, "tool_choice": {"type": "function", **named}}
    ).json()
    assert answer["output"][0]["name"] == "get_weather", answer
    assert answer["tool_choice"] == {"type": "function", "name": "get_weather"}
    refused = http.post("/v1/responses", json={**asked, "tool_choice": {"type": "function"}})
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "tool_choice"


def test_an_answer_that_is_cut_is_incomplete(client: openai.OpenAI) -> None:
    response = client.responses.create(model=MODEL, input="a long text", max_output_tokens=2)
    assert response.status == "incomplete"
    assert response.incomplete_details is not None
    assert response.incomplete_details.reason == "max_output_tokens"


def test_the_extensions_of_a_chat_are_taken(client: openai.OpenAI) -> None:
    def ask(**extra: object) -> str:
        return client.responses.create(
            model=MODEL, input="abcdef", max_output_tokens=12, extra_body=extra
        ).output_text

    assert ask(stop=["d"]) == "abc"
    assert ask(stop=["d"], include_stop_str_in_output=True) == "abcd"
    assert len(ask(ignore_eos=True)) == 12
    assert ask(tool_choice="auto") == "abcdef"


def test_logprobs_come_where_they_are_included(client: openai.OpenAI) -> None:
    response = client.responses.create(
        model=MODEL, input="ab", include=["message.output_text.logprobs"], top_logprobs=1
    )
    [content] = response.output[0].content
    assert [entry.token for entry in content.logprobs] == ["a", "b"]


def test_a_response_is_kept_read_again_and_deleted(client: openai.OpenAI) -> None:
    made = client.responses.create(model=MODEL, input="hello")
    assert client.responses.retrieve(made.id).output_text == "hello"
    [item] = client.responses.input_items.list(made.id).data
    assert item.role == "user"
    client.responses.delete(made.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(made.id)


def test_items_come_in_pages_in_the_order_that_is_asked_for(client: openai.OpenAI) -> None:
    said = [{"role": "user", "content": word} for word in "abc"]
    made = client.responses.create(model=MODEL, input=said)
    items = client.responses.input_items

    def texts(found: Iterable[Any]) -> list[str]:
        return [item.content[0].text for item in found]

    assert texts(items.list(made.id)) == ["c", "b", "a"]
    first = items.list(made.id, order="asc", limit=2)
    assert texts(first.data) == ["a", "b"] and first.has_more
    assert texts(first) == ["a", "b", "c"]  # their client turns the pages


@pytest.mark.parametrize(
    ("path", "param"),
    [
        ("/input_items?limit=0", "limit"),
        ("/input_items?order=any", "order"),
        ("/input_items?after=item_9", "after"),
        ("/input_items?befor=item_0", "befor"),
        ("?starting_after=3", "starting_after"),
        ("?stream=maybe", "stream"),
        ("?include[]=output", "include"),
    ],
)
def test_a_parameter_that_cannot_be_honoured_is_refused_by_name(
    client: openai.OpenAI, http: httpx.Client, path: str, param: str
) -> None:
    made = client.responses.create(model=MODEL, input="x")
    refused = http.get(f"/v1/responses/{made.id}{path}")
    assert refused.status_code == 400 and refused.json()["error"]["param"] == param


def test_a_position_that_is_not_a_number_is_refused(http: httpx.Client) -> None:
    body = {"model": MODEL, "input": "x", "background": True}
    path = f"/v1/responses/{http.post('/v1/responses', json=body).json()['id']}"
    many = "9" * 5000

    def refused(path: str, **headers: str) -> str | None:
        answer = http.get(path, headers=headers)
        assert answer.status_code == 400
        return answer.json()["error"]["param"]

    assert refused(f"{path}?stream=true&starting_after={many}") == "starting_after"
    assert refused(f"{path}?stream=true", **{"last-event-id": "x"}) == "last-event-id"
    assert refused(f"{path}/input_items?limit={many}") == "limit"


def test_a_follow_up_of_nothing_names_its_field(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(model=MODEL, input="x", previous_response_id="resp_none")
    assert caught.value.param == "previous_response_id"
    assert caught.value.code == "previous_response_not_found"
    assert caught.value.body["details"] == {"code": "invalid_request"}


#: What OpenAI's reference lists of a response, whatever was asked.
FIELDS = {
    *("id", "object", "created_at", "completed_at", "status", "incomplete_details", "model"),
    *("previous_response_id", "instructions", "output", "error", "tools", "tool_choice"),
    *("truncation", "parallel_tool_calls", "text", "top_p", "presence_penalty"),
    *("frequency_penalty", "top_logprobs", "temperature", "reasoning", "usage"),
    *("max_output_tokens", "max_tool_calls", "store", "background", "service_tier", "metadata"),
    *("safety_identifier", "prompt_cache_key"),
}


def test_a_response_has_every_field_of_openais_and_repeats_what_was_asked(
    http: httpx.Client,
) -> None:
    began_s = int(time.time())
    plain = http.post("/v1/responses", json={"model": MODEL, "input": "x"}).json()
    assert set(plain) >= FIELDS
    for field in ("created_at", "completed_at"):
        assert type(plain[field]) is int and began_s <= plain[field] <= time.time()
    assert plain["text"] == {"format": {"type": "text"}, "verbosity": "medium"}
    assert plain["reasoning"] == {"effort": None, "summary": None}
    assert (plain["store"], plain["max_tool_calls"], plain["presence_penalty"]) == (True, None, 0)
    asked = {
        "presence_penalty": 0.5,
        "frequency_penalty": -0.5,
        "max_tool_calls": 3,
        "store": False,
        "safety_identifier": "someone",
        "prompt_cache_key": "mine",
        "reasoning": {"effort": "low", "summary": "auto"},
    }
    shown = {"type": "function", "name": "f", "parameters": {}, "description": None}
    full = http.post(
        "/v1/responses",
        json={
            "model": MODEL,
            "input": "x",
            **asked,
            "text": {"verbosity": "low"},
            "tools": [{"type": "function", "name": "f", "parameters": {}}],
        },
    ).json()
    assert {name: full[name] for name in asked} == asked
    assert full["text"] == {"format": {"type": "text"}, "verbosity": "low"}
    assert full["tools"] == [{**shown, "strict": False}]
    cut = http.post("/v1/responses", json={"model": MODEL, "input": "xyz", "max_output_tokens": 1})
    assert (cut.json()["status"], cut.json()["completed_at"]) == ("incomplete", None)


def test_a_follow_up_of_what_still_runs_is_refused(client: openai.OpenAI) -> None:
    made = client.responses.create(model=MODEL, input=SLOW, background=True)
    with pytest.raises(openai.BadRequestError, match="still runs") as caught:
        client.responses.create(model=MODEL, input="x", previous_response_id=made.id)
    assert caught.value.param == "previous_response_id"
    client.responses.cancel(made.id)
    follow = client.responses.create(model=MODEL, input="x", previous_response_id=made.id)
    assert follow.output_text == "x"


def test_a_background_response_outlives_its_reader_and_is_read_on(
    client: openai.OpenAI, gateway: GatewayProcess
) -> None:
    text = "[[echo mode=sampled answer_tokens=60 step_delay_ms=10]]x"
    stream = client.responses.create(
        model=MODEL, input=text, background=True, stream=True, extra_body={"seed": 5}
    )
    heard = []
    for event in stream:
        heard.append(event)
        if len(heard) == 12:
            break
    stream.close()
    id_ = heard[0].response.id
    rest = list(
        client.responses.retrieve(id_, stream=True, starting_after=heard[-1].sequence_number)
    )
    events = heard + rest
    assert [event.sequence_number for event in events] == list(range(len(events)))
    whole = client.responses.create(model=MODEL, input=text, extra_body={"seed": 5})
    said = "".join(e.delta for e in events if e.type == "response.output_text.delta")
    assert said == whole.output_text == client.responses.retrieve(id_).output_text


def test_a_background_response_is_polled_and_cancelled(
    client: openai.OpenAI, gateway: GatewayProcess
) -> None:
    made = client.responses.create(model=MODEL, input=SLOW, background=True)
    assert made.status == "queued"
    wait_until(lambda: client.responses.retrieve(made.id).status == "in_progress", "a start")
    assert client.responses.cancel(made.id).status == "cancelled"
    wait_until(lambda: gateway.bus.running() == 0, "a free slot")


def test_what_failed_in_the_background_is_read_as_its_end(client: openai.OpenAI) -> None:
    made = client.responses.create(model="nope", input="x", background=True)
    wait_until(lambda: client.responses.retrieve(made.id).status == "failed", "the failure")
    [event] = client.responses.retrieve(made.id, stream=True)
    assert event.type == "response.failed"
    assert event.response.error is not None and event.response.error.code == "model_not_found"
    # A caller that asks for it now learns this from its status.
    with pytest.raises(openai.NotFoundError):
        client.responses.create(model="nope", input="x", background=True, stream=True)


def test_a_failing_response_ends_with_its_error(client: openai.OpenAI) -> None:
    events = list(
        client.responses.create(model=MODEL, input="[[echo error_at=2]]abcdef", stream=True)
    )
    assert events[-1].type == "response.failed"
    assert events[-1].response.error.code == "server_error"
    with pytest.raises(openai.InternalServerError):
        client.responses.create(model=MODEL, input="[[echo error_at=0]]abcdef", stream=True)


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"prompt": {"id": "p"}}, "prompt"),
        ({"foo": 1}, "foo"),
        ({"input": [{"type": "mcp_call"}]}, "input[0].type"),
        ({"input": [{"role": "user", "content": [{"type": "input_file"}]}]}, "input[0].content[0]"),
        # The body becomes a chat with fields of its own, which no error names.
        (
            {
                "instructions": "i",
                "input": [
                    {"type": "reasoning"},
                    {"role": "user", "content": [{"type": "input_image", "image_url": "ftp://x"}]},
                ],
            },
            "input[1].content[0].image_url",
        ),
        ({"input": [{"type": "reasoning"}]}, "input"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"include": ["output"]}, "include"),
        ({"background": True, "store": False}, "background"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "name": "f"}}, "tool_choice"),
        ({"min_tokens": 9, "max_output_tokens": 2}, "min_tokens"),
        ({"seed": 1 << 63}, "seed"),
        ({"reasoning": {"mode": "pro"}}, "reasoning.mode"),
        ({"tools": [{"type": "function", "name": "f", "x": 1}]}, "tools[0].x"),
        ({"tools": [{"type": "robot"}]}, "tools[0].type"),
        ({"tool_choice": {"type": "mcp", "server_label": "s"}}, "tool_choice.type"),
        ({"input": [{"type": "item_reference", "id": 1}]}, "input[0].id"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(
    client: openai.OpenAI, change: dict[str, object], param: str
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(**{"model": MODEL, "input": "x"}, extra_body=change)
    assert caught.value.param == param
