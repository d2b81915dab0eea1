"""Batches whose gateway, worker, broker or file goes away, and gateways that share a folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import openai
import pytest

from client.gateway.keys import add_key, remove_key
from tests.gateway.batch_caller import CHAT, Caller, Make, line, slow
from tests.gateway.conftest import MODEL
from tests.harness import Bus, wait_until


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "batches"


# --- killed ---------------------------------------------------------------------------------------


def test_a_gateway_killed_in_the_middle_loses_no_line_and_answers_none_twice(
    make_bus: Callable[..., Bus], make_gateway: Make, folder: Path
) -> None:
    bus = make_bus(workers=1, slots=4)
    options = ("--batch-folder", str(folder))
    lines = [slow(f"l{i}", tokens=30) for i in range(120)]
    first = Caller(make_gateway(*options, bus=bus))
    batch = first.begin(*lines)
    seen = 0
    for _ in range(3):
        now = first.until(
            batch, lambda b, seen=seen: b.request_counts.completed > seen + 8, "some are answered"
        )
        assert now.status == "in_progress"
        seen = now.request_counts.completed
        first.gateway.process.kill()
        first = Caller(make_gateway(*options, bus=bus))
    done = first.over(batch)
    assert done.status == "completed" and done.request_counts.completed == 120
    answers = first.answers(done)
    assert set(answers) == {f"l{i}" for i in range(120)}
    assert done.usage.output_tokens == 30 * 120


def test_a_torn_line_is_asked_again_and_what_follows_a_broken_one_too(
    make_gateway: Make, folder: Path
) -> None:
    options = ("--batch-folder", str(folder))
    caller = Caller(make_gateway(*options))
    batch = caller.begin(*[line(f"l{i}") for i in range(10)], slow("last", tokens=100_000))
    caller.until(batch, lambda b: b.request_counts.completed == 10, "the quick ones are answered")
    caller.gateway.process.kill()
    [output] = [path for path in (folder / "files").iterdir() if b'"status_code"' in _read(path)]
    written = _read(output).splitlines(keepends=True)
    # A power failure: the last line is torn, and a block of an earlier one never came to the disk.
    broken = written[6][:20] + b"\0" * 20 + written[6][40:]
    output.write_bytes(b"".join([*written[:6], broken, *written[7:9], written[9][:15]]))
    caller = Caller(make_gateway(*options))
    # The old count is told until the batch runs again, so the file is looked at as well.
    caller.until(
        batch,
        lambda b: b.request_counts.completed == 10 == _whole_lines(output),
        "they are answered again",
    )
    caller.sdk.batches.cancel(batch.id)
    answers = caller.answers(caller.over(batch))
    assert len(answers) == 11
    assert all(answers[f"l{i}"]["response"]["status_code"] == 200 for i in range(10))


def _read(path: Path) -> bytes:
    return path.read_bytes()


def _whole_lines(path: Path) -> int:
    """How many lines end and have no block that never came to the disk."""
    lines = _read(path).splitlines(keepends=True)
    return sum(line.endswith(b"\n") and b"\0" not in line for line in lines)


def test_a_worker_that_dies_costs_no_line(
    make_bus: Callable[..., Bus], make_gateway: Make, folder: Path
) -> None:
    bus = make_bus(workers=2, slots=2)
    caller = Caller(make_gateway("--batch-folder", str(folder), bus=bus))
    batch = caller.begin(*[slow(f"l{i}", tokens=10) for i in range(30)])
    caller.until(batch, lambda b: b.request_counts.completed > 3, "some are answered")
    # All of them: the model is not served at all for a while.
    for name in list(bus.workers):
        bus.workers[name].kill()
    bus.start_worker("w9", "--slots", "4")
    done = caller.over(batch)
    assert done.request_counts and done.request_counts.completed == 30, caller.answers(done)
    assert len(caller.answers(done)) == 30


def test_lines_wait_for_a_broker_that_is_away(
    make_bus: Callable[..., Bus], make_gateway: Make, folder: Path
) -> None:
    bus = make_bus(workers=1, slots=2)
    caller = Caller(make_gateway("--batch-folder", str(folder), bus=bus))
    batch = caller.begin(*[slow(f"l{i}", tokens=10) for i in range(12)])
    caller.until(batch, lambda b: b.request_counts.completed > 1, "some are answered")
    bus.broker.kill()
    bus.start_broker()
    done = caller.over(batch)
    assert done.request_counts and done.request_counts.completed == 12


def test_a_batch_ends_on_time_while_no_broker_answers(
    make_bus: Callable[..., Bus], make_gateway: Make, folder: Path
) -> None:
    bus = make_bus(workers=1)
    caller = Caller(make_gateway("--batch-folder", str(folder), bus=bus))
    bus.broker.kill()
    late = caller.begin(line("a"), completion_window="2s")
    unwanted = caller.begin(line("b"))
    caller.sdk.batches.cancel(unwanted.id)
    assert caller.over(late).status == "expired"
    assert caller.over(unwanted).status == "cancelled"


# --- several gateways, keys, and others -----------------------------------------------------------


def test_two_gateways_share_a_folder_and_the_other_takes_over(
    make_gateway: Make, folder: Path
) -> None:
    options = ("--batch-folder", str(folder))
    first, second = Caller(make_gateway(*options)), Caller(make_gateway(*options))
    wait_until(
        lambda: "another gateway runs" in second.gateway.process.log(), "the second gateway waits"
    )
    batch = second.begin(*[slow(f"l{i}", tokens=20) for i in range(60)])
    second.until(batch, lambda b: b.request_counts.completed > 3, "the first gateway runs it")
    other = first.begin(slow("x", tokens=100_000))
    second.sdk.batches.cancel(other.id)
    assert first.over(other).status == "cancelled"
    first.gateway.process.kill()
    done = second.over(batch)
    assert done.status == "completed" and len(second.answers(done)) == 60


def test_a_key_sees_its_own_and_no_others(make_gateway: Make, folder: Path, tmp_path: Path) -> None:
    keys = tmp_path / "keys.toml"
    alice, bob = add_key(keys, "alice"), add_key(keys, "bob", operator=True)
    gateway = make_gateway("--batch-folder", str(folder), "--keys", str(keys))
    hers, his = Caller(gateway, alice), Caller(gateway, bob)
    batch = hers.begin(line("a"))
    done = hers.over(batch)
    assert hers.answers(done)
    for steal in (
        lambda: his.sdk.batches.retrieve(batch.id),
        lambda: his.sdk.batches.cancel(batch.id),
        lambda: his.sdk.files.content(done.output_file_id),
        lambda: his.sdk.files.delete(batch.input_file_id),
    ):
        with pytest.raises(openai.NotFoundError):
            steal()
    with pytest.raises(openai.BadRequestError):
        his.sdk.batches.create(
            input_file_id=batch.input_file_id, endpoint=CHAT, completion_window="24h"
        )
    assert not list(his.sdk.files.list()) and not list(his.sdk.batches.list())
    assert hers.sdk.files.content(done.output_file_id).read()


def test_lines_count_for_their_key_and_wait_for_its_budget(
    make_gateway: Make, folder: Path, tmp_path: Path
) -> None:
    keys = tmp_path / "keys.toml"
    alice = add_key(keys, "alice", tokens_per_day=100, concurrency=1)
    gateway = make_gateway(
        *("--batch-folder", str(folder), "--keys", str(keys)),
        *("--usage", str(tmp_path / "usage.db")),
    )
    caller = Caller(gateway, alice)
    batch = caller.begin(*[line(f"l{i}") for i in range(20)])
    wait_until(lambda: "batch waits" in gateway.process.log(), "the budget is used up")
    now = caller.until(batch, lambda b: b.request_counts.completed > 0, "some are counted")
    assert now.request_counts.completed < 20 and now.request_counts.failed == 0
    with gateway.http(headers={"authorization": f"Bearer {alice}"}) as http:
        used = http.get("/me").json()["tokens"]["day"]
    assert used["left"] == 0 and used["used"] < 150


def test_a_removed_key_ends_its_batch_with_that_cause(
    make_gateway: Make, folder: Path, tmp_path: Path
) -> None:
    keys = tmp_path / "keys.toml"
    alice, root = add_key(keys, "alice"), add_key(keys, "root")
    gateway = make_gateway("--batch-folder", str(folder), "--keys", str(keys))
    caller = Caller(gateway, alice)
    lines = [slow(f"l{i}", tokens=150) for i in range(60)]
    batch = caller.begin(*lines)
    caller.until(batch, lambda b: b.request_counts.completed > 0, "it runs")
    remove_key(keys, "alice")
    assert root
    story = gateway.process.log
    wait_until(lambda: '"batch over"' in story(), "the batch is over", story=story)
    [errors] = [path for path in (folder / "files").iterdir() if b"was removed" in _read(path)]
    rows = [json.loads(text) for text in _read(errors).splitlines()]
    assert {row["response"]["status_code"] for row in rows} == {401}


def test_other_requests_go_before_the_lines_of_a_batch(
    make_bus: Callable[..., Bus], make_gateway: Make, folder: Path
) -> None:
    bus = make_bus(workers=1, slots=2)
    caller = Caller(make_gateway("--batch-folder", str(folder), bus=bus))
    batch = caller.begin(*[slow(f"l{i}", tokens=40) for i in range(40)])
    wait_until(lambda: bus.running() == 2, "the batch fills the slots")
    latest = bus.client().requests(limit=5)
    assert {row["priority"] for row in latest} == {-50}
    said = caller.sdk.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": "now"}]
    )
    assert said.choices[0].message.content == "now"
    now = caller.sdk.batches.retrieve(batch.id)
    assert now.status == "in_progress" and now.request_counts.completed < 40
    assert caller.over(batch).request_counts.completed == 40


def test_more_slots_than_one_batch_fills_are_not_left_empty(
    make_bus: Callable[..., Bus], make_gateway: Make, folder: Path
) -> None:
    bus = make_bus(workers=1, slots=12)
    caller = Caller(make_gateway("--batch-folder", str(folder), bus=bus))
    batch = caller.begin(*[slow(f"l{i}", tokens=100_000) for i in range(40)])
    wait_until(lambda: bus.running() == 12, "every slot is filled")
    [model] = bus.client().models()
    assert model["queued"] <= 12
    caller.sdk.batches.cancel(batch.id)
    caller.over(batch)
