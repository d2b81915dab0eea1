"""How tokens of many rows lie one after the other in one forward.

Tokens of a row that follow each other, and those of rows that begin alike, attend together: what
they see is read once for many of them. Knows sequences and their keys; must never touch a model.
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass

import torch

from worker.engines.common.sequence import Sequence
from worker.engines.transformers.cache import Packed, Together
from worker.engines.transformers.prefix import common_length

__all__ = ["CommonPrefixes", "Packing", "Piece", "common_prefixes"]

LONG_RUN = 48
"""Tokens of a row that follow each other attend together if they are so many, else one by one."""

COMMON_TOKENS = 64
"""Rows attend together to what they have in common, if it is so much."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Tokens of a sequence, which stands in row `row`, from position `start` on."""

    sequence: Sequence
    row: int
    start: int
    ids: list[int]


@dataclass(frozen=True, slots=True)
class Packing:
    """Pieces in the order in which they are computed."""

    ids: list[int]
    packed: Packed
    #: Where each piece begins, in the order in which they were given.
    begins: list[int]

    @classmethod
    def of(cls, pieces: Items[Piece], groups: Items[tuple[list[int], int]]) -> Packing:
        """`groups`: see `common_prefixes`."""
        grouped = {place for members, _ in groups for place in members}
        order = [place for place in range(len(pieces)) if place not in grouped]
        order.sort(key=lambda place: len(pieces[place].ids) >= LONG_RUN)
        alone = sum(len(pieces[place].ids) < LONG_RUN for place in order)
        for members, _ in groups:
            order += members
        ids: list[int] = []
        rows: list[int] = []
        places: list[int] = []
        begins = [0] * len(pieces)
        together: list[Together] = []
        for number, place in enumerate(order):
            piece = pieces[place]
            begins[place] = len(ids)
            end = piece.start + len(piece.ids)
            if number >= alone and place not in grouped:
                together.append(Together(len(ids), len(ids) + len(piece.ids), piece.row, end))
            ids += piece.ids
            rows += [piece.row] * len(piece.ids)
            places += range(piece.start, end)
        singles = sum(len(pieces[place].ids) for place in order[:alone])
        for members, length in groups:
            first, final = begins[members[0]], pieces[members[-1]]
            last = begins[members[-1]] + len(final.ids)
            together.append(Together(first, last, pieces[members[0]].row, length, apart=True))
        facts = torch.tensor([rows, places])
        return cls(ids, Packed(facts[0], facts[1], singles, tuple(together)), begins)


class CommonPrefixes:
    """Which rows begin alike. Of decodes it is found out once for as long as they are the same."""

    def __init__(self) -> None:
        self._sequences: list[Sequence] = []
        self._groups: list[tuple[list[int], int]] = []

    def decoded(self, sequences: list[Sequence]) -> list[tuple[list[int], int]]:
        """As `of`, of rows whose prompts are computed."""
        if sequences != self._sequences:
            lengths = [len(sequence.prompt.ids) for sequence in sequences]
            self._sequences, self._groups = list(sequences), common_prefixes(sequences, lengths)
        return self._groups


def common_prefixes(
    sequences: Items[Sequence], computed: Items[int]
) -> list[tuple[list[int], int]]:
    """Groups of places of sequences that begin with the same tokens, and how many those are; each
    has computed so many of its own."""
    alike: dict[tuple[str | None, bytes], list[int]] = {}
    for place, (sequence, count) in enumerate(zip(sequences, computed, strict=True)):
        if min(count, len(sequence.prompt.key), sequence.stem_tokens) >= COMMON_TOKENS:
            beginning = sequence.prompt.key[:COMMON_TOKENS].tobytes()
            alike.setdefault((sequence.adapter, beginning), []).append(place)
    groups: list[tuple[list[int], int]] = []
    for members in alike.values():
        if len(members) > 1:
            first = sequences[members[0]]
            common = min(
                common_length(first.prompt.key, sequences[one].prompt.key) for one in members
            )
            bounds = (min(computed[one], sequences[one].stem_tokens) for one in members)
            groups.append((members, min(common, *bounds)))
    return groups
