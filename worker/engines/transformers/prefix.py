"""Prefix cache: keys and values of finished rows, found by their tokens.

An entry's key is its token ids, in which every image placeholder is replaced by a digest of the
image, so equal keys mean equal keys and values in the model. Entries are sorted by key, so the one
that has most in common with a prompt is a neighbour of the prompt's place, and no other is looked
at. Least recently used entries are evicted when the budget is full. Must never return a prefix that
ends before the last image of the request: the images after it would have to be passed to the model
without those before it.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from worker.engines.common.sequence import Sequence

__all__ = ["SMALLEST_PREFIX", "PrefixCache", "PrefixEntry", "common_length", "sequence_key"]

SMALLEST_PREFIX = 16
"""Shorter prefixes cost as much to copy as to compute."""

LayerStates = list[tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True, slots=True, eq=False)
class PrefixEntry:
    """A finished row: its tokens, its adapter, its keys and values."""

    key: NDArray[np.int64]
    adapter: str | None
    states: LayerStates
    #: The key as bytes, by which entries are sorted.
    order: bytes


class PrefixCache:
    """Finished rows within a budget of tokens; 0 keeps none."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        #: Tokens held, and tokens that requests have taken from here or from running rows.
        self.tokens = 0
        self.hit_tokens = 0
        #: All entries, the least recently used first, and again by adapter, sorted by key. No entry
        #: is a prefix of another.
        self._entries: OrderedDict[PrefixEntry, None] = OrderedDict()
        self._sorted: dict[str | None, list[PrefixEntry]] = {}

    def longest(self, sequence: Sequence, limit: int) -> tuple[PrefixEntry | None, int]:
        """The entry that shares the longest prefix with the sequence, and the prefix's length, at
        most `limit`; (None, 0) if none is long enough to be used."""
        best: PrefixEntry | None = None
        length = 0
        key = sequence_key(sequence)
        entries, place = self._place(sequence.adapter, key.tobytes())
        for entry in entries[max(place - 1, 0) : place + 1]:
            shared = _usable(sequence, min(common_length(entry.key, key), limit))
            if shared > length:
                best, length = entry, shared
        return best, length

    def shared(self, other: Sequence, sequence: Sequence, limit: int) -> int:
        """How many tokens at the beginning of `other` may be copied for `sequence`, at most
        `limit`."""
        if other.adapter != sequence.adapter:
            return 0
        common = common_length(sequence_key(other), sequence_key(sequence))
        return _usable(sequence, min(common, limit, other.stem_tokens))

    def used(self, entry: PrefixEntry, length: int) -> None:
        """An entry was copied: mark it as the most recently used."""
        self.hit_tokens += length
        self._entries.move_to_end(entry)

    def store(self, sequence: Sequence, read: Callable[[int], LayerStates]) -> None:
        """Keep a finished row if it is worth it. `read(length)` copies its keys and values."""
        length = sequence.kept_tokens
        if length < SMALLEST_PREFIX or length > self.budget:
            return
        key = sequence_key(sequence)[:length]
        order = key.tobytes()
        entries, place = self._place(sequence.adapter, order)
        if place < len(entries) and entries[place].order.startswith(order):
            # It is a prefix of an entry: only mark that one as used.
            self._entries.move_to_end(entries[place])
            return
        if place and order.startswith(entries[place - 1].order):
            self._remove(entries[place - 1])
        while self.tokens + length > self.budget and self.drop_oldest():
            pass
        entry = PrefixEntry(key, sequence.adapter, read(length), order)
        entries, place = self._place(sequence.adapter, order)
        entries.insert(place, entry)
        self._entries[entry] = None
        self.tokens += length

    def drop_oldest(self) -> bool:
        """Evict the least recently used entry; False if there is none."""
        if not self._entries:
            return False
        self._remove(next(iter(self._entries)))
        return True

    def forget(self, adapter: str) -> None:
        """Drop everything that was computed with an adapter."""
        for entry in list(self._sorted.get(adapter, ())):
            self._remove(entry)

    def clear(self) -> None:
        self._entries.clear()
        self._sorted.clear()
        self.tokens = 0

    def _place(self, adapter: str | None, order: bytes) -> tuple[list[PrefixEntry], int]:
        """The sorted entries of an adapter, and the index at which a key belongs."""
        entries = self._sorted.setdefault(adapter, [])
        return entries, bisect_left(entries, order, key=lambda entry: entry.order)

    def _remove(self, entry: PrefixEntry) -> None:
        entries, place = self._place(entry.adapter, entry.order)
        del entries[place], self._entries[entry]
        self.tokens -= len(entry.key)


def sequence_key(sequence: Sequence) -> NDArray[np.int64]:
    """The key of a sequence's prompt and answer: int64 [tokens]."""
    if not sequence.answer:
        return sequence.prompt.key
    return np.concatenate([sequence.prompt.key, np.asarray(sequence.answer, dtype=np.int64)])


def common_length(one: NDArray[np.int64], other: NDArray[np.int64]) -> int:
    """Length of the common beginning of two keys, in tokens."""
    count = min(len(one), len(other))
    different = np.flatnonzero(one[:count] != other[:count])
    return int(different[0]) if len(different) else count


def _usable(sequence: Sequence, shared: int) -> int:
    if shared < SMALLEST_PREFIX or shared < sequence.prompt.media_end:
        return 0
    return shared
