"""The sampler's state for one request: its parameters, the tokens so far, and their penalties.

Constant work per token. The state depends on the request's parameters and tokens alone. Must never
import torch.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from broker.protocol.errors import ErrorCode, RequestError
from broker.protocol.messages import Params

if TYPE_CHECKING:
    from worker.engines.common.constrain import ConstraintState
    from worker.engines.common.thinking import ThoughtGate

__all__ = ["Floats", "Ids", "SamplerRow", "check_params", "uniform"]

Ids: TypeAlias = np.ndarray[Any, np.dtype[np.int64]]
Floats: TypeAlias = np.ndarray[Any, np.dtype[np.float32]]

#: A temperature below this is as good as zero, and is zero in float32.
_GREEDY_TEMPERATURE = 1e-37

#: Below it a score in float32 becomes infinite, as if the model were broken. A bias cannot make it
#: so: `Finite` bounds it.
_LOWEST_REPETITION_PENALTY = 1e-30


def uniform(seed: int, position: int) -> float:
    """The random number for a token: in (0, 1), 53 bits, determined by seed and position alone."""
    digest = hashlib.blake2b(struct.pack("<QQ", seed, position), digest_size=8).digest()
    return ((int.from_bytes(digest, "little") >> 11) or 0.5) * 2.0**-53


def check_params(params: Params, vocab_size: int) -> None:
    """Raises RequestError(INVALID_REQUEST) for the id of a token that the model does not have, and
    for a penalty that no score can bear."""
    named: dict[str, Iterable[int]] = {
        "logit_bias": (token_id for token_id, _ in params.logit_bias),
        "banned_token_ids": params.banned_token_ids,
        "forced_token_ids": params.forced_token_ids,
        "stop_token_ids": params.stop_token_ids,
    }
    for name, token_ids in named.items():
        highest = max(token_ids, default=0)
        if highest >= vocab_size:
            raise RequestError(
                ErrorCode.INVALID_REQUEST,
                f"{name} contains token {highest}, but this model's last token is {vocab_size - 1}",
            )
    if params.repetition_penalty < _LOWEST_REPETITION_PENALTY:
        raise RequestError(
            ErrorCode.INVALID_REQUEST,
            f"repetition_penalty is {params.repetition_penalty:g}, but no score can be divided by "
            f"less than {_LOWEST_REPETITION_PENALTY:g}",
        )


class SamplerRow:
    """The sampler's state for one request; constant work per token.

    `prompt_ids` and `prior_ids` (tokens of an interrupted answer) are its past: the prompt counts
    for the repetition penalty, the prior tokens like any tokens of the answer. `constraint` must be
    at the beginning of the answer; the prior tokens are replayed here.

    Raises RequestError if prior or forced tokens violate the constraint.
    """

    def __init__(
        self,
        params: Params,
        prompt_ids: Sequence[int],
        *,
        eos_ids: frozenset[int],
        prior_ids: Sequence[int] = (),
        constraint: ConstraintState | None = None,
        gate: ThoughtGate | None = None,
    ) -> None:
        self.params = params
        self._constraint = constraint
        #: Set if reasoning is separate, so that the constraint does not apply to it.
        self.gate = gate
        self._position = 0
        self._penalised = (
            params.repetition_penalty != 1.0
            or params.presence_penalty != 0.0
            or params.frequency_penalty != 0.0
        )
        #: Penalised tokens: the index of each in the two arrays, and its count in the answer.
        self._places: dict[int, int] = {}
        self._counts: dict[int, int] = {}
        self._past_ids: Ids = np.empty(64, np.int64)
        self._past_minus: Floats = np.empty(64, np.float32)
        if params.repetition_penalty != 1.0:
            for token_id in dict.fromkeys(prompt_ids):
                self._place(token_id)
        bias = dict(params.logit_bias)
        #: Tokens of `logit_bias` and the values added to their logits.
        self.bias_ids: Ids = np.fromiter(bias.keys(), np.int64, len(bias))
        self.bias: Floats = np.fromiter(bias.values(), np.float32, len(bias))
        banned = set(params.banned_token_ids)
        self._banned: Ids = np.array(sorted(banned), np.int64)
        ending = eos_ids.union(params.stop_token_ids)
        self._banned_and_ending: Ids = np.array(sorted(banned | ending), np.int64)
        said = self._without_thought(prior_ids)
        if constraint is not None:
            constraint.replay(said)
        for token_id in prior_ids:
            self._count(token_id)
        forced = params.forced_token_ids[self._position :]
        if forced and gate is not None and gate.takes(forced[0]):
            forced = []  # they belong to the reasoning
        if constraint is not None and forced and not constraint.allows(forced):
            raise RequestError(
                ErrorCode.INVALID_REQUEST, "forced_token_ids do not fit the constraint"
            )

    def _without_thought(self, prior_ids: Sequence[int]) -> Sequence[int]:
        """The part of an interrupted answer to which the constraint applies: what follows the
        reasoning."""
        if self.gate is None:
            return prior_ids
        begins = 0
        for place, token_id in enumerate(prior_ids, 1):
            if self.gate.takes(token_id):
                begins = place
            self._begin(self.gate.append(token_id))
        return prior_ids[begins:]

    def _begin(self, text: str) -> None:
        """Begin the answer with the text that a token has after the mark that ends reasoning."""
        if text and self._constraint is not None:
            self._constraint.accept_text(text)

    @property
    def constraint(self) -> ConstraintState | None:
        """The constraint on the next token; None during reasoning."""
        return None if self.gate is not None and self.gate.suspends else self._constraint

    @property
    def opening_ids(self) -> frozenset[int]:
        """Tokens that may come next although the constraint does not allow them."""
        return frozenset() if self.gate is None else self.gate.opening_ids

    @property
    def position(self) -> int:
        """Number of tokens of the answer so far, including prior tokens."""
        return self._position

    @property
    def greedy(self) -> bool:
        return self.params.temperature < _GREEDY_TEMPERATURE or self.params.top_k == 1

    @property
    def forced(self) -> int | None:
        """The token that must come next, whatever the logits say."""
        forced = self.params.forced_token_ids
        if self._position < len(forced):
            return forced[self._position]
        due = None if self.gate is None else self.gate.forced
        # A grammar that includes thoughts consists of whole characters, so the mark cannot come
        # within one.
        if due is not None and self.constraint is not None and not self.constraint.allows([due]):
            return None
        return due

    @property
    def finished(self) -> bool:
        """Whether the constraint allows nothing to follow: the answer is over, with or without
        an end token."""
        return self.constraint is not None and self.constraint.finished

    @property
    def restricted(self) -> bool:
        """Whether the request itself restricts which tokens may come next."""
        return bool(self._constraint is not None or len(self.bias_ids) or len(self.forbidden))

    @property
    def past(self) -> tuple[Ids, Floats]:
        """Penalised tokens, int64 [N], each once, and what presence and frequency penalty subtract
        from each one's logit, float32 [N]."""
        count = len(self._places)
        return self._past_ids[:count], self._past_minus[:count]

    @property
    def forbidden(self) -> Ids:
        """Tokens that must not come next. Before `min_tokens` nothing may end the answer, unless
        its grammar allows nothing else."""
        if self._constraint is not None and self.constraint is None:
            return self._banned_and_ending  # the answer must not end with its reasoning
        if self._position >= self.params.min_tokens or self.finished:
            return self._banned
        return self._banned_and_ending

    @property
    def plain(self) -> bool:
        """Whether later tokens depend on the number of earlier ones of the answer only."""
        return not self._penalised and self._constraint is None and self.gate is None

    def ahead(self, tokens: int) -> SamplerRow:
        """This row `tokens` tokens later, only to draw from. The row must be plain."""
        if not tokens:
            return self
        later = SamplerRow.__new__(SamplerRow)
        later.__dict__.update(self.__dict__)
        later._position += tokens
        return later

    def unbound(self, tokens: int) -> SamplerRow:
        """This row `tokens` tokens later, without what depends on those tokens (penalties,
        constraint, thought): to guess what will be drawn."""
        later = SamplerRow.__new__(SamplerRow)
        later.__dict__.update(self.__dict__)
        later._position += tokens
        later._constraint, later.gate, later._places = None, None, {}
        return later

    def append(self, token_id: int) -> None:
        """Take the next token of the answer. Raises RequestError if the constraint forbids it."""
        if self.gate is None:
            if self._constraint is not None:
                self._constraint.accept(token_id)
        else:
            constrained = not self.gate.takes(token_id)
            self._begin(self.gate.append(token_id))
            if constrained and self._constraint is not None:
                self._constraint.accept(token_id)
        self._count(token_id)

    def _count(self, token_id: int) -> None:
        self._position += 1
        if self._penalised:
            count = self._counts[token_id] = self._counts.get(token_id, 0) + 1
            place = self._place(token_id)
            self._past_minus[place] = (
                self.params.presence_penalty + self.params.frequency_penalty * count
            )

    def _place(self, token_id: int) -> int:
        place = self._places.get(token_id)
        if place is None:
            place = self._places[token_id] = len(self._places)
            if place == len(self._past_ids):
                self._past_ids = np.resize(self._past_ids, 2 * place)
                self._past_minus = np.resize(self._past_minus, 2 * place)
            self._past_ids[place] = token_id
            self._past_minus[place] = 0.0
        return place
