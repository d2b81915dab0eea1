"""One served model: weights, prompt builder, scheduler, embedder; and jobs made ready for it.

`prepare` runs in preprocessing threads and turns a job into a sequence, an embedding task or an
answer; everything that can be wrong with a request is found there. Must never run the model.
"""

from __future__ import annotations

import copy
import io
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec
from PIL import Image

from broker.protocol.errors import ErrorCode, RequestError
from broker.protocol.messages import (
    FinishReason,
    ImagePart,
    Kind,
    Message,
    ModelInfo,
    Params,
    Part,
    Request,
    TextPart,
    Usage,
)
from worker.engines.base import Ended, Job
from worker.engines.common.constrain import ConstraintFactory, ConstraintState
from worker.engines.common.images import ImageLimits
from worker.engines.common.prompt import Prompt, PromptBuilder
from worker.engines.common.runner import Runner
from worker.engines.common.sampling import SamplerRow, check_token_ids
from worker.engines.common.sequence import Sequence, ends_answer
from worker.engines.common.template import continues_message
from worker.engines.common.text import TextStream, places, token_table
from worker.engines.transformers.embed import Embedder, EmbedOptions, embed_options
from worker.engines.transformers.fallback import GenerateRunner
from worker.engines.transformers.forward import StaticUse
from worker.engines.transformers.lengths import LengthRunner
from worker.engines.transformers.loaded import LoadedModel
from worker.engines.transformers.selftest import Verdict, check, check_generate
from worker.engines.transformers.settings import EngineSettings
from worker.engines.transformers.slots import SlotRunner

__all__ = ["EmbedTask", "Prepared", "ServedModel"]

log = logging.getLogger(__name__)

FALLBACK_SLOTS = 4
"""Sequences that take turns on the per-request path: turns only share time, so few are enough."""

CONTEXT_IDS = 8
"""Prompt tokens that the text stream of a continued text sees."""

#: Of a prompt whose end is told: what a template writes behind the last message is shorter.
_TAIL_TOKENS = 32


@dataclass(slots=True)
class EmbedTask:
    """An embedding request on its way: batches of inputs still to run."""

    request_id: bytes
    inputs: list[list[int]]
    options: EmbedOptions
    batches: list[list[int]]
    results: list[bytes]
    #: LoRA adapter, or None for the model as it is.
    adapter: str | None
    cancelled: bool = False

    def usage(self) -> Usage:
        return Usage(prompt_tokens=sum(map(len, self.inputs)))


Prepared = Sequence | EmbedTask | Ended
"""What becomes of a job: something to run, or its answer."""


class _Texts:
    """What makes tokens of requests and text of tokens; an adapter may have its own."""

    def __init__(self, loaded: LoadedModel, limits: ImageLimits) -> None:
        self.loaded = loaded
        self.builder = PromptBuilder(loaded, limits)
        # Texts are decoded in the step loop while prompts are encoded in other threads, and a fast
        # tokenizer must not be used in two threads at once.
        self.decoder = copy.deepcopy(loaded.tokenizer)
        self._constraints = ConstraintFactory(loaded.tokenizer)
        self._constraint_lock = threading.Lock()

    def constraint(self, params: Params) -> ConstraintState | None:
        """What holds an answer to the constraint that its request asks for."""
        if params.constraint is None:
            return None
        with self._constraint_lock:
            ends = self.loaded.eos_ids.union(params.stop_token_ids)
            return self._constraints.build(params.constraint, ends)


class ServedModel:
    """A loaded model under its names (adapters have names of their own)."""

    def __init__(
        self,
        loaded: LoadedModel,
        names: tuple[str, ...],
        settings: EngineSettings,
        *,
        slots: int,
    ) -> None:
        self.loaded = loaded
        self.names = names
        limits = ImageLimits(pixels=settings.image_pixels, octets=settings.image_bytes)
        self._texts = _Texts(loaded, limits)
        self._adapter_texts = {
            name: _Texts(facts, limits) for name, facts in loaded.adapter_texts.items()
        }
        self.embedder = Embedder(loaded)
        self._token_bytes: Callable[[int], bytes] = token_table(self._texts.decoder).octets
        #: How it is served, for people.
        self.scheduler = "none"
        #: Why its requests run one at a time; empty: in a batch.
        self.serial = ""
        self.runner: Runner | None = None
        #: The batch, where there is one: it is `runner` or a part of it.
        self.slot_runner: SlotRunner | None = None
        if not loaded.embedding_only:
            self.runner = self._make_runner(settings, slots)
        loaded.reference = None

    def _make_runner(self, settings: EngineSettings, slots: int) -> Runner:
        loaded = self.loaded
        picture_prompt = self._picture_prompt() if loaded.takes_images else None
        if settings.scheduler == "generate":
            check_generate(loaded, picture_prompt)
            verdict = Verdict(None, "asked for with --engine-arg scheduler=generate")
        else:
            verdict = check(loaded, picture_prompt, static=_static_use(settings, loaded))
        if verdict.forward is None:
            if settings.scheduler == "slots":
                from worker.engines.base import EngineLoadError

                raise EngineLoadError(
                    f"{self.names[0]} cannot be served from slots: {verdict.reason}; "
                    "leave --engine-arg scheduler away to serve it one request at a time"
                )
            self.scheduler, self.serial = "generate", verdict.reason
            return self._one_by_one(slots)
        self.scheduler = "slots, whole prompts" if verdict.whole_prompts else "slots"
        chunk = settings.prefill_chunk or (256 if loaded.device.type == "cpu" else 1024)
        self.slot_runner = SlotRunner(
            verdict.forward,
            slots=slots,
            prefill_chunk=chunk,
            stall_ms=settings.stall_ms,
            banned_ids=loaded.placeholder_ids,
            token_bytes=self._token_bytes,
            whole_prompts=verdict.whole_prompts,
            overlap=settings.overlap == "on"
            or (settings.overlap == "auto" and loaded.device.type != "cpu"),
        )
        if loaded.rope is None:
            return self.slot_runner
        limit = loaded.rope.unchanged_tokens - 1
        self.serial = f"only from {limit} tokens, where its rotary frequencies change"
        self.scheduler += f"; from {limit} tokens one by one: rotary frequencies change there"
        return LengthRunner(self.slot_runner, self._one_by_one(slots), limit)

    def _one_by_one(self, slots: int) -> GenerateRunner:
        return GenerateRunner(
            self.loaded,
            slots=min(slots, FALLBACK_SLOTS),
            banned_ids=self.loaded.placeholder_ids,
            token_bytes=self._token_bytes,
        )

    def _picture_prompt(self) -> Prompt | None:
        """A prompt with a picture for the self test; None where the model's processor makes none
        of a plain question."""
        octets = io.BytesIO()
        picture = Image.new("RGB", (96, 64), (200, 60, 30))
        picture.paste((20, 90, 220), (10, 10, 50, 40))
        picture.save(octets, "PNG")
        attachments = (octets.getvalue(),)
        parts: list[Part] = [ImagePart(attachment=0), TextPart(text="What is in this picture?")]
        chat = Request(
            model=self.names[0], messages=[Message(role="user", content=parts)], window=1
        )
        raw = Request(
            model=self.names[0],
            kind=Kind.COMPLETE,
            prompt="<image> What is in this picture?",
            window=1,
        )
        for request in (chat, raw):
            try:
                return self._texts.builder.generation(Job(b"", request, attachments))
            except RequestError as error:
                log.debug("no self-test prompt from %s: %s", request.kind, error)
        return None

    # --- facts ------------------------------------------------------------------------------------

    def infos(self) -> list[ModelInfo]:
        """One record for each name, adapters included."""
        loaded = self.loaded
        text = (Kind.COUNT, Kind.TOKENIZE, Kind.DETOKENIZE, Kind.TEMPLATE)
        kinds: tuple[Kind, ...] = (Kind.EMBED, *text)
        if not loaded.embedding_only:
            kinds = (Kind.CHAT, Kind.COMPLETE, *kinds)
        return [
            ModelInfo(
                name=name,
                kinds=kinds,
                context_tokens=loaded.context_tokens,
                images=loaded.takes_images,
                details=loaded.details
                | {"scheduler": self.scheduler}
                | ({"adapter": "chosen for each row"} if name in loaded.adapters else {}),
                serial=self.serial,
            )
            for name in (*self.names, *loaded.adapters)
        ]

    # --- jobs -------------------------------------------------------------------------------------

    def prepare(self, job: Job, added_at: float) -> Prepared:
        """Make a job ready, in a preprocessing thread. Raises RequestError."""
        request = job.request
        builder = self._texts_of(request).builder
        match request.kind:
            case Kind.CHAT | Kind.COMPLETE:
                return self._sequence(job, added_at)
            case Kind.EMBED:
                return self._embed_task(job)
            case Kind.COUNT:
                count = builder.token_count(job)
                return self._answer(job, count, {"count": count})
            case Kind.TOKENIZE:
                ids = builder.token_ids(job)
                return self._answer(job, len(ids), {"token_ids": ids})
            case Kind.DETOKENIZE:
                if request.token_ids is None:
                    raise _invalid("a detokenize request needs token ids")
                text = builder.detokenised(request.token_ids)
                return self._answer(job, len(request.token_ids), {"text": text})
            case Kind.TEMPLATE:
                return self._answer(job, 0, {"text": builder.text(request)})

    @staticmethod
    def _answer(job: Job, tokens: int, result: dict[str, Any]) -> Ended:
        usage = Usage(prompt_tokens=tokens)
        return Ended(job.request_id, FinishReason.STOP, usage=usage, result=result)

    def _embed_task(self, job: Job) -> EmbedTask:
        request = job.request
        if request.inputs is None:
            raise _invalid("an embed request needs inputs")
        options = embed_options(request.embed_args, self.embedder.width)
        inputs = self._texts_of(request).builder.embedding_inputs(request.inputs)
        return EmbedTask(
            request_id=job.request_id,
            inputs=inputs,
            options=options,
            batches=self.embedder.batches(inputs),
            results=[b""] * len(inputs),
            adapter=self._adapter(request),
        )

    def _sequence(self, job: Job, added_at: float) -> Sequence:
        request, params = job.request, self._with_model_defaults(job.request.params)
        texts = self._texts_of(request)
        loaded = texts.loaded
        if self.runner is None:
            raise _invalid(f"model {request.model} only embeds: it writes no text")
        known = min(loaded.vocabulary, loaded.embedding_rows)
        check_token_ids(params, known)
        prompt = texts.builder.generation(job)
        prior = request.resume.token_ids if request.resume is not None else []
        if prior and max(prior) >= known:
            raise _invalid(f"the tokens to resume from are not this model's: id {max(prior)}")
        constraint = texts.constraint(params)
        # The placeholders stand for pictures: penalising them would mean nothing.
        row = SamplerRow(
            params,
            [token_id for token_id in prompt.ids if token_id not in loaded.placeholder_ids],
            eos_ids=loaded.eos_ids,
            prior_ids=prior,
            constraint=constraint,
        )
        # A text that goes on where the prompt's ends: a first space is part of it.
        goes_on = not loaded.encoder_decoder and (
            request.kind is Kind.COMPLETE or continues_message(request)
        )
        over = bool(prior) and ends_answer(
            prior[-1], len(prior), params, loaded.eos_ids, finished=row.finished
        )
        text = TextStream(
            texts.decoder,
            params,
            # What ends an answer is no part of its text.
            prior_ids=prior[:-1] if over else prior,
            prior_characters=request.resume.text_characters if request.resume else 0,
            context_ids=prompt.ids[-CONTEXT_IDS:] if goes_on else (),
        )
        room = loaded.context_tokens - (0 if loaded.encoder_decoder else len(prompt.ids))
        facts_seen = request.resume is not None and request.resume.prompt_seen
        echo = params.echo and not facts_seen
        return Sequence(
            request_id=job.request_id,
            params=params,
            prompt=prompt,
            row=row,
            text=text,
            eos_ids=loaded.eos_ids,
            max_tokens=min(params.max_tokens or room, room),
            wants_facts=not facts_seen
            and bool(params.echo or params.prompt_logprobs is not None or params.keep_special),
            echo_text=texts.builder.detokenised(prompt.ids) if echo else "",
            echo_places=places(texts.decoder, prompt.ids)
            if echo and params.prompt_logprobs is not None
            else [],
            special=token_table(texts.decoder).special_texts(params.keep_special),
            # Longer than what a template writes behind the last message.
            tail=texts.builder.detokenised(prompt.ids[-_TAIL_TOKENS:])
            if params.keep_special and not facts_seen
            else "",
            adapter=self._adapter(request),
            added_at=added_at,
            answer=list(prior),
        )

    def _texts_of(self, request: Request) -> _Texts:
        return self._adapter_texts.get(request.model, self._texts)

    def _adapter(self, request: Request) -> str | None:
        return request.model if request.model in self.loaded.adapters else None

    def _with_model_defaults(self, params: Params) -> Params:
        """What the caller left open is as the model's own generation config says."""
        own = self.loaded.sampling_defaults
        changes = {name: own[name] for name in params.model_defaults if name in own}
        return msgspec.structs.replace(params, **changes) if changes else params

    def embed_step(self, task: EmbedTask) -> Ended | None:
        """Run one batch of an embedding task; its end when all are done."""
        batch = task.batches.pop()
        inputs = [task.inputs[index] for index in batch]
        vectors = self.embedder.embed(inputs, task.options, task.adapter)
        for index, vector in zip(batch, vectors, strict=True):
            task.results[index] = vector
        if task.batches:
            return None
        dimensions = len(task.results[0]) // 4
        return Ended(
            task.request_id,
            FinishReason.STOP,
            usage=task.usage(),
            result={"embeddings": task.results, "dimensions": dimensions},
        )

    def close(self) -> None:
        if self.runner is not None:
            self.runner.close()


def _static_use(settings: EngineSettings, loaded: LoadedModel) -> StaticUse:
    if settings.cuda_graphs == "off":
        return StaticUse.NEVER
    places = set((getattr(loaded.model, "hf_device_map", None) or {}).values())
    if loaded.device.type == "cuda" and len(places) < 2:
        return StaticUse.CAPTURED
    # Layers on several devices, or no CUDA: there is nothing to capture.
    return StaticUse.UNCAPTURED if settings.cuda_graphs == "on" else StaticUse.NEVER


def now() -> float:
    """The engine's clock, seconds."""
    return time.perf_counter()


def _invalid(message: str) -> RequestError:
    return RequestError(ErrorCode.INVALID_REQUEST, message)
