"""Packing: how the tokens of many rows are laid one after the other in one forward, or, where rows
are padded, which of them share one.

Attention of consecutive tokens of a row, and of rows with a common beginning, is computed together:
the keys and values that they share are read once for many tokens. Knows sequences and their prefix
keys; must never touch a model.
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass
from itertools import accumulate
from typing import Self

import torch

from worker.engines.common.sequence import Sequence
from worker.engines.transformers.cache import Packed, Together
from worker.engines.transformers.prefix import common_length

__all__ = ["Along", "CommonPrefixes", "Layout", "Packing", "Piece", "common_prefixes", "even_runs"]

LONG_RUN = 48
"""Attention of a row's consecutive tokens is computed together if there are at least this many,
else one by one."""

COMMON_TOKENS = 64
"""Rows attend together to a common beginning of at least this many tokens."""


Groups = list[tuple[list[int], int]]
"""See `common_prefixes`."""


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
    def of(cls, pieces: Items[Piece], groups: Groups) -> Packing:
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


@dataclass(frozen=True, slots=True)
class Layout:
    """What a packed forward computes, and whose logits it returns."""

    pieces: list[Piece]
    #: Pieces that begin alike, with indices into `pieces`.
    groups: Groups
    #: Of each piece, the indices of the tokens whose logits are returned.
    kept: list[list[int]]

    @classmethod
    def of_last(cls, pieces: list[Piece], groups: Groups) -> Self:
        """Return the logits of the last token of each piece."""
        return cls(pieces, groups, [[len(piece.ids) - 1] for piece in pieces])

    @property
    def read(self) -> int:
        """How many tokens' logits are returned."""
        return sum(map(len, self.kept))

    def and_then(self, other: Layout) -> Layout:
        """Both in one forward, with the logits of the other's tokens after these."""
        behind = len(self.pieces)
        moved = [([place + behind for place in members], end) for members, end in other.groups]
        return Layout(self.pieces + other.pieces, self.groups + moved, self.kept + other.kept)

    def packed(self) -> tuple[Packing, list[int]]:
        """The packing, and the indices of the kept tokens in it."""
        packing = Packing.of(self.pieces, self.groups)
        places = zip(packing.begins, self.kept, strict=True)
        return packing, [begin + place for begin, kept in places for place in kept]


@dataclass(slots=True)
class Along:
    """Rows 0 to len(sequences) - 1, whose next tokens are computed: each row's last token, and its
    draft if there are drafts."""

    sequences: list[Sequence]
    drafts: list[list[int]] | None = None
    #: Tokens of the longest row.
    width: int = 1
    #: Set by a forward that computes them along with prompts: see `by_row`.
    logits: torch.Tensor | None = None

    @property
    def tokens(self) -> int:
        """How many tokens are computed."""
        return len(self.sequences) + sum(map(len, self.drafts or ()))

    def layout(self, groups: Groups) -> Layout:
        """Compute them in a packed forward, with the logits of every token."""
        drafts = self.drafts or [[]] * len(self.sequences)
        pieces = [
            Piece(one, row, one.filled, [one.answer[-1], *draft])
            for row, (one, draft) in enumerate(zip(self.sequences, drafts, strict=True))
        ]
        return Layout(pieces, groups, [[*range(len(piece.ids))] for piece in pieces])

    def by_row(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits [tokens, vocabulary] of that layout as [rows, vocabulary], or with drafts as
        [rows, width, vocabulary], in which those beyond a row's draft are meaningless."""
        if self.drafts is None:
            return logits
        rows, width = len(self.sequences), self.width
        if len(logits) == rows * width:
            return logits.view(rows, width, -1)
        places = [
            row * width + at
            for row, draft in enumerate(self.drafts)
            for at in range(len(draft) + 1)
        ]
        result = logits.new_empty(rows * width, logits.shape[-1])
        result[torch.tensor(places)] = logits
        return result.view(rows, width, -1)


class CommonPrefixes:
    """Which decoding rows have a common beginning; looked up again only when the rows change."""

    def __init__(self) -> None:
        self._sequences: list[Sequence] = []
        self._groups: Groups = []

    def decoded(self, sequences: list[Sequence]) -> Groups:
        """The groups of `common_prefixes` for sequences whose prompts are all computed."""
        if sequences != self._sequences:
            lengths = [len(sequence.prompt.ids) for sequence in sequences]
            self._sequences, self._groups = list(sequences), common_prefixes(sequences, lengths)
        return self._groups


def common_prefixes(sequences: Items[Sequence], computed: Items[int]) -> Groups:
    """Groups of sequences that begin with the same tokens: the indices of its members, and the
    length of their common beginning. `computed`: how many tokens of each are in the cache."""
    alike: dict[tuple[str | None, bytes], list[int]] = {}
    for place, (sequence, count) in enumerate(zip(sequences, computed, strict=True)):
        if min(count, len(sequence.prompt.key), sequence.stem_tokens) >= COMMON_TOKENS:
            beginning = sequence.prompt.key[:COMMON_TOKENS].tobytes()
            alike.setdefault((sequence.adapter, beginning), []).append(place)
    groups: Groups = []
    for members in alike.values():
        if len(members) > 1:
            first = sequences[members[0]]
            common = min(
                common_length(first.prompt.key, sequences[one].prompt.key) for one in members
            )
            bounds = (min(computed[one], sequences[one].stem_tokens) for one in members)
            groups.append((members, min(common, *bounds)))
    return groups


def even_runs(lengths: list[int], worth: int) -> list[tuple[int, int]]:
    """Divide consecutive rows of these lengths into runs, each decoded in a forward of its own.
    Every row of a run is read up to the length of the longest, so one long row would slow down all
    others. A run is split if that saves reading more than `worth` tokens. Returns (start, end) of
    each run."""
    runs: list[tuple[int, int]] = []
    open_ = [(0, len(lengths))]
    while open_:
        start, end = open_.pop()
        count, longest = end - start, max(lengths[start:end])
        cut, spared = 0, worth
        if count * longest - sum(lengths[start:end]) > worth:
            behind = list(accumulate(reversed(lengths[start:end]), max))
            before = 0
            for taken in range(1, count):
                before = max(before, lengths[start + taken - 1])
                rest = count - taken
                gain = count * longest - taken * before - rest * behind[rest - 1]
                if gain > spared:
                    cut, spared = taken, gain
        if cut:
            open_ += [(start + cut, end), (start, start + cut)]
        else:
            runs.append((start, end))
    return runs
