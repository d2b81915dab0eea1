"""Answers in both clients: several at once, tool calls, typed values."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import pickle
import subprocess
import sys
from typing import Any, Literal, TypedDict

import msgspec
import pydantic
import pytest

import client as library
from broker.protocol import codec, limits, messages
from broker.protocol.errors import ErrorInfo
from broker.protocol.header import MessageType
from client import (
    AsyncClient,
    BusError,
    Client,
    Completion,
    End,
    EngineError,
    InvalidAnswer,
    InvalidRequest,
    Retry,
    Started,
    Tokens,
    ToolCall,
)
from tests.harness import MYPY, ROOT
from tests.wire.scripted_broker import ScriptedBroker, end, fail, spell, tokens

NO_RETRY = Retry(attempts=0)
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string"},
                "days": {"type": "integer", "minimum": 1},
            },
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}


def called(arguments: Any, name: str = "weather") -> str:
    """A call as Hermes and Qwen models write it."""
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


def requests_of(broker: ScriptedBroker, count: int = 1) -> list[messages.Request]:
    bodies = broker.wait_for(MessageType.REQUEST, count)
    return [codec.decode(messages.Request, body, limits.MAX_REQUEST_BYTES) for body in bodies]


class Invoice(pydantic.BaseModel):
    """A shop's invoice."""

    number: int
    paid: bool = False


@dataclasses.dataclass
class Point:
    x: int
    y: int


class Ticket(TypedDict):
    title: str
    kind: Literal["bug", "wish"]


class Node(msgspec.Struct):
    value: int
    next: Node | None = None


# --- several answers ------------------------------------------------------------------------------


def test_n_answers_are_separate_requests_with_consecutive_seeds() -> None:
    with ScriptedBroker() as broker, Client(broker.address) as bus:
        answers = bus.chat("abc", model="demo", n=3, seed=(1 << 63) - 2)
        sent = requests_of(broker, 3)
    assert [answer.text for answer in answers] == ["abc"] * 3
    seeds = [(1 << 63) - 2, (1 << 63) - 1, 0]
    assert [answer.seed for answer in answers] == seeds
    assert sorted(request.params.seed for request in sent) == sorted(seeds)


def test_n_answers_are_streamed_together_each_with_its_number() -> None:
    def differ(broker: ScriptedBroker, id_: bytes, request: messages.Request, _: object) -> None:
        letter = "abc"[request.params.seed]
        broker.send(MessageType.ACCEPTED, id_, messages.Accepted(worker="w1"))
        broker.output(*(tokens(id_, letter, offset) for offset in range(3)), end(id_, 3))

    with ScriptedBroker(differ) as broker, Client(broker.address) as bus:
        texts = ["", "", ""]
        for choice, piece in bus.chat("x", model="demo", n=3, seed=0, stream=True).text:
            texts[choice] += piece
        stream = bus.generate("x", model="demo", n=2, seed=1, stream=True)
        kinds: list[list[type]] = [[], []]
        for choice, event in stream:
            kinds[choice].append(type(event))
        answers = stream.result()
    assert texts == ["aaa", "bbb", "ccc"]
    assert kinds == [[Started, Tokens, Tokens, Tokens, End]] * 2
    assert [answer.text for answer in answers] == ["bbb", "ccc"], "also after it was read"


def test_the_async_client_returns_n_answers_too() -> None:
    async def talk(address: str) -> None:
        async with AsyncClient(address) as bus:
            answers = await bus.chat("abc", model="demo", n=2, seed=4)
            assert [(answer.text, answer.seed) for answer in answers] == [("abc", 4), ("abc", 5)]
            texts = ["", ""]
            async for choice, piece in (await bus.chat("xyz", n=2, stream=True)).text:
                texts[choice] += piece
            assert texts == ["xyz", "xyz"]
            stream = await bus.generate("xy", n=2, stream=True)
            assert [choice async for choice, _ in stream].count(1) == 4
            assert [answer.text for answer in await stream.result()] == ["xy", "xy"]

    with ScriptedBroker() as broker:
        asyncio.run(talk(broker.address))


def endless(broker: ScriptedBroker, id_: bytes, request: messages.Request, _: object) -> None:
    broker.send(MessageType.ACCEPTED, id_, messages.Accepted(worker="w1"))
    broker.output(tokens(id_, "a"))


def test_a_caller_that_stops_reading_n_answers_cancels_all_of_them() -> None:
    with ScriptedBroker(endless) as broker, Client(broker.address) as bus:
        for _, piece in bus.chat("x", model="demo", n=3, stream=True).text:
            assert piece == "a"
            break
        broker.wait_for(MessageType.CANCEL, 3)

    async def leave(address: str) -> None:
        async with AsyncClient(address) as bus:
            async for _ in await bus.chat("x", model="demo", n=3, stream=True):
                break
            await asyncio.to_thread(broker.wait_for, MessageType.CANCEL, 3)

    with ScriptedBroker(endless) as broker:
        asyncio.run(leave(broker.address))


def test_the_failure_of_one_answer_ends_all() -> None:
    def one_fails(
        broker: ScriptedBroker, id_: bytes, request: messages.Request, rest: list[bytes]
    ) -> None:
        if request.params.seed == 1:
            fail(ErrorInfo(code="engine_error", message="scripted"))(broker, id_, request, rest)
        else:
            endless(broker, id_, request, rest)

    async def ask(address: str) -> None:
        async with AsyncClient(address, retry=NO_RETRY) as bus:
            with pytest.raises(EngineError, match="scripted"):
                await bus.chat("x", model="demo", n=2, seed=0)
            await asyncio.to_thread(broker.wait_for, MessageType.CANCEL)

    with ScriptedBroker(one_fails) as broker:
        asyncio.run(ask(broker.address))
    with ScriptedBroker(one_fails) as broker, Client(broker.address, retry=NO_RETRY) as bus:
        with pytest.raises(EngineError, match="scripted"):
            bus.chat("x", model="demo", n=2, seed=0)
        broker.wait_for(MessageType.CANCEL)


@pytest.mark.parametrize("n", [0, -1, 129, 1.5, True, "3"])
def test_an_impossible_number_of_answers_is_refused_before_anything_is_sent(n: Any) -> None:
    with Client("tcp://127.0.0.1:1") as bus, pytest.raises(InvalidRequest, match=r"from 1 to 128"):
        bus.chat("x", n=n)


# --- tools ----------------------------------------------------------------------------------------


def test_a_call_is_read_from_the_answer_with_its_arguments_by_name() -> None:
    text = f"Let me look. {called({'city': 'Graz', 'days': 2})}"
    with ScriptedBroker() as broker, Client(broker.address) as bus:
        answer = bus.chat(text, model="demo", tools=[WEATHER])
        (request,) = requests_of(broker)
    (call,) = answer.tool_calls
    assert (answer.text, call.name) == ("Let me look.", "weather")
    assert call.arguments == {"city": "Graz", "days": 2} == json.loads(call.arguments_json)
    assert call.parsed is call.arguments
    assert len(answer.token_ids) == len(text), (
        "the ids are those of the whole text, markup included"
    )
    # The marks of calls may be special tokens, which a worker skips unless asked for them.
    assert "<tool_call>" in request.params.keep_special
    assert request.tools == [WEATHER]


def test_a_stream_yields_a_call_when_it_is_complete_and_shows_no_markup() -> None:
    text = f"One: {called({'city': 'Graz'})}{called({'city': 'Wien'})}"

    async def read(address: str) -> list[Any]:
        async with AsyncClient(address) as bus:
            stream = await bus.chat(text, model="demo", tools=[WEATHER], stream=True)
            return [event async for event in stream]

    with ScriptedBroker() as broker, Client(broker.address) as bus:
        stream = bus.chat(text, model="demo", tools=[WEATHER], stream=True)
        events = list(stream)
        assert "".join(stream.result().text) == "One:"
        others = asyncio.run(read(broker.address))
    for seen in (events, others):
        calls = [event for event in seen if isinstance(event, ToolCall)]
        assert [call.arguments["city"] for call in calls] == ["Graz", "Wien"]
        assert seen.index(calls[0]) < seen.index(calls[1]) < len(seen) - 1
        assert "".join(e.text for e in seen if isinstance(e, Tokens | End)) == "One:"
        assert len({call.id for call in calls}) == 2


def test_the_next_request_accepts_the_answer_and_the_tools_result_unchanged() -> None:
    with ScriptedBroker() as broker, Client(broker.address) as bus:
        answer = bus.chat(called({"city": "Graz"}), model="demo", tools=[WEATHER])
        (call,) = answer.tool_calls
        result = {"role": "tool", "tool_call_id": call.id, "content": "12 degrees"}
        bus.chat(["weather?", answer.message, result], model="demo", tools=[WEATHER])
        said = requests_of(broker, 2)[1].messages or []
    assert [message.role for message in said] == ["user", "assistant", "tool"]
    (sent,) = said[1].tool_calls or []
    assert (sent["id"], sent["function"]["name"]) == (said[2].tool_call_id, "weather")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"days": 2}, '"city" is a required property'),
        ({"city": "Graz", "days": "two"}, "at days: .*integer"),
        ({"city": "Graz", "days": 0}, "at days: .*minimum"),
        ({"city": "Graz", "colour": 1}, "colour"),
    ],
)
def test_arguments_that_do_not_fit_the_schema_raise_where_they_are_read(
    arguments: Any, message: str
) -> None:
    with ScriptedBroker() as broker, Client(broker.address) as bus:
        answer = bus.chat(called(arguments), model="demo", tools=[WEATHER])
    (call,) = answer.tool_calls
    with pytest.raises(InvalidAnswer, match=f"call of 'weather' do not fit its schema.*{message}"):
        _ = call.arguments
    assert json.loads(call.arguments_json) == arguments, "the raw text remains available"


def test_a_call_cut_off_by_the_end_is_marked_as_cut() -> None:
    def cut(broker: ScriptedBroker, id_: bytes, request: messages.Request, _: object) -> None:
        text = '<tool_call>{"name": "weather", "arguments": {"city": "Gr'
        broker.send(MessageType.ACCEPTED, id_, messages.Accepted(worker="w1"))
        length = messages.FinishReason.LENGTH
        broker.output(tokens(id_, text), end(id_, len(text), reason=length))

    with ScriptedBroker(cut) as broker, Client(broker.address) as bus:
        answer = bus.chat("x", model="demo", tools=[WEATHER])
    (call,) = answer.tool_calls
    assert (answer.text, call.cut, call.arguments_json) == ("", True, '{"city": "Gr')
    for read in ("arguments", "parsed"):
        with pytest.raises(InvalidAnswer, match=r"cut.*raise max_tokens"):
            getattr(call, read)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"type": "objekt"}, "not a JSON schema: .*objekt"),
        ({"$ref": "http://127.0.0.1:9/schema.json"}, "not a JSON schema: .*stands outside"),
        ({"$ref": "#/$defs/None"}, "not a JSON schema"),
    ],
)
def test_a_malformed_tool_schema_is_refused_and_nothing_is_fetched(
    parameters: dict[str, Any], message: str
) -> None:
    tool = {"type": "function", "function": {"name": "weather", "parameters": parameters}}
    with ScriptedBroker() as broker, Client(broker.address) as bus:
        answer = bus.chat(called({}), model="demo", tools=[tool])
    with pytest.raises(InvalidRequest, match=message):
        _ = answer.tool_calls[0].arguments


def test_hostile_output_of_a_model_disturbs_no_other_stream() -> None:
    """Even if it nests deeply: calls are parsed in the thread that serves all streams."""
    deep = "<tool_call>" + '{"name": ' + "[" * 50_000
    arguments = called({"city": "x"}).replace('"x"', "[" * 50_000 + "]" * 50_000)

    def write(broker: ScriptedBroker, id_: bytes, request: messages.Request, _: object) -> None:
        text = deep + "]" * 50_000 + ', "arguments": {}}' if request.params.seed else arguments
        broker.send(MessageType.ACCEPTED, id_, messages.Accepted(worker="w1"))
        broker.output(tokens(id_, text, count=1), end(id_, 1))

    with ScriptedBroker(write) as broker, Client(broker.address) as bus:
        other = bus.chat("x", model="demo", tools=[WEATHER], seed=1)
        assert other.tool_calls == [] and other.text.startswith("<tool_call>")
        (call,) = bus.chat("x", model="demo", tools=[WEATHER], seed=0).tool_calls
        with pytest.raises(InvalidAnswer):
            _ = call.arguments


def test_a_class_is_a_tool_and_its_call_an_instance() -> None:
    with ScriptedBroker() as broker, Client(broker.address) as bus:
        text = called({"number": 7}, "Invoice") + called({"x": 1, "y": 2}, "Point")
        answer = bus.chat(text, model="demo", tools=[Invoice, Point])
        (request,) = requests_of(broker)
    first, second = answer.tool_calls
    assert first.parsed == Invoice(number=7) and first.arguments == {"number": 7}
    assert second.parsed == Point(1, 2)
    functions = [tool["function"] for tool in request.tools or []]
    assert [function["name"] for function in functions] == ["Invoice", "Point"]
    assert functions[0]["description"] == "A shop's invoice."
    assert functions[1]["parameters"]["required"] == ["x", "y"]


def test_arguments_that_do_not_fit_the_class_raise() -> None:
    with ScriptedBroker() as broker, Client(broker.address) as bus:
        answer = bus.chat(called({"number": "many"}, "Invoice"), model="demo", tools=[Invoice])
    for read in ("arguments", "parsed"):
        with pytest.raises(InvalidAnswer, match=r"call of 'Invoice' do not fit Invoice: number: "):
            getattr(answer.tool_calls[0], read)


@pytest.mark.parametrize(
    ("choice", "text"),
    [
        ("required", '[{"name":"weather","arguments":{"city":"Graz"}}]'),
        (
            {"type": "function", "function": {"name": "weather"}},
            '{"name":"weather","arguments":{"city":"Graz"}}',
        ),
    ],
)
def test_a_forced_answer_consists_of_calls_only(choice: Any, text: str) -> None:
    with ScriptedBroker() as broker, Client(broker.address) as bus:
        answer = bus.chat(text, model="demo", tools=[WEATHER], tool_choice=choice)
        (request,) = requests_of(broker)
    constraint = request.params.constraint
    assert constraint is not None and constraint.type == "json_schema"
    assert answer.text == "" and answer.tool_calls[0].arguments == {"city": "Graz"}


def test_without_tools_or_with_tool_choice_none_the_answer_is_text() -> None:
    text = called({"city": "Graz"})
    shape = {"type": "json_object"}
    with ScriptedBroker() as broker, Client(broker.address) as bus:
        for options in (
            {},
            {"tools": []},
            {"tools": [WEATHER], "tool_choice": "none"},
            {"tools": [WEATHER], "response_format": shape},
        ):
            answer = bus.chat(text, model="demo", **options)  # type: ignore[call-overload]
            assert (answer.text, answer.tool_calls) == (text, [])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"tools": WEATHER}, "tools is not a list"),
        ({"tools": [3]}, "a tool cannot be of type int"),
        ({"tools": [WEATHER], "tool_choice": "any"}, "'any'.*\"required\""),
        (
            {"tools": [WEATHER], "tool_choice": {"function": {"name": "wet"}}},
            "'wet'.*weather",
        ),
        ({"tool_choice": "required"}, "needs tools"),
        (
            {"tools": [WEATHER], "tool_choice": "required", "constraint": {"type": "json_object"}},
            "give one of them",
        ),
        ({"response_format": "json"}, "response_format is 'json'"),
        ({"response_format": {"type": "json_schema"}}, "response_format is"),
        ({"response_format": object}, "object has no JSON schema"),
        ({"response_format": Point, "constraint": {"type": "json_object"}}, "give one of them"),
    ],
)
def test_an_impossible_option_is_refused_before_anything_is_sent(
    wrong: dict[str, Any], message: str
) -> None:
    with Client("tcp://127.0.0.1:1") as bus, pytest.raises(InvalidRequest, match=message):
        bus.chat("x", **wrong)


# --- values of a type -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("type_", "text", "value"),
    [
        (Invoice, '{"number": 7, "paid": true}', Invoice(number=7, paid=True)),
        (Point, '{"x": 1, "y": 2}', Point(1, 2)),
        (Ticket, '{"title": "t", "kind": "bug"}', {"title": "t", "kind": "bug"}),
        (Node, '{"value": 1, "next": {"value": 2}}', Node(1, Node(2))),
        (list[int], "[1, 2]", [1, 2]),
        ({"type": "json_object"}, '{"a": 1}', {"a": 1}),
        ({"type": "json_schema", "json_schema": {"schema": {"type": "array"}}}, "[]", []),
    ],
)
def test_an_answer_is_parsed_into_its_response_format(type_: Any, text: str, value: Any) -> None:
    async def ask(address: str) -> list[Completion[Any]]:
        async with AsyncClient(address) as bus:
            whole = await bus.chat(text, model="demo", response_format=type_)
            streamed = await bus.chat(text, model="demo", response_format=type_, stream=True)
            several = await bus.generate(text, model="demo", response_format=type_, n=1)
            return [whole, await streamed.result(), *several]

    with ScriptedBroker() as broker, Client(broker.address) as bus:
        answer = bus.chat(text, model="demo", response_format=type_)
        (request, *_) = requests_of(broker)
        others = asyncio.run(ask(broker.address))
    assert [one.parsed for one in (answer, *others)] == [value] * 4
    assert answer.parsed is answer.parsed and answer.text == text
    constraint = request.params.constraint
    assert constraint is not None and constraint.type.startswith("json_")


def test_the_schema_of_a_class_has_its_fields_at_the_top() -> None:
    with ScriptedBroker() as broker, Client(broker.address) as bus:
        for type_ in (Point, Node):
            bus.chat('{"x": 1, "y": 1, "value": 1}', model="demo", response_format=type_)
        sent = [request.params.constraint for request in requests_of(broker, 2)]
    point, node = (constraint.value for constraint in sent if constraint is not None)
    assert point["required"] == ["x", "y"] and "$defs" not in point
    assert {"$ref": "#/$defs/Node"} in node["properties"]["next"]["anyOf"]
    assert "Node" in node["$defs"], "it refers to itself"


def test_an_answer_that_does_not_fit_raises_where_it_is_parsed() -> None:
    with ScriptedBroker() as broker, Client(broker.address) as bus:
        answer = bus.chat('{"number": "x"}', model="demo", response_format=Invoice)
        plain = bus.chat("abc", model="demo")
    with pytest.raises(InvalidAnswer, match=r"does not fit Invoice: number: "):
        _ = answer.parsed
    with pytest.raises(ValueError):  # for programs that catch Python's own exception
        _ = answer.parsed
    assert answer.text == '{"number": "x"}' and plain.parsed is None


def test_the_error_for_an_answer_that_was_cut_says_what_to_do() -> None:
    def cut(broker: ScriptedBroker, id_: bytes, request: messages.Request, _: object) -> None:
        broker.send(MessageType.ACCEPTED, id_, messages.Accepted(worker="w1"))
        broker.output(tokens(id_, '{"x": '), end(id_, 6, reason=messages.FinishReason.LENGTH))

    with ScriptedBroker(cut) as broker, Client(broker.address) as bus:
        answer = bus.chat("x", model="demo", response_format=Point)
    with pytest.raises(InvalidAnswer, match=r"not fit Point.*not complete: raise max_tokens"):
        _ = answer.parsed


def test_answers_can_be_pickled() -> None:
    text = called({"x": 1, "y": 2}, "Point")
    with ScriptedBroker() as broker, Client(broker.address) as bus:
        calling = bus.chat(text, model="demo", tools=[Point])
        typed = bus.chat('{"x": 1, "y": 2}', model="demo", response_format=Point)
    assert pickle.loads(pickle.dumps(calling)).tool_calls[0].parsed == Point(1, 2)
    assert pickle.loads(pickle.dumps(typed)).parsed == Point(1, 2)


def test_neither_pydantic_nor_a_schema_checker_is_loaded_unless_the_program_does() -> None:
    program = (
        "import dataclasses, sys\n"
        "from client import calls\n"
        "from client.options import Retry, Timeout\n"
        "P = dataclasses.make_dataclass('P', [('x', int)])\n"
        "options = {'tools': [P], 'tool_choice': 'required'}\n"
        "made = calls.chat(calls.Defaults(Timeout(), Retry()), None, 'x', (), options)\n"
        "assert made.reading.tools[0].name == 'P'\n"
        "print({'pydantic', 'jsonschema_rs'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "set()"


def test_without_the_checker_arguments_raise_instead_of_being_unchecked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with ScriptedBroker() as broker, Client(broker.address) as bus:
        answer = bus.chat(called({"city": "Graz"}), model="demo", tools=[WEATHER])
    monkeypatch.setitem(sys.modules, "jsonschema_rs", None)
    with pytest.raises(ImportError, match=r"tokenbus\[tools\].*arguments_json"):
        _ = answer.tool_calls[0].arguments


def test_a_type_checker_knows_the_result_of_each_call() -> None:
    api = pytest.importorskip("mypy.api")
    program = (
        "import dataclasses\n"
        "from client import AsyncChoiceStream, AsyncClient, ChoiceStream, Client, Completion\n"
        "@dataclasses.dataclass\n"
        "class P:\n"
        "    x: int\n"
        "bus = Client()\n"
        'a: int = bus.chat("hi", response_format=P).parsed.x\n'
        'b: int = bus.chat("demo", "hi", response_format=P, stream=True).result().parsed.x\n'
        'c: list[Completion] = bus.chat("hi", n=3)\n'
        'd: ChoiceStream = bus.chat("hi", n=3, stream=True)\n'
        'e: list[P] = [one.parsed for one in bus.generate("hi", n=3, response_format=P)]\n'
        'f: Completion = bus.chat("hi", response_format={"type": "json_object"}, tools=[P])\n'
        "async def main(bus: AsyncClient) -> None:\n"
        '    a: int = (await bus.chat("hi", response_format=P)).parsed.x\n'
        '    c: list[Completion] = await bus.chat("hi", n=3)\n'
        '    d: AsyncChoiceStream = await bus.chat("hi", n=3, stream=True)\n'
        'bus.chat("hi", response_format=P).parsed.z\n'
        'bus.chat("hi", n="three")\n'
    )
    report, errors, _ = api.run([*MYPY, "-c", program])
    assert not errors
    wrong = [line for line in report.splitlines() if ": error" in line]
    assert [line.split(":")[1] for line in wrong] == ["17", "18"], report


def test_the_types_of_answers_are_public() -> None:
    for name in ("AsyncChoiceStream", "ChoiceStream", "InvalidAnswer", "ToolCall"):
        assert name in library.__all__ and hasattr(library, name)
    assert issubclass(InvalidAnswer, BusError) and issubclass(InvalidAnswer, ValueError)


def test_the_scripted_model_repeats_its_prompt() -> None:
    """All tests above rely on this."""
    with ScriptedBroker(spell) as broker, Client(broker.address) as bus:
        assert bus.chat(called({"a": 1}), model="demo").text == called({"a": 1})
