"""A model that really thinks and calls tools, as OpenAI's SDK sees it: the bundled tool caller."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from openai import BadRequestError, OpenAI, Stream

from tests.gateway.conftest import running_gateway
from tests.harness import Bus

pytest.importorskip("torch")

MODEL = "demo-tools"
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the current weather.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
        },
    },
}
TIMER: Any = {
    "type": "function",
    "function": {
        "name": "set_timer",
        "description": "Set a timer.",
        "parameters": {
            "type": "object",
            "properties": {"minutes": {"type": "integer"}},
            "required": ["minutes"],
        },
    },
}
TOOLS = [WEATHER, TIMER]


@pytest.fixture(scope="module")
def bus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bus]:
    bus = Bus(tmp_path_factory.mktemp("caller"))
    try:
        bus.start_broker()
        for name in ("one", "two"):
            bus.start_worker(name, "--model-path", MODEL, "--slots", "4", engine=None)
        bus.wait_ready(2)
        yield bus
    finally:
        bus.stop()


@pytest.fixture(scope="module")
def client(bus: Bus) -> Iterator[OpenAI]:
    with running_gateway(bus) as gateway, gateway.openai() as client:
        yield client


def ask(client: OpenAI, question: str, **options: Any) -> Any:
    messages = [{"role": "user", "content": question}]
    return client.chat.completions.create(
        **{"model": MODEL, "messages": messages, "tools": TOOLS, "temperature": 0, **options}
    )


def calls_of(message: Any) -> list[tuple[str, Any]]:
    return [
        (call.function.name, json.loads(call.function.arguments))
        for call in message.tool_calls or []
    ]


def test_it_thinks_and_calls_a_tool_with_typed_arguments(client: OpenAI) -> None:
    [choice] = ask(client, "Set a timer for 12 minutes.").choices
    assert choice.message.reasoning == "The user asks for a timer of 12 minutes. I call set_timer."
    assert calls_of(choice.message) == [("set_timer", {"minutes": 12})]
    assert (choice.message.content or "", choice.finish_reason) == ("", "tool_calls")


def test_it_answers_from_the_result_of_its_call(client: OpenAI) -> None:
    question = {"role": "user", "content": "What is the weather in Lisbon?"}
    message = ask(client, question["content"]).choices[0].message
    assert calls_of(message) == [("get_weather", {"city": "Lisbon"})]
    result = {
        "role": "tool",
        "tool_call_id": message.tool_calls[0].id,
        "content": '{"temperature": 21, "sky": "sunny"}',
    }
    answer = client.chat.completions.create(
        model=MODEL,
        messages=[question, message, result],  # type: ignore[list-item]
        tools=TOOLS,
        temperature=0,
    )
    assert answer.choices[0].message.content == "It is 21 degrees and sunny in Lisbon."
    assert answer.choices[0].finish_reason == "stop"


def test_two_calls_are_two_and_one_where_only_one_is_allowed(client: OpenAI) -> None:
    question = "What is the weather in Rome and in Oslo?"
    [both] = ask(client, question).choices
    assert [city["city"] for _, city in calls_of(both.message)] == ["Rome", "Oslo"]
    [one] = ask(client, question, parallel_tool_calls=False).choices
    assert calls_of(one.message) == calls_of(both.message)[:1]


def strict(tool: Any, **parameters: Any) -> Any:
    """The tool with calls held to its schema, which is changed by these keywords."""
    schema = tool["function"]["parameters"] | {"additionalProperties": False} | parameters
    return {**tool, "function": {**tool["function"], "parameters": schema, "strict": True}}


FORCED = {"type": "function", "function": {"name": "get_weather"}}


def test_a_forced_call_is_the_one_that_the_model_would_make_and_may_be_thought_about(
    client: OpenAI,
) -> None:
    for choice, question, called in (
        ("required", "Set a timer for 12 minutes.", [("set_timer", {"minutes": 12})]),
        (FORCED, "What is the weather in Lisbon?", [("get_weather", {"city": "Lisbon"})]),
        (
            "required",
            "What is the weather in Rome and in Oslo?",
            [("get_weather", {"city": "Rome"}), ("get_weather", {"city": "Oslo"})],
        ),
    ):
        for thinks in (True, False):
            body = {"chat_template_kwargs": {"enable_thinking": thinks}}
            [made] = ask(client, question, tool_choice=choice, extra_body=body).choices
            assert calls_of(made.message) == called
            assert bool(getattr(made.message, "reasoning", None)) == thinks
            assert not made.message.content


def test_a_forced_call_calls_where_the_model_would_talk_and_fits_its_schema(client: OpenAI) -> None:
    place = {"$ref": "#/$defs/Place"}
    schema = {"properties": {"city": place}, "$defs": {"Place": {"enum": ["Graz", "Linz"]}}}
    [made] = ask(
        client, "Thank you!", tools=[strict(WEATHER, **schema)], tool_choice=FORCED
    ).choices
    [(name, arguments)] = calls_of(made.message)
    assert name == "get_weather" and arguments["city"] in ("Graz", "Linz")


def test_a_strict_tool_holds_its_calls_and_leaves_text_free(client: OpenAI) -> None:
    cities = {"type": "string", "enum": ["Graz", "Linz"]}
    tools = [strict(WEATHER, properties={"city": cities}), TIMER]
    [made] = ask(client, "What is the weather in Lisbon?", tools=tools).choices
    [(name, arguments)] = calls_of(made.message)
    assert name == "get_weather" and arguments["city"] in ("Graz", "Linz")
    assert made.message.reasoning and made.finish_reason == "tool_calls"
    [made] = ask(client, "Set a timer for 12 minutes.", tools=tools).choices
    assert calls_of(made.message) == [("set_timer", {"minutes": 12})]
    [made] = ask(client, "Thank you!", tools=tools).choices
    assert (made.message.content, made.message.tool_calls) == ("You are welcome!", None)


def test_a_strict_tool_beside_a_constraint_is_refused_by_its_name(client: OpenAI) -> None:
    body = {"structured_outputs": {"regex": "a+"}}
    with pytest.raises(BadRequestError, match="a strict tool cannot be enforced"):
        ask(client, "Hello!", tools=[strict(WEATHER)], extra_body=body)


def test_it_does_not_think_if_it_is_told_not_to(client: OpenAI) -> None:
    told = {"chat_template_kwargs": {"enable_thinking": False}}
    [choice] = ask(client, "Hello!", extra_body=told).choices
    assert choice.message.content == "Hello! How can I help you?"
    assert not getattr(choice.message, "reasoning", None)


def test_talk_calls_nothing(client: OpenAI) -> None:
    [choice] = ask(client, "Thank you!").choices
    assert (choice.message.content, choice.message.tool_calls) == ("You are welcome!", None)


def told_by(stream: Stream[Any]) -> Iterator[tuple[str, str]]:
    """What each chunk adds: thoughts, text, names and arguments of calls."""
    for chunk in stream:
        for choice in chunk.choices:
            for call in choice.delta.tool_calls or []:
                yield "name", call.function.name or ""
                yield "arguments", call.function.arguments or ""
            yield "thought", getattr(choice.delta, "reasoning", None) or ""
            yield "text", choice.delta.content or ""


def joined(told: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Neighbours of a kind as one."""
    whole: list[tuple[str, str]] = []
    for kind, text in told:
        if text and whole and whole[-1][0] == kind:
            whole[-1] = (kind, whole[-1][1] + text)
        elif text:
            whole.append((kind, text))
    return whole


HELD: dict[str, Any] = {
    "free": {},
    "forced": {"tool_choice": "required"},
    "strict": {"tools": [strict(WEATHER), strict(TIMER)], "temperature": 0.4, "seed": 5},
}


@pytest.mark.parametrize(
    ("within", "how"),
    [
        ("thought", "free"),
        ("name", "free"),
        ("arguments", "free"),
        ("name", "forced"),
        ("arguments", "forced"),
        ("arguments", "strict"),
    ],
)
def test_a_worker_killed_in_the_middle_changes_nothing(
    bus: Bus, client: OpenAI, within: str, how: str
) -> None:
    question = "What is the weather in Athens and in Seoul?"
    with ask(client, question, stream=True, **HELD[how]) as stream:
        undisturbed = joined(list(told_by(stream)))
    assert [kind for kind, _ in undisturbed] == ["thought", *["name", "arguments"] * 2]
    struck = ""
    for _ in range(20):  # a whole answer takes a fraction of a second, and may be over first
        told: list[tuple[str, str]] = []
        with ask(client, question, stream=True, **HELD[how]) as stream:
            for kind, text in told_by(stream):
                told.append((kind, text))
                if kind == within and text and not struck and (struck := _busy(bus)):
                    bus.workers.pop(struck).kill()
        assert joined(told) == undisturbed
        if struck:
            break
    assert struck, "every answer was over before the kill"
    bus.start_worker(struck, "--model-path", MODEL, "--slots", "4", engine=None)
    bus.wait_ready(2)


def _busy(bus: Bus) -> str:
    """The worker that runs a request, if one still does."""
    running = [one["name"] for one in bus.client().workers() if one["running"]]
    return running[0] if running else ""
