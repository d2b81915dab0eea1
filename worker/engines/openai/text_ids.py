"""Token ids that carry text, in place of the tokens of a server that returns none.

The ids of an answer so far contain its text and the kind of each piece, so that another worker can
continue from there (SPEC.md section 6.4). An id holds up to three bytes of whole characters:

    bit 30 set | kind 29-27 | 26: counts as a token of the server, or begins a call | 25-24: bytes

The low 24 bits are these bytes; if their number is 0, they are one code point. Kind 7 is a hash of
a token instead, for answers with logprobs, which have one id for each token. Must never use a
tokenizer.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence
from typing import Final

from broker.protocol.messages import TEXT_IDS, Piece, PieceKind

__all__ = ["decoded", "encoded", "hashed", "is_hashed", "is_text", "tokens"]

_KINDS: Final = (
    PieceKind.CONTENT.value,
    PieceKind.REASONING.value,
    PieceKind.CALL.value,
    PieceKind.ARGUMENTS.value,
)
_HASH: Final = 7
_COUNTS: Final = 1 << 26
_LOW: Final = (1 << 24) - 1


def is_text(ids: Sequence[int]) -> bool:
    """Whether ids carry text. The ids of one answer either all do or none does."""
    return bool(ids) and ids[-1] >= TEXT_IDS


def encoded(pieces: Sequence[Piece], tokens: int = 1) -> list[int]:
    """The ids for pieces that a server sent at once and that consist of `tokens` tokens."""
    ids: list[int] = []
    room = sum(len(piece.text) for piece in pieces)
    wide = 3 if sum(len(_parts(piece.text, 3)) for piece in pieces) >= min(tokens, room) else 1
    for piece in pieces:
        base = TEXT_IDS | _KINDS.index(piece.kind) << 27
        for number, data in enumerate(_parts(piece.text, wide)):
            if piece.kind == PieceKind.CALL:
                counts = number == 0
            else:
                counts = tokens > 0
                tokens -= 1
            ids.append(base | (_COUNTS if counts else 0) | data)
    return ids


def _parts(text: str, most: int) -> list[int]:
    """The low 26 bits of the ids of a text. Each is a length and up to `most` bytes, but at least
    one character; or a code point whose UTF-8 has more than three bytes."""
    parts: list[int] = []
    held = b""
    for character in text:
        data = character.encode("utf-8", "replace")
        if held and len(held) + len(data) > most:
            parts.append(len(held) << 24 | int.from_bytes(held, "big"))
            held = b""
        if len(data) > 3:
            parts.append(ord(character))
        else:
            held += data
    if held:
        parts.append(len(held) << 24 | int.from_bytes(held, "big"))
    return parts


def decoded(ids: Iterable[int]) -> list[Piece]:
    """The pieces that ids carry, with neighbours of the same kind merged, but each call a piece of
    its own. Raises ValueError for an id that carries no text."""
    pieces: list[Piece] = []
    for id_ in ids:
        kind, size, data = id_ >> 27 & 7, id_ >> 24 & 3, id_ & _LOW
        if not TEXT_IDS <= id_ < 2 * TEXT_IDS or kind >= len(_KINDS):
            raise ValueError(f"id {id_} carries no text")
        text = data.to_bytes(3, "big")[3 - size :].decode() if size else chr(data)
        name = _KINDS[kind]
        calls_anew = name == PieceKind.CALL and id_ & _COUNTS
        if pieces and pieces[-1].kind == name and not calls_anew:
            pieces[-1] = Piece(name, pieces[-1].text + text)
        else:
            pieces.append(Piece(name, text))
    return pieces


def tokens(ids: Iterable[int]) -> int:
    """How many tokens of the server these ids stand for, as far as it said."""
    return sum(1 for id_ in ids if id_ >> 27 & 7 == _HASH or id_ & _COUNTS)


def hashed(token: bytes) -> int:
    """The id for a token that only has to be compared."""
    return TEXT_IDS | _HASH << 27 | zlib.crc32(token) & (1 << 27) - 1


def is_hashed(ids: Sequence[int]) -> bool:
    """Whether ids are hashes of tokens, from an answer with logprobs."""
    return bool(ids) and ids[-1] >= TEXT_IDS and ids[-1] >> 27 & 7 == _HASH
