"""A model under its names, and the preparation of its jobs: prompts, text streams, sampler rows.

`prepare` runs in preprocessing threads and turns a job into a sequence, an embedding or an answer;
everything that can be wrong with a request is detected there. Must never run the model.
"""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Protocol

import msgspec

from broker.protocol.errors import ErrorCode, RequestError
from broker.protocol.messages import (
    FinishReason,
    Kind,
    ModelInfo,
    Params,
    PieceKind,
    Request,
    Usage,
    kind_fields,
)
from worker.engines.base import Ended, Job, check_received
from worker.engines.common.answer_parser import AnswerParser, unsplit
from worker.engines.common.arguments import SharedSettings
from worker.engines.common.call_families import CallFormat
from worker.engines.common.call_forms import probe_schemas
from worker.engines.common.calls import ARGUMENTS, CALL
from worker.engines.common.constrain import ConstraintFactory, ConstraintState
from worker.engines.common.facts import ModelFacts
from worker.engines.common.held_calls import Held, HeldCalls
from worker.engines.common.images import ImageLimits
from worker.engines.common.pieces import PieceStream, PieceText
from worker.engines.common.prompt import Prompt, PromptBuilder
from worker.engines.common.reasoning import (
    AnswerFormat,
    Begun,
    MarkedThoughts,
    added_tokens,
    find_format,
)
from worker.engines.common.runner import Runner
from worker.engines.common.sampling import SamplerRow, check_params
from worker.engines.common.sequence import Sequence, SequenceGroup, ends_answer
from worker.engines.common.template import continues_message, template_source
from worker.engines.common.text import TextStream, places, text_length, token_table
from worker.engines.common.thinking import Closing, ThoughtGate
from worker.engines.common.typed_arguments import (
    Tools,
    forces_calls,
    said_before,
    strict_tools,
    tools_asked_for,
)

__all__ = ["BatchModel", "Embedding", "Prepared", "now"]

_JSON_CHARACTERS = 6
"""Maximum number of JSON characters for one character of a model's own syntax: `\\u0000`."""

_ONLY_TRANSFORMERS = (Kind.EMBED, Kind.DECIDE, Kind.RERANK, Kind.CLASSIFY)
"""Kinds that only the transformers engine answers."""

CONTEXT_IDS = 8
"""Number of prompt tokens that the text stream sees if the answer continues a text."""

#: Number of tokens examined at the end of a prompt: more than any template writes after the last
#: message.
_TAIL_TOKENS = 64


class Embedding(Protocol):
    """A running request that has no row in the batch: an embedding, or decisions one by one. It
    takes turns with the steps of the batch."""

    request_id: bytes
    cancelled: bool

    def step(self) -> Ended | None:
        """Compute one piece; after the last one, returns the end of the request."""


Prepared = Sequence | SequenceGroup | Embedding | Ended
"""A prepared job: something to run, or its answer."""


class _Texts:
    """Converts requests to tokens and tokens to text; an adapter may have its own."""

    def __init__(self, facts: ModelFacts, limits: ImageLimits) -> None:
        self.facts = facts
        self.builder = PromptBuilder(facts, limits)
        # Texts are decoded in the step loop while prompts are encoded in other threads, and a fast
        # tokenizer must not be used in two threads at once.
        self.decoder = copy.deepcopy(facts.tokenizer)
        #: How the model writes an answer; None: as one text.
        self.format: AnswerFormat | None = find_format(
            facts.tokenizer,
            template_source(facts.tokenizer, facts.processor),
            facts.reasoning_parser,
        )
        added = added_tokens(facts.tokenizer)
        source = template_source(facts.tokenizer, facts.processor)
        self._call_format = CallFormat(source, added)
        #: What begins a call, if the model's response template reads calls and no reader of ours.
        self._calls_open = ""
        if self.format is not None and not self._call_format.known:
            self._calls_open = self.format.calls_open
        self._held_calls = HeldCalls(
            self._call_format,
            added,
            template=source,
            probed=self.builder.probed,
            read=self._calls_read,
            opens=self._calls_open,
        )
        self._constraints = ConstraintFactory(facts.tokenizer)
        self._constraint_lock = threading.Lock()

    def constraint(self, params: Params) -> ConstraintState | None:
        """The constraint that a request asks for."""
        if params.constraint is None:
            return None
        with self._constraint_lock:
            ends = self.facts.eos_ids.union(params.stop_token_ids)
            return self._constraints.build(params.constraint, ends)

    def held(self, request: Request, params: Params, prompt: Prompt) -> Held | None:
        """The grammar for the calls of an answer, in place of the client's own constraint."""
        tools = tools_asked_for(request)
        if not tools or not (forces_calls(request) or strict_tools(request)):
            return None
        ends = self.facts.eos_ids.union(params.stop_token_ids)
        tail = self.builder.detokenised(prompt.ids[-_TAIL_TOKENS:])
        return self._held_calls.held(request, tools, end_ids=ends, tail=tail)

    def _calls_read(self, text: str) -> list[tuple[str, str]]:
        """The calls of probe tools that the model's parser finds in a text; empty if there is
        anything else in it."""
        tools = probe_schemas()
        parser = unsplit()
        if self.format is not None:
            tail = self.builder.probed([{"role": "user", "content": "q"}], begins=True) or ""
            known = self._call_format.known
            parser = self.format.parser(Begun(tail, tools=tools, calls_known=known))
            if parser.in_thought:
                parser.feed(self.format.closing or "")
        calls = self._call_format.parser(tools, forced=not self._call_format.known)
        answer = PieceText(parser, Params(), calls=calls)
        found: list[tuple[str, str]] = []
        for piece in (*answer.add(text, may_stop=False), *answer.finish(may_stop=False)):
            if piece.kind == CALL:
                found.append((piece.text, ""))
            elif piece.kind == ARGUMENTS and found:
                found[-1] = (found[-1][0], found[-1][1] + piece.text)
            elif piece.text.strip():
                return []
        return found

    def stream(
        self,
        request: Request,
        params: Params,
        prompt: Prompt,
        prior: list[int],
        held: Held | None = None,
    ) -> TextStream | PieceStream:
        """The stream that makes an answer's text; `prior`: its tokens so far."""
        # If the answer continues a text in the prompt, a first space is part of it.
        goes_on = not self.facts.encoder_decoder and (
            request.kind is Kind.COMPLETE or continues_message(request)
        )
        tools = tools_asked_for(request)
        received = 0
        if request.resume is not None and request.resume.text_characters:
            received = request.resume.text_characters
            written = text_length(self.decoder, request.resume.token_ids)
            # Arguments are JSON, which may be longer than what the model wrote.
            check_received(received, written * (_JSON_CHARACTERS if tools else 1))
        so_far: dict[str, Any] = {
            "prior_ids": prior,
            "prior_characters": received,
            "context_ids": prompt.ids[-CONTEXT_IDS:] if goes_on else (),
        }
        format_ = self._format_for(params)
        if format_ is None and not tools:
            return TextStream(self.decoder, params, **so_far)
        parser = (
            unsplit(continues=goes_on)
            if format_ is None
            else self._parser(format_, request, params, prompt, tools=tools, held=held)
        )
        marks = format_.special if format_ is not None else ()
        if tools:
            # Thoughts that are not split off are text, in which no calls are looked for.
            of_thoughts: MarkedThoughts | None = None
            if format_ is None and isinstance(self.format, MarkedThoughts):
                of_thoughts = self.format
            begun = self._begun(request, prompt)
            so_far["single"] = not request.parallel_tool_calls
            so_far["calls"] = self._call_format.parser(
                tools,
                forced=forces_calls(request) and not (held and self._call_format.known),
                shows_special=not params.skip_special_tokens,
                thoughts=of_thoughts.marks if of_thoughts else None,
                opened=bool(of_thoughts and of_thoughts.parser(begun).in_thought),
                tail=begun.tail if format_ is None else "",
                said=said_before(request) if format_ is None else "",
                special=of_thoughts.special if of_thoughts else (),
            )
            marks = (*marks, *self._call_format.special)
        return PieceStream(self.decoder, params, parser, marks, **so_far)

    def _format_for(self, params: Params) -> AnswerFormat | None:
        """How the answer is split; None: not at all. For a model that is not known to think, a
        constraint applies from the first token on, so the marks of thoughts are ordinary tokens."""
        if self.format is None or PieceKind.REASONING not in params.pieces:
            return None
        held = params.constraint is not None and params.thinking_tokens is None
        return None if held and not self.format.shown else self.format

    def gate(
        self,
        request: Request,
        params: Params,
        prompt: Prompt,
        *,
        forces: bool,
        held: Held | None = None,
    ) -> ThoughtGate | None:
        """What lets the sampler distinguish a thought from the answer; None if it need not.
        `forces`: the engine samples with it. Raises RequestError."""
        whole = held is not None and held.whole
        constrained = params.constraint is not None and not whole
        split = self._format_for(params) is not None
        if self.format is not None:
            params = self._silenced(request, params, self.format, prompt, forces=forces)
        if params.thinking_tokens is None and not (constrained and split):
            return None
        if self.format is None:
            raise _invalid(
                f"thinking_tokens: how model {request.model} marks a thought is unknown: leave the "
                "parameter out, or start the worker with --reasoning-parser",
                parameter="thinking_tokens",
            )
        parser = self._parser(self.format, request, params, prompt, held=held)
        if not forces:
            # Under a grammar of free text with calls, a thought is free text like the rest.
            if not parser.speaks and (held is None or held.forced):
                raise _invalid(
                    "the constraint would apply to the thought that the chat template begins: turn "
                    "thinking off (enable_thinking), or serve the model with --engine transformers"
                )
            return None
        closing = None
        if params.thinking_tokens is not None:
            if self.format.closing is None:
                raise _invalid(
                    f"thinking_tokens: the response template of model {request.model} gives no "
                    "fixed text that ends a thought: leave the parameter out",
                    parameter="thinking_tokens",
                )
            before_call = held is not None and held.forced and whole
            closing_text = (
                self.format.closing_before_call if before_call else self.format.closing
            ) or ""
            ids = self.decoder.encode(closing_text, add_special_tokens=False)
            closing = Closing(params.thinking_tokens, ids)
        return ThoughtGate(
            self.decoder,
            parser,
            self.format.special,
            opening_ids=self.format.opening_ids,
            closing=closing,
            constrained=constrained,
            whole=whole,
        )

    def _silenced(
        self,
        request: Request,
        params: Params,
        format_: AnswerFormat,
        prompt: Prompt,
        *,
        forces: bool,
    ) -> Params:
        """The parameters, with a thought limited to 0 tokens if the request wants none and the
        template cannot turn it off. Raises RequestError if the engine cannot do this either."""
        if not self.builder.wants_silence(request):
            return params
        if forces and format_.closing is not None:
            return msgspec.structs.replace(params, thinking_tokens=0)
        if self._parser(format_, request, params, prompt).in_thought:
            raise _invalid(
                f"thinking was turned off (enable_thinking, reasoning_effort), but model "
                f"{request.model} always thinks: its chat template has no variable to turn it off; "
                "leave the parameter out",
                parameter="enable_thinking",
            )
        return params

    def _parser(
        self,
        format_: AnswerFormat,
        request: Request,
        params: Params,
        prompt: Prompt,
        *,
        tools: Tools | None = None,
        held: Held | None = None,
    ) -> AnswerParser:
        begun = self._begun(request, prompt)
        if tools and (held is not None or not forces_calls(request)):
            begun = replace(begun, tools=tools, calls_known=self._call_format.known)
        parser = format_.parser(begun)
        # The marks must be seen if the grammar contains them, or if this parser reads the calls.
        if params.constraint is not None and not (held and (held.whole or self._calls_open)):
            parser.think_first()
        return parser

    def _begun(self, request: Request, prompt: Prompt) -> Begun:
        """The part of an answer that stands in its prompt."""
        if request.kind is Kind.COMPLETE:
            tail = self.builder.detokenised(prompt.ids[-_TAIL_TOKENS:])
            return Begun(tail, token_ids=prompt.ids)
        if continues_message(request) and request.messages:
            return Begun(self.builder.detokenised(prompt.ids), request.messages[-1])
        return Begun(self.builder.detokenised(prompt.ids[-_TAIL_TOKENS:]))


class BatchModel:
    """A model under its names (adapters have their own).

    A subclass sets `runner`, which computes tokens.
    """

    def __init__(self, facts: ModelFacts, names: tuple[str, ...], settings: SharedSettings) -> None:
        self.facts = facts
        self.names = names
        limits = ImageLimits(pixels=settings.image_pixels, size_bytes=settings.image_bytes)
        self._limits = limits
        self._texts = _Texts(facts, limits)
        self._adapter_texts = {
            name: _Texts(own, limits) for name, own in facts.adapter_texts.items()
        }
        self._token_bytes: Callable[[int], bytes] = token_table(self._texts.decoder).bytes_of
        #: Whether tokens are sampled with `SamplerRow`, which applies a constraint to the answer
        #: but not to its reasoning, and can end the reasoning.
        self.forces_tokens = True
        #: Whether answers can be constrained.
        self.constrains = True
        #: None if it only embeds.
        self.runner: Runner | None = None
        #: How it is served, for people.
        self.scheduler = "none"
        #: Why its requests run one at a time; empty if in a batch.
        self.serial = ""

    # --- facts ------------------------------------------------------------------------------------

    def kinds(self) -> tuple[Kind, ...]:
        """The kinds of request that this model answers."""
        return tuple(kind for kind in Kind if kind not in _ONLY_TRANSFORMERS)

    def infos(self) -> list[ModelInfo]:
        """One record for each name, including adapters."""
        facts = self.facts
        return [
            ModelInfo(
                name=name,
                **kind_fields(self.kinds()),
                context_tokens=facts.context_tokens,
                images=facts.takes_images,
                details=facts.details
                | {"scheduler": self.scheduler}
                | self._format_details(name)
                | ({"adapter": "chosen for each row"} if name in facts.adapters else {}),
                serial=self.serial,
            )
            for name in (*self.names, *facts.adapters)
        ]

    def _format_details(self, name: str) -> dict[str, str]:
        own = self._adapter_texts.get(name, self._texts).format
        return {} if own is None else {"reasoning": own.name}

    # --- jobs -------------------------------------------------------------------------------------

    def prepare(self, job: Job, added_at: float) -> Prepared:
        """Prepare a job, in a preprocessing thread. Raises RequestError."""
        request = job.request
        builder = self._texts_of(request).builder
        match request.kind:
            case Kind.CHAT | Kind.COMPLETE:
                return self._sequence(job, added_at)
            case Kind.EMBED:
                return self.embedding(job)
            case Kind.DECIDE:
                return self.decision(job)
            case Kind.RERANK | Kind.CLASSIFY:
                return self.classification(job)
            case Kind.COUNT:
                count = builder.token_count(job)
                return self._answer(job, count, {"count": count})
            case Kind.TOKENIZE:
                result = builder.tokenized(job)
                return self._answer(job, len(result["token_ids"]), result)
            case Kind.DETOKENIZE:
                if request.token_ids is None:
                    raise _invalid("a detokenize request needs token ids")
                text = builder.detokenised(request.token_ids)
                return self._answer(job, len(request.token_ids), {"text": text})
            case Kind.TEMPLATE:
                return self._answer(job, 0, {"text": builder.text(request)})

    def embedding(self, job: Job) -> Embedding:
        """The embedding that a job asks for. Raises RequestError."""
        raise self._not_here(job, "does not embed")

    def decision(self, job: Job) -> Prepared:
        """The decisions that a job asks for. Raises RequestError."""
        raise self._not_here(job, "does not decide")

    def classification(self, job: Job) -> Embedding:
        """The scores that a rerank or classify job asks for. Raises RequestError."""
        raise self._not_here(job, "does not classify")

    def _not_here(self, job: Job, what: str) -> RequestError:
        return RequestError(
            ErrorCode.INVALID_REQUEST,
            f"model {job.request.model} {what} on engine {self.scheduler}: serve it with "
            "--engine transformers",
            details={"parameter": "kind"},
        )

    @staticmethod
    def _answer(job: Job, tokens: int, result: dict[str, Any]) -> Ended:
        usage = Usage(prompt_tokens=tokens)
        return Ended(job.request_id, FinishReason.STOP, usage=usage, result=result)

    def _sequence(self, job: Job, added_at: float) -> Sequence:
        request, params = job.request, self._with_model_defaults(job.request.params)
        texts = self._texts_of(request)
        facts = texts.facts
        if self.runner is None:
            raise _invalid(
                f"model {request.model} does not generate text: it answers requests of kind "
                f"{', '.join(self.kinds())}"
            )
        known = min(facts.vocabulary, facts.embedding_rows)
        check_params(params, known)
        prompt = texts.builder.generation(job)
        prior = request.resume.token_ids if request.resume is not None else []
        if prior and max(prior) >= known:
            raise _invalid(
                f"the answer cannot be resumed: this model has no token {max(prior)}, which the "
                "answer so far contains"
            )
        held = texts.held(request, params, prompt)
        if held is not None and not self.constrains:
            held = self._unheld(held)
        given = params
        params = (
            given if held is None else msgspec.structs.replace(given, constraint=held.constraint)
        )
        try:
            row = self._row(texts, request, params, prompt, prior, held)
        except RequestError:
            if not prior or held is None or not held.forced:
                raise
            # It began on another worker, which holds calls to JSON.
            held, params = None, given
            row = self._row(texts, request, params, prompt, prior, held)
        over = bool(prior) and ends_answer(
            prior[-1], len(prior), params, facts.eos_ids, finished=row.finished
        )
        # A token that ends an answer is not part of its text.
        text = texts.stream(request, params, prompt, prior[:-1] if over else prior, held)
        room = facts.context_tokens - (0 if facts.encoder_decoder else len(prompt.ids))
        facts_seen = request.resume is not None and request.resume.prompt_seen
        echo = params.echo and not facts_seen
        return Sequence(
            request_id=job.request_id,
            params=params,
            prompt=prompt,
            row=row,
            text=text,
            eos_ids=facts.eos_ids,
            max_tokens=min(params.max_tokens or room, room),
            wants_facts=not facts_seen
            and bool(
                params.echo
                or params.prompt_logprobs is not None
                or params.keep_special
                or params.prompt_usage
            ),
            echo_text=texts.builder.detokenised(prompt.ids) if echo else "",
            echo_places=places(texts.decoder, prompt.ids)
            if echo and params.prompt_logprobs is not None
            else [],
            special=token_table(texts.decoder).special_texts(params.keep_special),
            # Longer than what a template writes after the last message.
            tail=texts.builder.detokenised(prompt.ids[-_TAIL_TOKENS:])
            if params.keep_special and not facts_seen
            else "",
            adapter=self._adapter(request),
            added_at=added_at,
            answer=list(prior),
        )

    def _row(
        self,
        texts: _Texts,
        request: Request,
        params: Params,
        prompt: Prompt,
        prior: list[int],
        held: Held | None,
    ) -> SamplerRow:
        """The sampler's state for an answer that has these tokens so far."""
        facts = texts.facts
        constraint = texts.constraint(params)
        gate = texts.gate(request, params, prompt, forces=self.forces_tokens, held=held)
        return SamplerRow(
            params,
            # Penalising image placeholders would be meaningless.
            [token_id for token_id in prompt.ids if token_id not in facts.placeholder_ids],
            eos_ids=facts.eos_ids,
            prior_ids=prior,
            constraint=constraint,
            gate=gate,
        )

    def _unheld(self, held: Held) -> Held | None:
        """The grammar for calls on an engine that cannot constrain: none. Raises RequestError for
        strict tools."""
        if held.forced:
            return None  # the client's own constraint is refused by name
        raise _invalid(
            f"a strict tool cannot be enforced: engine {self.scheduler} cannot hold a model to a "
            "schema: leave `strict` out, or serve the model with --engine transformers",
            parameter="tools",
        )

    def _texts_of(self, request: Request) -> _Texts:
        return self._adapter_texts.get(request.model, self._texts)

    def _adapter(self, request: Request) -> str | None:
        if request.model in self.facts.adapters:
            return request.model
        if request.model not in self.names:
            # Never the base's answer in place of the adapter's.
            message = f"adapter {request.model} is not loaded"
            raise RequestError(ErrorCode.MODEL_UNAVAILABLE, message, retryable=True)
        return None

    def add_adapter(self, name: str, own: ModelFacts | None) -> None:
        """Note that an adapter is in the model now. `own`: the facts of its own tokenizer or
        template. Called between two steps."""
        if own is not None:
            self.facts.adapter_texts[name] = own
            self._adapter_texts[name] = _Texts(own, self._limits)
        self.facts.adapters = (*self.facts.adapters, name)

    def remove_adapter(self, name: str) -> None:
        """Note that an adapter is no longer in the model. Called between two steps, when no job
        uses it."""
        self.facts.adapters = tuple(other for other in self.facts.adapters if other != name)
        self.facts.adapter_texts.pop(name, None)
        self._adapter_texts.pop(name, None)

    def _with_model_defaults(self, params: Params) -> Params:
        """The parameters, with those that the caller left open taken from the model's generation
        config."""
        own = self.facts.sampling_defaults
        changes = {name: own[name] for name in params.model_defaults if name in own}
        return msgspec.structs.replace(params, **changes) if changes else params

    def close(self) -> None:
        if self.runner is not None:
            self.runner.close()


def now() -> float:
    """The engine's clock, seconds."""
    return time.perf_counter()


def _invalid(message: str, **details: str) -> RequestError:
    return RequestError(ErrorCode.INVALID_REQUEST, message, details=details)
