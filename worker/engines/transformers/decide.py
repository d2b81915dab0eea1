"""Decisions: typed questions about a state, answered with probabilities as by `DecisionPipeline`.

Prompts, labels, temperatures and the form of answers are transformers' own (`DecisionConfig`). Here
each prompt becomes a sequence of the batch whose outputs are read instead of sampled. The tokens
that transformers adds to mark places are added to a copy of the model's tokenizer. Prompts are made
in preprocessing threads; the rest runs on the engine's thread.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import threading
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from transformers import BatchFeature

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
from worker.engines.transformers.prefix import SMALLEST_PREFIX

try:
    from transformers.decision import DecisionConfig, label_token_ids
    from transformers.decision.modeling_utils import process_scores
except ImportError:  # before 5.24
    DecisionConfig = None

__all__ = ["Decision", "DecisionMaker", "Probe", "SerialDecision", "decision_config"]


def decision_config(loaded: LoadedModel) -> Any:
    """The `DecisionConfig` by which a model decides; None if it cannot decide. Raises
    `EngineLoadError` if it has one that cannot be read."""
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
        raise EngineLoadError(
            f"{source}: its decision.json cannot be used: {one_line(error)}"
        ) from error
    holder = loaded.processor if loaded.processor is not None else loaded.tokenizer
    templated = config.chat_template or getattr(holder, "chat_template", None)
    # An adapter would change every other answer of the model.
    return config if templated and not config.adapter else None


# --- prompts --------------------------------------------------------------------------------------


@dataclass(slots=True)
class DecisionPrompt:
    """A prompt, and the questions whose answers are read from it."""

    prompt: Prompt
    questions: list[Any]
    #: int64 [questions]: the number of tokens before each place that is read.
    marks: torch.Tensor


class _Assets(dict[str, Any]):
    """Images by name, which records those that a prompt contains."""

    def __init__(self, images: dict[str, Any]) -> None:
        super().__init__(images)
        self.placed: set[str] = set()

    def __getitem__(self, name: str) -> Any:
        self.placed.add(name)
        return super().__getitem__(name)


class _ImageMemo:
    """Replaces a processor's `preprocess`, and remembers its results for the questions of one
    request, which share the images of their state."""

    def __init__(self, processor: Any) -> None:
        self._own = processor.preprocess
        #: Results by the identity of images and by arguments; the images are kept alive beside.
        self._made: dict[Any, tuple[Any, BatchFeature]] = {}
        processor.preprocess = self

    def __call__(self, images: Any, *args: Any, **kwargs: Any) -> Any:
        key = (_identity(images), repr((args, kwargs)))
        if key not in self._made:
            made = self._own(images, *args, **kwargs)
            if not isinstance(made, BatchFeature):
                return made
            self._made[key] = (images, made)
        made = copy.copy(self._made[key][1])
        # Callers remove entries.
        made.data = dict(made.data)
        return made

    def clear(self) -> None:
        self._made.clear()


def _identity(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return tuple(_identity(item) for item in value)
    return id(value)


class DecisionMaker:
    """Turns requests into decisions, for one model or an adapter with its own tokenizer or
    template."""

    def __init__(
        self, loaded: LoadedModel, facts: ModelFacts, config: Any, builder: PromptBuilder
    ) -> None:
        """`facts`: those with the tokenizer and processor to use, the adapter's if it has its
        own."""
        self.loaded = loaded
        self.config = config
        self._builder = builder
        # A copy, since marks are added to its vocabulary, after the rows of the model.
        holder = facts.tokenizer if facts.processor is None else facts.processor
        self._processor = copy.deepcopy(holder)
        self._tokenizer = getattr(self._processor, "tokenizer", self._processor)
        image_processor = getattr(self._processor, "image_processor", None)
        self._memo = None if image_processor is None else _ImageMemo(image_processor)
        self._lock = threading.Lock()
        self.label_ids = functools.cache(functools.partial(label_token_ids, self._tokenizer))

    def prompts(self, job: Job) -> list[DecisionPrompt]:
        """The prompts of a request, in a preprocessing thread. Raises `RequestError`."""
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
                # A template is a program that comes with the model: any error fails this request.
                raise _invalid(
                    f"model {request.model} cannot be asked this: {one_line(error)}"
                ) from None
            finally:
                if self._memo is not None:
                    self._memo.clear()
        for name in assets.keys() - assets.placed:
            raise _invalid(
                f"asset {name!r} is used where the model's decision template does not place images"
            )
        digests: dict[int, bytes] = {}
        return [self._prompt(request, inputs, questions, digests) for inputs, questions in made]

    def _prompt(
        self,
        request: Request,
        inputs: dict[str, Any],
        questions: list[Any],
        digests_of: dict[int, bytes],
    ) -> DecisionPrompt:
        """`digests_of`: digests of tensors that the prompts of a request share, by identity."""
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
        digests = [_digest(output, digests_of)] if "pixel_values" in output else []
        return DecisionPrompt(self._builder.finished(ids, output, digests), questions, marks)

    def scores(self, asked: DecisionPrompt, outputs: torch.Tensor) -> list[torch.Tensor]:
        """The scores of the options of each question, from `outputs` [marks, width] at its mark:
        hidden states of a decision model, else logits."""
        if self.loaded.head is not None:
            return self.loaded.head.scores(outputs, asked.questions)
        return [
            outputs[row, self.label_ids(tuple(question.labels))]
            for row, question in enumerate(asked.questions)
        ]

    def alone(self, asked: DecisionPrompt) -> list[torch.Tensor]:
        """The scores of one prompt, by the whole model in a forward of its own."""
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
                    "numbers (NaN)",
                )
            answers[question.name] = question.answer(shares.tolist())
        return answers


def _plain(question: Question) -> dict[str, Any]:
    fields = {"instructions": question.instructions, "criteria": question.criteria}
    return {"type": question.type} | {k: v for k, v in fields.items() if v is not None}


def _digest(output: dict[str, Any], known: dict[int, bytes]) -> bytes:
    """Digest of all images of a prompt, as the model gets them: prompts of one request may contain
    different ones of its images. `known`: digests of parts by identity."""
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(output.keys() - set(ALIGNED)):
        value = output[name]
        for part in value if isinstance(value, list | tuple) else [value]:
            if id(part) not in known:
                known[id(part)] = _content(part)
            digest.update(name.encode() + known[id(part)])
    return digest.digest()


def _content(part: Any) -> bytes:
    data = part.numpy() if isinstance(part, torch.Tensor) else np.asarray(part)
    described = f"{data.dtype} {data.shape}".encode()
    return hashlib.blake2b(
        described + np.ascontiguousarray(data).tobytes(), digest_size=16
    ).digest()


# --- on the engine's thread -----------------------------------------------------------------------


class Decision(SequenceGroup):
    """A request whose questions are being answered, by sequences of one or several prompts."""

    def __init__(
        self,
        maker: DecisionMaker,
        request_id: bytes,
        prompts: list[DecisionPrompt],
        adapter: str | None,
        branch_tokens: int,
    ) -> None:
        """`branch_tokens`: up to this many tokens of questions are computed as branches behind one
        state; 0: each question is a prompt of its own."""
        self.request_id = request_id
        self.maker = maker
        self.prompts = prompts
        self._answers: dict[str, Any] = {}
        self._error: ErrorInfo | None = None
        #: Length of the common beginning of all prompts, of which no output is read.
        self.shared_tokens = _shared(prompts)
        groups = _groups(prompts, self.shared_tokens, branch_tokens)
        super().__init__([Probe.of(self, group, adapter) for group in groups])
        self._left = len(self.sequences)

    def answered(self, answers: dict[str, Any]) -> list[EngineEvent]:
        """Add the answers of a sequence. Returns the end of the request after the last one."""
        self._answers |= answers
        return self.out()

    def failed(self, error: ErrorInfo) -> list[EngineEvent]:
        """A sequence failed: cancel the others. Returns the end of the request after the last."""
        self._error = self._error or error
        self.cancelled = True
        return self.out()

    def out(self) -> list[EngineEvent]:
        """A sequence has left the scheduler. Returns the end of the request after the last one."""
        self._left -= 1
        if self._left:
            return []
        prompts = [asked.prompt for asked in self.prompts]
        usage = Usage(
            prompt_tokens=sum(len(prompt.ids) for prompt in prompts),
            cached_tokens=sum(
                sequence.cached + max(len(sequence.branches) - 1, 0) * sequence.stem_tokens
                for sequence in self.sequences
            ),
            image_tokens=sum(prompt.image_tokens for prompt in prompts),
        )
        if self._error is not None:
            return [Failed(self.request_id, self._error, usage)]
        if self.cancelled:
            return [Ended(self.request_id, FinishReason.CANCELLED, usage=usage)]
        # Sequences end in any order.
        names = (question.name for asked in self.prompts for question in asked.questions)
        return [_ended(self.request_id, {name: self._answers[name] for name in names}, usage)]


def _shared(prompts: list[DecisionPrompt]) -> int:
    keys = [asked.prompt.key for asked in prompts]
    length = min(map(len, keys))
    for key in keys[1:]:
        different = np.flatnonzero(keys[0][:length] != key[:length])
        length = int(different[0]) if len(different) else length
    return min(length, *(int(asked.marks[0]) - 1 for asked in prompts))


def _groups(
    prompts: list[DecisionPrompt], shared: int, branch_tokens: int
) -> list[list[DecisionPrompt]]:
    """The prompts in groups, each of which becomes one sequence. Only text can be in a branch."""
    if shared < SMALLEST_PREFIX or any(asked.prompt.media_end > shared for asked in prompts):
        branch_tokens = 0
    groups: list[list[DecisionPrompt]] = []
    room = 0
    for asked in prompts:
        tokens = len(asked.prompt.ids) - shared
        if not groups or tokens > room:
            groups.append([])
            room = branch_tokens
        groups[-1].append(asked)
        room -= tokens
    return groups


def _joined(prompts: list[DecisionPrompt], stem: int) -> Prompt:
    """One prompt: the first `stem` tokens, which are common to all, and what follows in each."""
    first, *others = (asked.prompt for asked in prompts)
    parts = [first, *others]
    return Prompt(
        ids=first.ids + [token for prompt in others for token in prompt.ids[stem:]],
        media=first.media,
        aligned={
            name: torch.cat([first.aligned[name], *(p.aligned[name][:, stem:] for p in others)], 1)
            for name in first.aligned
        },
        key=np.concatenate([first.key, *(prompt.key[stem:] for prompt in others)]),
        media_end=first.media_end,
        image_tokens=sum(prompt.image_tokens for prompt in parts),
    )


@dataclass(slots=True, eq=False, kw_only=True)
class Probe(Sequence):
    """Prompts with a common stem that are computed to be read, not continued."""

    decision: Decision
    asked: list[DecisionPrompt]
    _parts: list[torch.Tensor] = field(default_factory=list)
    _scores: list[list[torch.Tensor]] = field(default_factory=list)

    @classmethod
    def of(cls, decision: Decision, asked: list[DecisionPrompt], adapter: str | None) -> Probe:
        """The sequence of one prompt, or of several that have a stem."""
        stem, prompt, branches = 0, asked[0].prompt, []
        if len(asked) > 1:
            stem = decision.shared_tokens
            prompt = _joined(asked, stem)
            branches = [len(one.prompt.ids) - stem for one in asked]
        offsets = accumulate(branches[:-1], initial=0)
        places = zip(asked, offsets, strict=True)
        return cls(
            **bare_fields(decision.request_id, prompt, adapter),
            reads=tuple(mark - 1 + offset for one, offset in places for mark in one.marks.tolist()),
            branches=tuple(branches),
            decision=decision,
            asked=asked,
        )

    @property
    def kept_tokens(self) -> int:
        # What follows the shared beginning are questions, and other requests may ask others.
        alone = len(self.decision.prompts) == 1
        return self.filled if alone else min(self.filled, self.decision.shared_tokens)

    def begin(self) -> None:
        self._parts.clear()

    def read(self, outputs: torch.Tensor) -> None:
        self._parts.append(outputs)
        if sum(map(len, self._parts)) < len(self.reads):
            return
        whole = self._parts[0] if len(self._parts) == 1 else torch.cat(self._parts)
        # Keep only the scores, which are small.
        of_each = torch.split(whole, [len(one.marks) for one in self.asked])
        scores = self.decision.maker.scores
        self._scores = [scores(*pair) for pair in zip(self.asked, of_each, strict=True)]
        self._parts.clear()

    def append_token(self, sampled: Sampled | None, now: float) -> None:
        self.state = State.DONE

    def flush_events(self, now: float) -> list[EngineEvent]:
        answers: dict[str, Any] = {}
        try:
            for one, scores in zip(self.asked, self._scores, strict=True):
                answers |= self.decision.maker.answers(one, scores)
        except RequestError as error:
            return self.fail(error.info)
        return self.decision.answered(answers)

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
    """A request whose prompts are computed one by one, as by `DecisionPipeline`: for a model that
    slots cannot hold, or a prompt that is too long for a batch."""

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
        """Compute one prompt. Returns the end of the request after the last one, else None."""
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
