"""Log-probabilities of a text as OpenAI's completions have them, for every door that has them.

Never imports what only the extra `gateway` installs: `python -m client batch` uses it too.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec

from broker.protocol.messages import TokenLogprob

__all__ = ["Places", "text_logprobs"]

_Utf8 = codecs.getincrementaldecoder("utf-8")


class Places:
    """Finds where each token of a text begins, in characters, as the tokens come.

    A worker tells it (`TokenLogprob.place`), since only its tokenizer knows which space of a token
    stands in the text and which token does not. Else the bytes say it as well as they can.
    """

    def __init__(self, offset: int = 0) -> None:
        self.begin(offset)

    def begin(self, offset: int) -> None:
        """A part of the text begins behind `offset` characters: an echoed prompt, or its answer."""
        self._offset = offset
        self._characters = 0
        self._decoder = _Utf8(errors="replace")

    def of(self, tokens: Iterable[TokenLogprob]) -> list[TokenLogprob]:
        """The next tokens of the part, each with its place in the whole text."""
        placed = []
        for token in tokens:
            place = self._characters if token.place is None else token.place
            placed.append(msgspec.structs.replace(token, place=self._offset + place))
            self._characters += len(self._decoder.decode(token.token))
        return placed


def text_logprobs(tokens: Sequence[TokenLogprob]) -> dict[str, Any]:
    """`logprobs` of a choice of a completion; the tokens are placed."""
    return {
        "tokens": [_name(token.token) for token in tokens],
        # Null for the first token of a prompt: nothing stands before it.
        "token_logprobs": [token.logprob for token in tokens],
        "top_logprobs": [_top_logprobs(token) for token in tokens],
        "text_offset": [token.place for token in tokens],
    }


def _name(data: bytes) -> str:
    """A token's text; bytes that are not text are written as OpenAI writes them."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def _top_logprobs(token: TokenLogprob) -> dict[str, float | None] | None:
    """The likeliest tokens and the chosen one by their names. Tokens of the same bytes are told
    apart: the chosen one has the name, or else the likeliest, and the others their ids."""
    if not token.top:
        return None
    chosen = _name(token.token)
    named: dict[str, float | None] = {}
    for top in token.top:
        name = _name(top.token)
        if name in named or (name == chosen and top.logprob != token.logprob):
            name = f"token_id:{top.token_id}"
        named[name] = top.logprob
    named.setdefault(chosen, token.logprob)
    return named
