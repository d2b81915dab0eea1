"""The fallback for models that cannot be batched: each sequence has its own `generate()`.

transformers' `generate()` runs all of them: encoder-decoder models, state-space and hybrid models,
models that compute their own positions. Each sequence has a thread in which `generate()` stops at
every token until the scheduler has chosen it; only one thread runs at a time, so they take turns.
Sampling, stop strings and texts are handled as in the batch.
"""

from __future__ import annotations

import copy
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from transformers import LogitsProcessor, LogitsProcessorList

from broker.protocol.errors import ErrorCode, RequestError
from broker.protocol.messages import FinishReason, TokenLogprob
from worker.engines.base import EngineEvent
from worker.engines.common.compat import rope_owner
from worker.engines.common.failures import error_info
from worker.engines.common.runner import RunnerCounts
from worker.engines.common.sampling import Sampler, prompt_logprobs
from worker.engines.common.sequence import Sequence, State
from worker.engines.transformers.loaded import LoadedModel
from worker.engines.transformers.memory import release_cached
from worker.engines.transformers.rope import RopeState

__all__ = ["GenerateRunner", "plain_generation_config"]

IMPOSSIBLE_ID = 2**31 - 1
"""An end token that no model has; None would be replaced with the model's own by `generate()`."""

NEUTRAL: dict[str, Any] = {
    "do_sample": False,
    "num_beams": 1,
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
    "repetition_penalty": 1.0,
    "max_length": None,
    "min_length": 0,
    "early_stopping": False,
    "length_penalty": 1.0,
    "return_dict_in_generate": False,
    # We detect the end ourselves: a request may ignore EOS.
    "eos_token_id": IMPOSSIBLE_ID,
    "stop_strings": None,
}
"""Generation settings that requests decide; the rest (suppressed tokens, forced BOS, ...) are the
model's own."""


def plain_generation_config(model: Any, **changes: Any) -> Any:
    """The model's generation config, with neutral values for what requests decide and then
    `changes`."""
    config = copy.deepcopy(model.generation_config)
    pad = config.pad_token_id
    eos = config.eos_token_id
    for name, value in {**NEUTRAL, **changes}.items():
        setattr(config, name, value)
    if pad is None:
        # Without a padding id generate() uses EOS, which we have removed.
        first = eos[0] if isinstance(eos, list | tuple) and eos else eos
        config.pad_token_id = first if isinstance(first, int) else 0
    return config


class _Stopped(Exception):
    """Raised inside `generate()` to end it."""


class _Generation(LogitsProcessor):  # type: ignore[misc]
    """One `generate()` in its own thread, which waits at each token for the choice."""

    def __init__(self, loaded: LoadedModel, sequence: Sequence) -> None:
        self.sequence = sequence
        self._loaded = loaded
        self._go = threading.Semaphore(0)
        self._there = threading.Semaphore(0)
        self._scores: torch.Tensor | None = None
        self._chosen: int | None = None
        self._stop = False
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None
        #: State that some models keep as attributes between steps.
        self._rope_deltas: Any = None
        self._rope: RopeState | None = None
        #: Tokens of the answer so far that `generate()` starts with, and those that it has to
        #: compute again one by one, with the rotary frequencies of their own lengths.
        self.known, self.replayed = _divided(loaded, sequence)

    # --- the scheduler's side ---------------------------------------------------------------------

    def advance(self) -> torch.Tensor:
        """Compute the next logits [1, vocabulary]. Raises what `generate()` raised."""
        rope = self._loaded.rope
        if rope is None:
            return self._advance()
        with rope.used(self._rope):
            scores = self._advance()
            self._rope = rope.state()
        return scores

    def _advance(self) -> torch.Tensor:
        self._loaded.choose_rows([self.sequence.adapter])
        owner = rope_owner(self._loaded.model)
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, daemon=True, name="generate")
            self._thread.start()
        elif owner is not None:
            owner.rope_deltas = self._rope_deltas
        self._go.release()
        self._there.acquire()
        if owner is not None:
            self._rope_deltas = owner.rope_deltas
        if self._error is not None:
            raise self._error
        if self._scores is None:
            raise RuntimeError("generate() ended before the request did")
        scores, self._scores = self._scores, None
        return scores

    def choose(self, token_id: int) -> None:
        self._chosen = token_id

    def stop(self) -> None:
        """End `generate()` and wait until its thread has ended."""
        if self._thread is None or not self._thread.is_alive():
            return
        self._stop = True
        self._go.release()
        self._thread.join()

    # --- the side of generate() -------------------------------------------------------------------

    def _run(self) -> None:
        self._go.acquire()
        try:
            if not self._stop:
                self._generate()
        except _Stopped:
            pass
        except BaseException as error:
            self._error = error
        finally:
            self._there.release()

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self._scores = scores
        self._there.release()
        self._go.acquire()
        if self._stop:
            raise _Stopped
        forced = torch.full_like(scores, -torch.inf)
        forced[0, self._chosen] = 0.0
        return forced

    def _generate(self) -> None:
        sequence, loaded = self.sequence, self._loaded
        model, prompt = loaded.model, sequence.prompt
        config = plain_generation_config(
            model, max_new_tokens=sequence.max_tokens - len(self.known) + 1
        )
        arguments: dict[str, Any] = prompt.media_on(loaded.device, loaded.dtype)
        if loaded.encoder_decoder:
            ids = torch.tensor([prompt.ids])
            start = config.decoder_start_token_id
            if self.known:
                begin = start if start is not None else config.bos_token_id
                arguments["decoder_input_ids"] = torch.tensor([[begin, *self.known]])
        else:
            ids = torch.tensor([prompt.ids + self.known])
        for name, value in prompt.aligned.items():
            missing = ids.shape[1] - value.shape[1]
            arguments[name] = torch.nn.functional.pad(value, (0, missing))
        on_device = {
            name: value.to(loaded.device) if isinstance(value, torch.Tensor) else value
            for name, value in arguments.items()
        }
        model.generate(
            input_ids=ids.to(loaded.device),
            attention_mask=torch.ones_like(ids).to(loaded.device),
            generation_config=config,
            logits_processor=LogitsProcessorList([self]),
            **on_device,
        )


class GenerateRunner:
    """Runs up to `slots` sequences in turns, one token each."""

    def __init__(
        self,
        loaded: LoadedModel,
        *,
        slots: int,
        banned_ids: frozenset[int],
        token_bytes: Callable[[int], bytes],
    ) -> None:
        self.slots = slots
        self._loaded = loaded
        self._banned = banned_ids
        self._token_bytes = token_bytes
        self._sampler: Sampler | None = None
        self._waiting: deque[Sequence] = deque()
        self._running: list[_Generation] = []

    @property
    def busy(self) -> bool:
        return bool(self._running or self._waiting)

    def counts(self) -> RunnerCounts:
        return RunnerCounts(
            running=len(self._running),
            waiting=len(self._waiting),
            batch=len(self._running),
            kv_used_tokens=sum(generation.sequence.total for generation in self._running),
        )

    def submit(self, sequence: Sequence) -> None:
        self._waiting.append(sequence)

    def close(self) -> None:
        for generation in self._running:
            generation.stop()
        self._running.clear()
        self._waiting.clear()

    def step(self) -> list[EngineEvent]:
        """One token for each running sequence."""
        events: list[EngineEvent] = []
        now = time.perf_counter()
        for sequence in list(self._waiting):
            if sequence.cancelled:
                self._waiting.remove(sequence)
                events += sequence.end(FinishReason.CANCELLED, now)
        while self._waiting and len(self._running) < self.slots:
            sequence = self._waiting.popleft()
            sequence.started_at = sequence.started_at or now
            sequence.state = State.DECODE
            self._running.append(_Generation(self._loaded, sequence))
        for generation in list(self._running):
            self._advance(generation, events)
            if generation.sequence.state is State.DONE:
                generation.stop()
                self._running.remove(generation)
        return events

    def _advance(self, generation: _Generation, events: list[EngineEvent]) -> None:
        sequence = generation.sequence
        if sequence.cancelled:
            events += sequence.end(FinishReason.CANCELLED, time.perf_counter())
            return
        try:
            if sequence.wants_prompt_logprobs and not sequence.prompt_logprobs:
                self._score_prompt(sequence)
            scores = generation.advance()
            if generation.replayed:
                generation.choose(generation.replayed.popleft())
                return
            if self._sampler is None:
                self._sampler = Sampler(
                    scores.shape[-1], banned_ids=sorted(self._banned), token_bytes=self._token_bytes
                )
            sampled = self._sampler.sample(scores.clone(), [sequence.row])[0]
            now = time.perf_counter()
            sequence.append_token(sampled, now)
            events += sequence.flush_events(now)
            generation.choose(sampled.token_id)
        except RequestError as error:
            events += sequence.fail(error.info)
        except Exception as error:
            release_cached(self._loaded.device)
            events += sequence.fail(error_info(error, "the model failed on this request"))

    @torch.inference_mode()
    def _score_prompt(self, sequence: Sequence) -> None:
        if self._loaded.encoder_decoder:
            raise RequestError(
                ErrorCode.INVALID_REQUEST,
                "prompt_logprobs: an encoder-decoder model has no log probabilities for its prompt",
            )
        prompt = sequence.prompt
        self._loaded.choose_rows([sequence.adapter])
        arguments = prompt.inputs(self._loaded.device, self._loaded.dtype)
        ids = torch.tensor([prompt.ids], device=self._loaded.device)
        with self._loaded.any_length():
            logits = self._loaded.model(input_ids=ids, **arguments).logits[0]
        first = TokenLogprob(None, self._token_bytes(prompt.ids[0]))
        top = sequence.params.prompt_logprobs or 0
        rest = prompt_logprobs(logits[:-1], prompt.ids[1:], top, self._token_bytes)
        sequence.prompt_logprobs = [first, *rest]


def _divided(loaded: LoadedModel, sequence: Sequence) -> tuple[list[int], deque[int]]:
    """The answer so far, divided into what may be computed with the prompt in one forward, and the
    rest."""
    answer, count = sequence.answer, len(sequence.answer)
    if loaded.rope is not None:
        # An encoder-decoder model's answer has its own positions.
        before = 0 if loaded.encoder_decoder else len(sequence.prompt.ids)
        count = min(max(loaded.rope.unchanged_tokens - before, 0), count)
    return answer[:count], deque(answer[count:])
