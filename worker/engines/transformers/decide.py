"""Decisions: typed questions about a state, answered with probabilities as `DecisionPipeline` does.

Prompts, labels, temperatures and the form of the answers are transformers' own (`DecisionConfig`);
here each prompt becomes a sequence of the batch, whose outputs are read instead of sampled. The
tokens that transformers adds to a tokenizer to mark places go into a copy of the model's. Prompts
are made in preprocessing threads; the rest runs on the engine's thread.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import threading
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from broker.protocol.errors import ErrorCode, ErrorInfo, RequestError
from broker.protocol.messages import FinishReason, Question, Request, Usage
from worker.engines.base import Ended, EngineEvent, EngineLoadError, Failed, Job
from worker.engines.common.compat import forward_parameters
from worker.engines.common.facts import ModelFacts
from worker.engines.common.failures import is_out_of_memory, one_line
from worker.engines.common.prompt import ALIGNED, Prompt, PromptBuilder
from worker.engines.common.sampling import Sampled
from worker.engines.common.sequence import Sequence, SequenceGroup, State, bare_fields
from worker.engines.transformers.loaded import LoadedModel

try:
    from transformers.decision import DecisionConfig, label_token_ids
    from transformers.decision.modeling_utils import process_scores
except ImportError:  # before 5.24
    DecisionConfig = None

__all__ = ["Decision", "DecisionMaker", "Probe", "SerialDecision", "decision_config"]


def decision_config(loaded: LoadedModel) -> Any:
    """The `DecisionConfig` that a model decides by, or None where it cannot decide. Raises
    `EngineLoadError` for one that cannot be read."""
    if loaded.head is not None:
        return loaded.head.config
    if DecisionConfig is None or loaded.embedding_only or loaded.encoder_decoder:
        return None
    source = loaded.folder or getattr(loaded.model, "name_or_path", None)
    try:
        config = DecisionConfig.from_pretrained(
            source, _raise_exceptions_for_connection_errors=False
        )
    except Exception as error:  # whatever its strict classes raise
        raise EngineLoadError(f"{source}: its decision.json is wrong: {one_line(error)}") from error
    holder = loaded.processor if loaded.processor is not None else loaded.tokenizer
    templated = config.chat_template or getattr(holder, "chat_template", None)
    # An adapter would change every other answer of the model.
    return config if templated and not config.adapter else None


# --- prompts --------------------------------------------------------------------------------------


@dataclass(slots=True)
class DecisionPrompt:
    """A prompt, and the questions that are read from it."""

    prompt: Prompt
    questions: list[Any]
    #: int64: each is the number of tokens before a place that the head reads.
    marks: torch.Tensor


class _Assets(dict[str, Any]):
    """Images by name, that know which of them stand in a prompt."""

    def __init__(self, images: dict[str, Any]) -> None:
        super().__init__(images)
        self.placed: set[str] = set()

    def __getitem__(self, name: str) -> Any:
        self.placed.add(name)
        return super().__getitem__(name)


class DecisionMaker:
    """Makes decisions of requests for one model (an adapter with texts of its own has its own)."""

    def __init__(
        self, loaded: LoadedModel, facts: ModelFacts, config: Any, builder: PromptBuilder
    ) -> None:
        """`facts`: of the texts, where those of an adapter are not the model's."""
        self.loaded = loaded
        self.config = config
        self._builder = builder
        # A copy: marks are added to its vocabulary, behind the model's rows.
        holder = facts.tokenizer if facts.processor is None else facts.processor
        self._processor = copy.deepcopy(holder)
        self._tokenizer = getattr(self._processor, "tokenizer", self._processor)
        self._lock = threading.Lock()
        self.label_ids = functools.cache(functools.partial(label_token_ids, self._tokenizer))

    def prompts(self, job: Job) -> list[DecisionPrompt]:
        """The prompts of a request. Raises `RequestError`."""
        request = job.request
        images = self._builder.images(job)
        assets = _Assets({name: images[index].image for name, index in request.assets.items()})
        asked = {
            "state": request.state,
            "questions": {name: _plain(q) for name, q in (request.questions or {}).items()},
            "assets": assets or None,
        }
        with self._lock:
            try:
                made = self.config.prepare_inputs(asked, self._processor)
                if self.loaded.head is None:
                    for _, questions in made:
                        for question in questions:
                            self.label_ids(tuple(question.labels))
            except MemoryError:
                raise
            except Exception as error:
                if is_out_of_memory(error):
                    raise
                # A template is the model's own program: whatever it raises fails this request.
                raise _invalid(f"model {request.model} cannot be asked this: {error}") from None
        for name in assets.keys() - assets.placed:
            raise _invalid(
                f"asset {name!r} stands where the model's decision template shows no image"
            )
        return [self._prompt(request, inputs, questions) for inputs, questions in made]

    def _prompt(
        self, request: Request, inputs: dict[str, Any], questions: list[Any]
    ) -> DecisionPrompt:
        output = dict(inputs)
        marks: torch.Tensor = output.pop("marks")
        ids = output.pop("input_ids")[0].tolist()
        context = self.loaded.context_tokens
        if len(ids) > context:
            raise RequestError(
                ErrorCode.CONTEXT_OVERFLOW,
                f"question {questions[0].name!r} and the state are {len(ids)} tokens, the context "
                f"is {context}: shorten the state",
                details={"prompt_tokens": len(ids), "context_tokens": context},
            )
        digests = [_digest(output)] if "pixel_values" in output else []
        return DecisionPrompt(self._builder.finished(ids, output, digests), questions, marks)

    def scores(self, asked: DecisionPrompt, outputs: torch.Tensor) -> list[torch.Tensor]:
        """What each option of the questions has, of `outputs` [marks, width] at their marks: hidden
        states of a decision model, else logits."""
        if self.loaded.head is not None:
            return self.loaded.head.scores(outputs, asked.questions)
        return [
            outputs[row, self.label_ids(tuple(question.labels))]
            for row, question in enumerate(asked.questions)
        ]

    def alone(self, asked: DecisionPrompt) -> list[torch.Tensor]:
        """The scores of one prompt by the whole model, in a forward of its own."""
        loaded, prompt = self.loaded, asked.prompt
        inputs = prompt.inputs(loaded.device, loaded.dtype)
        inputs["input_ids"] = torch.tensor([prompt.ids], device=loaded.device)
        if loaded.head is not None:
            return loaded.head.whole(asked.marks, asked.questions, inputs)
        places = (asked.marks - 1).to(loaded.device)
        kept = "logits_to_keep" in forward_parameters(loaded.model)
        if kept:
            inputs["logits_to_keep"] = places
        logits = loaded.model(**inputs, use_cache=False).logits[0]
        return self.scores(asked, logits if kept else logits[places])

    def answers(self, asked: DecisionPrompt, scores: list[torch.Tensor]) -> dict[str, Any]:
        """The answers by name, from the scores of the options. Raises `RequestError`."""
        ids = torch.tensor([asked.prompt.ids])
        on_host = [score.cpu() for score in scores]
        processed = process_scores(self.config, ids, asked.marks, asked.questions, on_host)
        answers = {}
        for question, score in zip(asked.questions, processed, strict=True):
            shares = score.softmax(-1)
            if shares.isnan().any():
                raise RequestError(
                    ErrorCode.ENGINE_ERROR,
                    f"question {question.name!r} cannot be answered: the model's outputs are not "
                    "numbers",
                )
            answers[question.name] = question.answer(shares.tolist())
        return answers


def _plain(question: Question) -> dict[str, Any]:
    fields = {"instructions": question.instructions, "criteria": question.criteria}
    return {"type": question.type} | {k: v for k, v in fields.items() if v is not None}


def _digest(output: dict[str, Any]) -> bytes:
    """Of all images of a prompt, as the model gets them: which of them stands where differs from
    question to question."""
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(output.keys() - set(ALIGNED)):
        value = output[name]
        for part in value if isinstance(value, list | tuple) else [value]:
            data = part.numpy() if isinstance(part, torch.Tensor) else np.asarray(part)
            digest.update(f"{name} {data.shape}".encode() + np.ascontiguousarray(data).tobytes())
    return digest.digest()


# --- on the engine's thread -----------------------------------------------------------------------


class Decision(SequenceGroup):
    """A request whose questions are being answered, by one sequence for each prompt."""

    def __init__(
        self,
        maker: DecisionMaker,
        request_id: bytes,
        prompts: list[DecisionPrompt],
        adapter: str | None,
    ) -> None:
        self.request_id = request_id
        self.maker = maker
        self._answers: dict[str, Any] = {}
        self._error: ErrorInfo | None = None
        #: Tokens that all prompts begin with.
        self.shared_tokens = _shared(prompts)
        super().__init__([Probe.of(self, asked, adapter) for asked in prompts])
        self._left = len(self.sequences)

    def answered(self, answers: dict[str, Any]) -> list[EngineEvent]:
        """A sequence has its answers."""
        self._answers |= answers
        return self.out()

    def failed(self, error: ErrorInfo) -> list[EngineEvent]:
        """A sequence failed: the others need not go on."""
        self._error = self._error or error
        self.cancelled = True
        return self.out()

    def out(self) -> list[EngineEvent]:
        """A sequence holds nothing any more; the end of the request with the last of them."""
        self._left -= 1
        if self._left:
            return []
        prompts = [sequence.prompt for sequence in self.sequences]
        usage = Usage(
            prompt_tokens=sum(len(prompt.ids) for prompt in prompts),
            cached_tokens=sum(sequence.cached for sequence in self.sequences),
            image_tokens=sum(prompt.image_tokens for prompt in prompts),
        )
        if self._error is not None:
            return [Failed(self.request_id, self._error, usage)]
        if self.cancelled:
            return [Ended(self.request_id, FinishReason.CANCELLED, usage=usage)]
        return [_ended(self.request_id, self._answers, usage)]


def _shared(prompts: list[DecisionPrompt]) -> int:
    keys = [asked.prompt.key for asked in prompts]
    length = min(map(len, keys))
    for key in keys[1:]:
        different = np.flatnonzero(keys[0][:length] != key[:length])
        length = int(different[0]) if len(different) else length
    return length


@dataclass(slots=True, eq=False, kw_only=True)
class Probe(Sequence):
    """A prompt that is computed to be read, not continued."""

    decision: Decision
    asked: DecisionPrompt
    _parts: list[torch.Tensor] = field(default_factory=list)
    _scores: list[torch.Tensor] = field(default_factory=list)

    @classmethod
    def of(cls, decision: Decision, asked: DecisionPrompt, adapter: str | None) -> Probe:
        """The sequence of one prompt."""
        return cls(
            **bare_fields(decision.request_id, asked.prompt, adapter),
            reads=tuple((asked.marks - 1).tolist()),
            decision=decision,
            asked=asked,
        )

    @property
    def kept_tokens(self) -> int:
        # Behind what all prompts share come the questions; others may ask other ones.
        alone = len(self.decision.sequences) == 1
        return self.filled if alone else min(self.filled, self.decision.shared_tokens)

    def begin(self) -> None:
        self._parts.clear()

    def read(self, outputs: torch.Tensor) -> None:
        self._parts.append(outputs)
        if sum(map(len, self._parts)) < len(self.reads):
            return
        whole = self._parts[0] if len(self._parts) == 1 else torch.cat(self._parts)
        # What is left of them is small.
        self._scores = self.decision.maker.scores(self.asked, whole)
        self._parts.clear()

    def append_token(self, sampled: Sampled | None, now: float) -> None:
        self.state = State.DONE

    def flush_events(self, now: float) -> list[EngineEvent]:
        try:
            return self.decision.answered(self.decision.maker.answers(self.asked, self._scores))
        except RequestError as error:
            return self.fail(error.info)

    def end(
        self,
        reason: FinishReason,
        now: float,
        stopped_by: str | int | None = None,
        *,
        ending_token: int | None = None,
    ) -> list[EngineEvent]:
        self.state = State.DONE
        return self.decision.out()

    def fail(self, error: ErrorInfo) -> list[EngineEvent]:
        self.state = State.DONE
        self.failed = True
        return self.decision.failed(error)


class SerialDecision:
    """A request whose prompts are computed one by one, as `DecisionPipeline` does it: where slots
    cannot hold the model's state, or a prompt is too long for a batch."""

    def __init__(
        self,
        maker: DecisionMaker,
        request_id: bytes,
        prompts: list[DecisionPrompt],
        adapter: str | None,
    ) -> None:
        self.request_id = request_id
        self.cancelled = False
        self._maker = maker
        self._prompts = prompts
        self._adapter = adapter
        self._left = list(reversed(prompts))
        self._answers: dict[str, Any] = {}

    @torch.inference_mode()
    def step(self) -> Ended | None:
        """Compute one prompt; the end of the request after the last."""
        asked, loaded = self._left.pop(), self._maker.loaded
        loaded.choose_rows([self._adapter])
        with loaded.any_length():
            scores = self._maker.alone(asked)
        self._answers |= self._maker.answers(asked, scores)
        if self._left:
            return None
        usage = Usage(
            prompt_tokens=sum(len(asked.prompt.ids) for asked in self._prompts),
            image_tokens=sum(asked.prompt.image_tokens for asked in self._prompts),
        )
        return _ended(self.request_id, self._answers, usage)


def _ended(request_id: bytes, answers: dict[str, Any], usage: Usage) -> Ended:
    return Ended(request_id, FinishReason.STOP, usage=usage, result={"answers": answers})


def _invalid(message: str) -> RequestError:
    return RequestError(ErrorCode.INVALID_REQUEST, message)
