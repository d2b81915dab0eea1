"""Drafts for the rows of a step: which tokens are worth verifying, and how many were right.

Must never run the model or sample.
"""

from __future__ import annotations

from dataclasses import dataclass

from worker.engines.common.sequence import Sequence
from worker.engines.transformers.draft_model import DraftModel
from worker.engines.transformers.speculate import (
    BY_MODEL,
    WIDTHS,
    Draft,
    RowDrafts,
    Speculator,
    Width,
)

__all__ = ["SlotDrafts", "StepDrafts"]


@dataclass(slots=True)
class StepDrafts:
    """What a step verifies: a draft for each row. All rows compute `width` tokens."""

    width: int
    drafts: list[Draft]

    @property
    def token_ids(self) -> list[list[int]]:
        return [draft.token_ids for draft in self.drafts]


class SlotDrafts:
    """Drafts for the sequences of one model."""

    def __init__(
        self, *, banned_ids: frozenset[int], longest: int, model: DraftModel | None = None
    ) -> None:
        """`banned_ids` are never drawn. No token may be computed at position `longest` or later.
        `model` drafts for rows in which look-up finds nothing."""
        self.speculator = Speculator()
        self._model = model
        self._banned = banned_ids
        self._longest = longest
        #: Milliseconds that the draft model has taken for the current step.
        self._drafted_ms = 0.0

    def plan(self, sequences: list[Sequence], capacity: int) -> StepDrafts | None:
        """Drafts for the next step of these rows, in a cache with room for `capacity` tokens in
        each; None if the step should compute one token per row as usual."""
        self._drafted_ms = 0.0
        if not self.speculator.worth_drafting(len(sequences)):
            return None
        rows, found = [], self._model is not None
        for sequence in sequences:
            row = _row(sequence)
            found |= row.follow(sequence.answer)
            rows.append(row)
        room = min(capacity, self._longest) - max(sequence.filled for sequence in sequences)
        if not found or room < WIDTHS[0]:
            return None
        drafts = [
            self._draft(row, self._limit(sequence, room))
            for row, sequence in zip(rows, sequences, strict=True)
        ]
        chosen = self.speculator.plan(rows, drafts, room)
        if self._model is not None:
            started = self._model.clock()
            by_model = self._by_model(self._model, sequences, rows, drafts, room, chosen)
            if by_model is not None:
                chosen, drafts = by_model
            self._drafted_ms = (self._model.clock() - started) * 1e3
        width = chosen.tokens
        if width == 1:
            return None
        cut = [Draft(draft.token_ids[: width - 1], draft.kind) for draft in drafts]
        return StepDrafts(width, cut)

    def _by_model(
        self,
        model: DraftModel,
        sequences: list[Sequence],
        rows: list[RowDrafts],
        drafts: list[Draft],
        room: int,
        otherwise: Width,
    ) -> tuple[Width, list[Draft]] | None:
        """A width and drafts in which the draft model fills in where look-up found nothing; None
        if that promises no more than `otherwise`."""
        limits = [self._limit(sequence, room) for sequence in sequences]
        promised = [
            draft if draft.token_ids or limit < 1 else Draft([0] * limit, BY_MODEL)
            for draft, limit in zip(drafts, limits, strict=True)
        ]
        chosen = self.speculator.plan(rows, promised, room, drafted_ms=model.token_ms())
        if chosen.tokens == 1 or (otherwise.tokens > 1 and chosen.gain <= otherwise.gain):
            return None
        made = model.draft(sequences, chosen.tokens - 1)
        if made is None:
            return None
        return chosen, [
            Draft(own[:limit], BY_MODEL) if draft.kind == BY_MODEL else draft
            for draft, own, limit in zip(promised, made, limits, strict=True)
        ]

    @staticmethod
    def _limit(sequence: Sequence, room: int) -> int:
        """How many tokens a draft may have: a step draws one more than its draft, which must not
        exceed what is left of the answer."""
        left = sequence.max_tokens - len(sequence.answer) - 1
        return max(min(room, WIDTHS[-1], left + 1) - 1, 0)

    def _draft(self, row: RowDrafts, most: int) -> Draft:
        draft = row.draft(most)
        for place, token_id in enumerate(draft.token_ids):
            if token_id in self._banned:
                return Draft(draft.token_ids[:place], draft.kind)
        return draft

    @property
    def token_bytes(self) -> int:
        """Bytes of the draft model's KV cache for each token; 0 without a draft model."""
        return 0 if self._model is None else self._model.cache.token_bytes

    def limit(self, tokens: int) -> None:
        """Limit the draft model's KV cache to so many tokens over all rows."""
        if self._model is not None:
            self._model.cache.budget = tokens

    def counts(self) -> dict[str, int]:
        """The fields of `RunnerCounts` about drafts."""
        speculator = self.speculator
        return {
            "draft_tokens": speculator.draft_tokens,
            "accepted_tokens": speculator.accepted_tokens,
        }

    def out_of_memory(self, rows: int, step: StepDrafts) -> None:
        """A step of so many rows ran out of memory: from now on, steps are smaller."""
        self.speculator.limit(rows * step.width - 1)

    def took(
        self,
        sequences: list[Sequence],
        step: StepDrafts | None,
        accepted: list[int],
        ms: float | None,
    ) -> None:
        """A step (`step` None: without drafts) took `ms` milliseconds (None: unknown), and
        `accepted` tokens of each row's draft were right."""
        tokens, width, drafted_ms = len(sequences) + sum(accepted), 1, self._drafted_ms
        if step is not None:
            width = step.width
            for sequence, draft, count in zip(sequences, step.drafts, accepted, strict=True):
                self.speculator.drafted(_row(sequence), draft, count)
        self.speculator.took(len(sequences), width, ms, tokens, drafted_ms=drafted_ms)


def _row(sequence: Sequence) -> RowDrafts:
    if not isinstance(sequence.drafts, RowDrafts):
        sequence.drafts = RowDrafts(sequence.prompt.ids, sequence.answer)
    return sequence.drafts
