"""Resuming a stream: wherever it was left, and however it is cut into events the second time,
nothing is repeated and nothing is missing."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncGenerator, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from broker.protocol.messages import FinishReason, Timings, TokenLogprob, TopLogprob, Usage
from broker.protocol.tool_parser import ToolCallParser
from client.core.events import End
from client.gateway.errors import GatewayError
from client.gateway.openai import chat as openai_chat, completions as openai_completions
from client.gateway.openai.answers import ChatChoice
from client.gateway.openai.generation import ChoiceEvent, Delta, Finish
from client.gateway.openai.position import Position
from client.gateway.requests import ChatMessage, ChatRequest, CompletionRequest, StreamOptions

CALLS = (
    'Let me see.\n<tool_call>{"name": "f", "arguments": {"a": "b"}}</tool_call>\n'
    '<tool_call>{"name": "f", "arguments": {"c": 1}}</tool_call>'
)


def tokens_of(text: str, choice: int) -> list[tuple[str, TokenLogprob]]:
    """Tokens of one to three characters; every third one has no text of its own."""
    found, at, number = [], 0, 0
    while at < len(text):
        shown = text[at : at + (number % 3)]
        at += len(shown)
        top = [TopLogprob(token_id=number, token=b"x", logprob=-1.0)]
        token = TokenLogprob(token=f"{choice}.{number}".encode(), logprob=-1.0 - number, top=top)
        found.append((shown, token))
        number += 1
    return found


def cut(random_: random.Random, texts: Sequence[str]) -> list[list[ChoiceEvent]]:
    """The bus's answers, one request per text, in random batches."""
    left = [tokens_of(text, choice) for choice, text in enumerate(texts)]
    counts = [len(tokens) for tokens in left]
    over = [False] * len(texts)
    batches: list[list[ChoiceEvent]] = []
    while not all(over):
        choice = random_.choice([choice for choice, done in enumerate(over) if not done])
        batch: list[ChoiceEvent] = []
        for _ in range(random_.randint(1, 3)):
            count = random_.randint(1, 6)
            taken, left[choice] = left[choice][:count], left[choice][count:]
            if taken:
                text = "".join(shown for shown, _ in taken)
                batch.append(Delta(choice, text, len(taken), [token for _, token in taken]))
        if not left[choice]:
            over[choice] = True
            usage = Usage(prompt_tokens=3, completion_tokens=counts[choice])
            batch.append(Finish(choice, ended(usage)))
        batches.append(batch)
    return batches


def ended(usage: Usage) -> End:
    return End(
        finish_reason=FinishReason.STOP,
        text="",
        usage=usage,
        timings=Timings(),
        result=None,
        stopped_by=None,
        model="m",
        worker="w",
        resumed=0,
        first_token_s=None,
        total_s=0.0,
    )


async def all_of(batches: list[list[ChoiceEvent]]) -> AsyncGenerator[list[ChoiceEvent], None]:
    for batch in batches:
        yield batch


STREAMED = {"stream": True, "stream_options": StreamOptions(include_usage=True)}
VISIT = SimpleNamespace(
    gateway=SimpleNamespace(config=SimpleNamespace(reasoning_fields=("reasoning_content",))),
    saw_token=lambda: None,
    completion_tokens=0,
    prompt_tokens=0,
    request_id="req",
)


def chat(position: Position, batches: list[list[ChoiceEvent]], **fields: Any) -> list[bytes]:
    messages = [ChatMessage(role="user", content="x")]
    body = ChatRequest(model="m", messages=messages, **fields)
    choices = [ChatChoice(ToolCallParser(["f"])) for _ in range(body.n or 1)]
    return streamed(openai_chat.Answer(VISIT, body, choices, position, seed=1), batches)


def completion(position: Position, batches: list[list[ChoiceEvent]], **fields: Any) -> list[bytes]:
    body = CompletionRequest(model="m", prompt="x", **fields)
    return streamed(openai_completions._Answer(VISIT, body, 1, body.n or 1, position), batches)


def streamed(answer: Any, batches: list[list[ChoiceEvent]]) -> list[bytes]:
    async def work() -> list[bytes]:
        return [event async for events in answer.stream(all_of(batches)) for event in events]

    return asyncio.run(work())


def read(events: list[bytes]) -> Iterator[tuple[str, Any]]:
    """(id, chunk) of each event except the last."""
    assert events[-1] == b"data: [DONE]\n\n"
    for event in events[:-1]:
        id_, data = event.decode().rstrip("\n").split("\n")
        yield id_.removeprefix("id: "), json.loads(data.removeprefix("data: "))


def heard(chunks: list[Any], choices: int) -> dict[str, Any]:
    """Everything that a reader of these chunks has received."""
    told: list[dict[str, list[Any]]] = [
        {"roles": [], "text": [], "calls": [], "logprobs": [], "offsets": [], "finish": []}
        for _ in range(choices)
    ]
    for chunk in chunks:
        for choice in chunk["choices"]:
            mine = told[choice["index"]]
            delta = choice.get("delta", {})
            mine["roles"] += [delta["role"]] if "role" in delta else []
            mine["text"] += choice.get("text") or delta.get("content") or ""
            for call in delta.get("tool_calls") or []:
                function = call["function"]
                if "name" in function:
                    mine["calls"].append([function["name"], ""])
                mine["calls"][call["index"]][1] += function["arguments"]
            logprobs = choice.get("logprobs") or {}
            mine["logprobs"] += [one["token"] for one in logprobs.get("content") or []]
            mine["logprobs"] += logprobs.get("tokens") or []
            mine["offsets"] += logprobs.get("text_offset") or []
            mine["finish"] += [choice["finish_reason"]] if choice["finish_reason"] else []
    return {"choices": told, "usage": [chunk["usage"] for chunk in chunks if chunk.get("usage")]}


@pytest.mark.parametrize("with_logprobs", [True, False])
@pytest.mark.parametrize("make", [chat, completion])
def test_a_reader_can_resume_after_any_event_without_repetition_or_loss(
    make: Any, with_logprobs: bool
) -> None:
    random_ = random.Random(7)
    texts = [CALLS, "", "just text, no call"]
    prefix, asked = ("chatcmpl-", True) if make is chat else ("cmpl-", 1)
    fields = {**STREAMED, "n": len(texts), "logprobs": asked if with_logprobs else None}

    def answer(position: Position) -> list[tuple[str, Any]]:
        return list(read(make(position, cut(random_, texts), **fields)))

    def position(id_: str) -> Position:
        found = Position.read(prefix, id_)
        assert found is not None and found.answer == first.answer
        return found

    first = Position.first(prefix, 5)
    whole = answer(first)
    expected = heard([chunk for _, chunk in whole], 3)
    for choice in expected["choices"]:
        assert choice["finish"] and len(choice["finish"]) == 1
        assert choice["roles"] == (["assistant"] if make is chat else [])
        assert len(set(choice["logprobs"])) == len(choice["logprobs"])
    assert bool(expected["choices"][0]["logprobs"]) == with_logprobs
    assert len(expected["usage"]) == 1
    for place, (id_, _) in enumerate(whole):
        rest = answer(position(id_))
        chunks = [chunk for _, chunk in (*whole[: place + 1], *rest)]
        assert heard(chunks, 3) == expected, id_
        # And once more, from the middle of the rest.
        half = len(rest) // 2
        for again_id, _ in rest[half : half + 1]:
            again = answer(position(again_id))
            chunks = [chunk for _, chunk in (*whole[: place + 1], *rest[: half + 1], *again)]
            assert heard(chunks, 3) == expected, again_id


def test_events_after_the_last_choice_have_positions_of_their_own() -> None:
    events = list(
        read(chat(Position.first("chatcmpl-", 1), cut(random.Random(1), ["x"]), **STREAMED))
    )
    last = Position.read("chatcmpl-", events[-1][0])
    before = Position.read("chatcmpl-", events[-2][0])
    assert last is not None and before is not None
    assert (last.read_usage, before.read_usage) == (True, False)
    assert last.read_atoms == before.read_atoms == (3,)


@pytest.mark.parametrize(
    "read_", ["3.", ".3", "3-", "3.1.1", "3:usages", "3:", "x", "1-" * 128 + "1"]
)
def test_an_id_of_another_form_is_refused(read_: str) -> None:
    good = f"chatcmpl-{'0' * 32}:2:"
    assert Position.read("chatcmpl-", f"{good}3-4.5:usage") is not None
    with pytest.raises(GatewayError):
        Position.read("chatcmpl-", good + read_)
