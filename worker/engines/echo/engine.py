"""The echo engine: deterministic answers without a model, and faults on demand.

Tests and benchmarks run it in place of a model: it follows every rule of `worker.engines.base`,
including resuming, and its answers can be computed by hand. Its tokens are those of `tokens`. Must
never import torch.

**Answers.** `mode=echo` repeats the prompt: the last user message of a chat, the prompt of a
completion, preceded by one line about images ("2 images: 64x48, 32x32. "). `mode=sampled` draws
words: token = f(seed, prompt, position), so that a resumed stream can be checked for equality. The
answer ends after `answer_tokens` (sampled) or at the end of the echo; with `ignore_eos` it
continues cyclically. Text between `<think>` and `</think>` (or the markers of `--reasoning-parser`)
is its reasoning; a sampled answer begins with `think_tokens` tokens between them.

**Options**, as `--engine-arg KEY=VALUE`, in a request's `template_args.echo` map, or in its text as
`[[echo KEY=VALUE ...]]` (removed from the answer); later ones take precedence:

    mode            echo | sampled                                            [echo]
    answer_tokens   length of a sampled answer                                [64]
    think_tokens    length of the thought before a sampled answer             [0]
    tokens_per_step tokens in each event                                      [1]
    step_delay_ms   sleep in each step while the request runs                 [0]
    prefill_ms      time before the first token; other requests continue      [0]
    error_at        fails with engine_error before token N                    [-1]
    oom_at          fails with out_of_memory before token N                   [-1]
    raise_at        raises out of `step` before token N: a broken engine      [-1]
    hang_at         `step` never returns, before token N                      [-1]
    exit_at         the process exits with status 13, before token N          [-1]
    kill_at         the process kills itself by SIGKILL, before token N       [-1]
    fault_resumed   1: the faults above also strike a resumed request         [0]

and for the whole engine only: `slots` is `--slots` [8], `context_tokens` [32768], `load_ms` [0],
`load_error` (text: the engine cannot be built), `crash_on_load` (1: the process is killed while it
loads), `serial` (text: it reports that it runs one request at a time, for this reason). Whoever can
send a request can crash this engine: it is for tests.
"""

from __future__ import annotations

import os
import re
import signal
import time
from typing import Any, Final

import msgspec

from broker.protocol.errors import ErrorCode, RequestError
from broker.protocol.messages import (
    FinishReason,
    Kind,
    ModelInfo,
    Piece,
    Request,
    TokenLogprob,
    TopLogprob,
    Usage,
    kind_fields,
)
from worker.engines.base import (
    Capabilities,
    Ended,
    EngineEvent,
    EngineLoadError,
    EngineOptions,
    Failed,
    Job,
    Progress,
    PromptFacts,
    Tokens,
    context_overflow,
)
from worker.engines.common.reasoning import find_format
from worker.engines.echo.requests import (
    answer_about,
    classifications,
    decisions,
    embeddings,
    image_size,
    required,
    whole_prompt,
)
from worker.engines.echo.run import Options, Run, end_of
from worker.engines.echo.tokens import (
    VOCABULARY,
    detokenize,
    texts,
    token_bytes,
    tokenize,
)

DEFAULT_SLOTS: Final = 8
EXIT_STATUS: Final = 13

_DIRECTIVE: Final = re.compile(r"\[\[echo((?:\s+\w+=\S+)*)\s*\]\]\s?")


class EchoFault(Exception):
    """The fault requested by `raise_at`."""


# --- the engine -----------------------------------------------------------------------------------


class EchoEngine:
    """See the module's docstring."""

    def __init__(self, options: EngineOptions) -> None:
        arguments = dict(options.engine_args)
        self._context_tokens = _number(arguments, "context_tokens", 32768)
        serial = arguments.pop("serial", "")
        for name in ("load_ms", "load_error", "crash_on_load"):
            arguments.pop(name, None)
        try:
            self._defaults = msgspec.convert(arguments, Options, strict=False)
        except msgspec.ValidationError as error:
            raise EngineLoadError(f"--engine-arg of the echo engine: {error}") from None
        unknown = arguments.keys() - set(Options.__struct_fields__)
        if unknown:
            raise EngineLoadError(
                f"the echo engine has no --engine-arg {', '.join(sorted(unknown))}; it has "
                f"{', '.join(Options.__struct_fields__)}"
            )
        self._format = find_format(None, "", options.reasoning_parser or "think")
        names = [name for group in options.model_names for name in group] or ["echo"]
        self._capabilities = Capabilities(
            engine="echo",
            device="cpu",
            models=tuple(
                ModelInfo(
                    name=name,
                    **kind_fields(Kind),
                    context_tokens=self._context_tokens,
                    images=True,
                    details={"architecture": "echo"}
                    | ({"reasoning": self._format.name} if self._format is not None else {}),
                    serial=serial,
                )
                for name in names
            ),
            capacity=options.slots or DEFAULT_SLOTS,
        )
        self._waiting: dict[bytes, Job] = {}
        self._runs: dict[bytes, Run] = {}
        self._cancelled: list[bytes] = []
        self._tokens = 0
        self._measured = (time.monotonic(), 0)

    @property
    def capabilities(self) -> Capabilities:
        return self._capabilities

    @property
    def busy(self) -> bool:
        return bool(self._runs or self._waiting)

    def add(self, job: Job) -> None:
        self._waiting[job.request_id] = job

    def cancel(self, request_id: bytes) -> None:
        if request_id in self._runs or request_id in self._waiting:
            self._cancelled.append(request_id)

    def metrics(self) -> dict[str, float]:
        now_s = time.monotonic()
        since_s, tokens = self._measured
        self._measured = (now_s, self._tokens)
        rate = (self._tokens - tokens) / max(1e-6, now_s - since_s)
        return {
            "running": float(len(self._runs)),
            "waiting": float(len(self._waiting)),
            "tokens_per_s": round(rate, 1),
        }

    def close(self) -> None:
        self._runs.clear()
        self._waiting.clear()

    def step(self) -> list[EngineEvent]:
        events: list[EngineEvent] = []
        self._stop_cancelled(events)
        self._admit(events)
        now_s = time.monotonic()
        delay_ms, soonest_s = 0.0, None
        for run in list(self._runs.values()):
            if run.prefill_until_s > now_s:
                soonest_s = min(soonest_s or run.prefill_until_s, run.prefill_until_s)
                continue
            delay_ms = max(delay_ms, run.options.step_delay_ms)
            self._advance(run, events)
        if delay_ms:
            time.sleep(delay_ms / 1000)
        elif not events and soonest_s is not None:
            time.sleep(min(0.005, max(0.0, soonest_s - now_s)))
        return events

    def _stop_cancelled(self, events: list[EngineEvent]) -> None:
        for request_id in self._cancelled:
            run = self._runs.pop(request_id, None)
            if run is not None:
                events.append(self._ended(run, FinishReason.CANCELLED, None))
            elif self._waiting.pop(request_id, None) is not None:
                events.append(Ended(request_id, FinishReason.CANCELLED))
        self._cancelled.clear()

    @staticmethod
    def _ended(run: Run, reason: FinishReason, stopped_by: str | int | None) -> Ended:
        """The end of a run, with the text that no other event contained."""
        text, pieces = run.taken()
        usage, timings = run.usage(), run.timings()
        return Ended(run.request_id, reason, text, usage, timings, None, stopped_by, pieces)

    # --- from job to run --------------------------------------------------------------------------

    def _admit(self, events: list[EngineEvent]) -> None:
        while self._waiting and len(self._runs) < self._capabilities.capacity:
            request_id = next(iter(self._waiting))
            job = self._waiting.pop(request_id)
            try:
                self._begin(job, events)
            except RequestError as error:
                events.append(Failed(request_id, error.info))

    def _begin(self, job: Job, events: list[EngineEvent]) -> None:
        request = job.request
        if request.kind is Kind.EMBED:
            events.append(embeddings(job))
            return
        if request.kind is Kind.DECIDE:
            events.append(decisions(job))
            return
        if request.kind in (Kind.RERANK, Kind.CLASSIFY):
            events.append(classifications(job))
            return
        if request.kind is Kind.DETOKENIZE:
            result: dict[str, Any] = {"text": detokenize(required(request.token_ids, request))}
            events.append(Ended(job.request_id, FinishReason.STOP, result=result))
            return
        prompt, echoed, images = whole_prompt(request, len(job.attachments))
        options, directive = self._options(request, echoed)
        if directive:
            echoed = _DIRECTIVE.sub("", echoed)
            prompt = _DIRECTIVE.sub("", prompt)
        prompt_ids = tokenize(prompt)
        if request.kind is not Kind.CHAT and request.kind is not Kind.COMPLETE:
            events.append(answer_about(job, prompt, prompt_ids))
            return
        room = self._context_tokens - len(prompt_ids)
        asked = 1 if request.params.cut_max_tokens else request.params.max_tokens or 1
        if asked > room:
            raise context_overflow(len(prompt_ids), asked, self._context_tokens)
        prefix = ""
        if images:
            sizes = ", ".join(image_size(job.attachments[index]) for index in images)
            prefix = f"{len(images)} image{'s' if len(images) > 1 else ''}: {sizes}. "
        run = Run(job, options, echoed, prompt_ids, prefix, self._format)
        run.limit = min(run.limit, room)
        run.image_tokens = len(images)
        self._describe_prompt(job, run, prompt, events)
        if not self._replay(job, run, events):
            run.plain = run.plain and run.text.plain and run.options.tokens_per_step > 0
            self._runs[job.request_id] = run

    def _options(self, request: Request, text: str) -> tuple[Options, bool]:
        given = request.template_args.get("echo")
        found = _DIRECTIVE.search(text)
        if given is None and found is None:
            return self._defaults, False
        fields = msgspec.structs.asdict(self._defaults)
        if isinstance(given, dict):
            fields |= given
        if found is not None:
            fields |= dict(item.split("=", 1) for item in found.group(1).split())
        unknown = fields.keys() - set(Options.__struct_fields__)
        try:
            if unknown:
                raise msgspec.ValidationError(f"no such option: {', '.join(sorted(unknown))}")
            return msgspec.convert(fields, Options, strict=False), found is not None
        except msgspec.ValidationError as error:
            raise RequestError(ErrorCode.INVALID_REQUEST, f"echo options: {error}") from None

    @staticmethod
    def _describe_prompt(job: Job, run: Run, prompt: str, events: list[EngineEvent]) -> None:
        params, resume = job.request.params, job.request.resume
        shows_ids = params.echo or params.prompt_logprobs is not None
        if not (shows_ids or params.keep_special or params.prompt_usage):
            return
        if resume is not None and resume.prompt_seen:
            return
        logprobs = None
        if params.prompt_logprobs is not None:
            top = params.prompt_logprobs
            logprobs = [_logprob(token, top) for token in run.prompt_ids]
            logprobs[:1] = [TokenLogprob(None, token_bytes(run.prompt_ids[0]))][: len(logprobs)]
        text = prompt if params.echo else ""
        events.append(
            PromptFacts(
                job.request_id,
                run.prompt_ids if shows_ids else [],
                text,
                logprobs,
                usage=Usage(prompt_tokens=len(run.prompt_ids)),
            )
        )

    def _replay(self, job: Job, run: Run, events: list[EngineEvent]) -> bool:
        """Take the tokens of a resumed request as if they were generated here; True if they
        complete the answer."""
        prior = job.request.resume.token_ids if job.request.resume else []
        for token in prior:
            run.say(token)
            text, pieces = run.taken()
            if text or pieces:
                # Text that these tokens complete but the client has not received goes first.
                events.append(Tokens(job.request_id, [], text, None, pieces))
            if self._finish(run, token, events):
                return True
        return False

    # --- from run to tokens -----------------------------------------------------------------------

    def _advance(self, run: Run, events: list[EngineEvent]) -> None:
        """One step of one request."""
        position = run.position
        count = run.options.tokens_per_step
        if run.plain and position + count < run.limit and position + count < run.end_at:
            ids = run.draw(count)
            words = texts()
            text = words[ids[0]] if count == 1 else "".join([words[token] for token in ids])
            self._tokens += count
            pieces: list[Piece] | None = None
            if run.pieces is not None:
                text, pieces = run.pieces.event(run.pieces.add(text, may_stop=True))
            elif run.skip:
                text = run.visible(text)
            events.append(Tokens(run.request_id, ids, text, None, pieces))
            return
        count = min(count, run.limit - position, run.end_at - position)
        if run.fault_at:
            due = [at for at in run.fault_at if at < position + max(1, count)]
            if due and min(due) <= position:
                self._strike(run, run.fault_at.pop(min(due)), events)
                return
            if due:
                count = min(due) - position
        ids = []
        for offset in range(position, position + count):
            ids.append(run.token_at(offset))
            run.say(ids[-1])
            if end_of(run, ids[-1]) is not None:
                break
        self._tokens += len(ids)
        if ids:
            logprobs = None
            if run.params.logprobs is not None:
                logprobs = [_logprob(token, run.params.logprobs) for token in ids]
            text, pieces = run.taken()
            events.append(Tokens(run.request_id, ids, text, logprobs, pieces))
            self._finish(run, ids[-1], events)
        else:
            # There are no tokens: an empty prompt is echoed.
            run.end()
            events.append(self._ended(run, FinishReason.STOP, None))
            del self._runs[run.request_id]

    def _finish(self, run: Run, token: int, events: list[EngineEvent]) -> bool:
        """Whether the answer ends with this token; if so, its end is added to the events."""
        found = end_of(run, token)
        if found is None:
            return False
        run.end()
        events.append(self._ended(run, *found))
        self._runs.pop(run.request_id, None)
        return True

    def _strike(self, run: Run, fault: str, events: list[EngineEvent]) -> None:
        where = f"before token {run.position}, as requested"
        if fault == "raise_at":
            raise EchoFault(f"the engine broke {where}")
        if fault == "hang_at":
            while True:
                time.sleep(3600)
        if fault == "exit_at":
            os._exit(EXIT_STATUS)
        if fault == "kill_at":
            os.kill(os.getpid(), signal.SIGKILL)
        code = ErrorCode.OUT_OF_MEMORY if fault == "oom_at" else ErrorCode.ENGINE_ERROR
        del self._runs[run.request_id]
        error = RequestError(code, f"the request failed {where}")
        events.append(Failed(run.request_id, error.info, run.usage()))


# --- helpers --------------------------------------------------------------------------------------


def _number(arguments: dict[str, str], name: str, default: int) -> int:
    text = arguments.pop(name, str(default))
    try:
        return int(text)
    except ValueError:
        raise EngineLoadError(f"--engine-arg {name}={text}: must be an integer") from None


def _logprob(token: int, alternatives: int) -> TokenLogprob:
    """A made-up but deterministic log probability: the token, then its neighbours."""
    value = -(token % 100) / 100 - 0.01
    top = [
        TopLogprob(other, value - rank, token_bytes(other))
        for rank in range(alternatives)
        for other in ((token + rank) % VOCABULARY,)
    ]
    return TokenLogprob(value, token_bytes(token), top)


def build(options: EngineOptions, progress: Progress) -> EchoEngine:
    """The `EngineFactory` of the echo engine."""
    arguments = dict(options.engine_args)
    load_ms = _number(arguments, "load_ms", 0)
    steps = 20 if load_ms else 0
    for step in range(steps):
        progress(step / steps, "pretending to load")
        time.sleep(load_ms / 1000 / steps)
    if arguments.get("crash_on_load") == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    if "load_error" in arguments:
        raise EngineLoadError(arguments["load_error"])
    engine = EchoEngine(options)
    progress(1.0, "ready")
    return engine
