"""Streams of `/v1/messages` that are interrupted: by silence, by a worker's death, by a reader who
comes back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tests.gateway.conftest import GatewayProcess
from tests.gateway.test_messages import CALL, THINK, THOUGHT, TOOL, ask, events, said, sdk
from tests.harness import Bus


def test_a_killed_worker_changes_nothing_that_the_sdk_shows(
    make_bus: Callable[..., Bus], make_gateway: Callable[..., GatewayProcess]
) -> None:
    own = make_bus(workers=2)
    text = "[[echo mode=sampled answer_tokens=60 think_tokens=20 step_delay_ms=15]]x"
    body = said(text, thinking=THINK, extra_body={"seed": 7})
    with sdk(make_gateway(bus=own).url) as claude:
        wanted = ask(claude, "streamed", **body)
        with claude.messages.stream(**body) as stream:
            for number, _ in enumerate(stream):
                if number in (12, 60):
                    [running] = [row["name"] for row in own.rows() if row["running"]]
                    own.workers.pop(running).kill()
                    if number == 12:
                        own.start_worker("third")
            found = stream.get_final_message()
    assert found.content == wanted.content and len(found.content) == 2
    assert (found.stop_reason, found.usage) == (wanted.stop_reason, wanted.usage)


def test_silence_is_filled_with_pings(gateway: GatewayProcess) -> None:
    body = {**said("[[echo prefill_ms=1500]] hello"), "stream": True}
    with gateway.http() as http, http.stream("POST", "/v1/messages", json=body) as answer:
        text = "".join(answer.iter_text())
    names = [name for name, _ in events(text)]
    # The gateway of these tests is silent for 0.2 s at most.
    assert names.count("ping") > 2 and names[-1] == "message_stop"


CUT = f"{THOUGHT} and {CALL}\n{CALL}"


def test_a_stream_goes_on_after_whatever_event_was_read(gateway: GatewayProcess) -> None:
    body = {**said(CUT, thinking=THINK, tools=[TOOL]), "stream": True}
    with gateway.http() as http:
        whole = http.post("/v1/messages", json=body).text.strip().split("\n\n")
        # A ping belongs to the event before it.
        blocks = [block for block in whole if block.startswith("id: ")]
        for read in range(len(blocks)):
            id_ = blocks[read].partition("\n")[0].removeprefix("id: ")
            again = http.post("/v1/messages", json=body, headers={"last-event-id": id_})
            rest = again.text.strip().split("\n\n") if again.text else []
            assert story([*blocks[: read + 1], *rest]) == story(blocks), id_


def story(blocks: list[str]) -> list[Any]:
    """What a reader has of the events: blocks with their texts, and the end; ids of calls are new
    where an answer is made again."""
    told: list[Any] = []
    for block in blocks:
        [(name, data)] = events(block)
        if name == "content_block_start":
            told.append([data["index"], data["content_block"]["type"]])
        elif name == "content_block_delta":
            delta = data["delta"]
            text = "".join(value for key, value in delta.items() if key != "type")
            if told[-1][-1] == delta["type"]:
                told[-1][-2] += text
            else:
                told[-1] += [text, delta["type"]]
        elif name != "ping":
            data.pop("message", None)
            told.append([name, data])
    return told


def test_a_running_answer_is_read_on_and_cancelled_by_its_id(gateway: GatewayProcess) -> None:
    body = {**said("[[echo mode=sampled answer_tokens=400 step_delay_ms=5]]"), "stream": True}
    headers = {"x-reattach": "60"}
    with gateway.http() as http:
        with http.stream("POST", "/v1/messages", json=body, headers=headers) as answer:
            lines = answer.iter_lines()
            ids = [line for line in (next(lines) for _ in range(40)) if line.startswith("id: ")]
        last = ids[-1].removeprefix("id: ")
        message = last.partition(":")[0]
        rest = http.get(f"/v1/messages/{message}", headers={"last-event-id": last}).text
        told = events(rest)
        assert told[-1][0] == "message_stop"
        assert told[-2][1]["usage"]["output_tokens"] == 400
        with http.stream("POST", "/v1/messages", json=body, headers=headers) as answer:
            first = next(answer.iter_lines())
        message = first.removeprefix("id: ").partition(":")[0]
        assert http.post(f"/v1/messages/{message}/cancel").json()["cancelled"] is True
        gone = http.get(f"/v1/messages/{message}")
        assert gone.status_code == 404 and gone.json()["error"]["type"] == "not_found_error"
    gateway.bus.wait_idle()
