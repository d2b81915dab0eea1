"""Structured output: which tokens a grammar allows next, through llguidance (extra `structured`).

One `ConstraintFactory` per tokenizer, one `ConstraintState` per request. The sampler asks for the
masks of all constrained rows of a batch at once (`mask_logits_`).

Duties kept here: EOS is allowed exactly where the grammar accepts, so a constrained answer can
always end; a bad schema, expression or grammar is the request's own failure and never the
engine's. llguidance is imported only when a constraint is built.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from broker.protocol.errors import ErrorCode, RequestError
from broker.protocol.messages import Constraint

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

__all__ = ["ConstraintFactory", "ConstraintState", "mask_logits_"]

_WORD_BITS = 32


class ConstraintState:
    """Where one answer stands in its grammar."""

    def __init__(self, matcher: LLMatcher, eos_ids: frozenset[int], words: int) -> None:
        self._matcher = matcher
        self._eos_ids = eos_ids
        #: 32-bit words of a mask: the tokenizer's vocabulary.
        self.words = words
        self._ended = False

    @property
    def finished(self) -> bool:
        """Nothing may follow but EOS (or EOS was taken)."""
        return self._ended or bool(self._matcher.is_stopped())

    @property
    def accepting(self) -> bool:
        """The answer is complete as it stands: EOS is allowed."""
        return self._ended or bool(self._matcher.is_accepting())

    def accept(self, token_id: int) -> None:
        """Take the next token of the answer.

        Raises RequestError(ENGINE_ERROR) if the grammar forbids it.
        """
        if self._ended:
            return
        if token_id in self._eos_ids and self.accepting:
            self._ended = True
            return
        if not self._matcher.consume_token(token_id):
            raise RequestError(
                ErrorCode.ENGINE_ERROR,
                f"token {token_id} does not fit the constraint: {self._matcher.get_error()}",
            )

    def replay(self, token_ids: Iterable[int]) -> None:
        """Take the tokens of an interrupted answer."""
        for token_id in token_ids:
            self.accept(token_id)

    def allows(self, token_ids: Sequence[int]) -> bool:
        """The tokens, one after the other, fit the grammar from here on. Changes nothing."""
        plain = [i for i in token_ids if i not in self._eos_ids]
        return len(plain) == len(token_ids) and self._matcher.validate_tokens(plain) == len(plain)

    def fill_mask(self, mask: torch.Tensor) -> None:
        """Write the allowed tokens into int32 words [>= words] on the CPU, a bit each.

        Raises RequestError(ENGINE_ERROR) when the grammar ran into a limit of the library.
        """
        if not self.finished:
            self._matcher.unsafe_compute_mask_ptr(mask.data_ptr(), self.words * 4)
            if self._matcher.is_error():
                raise RequestError(
                    ErrorCode.ENGINE_ERROR, f"the constraint failed: {self._matcher.get_error()}"
                )
            return
        mask.zero_()
        for token_id in self._eos_ids:
            bit = 1 << (token_id % _WORD_BITS)
            mask[token_id // _WORD_BITS] |= bit - (1 << _WORD_BITS) if bit >> 31 else bit

    def mask_logits_(self, logits: torch.Tensor) -> None:
        """Set what the grammar forbids to -inf in one row of logits [V], in place."""
        mask_logits_(logits[None], [0], [self])


def mask_logits_(
    logits: torch.Tensor, rows: Sequence[int], states: Sequence[ConstraintState]
) -> dict[int, RequestError]:
    """Set what the grammars forbid to -inf in the given rows of logits [B, V], in place.

    Returns the rows whose grammar failed, each with its error; their logits mean nothing.
    """
    vocab_size = logits.shape[1]
    words = max(-(-vocab_size // _WORD_BITS), *(state.words for state in states))
    masks = torch.zeros(len(states), words, dtype=torch.int32)
    failed: dict[int, RequestError] = {}
    for row, mask, state in zip(rows, masks, states, strict=True):
        try:
            state.fill_mask(mask)
        except RequestError as error:
            failed[row] = error
    on_device = masks.to(logits.device, non_blocking=True)
    shifts = torch.arange(_WORD_BITS, dtype=torch.int32, device=logits.device)
    allowed = ((on_device[:, :, None] >> shifts) & 1).view(len(states), -1)[:, :vocab_size].bool()
    index = torch.tensor(list(rows), device=logits.device)
    logits[index] = logits[index].masked_fill(~allowed, -torch.inf)
    return failed


class ConstraintFactory:
    """Builds constraint states for the answers of one tokenizer (a fast tokenizer)."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        #: By the ids that end an answer. Building one takes up to a second.
        self._vocabularies: dict[frozenset[int], LLTokenizer] = {}

    def build(self, constraint: Constraint, eos_ids: Iterable[int]) -> ConstraintState:
        """The state of an answer that begins now.

        `eos_ids` are the tokens with which it may end. Raises RequestError(INVALID_REQUEST) when
        the constraint is no valid schema, expression or grammar, with the library's own words;
        when the extra is missing, and when the tokenizer cannot be used.
        """
        try:
            import llguidance
        except ImportError as error:
            raise RequestError(
                ErrorCode.INVALID_REQUEST,
                "this worker cannot constrain answers: llguidance is not installed there; "
                "install tokenbus[structured] on the worker",
            ) from error
        ends = frozenset(eos_ids)
        if not ends:
            raise RequestError(
                ErrorCode.INVALID_REQUEST,
                "this model has no end token, so that a constrained answer could not end",
            )
        grammar = _grammar(constraint)
        if ends not in self._vocabularies:
            self._vocabularies[ends] = self._vocabulary(ends)
        vocabulary = self._vocabularies[ends]
        try:
            matcher = llguidance.LLMatcher(vocabulary, grammar, log_level=0)
        except ValueError as error:
            raise _invalid(constraint, str(error)) from error
        if matcher.is_error():
            raise _invalid(constraint, matcher.get_error())
        return ConstraintState(matcher, ends, -(-vocabulary.vocab_size // _WORD_BITS))

    def _vocabulary(self, eos_ids: frozenset[int]) -> LLTokenizer:
        from llguidance.hf import from_tokenizer

        try:
            return from_tokenizer(self._tokenizer, eos_token=sorted(eos_ids))
        except ValueError as error:
            raise RequestError(
                ErrorCode.INVALID_REQUEST,
                f"answers of this model cannot be constrained: its tokenizer is of a kind that "
                f"llguidance does not read ({error})",
            ) from error


def _invalid(constraint: Constraint, message: str) -> RequestError:
    return RequestError(
        ErrorCode.INVALID_REQUEST, f"constraint of type {constraint.type}: {message}"
    )


def _grammar(constraint: Constraint) -> str:
    """The constraint in llguidance's own form."""
    from llguidance import LLMatcher

    value = constraint.value
    match constraint.type:
        case "json_object":
            return LLMatcher.grammar_from_json_schema({"type": "object"})
        case "json_schema":
            if not isinstance(value, dict | bool | str):
                raise _invalid(constraint, "the value must be a schema (a map)")
            return LLMatcher.grammar_from_json_schema(
                value if isinstance(value, str) else json.dumps(value)
            )
        case "regex":
            if not isinstance(value, str):
                raise _invalid(constraint, "the value must be a regular expression (a string)")
            return LLMatcher.grammar_from_regex(value)
        case "grammar":
            if not isinstance(value, str):
                raise _invalid(constraint, "the value must be a Lark grammar (a string)")
            return LLMatcher.grammar_from_lark(value)
        case "choice":
            if (
                not isinstance(value, list | tuple)
                or not value
                or not all(isinstance(choice, str) and choice for choice in value)
            ):
                raise _invalid(constraint, "the value must be a list of non-empty strings")
            return LLMatcher.grammar_from_regex("|".join(re.escape(choice) for choice in value))
