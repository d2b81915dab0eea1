"""Decisions through real processes: library, command line, a killed worker."""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from client import (
    AsyncClient,
    ChoiceAnswer,
    Client,
    Decisions,
    InvalidRequest,
    NoulAnswer,
    ScoreAnswer,
)
from tests.harness import PATIENCE_S, Bus, wait_until
from tests.wire.test_client_cli import run

STATE = "I was charged twice and want my money back."
QUESTIONS: dict[str, Any] = {
    "refund": {"type": "noul", "instructions": "Is a refund asked for?"},
    "tone": {
        "type": "choice",
        "instructions": "What is the tone?",
        "criteria": {"calm": "A polite message", "angry": None},
    },
    "urgency": {"type": "score", "criteria": ["Can wait", "This week", "Today"]},
}
#: The start of a PNG: the echo engine does not decode the images of a decision.
IMAGE = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def client(bus: Bus) -> Any:
    with Client(bus.front) as made:
        yield made


def test_answers_are_typed_and_keyed_by_the_names_of_their_questions(client: Client) -> None:
    decided = client.decide("echo", STATE, QUESTIONS)
    assert list(decided) == list(QUESTIONS) and decided.model == "echo" and decided.worker
    assert decided.usage.prompt_tokens > 0 and decided.usage.completion_tokens == 0
    refund, tone, urgency = decided.values()
    assert isinstance(refund, NoulAnswer) and 0 < refund.noul < 1
    assert refund.probabilities == {"true": refund.noul, "false": 1 - refund.noul}
    assert isinstance(tone, ChoiceAnswer) and set(tone.probabilities) == {"calm", "angry"}
    assert tone.choice == max(tone.probabilities, key=tone.probabilities.__getitem__)
    assert isinstance(urgency, ScoreAnswer) and urgency.legend["1"] == "This week"
    expected = sum(int(level) * share for level, share in urgency.probabilities.items())
    assert urgency.score == pytest.approx(expected)
    for answer in decided.values():
        assert sum(answer.probabilities.values()) == pytest.approx(1)


def test_both_clients_agree_and_a_question_alone_has_the_same_answer_as_among_others(
    bus: Bus, client: Client
) -> None:
    async def ask() -> list[Decisions]:
        async with AsyncClient(bus.front) as other:
            alone = [
                other.decide(None, STATE, {name: question}) for name, question in QUESTIONS.items()
            ]
            return [*await asyncio.gather(other.decide("echo", STATE, QUESTIONS), *alone)]

    whole, *alone = asyncio.run(ask())
    assert whole.answers == client.decide("echo", STATE, QUESTIONS).answers
    assert {name: answer for one in alone for name, answer in one.items()} == whole.answers


def test_images_make_a_difference_wherever_they_are_named(client: Client) -> None:
    question = {"refund": QUESTIONS["refund"]}
    ways: list[tuple[str, Any]] = [
        (STATE, [IMAGE]),
        (f"{STATE} <image-1>", [IMAGE]),
        (f"{STATE} photo", {"photo": IMAGE}),
    ]
    for state, images in ways:
        seen = client.decide("echo", state, question, images=images)["refund"]
        assert seen != client.decide("echo", state, question)["refund"], state
    asked = {"same": {"type": "noul", "instructions": "Is <image-1> like <image-2>?"}}
    assert client.decide("echo", {"a": 1}, asked, images=[IMAGE, IMAGE])


@pytest.mark.parametrize(
    ("state", "questions", "images", "word"),
    [
        (STATE, {}, (), "at least one"),
        (STATE, [QUESTIONS["tone"]], (), "a dict from names"),
        (STATE, {"tone": "calm?"}, (), "'tone' is a dict"),
        (STATE, {"tone": {"criteria": {"a": None}}}, (), "'tone' needs a type"),
        (STATE, {"tone": {"type": "noul", "threshold": 1}}, (), "no field 'threshold'"),
        (STATE, {"tone": {"type": "choice"}}, (), "'tone' has no allowed answers"),
        (STATE, {"tone": {"type": "rank"}}, (), "unknown type 'rank'"),
        (STATE, {str(i): QUESTIONS["tone"] for i in range(65)}, (), "at most 64"),
        (STATE, QUESTIONS, {"photo": IMAGE}, "'photo' stands neither"),
        ({"a": "b"}, QUESTIONS, [IMAGE], "<image-1> is named nowhere"),
        (None, QUESTIONS, (), "`state`"),
    ],
)
def test_a_mistake_is_reported_before_anything_is_sent(
    client: Client, state: Any, questions: Any, images: Any, word: str
) -> None:
    with pytest.raises(InvalidRequest, match=word):
        client.decide("echo", state, questions, images=images)


def test_an_unknown_option_is_refused(client: Client) -> None:
    with pytest.raises(TypeError, match="temperature"):
        client.decide("echo", STATE, QUESTIONS, temperature=0)  # type: ignore[call-arg]


def test_decisions_are_rerun_when_their_worker_is_killed(make_bus: Callable[..., Bus]) -> None:
    # A stopped worker is not missed before its connection breaks, however busy the machine.
    bus = make_bus(2, "--worker-heartbeat-s", "60")
    client = bus.client()
    right = client.decide("echo", STATE, QUESTIONS).answers
    client.hold("w2")
    bus.workers["w1"].signal(signal.SIGSTOP)
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(client.decide, "echo", STATE, QUESTIONS, timeout=PATIENCE_S)
        wait_until(lambda: bus.running() == 1, "a request at the stopped worker")
        client.release("w2")
        bus.workers["w1"].kill()
        decided = asked.result(PATIENCE_S)
    assert decided.worker == "w2" and decided.answers == right


def test_a_models_kinds_include_decide(client: Client) -> None:
    assert "decide" in client.models()[0]["kinds"]


def test_the_command_line_asks_typed_questions(bus: Bus, tmp_path: Path) -> None:
    more = tmp_path / "more.json"
    more.write_text(json.dumps({"tone": QUESTIONS["tone"]}))
    asked = ("--noul", "refund=Is a refund asked for?", "--questions", str(more))
    asked += ("--score", "urgency=How urgent is it?|Can wait|Today")
    done = run("decide", "--broker", bus.front, "--json", *asked, STATE)
    answers = json.loads(done.stdout)["answers"]
    assert list(answers) == ["refund", "urgency", "tone"]
    assert answers["urgency"]["legend"] == {"0": "Can wait", "1": "Today"}
    shown = run("decide", "--broker", bus.front, *asked, STATE).stdout
    assert "refund" in shown and "angry" in shown and "%" in shown


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        ((), "no questions"),
        (("--noul", "refund"), "NAME=QUESTION"),
        (("--noul", "a=b|c"), "true or false"),
        (("--choice", "tone=Which?|a|a"), "twice"),
        (("--choice", "tone=Which?"), "no allowed answers"),
        (("--noul", "a=b", "--noul", "a=c"), "two questions have the name 'a'"),
    ],
)
def test_the_command_line_refuses_questions_that_cannot_be_answered(
    bus: Bus, flags: tuple[str, ...], word: str
) -> None:
    done = run("decide", "--broker", bus.front, *flags, STATE)
    assert done.returncode == 2 and word in done.stderr
