"""A response is read on at another gateway: exactly its rest, whatever was read and however the
answer arrives the second time."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Iterator
from typing import Any

import httpx2 as httpx
import pytest

from broker.protocol.messages import Piece, PieceKind, TokenLogprob, Usage
from broker.protocol.tool_parser import ToolCallParser
from client.gateway.openai.answers import Progress
from client.gateway.openai.generation import ChoiceEvent, Delta, Finish
from client.gateway.openai.position import Position
from client.gateway.openai.responses_body import ResponseRequest, as_chat
from client.gateway.openai.responses_output import ResponseBuilder
from tests.gateway.conftest import GatewayProcess, running_gateway
from tests.gateway.test_demo_caller import TIMER, WEATHER
from tests.gateway.test_position import CALLS, VISIT, all_of, ended
from tests.harness import Bus

PATH = "/v1/responses"
PREFIX = "resp_"
Told = list[tuple[str, dict[str, Any]]]
"""The id and the data of each event."""


def told(blocks: str) -> Told:
    found = []
    for block in blocks.strip().split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.split("\n") if line[0] != ":")
        if "data" in fields:
            found.append((fields.get("id", ""), json.loads(fields["data"])))
    return found


def story(events: Told) -> list[Any]:
    """The events as a reader has them: each with its fields, the deltas of an item joined, without
    what differs from run to run (how the prompt was cached, when the end came)."""
    said: list[Any] = []
    for _, event in events:
        event = {name: value for name, value in event.items() if name != "sequence_number"}
        if "response" in event:
            usage = {**(event["response"]["usage"] or {}), "input_tokens_details": None}
            event["response"] = {**event["response"], "completed_at": None, "usage": usage}
        last = said[-1] if said else {"type": ""}
        if event["type"] == last["type"] and event["type"].endswith(".delta"):
            last["delta"] += event["delta"]
            if "logprobs" in event:
                last["logprobs"] = last["logprobs"] + event["logprobs"]
            same = {"item_id", "output_index", "content_index"}
            assert all(last.get(name) == event.get(name) for name in same)
        else:
            said.append(event)
    return said


def check_numbers(events: Told) -> None:
    numbers = [event["sequence_number"] for _, event in events]
    assert numbers == list(range(len(numbers)))


# --- however it is cut ----------------------------------------------------------------------------

#: As sent by a worker that knows the model's syntax.
PIECES = [
    (PieceKind.REASONING, "First a thought."),
    (PieceKind.CONTENT, "Let me see."),
    (PieceKind.CALL, "f"),
    (PieceKind.ARGUMENTS, '{"a": "b"}'),
    (PieceKind.CALL, "f"),
    (PieceKind.ARGUMENTS, "{}"),
    (PieceKind.CONTENT, "So much for that."),
]


def tokens(pieces: bool) -> list[tuple[str | None, str, TokenLogprob]]:
    """Kind, text and log-probability of each token; marks between the kinds have no text."""
    parts = PIECES if pieces else [(PieceKind.CONTENT, CALLS)]
    found: list[tuple[str | None, str, TokenLogprob]] = []
    for kind, text in parts:
        if pieces:
            found.append((None, "", TokenLogprob(token=b"", logprob=-1.0 - len(found), top=[])))
        whole = kind is PieceKind.CALL
        for letters in [text] if whole else [text[at : at + 2] for at in range(0, len(text), 2)]:
            logprob = TokenLogprob(token=letters.encode(), logprob=-1.0 - len(found), top=[])
            found.append((kind.value, letters, logprob))
    return found


def batches(random_: random.Random, *, pieces: bool) -> list[list[ChoiceEvent]]:
    """The bus's answer in random batches."""
    left, made = tokens(pieces), []
    usage = Usage(prompt_tokens=3, completion_tokens=len(left))
    while left:
        count = random_.randint(1, 5)
        taken, left = left[:count], left[count:]
        logprobs = [logprob for _, _, logprob in taken]
        if pieces:
            split: list[Piece] = []
            for kind, text, _ in taken:
                if kind is not None and split and split[-1].kind == kind != PieceKind.CALL:
                    split[-1] = Piece(kind=kind, text=split[-1].text + text)
                elif kind is not None:
                    split.append(Piece(kind=kind, text=text))
            said = "".join(piece.text for piece in split if piece.kind == PieceKind.CONTENT)
            made.append([Delta(0, said, len(taken), logprobs, split)])
        else:
            made.append([Delta(0, "".join(text for _, text, _ in taken), len(taken), logprobs)])
    return [*made, [Finish(0, ended(usage))]]


def response(position: Position, made: list[list[ChoiceEvent]], **fields: Any) -> Told:
    body = ResponseRequest(model="m", input="x", **fields)
    builder = ResponseBuilder(VISIT, body, as_chat(body, []), Reading(), position)
    builder.progress = Progress(ToolCallParser(["f"]))

    async def work() -> list[bytes]:
        return [event async for events in builder.events(all_of(made)) for event in events]

    events = asyncio.run(work())
    return told(b"".join(events).decode()) if events else []


class Reading:
    """The part of a generation that the builder needs; nothing looks for calls in its text."""

    reading = None


@pytest.mark.parametrize("with_logprobs", [True, False])
@pytest.mark.parametrize("pieces", [True, False])
def test_a_reader_can_go_on_after_any_event_without_repetition_or_loss(
    pieces: bool, with_logprobs: bool
) -> None:
    random_ = random.Random(7)
    fields = {"include": ["message.output_text.logprobs"]} if with_logprobs else {}
    first = Position.first(PREFIX, 5, 1_700_000_000)
    whole = response(first, batches(random_, pieces=pieces), **fields)
    wanted = story(whole)
    check_numbers(whole)
    assert {event["type"] for _, event in whole} >= {
        "response.output_text.delta",
        "response.function_call_arguments.delta",
        "response.completed",
    }
    for read, (id_, _) in enumerate(whole):
        position = Position.read(PREFIX, id_)
        assert position is not None and position.answer == first.answer
        rest = response(position, batches(random_, pieces=pieces), **fields)
        together = [*whole[: read + 1], *rest]
        check_numbers(together)
        assert story(together) == wanted, id_
    created = whole[0][1]["response"]
    assert created["created_at"] == 1_700_000_000 and created["id"] == first.answer


# --- with a model that thinks and calls -----------------------------------------------------------

MODEL = "demo-tools"
TOOLS = [{"type": "function", **tool["function"]} for tool in (WEATHER, TIMER)]
CITIES = "What is the weather in Athens and in Seoul?"
#: By the event in the middle of which the gateway is killed: what is asked.
WITHIN = {
    "response.reasoning_text.delta": {"input": CITIES, "tools": TOOLS},
    "response.function_call_arguments.delta": {"input": CITIES, "tools": TOOLS},
    "response.output_text.delta": {"input": "Hello!", "include": ["message.output_text.logprobs"]},
}


@pytest.fixture(scope="module")
def thinkers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bus]:
    pytest.importorskip("torch")
    bus = Bus(tmp_path_factory.mktemp("rejoin"))
    try:
        bus.start_broker()
        bus.start_worker("one", "--model-path", MODEL, "--slots", "4", engine=None)
        bus.wait_ready(1)
        yield bus
    finally:
        bus.stop()


def asked(fields: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"model": MODEL, "stream": True, "temperature": 0.7, **fields, **more}


def read_until(gateway: GatewayProcess, kind: str, body: dict[str, Any], count: int = 2) -> Told:
    """The events up to the second of a kind; then the gateway is killed."""
    heard, mark = "", f"event: {kind}\n"
    with gateway.http() as http, http.stream("POST", PATH, json=body) as answer:
        assert answer.status_code == 200, answer.read()
        try:
            for text in answer.iter_text():
                heard += text
                if heard.count(mark) >= count and heard.endswith("\n\n"):
                    break
        finally:
            gateway.process.kill()
    # A small model may have been further already.
    read = told(heard)
    places = [place for place, (_, event) in enumerate(read) if event["type"] == kind]
    return read[: places[count - 1] + 1]


def rest_of(gateway: GatewayProcess, body: dict[str, Any], last_id: str) -> Told:
    with gateway.http() as http:
        answer = http.post(PATH, json=body, headers={"last-event-id": last_id})
        assert answer.status_code == 200, answer.text
        return told(answer.text)


@pytest.mark.parametrize("kind", WITHIN)
@pytest.mark.parametrize("background", [False, True])
def test_a_response_is_read_on_at_another_gateway_when_its_own_was_killed(
    thinkers: Bus, kind: str, background: bool
) -> None:
    body = asked(WITHIN[kind], background=background)
    with running_gateway(thinkers) as first, running_gateway(thinkers) as second:
        heard = read_until(first, kind, body)
        rest = rest_of(second, body, heard[-1][0])
        whole = [*heard, *rest]
        check_numbers(whole)
        # The same answer, undisturbed: the id contains its seed.
        id_ = heard[0][1]["response"]["id"]
        undisturbed = told(httpx_post(second, {**body, "seed": int(id_[-32:-16], 16)}))
        assert anonymous(story(whole)) == anonymous(story(undisturbed))
        # The gateway has what the reader has.
        with second.openai() as client:
            kept = client.responses.retrieve(id_)
            shown = httpx.get(f"{second.url}{PATH}/{id_}").json()
            assert shown["output"] == whole[-1][1]["response"]["output"]
            go_on = {"role": "user", "content": "Thank you!"}
            outputs = [
                {"type": "function_call_output", "call_id": item.call_id, "output": "21"}
                for item in kept.output
                if item.type == "function_call"
            ]
            after = client.responses.create(
                model=MODEL, input=[*outputs, go_on], previous_response_id=id_, temperature=0
            )
            assert after.status == "completed" and after.output


def httpx_post(gateway: GatewayProcess, body: dict[str, Any]) -> str:
    answer = httpx.post(f"{gateway.url}{PATH}", json=body, timeout=120)
    assert answer.status_code == 200, answer.text
    return answer.text


def anonymous(said: list[Any]) -> Any:
    """The same with ids numbered by first appearance, and without the time of creation. What else
    runs in the batch changes the last digits of a log-probability."""
    known: dict[str, str] = {}

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: plain(inner) for name, inner in value.items() if name != "created_at"}
        if isinstance(value, list):
            return [plain(inner) for inner in value]
        if isinstance(value, float):
            return round(value, 2)
        if isinstance(value, str) and value.startswith(("resp_", "msg_", "rs_", "fc_", "call_")):
            return known.setdefault(value, f"id {len(known)}")
        return value

    return plain(said)


def test_ids_of_other_endpoints_are_refused(thinkers: Bus) -> None:
    with running_gateway(thinkers) as gateway, gateway.http() as http:
        for wrong in ("7", f"chatcmpl-{'0' * 32}:1:0", f"resp_{'0' * 40}:1"):
            answer = http.post(PATH, json=asked({"input": "x"}), headers={"last-event-id": wrong})
            assert answer.status_code == 400, wrong
            assert answer.json()["error"]["param"] == "last-event-id"
