"""Log probabilities of a text in the form of OpenAI's completions, for every API that has them.

Never imports what only the extra `gateway` installs.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence
from typing import Any, Final

import msgspec

from broker.protocol.messages import TokenLogprob

__all__ = ["Places", "named_by_id", "of_prompt", "shortened", "text_logprobs"]

#: As `answers.IMPOSSIBLE`.
_IMPOSSIBLE: Final = -9999.0
_Utf8 = codecs.getincrementaldecoder("utf-8")


class Places:
    """Finds where each token of a text begins, in characters, as the tokens arrive.

    A worker sends it (`TokenLogprob.place`), since only its tokenizer knows which spaces and tokens
    are part of the text. Otherwise it is estimated from the bytes.
    """

    def __init__(self, offset: int = 0) -> None:
        self.begin(offset)

    def begin(self, offset: int) -> None:
        """A part of the text (an echoed prompt, or its answer) begins after `offset` characters."""
        self._offset = offset
        self._characters = 0
        self._decoder = _Utf8(errors="replace")

    def of(self, tokens: Iterable[TokenLogprob]) -> list[TokenLogprob]:
        """The next tokens of the part, each with its position in the whole text."""
        placed = []
        for token in tokens:
            place = self._characters if token.place is None else token.place
            placed.append(msgspec.structs.replace(token, place=self._offset + place))
            self._characters += len(self._decoder.decode(token.token))
        return placed


def named_by_id(token_ids: Sequence[int], tokens: Sequence[TokenLogprob]) -> list[TokenLogprob]:
    """The same, with the id of each token as its text (`return_tokens_as_token_ids`)."""
    return [
        msgspec.structs.replace(
            token,
            token=b"token_id:%d" % id_,
            top=[
                msgspec.structs.replace(top, token=b"token_id:%d" % top.token_id)
                for top in token.top
            ],
        )
        for id_, token in zip(token_ids, tokens, strict=True)
    ]


def shortened(tokens: Sequence[TokenLogprob], most: int) -> list[TokenLogprob]:
    """The same, with at most so many alternatives beside each."""
    return [msgspec.structs.replace(token, top=token.top[:most]) for token in tokens]


def of_prompt(
    token_ids: Sequence[int], tokens: Sequence[TokenLogprob]
) -> list[dict[str, dict[str, Any]] | None]:
    """`prompt_logprobs` in vLLM's shape: by token id, the token itself first. The rank of one that
    is not among the most likely is not known here."""
    told: list[dict[str, dict[str, Any]] | None] = []
    for id_, token in zip(token_ids, tokens, strict=True):
        if token.logprob is None:
            told.append(None)
            continue
        ranks = {top.token_id: place for place, top in enumerate(token.top, 1)}
        entries = {str(id_): _ranked(token.logprob, ranks.get(id_), token.token)}
        for top in token.top:
            entries.setdefault(
                str(top.token_id), _ranked(top.logprob, ranks[top.token_id], top.token)
            )
        told.append(entries)
    return told


def _ranked(logprob: float, rank: int | None, data: bytes) -> dict[str, Any]:
    text = data.decode(errors="replace")
    return {"logprob": max(logprob, _IMPOSSIBLE), "rank": rank, "decoded_token": text}


def text_logprobs(tokens: Sequence[TokenLogprob]) -> dict[str, Any]:
    """`logprobs` of a choice of a completion; the tokens must have positions."""
    return {
        "tokens": [_name(token.token) for token in tokens],
        # Null for the first token of a prompt: it has no predecessor.
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
    """The chosen token, then the most likely ones, by name; the chosen one alone if no others were
    asked for. Of tokens with the same bytes, the chosen one (or else the most likely) gets the
    name, and the others their ids."""
    if token.logprob is None and not token.top:
        return None
    chosen = _name(token.token)
    named: dict[str, float | None] = {chosen: token.logprob}
    for top in token.top:
        name = _name(top.token)
        if name == chosen and top.logprob == token.logprob:
            continue
        if name in named:
            name = f"token_id:{top.token_id}"
        named[name] = top.logprob
    return named
