"""One running request: its prompt, its answer so far, and the events of each token.

Shared by every scheduler of the engine. Knows tokens, text and limits; must never touch a model,
a cache or a tensor on an accelerator.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, auto
from typing import TYPE_CHECKING, Any

from msgspec.structs import replace

from broker.protocol.errors import ErrorInfo, RequestError
from broker.protocol.messages import FinishReason, Params, Piece, Timings, TokenLogprob, Usage
from worker.engines.base import Ended, EngineEvent, Failed, PromptFacts, Tokens
from worker.engines.common.pieces import PieceStream
from worker.engines.common.prompt import Prompt

if TYPE_CHECKING:
    import torch

    from worker.engines.common.sampling import Sampled, SamplerRow
    from worker.engines.common.text import TextStream

__all__ = ["Sequence", "SequenceGroup", "State", "bare_fields", "ends_answer"]


def ends_answer(
    token_id: int, count: int, params: Params, eos_ids: frozenset[int], *, finished: bool
) -> bool:
    """Whether the answer ends with this token, which is its `count`th. `finished`: the constraint
    allows nothing to follow, so `min_tokens` and `ignore_eos` do not matter."""
    if token_id not in params.stop_token_ids and token_id not in eos_ids:
        return False
    if finished:
        return True
    if count < params.min_tokens:
        return False
    return not params.ignore_eos or token_id in params.stop_token_ids


class State(Enum):
    """The state of a sequence. In PREFILL and DECODE it occupies a slot."""

    WAITING = auto()
    PREFILL = auto()
    DECODE = auto()
    DONE = auto()


@dataclass(slots=True, eq=False)
class Sequence:
    """A request being answered. Created by preprocessing, driven by a scheduler."""

    request_id: bytes
    params: Params
    prompt: Prompt
    row: SamplerRow
    text: TextStream | PieceStream
    eos_ids: frozenset[int]
    #: Number of tokens, including prior ones, at which the answer ends.
    max_tokens: int
    #: Whether PromptFacts are still to be sent.
    wants_facts: bool
    #: The prompt's text, if `echo` was requested, and the offset of each of its tokens in it.
    echo_text: str
    echo_places: list[int]
    #: If `keep_special` was requested: the special tokens that the model has, and the end of the
    #: prompt.
    special: list[str]
    tail: str
    #: Name of the LoRA adapter, or None for the base model.
    adapter: str | None
    #: `perf_counter` when the job was added.
    added_at: float
    #: The whole answer so far, beginning with tokens generated elsewhere (resume).
    answer: list[int] = field(default_factory=list)
    state: State = State.WAITING
    cancelled: bool = False
    #: Whether it failed, so that its keys and values must not be reused.
    failed: bool = False
    #: Number of tokens of prompt and answer in the cache.
    filled: int = 0
    #: Number of draft tokens that a launched step stores in the cache, after `filled`.
    drafted: int = 0
    #: M-RoPE: shift of text positions after the images of this sequence.
    rope_delta: int = 0
    #: M-RoPE: positions of the prompt [axes, 1, len(prompt)] on the host.
    rope_positions: object | None = None
    #: The prompt's images as the vision tower made them, until their tokens are computed.
    images: object | None = None
    #: What a scheduler knows of drafts of the answer (`RowDrafts`).
    drafts: object | None = None
    #: Number of prompt tokens taken from the prefix cache or another row.
    cached: int = 0
    #: Whether `row` already has the tokens passed to `append_token` (see `RowAhead`).
    row_ahead: bool = False
    #: Positions of the prompt whose outputs are read, in order; if any, nothing is generated.
    reads: tuple[int, ...] = ()
    #: Lengths of the branches at the prompt's end: each continues the stem, which is all that
    #: precedes the first branch, and does not see the other branches.
    branches: tuple[int, ...] = ()
    #: The sequence that computes a prefix for which this one waits, and the length of that prefix.
    follows: Sequence | None = None
    shared: int = 0
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    started_at: float = 0.0
    first_token_at: float = 0.0
    #: Order of admission: the youngest is preempted first.
    admitted: int = 0
    #: The latest token, until its events are emitted; the error if there is no token.
    _untold: int | None = None
    _fault: ErrorInfo | None = None
    _held_ids: list[int] = field(default_factory=list)
    #: The text not sent yet, or its pieces if the answer is split.
    _held_text: str = ""
    _held_pieces: list[Piece] = field(default_factory=list)
    _held_logprobs: list[TokenLogprob] = field(default_factory=list)

    @property
    def total(self) -> int:
        """Number of tokens of prompt and answer."""
        return len(self.prompt.ids) + len(self.answer)

    @property
    def stored(self) -> int:
        """Number of tokens in the cache that may still be needed."""
        return self.filled + self.drafted

    @property
    def stem_tokens(self) -> int:
        """Number of tokens before the first branch; all, if there are no branches."""
        return self.total - sum(self.branches)

    @property
    def reusable_tokens(self) -> int:
        """How many tokens may be taken from elsewhere: the output of the next one is needed."""
        return min(self.reads[0], self.stem_tokens) if self.reads else self.total - 1

    @property
    def kept_tokens(self) -> int:
        """How many tokens of its row are worth keeping when it leaves."""
        return self.filled

    @property
    def reads_last(self) -> bool:
        """Whether the only output needed is that of the last token."""
        return not self.reads or self.reads == (self.total - 1,)

    def begin(self) -> None:
        """Called when it gets a row, for the first time or again: none of its outputs count as
        read."""

    def read(self, outputs: torch.Tensor) -> None:
        """Take the outputs [some, width] at the next positions of `reads`."""
        raise NotImplementedError

    @property
    def wants_prompt_logprobs(self) -> bool:
        return self.wants_facts and self.params.prompt_logprobs is not None

    def tokens(self, start: int, end: int) -> list[int]:
        """Ids of prompt and answer from `start` to `end`."""
        count = len(self.prompt.ids)
        if end <= count:
            return self.prompt.ids[start:end]
        if start >= count:
            return self.answer[start - count : end - count]
        return self.prompt.ids[start:] + self.answer[: end - count]

    def facts(self) -> list[EngineEvent]:
        """PromptFacts, if requested and not sent yet."""
        if not self.wants_facts:
            return []
        self.wants_facts = False
        params = self.params
        logprobs = None
        if params.prompt_logprobs is not None:
            logprobs = self.prompt_logprobs
            if self.echo_places:
                placed = zip(logprobs, self.echo_places, strict=False)
                logprobs = [replace(logprob, place=place) for logprob, place in placed]
        shows_ids = params.echo or logprobs is not None
        return [
            PromptFacts(
                self.request_id,
                self.prompt.ids if shows_ids else [],
                self.echo_text,
                logprobs,
                self.special,
                self.tail,
                self._prompt_usage(),
            )
        ]

    def finish_if_complete(self, now: float) -> list[EngineEvent]:
        """The end of a resumed sequence, if its tokens so far are already the whole answer."""
        last = self.answer[-1] if self.answer else None
        if self.text.over:
            return self.end(FinishReason.STOP, now, self.text.stopped_by)
        if last is not None and self._ends(last):
            return self.end(FinishReason.STOP, now, last, ending_token=last)
        if len(self.answer) >= self.max_tokens:
            return self.end(FinishReason.LENGTH, now)
        return []

    def _ends(self, token_id: int) -> bool:
        count, finished = len(self.answer), self.row.finished
        return ends_answer(token_id, count, self.params, self.eos_ids, finished=finished)

    def append_token(self, sampled: Sampled | None, now: float) -> None:
        """Append the next token (None if outputs are read instead). Afterwards `state` is DONE if
        nothing can follow it, whatever its text; `flush_events` returns the events later."""
        assert sampled is not None
        if not sampled.ok:
            cause = sampled.fault or "the model's logits are not numbers"
            self._mark_failed(
                sampled.code, f"no token can be chosen at position {len(self.answer)}: {cause}"
            )
            return
        token_id = sampled.token_id
        try:
            if not self.row_ahead:
                self.row.append(token_id)
        except RequestError as error:
            self._mark_failed(error.info.code, error.info.message)
            return
        if not self.first_token_at:
            self.first_token_at = now
        self.answer.append(token_id)
        self._held_ids.append(token_id)
        if sampled.logprob is not None:
            self._held_logprobs.append(sampled.logprob)
        self._untold = token_id
        if self._ends(token_id) or len(self.answer) >= self.max_tokens:
            self.state = State.DONE

    def _mark_failed(self, code: str, message: str) -> None:
        self._fault = ErrorInfo(code=str(code), message=message)
        self.state = State.DONE
        self.failed = True

    def flush_events(self, now: float) -> list[EngineEvent]:
        """The events of the latest token. Afterwards `state` may be DONE."""
        if self._fault is not None:
            return self.fail(self._fault)
        token_id = self._untold
        if token_id is None:
            return []
        self._untold = None
        if self._held_logprobs:
            last = self._held_logprobs[-1]
            self._held_logprobs[-1] = replace(last, place=self.text.place)
        if self._ends(token_id):
            return self.end(FinishReason.STOP, now, token_id, ending_token=token_id)
        if isinstance(self.text, PieceStream):
            self._held_pieces += self.text.add(token_id)
        else:
            self._held_text += self.text.add(token_id).text
        if self.text.over:
            return self.end(FinishReason.STOP, now, self.text.stopped_by)
        if len(self.answer) >= self.max_tokens:
            return self.end(FinishReason.LENGTH, now)
        if len(self._held_ids) < self.params.stream_interval:
            return []
        return self.facts() + self._flush()

    def _flush(self) -> list[EngineEvent]:
        if not self._held_ids:
            return []
        logprobs = self._held_logprobs if self.params.logprobs is not None else None
        text, pieces = self._held_text, None
        if isinstance(self.text, PieceStream):
            text, pieces = self.text.event(self._held_pieces)
        event = Tokens(self.request_id, self._held_ids, text, logprobs, pieces)
        self._held_ids, self._held_text, self._held_logprobs = [], "", []
        self._held_pieces = []
        return [event]

    def end(
        self,
        reason: FinishReason,
        now: float,
        stopped_by: str | int | None = None,
        *,
        ending_token: int | None = None,
    ) -> list[EngineEvent]:
        """The events that end the sequence."""
        self.state = State.DONE
        self._untold = None
        events = [] if reason is FinishReason.CANCELLED else self.facts()
        events += self._flush()
        pieces: list[Piece] | None = None
        if isinstance(self.text, PieceStream):
            text, pieces = self.text.event(self.text.finish(ending_token))
        else:
            text = self.text.finish(ending_token)
        events.append(
            Ended(
                self.request_id,
                reason,
                text=text,
                usage=self.usage(),
                timings=self.timings(now),
                stopped_by=stopped_by,
                pieces=pieces,
            )
        )
        return events

    def fail(self, error: ErrorInfo) -> list[EngineEvent]:
        """The event of a failure."""
        self.state = State.DONE
        self.failed = True
        self._untold = self._fault = None
        return [*self._flush(), Failed(self.request_id, error, self.usage())]

    def usage(self) -> Usage:
        return self._prompt_usage(len(self.answer))

    def _prompt_usage(self, completion_tokens: int = 0) -> Usage:
        return Usage(
            prompt_tokens=len(self.prompt.ids),
            completion_tokens=completion_tokens,
            reasoning_tokens=self.text.reasoning_tokens if completion_tokens else 0,
            cached_tokens=self.cached,
            image_tokens=self.prompt.image_tokens,
        )

    def timings(self, now: float) -> Timings:
        started = self.started_at or now
        first = self.first_token_at or now
        return Timings(
            queue_ms=(started - self.added_at) * 1e3,
            prefill_ms=(first - started) * 1e3,
            decode_ms=(now - first) * 1e3,
        )


def bare_fields(request_id: bytes, prompt: Prompt, adapter: str | None) -> dict[str, Any]:
    """The fields of a sequence whose outputs are only read: it needs no sampler and no text."""
    return {
        "request_id": request_id,
        "params": Params(),
        "prompt": prompt,
        "row": None,
        "text": None,
        "eos_ids": frozenset(),
        # Room for one token after the prompt, where prompts computed together store their padding.
        "max_tokens": 1,
        "wants_facts": False,
        "echo_text": "",
        "echo_places": [],
        "special": [],
        "tail": "",
        "adapter": adapter,
        "added_at": 0.0,
    }


class SequenceGroup:
    """A request that several sequences of one model answer together."""

    request_id: bytes

    def __init__(self, sequences: list[Sequence]) -> None:
        self.sequences = sequences

    @property
    def cancelled(self) -> bool:
        """Whether its sequences are to leave the batch."""
        return any(sequence.cancelled for sequence in self.sequences)

    @cancelled.setter
    def cancelled(self, value: bool) -> None:
        for sequence in self.sequences:
            sequence.cancelled = value
