"""`--response-folder`: a stored response outlives its gateway. Another one that has the folder
reads it, goes on from it, and finishes it behind the last event that any reader may have."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import openai
import pytest

from client.gateway import requests as http
from client.gateway.keys import add_key
from client.gateway.openai.responses_body import ResponseRequest, as_chat
from client.gateway.openai.responses_folder import Journal, Record, ResponseFolder
from tests.gateway.conftest import MODEL, GatewayProcess, running_gateway
from tests.gateway.test_responses_rejoin import (  # noqa: F401
    PATH,
    TOOLS,
    WITHIN,
    anonymous,
    asked,
    check_numbers,
    httpx_post,
    read_until,
    rest_of,
    story,
    thinkers,
    told,
)
from tests.harness import Bus, wait_until

MakeGateway = Callable[..., GatewayProcess]
SLOW = "[[echo mode=sampled answer_tokens=120 step_delay_ms=20]]x"
ENDLESS = "[[echo mode=sampled answer_tokens=30000 step_delay_ms=20]]x"


@pytest.fixture
def pair(
    make_gateway: MakeGateway, tmp_path: Path
) -> Iterator[tuple[GatewayProcess, GatewayProcess]]:
    """Two gateways that share a folder and do not know of each other."""
    folder = str(tmp_path / "responses")
    yield make_gateway("--response-folder", folder), make_gateway("--response-folder", folder)


def read_on(gateway: GatewayProcess, id_: str, after: int) -> Any:
    with gateway.http() as client:
        answer = client.get(f"{PATH}/{id_}?stream=true&starting_after={after}")
        assert answer.status_code == 200, answer.text
        return told(answer.text)


@pytest.mark.parametrize("kind", WITHIN)
def test_a_response_in_the_background_goes_on_when_its_gateway_was_killed(
    thinkers: Bus,  # noqa: F811
    tmp_path: Path,
    kind: str,
) -> None:
    body, folder = asked(WITHIN[kind], background=True), str(tmp_path / "responses")
    options = ("--response-folder", folder)
    with running_gateway(thinkers, *options) as first, running_gateway(thinkers, *options) as other:
        heard = read_until(first, kind, body)
        id_, last = heard[0][1]["response"]["id"], heard[-1][1]["sequence_number"]
        whole = [*heard, *read_on(other, id_, last)]
        check_numbers(whole)
        undisturbed = told(httpx_post(other, {**body, "seed": int(id_[-32:-16], 16)}))
        assert anonymous(story(whole)) == anonymous(story(undisturbed))
        # Whoever was less far, or asks with the event's id, gets the very same events.
        again = [*heard[:3], *read_on(other, id_, 2)]
        assert again == whole
        assert [*heard[:4], *rest_of(other, body, heard[3][0])] == whole
        shown = other.openai().responses.retrieve(id_)
        assert shown.status == "completed"


def test_a_running_response_goes_on_at_the_first_that_is_asked(
    pair: tuple[GatewayProcess, GatewayProcess],
) -> None:
    first, second = pair
    body = {"model": MODEL, "input": SLOW, "background": True, "stream": True, "seed": 5}
    heard = read_until(first, "response.output_text.delta", body, 9)
    id_ = heard[0][1]["response"]["id"]
    with second.openai() as client:
        # Its status alone is enough to have it finished.
        client.responses.retrieve(id_)
        done = wait_until(
            lambda: (found := client.responses.retrieve(id_)).status == "completed" and found,
            "its end",
        )
        assert done.usage.output_tokens == 120
        whole = [*heard, *read_on(second, id_, heard[-1][1]["sequence_number"])]
        check_numbers(whole)
        said = [event["delta"] for _, event in whole if event["type"].endswith("text.delta")]
        assert "".join(said) == done.output_text
        assert client.responses.input_items.list(id_).data[0].role == "user"


def test_what_a_dead_gateway_kept_is_read_gone_on_from_and_deleted(
    pair: tuple[GatewayProcess, GatewayProcess],
) -> None:
    first, second = pair
    with first.openai() as here, second.openai() as there:
        made = here.responses.create(model=MODEL, input="hello", metadata={"a": "b"})
        alive = there.responses.retrieve(made.id)
        first.process.kill()
        assert alive == there.responses.retrieve(made.id) == made
        after = there.responses.create(model=MODEL, input="and?", previous_response_id=made.id)
        assert after.output_text == "and?"
        assert len(there.responses.input_items.list(made.id).data) == 1
        there.responses.delete(made.id)
        with pytest.raises(openai.NotFoundError):
            there.responses.retrieve(made.id)


def test_what_is_deleted_or_cancelled_at_one_gateway_is_so_at_the_other(
    pair: tuple[GatewayProcess, GatewayProcess],
) -> None:
    with pair[0].openai() as here, pair[1].openai() as there:
        made = here.responses.create(model=MODEL, input="hello")
        there.responses.delete(made.id)
        with pytest.raises(openai.NotFoundError):
            here.responses.retrieve(made.id)
        runs = here.responses.create(model=MODEL, input=ENDLESS, background=True)
        with pytest.raises(openai.NotFoundError):
            there.responses.retrieve(runs.id)  # its gateway makes it, and is to be asked
        here.responses.cancel(runs.id)
        assert there.responses.retrieve(runs.id).status == "cancelled"
    wait_until(lambda: pair[0].bus.running() == 0, "a free slot")


def test_no_other_key_finds_it_there_and_what_is_not_to_be_stored_is_not(
    make_gateway: MakeGateway, tmp_path: Path
) -> None:
    keys, folder = tmp_path / "keys.toml", tmp_path / "responses"
    alice, bob = add_key(keys, "alice"), add_key(keys, "bob")
    options = ("--keys", str(keys), "--response-folder", str(folder))
    first, second = make_gateway(*options), make_gateway(*options)
    with first.openai(api_key=alice) as here, second.openai(api_key=bob) as other:
        made = here.responses.create(model=MODEL, input="hello")
        with pytest.raises(openai.NotFoundError):
            other.responses.retrieve(made.id)
        here.responses.create(model=MODEL, input="hello", store=False)
        assert [path.stem for path in folder.iterdir()] == [made.id]
        assert all(path.stat().st_mode & 0o077 == 0 for path in (folder, *folder.iterdir()))


def test_a_record_is_what_was_asked_with_every_kind_of_field() -> None:
    body = msgspec.json.decode(
        msgspec.json.encode(
            {
                "model": "m",
                "input": [
                    {"type": "message", "role": "user", "content": "x"},
                    {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
                    {"type": "function_call_output", "call_id": "c", "output": "y"},
                ],
                "tools": TOOLS,
                "tool_choice": {"type": "function", "name": "get_weather"},
                "text": {"format": {"type": "json_schema", "name": "s", "schema": {}}},
                "reasoning": {"effort": "low"},
                "priority": 3,
                "background": True,
            }
        ),
        type=ResponseRequest,
    )
    record = Record(owner="o", body=body, chat=as_chat(body, []), size_bytes=1)
    again = msgspec.json.decode(msgspec.json.encode(record), type=Record)
    assert again == record and isinstance(again.chat, http.ChatRequest)


def test_an_event_that_was_cut_is_none_and_the_lock_is_of_one(tmp_path: Path) -> None:
    folder = ResponseFolder(tmp_path, 1 << 30)
    id_ = f"resp_{'0' * 40}"
    body = ResponseRequest(model="m", input="x")
    record = Record(owner="o", body=body, chat=as_chat(body, []), size_bytes=1)
    journal = folder.begin(id_, record)
    assert journal is not None and folder.find(id_, "o") is None
    journal.add([b"id: 1\ndata: a\n\n", b"id: 2\nda"])
    journal.close()
    found = folder.find(id_, "o")
    assert found is not None and found.journal is not None
    assert found.events == [b"id: 1\ndata: a\n\n"]
    with pytest.raises(BlockingIOError):
        Journal(tmp_path / f"{id_}.events")
    found.journal.close()
    assert folder.find(id_, "other") is None and folder.find("resp_/../x", "o") is None


def test_the_oldest_that_are_over_make_room_and_none_that_runs(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = ResponseFolder(tmp_path, 1 << 30)
    body = ResponseRequest(model="m", input="x" * 1000)
    record = Record(owner="o", body=body, chat=as_chat(body, []), size_bytes=1)
    over = msgspec.structs.replace(record, final={"id": "x"})
    ids = [f"resp_{number:040x}" for number in range(6)]
    running, resting, *ended = ids
    runs = folder.begin(running, record)
    rests = folder.begin(resting, record)
    assert runs is not None and rests is not None
    rests.close()  # its gateway was lost
    for id_ in ended:
        journal = folder.begin(id_, over)
        assert journal is not None
        journal.add([b"data: x\n\n"])
        journal.close()
    for age, id_ in enumerate(reversed(ids)):
        for path in tmp_path.glob(f"{id_}.*"):
            os.utime(path, (time.time() - 100 + age,) * 2)
    each_bytes = sum(path.stat().st_size for path in tmp_path.glob(f"{ended[0]}.*"))
    # `ended[-1]` is the oldest of all.
    folder.tidy()
    assert len([id_ for id_ in ids if folder.has(id_)]) == 6
    with caplog.at_level("WARNING", "tokenbus.gateway"):
        folder.max_bytes = round(4.5 * each_bytes)
        folder.tidy()
        assert [id_ for id_ in ids if folder.has(id_)] == ids[:4]
        folder.max_bytes = 1
        folder.tidy()
        assert [id_ for id_ in ids if folder.has(id_)] == [running]
    assert len(caplog.messages) == 1 and "--response-bytes" in caplog.messages[0]
    assert {path.stem for path in tmp_path.iterdir()} == {running}
    runs.close()


def test_one_that_rests_goes_after_those_that_are_over(tmp_path: Path) -> None:
    folder = ResponseFolder(tmp_path, 1 << 30)
    body = ResponseRequest(model="m", input="x")
    record = Record(owner="o", body=body, chat=as_chat(body, []), size_bytes=1)
    resting, over = (f"resp_{number:040x}" for number in range(2))
    journal = folder.begin(resting, record)
    assert journal is not None
    journal.close()
    assert folder.keep(over, msgspec.structs.replace(record, final={"id": "x"}))
    for path in tmp_path.glob(f"{resting}.*"):
        os.utime(path, (time.time() - 100,) * 2)
    folder.max_bytes = sum(path.stat().st_size for path in tmp_path.iterdir()) - 1
    folder.tidy()
    assert folder.has(resting) and not folder.has(over)
