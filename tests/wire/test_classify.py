"""Rerank and classify through real processes: library, command line, refusals, a killed worker."""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import Callable
from typing import Any

import pytest

from client import AsyncClient, Client, InvalidRequest
from client.calls import CLASSIFY_INPUTS_AT_ONCE
from tests.harness import Bus
from tests.wire.test_client_cli import run

QUERY = "red roses"
DOCUMENTS = ["the sky is blue", "red roses are red", "roses"]


@pytest.fixture
def client(bus: Bus) -> Any:
    with Client(bus.front) as made:
        yield made


def test_documents_are_returned_in_order_of_relevance(client: Client) -> None:
    ranked = client.rerank(QUERY, DOCUMENTS, model="echo")
    assert [(one.index, one.score) for one in ranked] == [(1, 1.0), (2, 0.5), (0, 0.0)]
    assert [one.document for one in ranked] == [DOCUMENTS[one.index] for one in ranked]
    assert len(ranked) == 3 and ranked[0].index == 1
    assert ranked.model == "echo" and ranked.worker and ranked.usage.prompt_tokens > 0
    assert [one.index for one in client.rerank(QUERY, DOCUMENTS, top_n=1)] == [1]


def test_documents_with_equal_scores_keep_their_order(client: Client) -> None:
    ranked = client.rerank("x", ["a", "b", "c"])
    assert [one.index for one in ranked] == [0, 1, 2]


def test_texts_pairs_and_token_ids_are_classified(client: Client) -> None:
    [one] = client.classify("aaab")
    assert one.label == "odd" and one.score == 0.75 == one.scores["odd"]
    assert list(one.scores) == ["even", "odd"]
    many = client.classify(["b", [97], "bb"], model="echo")
    assert [one.label for one in many] == ["even", "odd", "even"]
    assert many.labels == ["even", "odd"]
    [pair] = client.classify([("aa", "ab")])
    assert pair.scores == one.scores


def test_many_inputs_are_split_into_requests_and_joined_in_order(bus: Bus) -> None:
    texts = ["a" * (index % 3) + "b" for index in range(3 * CLASSIFY_INPUTS_AT_ONCE + 1)]

    async def ask() -> tuple[Any, Any]:
        async with AsyncClient(bus.front) as client:
            return await client.classify(texts), await client.rerank("b", texts)

    classified, ranked = asyncio.run(ask())
    shares = [one.scores["odd"] for one in classified]
    odd = [round(share * len(text)) for share, text in zip(shares, texts, strict=True)]
    assert odd == [index % 3 for index in range(len(texts))]
    assert sorted(one.index for one in ranked) == list(range(len(texts)))


@pytest.mark.parametrize(
    ("call", "word"),
    [
        (lambda c: c.rerank("x", []), "documents"),
        (lambda c: c.rerank("x", "one text"), "documents"),
        (lambda c: c.rerank(3, ["x"]), "str"),
        (lambda c: c.classify([]), "classify"),
        (lambda c: c.classify(["a", ("b", "c")]), "mixed"),
        (lambda c: c.classify([("a", "b", "c")]), "length 2"),
    ],
)
def test_a_mistake_is_reported_before_anything_is_sent(
    client: Client, call: Callable[[Client], Any], word: str
) -> None:
    with pytest.raises(InvalidRequest, match=word):
        call(client)
    with pytest.raises(TypeError, match="truncate"):
        client.classify("x", truncat=True)


def test_the_commands_print_for_people_and_for_scripts(bus: Bus) -> None:
    to = ("--broker", bus.front)
    shown = run("rerank", QUERY, *DOCUMENTS, "--top-n", "2", *to)
    lines = [line for line in shown.stdout.splitlines() if "roses" in line]
    assert shown.returncode == 0 and len(lines) == 2, shown.stdout + shown.stderr
    assert DOCUMENTS[1] in lines[0] and "0.5000" in lines[1]
    printed = run("rerank", QUERY, "--json", *to, stdin="\n".join(DOCUMENTS)).stdout.splitlines()
    assert json.loads(printed[0]) == {"index": 1, "score": 1.0, "document": DOCUMENTS[1]}
    printed = run("classify", "aaab", "b", "--json", *to).stdout.splitlines()
    assert [json.loads(line)["label"] for line in printed] == ["odd", "even"]
    assert "odd" in run("classify", "aaab", *to).stdout


def test_scores_survive_the_death_of_a_worker(make_bus: Callable[..., Bus]) -> None:
    bus = make_bus(workers=2)
    texts = ["a" * (index % 3) + "b" for index in range(40 * CLASSIFY_INPUTS_AT_ONCE)]
    with Client(bus.front) as client:
        wanted = client.classify(texts).results

        async def ask() -> Any:
            async with AsyncClient(bus.front) as other:
                asked = asyncio.create_task(other.classify(texts))
                await asyncio.sleep(0.005)
                next(iter(bus.workers.values())).signal(signal.SIGKILL)
                return await asked

        assert asyncio.run(ask()).results == wanted
