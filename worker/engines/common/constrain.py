"""Structured output: which tokens a grammar allows next, through llguidance (extra `structured`).

One `ConstraintFactory` per tokenizer, one `ConstraintState` per answer; `mask_logits_` takes all
constrained rows of a batch at once.

Guarantees: the end of the answer is allowed exactly where the grammar accepts, so a constrained
answer can always end; a bad schema, expression or grammar fails its own request, never the engine.
llguidance is imported only when a constraint is built. Building takes from milliseconds to a
second: it must never happen in the step loop.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from threading import Lock
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch

from broker.protocol.errors import ErrorCode, RequestError
from broker.protocol.messages import Constraint
from worker.engines.common.schemas import for_llguidance

if TYPE_CHECKING:
    from llguidance import LLExecutor, LLMatcher, LLTokenizer

__all__ = ["ConstraintFactory", "ConstraintState", "mask_logits_"]

_WORD_BITS = 32

#: The library's errors for a grammar that no token fits or that exceeds its limits.
_TOO_MUCH = ("NoExtension", "ParserTooComplex", "LexerTooComplex")

#: White space allowed at each gap in JSON, once. A confused model writes only white space wherever
#: it may: with 64 characters allowed, four fifths of an answer were blanks.
_JSON_BLANK = r"[\x20\x0A]"

#: Maximum length of the library's own messages.
_MAX_MESSAGE = 500


class ConstraintState:
    """The state of one answer in its grammar."""

    def __init__(
        self, matcher: LLMatcher, end_ids: frozenset[int], vocabulary: _Vocabulary
    ) -> None:
        self._matcher = matcher
        self._end_ids = end_ids
        self._words = vocabulary.words
        self._tokens = vocabulary.tokens
        #: Masks of the ids that end the answer, and of all others except the library's own end.
        self._ends = _mask_of(end_ids, vocabulary.words)
        self._others = ~_mask_of(end_ids | vocabulary.end_ids, vocabulary.words)
        self._ended = False

    @property
    def finished(self) -> bool:
        """Whether only the end of the answer may follow."""
        return self._ended or (self._matcher.is_stopped() and not self._matcher.is_error())

    @property
    def accepting(self) -> bool:
        """Whether the answer is complete and may end here."""
        return self._ended or bool(self._matcher.is_accepting())

    def accept(self, token_id: int) -> None:
        """Take the next token of the answer.

        Raises RequestError(ENGINE_ERROR) if the grammar forbids it, which means that it was not
        sampled with the mask.
        """
        if not self._take(token_id):
            raise RequestError(
                ErrorCode.ENGINE_ERROR,
                f"token {token_id} does not fit the constraint: {self._refusal(token_id)}",
            )

    def accept_text(self, text: str) -> None:
        """Take a text that the answer begins with. Raises RequestError(ENGINE_ERROR) if the grammar
        forbids it."""
        for token_id in self._tokens.tokenize_str(text):
            if not self._take(token_id):
                raise RequestError(
                    ErrorCode.ENGINE_ERROR,
                    f"the token that ends the thought also begins the answer with {text!r}, which "
                    f"does not fit the constraint: {self._refusal(token_id)}",
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
        """Whether these tokens are allowed next, in this order. Changes nothing."""
        ids = list(token_ids)
        return int(self._matcher.validate_tokens(ids)) == len(ids) and not self._end_ids & set(ids)

    def mask_logits_(self, logits: torch.Tensor) -> None:
        """Set forbidden tokens to -inf in one row of logits [V], in place.

        Raises RequestError if the grammar cannot continue.
        """
        for error in mask_logits_(logits[None], [0], [self]).values():
            raise error

    def _take(self, token_id: int) -> bool:
        if token_id in self._end_ids:
            self._ended = self.accepting
            return self._ended
        return not self._ended and bool(self._matcher.consume_token(token_id))

    def _refusal(self, token_id: int) -> str:
        """Why the token was refused."""
        if token_id in self._end_ids:
            return "the answer is not complete and cannot end"
        return self._error() or "the answer had ended"

    def _error(self) -> str:
        """The library's message, without its hint that more details are available."""
        error = str(self._matcher.get_error()).replace("<non-verbose/>", "").strip()
        return error[:_MAX_MESSAGE]

    def _failure(self) -> RequestError:
        """Why the grammar cannot continue. If it exceeds the limits, the request is to blame."""
        cause, code = self._error(), ErrorCode.ENGINE_ERROR
        if cause.startswith(_TOO_MUCH):
            code = ErrorCode.INVALID_REQUEST
        if cause.startswith("NoExtension"):
            cause = "no token of this model can come next"
        return RequestError(code, f"the constraint cannot be satisfied: {cause}")

    def _dead_end(self) -> RequestError:
        """The error if the answer is incomplete and only tokens that end it can come next."""
        return RequestError(
            ErrorCode.INVALID_REQUEST,
            "the constraint cannot be satisfied: only tokens that end the answer can come next "
            f"({', '.join(map(str, sorted(self._end_ids)[:8]))}): take them out of "
            "stop_token_ids, or out of the constraint",
        )


def mask_logits_(
    logits: torch.Tensor, rows: Sequence[int], states: Sequence[ConstraintState]
) -> dict[int, RequestError]:
    """Set forbidden tokens to -inf in the given rows of logits [B, V], in place.

    `rows` are ascending and `states` parallel to them, all from one factory. Returns the rows whose
    grammar cannot continue, each with its error; their logits are meaningless.
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
        elif not mask.any():
            failed[row] = state._dead_end()
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
    """A mask [words] of these tokens; ids beyond its end cannot occur in an answer."""
    mask = torch.zeros(words, dtype=torch.int32)
    for token_id in token_ids:
        if token_id < words * _WORD_BITS:
            mask[token_id // _WORD_BITS] |= _BITS[token_id % _WORD_BITS]
    return mask


def _unpacked(masks: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Masks [R, words] on the CPU as bool [R, 32 * words] on the device."""
    if device.type == "cpu":  # NumPy takes a tenth of the time
        data = masks.numpy().view(np.uint8)
        return torch.from_numpy(np.unpackbits(data, axis=1, bitorder="little").view(np.bool_))
    return _spread(masks.to(device, non_blocking=True))


def _spread(masks: torch.Tensor) -> torch.Tensor:
    """Masks as bool, on their device."""
    return (masks[:, :, None] & _BITS.to(masks.device) != 0).flatten(1)


@cache
def _executor() -> LLExecutor:
    """The library's threads, which fill the masks of several rows at once."""
    from llguidance import LLExecutor

    return LLExecutor()


@dataclass(frozen=True, slots=True)
class _Vocabulary:
    """A tokenizer in the library's form."""

    tokens: LLTokenizer
    words: int
    #: The ids that the library itself treats as the end of an answer.
    end_ids: frozenset[int]
    #: Ids of added tokens that are text, by their text: grammars may name them like special tokens.
    named: Mapping[str, int]


class ConstraintFactory:
    """Builds constraints for answers of one (fast) tokenizer. May be called from any thread."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._known: _Vocabulary | None = None
        self._lock = Lock()

    def build(self, constraint: Constraint, eos_ids: Iterable[int]) -> ConstraintState:
        """The constraint for an answer that begins now and ends with one of `eos_ids`, which may
        differ between answers and are never content.

        Raises RequestError(INVALID_REQUEST) if the value is not a valid schema, expression or
        grammar (with the library's own message), if the extra is missing, or if llguidance cannot
        read the tokenizer.
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
        with self._lock:
            vocabulary = self._known = self._known or self._vocabulary(min(ends))
        grammar = _grammar(constraint, vocabulary.named)
        limits = llguidance.LLParserLimits(verbose_errors=False)
        matcher = llguidance.LLMatcher(vocabulary.tokens, grammar, log_level=0, limits=limits)
        if matcher.is_error():
            raise _invalid(constraint, matcher.get_error())
        return ConstraintState(matcher, ends, vocabulary)

    def _vocabulary(self, end_id: int) -> _Vocabulary:
        from llguidance import LLTokenizer, TokenizerWrapper
        from llguidance.hf import from_tokenizer

        try:
            read = from_tokenizer(self._tokenizer, eos_token=end_id)
        except ValueError as error:
            raise RequestError(
                ErrorCode.INVALID_REQUEST,
                "this model's answers cannot be constrained: llguidance does not read its "
                f"tokenizer ({str(error)[:_MAX_MESSAGE]})",
            ) from error
        added = self._tokenizer.backend_tokenizer.get_added_tokens_decoder()
        special = {i for i, token in added.items() if token.special} | {end_id}
        named = {
            read.decode_bytes([i]).decode(): i
            for i in added
            if read.is_special_token(i) and i not in special
        }
        tokens = LLTokenizer(TokenizerWrapper(_TextTokenizer(read, end_id, special)))
        words = -(-tokens.vocab_size // _WORD_BITS)
        return _Vocabulary(tokens, words, frozenset({end_id}), named)


class _TextTokenizer:
    """A tokenizer for which nothing in a text is a control token, as llguidance requires.

    The library tokenises what a grammar forces. By itself it uses special tokens for that, and
    added tokens such as `<think>`, and then refuses them because it does not take them for text.
    Here an added token that is not special is text, and the text of a special token is spelled with
    other tokens.
    """

    bos_token_id = None

    def __init__(self, read: LLTokenizer, end_id: int, special: set[int]) -> None:
        self._read = read
        self.eos_token_id = end_id
        self.tokens = [read.decode_bytes([i]) for i in range(read.vocab_size)]
        self.special_token_ids = sorted(special)
        self._spelled = {i: read.greedy_tokenize(self.tokens[i].decode()) for i in special}

    def __call__(self, text: str) -> list[int]:
        if not isinstance(text, str):
            # The library tries bytes first, to see whether they are accepted.
            raise TypeError("only text is tokenised here")
        ids = self._read.tokenize_str(text)
        return [spelled for i in ids for spelled in self._spelled.get(i, (i,))]


_RULE: Final = re.compile(r"^\s*[\w-]+\s*::=", re.MULTILINE)
"""A rule in GBNF."""


def _invalid(constraint: Constraint, message: str) -> RequestError:
    return RequestError(
        ErrorCode.INVALID_REQUEST,
        f"constraint of type {constraint.type}: {message.strip()[:_MAX_MESSAGE]}",
    )


def _grammar(constraint: Constraint, named: Mapping[str, int]) -> str:
    """The constraint as a grammar of llguidance's. Raises RequestError if the value has the wrong
    type; the library checks everything else."""
    match constraint.type, constraint.value:
        case "json_object", _:
            return _json_grammar({"type": "object"}, compact=constraint.compact)
        case "json_schema", dict() | bool() as schema:
            try:
                return _json_grammar(for_llguidance(schema), compact=constraint.compact)
            except (TypeError, ValueError) as error:  # such as bytes, which msgpack allows
                raise _invalid(constraint, str(error)) from error
            except RecursionError:
                raise _invalid(
                    constraint, "it is nested too deeply, or its names are too long"
                ) from None
        case "regex", str(expression):
            return _matcher().grammar_from_regex(expression)
        case "grammar", str(lark):
            return _matcher().grammar_from_lark(_with_ids(_lark(constraint, lark), named))
        case "choice", [str(), *_] as choices if all(isinstance(c, str) and c for c in choices):
            # Strings of a Lark grammar are written as in JSON.
            quoted = (json.dumps(choice, ensure_ascii=False) for choice in choices)
            return _matcher().grammar_from_lark(f"start: {' | '.join(quoted)}")
    expected = {
        "json_schema": "a schema (a map)",
        "regex": "a regular expression (a string)",
        "grammar": "a grammar in Lark or GBNF (a string)",
        "choice": "a list of strings, none of them empty",
    }[constraint.type]
    raise _invalid(constraint, f"the value must be {expected}")


def _lark(constraint: Constraint, text: str) -> str:
    """The grammar in Lark; llama.cpp's GBNF and SGLang's EBNF are translated."""
    if not _RULE.search(text):
        return text
    from llguidance.gbnf_to_lark import gbnf_to_lark

    try:
        return str(gbnf_to_lark(text))
    except Exception as error:  # it raises nothing narrower
        raise _invalid(constraint, f"the grammar is neither Lark nor GBNF: {error}") from None


def _json_grammar(schema: dict[str, Any] | bool, *, compact: bool) -> str:
    return _matcher().grammar_from_json_schema(
        json.dumps(schema),
        overrides={"whitespace_flexible": False}
        if compact
        else {"whitespace_pattern": _JSON_BLANK},
    )


#: Strings, expressions and comments of a Lark grammar, which contain no names of tokens; or a name.
_LARK = re.compile(r'"(?:\\.|[^"\\])*"|//.*|/(?:\\.|[^/\\])+/|(?P<name><[^<>\s]+>)')


def _with_ids(lark: str, named: Mapping[str, int]) -> str:
    """The grammar with these tokens referred to by id, as the library expects."""

    def id_of(found: re.Match[str]) -> str:
        token_id = named.get(found["name"] or "")
        return found[0] if token_id is None else f"<[{token_id}]>"

    return _LARK.sub(id_of, lark)


def _matcher() -> type[LLMatcher]:
    from llguidance import LLMatcher

    return LLMatcher
