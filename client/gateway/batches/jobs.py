"""Runs the batches of a folder, at the one gateway that holds its lock.

What is where when: a batch and its status are in the database, its answers in its two files, line
by line as they come; the database gets only their counts. So a gateway that is killed at any point
loses what was in flight and nothing else: whoever takes the folder next reads which lines are
answered, and asks for the others. A batch that is over names its files in the same transaction as
its last status.

Lines go to the bus as far as there is room: somewhat more than the workers of a model can run at
once, so that no slot waits for a line, at a priority behind everybody else's. Must never hold up a
request: files are read and written in other threads.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import logging
import sqlite3
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final, ParamSpec, TypeVar

from broker.protocol.errors import ErrorCode
from client import BusError, InvalidRequest, Timeout
from client.gateway.batches.answering import (
    RETRY,
    Answered,
    Doors,
    Unanswered,
    refused,
    unexecuted,
)
from client.gateway.batches.folder import Folder
from client.gateway.batches.lines import Line, Mistake, check, lines
from client.gateway.batches.output import Output, Tally
from client.gateway.batches.places import Places
from client.gateway.batches.records import OPEN, Ending, FileObject, Job
from client.gateway.batches.work import work_through
from client.gateway.errors import GatewayError
from client.gateway.keys import ANYBODY, Key
from client.gateway.openai.generation import RETRY as STREAM_RETRY
from client.gateway.state import Gateway

__all__ = ["MAX_LINES", "Batches", "Jobs"]

P = ParamSpec("P")
T = TypeVar("T")

log = logging.getLogger("tokenbus.gateway")

MAX_LINES: Final = 50_000
"""OpenAI's limit."""

#: Mistakes of a file that are told.
_TOLD_MISTAKES: Final = 100
#: Batches of one key at once, the oldest first: a key whose batches wait keeps nobody else's from
#: running.
_AT_ONCE: Final = 8
#: Between two looks at the folder for what other gateways did, and between two writes of answers
#: through to the disk.
_LOOK_S: Final = 1.0
_TIDY_S: Final = 60.0
#: Before a batch that the folder failed is tried again.
_PAUSE_S: Final = 10.0
#: Of a line that has no answer yet, and of a key whose budget is used up.
_WAIT_S: Final = 1.0
_WAIT_LONGEST_S: Final = 30.0
#: A batch waits in the broker's queue for as long as it may last.
_QUEUE_S: Final = 30 * 24 * 3600.0

#: A line that is to be asked again gives up its room meanwhile. So the bus client resumes streams
#: that were interrupted, and what may last is left to the loop here.
_RETRY: Final = replace(RETRY, codes=STREAM_RETRY.codes)
#: Failures that say nothing about the line: it is asked again.
_LATER: Final = frozenset(
    code.value
    for code in (
        ErrorCode.OVERLOADED,
        ErrorCode.QUOTA,
        ErrorCode.DRAINING,
        ErrorCode.CONNECTION_LOST,
        ErrorCode.UNKNOWN_SESSION,
        ErrorCode.PROTOCOL_ERROR,
    )
)
#: What of a batch's lines is written when they will not run.
_UNEXECUTED: Final[dict[Ending | None, tuple[str, str]]] = {
    "expired": (
        "batch_expired",
        "This request could not be executed before the completion window expired.",
    ),
    "cancelled": (
        "batch_cancelled",
        "This request was not executed because the batch was cancelled.",
    ),
}


class Batches:
    """The folder, for handlers and jobs, one at a time."""

    def __init__(self, folder: Folder) -> None:
        self.folder = folder
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="batches")
        #: Set when a batch was made or cancelled here.
        self.changed = asyncio.Event()
        #: Of files that arrive here.
        self.arriving_bytes = 0

    async def do(self, work: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Do this with the folder, in its thread. Once begun it is done, whoever waits for it."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, partial(work, *args, **kwargs))

    def shut(self) -> None:
        """Returns when all is done and the folder is closed."""
        self._thread.shutdown(wait=True)
        self.folder.shut()


class _Results:
    """The two files of one batch."""

    def __init__(self, folder: Folder, job: Job) -> None:
        """Raises InvalidRequest and OSError."""
        with contextlib.ExitStack() as stack:
            self._good = stack.enter_context(Output(folder.path_of(job.output_id), own=True))
            self._bad = stack.enter_context(Output(folder.path_of(job.error_id), own=True))
            self._opened = stack.pop_all()
        #: Why lines that are to be asked again had no answer the last time.
        self.causes: dict[str, str] = {}

    @property
    def torn_bytes(self) -> int:
        return self._good.torn_bytes + self._bad.torn_bytes

    @property
    def tally(self) -> Tally:
        return self._good.tally + self._bad.tally

    def has(self, custom_id: str) -> bool:
        return custom_id in self._good.done or custom_id in self._bad.done

    def write(self, answered: Answered) -> None:
        (self._good if answered.failure is None else self._bad).write(answered.line)

    def fill(
        self, left: Iterator[Line], code: str, message: str, cause: Callable[[Line], str]
    ) -> None:
        """Write that these lines did not run, and what kept each from it."""
        for line in left:
            told = " ".join(filter(None, (message, cause(line))))
            self._bad.write(unexecuted(line.custom_id, code, told))

    def sync(self) -> None:
        self._good.sync()
        self._bad.sync()

    def close(self) -> None:
        self._opened.close()


@dataclass(slots=True)
class _Running:
    """A batch that runs here."""

    owner: str
    task: asyncio.Task[None]
    #: Set to end it.
    stop: asyncio.Future[Ending]


class Jobs:
    """The batches of one gateway."""

    def __init__(self, gateway: Gateway, batches: Batches) -> None:
        self._gateway = gateway
        self._batches = batches
        self._doors = Doors(gateway, retry=_RETRY)
        self._running: dict[str, _Running] = {}
        #: By batch: not before this time (monotonic) again.
        self._paused_s: dict[str, float] = {}
        self._places = Places(gateway)

    # --- all of them ---

    async def loop(self) -> None:
        """Run batches until cancelled, whenever the lock can be had."""
        told = False
        while True:
            release = None
            try:
                release = await self._batches.do(self._batches.folder.lock)
            except OSError as error:
                log.error("the folder of batches cannot be used: %s", error)
            if release is None:
                if not told:
                    log.info("another gateway runs the batches of this folder")
                told = True
                await asyncio.sleep(_LOOK_S)
                continue
            told = False
            log.info("runs the batches of this folder")
            try:
                await self._run_all()
            except Exception:
                log.exception("the batches are begun anew")
                await asyncio.sleep(_PAUSE_S)
            finally:
                await self._end_all()
                release()

    async def _run_all(self) -> None:
        watching = asyncio.create_task(self._watch())
        tidied_s = float("-inf")
        try:
            while True:
                changed = self._batches.changed
                changed.clear()
                try:
                    if time.monotonic() - tidied_s >= _TIDY_S:
                        await self._batches.do(self._batches.folder.tidy, int(time.time()))
                        tidied_s = time.monotonic()
                    for one in await self._batches.do(self._batches.folder.open_jobs):
                        self._look(*one)
                except (sqlite3.Error, OSError) as error:
                    log.error("the folder of batches cannot be used: %s", error)
                    await asyncio.sleep(_PAUSE_S)
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(changed.wait(), _LOOK_S)
        finally:
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)

    def _look(self, id_: str, owner: str, status: str, expires_at: int) -> None:
        end: Ending | None = None
        if status == "cancelling":
            end = "cancelled"
        elif expires_at <= time.time():
            end = "expired"
        running = self._running.get(id_)
        if running is None:
            of_key = sum(one.owner == owner for one in self._running.values())
            # One that is to end needs no turn.
            may = end is not None or of_key < _AT_ONCE
            if not may or self._paused_s.get(id_, 0) > time.monotonic():
                return
            stop = asyncio.get_running_loop().create_future()
            task = asyncio.create_task(self._run(id_, stop))
            running = self._running[id_] = _Running(owner, task, stop)
            task.add_done_callback(lambda _: self._running.pop(id_, None))
        if end is not None and not running.stop.done():
            running.stop.set_result(end)

    async def _end_all(self) -> None:
        tasks = [running.task for running in self._running.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _watch(self) -> None:
        """Follow what the workers of each model can run at once."""
        while True:
            if self._running:
                with contextlib.suppress(BusError):
                    await self._places.see()
            self._places.keys.look()
            await asyncio.sleep(_LOOK_S)

    # --- one of them ---

    async def _run(self, id_: str, stop: asyncio.Future[Ending]) -> None:
        try:
            await self._to_its_end(id_, stop)
        except (sqlite3.Error, OSError, InvalidRequest) as error:
            log.error("batch waits", extra={"fields": {"batch": id_, "cause": str(error)}})
            self._paused_s[id_] = time.monotonic() + _PAUSE_S
        except Exception:
            log.exception("batch waits", extra={"fields": {"batch": id_}})
            self._paused_s[id_] = time.monotonic() + _PAUSE_S
        else:
            self._paused_s.pop(id_, None)

    async def _to_its_end(self, id_: str, stop: asyncio.Future[Ending]) -> None:
        folder = self._batches.folder
        job = await self._batches.do(folder.job, id_)
        path = folder.path_of(job.batch.input_file_id)
        # Lines that will not run are read as well.
        reads = job.ending is None or job.ending in _UNEXECUTED
        if reads and not await asyncio.to_thread(path.exists):
            await self._batches.do(folder.change, id_, _lose_input)
            log.error("the input of a batch is gone", extra={"fields": {"batch": id_}})
            return
        if job.batch.status == "validating":
            job = await self._checked_unless(job, stop)
        if job.batch.status == "failed":
            return
        self._places.expect(job.served)
        results = await asyncio.to_thread(_Results, folder, job)
        try:
            answered = results.tally.completed + results.tally.failed
            fields = {"batch": id_, "key": job.owner or "-", "answered": answered}
            fields["lines"] = job.batch.request_counts.total
            if results.torn_bytes:
                log.warning("an incomplete line is asked again", extra={"fields": fields})
            how: Ending = stop.result() if stop.done() else "cancelled"
            if job.batch.status == "in_progress":
                log.info("batch runs", extra={"fields": fields})
                how = await self._work(job, results, stop)
            await self._finish(job, results, how)
        finally:
            results.close()

    async def _checked_unless(self, job: Job, stop: asyncio.Future[Ending]) -> Job:
        """The batch after a look through its input, or as it was if it is to end before that."""
        checking = asyncio.create_task(self._checked(job))
        try:
            ends: set[asyncio.Future[Any]] = {checking, stop}
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            return checking.result() if checking.done() else job
        finally:
            checking.cancel()
            await asyncio.gather(checking, return_exceptions=True)

    async def _checked(self, job: Job) -> Job:
        """The batch after a look through its input: failed, in progress, or cancelled meanwhile."""
        folder, config = self._batches.folder, self._gateway.config
        path = folder.path_of(job.batch.input_file_id)
        found = await asyncio.to_thread(
            check,
            path,
            endpoint=job.batch.endpoint,
            most_lines=MAX_LINES,
            line_bytes=config.body_bytes,
            most_mistakes=_TOLD_MISTAKES,
        )
        served = await self._served()
        names = {config.served_name(model) for model in found.models if model}
        only = self._only(job, served) if "" in found.models else ""

        def decide(job: Job) -> None:
            if job.batch.status != "validating":
                return
            now = int(time.time())
            if found.mistakes:
                job.batch.fail(found.mistakes, now)
                return
            job.batch.move("in_progress", now)
            job.batch.request_counts.total = len(found.ids)
            job.only = only
            job.served = sorted(served & {*names, only})
            if len(names) == 1 and "" not in found.models:
                [job.batch.model] = names

        return await self._batches.do(folder.change, job.batch.id, decide)

    def _only(self, job: Job, served: set[str]) -> str:
        """The model of lines that name none, as a request at this moment gets it: the only one that
        the key may use. Empty if there is a choice or none."""
        key = self._key(job)
        usable = [model for model in served if isinstance(key, Key) and key.may_use(model)]
        return usable[0] if len(usable) == 1 else ""

    async def _served(self) -> set[str]:
        """The models of the bus; waits for a broker that is away."""
        while True:
            with contextlib.suppress(BusError):
                return await self._places.see()
            await asyncio.sleep(_WAIT_S)

    async def _work(self, job: Job, results: _Results, stop: asyncio.Future[Ending]) -> Ending:
        """Answer the lines that have no answer; returns how that ended."""
        if results.tally.completed + results.tally.failed >= job.batch.request_counts.total:
            return "completed"
        path = self._batches.folder.path_of(job.batch.input_file_id)
        left = (line for line in lines(path) if not results.has(line.custom_id))

        places, id_ = self._places, job.batch.id
        #: Lines that have room of their model and their key; those that sleep have none.
        inside: set[str] = set()

        async def come_in(line: Line) -> None:
            await self._within_budget(job)
            await places.enter(job.owner, self._model_of(line, job))
            inside.add(line.custom_id)

        def go_out(line: Line) -> None:
            if line.custom_id in inside:
                inside.remove(line.custom_id)
                places.leave(job.owner, self._model_of(line, job))

        async def enter(line: Line) -> None:
            await places.begun.enter(id_)
            try:
                await come_in(line)
            except BaseException:
                places.begun.leave(id_)
                raise

        def leave(line: Line) -> None:
            go_out(line)
            places.begun.leave(id_)

        async def answer(line: Line) -> None:
            wait_s = _WAIT_S
            while isinstance(answered := await self._answer(line, job), GatewayError):
                results.causes[line.custom_id] = answered.info.message
                go_out(line)
                await asyncio.sleep(wait_s)
                wait_s = min(2 * wait_s, _WAIT_LONGEST_S)
                await come_in(line)
            results.causes.pop(line.custom_id, None)
            results.write(answered)
            self._gateway.metrics.line_answered(job.batch.endpoint, answered.failure is None)

        working = asyncio.create_task(work_through(left, enter, answer, leave))
        saving = asyncio.create_task(self._save_loop(job, results))
        try:
            ends: set[asyncio.Future[Any]] = {working, saving, stop}
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            if saving.done():
                saving.result()
            if working.done():
                working.result()
                return "completed"
            return stop.result()
        finally:
            for task in (working, saving):
                task.cancel()
            await asyncio.gather(working, saving, return_exceptions=True)

    def _model_of(self, line: Line, job: Job) -> str:
        """The name under which its model has room."""
        model = line.model
        return self._gateway.config.served_name(model) if model else job.only

    async def _within_budget(self, job: Job) -> None:
        """Wait until the key's budget begins anew."""
        accounts, told = self._gateway.accounts, False
        if accounts is None:
            return
        while True:
            key = self._key(job)
            try:
                if isinstance(key, Key):
                    await accounts.admit(key)
                return
            except GatewayError as error:
                if not told:
                    fields = {"batch": job.batch.id, "cause": error.info.message}
                    log.info("batch waits", extra={"fields": fields})
                told = True
            await asyncio.sleep(_WAIT_LONGEST_S)

    def _key(self, job: Job) -> Key | GatewayError:
        """The key of a batch as it is now, or why it has none any more."""
        if self._gateway.keys is None:
            return replace(ANYBODY, name=job.owner)
        key = self._gateway.keys.named(job.owner)
        today = datetime.datetime.now(datetime.UTC).date()
        if key is None or (key.expires is not None and today > key.expires):
            return GatewayError(
                ErrorCode.UNAUTHENTICATED,
                f"The key of this batch, {job.owner!r}, was removed or has expired.",
            )
        return key

    async def _answer(self, line: Line, job: Job) -> Answered | GatewayError:
        """The answer of a line, or its own failure; or why it is to be asked again."""
        key = self._key(job)
        if isinstance(key, GatewayError):
            return refused(line, key)
        limits = Timeout(queue=_QUEUE_S)
        try:
            answered = await self._doors.answer(line, key, limits, default_model=job.only)
            failure = answered.failure
        except Unanswered as error:
            failure = error.told
        else:
            if failure is None or not self._is_for_later(failure, line, job):
                return answered
        log.debug("line waits", extra={"fields": {"batch": job.batch.id, "why": failure.info}})
        return failure

    def _is_for_later(self, failure: GatewayError, line: Line, job: Job) -> bool:
        if failure.info.code == ErrorCode.MODEL_UNAVAILABLE:
            return self._model_of(line, job) in job.served
        return failure.info.code in _LATER

    async def _save_loop(self, job: Job, results: _Results) -> None:
        """Put answers on the disk, and then their counts into the database, until cancelled."""
        saved: Tally | None = None
        while True:
            tally = results.tally
            if tally != saved:
                await asyncio.to_thread(results.sync)
                count = partial(_count, tally)
                await self._batches.do(self._batches.folder.change, job.batch.id, count)
                saved = tally
            await asyncio.sleep(_LOOK_S)

    async def _finish(self, job: Job, results: _Results, how: Ending) -> None:
        """Every line gets its one answer; name the files."""
        folder, id_ = self._batches.folder, job.batch.id

        def finalize(job: Job) -> None:
            if job.batch.status == "cancelling":
                job.ending = "cancelled"
            elif job.ending is None and job.batch.status in OPEN:
                job.ending = how
                job.batch.move("finalizing", int(time.time()))

        job = await self._batches.do(folder.change, id_, finalize)
        if job.ending is None:
            return  # failed meanwhile
        await asyncio.to_thread(self._fill, job, results)
        files = await asyncio.to_thread(self._files, job)

        def end(job: Job) -> None:
            assert job.ending is not None
            _count(results.tally, job)
            for file in files:
                if file.id == job.output_id:
                    job.batch.output_file_id = file.id
                else:
                    job.batch.error_file_id = file.id
            job.batch.move(job.ending, int(time.time()))

        job = await self._batches.do(folder.change, id_, end, files)
        counts = job.batch.request_counts
        fields = {
            **{"batch": id_, "key": job.owner or "-", "status": job.batch.status},
            **{"completed": counts.completed, "failed": counts.failed},
        }
        log.info("batch over", extra={"fields": fields})

    def _fill(self, job: Job, results: _Results) -> None:
        """Write of the lines that will not run that they did not."""
        path = self._batches.folder.path_of(job.batch.input_file_id)
        if job.ending in _UNEXECUTED and job.batch.request_counts.total:
            left = (line for line in lines(path) if not results.has(line.custom_id))
            results.fill(left, *_UNEXECUTED[job.ending], partial(self._cause, job, results))
        results.sync()

    def _cause(self, job: Job, results: _Results, line: Line) -> str:
        """What kept a line waiting until the batch expired; empty if nothing is known."""
        if job.ending != "expired":
            return ""
        if cause := results.causes.get(line.custom_id):
            return f"The last cause: {cause}"
        model = self._model_of(line, job)
        return f"No worker serves the model {model!r} now." if self._places.away(model) else ""

    def _files(self, job: Job) -> list[FileObject]:
        """The files that hold anything; the others are removed."""
        now, files = int(time.time()), []
        for id_, what in ((job.output_id, "output"), (job.error_id, "error")):
            path = self._batches.folder.path_of(id_)
            size_bytes = path.stat().st_size
            if not size_bytes:
                path.unlink()
                continue
            expires = None if job.output_expires_s is None else now + job.output_expires_s
            files.append(
                FileObject(
                    id=id_,
                    bytes=size_bytes,
                    created_at=now,
                    filename=f"{job.batch.id}_{what}.jsonl",
                    purpose="batch_output",
                    expires_at=expires,
                )
            )
        self._batches.folder.sync_names()
        return files


def _lose_input(job: Job) -> None:
    mistake = Mistake("file_not_found", "The input of this batch is not in the folder any more.")
    job.batch.fail([mistake], int(time.time()))


def _count(tally: Tally, job: Job) -> None:
    job.batch.count(tally)
