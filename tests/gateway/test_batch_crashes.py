"""A batch interrupted at every step: before the step, after it, or in the middle of a line.
The next run completes the batch, with exactly one answer for every line."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from client.gateway.batches import jobs as module
from client.gateway.batches.answering import Answered, gateway_of
from client.gateway.batches.folder import Folder
from client.gateway.batches.jobs import Batches, Jobs
from client.gateway.batches.lines import Line
from client.gateway.batches.output import Output
from client.gateway.batches.records import OPEN, Batch, FileObject, Job
from client.gateway.config import Config
from client.gateway.errors import GatewayError, invalid

NAMES = [f"l{i}" for i in range(7)]
FAILS = "l3"


class Crash(BaseException):
    """The process ends here."""


class Strikes:
    """Counts the steps, and strikes at one of them."""

    def __init__(self, at: int) -> None:
        self.at, self.steps = at, 0

    def step(self, harm: Callable[[], None] = lambda: None) -> None:
        self.steps += 1
        if self.steps - 1 == self.at:
            harm()
            raise Crash


class Torn:
    """A file that is struck in the middle of a line."""

    def __init__(self, file: Any, strikes: Strikes) -> None:
        self._file, self._strikes = file, strikes
        self.flush, self.fileno = file.flush, file.fileno

    def write(self, data: bytes) -> None:
        def tear() -> None:
            self._file.write(data[:-7])
            self._file.flush()

        self._strikes.step(tear)
        self._file.write(data)


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Folder]:
    """Another gateway's view of the folder."""
    folder = Folder(path)
    try:
        yield folder
    finally:
        folder.shut()


class StruckFolder(Folder):
    strikes: Strikes

    def change(self, *arguments: Any, **named: Any) -> Job:
        self.strikes.step()
        job = super().change(*arguments, **named)
        self.strikes.step()
        return job


class Bus:
    """Knows one model."""

    async def models(self) -> list[dict[str, Any]]:
        return [{"name": "m", "capacity": 2}]


class World:
    """A folder with one batch, and the gateways that run it one after the other."""

    def __init__(self, path: Path, strikes: Strikes) -> None:
        self.folder, self.strikes = StruckFolder(path), strikes
        self.folder.strikes = Strikes(-1)
        self.asked: list[str] = []
        lines = [
            {"custom_id": name, "method": "POST", "url": "/v1/embeddings", "body": {"model": "m"}}
            for name in NAMES
        ]
        data = "".join(f"{json.dumps(line)}\n" for line in lines).encode()
        self.folder.upload_path("file-in").write_bytes(data)
        file = FileObject(
            id="file-in", bytes=len(data), created_at=0, filename="in.jsonl", purpose="batch"
        )
        self.folder.add_file(file, "alice")
        self.begin("1", "alice", "file-in")
        self.folder.strikes = strikes

    def begin(self, name: str, owner: str, input_id: str) -> None:
        """Add a batch."""
        now = int(time.time())
        batch = Batch(
            id=f"batch_{name}",
            endpoint="/v1/embeddings",
            input_file_id=input_id,
            completion_window="24h",
            created_at=now,
            expires_at=now + 3600,
        )
        job = Job(batch=batch, owner=owner, output_id=f"file-out{name}", error_id=f"file-err{name}")
        assert self.folder.add_job(job, 100)

    async def run(self, *, cancel_after: int | None = None) -> Batch:
        """Run the batch to its end, by a new gateway after each strike."""
        batches = Batches(self.folder)
        bus: Any = Bus()
        jobs = Jobs(gateway_of(Config(batch_concurrency=3), bus), batches)

        async def answer(line: Line, *_: Any, **named: Any) -> Answered:
            self.asked.append(line.custom_id)
            if len(self.asked) == cancel_after:
                self.cancel()
                batches.changed.set()
            await asyncio.sleep(0.001)
            failure: GatewayError | None = None
            if line.custom_id == FAILS:
                failure = invalid("x", "wrong")
            response = {"status_code": 200 if failure is None else 400, "body": {}}
            return Answered({"custom_id": line.custom_id, "response": response}, failure)

        jobs._doors.answer = answer  # type: ignore[method-assign]
        running = asyncio.create_task(jobs.loop())
        try:
            async with asyncio.timeout(60):
                while True:
                    job = await batches.do(self.folder.job, "batch_1")
                    if job.batch.status not in OPEN and not jobs._running:
                        break
                    await asyncio.sleep(0.005)
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
            batches.shut()
        with opened(self.folder.path) as folder:
            return folder.job("batch_1").batch

    def cancel(self) -> None:
        with opened(self.folder.path) as other:
            other.change("batch_1", lambda job: job.batch.move("cancelling", int(time.time())))

    def rows(self, batch: Batch) -> list[tuple[str, str]]:
        """Every row of the files that the batch names: which file, which line."""
        found = []
        for which, id_ in (("good", batch.output_file_id), ("bad", batch.error_file_id)):
            if id_ is not None:
                for text in self.folder.path_of(id_).read_text().splitlines():
                    found.append((which, json.loads(text)["custom_id"]))
        return found


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LOOK_S", 0.005)
    monkeypatch.setattr(module, "_PAUSE_S", 0.005)


def strike_outputs(monkeypatch: pytest.MonkeyPatch, strikes: Strikes) -> None:
    write, sync = Output.write, Output.sync

    def struck_write(self: Output, answer: dict[str, Any]) -> None:
        strikes.step()
        whole: Any = self._file
        self._file = Torn(whole, strikes)  # type: ignore[assignment]
        try:
            write(self, answer)
        finally:
            self._file = whole
        strikes.step()

    def struck_sync(self: Output) -> None:
        strikes.step()
        sync(self)

    monkeypatch.setattr(Output, "write", struck_write)
    monkeypatch.setattr(Output, "sync", struck_sync)


def struck_everywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **how: Any
) -> Iterator[tuple[int, World, Any]]:
    """The batch after a run that is struck at one step, for each of its steps; last, after a run
    that is not struck."""
    at, struck = 0, True
    while struck:
        strikes = Strikes(at)
        with monkeypatch.context() as patch:
            strike_outputs(patch, strikes)
            world = World(tmp_path / str(at), strikes)
            batch = asyncio.run(world.run(**how))
        struck = strikes.steps > at
        yield at, world, batch
        at += 1
    assert at > 25


def test_a_strike_at_any_step_loses_no_line_and_answers_none_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for at, world, batch in struck_everywhere(tmp_path, monkeypatch):
        assert batch.status == "completed", (at, batch)
        wanted = [("bad" if name == FAILS else "good", name) for name in NAMES]
        assert sorted(world.rows(batch)) == sorted(wanted), at
        counts = batch.request_counts
        assert (counts.total, counts.completed, counts.failed) == (7, 6, 1)
        with opened(world.folder.path) as folder:
            files = folder.files(
                "alice", 0, after=None, limit=9, newest_first=False, purpose="batch_output"
            )
        assert [file.bytes for file in files] == [
            world.folder.path_of(file.id).stat().st_size for file in files
        ]
        assert len(files) == 2


def test_a_strike_at_any_step_of_a_cancelled_batch_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for at, world, batch in struck_everywhere(tmp_path, monkeypatch, cancel_after=3):
        assert batch.status == "cancelled", (at, batch)
        assert sorted(name for _, name in world.rows(batch)) == sorted(NAMES), at


def test_batches_that_wait_hold_up_nobody_elses_and_can_be_ended(tmp_path: Path) -> None:
    world = World(tmp_path, Strikes(-1))
    for number in range(2, 80):
        world.begin(str(number), "alice", "file-in")
    data = b'{"custom_id": "b", "method": "POST", "url": "/v1/embeddings", "body": {}}'
    world.folder.upload_path("file-b").write_bytes(data)
    world.folder.add_file(
        FileObject(id="file-b", bytes=1, created_at=0, filename="b", purpose="batch"), "bob"
    )
    world.begin("b", "bob", "file-b")

    async def work() -> None:
        batches = Batches(world.folder)
        bus: Any = Bus()
        jobs = Jobs(gateway_of(Config(batch_concurrency=1000), bus), batches)
        jobs._places.models._limit = lambda _: 1000

        async def answer(line: Line, *_: Any, **named: Any) -> Answered:
            if line.custom_id != "b":
                await asyncio.Event().wait()
            return Answered({"custom_id": "b", "response": {"status_code": 200, "body": {}}})

        jobs._doors.answer = answer  # type: ignore[method-assign]
        running = asyncio.create_task(jobs.loop())

        async def until(name: str, status: str) -> None:
            async with asyncio.timeout(60):
                while True:
                    job = await batches.do(world.folder.job, f"batch_{name}")
                    if job.batch.status == status:
                        break
                    await asyncio.sleep(0.005)

        await until("b", "completed")
        await until("1", "in_progress")
        await until("70", "validating")
        with opened(tmp_path) as last:
            last.change("batch_70", lambda job: job.batch.move("cancelling", int(time.time())))
        await until("70", "cancelled")
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        batches.shut()

    asyncio.run(work())
