"""The engine: jobs in, HTTP out, events back; several models of one server.

Chats, completions and embeddings go to the server as its own API takes them, as text (`answer`). If
the model's tokenizer is known and the server takes and returns token ids, requests that can go by
ids do (`ids`): texts are then made here, and an answer is continued after the same tokens. If the
server dies, this engine ends with the cause: its process is started anew and waits for the server.
Must never answer in a server's place.
"""

from __future__ import annotations

import struct
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from broker.protocol.errors import ErrorCode, ErrorInfo, RequestError
from broker.protocol.install import install_hint
from broker.protocol.messages import FinishReason, Kind, Usage
from worker.engines.base import (
    Capabilities,
    Ended,
    EngineEvent,
    EngineGone,
    EngineLoadError,
    EngineOptions,
    Failed,
    Job,
    Progress,
    Tokens,
)
from worker.engines.common.arguments import SharedSettings, refuse_options
from worker.engines.common.reasoning import AnswerFormat, find_format
from worker.engines.openai.answer import TextAnswer
from worker.engines.openai.bodies import body_of, refused
from worker.engines.openai.discover import Found, Model, discover
from worker.engines.openai.http import Chunk, Done, Fault, Server, Unreachable
from worker.engines.openai.room import Room
from worker.engines.openai.settings import Settings, read
from worker.engines.openai.text_ids import is_text

if TYPE_CHECKING:
    from worker.engines.openai.ids import IdsEngine

__all__ = ["OpenAIEngine", "build_engine"]

WAIT_S: Final = 0.005
"""How long a step waits for the server; the engine's loop must take new jobs."""


def build_engine(options: EngineOptions, progress: Progress) -> OpenAIEngine:
    """Wait for the server and describe what it serves. Raises `EngineLoadError`."""
    settings = read(options.engine_args)
    refuse_options(
        options,
        {
            "model_base": "the server loads its models itself",
            "load_8bit": "the server loads its models itself",
            "load_4bit": "the server loads its models itself",
            "revision": "the server loads its models itself",
            "chat_template": "the server renders its chats itself",
        },
    )
    format_ = find_format(None, "", options.reasoning_parser)
    server = Server(settings)
    try:
        found = discover(server, settings, options, progress)
    except Unreachable as error:
        server.close()
        raise EngineLoadError(f"the server at {server.where} went away: {error}") from None
    except EngineLoadError:
        server.close()
        raise
    slots = options.slots or found.slots or settings.slots(found.server)
    try:
        exact = _by_ids(server, settings, found, slots, options, progress)
    except (Unreachable, EngineLoadError) as error:
        server.close()
        raise EngineLoadError(str(error)) from None
    server.watch(found.health)
    progress(1.0, "ready")
    return OpenAIEngine(server, settings, found, slots, format_, exact)


def _by_ids(
    server: Server,
    settings: Settings,
    found: Found,
    slots: int,
    options: EngineOptions,
    progress: Progress,
) -> IdsEngine | None:
    """The engine for models whose tokenizers are known, at a server that takes and returns ids. A
    tokenizer that the operator named must fit; one found next to the weights is not used if it does
    not. Raises `EngineLoadError`."""
    models, generators = [], []
    for model in found.models:
        native = found.server == "llamacpp"
        root = Path(model.root) if model.root else None
        lies_there = root is not None and (root / "config.json").is_file()
        named = settings.tokenizer
        path = named or (str(root) if lies_there else "")
        if not path or path == "none" or not (model.ids or native):
            if named not in ("", "none"):
                raise EngineLoadError(
                    f"--engine-arg tokenizer={named}: the server at {server.where} does not take "
                    f"and return token ids for {model.id}; leave it out"
                )
            continue
        progress(None, f"comparing the tokenizer of {model.id}")
        try:
            if any(find_spec(name) is None for name in ("torch", "transformers")):
                raise EngineLoadError(
                    f"exchanging token ids needs transformers: {install_hint('worker')}"
                )
            from worker.engines.openai.ids import build_ids

            made, generator = build_ids(server, model, found.server, path, slots, options)
        except EngineLoadError as error:
            if named:
                raise
            model.details["no_ids"] = str(error)[:300]
            continue
        model.exact = True
        models.append(made)
        generators.append(generator)
    if not models:
        return None
    from worker.engines.openai.ids import IdsEngine

    return IdsEngine(found.server, models, generators, SharedSettings())


@dataclass(slots=True)
class _Running:
    """A request sent to the server; `answer` is None for an embedding."""

    job: Job
    answer: TextAnswer | None
    number: int = 0
    cancelled: bool = False
    path: str = ""
    #: None once the server has begun to answer.
    room: Room | None = None


class OpenAIEngine:
    """Passes requests on to one server (see `worker.engines.base.Engine`)."""

    def __init__(
        self,
        server: Server,
        settings: Settings,
        found: Found,
        slots: int,
        format_: AnswerFormat | None,
        exact: IdsEngine | None = None,
    ) -> None:
        self._server = server
        self._exact = exact
        self._dialect = found.dialect
        self._format = format_
        self._models = {name: model for model in found.models for name in model.names}
        self._running: dict[bytes, _Running] = {}
        self._by_number: dict[int, _Running] = {}
        self._events: list[EngineEvent] = []
        self._tokens: list[tuple[float, int]] = []
        self._ttft_ms = 0.0
        infos = [info for model in found.models for info in model.infos()]
        version = f" {found.version}" if found.version else ""
        self._capabilities = Capabilities(
            engine="openai",
            device=f"{found.server}{version} at {server.where}",
            models=tuple(infos),
            capacity=slots,
        )

    # --- the engine contract ----------------------------------------------------------------------

    @property
    def capabilities(self) -> Capabilities:
        return self._capabilities

    @property
    def busy(self) -> bool:
        return bool(self._running or self._events or (self._exact and self._exact.busy))

    def add(self, job: Job) -> None:
        """Send a job to the server."""
        if job.request_id in self._running:
            return
        if self._exact is not None and self._goes_by_ids(job):
            self._exact.add(job)
            return
        try:
            self._begin(job)
        except RequestError as error:
            self._running.pop(job.request_id, None)
            self._events.append(Failed(job.request_id, error.info))

    def _goes_by_ids(self, job: Job) -> bool:
        """Whether a job goes by token ids; a resumed answer does if it began so."""
        model = self._models.get(job.request.model)
        if model is None or not model.exact:
            return False
        from worker.engines.openai.ids import takes

        prior = job.request.resume.token_ids if job.request.resume is not None else []
        if prior:
            return not is_text(prior)
        native = self._dialect.server == "llamacpp"
        return takes(job.request, attachments=bool(job.attachments), llamacpp=native)

    def _begin(self, job: Job) -> None:
        request = job.request
        model = self._models.get(request.model)
        if model is None:
            raise RequestError(
                ErrorCode.MODEL_UNAVAILABLE,
                f"this worker has no model {request.model}; it serves {', '.join(self._models)}",
            )
        offered = {Kind.CHAT: model.chat, Kind.COMPLETE: model.complete, Kind.EMBED: model.embed}
        if not offered.get(request.kind, False):
            raise RequestError(
                ErrorCode.INVALID_REQUEST,
                f"model {request.model} at {self._server.where} does not answer requests of kind "
                f"{request.kind.value}",
                details={"parameter": "kind"},
            )
        if job.attachments and not model.images:
            raise RequestError(
                ErrorCode.INVALID_REQUEST,
                f"model {request.model} at {self._server.where} takes no images",
                details={"parameter": "messages"},
            )
        if request.kind is Kind.EMBED:
            self._send(_Running(job, None), "embeddings", _embeddings(job, model))
            return
        answer = TextAnswer(job, self._format, server=self._server.where, manner=model.manner)
        running = _Running(job, answer)
        self._running[job.request_id] = running
        for event in answer.begin():
            self._say(event)
        if job.request_id not in self._running:
            return  # it was complete
        path, body = body_of(
            job,
            model.id,
            self._dialect,
            prefix=answer.prefix,
            manner=model.manner,
            spent=answer.spent,
        )
        running.room = Room(request, body, model.context_tokens, self._dialect.server)
        self._send(running, path, body)

    def _send(self, running: _Running, path: str, body: dict[str, Any]) -> None:
        self._running[running.job.request_id] = running
        if running.number:  # sent once already
            self._by_number.pop(running.number, None)
            self._server.close_call(running.number)
        running.path, running.number = path, self._server.open(path, body)
        self._by_number[running.number] = running

    def cancel(self, request_id: bytes) -> None:
        running = self._running.get(request_id)
        if running is not None:
            running.cancelled = True
        elif self._exact is not None:
            self._exact.cancel(request_id)

    def step(self) -> list[EngineEvent]:
        self._check()
        for running in [running for running in self._running.values() if running.cancelled]:
            self._leave(running)
            usage = running.answer.usage() if running.answer is not None else Usage()
            self._say(Ended(running.job.request_id, FinishReason.CANCELLED, usage=usage))
        for came in self._server.receive(0.0 if self._events else WAIT_S):
            owner = self._by_number.get(came.call)
            if owner is not None:
                self._heard(owner, came)
            elif self._exact is not None:
                self._exact.hear(came)
        if self._exact is not None and self._exact.busy:
            self._events += self._exact.step()
        events, self._events = self._events, []
        return events

    def _check(self) -> None:
        if self._server.lost:
            raise EngineGone(self._server.lost)

    def _heard(self, running: _Running, came: Chunk | Done | Fault) -> None:
        try:
            events = self._events_of(running, came)
        except RequestError as error:
            events = self._failed(running, error.info)
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            message = (
                f"the server at {self._server.where} sent something that is not in OpenAI's API "
                f"({type(error).__name__}: {error})"
            )
            info = ErrorInfo(code=ErrorCode.ENGINE_ERROR.value, message=message)
            events = self._failed(running, info)
        for event in events:
            self._say(event)

    def _events_of(self, running: _Running, came: Chunk | Done | Fault) -> list[EngineEvent]:
        answer, room = running.answer, running.room
        if isinstance(came, Fault):
            again = room.refused(came.error) if room is not None else None
            if again is None:
                return self._failed(running, came.error)
            self._send(running, running.path, again)
            return []
        if room is not None and room.counting:
            if isinstance(came, Done):
                return self._failed(running, room.uncounted())
            again = room.counted(came.data)
            if again is not None:
                self._send(running, running.path, again)
            return []
        if isinstance(came, Chunk):
            running.room = None
            if answer is None:
                return [_embedded(running.job, came.data)]
            events = answer.take(came.data)
            return [*events, *answer.end()] if answer.over else events
        return answer.end() if answer is not None else []

    def _failed(self, running: _Running, error: ErrorInfo) -> list[EngineEvent]:
        if running.answer is not None:
            return running.answer.failed(error)
        return [Failed(running.job.request_id, error)]

    def _say(self, event: EngineEvent) -> None:
        running = self._running.get(event.request_id)
        if isinstance(event, Tokens):
            self._tokens.append((time.monotonic(), len(event.token_ids)))
        elif isinstance(event, Ended | Failed) and running is not None:
            if isinstance(event, Ended) and event.timings.prefill_ms:
                took_ms = event.timings.prefill_ms
                before_ms = self._ttft_ms or took_ms
                self._ttft_ms = 0.8 * before_ms + 0.2 * took_ms
            self._leave(running)
        self._events.append(event)

    def _leave(self, running: _Running) -> None:
        """Forget a request, and close its connection if it is open."""
        self._running.pop(running.job.request_id, None)
        if running.number:
            self._by_number.pop(running.number, None)
            self._server.close_call(running.number)

    def metrics(self) -> dict[str, float]:
        self._check()
        now_s = time.monotonic()
        self._tokens = [entry for entry in self._tokens if entry[0] > now_s - 10.0]
        span_s = max(now_s - self._tokens[0][0], 1e-3) if self._tokens else 10.0
        figures = {
            "running": float(len(self._running)),
            "waiting": 0.0,
            "batch": float(len(self._running)),
            "tokens_per_s": sum(count for _, count in self._tokens) / span_s,
            "ttft_ms": self._ttft_ms,
        }
        if self._exact is not None:
            theirs = self._exact.metrics()
            for name in ("running", "waiting", "batch", "tokens_per_s"):
                figures[name] += theirs[name]
            figures["ttft_ms"] = theirs["ttft_ms"] or figures["ttft_ms"]
        return figures

    def close(self) -> None:
        if self._exact is not None:
            self._exact.close()
        self._server.close()
        self._running.clear()


# --- embeddings -----------------------------------------------------------------------------------


def _embeddings(job: Job, model: Model) -> dict[str, Any]:
    args = dict(job.request.embed_args)
    body: dict[str, Any] = {
        "model": model.id,
        "input": job.request.inputs,
        "encoding_format": "float",
    }
    if args.get("dimensions") is not None:
        body["dimensions"] = args.pop("dimensions")
    args.pop("dimensions", None)
    if args:
        raise refused(next(iter(args)), str(model.details.get("server")))
    return body


def _embedded(job: Job, data: dict[str, Any]) -> Ended:
    rows = sorted(data["data"], key=lambda row: row.get("index", 0))
    vectors = [row["embedding"] for row in rows]
    if len(vectors) != len(job.request.inputs or ()):
        raise ValueError(f"{len(vectors)} vectors for {len(job.request.inputs or ())} texts")
    packed = [struct.pack(f"<{len(vector)}f", *vector) for vector in vectors]
    usage = data.get("usage") or {}
    return Ended(
        job.request_id,
        FinishReason.STOP,
        usage=Usage(prompt_tokens=int(usage.get("prompt_tokens") or 0)),
        result={"embeddings": packed, "dimensions": len(vectors[0])},
    )
