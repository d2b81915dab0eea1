"""The engine of a relay, sans-IO: jobs of the upper bus become requests of the lower one.

    upper broker ── WorkerCore ── RelayCore ── ClientSession ── lower broker

Towards the upper bus it keeps the rules of an engine (`worker.engines.base`), except that its
number of slots varies: they belong to the lower bus, and others use them too. It offers the slots
that were free when the lower broker was last asked, plus those that run requests for the upper bus;
it asks once a second, and more often while that changes. Towards the lower bus it is a client like
any other: the client's session resumes interrupted streams there, unnoticed by the upper bus. Must
never touch a socket or a clock.
"""

from __future__ import annotations

import logging
import math
import random
from dataclasses import dataclass
from typing import Any, Final

import msgspec

from broker.protocol import codec
from broker.protocol.errors import ErrorCode, ErrorInfo
from broker.protocol.limits import MAX_REQUEST_BYTES
from broker.protocol.messages import (
    FinishReason,
    ModelInfo,
    PromptEvent,
    Request,
    Resume,
    TokensEvent,
    Usage,
)
from client.core import events as below
from client.errors import BusError
from client.options import Retry, Timeout
from worker.core import events as above
from worker.core.instructions import Log
from worker.engines.base import Capabilities, Ended, Failed, FailedLoad, PromptFacts, Tokens
from worker.relay.survey import SAME_S, Survey, SurveyError, failures, read

ASK_S: Final = 1.0
"""Interval between two surveys of the lower bus."""
ASK_SOON_S: Final = 0.05
"""The same while slots change hands."""
SOON_FOR_S: Final = 0.5
ANSWER_S: Final = 3.0
"""A lower broker that does not answer for this long has nothing to offer."""
KEPT_MODEL_S: Final = 10.0
"""How long a model stays offered, without a slot, after its last worker has left: a broker that has
just been restarted takes a moment to know its workers."""
LOOP_S: Final = 5.0
"""In a loop of relays, the one whose name sorts first leaves at once, the others after this
delay."""
EPOCHS: Final = 1024
"""An epoch on the lower bus is the epoch from above times this, raised with each RESUME there. Thus
a request can keep its id, and a relay that knows nothing of its predecessor still uses a later
epoch, since two epochs from above differ by at least this much below."""
USED_IDS: Final = 65_536
LONGEST_LIMIT_S: Final = 1e9
"""The longest limit that callers of the client library can set."""

#: Codes that are resumed here, because another worker of the lower bus can continue. All others are
#: passed to the caller.
_RECOVERED: Final = frozenset(
    code.value
    for code in (
        ErrorCode.WORKER_LOST,
        ErrorCode.DRAINING,
        ErrorCode.CONNECTION_LOST,
        ErrorCode.UNKNOWN_SESSION,
    )
)
_FAILED_LOADS: Final = "bus.failed_loads"
#: Codes that mean a wrong key or a wrong port, which retrying does not fix.
_HOPELESS: Final = frozenset((ErrorCode.UNAUTHENTICATED.value, ErrorCode.PROTOCOL_ERROR.value))


@dataclass(frozen=True, slots=True)
class RelaySettings:
    """Settings of the core."""

    #: The lower broker's unique name. If it appears among the brokers behind one of that broker's
    #: own workers, there is a loop.
    mark: str
    #: The lower broker's address, for people.
    lower: str
    #: Requests that the lower broker allows one client to have at once.
    inflight: int = 1024


# --- events ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Begun:
    """The process has started."""


@dataclass(frozen=True, slots=True)
class JobAdded:
    """The upper bus has a job; `body` is its `Request`, already checked but still encoded."""

    job_id: bytes
    body: bytes
    attachments: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class JobCancelled:
    """The upper bus no longer wants a job."""

    job_id: bytes


@dataclass(frozen=True, slots=True)
class WindowMoved:
    """The caller on the upper bus accepts tokens with offsets below `limit`."""

    job_id: bytes
    limit: int


@dataclass(frozen=True, slots=True)
class ItemsArrived:
    """The lower bus answered something about a request or a query."""

    id: bytes
    items: tuple[below.Item, ...]


@dataclass(frozen=True, slots=True)
class Tick:
    """The time given by `deadline_s` has come."""


Event = Begun | JobAdded | JobCancelled | WindowMoved | ItemsArrived | Tick


# --- instructions ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Ask:
    """An event for the client's session on the lower bus."""

    event: below.Event


@dataclass(frozen=True, slots=True)
class Report:
    """An event for the worker's core on the upper bus."""

    event: above.Event


Instruction = Ask | Report | Log


class _Job:
    """A request of the upper bus that runs, or waits, on the lower one."""

    __slots__ = (
        "blocked",
        "have",
        "id",
        "limit",
        "lower_id",
        "model",
        "started",
        "taken",
        "window_tokens",
    )

    def __init__(self, id_: bytes, lower_id: bytes, request: Request) -> None:
        self.id = id_
        self.lower_id = lower_id
        self.model = request.model
        #: Whether a worker of the lower bus runs it.
        self.started = False
        #: Number of tokens of the answer so far, including those of a RESUME.
        self.have = len(request.resume.token_ids) if request.resume else 0
        #: The window above (an offset), and the number of tokens that it allowed at the start.
        self.limit = request.window
        self.window_tokens = max(1, request.window - self.have)
        #: The offset last reported as read to the session below, from which its window counts.
        self.taken = 0
        #: Whether it was waiting for the window at the last survey: it may have left its slot long
        #: ago, with only the rest of its answer to come, and that slot was counted as free.
        self.blocked = False

    def due_taken(self) -> int:
        """The offset to report as read, so that the window below equals the one above."""
        return min(self.limit - self.window_tokens, self.have)


class RelayCore:
    """Everything of a relay except its two sessions."""

    def __init__(self, settings: RelaySettings, generator: random.Random | None = None) -> None:
        self._settings = settings
        self._random = generator or random.SystemRandom()
        self._jobs: dict[bytes, _Job] = {}
        self._by_lower: dict[bytes, _Job] = {}
        #: Ids that were used on the lower bus, oldest first.
        self._used: dict[bytes, None] = {}

        #: The open queries, by verb, and the jobs that were open when they were sent.
        self._asked: dict[bytes, str] = {}
        self._answers: dict[str, Any] = {}
        self._asked_jobs: frozenset[bytes] = frozenset()
        self._ask_s = 0.0
        self._soon_until_s = 0.0

        #: The last survey; None before the first, and while the lower broker does not answer.
        self._survey: Survey | None = None
        self._absent_told = False
        #: Whether others wait there, so that a slot which we free is not ours to grant again.
        self._contended = False
        #: Slots for us, including those in use; and by model, if that is fewer.
        self._capacity = 0
        self._capacity_of: dict[str, int] = {}
        #: Models, with the time when they were last seen.
        self._models: dict[str, tuple[ModelInfo, float]] = {}
        #: Models that the lower bus cannot load.
        self._failed: dict[str, FailedLoad] = {}
        #: Brokers behind the lower one.
        self._via: tuple[str, ...] = ()
        self._told: Capabilities | None = None
        self._loop_since_s: float | None = None
        #: When the last worker below will be gone, as it was told above; infinity: not known.
        self._ends_s = math.inf

        self._now_s = 0.0
        self._out: list[Instruction] = []
        #: Events of jobs, in the form expected by the worker's core.
        self._events: list[Any] = []

    # --- interface --------------------------------------------------------------------------------

    def handle(self, event: Event, now_s: float) -> list[Instruction]:
        """Take an event; returns instructions, to be carried out in order."""
        self._now_s = now_s
        out: list[Instruction] = []
        self._out = out
        match event:
            case ItemsArrived(id_, items):
                self._on_items(id_, items)
            case WindowMoved(job_id, limit):
                self._on_window(job_id, limit)
            case JobAdded():
                self._on_job(event)
            case JobCancelled(job_id):
                self._on_cancel(job_id)
            case Begun():
                note = f"waiting for the lower broker at {self._settings.lower}"
                out.append(Report(above.EngineLoading(None, note)))
                self._ask()
            case Tick():
                if now_s >= self._ask_s and not self._asked:
                    self._ask()
        # Report fewer slots first; otherwise the worker would grant the slot that was just freed.
        self._offer()
        if self._events:
            events, self._events = self._events, []
            out.append(Report(above.EngineStepped(events)))
        return out

    def deadline_s(self) -> float:
        """When a `Tick` is due."""
        return math.inf if self._asked else self._ask_s

    @property
    def capacity(self) -> int:
        """Slots offered, including those in use."""
        return self._capacity

    def invariants(self) -> None:
        """Raise AssertionError if the state contradicts itself."""
        assert len(self._jobs) == len(self._by_lower), "a job without its request"
        for job in self._jobs.values():
            assert self._by_lower.get(job.lower_id) is job
            assert job.taken <= job.have, f"{job.taken} of {job.have} tokens reported as read"
        assert self._capacity >= 0

    # --- jobs -------------------------------------------------------------------------------------

    def _on_job(self, added: JobAdded) -> None:
        request = codec.decode(Request, added.body, MAX_REQUEST_BYTES)
        # The same id if possible: a request that still runs on the lower bus for a relay that died
        # then continues instead of running twice.
        lower_id = added.job_id if added.job_id not in self._used else self._new_id()
        self._used[lower_id] = None
        if len(self._used) > USED_IDS:
            del self._used[next(iter(self._used))]
        job = _Job(added.job_id, lower_id, request)
        self._jobs[job.id] = self._by_lower[lower_id] = job
        resume = request.resume
        if resume is not None:
            resume = Resume(
                epoch=min(resume.epoch, (1 << 62) // EPOCHS) * EPOCHS,
                token_ids=resume.token_ids,
                text_characters=resume.text_characters,
                prompt_seen=resume.prompt_seen,
            )
        made = below.RequestMade(
            request_id=lower_id,
            request=msgspec.structs.replace(request, resume=None),
            attachments=added.attachments,
            timeout=Timeout(
                queue=_seconds(request.queue_ms),
                first_token=None,
                between_tokens=None,
                total=_seconds(request.ttl_ms),
            ),
            retry=Retry(codes=_RECOVERED),
            window_tokens=job.window_tokens,
            resume=resume,
        )
        self._out.append(Ask(made))

    def _on_cancel(self, job_id: bytes) -> None:
        job = self._jobs.get(job_id)
        if job is None:
            return
        self._out.append(Ask(below.RequestDropped(job.lower_id)))
        usage = Usage(completion_tokens=job.have)
        # The slot below is free one step later: it is offered again once a survey shows it.
        self._over(job, Ended(job.id, FinishReason.CANCELLED, usage=usage), seen_free=False)

    def _on_window(self, job_id: bytes, limit: int) -> None:
        job = self._jobs.get(job_id)
        if job is not None and limit > job.limit:
            job.limit = limit
            self._tell_taken(job, 1)

    def _tell_taken(self, job: _Job, at_least: int) -> None:
        taken = job.due_taken()
        if taken - job.taken >= at_least:
            job.taken = taken
            self._out.append(Ask(below.TokensTaken(job.lower_id, taken)))

    def _on_items(self, id_: bytes, items: tuple[below.Item, ...]) -> None:
        if id_ in self._asked:
            self._on_answer(id_, items[-1])
            return
        for item in items:
            job = self._by_lower.get(id_)
            if job is None:
                return  # it was cancelled
            self._on_item(job, item)

    def _on_item(self, job: _Job, item: below.Item) -> None:
        match item:
            case TokensEvent():
                job.have += len(item.token_ids)
                self._say(Tokens(job.id, item.token_ids, item.text, item.logprobs, item.pieces))
                self._tell_taken(job, max(1, job.window_tokens // 4))
            case below.Started():
                job.started = True
            case below.Queued():
                job.started = False
            case below.Recovering():
                job.started = False
                self._soon()
                self._log("resuming below", request=job.lower_id[:4].hex(), cause=item.reason)
            case PromptEvent():
                self._say(
                    PromptFacts(
                        job.id,
                        item.token_ids,
                        item.text,
                        item.logprobs,
                        item.special,
                        item.tail,
                        item.usage,
                    )
                )
            case below.End():
                self._over(
                    job,
                    Ended(
                        job.id,
                        item.finish_reason,
                        item.text,
                        item.usage,
                        item.timings,
                        item.result,
                        item.stopped_by,
                        item.pieces,
                    ),
                )
            case BusError():
                error = ErrorInfo(
                    code=item.code,
                    message=item.message,
                    retryable=item.retryable,
                    retry_after_ms=item.retry_after_ms,
                    details=item.details,
                )
                seen_free = job.started and item.code != ErrorCode.CONNECTION_LOST
                self._over(job, Failed(job.id, error, Usage(completion_tokens=job.have)), seen_free)

    def _over(self, job: _Job, end: Ended | Failed, seen_free: bool = True) -> None:
        """A job left. Its slot is ours to grant again unless somebody else waits for it."""
        del self._jobs[job.id], self._by_lower[job.lower_id]
        self._say(end)
        if not seen_free or job.blocked or self._contended or self._survey is None:
            self._capacity = max(0, self._capacity - 1)
            if job.model in self._capacity_of:
                self._capacity_of[job.model] = max(0, self._capacity_of[job.model] - 1)
            self._soon()
        elif self._capacity_of:
            self._soon()

    def _say(self, event: Tokens | Ended | Failed | PromptFacts) -> None:
        self._events.append(msgspec.to_builtins(event, builtin_types=(bytes,)))

    def _new_id(self) -> bytes:
        return bytes((self._random.randrange(1, 256),)) + self._random.randbytes(15)

    # --- slots of the lower bus -------------------------------------------------------------------

    def _ask(self) -> None:
        self._answers = {}
        self._asked_jobs = frozenset(self._jobs)
        # Workers last: that answer is the newest, and all that we know about our jobs came before
        # it.
        for verb in (_FAILED_LOADS, "bus.models", "bus.workers"):
            query_id = self._new_id()
            self._asked[query_id] = verb
            timeout = Timeout(connect=ANSWER_S, total=ANSWER_S)
            self._out.append(Ask(below.QueryMade(query_id, verb, {}, timeout)))
        if self._jobs:
            # The worker's core would take a silent engine for a hung one; whether a worker of the
            # lower bus hangs is for the lower broker to find out.
            self._out.append(Report(above.EngineStepped([])))

    def _soon(self) -> None:
        self._soon_until_s = self._now_s + SOON_FOR_S
        self._ask_s = min(self._ask_s, self._now_s + ASK_SOON_S)

    def _on_answer(self, query_id: bytes, item: below.Item) -> None:
        verb = self._asked.pop(query_id)
        error = item if isinstance(item, BusError) else None
        if error and verb == _FAILED_LOADS and error.code == ErrorCode.INVALID_REQUEST:
            item = below.Answered([])  # the broker is older than this question
        if isinstance(item, BusError):
            self._asked.clear()
            self._wait()
            self._absent(item)
            return
        assert isinstance(item, below.Answered)
        self._answers[verb] = item.result
        if self._asked:
            return
        self._wait()
        try:
            answers = self._answers
            survey = read(answers["bus.workers"], answers["bus.models"], answers[_FAILED_LOADS])
        except SurveyError as error:
            self._out.append(Report(above.WorkerFailed(str(error))))
            return
        self._surveyed(survey)

    def _wait(self) -> None:
        soon = self._now_s < self._soon_until_s
        self._ask_s = self._now_s + (ASK_SOON_S if soon else ASK_S)

    def _absent(self, error: BusError) -> None:
        """The lower broker does not answer: running requests are resumed there later, and no new
        ones are accepted."""
        if error.code in _HOPELESS:
            self._out.append(Report(above.WorkerFailed(f"lower broker: {error}")))
            return
        self._survey = None
        self._capacity = min(self._capacity, len(self._jobs))
        if not self._absent_told:
            self._absent_told = True
            self._log("lower broker absent", logging.WARNING, cause=error.message)

    def _surveyed(self, survey: Survey) -> None:
        if self._absent_told:
            self._absent_told = False
            self._log("lower broker answers")
        self._survey = survey
        self._via = survey.via
        for info in survey.models:
            self._models[info.name] = info, self._now_s
        # Slots that we had when we asked and still have are ours in addition to the free ones.
        known = [self._jobs[id_] for id_ in self._asked_jobs if id_ in self._jobs]
        running = [job.model for job in known if job.started]
        for job in known:
            job.blocked = job.have >= job.taken + job.window_tokens
        looped = self._looped(survey)
        free = 0 if looped else survey.free
        self._capacity = min(len(running) + free, self._settings.inflight)
        self._capacity_of = {
            name: running.count(name) + (0 if looped else free_of)
            for name, free_of in survey.free_of.items()
        }
        self._failed = {} if looped else failures(survey, self._failed, self._now_s)
        for name in self._failed:
            self._models.pop(name, None)
        served = {info.name for info in survey.models}
        self._capacity_of |= {name: 0 for name in self._models if name not in served}
        self._contended = survey.queued > len(known) - len(running)
        self._tell_end(survey)
        self._out.append(
            Report(
                above.EngineMeasured(
                    {
                        "running": float(len(self._jobs)),
                        "waiting": float(len(self._jobs) - sum(map(_started, self._jobs.values()))),
                        "lower_free": float(survey.free),
                        "lower_queued": float(survey.queued),
                        "lower_workers": float(survey.ready_workers),
                    }
                )
            )
        )

    def _tell_end(self, survey: Survey) -> None:
        """Report when the last worker below ends, so that the broker above moves streams away in
        time."""
        in_ms = survey.ends_in_ms
        ends_s = math.inf if in_ms is None else self._now_s + in_ms / 1000
        if ends_s != self._ends_s and not abs(ends_s - self._ends_s) < SAME_S:
            self._ends_s = ends_s
            self._out.append(Report(above.EndKnown(ends_s, survey.ends_why)))

    def _looped(self, survey: Survey) -> bool:
        """Whether the lower broker reaches itself through the upper one. If so, nothing is offered,
        and one relay of the loop leaves."""
        mark = self._settings.mark
        if mark not in survey.via:
            self._loop_since_s = None
            return False
        around = ", ".join(survey.via)
        story = (
            f"a loop of brokers: {mark} would be its own worker, through {around}: remove "
            "--upstream from one of them"
        )
        if self._loop_since_s is None:
            self._loop_since_s = self._now_s
            self._log("loop of brokers", logging.ERROR, via=around)
        if mark == min(survey.via) or self._now_s >= self._loop_since_s + LOOP_S:
            self._out.append(Report(above.WorkerFailed(story)))
        return True

    def _offer(self) -> None:
        """Tell the worker's core what is offered, if that has changed."""
        if self._told is None and self._survey is None:
            return
        capabilities = Capabilities(
            *("bus", self._settings.lower, self._infos(), self._capacity),
            failed=tuple(self._failed.values()),
        )
        if capabilities == self._told:
            return
        first, self._told = self._told is None, capabilities
        event = above.EngineReady if first else above.EngineChanged
        self._out.append(Report(event(capabilities)))

    def _infos(self) -> tuple[ModelInfo, ...]:
        via = [self._settings.mark, *self._via]
        self._models = {
            name: (info, seen_s)
            for name, (info, seen_s) in self._models.items()
            if self._survey is None or seen_s + KEPT_MODEL_S > self._now_s
        }
        return tuple(
            msgspec.structs.replace(
                info,
                capacity=self._capacity_of.get(name),
                details={**info.details, "via": via},
            )
            for name, (info, _) in self._models.items()
        )

    def _log(self, event: str, level: int = logging.INFO, **fields: Any) -> None:
        self._out.append(Log(event, {"lower": self._settings.lower, **fields}, level))


def _started(job: _Job) -> bool:
    return job.started


def _seconds(ms: int | None) -> float | None:
    """A limit from the wire, in seconds, for `Timeout`."""
    return None if ms is None else min(max(ms, 1) / 1000, LONGEST_LIMIT_S)
