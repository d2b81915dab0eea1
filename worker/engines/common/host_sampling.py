"""Samples on the host (with `sampling`) from logits that a library computed.

Every sampling parameter therefore means the same as on other engines, and each token is drawn by
(seed, position) here too. Must never touch the library that the logits come from.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence as Items

import numpy as np
import torch
from numpy.typing import NDArray

from broker.protocol.errors import ErrorCode, RequestError
from broker.protocol.messages import TokenLogprob, TopLogprob
from worker.engines.common.facts import ModelFacts
from worker.engines.common.sampling import (
    LOGPROB_FLOOR,
    Sampled,
    Sampler,
    SamplerRow,
    prompt_logprobs,
)
from worker.engines.common.sequence import Sequence
from worker.engines.common.text import token_table

__all__ = ["HostSampler", "RowAhead", "is_plain_greedy", "token_logprob"]


def is_plain_greedy(sequence: Sequence, *, scored_elsewhere: bool = False) -> bool:
    """Whether the next token is simply the most likely one and no logprobs are needed from here.
    `scored_elsewhere`: the library computes logprobs itself."""
    params = sequence.params
    return (
        sequence.row.greedy
        and params.repetition_penalty == 1.0
        and params.presence_penalty == params.frequency_penalty == 0.0
        and (params.logprobs is None or scored_elsewhere)
        and params.constraint is None
        and sequence.row.gate is None
        and not (params.logit_bias or params.banned_token_ids or params.forced_token_ids)
        and params.min_tokens <= len(sequence.answer)
    )


def token_logprob(
    token_id: int,
    logprob: float,
    likeliest: Items[tuple[int, float]],
    bytes_of: Callable[[int], bytes],
) -> TokenLogprob:
    """A library's logprobs in the bus's form; `likeliest`: ids and logprobs, best first."""
    top = [TopLogprob(i, max(value, LOGPROB_FLOOR), bytes_of(i)) for i, value in likeliest]
    return TokenLogprob(max(logprob, LOGPROB_FLOOR), bytes_of(token_id), top)


class RowAhead:
    """Advances a sequence's row for a library that samples ahead: when its token is sampled, not
    when it is appended to the `Sequence`."""

    def __init__(self, sequence: Sequence) -> None:
        self.row: SamplerRow = sequence.row
        sequence.row_ahead = True

    def took(self, sampled: Sampled) -> Sampled:
        """Advance by a token; returns the outcome to report."""
        if sampled.ok:
            try:
                self.row.append(sampled.token_id)
            except RequestError as error:
                code = ErrorCode(error.info.code)
                return Sampled(-1, None, ok=False, fault=error.info.message, code=code)
        return sampled


class HostSampler:
    """Samples rows of logits on the host."""

    def __init__(self, facts: ModelFacts) -> None:
        self._bytes_of = token_table(facts.tokenizer).bytes_of
        self._banned = sorted(facts.placeholder_ids)
        self._sampler: Sampler | None = None

    def sample(self, logits: NDArray[np.float32], rows: Items[SamplerRow]) -> list[Sampled]:
        """The next token of each row; `logits` float32 [rows, vocabulary] is overwritten."""
        tensor = torch.from_numpy(logits)
        if self._sampler is None or self._sampler.vocab_size != tensor.shape[1]:
            self._sampler = Sampler(
                tensor.shape[1], banned_ids=self._banned, token_bytes=self._bytes_of
            )
        return self._sampler.sample(tensor, rows)

    def score_prompt(self, sequence: Sequence, start: int, logits: NDArray[np.float32]) -> None:
        """Add logprobs of the prompt to a sequence, piece by piece; `logits` [n, vocabulary] are
        those at prompt tokens `start` to `start + n`, each predicting the next token."""
        ids = sequence.prompt.ids
        top = sequence.params.prompt_logprobs or 0
        if start == 0:
            sequence.prompt_logprobs = [TokenLogprob(None, self._bytes_of(ids[0]))]
        following = ids[start + 1 : start + 1 + len(logits)]
        if following:
            sequence.prompt_logprobs += prompt_logprobs(
                torch.from_numpy(logits[: len(following)]), following, top, self._bytes_of
            )
