"""Tokens and text of the echo engine.

Ids 0 to 255 are bytes of UTF-8; from 256 on there are 4,096 made-up words with a leading space.
Text is split greedily into those words and, for the rest, bytes, so that every text has exactly one
list of tokens and every list of tokens has a text. A token with part of a character has no text
yet, as in a real tokenizer. Results must depend on the input alone: tests compute answers with
these functions.
"""

from __future__ import annotations

import re
import struct
from codecs import getincrementaldecoder
from collections.abc import Iterable
from functools import cache
from typing import Final

BYTES: Final = 256
WORDS: Final = 4096
VOCABULARY: Final = BYTES + WORDS

_PIECE: Final = re.compile(r" [a-z]+|.", re.DOTALL)
_CONSONANTS: Final = "bdfgklmn"
_VOWELS: Final = "aeio"
_Utf8Decoder = getincrementaldecoder("utf-8")


@cache
def words() -> tuple[str, ...]:
    """The vocabulary's words, each with its leading space."""
    syllables = [c + v for c in _CONSONANTS for v in _VOWELS]
    pairs = [first + second for first in syllables for second in syllables]
    quads = [pair + last for pair in pairs for last in ("na", "ro", "se")]
    return tuple(" " + word for word in (pairs + quads))[:WORDS]


@cache
def texts() -> tuple[str, ...]:
    """The text of each word token, by id; the entries of byte tokens are empty."""
    return ("",) * BYTES + words()


@cache
def _word_ids() -> dict[str, int]:
    return {word: BYTES + index for index, word in enumerate(words())}


def tokenize(text: str) -> list[int]:
    """Token ids of a text."""
    ids = _word_ids()
    tokens: list[int] = []
    for piece in _PIECE.findall(text):
        token = ids.get(piece)
        if token is not None:
            tokens.append(token)
        else:
            tokens += piece.encode("utf-8", "surrogatepass")
    return tokens


def token_bytes(token_id: int) -> bytes:
    """The bytes of a token."""
    if token_id < BYTES:
        return bytes((token_id,))
    return words()[(token_id - BYTES) % WORDS].encode()


def detokenize(token_ids: Iterable[int]) -> str:
    """Text of token ids; bytes that are not valid UTF-8 become replacement characters."""
    return b"".join(map(token_bytes, token_ids)).decode("utf-8", "replace")


def sampled_token(seed: int, prompt_hash: int, position: int) -> int:
    """The token at a position: a hash (splitmix64's finaliser) of the arguments alone."""
    mask = (1 << 64) - 1
    z = (seed ^ (prompt_hash << 32)) + (position + 1) * 0x9E3779B97F4A7C15 & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return BYTES + (z ^ (z >> 31)) % WORDS


_LANES: Final = 64
"""Tokens drawn at once."""
_ONES: Final = sum(1 << 128 * lane for lane in range(_LANES))
_LOW: Final = _ONES * ((1 << 64) - 1)
_READ_LANES: Final = struct.Struct(f"<{2 * _LANES}Q").unpack
_STEPS: Final = sum((lane + 1) * 0x9E3779B97F4A7C15 << 128 * lane for lane in range(_LANES))


def sampled_tokens(seed: int, prompt_hash: int, position: int) -> list[int]:
    """`sampled_token` for 64 positions at once, in lanes of one long integer that are wide enough
    for 64-bit products, so that a benchmark with thousands of streams does not measure the drawing
    of tokens."""
    begin = (seed ^ (prompt_hash << 32)) + position * 0x9E3779B97F4A7C15
    z = begin % (1 << 64) * _ONES + _STEPS & _LOW
    z = (z ^ (z >> 30 & _LOW)) * 0xBF58476D1CE4E5B9 & _LOW
    z = (z ^ (z >> 27 & _LOW)) * 0x94D049BB133111EB & _LOW
    z = (z ^ (z >> 31)) & _ONES * (WORDS - 1)
    return list(_READ_LANES((z + _ONES * BYTES).to_bytes(16 * _LANES, "little"))[::2])


_THOUGHT: Final = re.compile("<think>(.*?)(?:</think>|$)", re.DOTALL)


def thought(tokens: int, most: int | None) -> list[int]:
    """The tokens of a thought: its marks around `tokens` sampled words (-1), at most `most`. Empty
    if `tokens` is 0."""
    words_ = tokens if most is None else min(tokens, most)
    return [*tokenize("<think>"), *[-1] * words_, *tokenize("</think>")] if tokens else []


def within_budget(text: str, most: int | None) -> str:
    """A text to echo in which the first thought has at most `most` tokens."""
    found = None if most is None else _THOUGHT.search(text)
    if found is None or len(ids := tokenize(found[1])) <= (most or 0):
        return text
    return text[: found.start(1)] + detokenize(ids[:most]) + "</think>" + text[found.end() :]


class Text:
    """Converts tokens to text that is certain: whole characters, without what may begin a stop
    string."""

    __slots__ = ("_decoder", "_half", "_held", "_include", "_longest", "_stops", "stopped_by")

    def __init__(self, stops: list[str], include_stop: bool) -> None:
        self._decoder = _Utf8Decoder("replace")
        #: Whether the decoder holds the beginning of a character.
        self._half = False
        self._stops = stops
        self._include = include_stop
        self._longest = max(map(len, stops), default=0)
        self._held = ""
        self.stopped_by: str | None = None

    @property
    def plain(self) -> bool:
        """Whether words can be output directly, since nothing is held back."""
        return not (self._stops or self._held or self._half)

    def push(self, token_ids: list[int]) -> str:
        """Take tokens; returns the text that is now certain."""
        text = self._held
        vocabulary = words()
        for token in token_ids:
            if token >= BYTES and not self._half:
                text += vocabulary[(token - BYTES) % WORDS]
            else:
                text += self._decoder.decode(token_bytes(token))
                self._half = bool(self._decoder.getstate()[0])
        if not self._stops:
            return text
        # As `StopBuffer`: the one that is complete first, of two the longer.
        found = [(text.find(stop) + len(stop), text.find(stop), stop) for stop in self._stops]
        found = [each for each in found if each[1] >= 0]
        if found:
            _, at, self.stopped_by = min(found)
            self._held = ""
            return text[: at + len(self.stopped_by)] if self._include else text[:at]
        keep = 0
        for length in range(min(len(text), self._longest - 1), 0, -1):
            tail = text[-length:]
            if any(stop.startswith(tail) for stop in self._stops):
                keep = length
                break
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        """The text held back, at the end of the answer."""
        text = self._held + self._decoder.decode(b"", final=True)
        self._held = ""
        return text
