"""From token ids to the text of an answer: detokenization, stop strings, and both for one request.

The engine holds one `TextStream` per request; `Detokenizer` and `StopBuffer` are its parts. All
three depend on the token ids alone: replaying the same ids gives the same text, cut at the same
places. That is how another worker can continue a stream (`prior_ids`).

Work per token is constant, and text is never sent twice or taken back. This module must never
import torch, and never tokenize: it only turns ids into text.
"""

from __future__ import annotations

import codecs
import json
import random
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from broker.protocol.messages import Params

__all__ = [
    "Detokenizer",
    "StopBuffer",
    "TextStep",
    "TextStream",
    "TokenTable",
    "places",
    "text_length",
    "token_table",
]

REPLACEMENT = "\ufffd"

#: A character has at most four bytes, so at most four tokens.
_MAX_PENDING_TOKENS = 4

#: How many random id sequences to compare with `decode` when a table is built: a few milliseconds.
_PROBES = 64


def _one_per_byte(error: UnicodeError) -> tuple[str, int]:
    """U+FFFD for every byte that does not belong to a character, like byte-fallback decoders."""
    assert isinstance(error, UnicodeDecodeError)
    return REPLACEMENT * (error.end - error.start), error.end


codecs.register_error("tokenbus.one_per_byte", _one_per_byte)


def _byte_level_alphabet() -> dict[str, int]:
    """The printable characters that stand for bytes in byte-level BPE (GPT-2's table)."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(plain)]
    alphabet = {chr(byte): byte for byte in plain}
    alphabet.update({chr(256 + n): byte for n, byte in enumerate(others)})
    return alphabet


_BYTE_LEVEL = _byte_level_alphabet()


def _byte_level_bytes(token: str) -> bytes:
    try:
        return bytes([_BYTE_LEVEL[character] for character in token])
    except KeyError:  # an added token outside the alphabet stands for itself
        return token.encode()


class TokenTable:
    """The bytes of every token of one tokenizer, and whether joining them gives the same text as
    `decode`.

    `exact` is tested by comparison with `decode` when the table is built. If it is False
    (WordPiece, Metaspace, slow tokenizers, unknown decoders), the bytes are used only for display,
    and text comes from `decode`.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._bytes_of: dict[int, bytes] = {}
        #: Ids that `skip_special_tokens` skips.
        self.special_ids = _special_ids(tokenizer)
        self._rule = _byte_rule(tokenizer)
        self._special_by_text = {
            self.bytes_of(token_id).decode(errors="replace"): token_id
            for token_id in self.special_ids
        }
        #: How many spaces `decode` removes at the start of a text.
        self.leading_spaces = self._rule.leading_spaces
        #: U+FFFD replaces each stray byte (byte fallback), not each broken sequence.
        self.one_per_byte = self._rule.byte_fallback
        self.exact = self._rule.joins and self._agrees_with_decode()

    def special_texts(self, texts: Sequence[str]) -> list[str]:
        """The given texts that are special tokens."""
        return [text for text in texts if text in self._special_by_text]

    def special_ids_of(self, texts: Sequence[str]) -> frozenset[int]:
        """The ids of the special tokens with these texts."""
        known = self._special_by_text
        return frozenset(known[text] for text in texts if text in known)

    def bytes_of(self, token_id: int) -> bytes:
        """The token's bytes, which may be part of a character. Empty for an unknown id."""
        known = self._bytes_of.get(token_id)
        if known is None:
            known = self._bytes_of[token_id] = self._lookup(token_id)
        return known

    def _lookup(self, token_id: int) -> bytes:
        try:
            token = self._tokenizer.convert_ids_to_tokens(token_id)
        except (IndexError, KeyError, OverflowError, ValueError):
            return b""
        if isinstance(token, bytes):
            return token
        return self._rule.convert(token) if isinstance(token, str) else b""

    def _agrees_with_decode(self) -> bool:
        size = len(self._tokenizer)
        draw = random.Random(0)
        for _ in range(_PROBES):
            ids = [draw.randrange(size) for _ in range(draw.randint(2, 9))]
            data = [self.bytes_of(token_id) for token_id in ids]
            if self.one_per_byte and not all(map(_is_text, data)):
                continue  # `decode` replaces the whole run of a stray byte; a stream cannot
            text = b"".join(data).decode(errors="replace")
            for _ in range(self.leading_spaces):
                text = text.removeprefix(" ")
            if text != _decode(self._tokenizer, ids, skip_special_tokens=False):
                return False
        return True


class _ByteRule(NamedTuple):
    """How one kind of tokenizer turns tokens into bytes."""

    convert: Callable[[str], bytes]
    #: A text is its tokens' bytes joined, minus `leading_spaces` at the start.
    joins: bool = False
    leading_spaces: int = 0
    byte_fallback: bool = False


def _byte_rule(tokenizer: Any) -> _ByteRule:
    """Derive the rule from the decoder of a fast tokenizer."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or backend.decoder is None:
        return _ByteRule(str.encode)
    decoder = json.loads(backend.decoder.__getstate__())
    steps = decoder.get("decoders", [decoder])
    if [step["type"] for step in steps] == ["ByteLevel"]:
        return _ByteRule(_byte_level_bytes, joins=True)
    marks: list[tuple[str, str]] = []
    joins, byte_fallback, leading_spaces = True, False, 0
    for step in steps:
        match step:
            case {"type": "Replace", "pattern": {"String": str(old)}, "content": str(new)}:
                marks.append((old, new))
            case {"type": "Metaspace", "replacement": str(mark)}:
                marks.append((mark, " "))
                joins = False  # the first token is handled differently
            case {"type": "ByteFallback"}:
                byte_fallback = True
            case {"type": "Strip", "content": " ", "start": int(start), "stop": 0}:
                leading_spaces = start
            case {"type": "Fuse"}:
                pass
            case _:
                joins = False

    def convert(token: str) -> bytes:
        if byte_fallback and (byte := _FALLBACK_TOKEN.fullmatch(token)):
            return bytes.fromhex(byte[1])
        for old, new in marks:
            token = token.replace(old, new)
        return token.encode()

    return _ByteRule(convert, joins, leading_spaces, byte_fallback)


_FALLBACK_TOKEN = re.compile("<0x([0-9A-Fa-f]{2})>")


def _is_text(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def _decode(tokenizer: Any, ids: Sequence[int], *, skip_special_tokens: bool) -> str:
    text: str = tokenizer.decode(
        ids, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
    )
    return text


def _special_ids(tokenizer: Any) -> frozenset[int]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return frozenset(tokenizer.all_special_ids)
    added = backend.get_added_tokens_decoder()
    return frozenset(i for i, token in added.items() if token.special)


_TABLES: WeakKeyDictionary[Any, TokenTable] = WeakKeyDictionary()


def token_table(tokenizer: Any) -> TokenTable:
    """The table of a tokenizer, built on first use and kept for the tokenizer's lifetime."""
    table = _TABLES.get(tokenizer)
    if table is None:
        table = _TABLES[tokenizer] = TokenTable(tokenizer)
    return table


class _ByteDecoder:
    """Joins bytes and returns whole characters: exact, and takes a fraction of a microsecond."""

    def __init__(self, table: TokenTable) -> None:
        errors = "tokenbus.one_per_byte" if table.one_per_byte else "replace"
        self._bytes_of = table.bytes_of
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors)
        self._strip = table.leading_spaces

    def add(self, token_id: int) -> str:
        text = self._decoder.decode(self._bytes_of(token_id))
        return self._stripped(text) if self._strip and text else text

    def flush(self) -> str:
        return self._stripped(self._decoder.decode(b"", final=True))

    def _stripped(self, text: str) -> str:
        while self._strip and text:
            if text[0] != " ":
                self._strip = 0
                break
            text = text[1:]
            self._strip -= 1
        return text


class _WindowDecoder:
    """Decodes the last few tokens with and without the new one; the difference is its text.

    For tokenizers whose pieces depend on their neighbours. The window starts one piece before the
    last point at which the text was complete, so that a leading space keeps its context.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        #: How many ids of the window have had their text returned, and that text's length.
        self._done = 0
        self._done_characters = 0

    def add(self, token_id: int) -> str:
        self._ids.append(token_id)
        text = self._text()
        pending = len(self._ids) - self._done
        incomplete = text.endswith(REPLACEMENT) or len(text) <= self._done_characters
        if incomplete and pending <= _MAX_PENDING_TOKENS:
            return ""
        return self._take(text)

    def flush(self) -> str:
        return self._take(self._text())

    def _text(self) -> str:
        return _decode(self._tokenizer, self._ids, skip_special_tokens=False)

    def _take(self, text: str) -> str:
        piece = text[self._done_characters :]
        del self._ids[: self._done]
        self._done = len(self._ids)
        self._done_characters = len(self._text()) if self._ids else 0
        return piece


class Detokenizer:
    """Token ids in, text out; never half a character; constant time per token.

    `keep_special`: special tokens that are not skipped. `prior_ids` come before the text: they give
    context, and their own text is dropped.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        skip_special_tokens: bool,
        keep_special: Sequence[str] = (),
        prior_ids: Sequence[int] = (),
    ) -> None:
        table = token_table(tokenizer)
        self._skipped = frozenset[int]()
        if skip_special_tokens:
            self._skipped = table.special_ids - table.special_ids_of(keep_special)
        self._decoder = _ByteDecoder(table) if table.exact else _WindowDecoder(tokenizer)
        for token_id in prior_ids:
            self.add(token_id)

    def add(self, token_id: int) -> str:
        """The text that this token completes; empty while a character is incomplete."""
        return "" if token_id in self._skipped else self._decoder.add(token_id)

    def flush(self) -> str:
        """At the end of the answer: U+FFFD for an unfinished character, or nothing."""
        return self._decoder.flush()


def text_length(tokenizer: Any, ids: Sequence[int]) -> int:
    """Length in characters of the text of the ids, with special tokens but without an incomplete
    character at the end."""
    detokenizer = Detokenizer(tokenizer, skip_special_tokens=False)
    return sum(len(detokenizer.add(token_id)) for token_id in ids)


def places(tokenizer: Any, ids: Sequence[int]) -> list[int]:
    """How many characters precede each token in the text of the ids, special tokens included."""
    detokenizer = Detokenizer(tokenizer, skip_special_tokens=False)
    found, place = [], 0
    for token_id in ids:
        found.append(place)
        place += len(detokenizer.add(token_id))
    return found


class StopBuffer:
    """Holds back text that may be the start of a stop string, and cuts exactly at a stop string.

    The stop string that is complete first wins; of two that end at the same character, the longer.
    This depends on the text alone, not on its tokens. It is an Aho-Corasick automaton: its depth is
    the number of characters to hold back, and a character takes amortized constant time, however
    many stop strings there are.
    """

    def __init__(self, stops: Sequence[str], *, include_stop: bool = False) -> None:
        self._include_stop = include_stop
        self._next: list[dict[str, int]] = [{}]
        self._fail = [0]
        self._depth = [0]
        #: For each state, the longest stop string that ends there, or "".
        self._stop = [""]
        for stop in stops:
            self._insert(stop)
        self._link()
        self._state = 0
        self._held = ""

    def _insert(self, stop: str) -> None:
        state = 0
        for character in stop:
            following = self._next[state].get(character)
            if following is None:
                following = len(self._next)
                self._next[state][character] = following
                self._next.append({})
                self._fail.append(0)
                self._depth.append(self._depth[state] + 1)
                self._stop.append("")
            state = following
        self._stop[state] = stop

    def _link(self) -> None:
        queue = list(self._next[0].values())
        for state in queue:
            for character, following in self._next[state].items():
                self._fail[following] = self._step(self._fail[state], character)
                queue.append(following)
            self._stop[state] = self._stop[state] or self._stop[self._fail[state]]

    def _step(self, state: int, character: str) -> int:
        while state and character not in self._next[state]:
            state = self._fail[state]
        return self._next[state].get(character, 0)

    def add(self, text: str, *, may_stop: bool = True) -> tuple[str, str | None]:
        """The text that may be sent, and the stop string that was found.

        With `may_stop` False, a stop string that is complete within `text` is ignored. Add nothing
        after a stop string was found.
        """
        if not self._next[0]:
            return text, None
        whole = self._held + text
        offset = len(self._held)
        state = self._state
        for index, character in enumerate(text, offset + 1):
            state = self._step(state, character)
            stop = self._stop[state]
            if stop and may_stop:
                self._state, self._held = 0, ""
                return whole[: index if self._include_stop else index - len(stop)], stop
            while state and not self._next[state]:  # ignored: hold only text that may still match
                state = self._fail[state]
        self._state = state
        cut = len(whole) - self._depth[state]
        self._held = whole[cut:]
        return whole[:cut], None

    def flush(self) -> str:
        """The text still held back, for an answer that ended without a stop string."""
        held, self._held, self._state = self._held, "", 0
        return held


class TextStep(NamedTuple):
    """The outcome of one token."""

    #: Text that may be sent now; may be empty.
    text: str
    #: The stop string that ended the answer with this token.
    stopped_by: str | None


class TextStream:
    """The text of one answer, as it is sent.

    `prior_ids` are the tokens of an interrupted answer, and `prior_characters` is how much of its
    text was received. New text continues exactly there, including text that was held back. If the
    prior tokens already reach a stop string, `stopped_by` is set from the start; then no token may
    be added, and `finish` returns the text that was not received.

    `context_ids` are the last tokens before the answer, for an answer that continues their text
    (completion): with them, a leading space of the answer is kept. Without them, the text is that
    of the answer alone, as `decode` returns it (chat).

    Stop strings are ignored until `params.min_tokens` tokens have been added.
    """

    def __init__(
        self,
        tokenizer: Any,
        params: Params,
        *,
        prior_ids: Sequence[int] = (),
        prior_characters: int = 0,
        context_ids: Sequence[int] = (),
    ) -> None:
        self._detokenizer = Detokenizer(
            tokenizer,
            skip_special_tokens=params.skip_special_tokens,
            keep_special=params.keep_special,
            prior_ids=context_ids,
        )
        self._stops = StopBuffer(params.stop, include_stop=params.include_stop)
        self._include_stop = params.include_stop
        self._min_tokens = params.min_tokens
        self._tokens = 0
        #: Always 0: this stream does not separate reasoning from the answer.
        self.reasoning_tokens = 0
        #: How many characters precede the next token's text, not counting stop strings.
        self.place = 0
        self._stopped_by: str | None = None
        replayed = []
        for token_id in prior_ids:
            if self.stopped_by is not None:
                break
            replayed.append(self._advance(token_id))
        text = "".join(replayed)
        #: Text of the prior tokens that was not received.
        self._owed = text[prior_characters:]
        #: Characters received beyond what the replay produces; they are not sent again.
        self._ahead = max(0, prior_characters - len(text))

    @property
    def stopped_by(self) -> str | None:
        """The stop string that ended the answer."""
        return self._stopped_by

    @property
    def over(self) -> bool:
        """Whether a stop string ended the answer."""
        return self._stopped_by is not None

    def add(self, token_id: int) -> TextStep:
        """Take the next token of the answer."""
        return TextStep(self._deliver(self._advance(token_id)), self.stopped_by)

    def finish(self, ending_token: int | None = None) -> str:
        """The rest of the text: what was held back, or nothing after a stop string.

        `ending_token` is the EOS or stop token that ended the answer, if it was not added: its text
        is part of the answer only with `include_stop`.
        """
        text = ""
        if self.stopped_by is None and ending_token is not None and self._include_stop:
            text = self._advance(ending_token)
        if self.stopped_by is None:
            text += self._check(self._detokenizer.flush())
        if self.stopped_by is None:
            text += self._stops.flush()
        return self._deliver(text)

    def _advance(self, token_id: int) -> str:
        self._tokens += 1
        text = self._detokenizer.add(token_id)
        self.place += len(text)
        return self._check(text)

    def _check(self, text: str) -> str:
        if not text:
            return text
        text, self._stopped_by = self._stops.add(text, may_stop=self._tokens >= self._min_tokens)
        return text

    def _deliver(self, text: str) -> str:
        if self._owed:
            text, self._owed = self._owed + text, ""
        if self._ahead:
            skipped = min(self._ahead, len(text))
            self._ahead -= skipped
            text = text[skipped:]
        return text
