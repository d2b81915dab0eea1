"""Structured output: which tokens a grammar allows next, through llguidance (extra `structured`).

One `ConstraintFactory` per tokenizer, one `ConstraintState` per answer; `mask_logits_` takes all
constrained rows of a batch at once.

Kept here: the end of the answer is allowed exactly where the grammar accepts, so a constrained
answer can always end; a bad schema, expression or grammar is its request's own failure, never the
engine's. llguidance is imported only when a constraint is built. Building takes from milliseconds
to a second: it must never happen in the step loop.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from broker.protocol.errors import ErrorCode, RequestError
from broker.protocol.messages import Constraint

if TYPE_CHECKING:
    from llguidance import LLExecutor, LLMatcher, LLTokenizer

__all__ = ["ConstraintFactory", "ConstraintState", "mask_logits_"]

_WORD_BITS = 32

#: Blanks in a row that JSON may hold: enough for deep indentation. Without a bound, a model that
#: has lost its way goes on with blanks until max_tokens.
_JSON_BLANKS = r"[\x20\x0A\x0D\x09]{1,64}"

#: The library's own words, where they are long.
_MAX_MESSAGE = 500


class ConstraintState:
    """Where one answer stands in its grammar."""

    def __init__(
        self, matcher: LLMatcher, end_ids: frozenset[int], vocabulary: _Vocabulary
    ) -> None:
        self._matcher = matcher
        self._end_ids = end_ids
        self._words = vocabulary.words
        #: Masks of the ids that end the answer, and of all but those and the library's own.
        self._ends = _mask_of(end_ids, vocabulary.words)
        self._others = ~_mask_of(end_ids | vocabulary.end_ids, vocabulary.words)
        self._ended = False

    @property
    def finished(self) -> bool:
        """Nothing may follow but the end of the answer."""
        return self._ended or (self._matcher.is_stopped() and not self._matcher.is_error())

    @property
    def accepting(self) -> bool:
        """The answer is complete as it stands: it may end."""
        return self._ended or bool(self._matcher.is_accepting())

    def accept(self, token_id: int) -> None:
        """Take the next token of the answer.

        Raises RequestError(ENGINE_ERROR) if the grammar forbids it: it was not sampled with the
        mask.
        """
        if not self._take(token_id):
            raise RequestError(
                ErrorCode.ENGINE_ERROR,
                f"token {token_id} does not fit the constraint: {self._refusal(token_id)}",
            )

    def replay(self, token_ids: Iterable[int]) -> None:
        """Take the tokens of an interrupted answer.

        Raises RequestError(INVALID_REQUEST) if they do not fit.
        """
        for offset, token_id in enumerate(token_ids):
            if not self._take(token_id):
                raise RequestError(
                    ErrorCode.INVALID_REQUEST,
                    f"the answer cannot be resumed: its token {token_id} at offset {offset} does "
                    f"not fit the constraint: {self._refusal(token_id)}",
                )

    def allows(self, token_ids: Sequence[int]) -> bool:
        """The tokens fit one after the other from here on. Changes nothing."""
        ids = list(token_ids)
        return int(self._matcher.validate_tokens(ids)) == len(ids) and not self._end_ids & set(ids)

    def mask_logits_(self, logits: torch.Tensor) -> None:
        """Set what the grammar forbids to -inf in one row of logits [V], in place.

        Raises RequestError(ENGINE_ERROR) if the grammar cannot go on.
        """
        for error in mask_logits_(logits[None], [0], [self]).values():
            raise error

    def _take(self, token_id: int) -> bool:
        if token_id in self._end_ids:
            self._ended = self.accepting
            return self._ended
        return not self._ended and bool(self._matcher.consume_token(token_id))

    def _refusal(self, token_id: int) -> str:
        """Why the token was not taken."""
        if token_id in self._end_ids:
            return "the answer is not complete and cannot end"
        return self._error() or "the answer had ended"

    def _error(self) -> str:
        """The library's words, less the mark that says that it could say more."""
        error = str(self._matcher.get_error()).replace("<non-verbose/>", "").strip()
        return error[:_MAX_MESSAGE]

    def _failure(self) -> RequestError:
        cause = self._error()
        if cause.startswith("NoExtension"):
            cause = "no token of this model can come next in it"
        return RequestError(ErrorCode.ENGINE_ERROR, f"the constraint cannot be kept: {cause}")


def mask_logits_(
    logits: torch.Tensor, rows: Sequence[int], states: Sequence[ConstraintState]
) -> dict[int, RequestError]:
    """Set what the grammars forbid to -inf in the given rows of logits [B, V], in place.

    `rows` ascend and `states` are parallel to them, all of one factory. Returns the rows whose
    grammar cannot go on, each with its error; their logits mean nothing.
    """
    words = states[0]._words
    masks = torch.zeros(len(states), words, dtype=torch.int32)
    going_on = [
        (state._matcher, n)
        for n, state in enumerate(states)
        if not (state._ended or state._matcher.is_stopped())
    ]
    if len(going_on) == 1:
        matcher, n = going_on[0]
        matcher.unsafe_compute_mask_ptr(masks[n].data_ptr(), words * 4)
    elif going_on:
        _executor().unsafe_compute_mask_ptr(going_on, masks.data_ptr(), words * 4, len(states))
    failed: dict[int, RequestError] = {}
    for row, mask, state in zip(rows, masks, states, strict=True):
        mask &= state._others
        if state.accepting:
            mask |= state._ends
        elif state._matcher.is_error():
            failed[row] = state._failure()
    vocab_size = logits.shape[1]
    forbidden = _unpacked(~masks, logits.device)[:, :vocab_size]
    if (beyond := vocab_size - forbidden.shape[1]) > 0:  # padding of the model's output
        forbidden = torch.nn.functional.pad(forbidden, (0, beyond), value=True)
    if len(rows) == len(logits):
        logits.masked_fill_(forbidden, -torch.inf)
    else:
        index = torch.tensor(list(rows), device=logits.device)
        logits[index] = logits[index].masked_fill_(forbidden, -torch.inf)
    return failed


#: The bits of a word of a mask; the last one is the sign.
_BITS = torch.tensor([1 << n for n in range(31)] + [-(1 << 31)], dtype=torch.int32)


def _mask_of(token_ids: Iterable[int], words: int) -> torch.Tensor:
    """A mask [words] of these tokens; those beyond it have no place in an answer."""
    mask = torch.zeros(words, dtype=torch.int32)
    for token_id in token_ids:
        if token_id < words * _WORD_BITS:
            mask[token_id // _WORD_BITS] |= _BITS[token_id % _WORD_BITS]
    return mask


def _unpacked(masks: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Masks [R, words] on the CPU as bool [R, 32 * words] on the device."""
    if device.type == "cpu":  # NumPy does it in a tenth of the time
        octets = masks.numpy().view(np.uint8)
        return torch.from_numpy(np.unpackbits(octets, axis=1, bitorder="little").view(np.bool_))
    return _spread(masks.to(device, non_blocking=True))


def _spread(masks: torch.Tensor) -> torch.Tensor:
    """Masks as bool, where they are."""
    return (masks[:, :, None] & _BITS.to(masks.device) != 0).flatten(1)


@cache
def _executor() -> LLExecutor:
    """Threads of the library that fill the masks of several rows at once."""
    from llguidance import LLExecutor

    return LLExecutor()


@dataclass(frozen=True, slots=True)
class _Vocabulary:
    """A tokenizer as the library knows it."""

    tokens: LLTokenizer
    words: int
    #: The ids with which the library itself would end an answer.
    end_ids: frozenset[int]


class ConstraintFactory:
    """Builds the constraints of answers of one (fast) tokenizer. May be called by any thread."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._known: _Vocabulary | None = None
        self._lock = Lock()

    def build(self, constraint: Constraint, eos_ids: Iterable[int]) -> ConstraintState:
        """The constraint of an answer that begins now and ends with one of `eos_ids`, which may
        differ from answer to answer. They are never content.

        Raises RequestError(INVALID_REQUEST): the value is no valid schema, expression or grammar
        (with the library's own words), the extra is missing, or the tokenizer is not one of those
        that llguidance reads.
        """
        try:
            import llguidance
        except ImportError as error:
            raise RequestError(
                ErrorCode.INVALID_REQUEST,
                "this worker cannot constrain answers: llguidance is not installed there; install "
                "tokenbus[structured] on the worker",
            ) from error
        ends = frozenset(eos_ids)
        if not ends:
            raise RequestError(
                ErrorCode.INVALID_REQUEST,
                "this model has no end token, so a constrained answer could never end",
            )
        grammar = _grammar(constraint)
        with self._lock:
            vocabulary = self._known = self._known or self._vocabulary(min(ends))
        limits = llguidance.LLParserLimits(verbose_errors=False)
        matcher = llguidance.LLMatcher(vocabulary.tokens, grammar, log_level=0, limits=limits)
        if matcher.is_error():
            raise _invalid(constraint, matcher.get_error())
        return ConstraintState(matcher, ends, vocabulary)

    def _vocabulary(self, end_id: int) -> _Vocabulary:
        from llguidance.hf import from_tokenizer

        try:
            tokens = from_tokenizer(self._tokenizer, eos_token=end_id)
        except ValueError as error:
            raise RequestError(
                ErrorCode.INVALID_REQUEST,
                "this model's answers cannot be constrained: llguidance does not read its "
                f"tokenizer ({str(error)[:_MAX_MESSAGE]})",
            ) from error
        return _Vocabulary(tokens, -(-tokens.vocab_size // _WORD_BITS), frozenset({end_id}))


def _invalid(constraint: Constraint, message: str) -> RequestError:
    return RequestError(
        ErrorCode.INVALID_REQUEST,
        f"constraint of type {constraint.type}: {message.strip()[:_MAX_MESSAGE]}",
    )


def _grammar(constraint: Constraint) -> str:
    """The constraint in llguidance's own form. Raises RequestError if the value is of a wrong
    type; whether it makes sense is for the library to say."""
    match constraint.type, constraint.value:
        case "json_object", _:
            return _json_grammar({"type": "object"})
        case "json_schema", dict() | bool() as schema:
            try:
                return _json_grammar(schema)
            except (TypeError, ValueError) as error:  # octets, say, which msgpack has
                raise _invalid(constraint, str(error)) from error
        case "regex", str(expression):
            return _matcher().grammar_from_regex(expression)
        case "grammar", str(lark):
            return _matcher().grammar_from_lark(lark)
        case "choice", [str(), *_] as choices if all(isinstance(c, str) and c for c in choices):
            # Strings of a Lark grammar are written as in JSON.
            quoted = (json.dumps(choice, ensure_ascii=False) for choice in choices)
            return _matcher().grammar_from_lark(f"start: {' | '.join(quoted)}")
    expected = {
        "json_schema": "a schema (a map)",
        "regex": "a regular expression (a string)",
        "grammar": "a Lark grammar (a string)",
        "choice": "a list of strings, none of them empty",
    }[constraint.type]
    raise _invalid(constraint, f"the value must be {expected}")


def _json_grammar(schema: dict[str, Any] | bool) -> str:
    return _matcher().grammar_from_json_schema(
        json.dumps(schema), defaults={"whitespace_pattern": _JSON_BLANKS}
    )


def _matcher() -> type[LLMatcher]:
    from llguidance import LLMatcher

    return LLMatcher
