"""Prompt look-up: where the end of a text occurred before in it, and what came next there.

Edited code, extracted facts and quotations repeat a prompt token by token, so the continuation of
the last occurrence is a cheap draft of the answer. Tokens in, tokens out: must never touch a model,
a clock or a tensor.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

__all__ = ["SMALLEST_MATCH", "LookupIndex"]

SMALLEST_MATCH = 3
"""Tokens that must have occurred before; two occur too often by chance."""

LONGEST_MATCH = 32
"""Occurrences that agree in so many tokens are equally good: then the latest one counts."""

OCCURRENCES = 8
"""So many of the latest occurrences are compared, in the prompt and in the answer."""

_FACTOR = 0x9E3779B97F4A7C15
_BITS = (1 << 64) - 1


class LookupIndex:
    """The text of one request. Appending a token and a look-up take microseconds, however long the
    text is; the prompt is indexed once, at the first look-up (10 ms for 100,000 tokens)."""

    def __init__(self, prompt_ids: Sequence[int]) -> None:
        self._ids = list(prompt_ids)
        self._prompt = len(self._ids)
        #: Keys of the prompt's n-grams, ascending, and where in the prompt each one ends.
        self._keys: np.ndarray[Any, np.dtype[np.uint64]] | None = None
        self._ends: np.ndarray[Any, np.dtype[np.int64]] = np.zeros(0, np.int64)
        #: Where the n-grams of the answer end, by key. The latest n-gram is not among them.
        self._answer: dict[int, list[int]] = {}

    def __len__(self) -> int:
        """Tokens of the text so far."""
        return len(self._ids)

    def extend(self, token_ids: Iterable[int]) -> None:
        """Take the next tokens of the answer."""
        for token_id in token_ids:
            end = len(self._ids) - 1
            if end >= self._prompt:
                self._answer.setdefault(self._key(end), []).append(end)
            self._ids.append(token_id)

    def draft(self, most: int) -> tuple[list[int], int]:
        """At most `most` tokens that may come next, and how many tokens before them agree; none
        if the end of the text did not occur before."""
        ids, last = self._ids, len(self._ids) - 1
        if most < 1 or last < SMALLEST_MATCH:
            return [], 0
        source, longest = -1, SMALLEST_MATCH - 1
        for end in self._occurrences(self._key(last)):
            matched = self._agreeing(end, last)
            if matched > longest:
                source, longest = end, matched
                if matched == LONGEST_MATCH:
                    break
        if source < 0:
            return [], 0
        draft = ids[source + 1 : source + 1 + most]
        # A text that repeats itself goes on with what it has just repeated.
        period = last - source
        while len(draft) < most:
            draft.append(draft[len(draft) - period])
        return draft, longest

    def _occurrences(self, key: int) -> Iterable[int]:
        """Where the latest n-grams with that key end, latest first."""
        yield from reversed(self._answer.get(key, ())[-OCCURRENCES:])
        if self._keys is None:
            self._keys, self._ends = self._indexed_prompt()
        wanted = np.uint64(key)
        stop = int(self._keys.searchsorted(wanted, "right"))
        start = int(self._keys.searchsorted(wanted, "left"))
        for end in reversed(self._ends[max(start, stop - OCCURRENCES) : stop].tolist()):
            if end < len(self._ids) - 1:
                yield end

    def _agreeing(self, end: int, last: int) -> int:
        """Number of equal tokens before and at two places."""
        ids, count = self._ids, 0
        most = min(end + 1, LONGEST_MATCH)
        while count < most and ids[end - count] == ids[last - count]:
            count += 1
        return count

    def _key(self, end: int) -> int:
        """The key of the n-gram that ends there; different ones may share it."""
        key = 0
        for token_id in self._ids[max(end + 1 - SMALLEST_MATCH, 0) : end + 1]:
            key = (key * _FACTOR + token_id + 1) & _BITS
        return key

    def _indexed_prompt(
        self,
    ) -> tuple[np.ndarray[Any, np.dtype[np.uint64]], np.ndarray[Any, np.dtype[np.int64]]]:
        ids = np.array(self._ids[: self._prompt], np.uint64) + np.uint64(1)
        count = max(len(ids) - SMALLEST_MATCH + 1, 0)
        keys = np.zeros(count, np.uint64)
        for offset in range(SMALLEST_MATCH):
            keys = keys * np.uint64(_FACTOR) + ids[offset : offset + count]
        order = keys.argsort(kind="stable")
        return keys[order], order + (SMALLEST_MATCH - 1)
