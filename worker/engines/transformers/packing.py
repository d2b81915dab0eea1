"""Packing: how the tokens of many rows are laid one after the other in one forward.

Attention of consecutive tokens of a row, and of rows with a common beginning, is computed together:
the keys and values that they share are read once for many tokens. Knows sequences and their prefix
keys; must never touch a model.
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
"""Attention of a row's consecutive tokens is computed together if there are at least this many,
else one by one."""

COMMON_TOKENS = 64
"""Rows attend together to a common beginning of at least this many tokens."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Tokens of a sequence, which has row `row` of the cache, from position `start` on."""

    sequence: Sequence
    row: int
    start: int
    ids: list[int]


@dataclass(frozen=True, slots=True)
class Packing:
    """Pieces in the order in which they are computed."""

    ids: list[int]
    packed: Packed
    #: Index in `ids` at which each piece begins, in the order in which the pieces were given.
    begins: list[int]

    @classmethod
    def of(cls, pieces: Items[Piece], groups: Items[tuple[list[int], int]]) -> Packing:
        """Lay out pieces, those of a group next to each other. `groups`: see `common_prefixes`,
        with indices into `pieces`."""
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
    """Which decoding rows have a common beginning; looked up again only when the rows change."""

    def __init__(self) -> None:
        self._sequences: list[Sequence] = []
        self._groups: list[tuple[list[int], int]] = []

    def decoded(self, sequences: list[Sequence]) -> list[tuple[list[int], int]]:
        """The groups of `common_prefixes` for sequences whose prompts are all computed."""
        if sequences != self._sequences:
            lengths = [len(sequence.prompt.ids) for sequence in sequences]
            self._sequences, self._groups = list(sequences), common_prefixes(sequences, lengths)
        return self._groups


def common_prefixes(
    sequences: Items[Sequence], computed: Items[int]
) -> list[tuple[list[int], int]]:
    """Groups of sequences that begin with the same tokens: the indices of its members, and the
    length of their common beginning. `computed`: how many tokens of each are in the cache."""
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
