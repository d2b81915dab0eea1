"""Which lines of which batches may run: a batch that waits, for whatever, takes no room from
another, and one that is ended while it waits leaves none behind."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from broker.protocol.errors import ErrorCode
from client import BusError
from client.gateway.batches import jobs as module
from client.gateway.batches.answering import Answered, gateway_of
from client.gateway.batches.folder import Folder
from client.gateway.batches.jobs import Batches, Jobs
from client.gateway.batches.lines import Line
from client.gateway.batches.records import Batch, FileObject, Job
from client.gateway.config import Config
from client.gateway.errors import GatewayError
from tests.harness import PATIENCE_S

MODELS = ("busy", "demo", "other")


class World:
    """A bus of three models, and a gateway whose keys may have so many lines in flight."""

    def __init__(self, path: Path, *, of_key: int, concurrency: int = 256) -> None:
        self.folder = Folder(path)
        self.batches = Batches(self.folder)
        #: What the workers of each model run at once.
        self.capacity = dict.fromkeys(MODELS, 2)
        #: Models whose lines are not answered, and those whose lines are to be asked again.
        self.hangs: set[str] = set()
        self.fails: set[str] = set()
        #: Lines at the bus, and how often each line was asked.
        self.at_bus: list[str] = []
        self.asked: dict[str, int] = {}
        #: The broker does not answer.
        self.away = ""
        bus: Any = self
        self.jobs = Jobs(gateway_of(Config(batch_concurrency=concurrency), bus), self.batches)
        self.jobs._doors.answer = self.answer  # type: ignore[method-assign]
        self.places = self.jobs._places
        self.places.keys._limit = lambda _: of_key
        #: The model of each line that waits for it to be served.
        self.closed: list[str] = []
        self._opened = self.places.models.opened
        self.places.models.opened = self.opened  # type: ignore[method-assign]

    async def opened(self, name: str) -> None:
        """As the room of the models, watched."""
        self.closed.append(name)
        try:
            await self._opened(name)
        finally:
            self.closed.remove(name)

    async def models(self) -> list[dict[str, Any]]:
        """As the bus tells them."""
        if self.away:
            raise BusError(self.away)
        return [{"name": name, "capacity": most} for name, most in self.capacity.items()]

    async def answer(self, line: Line, *_: Any, **named: Any) -> Answered:
        """As a door answers."""
        self.asked[line.custom_id] = self.asked.get(line.custom_id, 0) + 1
        self.at_bus.append(line.custom_id)
        try:
            await asyncio.sleep(0)
            await self.until(lambda: line.model not in self.hangs)
            failure: GatewayError | None = None
            if line.model in self.fails or line.model not in self.capacity:
                message = f"{line.model} is not to be had."
                failure = GatewayError(ErrorCode.MODEL_UNAVAILABLE, message)
            response: dict[str, Any] = {"status_code": 404 if failure else 200, "body": {}}
            return Answered({"custom_id": line.custom_id, "response": response}, failure)
        finally:
            self.at_bus.remove(line.custom_id)

    async def begin(self, name: str, *models: str, owner: str = "alice") -> None:
        """Add a batch with a line for each model: `NAME0`, `NAME1`, ..."""
        lines = [
            {
                "custom_id": f"{name}{number}",
                "method": "POST",
                "url": "/v1/embeddings",
                "body": {"model": model},
            }
            for number, model in enumerate(models)
        ]
        data = "".join(f"{json.dumps(line)}\n" for line in lines).encode()
        now = int(time.time())
        self.folder.upload_path(f"file-{name}").write_bytes(data)
        file = FileObject(
            id=f"file-{name}", bytes=len(data), created_at=now, filename=name, purpose="batch"
        )
        batch = Batch(
            id=f"batch_{name}",
            endpoint="/v1/embeddings",
            input_file_id=file.id,
            completion_window="24h",
            created_at=now,
            expires_at=now + 3600,
        )
        job = Job(
            batch=batch, owner=owner, output_id=f"file-good{name}", error_id=f"file-bad{name}"
        )
        await self.batches.do(self.folder.add_file, file, owner)
        assert await self.batches.do(self.folder.add_job, job, 100)
        self.batches.changed.set()

    async def cancel(self, name: str) -> None:
        def move(job: Job) -> None:
            job.batch.move("cancelling", int(time.time()))

        await self.batches.do(self.folder.change, f"batch_{name}", move)
        self.batches.changed.set()

    async def over(self, name: str, status: str = "completed") -> Batch:
        """The batch once it has this status and nothing of it runs any more."""
        id_ = f"batch_{name}"
        async with asyncio.timeout(PATIENCE_S):
            while True:
                batch = (await self.batches.do(self.folder.job, id_)).batch
                if batch.status == status and id_ not in self.jobs._running:
                    return batch
                await asyncio.sleep(0.005)

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while True:
                if condition():
                    return
                await asyncio.sleep(0.005)

    def rows(self, id_: str | None) -> list[dict[str, Any]]:
        """The lines of a file that a batch names."""
        assert id_ is not None
        return list(map(json.loads, self.folder.path_of(id_).read_text().splitlines()))

    @property
    def all_rooms(self) -> list[dict[str, Any]]:
        """What is in flight by any name; also who waits."""
        rooms = (self.places.keys, self.places.models, self.places.begun)
        return [{**room._inside, **room._waiting} for room in rooms]

    def waits(self, room: str, name: str) -> bool:
        return bool(getattr(self.places, room)._waiting.get(name))


@contextlib.asynccontextmanager
async def running(path: Path, **how: Any) -> AsyncIterator[World]:
    world = World(path, **how)
    task = asyncio.create_task(world.jobs.loop())
    try:
        yield world
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        world.batches.shut()
    assert world.all_rooms == [{}, {}, {}]


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LOOK_S", 0.005)


# --- a batch that waits ---------------------------------------------------------------------------


async def waits_for_its_model(world: World) -> None:
    """Its model left while lines were at the bus, and others not yet begun."""
    world.hangs.add("other")
    await world.begin("first", *["other"] * 9)
    await world.until(lambda: bool(world.at_bus))
    del world.capacity["other"]
    world.hangs.clear()
    await world.until(lambda: world.closed.count("other") > 1)


async def waits_to_ask_again(world: World) -> None:
    world.fails.add("other")
    await world.begin("first", *["other"] * 9)
    await world.until(lambda: "first0" in world.asked and not world.at_bus)


async def waits_to_come_in_again(world: World) -> None:
    """Its model left while it waited to ask again."""
    await waits_to_ask_again(world)
    del world.capacity["other"]
    await world.until(lambda: world.closed.count("other") > 1)


@pytest.fixture
def waiting(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Callable[[World], Any]:
    """What brings a batch to where it waits. Lines ask again soon, but where they are to wait for
    that."""
    bring: Callable[[World], Any] = request.param
    if bring is not waits_to_ask_again:
        monkeypatch.setattr(module, "_WAIT_S", 0.005)
    return bring


@pytest.mark.parametrize(
    "waiting", [waits_for_its_model, waits_to_ask_again, waits_to_come_in_again], indirect=True
)
def test_a_batch_that_waits_holds_up_no_other_of_its_key(
    tmp_path: Path, waiting: Callable[[World], Any]
) -> None:
    async def work() -> None:
        async with running(tmp_path, of_key=1) as world:
            await waiting(world)
            await world.begin("second", "demo", "demo")
            assert (await world.over("second")).request_counts.completed == 2
            assert world.jobs._running.keys() == {"batch_first"}

    asyncio.run(work())


def test_what_waited_runs_once_its_model_is_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_WAIT_S", 0.005)

    async def work() -> None:
        async with running(tmp_path, of_key=2) as world:
            await waits_for_its_model(world)
            await world.begin("second", "demo")
            await world.over("second")
            world.capacity["other"] = 2
            assert (await world.over("first")).request_counts.completed == 9

    asyncio.run(work())


def test_who_waits_for_its_key_keeps_no_room_of_the_model_from_other_keys(tmp_path: Path) -> None:
    async def work() -> None:
        async with running(tmp_path, of_key=1) as world:
            world.capacity["busy"] = 1  # so room for two
            world.hangs.add("busy")
            for name in "abc":
                await world.begin(name, *["busy"] * 3)
            await world.until(lambda: world.waits("keys", "alice") and bool(world.at_bus))
            await world.begin("his", "busy", owner="bob")
            await world.until(lambda: "his0" in world.at_bus)

    asyncio.run(work())


def test_lines_that_are_to_be_asked_again_are_held_in_a_bounded_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def work() -> None:
        async with running(tmp_path, of_key=9, concurrency=5) as world:
            world.fails.add("other")
            await world.begin("first", *["other"] * 30)
            await world.until(lambda: len(world.asked) == 5 and not world.at_bus)
            await world.begin("second", *["demo"] * 30)
            await world.over("second")
            assert len(world.asked) == 35

    asyncio.run(work())


def test_lines_that_expire_tell_what_kept_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def work() -> None:
        async with running(tmp_path, of_key=1, concurrency=2) as world:
            await waits_to_ask_again(world)
            await world.until(lambda: len(world.asked) == 2 and not world.at_bus)
            del world.capacity["other"]
            await world.until(lambda: world.places.away("other"))
            world.jobs._running["batch_first"].stop.set_result("expired")
            rows = world.rows((await world.over("first", "expired")).error_file_id)
            told = {row["custom_id"]: row["error"] for row in rows}
            assert len(told) == 9 and {row["code"] for row in told.values()} == {"batch_expired"}
            for name, error in told.items():
                cause = "other is not to be had." if name in world.asked else "No worker serves"
                assert "expired" in error["message"] and cause in error["message"]

    asyncio.run(work())


def test_lines_of_a_key_and_a_model_come_in_the_order_in_which_they_came(tmp_path: Path) -> None:
    """Whether they waited for their model to be back, or for their key."""

    async def work() -> None:
        async with running(tmp_path, of_key=1) as world:
            places, came, tasks = world.places, list[str](), list[asyncio.Task[None]]()

            async def come(name: str, model: str) -> None:
                await places.enter("alice", model)
                came.append(name)

            async def add(name: str, model: str) -> None:
                tasks.append(asyncio.create_task(come(name, model)))
                await asyncio.sleep(0)

            del world.capacity["other"]
            places.expect(["other"])
            await places.see()
            await add("first", "demo")
            for number in range(3):
                await add(f"away{number}", "other")
                await add(f"here{number}", "demo")
            for most in range(2, 5):
                places.leave("alice", "demo")
                await world.until(lambda most=most: len(came) == most)  # type: ignore[misc]
            places.leave("alice", "demo")
            assert places.keys.inside("alice") == 0
            world.capacity["other"] = 1
            await places.see()
            for most in range(5, 8):
                await world.until(lambda most=most: len(came) == most)  # type: ignore[misc]
                places.leave("alice", "other")
            assert came == ["first", "here0", "here1", "here2", "away0", "away1", "away2"]
            await asyncio.gather(*tasks)

    asyncio.run(work())


def test_who_waits_for_a_busy_model_gives_up_its_key_when_the_model_leaves(tmp_path: Path) -> None:
    async def work() -> None:
        async with running(tmp_path, of_key=1) as world:
            await waits_for_a_busy_model(world)
            assert world.places.keys.inside("alice") == 1
            del world.capacity["other"]
            await world.begin("second", "demo")
            assert (await world.over("second")).request_counts.completed == 1

    asyncio.run(work())


# --- cancelled while it waits ---------------------------------------------------------------------


async def is_at_the_bus(world: World) -> None:
    world.hangs.add("other")
    await world.begin("first", *["other"] * 9)
    await world.until(lambda: bool(world.at_bus))


async def waits_for_its_key(world: World) -> None:
    world.hangs.add("busy")
    await world.begin("zero", "busy")
    await world.until(lambda: bool(world.at_bus))
    await world.begin("first", *["other"] * 9)
    await world.until(lambda: world.waits("keys", "alice"))


async def waits_for_a_busy_model(world: World) -> None:
    world.hangs.add("other")
    world.capacity["other"] = 1
    for name in ("bob", "carol"):
        await world.begin(name, "other", owner=name)
    await world.until(lambda: len(world.at_bus) == 2)
    await world.begin("first", *["other"] * 9)
    await world.until(lambda: world.waits("models", "other"))


async def waits_for_lines_that_were_begun(world: World) -> None:
    world.fails.add("other")
    await world.begin("first", *["other"] * 300)
    await world.until(lambda: world.waits("begun", "batch_first"))


@pytest.mark.parametrize(
    "waiting",
    [
        is_at_the_bus,
        waits_for_a_busy_model,
        waits_for_its_key,
        waits_for_its_model,
        waits_for_lines_that_were_begun,
        waits_to_ask_again,
        waits_to_come_in_again,
    ],
    indirect=True,
)
def test_a_batch_that_is_cancelled_leaves_its_room_wherever_it_waits(
    tmp_path: Path, waiting: Callable[[World], Any]
) -> None:
    async def work() -> None:
        async with running(tmp_path, of_key=1) as world:
            await waiting(world)
            await world.cancel("first")
            batch = await world.over("first", "cancelled")
            rows = world.rows(batch.error_file_id)
            assert len({row["custom_id"] for row in rows}) == len(rows)
            assert len(rows) == batch.request_counts.total
            world.hangs.clear()
            world.fails.clear()
            world.capacity["other"] = 2
            await world.begin("second", "other", "demo")
            assert (await world.over("second")).request_counts.completed == 2
            await world.until(lambda: world.all_rooms == [{}, {}, {}])

    asyncio.run(work())
