"""The engine process of a simulated worker: one token per job and step; it can die and hang."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from broker.protocol import codec
from broker.protocol.limits import MAX_REQUEST_BYTES
from broker.protocol.messages import Kind, ModelInfo, Request, kind_fields
from tests.simulation.answers import NAME_BEGUN, PIECES, Answer, result_of, splitter
from tests.simulation.world import Violation
from worker.core import events as worker_events
from worker.engines.base import Capabilities
from worker.engines.common.pieces import PieceText
from worker.engines.events import END, FAIL, TOKENS

if TYPE_CHECKING:
    from tests.simulation.worker import SimWorker

MODEL = "model"


@dataclass(slots=True)
class _Job:
    answer: Answer
    #: Whether it is answered as a whole, without tokens.
    whole: bool
    position: int
    #: Splits the answer into pieces.
    text: PieceText | None = None
    cancelled: bool = False


class SimEngine:
    """One engine process."""

    def __init__(
        self,
        worker: SimWorker,
        step_s: float,
        load_s: float,
        names: tuple[str, ...] = (MODEL,),
        say: Callable[[SimEngine, Any], None] | None = None,
        fails: bool = False,
    ) -> None:
        """`say`: where its events go; None: to its worker. `fails`: its model cannot be loaded."""
        self._fails = fails
        self.names = names
        self._say = say or (lambda engine, event: worker.tell(event))
        self.worker = worker
        self.world = worker.world
        self.step_s = step_s
        self.jobs: dict[bytes, _Job] = {}
        self.alive = True
        self.hung = False
        self.ready = False
        self._stepping = False
        self.world.after(load_s, self._loaded)

    def _loaded(self) -> None:
        if self.alive and self._fails:
            self.alive = False
            self._say(self, worker_events.WorkerFailed("there is not enough memory"))
        elif self.alive:
            self.ready = True
            kinds = kind_fields((Kind.COMPLETE, Kind.EMBED, Kind.DECIDE))
            models = tuple(
                ModelInfo(name=name, context_tokens=1 << 20, **kinds) for name in self.names
            )
            capabilities = Capabilities("sim", "none", models, self.worker.slots)
            self._say(self, worker_events.EngineReady(capabilities))

    def add(self, job_id: bytes, body: bytes) -> None:
        """Add a job. If the engine has died in the meantime, the job is lost with it."""
        if not self.alive:
            return
        name = self.worker.name
        if not self.ready:
            raise Violation(f"{name} was given work while loading")
        request = codec.decode(Request, body, MAX_REQUEST_BYTES)
        if request.model not in self.names:
            raise Violation(f"{name} gives a request for {request.model} to {self.names}")
        answer = Answer.of(request)
        position = 0
        if request.resume is not None:
            given = request.resume.token_ids
            position = len(given)
            if given != [answer.token(i) for i in range(position)]:
                raise Violation(f"{name} must continue tokens that were never generated")
            sure = sum(len(piece.text) for piece in answer.said(position))
            if request.resume.text_characters != sure:
                raise Violation(
                    f"{name} must continue after {request.resume.text_characters} "
                    f"characters, but {position} tokens have {sure}"
                )
            if answer.split:
                self.worker.resumed_in[_place(answer, position)] += 1
        text = None
        if answer.split:
            if request.params.pieces != PIECES:
                raise Violation(f"{name} is asked for the pieces {request.params.pieces}")
            text = splitter(request.resume.text_characters if request.resume is not None else 0)
            if text.add(answer.text(answer.sure_until(position)), may_stop=True):
                raise Violation(f"{name} would say again what was received")
        # A cancelled job ends at the next step; its successor may be added before that.
        replaced = sum(job.cancelled for job in self.jobs.values())
        self.jobs[job_id] = _Job(answer, request.kind is not Kind.COMPLETE, position, text)
        if len(self.jobs) > self.worker.slots + replaced:
            raise Violation(f"{name} runs {len(self.jobs)} in {self.worker.slots} slots")
        self.worker.runs[answer.prompt] += 1
        self._go_on()

    def cancel(self, job_id: bytes) -> None:
        """Stop a job at the next step."""
        if job_id in self.jobs:
            self.jobs[job_id].cancelled = True
            self._go_on()

    def die(self) -> None:
        """Lose the process with all its jobs."""
        self.alive = False
        self.jobs.clear()

    def _go_on(self) -> None:
        if not self._stepping and self.jobs and self.alive and not self.hung:
            self._stepping = True
            self.world.after(self.step_s * self.world.rng.uniform(0.5, 1.5), self._step)

    def _step(self) -> None:
        self._stepping = False
        if not self.alive or self.hung:
            return
        for job in self.jobs.values():
            if job.answer.kills and job.position == job.answer.fails_at:
                if job.answer.kills == "worker":
                    self.worker.kill()
                else:
                    self.worker.engine_dies(self)
                return
        events: list[list[Any]] = []
        for job_id, job in list(self.jobs.items()):
            events += self._events(job_id, job)
        self._say(self, worker_events.EngineStepped(events))
        self._go_on()

    def _events(self, job_id: bytes, job: _Job) -> list[list[Any]]:
        answer = job.answer
        if job.cancelled:
            del self.jobs[job_id]
            return [[END, job_id, "cancelled", "", {}, {}, None, None]]
        if job.whole:
            del self.jobs[job_id]
            _, result = result_of(answer.prompt)
            return [[END, job_id, "stop", "", {"prompt_tokens": 2}, {}, result, None]]
        if job.position == answer.fails_at and not self._mended(answer):
            del self.jobs[job_id]
            code = "worker_lost" if answer.fails_once else "engine_error"
            error = {"code": code, "message": "no", "retryable": answer.fails_once}
            return [[FAIL, job_id, error, {}]]
        events: list[list[Any]] = []
        if job.position < answer.length:
            before, job.position = job.position, job.position + 1
            text, pieces = self._text(job, before, job.position)
            events.append([TOKENS, job_id, [answer.token(before)], text, None, pieces])
            self.worker.computed[answer.prompt] += 1
        if job.position >= answer.length:
            del self.jobs[job_id]
            rest, pieces = self._text(job, job.position, None)
            usage = {"prompt_tokens": 1, "completion_tokens": answer.length}
            events.append([END, job_id, "length", rest, usage, {}, None, None, pieces])
        return events

    @staticmethod
    def _text(job: _Job, before: int, after: int | None) -> tuple[str, list[Any] | None]:
        """What an event says of the tokens between these; without an end, of the rest."""
        answer = job.answer
        sure = len(answer.text(answer.sure_until(before)))
        if after is None:
            text = answer.text(answer.length)[sure:]
        else:
            text = answer.text(answer.sure_until(after))[sure:]
        if job.text is None:
            return text, None
        said = job.text.add(text, may_stop=True)
        if after is None:
            said += job.text.finish(may_stop=True)
        content, pieces = job.text.event(said)
        return content, None if pieces is None else [[piece.kind, piece.text] for piece in pieces]

    def _mended(self, answer: Answer) -> bool:
        """Whether a failure that happens only once has happened."""
        if not answer.fails_once:
            return False
        failed: Counter[str] = self.worker.failed
        failed[answer.prompt] += 1
        return failed[answer.prompt] > 1


def _place(answer: Answer, position: int) -> str:
    """In what an answer is continued behind so many tokens."""
    said, later = answer.said(position), answer.said(position + 1)
    if position and answer.token(position - 1) == NAME_BEGUN:
        return "name"
    if said and said == later:
        return said[-1].kind
    return later[-1].kind if later else "beginning"
