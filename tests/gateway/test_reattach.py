"""Resuming an answer after a lost connection: the running one, or the same one elsewhere."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import httpx2 as httpx
import pytest

from tests.gateway.conftest import MODEL, GatewayProcess
from tests.gateway.test_chat import CALL, TOOLS
from tests.harness import Bus, wait_until

PATH = "/v1/chat/completions"


def body(text: str, **more: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": text}]
    return {"model": MODEL, "messages": messages, "stream": True, **more}


#: One answer, fast, and so slow that even on a busy machine a reader is back while it runs.
QUICK = body("[[echo mode=sampled answer_tokens=200]]x", seed=4, n=2)
SLOW = body("[[echo mode=sampled answer_tokens=200 step_delay_ms=20]]x", seed=4, n=2)


def events(answer: httpx.Response) -> Iterator[tuple[str | None, str]]:
    """(id, data) of the events of a stream, as they arrive."""
    assert answer.status_code == 200, answer.read()
    id_ = None
    for line in answer.iter_lines():
        if line.startswith("id: "):
            id_ = line[4:]
        elif line.startswith("data: "):
            yield id_, line[6:]


def read(
    http: httpx.Client, method: str = "POST", path: str = PATH, stop_after: int = 10**6, **kw: Any
) -> list[tuple[str | None, str]]:
    """The events of a request; leaves after `stop_after` of them."""
    found = []
    with http.stream(method, path, **kw) as answer:
        for event in events(answer):
            found.append(event)
            if len(found) >= stop_after:
                break
    return found


def texts(found: list[tuple[str | None, str]], choices: int = 2) -> list[str]:
    told = [""] * choices
    for _, data in found:
        if data != "[DONE]":
            for choice in json.loads(data)["choices"]:
                told[choice["index"]] += choice["delta"].get("content") or ""
    return told


def answer_id(found: list[tuple[str | None, str]]) -> str:
    return str(json.loads(found[0][1])["id"])


def test_a_running_answer_resumes_where_it_was_left(
    gateway: GatewayProcess, http: httpx.Client
) -> None:
    whole = texts(read(http, json=QUICK))
    heard = read(http, json=SLOW, headers={"x-reattach": "20"}, stop_after=20)
    assert gateway.bus.running() > 0
    rest = read(
        http, "GET", f"{PATH}/{answer_id(heard)}", headers={"last-event-id": heard[-1][0] or ""}
    )
    assert rest[-1][1] == "[DONE]"
    assert texts(heard + rest) == whole
    # It can be read again from the start as long as it is kept.
    assert texts(read(http, "GET", f"{PATH}/{answer_id(heard)}")) == whole


def test_a_regenerated_answer_also_resumes_where_it_was_left(http: httpx.Client) -> None:
    whole = texts(read(http, json=QUICK))
    heard = read(http, json=SLOW, stop_after=30)
    for reading in (("POST", PATH), ("GET", f"{PATH}/{answer_id(heard)}")):
        last = {"last-event-id": heard[-1][0] or "", "x-reattach": "20"}
        heard += read(http, *reading, json=SLOW, headers=last, stop_after=10)
    last = {"last-event-id": heard[-1][0] or ""}
    heard += read(http, "GET", f"{PATH}/{answer_id(heard)}", headers=last)
    assert texts(heard) == whole and heard[-1][1] == "[DONE]"
    # The gateway's copy begins in the middle, and it does not pretend to have the rest.
    early = http.get(f"{PATH}/{answer_id(heard)}", headers={"last-event-id": heard[5][0] or ""})
    assert early.status_code == 404 and "again" in early.json()["error"]["message"]
    again = read(http, json=SLOW, headers={"last-event-id": heard[5][0] or ""})
    assert texts(heard[:6] + again) == whole


def test_an_answer_beyond_the_memory_limit_is_read_completely_and_an_unread_one_is_ended(
    make_gateway: Callable[..., GatewayProcess],
) -> None:
    long = "[[echo mode=sampled answer_tokens=12000]]x"
    with make_gateway("--store-bytes", "30000").http() as http:
        whole = texts(read(http, json=body(long, seed=4)), 1)
        kept = read(http, json=body(long, seed=4), headers={"x-reattach": "20"})
        assert texts(kept, 1) == whole
        asked = {"model": MODEL, "input": long, "background": True}
        path = f"/v1/responses/{http.post('/v1/responses', json=asked).json()['id']}"
        ended = wait_until(
            lambda: (found := http.get(path).json())["status"] == "failed" and found, "the end"
        )
        assert ended["error"]["details"]["code"] == "overloaded"
        assert "--store-bytes" in ended["error"]["message"]
        # An answer too large to keep is delivered completely, and not kept at all.
        made = http.post("/v1/responses", json={**asked, "background": False, "input": "y" * 20000})
        assert len(made.json()["output"][0]["content"][0]["text"]) > 10_000
        assert http.get(f"/v1/responses/{made.json()['id']}").status_code == 404


def test_the_same_request_goes_on_at_another_gateway(
    http: httpx.Client, make_gateway: Callable[..., GatewayProcess]
) -> None:
    drawn = {name: value for name, value in SLOW.items() if name != "seed"}
    heard = read(http, json=drawn, stop_after=25)
    other = make_gateway()
    with other.http() as elsewhere:
        last = {"last-event-id": heard[-1][0] or ""}
        rest = read(elsewhere, json=drawn, headers=last)
        again = read(elsewhere, json=drawn, headers={"last-event-id": rest[0][0] or ""})
    assert answer_id(rest) == answer_id(heard)
    seed = int(answer_id(heard)[9:25], 16)
    assert texts(heard + rest) == texts(read(http, json={**QUICK, "seed": seed}))
    assert texts(heard + rest[:1] + again) == texts(heard + rest)


def test_a_completion_goes_on_at_another_gateway(
    http: httpx.Client, make_gateway: Callable[..., GatewayProcess]
) -> None:
    path = "/v1/completions"
    prompts = ["[[echo mode=sampled answer_tokens=40 step_delay_ms=5]]x", "[[echo]]short"]
    asked = {"model": MODEL, "prompt": prompts, "stream": True, "n": 2, "logprobs": 0}

    def told(found: list[tuple[str | None, str]]) -> tuple[list[str], list[list[int]]]:
        texts, offsets = [""] * 4, [[] for _ in range(4)]
        for _, data in found:
            for choice in json.loads(data)["choices"] if data != "[DONE]" else []:
                texts[choice["index"]] += choice["text"]
                if choice["logprobs"]:
                    offsets[choice["index"]] += choice["logprobs"]["text_offset"]
        return texts, offsets

    heard = read(http, path=path, json=asked, stop_after=25)
    with make_gateway().http() as elsewhere:
        last = {"last-event-id": heard[-1][0] or ""}
        rest = read(elsewhere, path=path, json=asked, headers=last)
    assert answer_id(rest) == answer_id(heard)
    seed = int(answer_id(heard)[5:21], 16)
    whole = told(read(http, path=path, json={**asked, "seed": seed}))
    assert told(heard + rest) == whole
    # An id of the other endpoint is not valid here.
    wrong = {"last-event-id": f"chatcmpl-{'0' * 32}:1:0"}
    assert http.post(path, json=asked, headers=wrong).status_code == 400


def test_tool_calls_resume_without_a_character_lost_or_doubled(http: httpx.Client) -> None:
    asked = body(f"Let me see. {CALL}", tools=TOOLS)
    whole = read(http, json=asked)

    def told(found: list[tuple[str | None, str]]) -> tuple[str, str, int]:
        text, arguments, begun = "", "", 0
        for _, data in found:
            for choice in json.loads(data)["choices"] if data != "[DONE]" else []:
                text += choice["delta"].get("content") or ""
                for call in choice["delta"].get("tool_calls") or []:
                    begun += "id" in call
                    arguments += call["function"].get("arguments", "")
        return text, arguments, begun

    for cut in (3, len(whole) // 2, len(whole) - 4):
        rest = read(http, json=asked, headers={"last-event-id": whole[cut][0] or ""})
        assert told(whole[: cut + 1] + rest) == told(whole)


def test_a_lost_reader_that_does_not_come_back_frees_the_slot(
    gateway: GatewayProcess, http: httpx.Client
) -> None:
    long = body("[[echo mode=sampled answer_tokens=30000 step_delay_ms=20]]x")
    read(http, json=long, headers={"x-reattach": "3"}, stop_after=3)
    assert gateway.bus.running() == 1
    wait_until(lambda: gateway.bus.running() == 0, "a free slot")


def test_a_reader_that_leaves_before_the_first_token_cannot_come_back(
    gateway: GatewayProcess, http: httpx.Client
) -> None:
    waiting = body("[[echo prefill_ms=900000]]x")
    with pytest.raises(httpx.ReadTimeout):
        http.post(PATH, json=waiting, headers={"x-reattach": "600"}, timeout=0.15)
    wait_until(lambda: gateway.bus.running() == 0, "a free slot")


def test_a_stream_outlives_its_worker_and_its_broker(
    make_bus: Callable[..., Bus], make_gateway: Callable[..., GatewayProcess]
) -> None:
    own = make_bus(workers=2)
    with make_gateway(bus=own).http() as http:
        whole = texts(read(http, json={**QUICK, "n": 1}), 1)
        found = []
        with http.stream("POST", PATH, json={**SLOW, "n": 1}) as answer:
            for event in events(answer):
                found.append(event)
                if len(found) == 10:
                    [running] = [row["name"] for row in own.rows() if row["running"]]
                    own.workers.pop(running).kill()
                if len(found) == 40:
                    own.broker.kill()
                    own.start_broker()
        assert texts(found, 1) == whole
        assert found[-1][1] == "[DONE]"


def test_a_kept_answer_is_cancelled_by_name(gateway: GatewayProcess, http: httpx.Client) -> None:
    long = body("[[echo mode=sampled answer_tokens=30000 step_delay_ms=20]]x")
    heard = read(http, json=long, headers={"x-reattach": "20"}, stop_after=3)
    assert http.post(f"{PATH}/{answer_id(heard)}/cancel").json()["cancelled"] is True
    wait_until(lambda: gateway.bus.running() == 0, "a free slot")
    assert http.get(f"{PATH}/{answer_id(heard)}").status_code == 404


@pytest.mark.parametrize("header", ["x", "chatcmpl-1:2:3", "chatcmpl-" + "0" * 32 + ":1:x"])
def test_a_foreign_event_id_is_refused(http: httpx.Client, header: str) -> None:
    answer = http.post(PATH, json=body("x"), headers={"last-event-id": header})
    assert answer.status_code == 400


def test_an_error_reaches_the_reader_of_a_kept_answer(http: httpx.Client) -> None:
    kept = {"x-reattach": "5"}
    assert http.post(PATH, json=body("x", model="nope"), headers=kept).status_code == 404
    found = read(http, json=body("[[echo error_at=2]]abcdef"), headers=kept)
    assert json.loads(found[-2][1])["error"]["code"] == "engine_error"
