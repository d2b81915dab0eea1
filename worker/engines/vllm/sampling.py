"""tokenbus' sampler as a logits processor for vLLM: tokens depend on (seed, position) in any batch.

vLLM builds one `BusSampling` in each sampling process, which knows nothing of the bus: everything
that a row needs is sent with its request, in `extra_args`. It leaves each row a single token and
sets the rest to minus infinity. Must never keep a token that vLLM has not accepted: at each step a
row is updated from vLLM's own list of output tokens.
"""

from __future__ import annotations

from typing import Any

import msgspec
import torch
from transformers import AutoTokenizer
from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates

from broker.protocol.messages import Params
from worker.engines.common.constrain import ConstraintFactory
from worker.engines.common.sampling import Sampler, SamplerRow

__all__ = ["BusSampling", "RowFacts", "pack"]

KEY = "tokenbus"
"""The key of a row's facts in vLLM's `extra_args`."""


class RowFacts(msgspec.Struct, frozen=True, array_like=True):
    """Everything that a sampling process needs to know about a request."""

    params: Params
    #: Prompt ids, without image placeholders.
    prompt_ids: list[int]
    #: The answer so far, if it was begun elsewhere.
    prior_ids: list[int]
    eos_ids: list[int]
    #: Image placeholders, which are never sampled.
    placeholder_ids: list[int]


def pack(facts: RowFacts) -> dict[str, Any]:
    """The `extra_args` of a request."""
    return {KEY: msgspec.msgpack.encode(facts)}


class _Row:
    """A request in vLLM's batch. `output_ids` is vLLM's own list, which grows with its answer."""

    def __init__(self, facts: RowFacts, row: SamplerRow, output_ids: list[int]) -> None:
        self.row = row
        self.banned = tuple(sorted(facts.placeholder_ids))
        self._output_ids = output_ids
        self._taken = 0

    def catch_up(self) -> SamplerRow:
        """The row, updated with every token that vLLM has accepted."""
        while self._taken < len(self._output_ids):
            self.row.append(self._output_ids[self._taken])
            self._taken += 1
        return self.row


class BusSampling(LogitsProcessor):  # type: ignore[misc]
    """Chooses the tokens of requests that have `RowFacts`."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        self._config = vllm_config.model_config
        self._constraints: ConstraintFactory | None = None
        self._rows: dict[int, _Row] = {}
        self._samplers: dict[tuple[int, ...], Sampler] = {}

    def is_argmax_invariant(self) -> bool:
        """False: it changes which token is most likely."""
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Follow requests as they enter, move within and leave vLLM's batch."""
        process_dict_updates(self._rows, batch_update, self._new_row)

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """Leave each of our rows only the token that was sampled for it.

        A row for which no token can be chosen keeps its logits: the engine checks what comes back.
        """
        groups: dict[tuple[int, ...], list[int]] = {}
        for index, entry in self._rows.items():
            groups.setdefault(entry.banned, []).append(index)
        for banned, indices in groups.items():
            rows = [self._rows[index].catch_up() for index in indices]
            outcomes = self._sampler(banned, logits.shape[1]).sample(logits[indices], rows)
            chosen = [
                (index, outcome.token_id)
                for index, outcome in zip(indices, outcomes, strict=True)
                if outcome.ok
            ]
            if chosen:
                places, tokens = (
                    torch.tensor(c, device=logits.device) for c in zip(*chosen, strict=True)
                )
                logits[places] = -torch.inf
                logits[places, tokens] = 0.0
        return logits

    def _sampler(self, banned: tuple[int, ...], vocab_size: int) -> Sampler:
        # Logprobs come from vLLM, so this sampler is never asked for a token's bytes.
        if banned not in self._samplers:
            self._samplers[banned] = Sampler(
                vocab_size, banned_ids=banned, token_bytes=lambda token_id: b""
            )
        return self._samplers[banned]

    def _new_row(
        self, params: SamplingParams, prompt_ids: list[int] | None, output_ids: list[int]
    ) -> _Row | None:
        packed = (params.extra_args or {}).get(KEY)
        if packed is None:
            return None
        facts = msgspec.msgpack.decode(packed, type=RowFacts)
        constraint = None
        if facts.params.constraint is not None:
            if self._constraints is None:
                self._constraints = ConstraintFactory(
                    AutoTokenizer.from_pretrained(
                        self._config.tokenizer,
                        revision=self._config.tokenizer_revision,
                        trust_remote_code=self._config.trust_remote_code,
                    )
                )
            ends = {*facts.eos_ids, *facts.params.stop_token_ids}
            constraint = self._constraints.build(facts.params.constraint, ends)
        row = SamplerRow(
            facts.params,
            facts.prompt_ids,
            eos_ids=frozenset(facts.eos_ids),
            prior_ids=facts.prior_ids,
            constraint=constraint,
        )
        # After a preemption the list already contains earlier tokens; `catch_up` takes them.
        return _Row(facts, row, output_ids)
