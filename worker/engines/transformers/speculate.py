"""Decides how many draft tokens a decode step verifies: none where it would not pay.

A step may compute several tokens of each row: its last one and a draft of those that follow. Draft
tokens are kept only if they are what would have been drawn anyway, so drafts never change an
answer, only the time that it takes. This module learns how often the drafts of a row are right and
what a step of each width costs. It chooses the width with the most tokens per millisecond, and
keeps an account of what wide steps gained and lost, which bounds the loss.

Numbers in, numbers out: must never touch a model, a clock or a tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from worker.engines.transformers.lookup import LONG_MATCH, LookupIndex

__all__ = ["WIDTHS", "Draft", "RowDrafts", "Speculator"]

WIDTHS = (2, 3, 5, 9, 17)
"""Tokens per row in a wide step. There are few widths, so that the cost of each is soon known."""

MOST_TOKENS = 256
"""Most tokens in a wide step: with more, even an accelerator is compute-bound."""

FORGET = 0.8
"""Factor by which a row's earlier drafts fade with each new one."""

FORGET_ALL = 0.98
"""The same for the drafts of all rows together, which are the starting point of a new row."""

PRIOR_TOKENS = 2.0
"""Weight of all rows' drafts in the estimate for one row, in tokens."""

GAIN = 1.04
"""A wide step must promise at least this many times the tokens per millisecond of an ordinary one,
since estimates are not exact."""

FAIR = 0.85
"""No row may fall below this fraction of its speed for the sake of another one's draft."""

SAVED = 0.008
"""What each ordinary step adds to the account for attempts that may fail, as a fraction of a
step."""

START_BALANCE = 0.5
MOST_BALANCE = 3.0
"""First and highest balance of the account, in ordinary steps: what a new engine may lose, and how
much of a gain is kept."""

STALE_STEPS = 64
"""After this many wide steps in a row, an ordinary one is measured again."""

FASTER, SLOWER = 0.5, 0.15
"""Weight of a measurement below and above the estimate: other programs can only make a step
slower."""

LEAP = 2.0
FIRST_LEAP = 4.0
"""A measurement counts as at most `LEAP` times what was expected; the first one of a width as at
most `FIRST_LEAP` ordinary steps."""

GUESSED_COST = 0.05
"""Cost of one more token until it has been measured, as a fraction of a step with one token."""


@dataclass(slots=True)
class Draft:
    """Tokens that may come next in a row."""

    token_ids: list[int] = field(default_factory=list)
    #: One of the kinds below, by which acceptance is counted.
    kind: int = 0


NO_DRAFT = Draft()


SHORT, LONG, CHANGED, BY_MODEL = range(4)
"""Kinds of drafts, which differ in how often they are right: by look-up after a short match, after
a long one, or after a change in a copy; or by a draft model."""

PRIORS = (0.5, 0.8, 0.5, 0.7)
"""Probability that a draft token of each kind is right, before anything is known."""


class Width(NamedTuple):
    """A choice of `Speculator.plan`."""

    #: Tokens per row; 1 if no draft pays.
    tokens: int
    #: Expected tokens per millisecond, as a multiple of those without drafts; 1 for an attempt.
    gain: float


class Acceptance:
    """How often the next token of a draft is right, by kind of draft; older ones fade."""

    __slots__ = ("_forget", "right", "tried")

    def __init__(self, forget: float, right: Sequence[float], tried: float) -> None:
        self._forget = forget
        self.right = list(right)
        self.tried = [tried] * len(right)

    def learn(self, draft: Draft, accepted: int) -> None:
        kind = draft.kind
        tried = min(accepted + 1, len(draft.token_ids))
        self.right[kind] = self._forget * self.right[kind] + accepted
        self.tried[kind] = self._forget * self.tried[kind] + tried


class RowDrafts:
    """The drafts of one request: its text, and how often they were right."""

    def __init__(self, prompt_ids: Sequence[int], answer: Sequence[int]) -> None:
        self._index = LookupIndex(prompt_ids)
        self._prompt = len(prompt_ids)
        self._index.extend(answer)
        self._acceptance = Acceptance(FORGET, [0.0] * len(PRIORS), 0.0)

    def follow(self, answer: Sequence[int]) -> bool:
        """Index the answer so far. Returns whether there may be a draft of what follows."""
        index = self._index
        index.extend(answer[len(index) - self._prompt :])
        return index.repeats

    def draft(self, most: int) -> Draft:
        """A draft of what follows, of at most `most` tokens."""
        token_ids, matched = self._index.draft(most)
        if not token_ids:
            return NO_DRAFT
        return Draft(token_ids, LONG if matched >= LONG_MATCH else SHORT if matched else CHANGED)

    def learn(self, draft: Draft, accepted: int) -> None:
        """The first `accepted` tokens of a draft were right."""
        self._acceptance.learn(draft, accepted)

    def chance(self, kind: int, everywhere: Acceptance) -> float:
        """Probability that the next token of a draft is right; `everywhere`: for all rows."""
        common = everywhere.right[kind] / everywhere.tried[kind]
        own = self._acceptance
        return (own.right[kind] + PRIOR_TOKENS * common) / (own.tried[kind] + PRIOR_TOKENS)


class WidthCost:
    """Milliseconds of a step by rows and width, as measured."""

    def __init__(self) -> None:
        self._narrow: dict[int, float] = {}
        #: What a width adds to a step, by rows (rounded up to a power of two) and width.
        self._added: dict[tuple[int, int], float] = {}

    def narrow_ms(self, rows: int) -> float:
        """Milliseconds of a step with one token per row; 0 if none has been measured."""
        known = self._narrow
        if rows in known:
            return known[rows]
        return known[min(known, key=lambda other: abs(other - rows))] if known else 0.0

    def added_ms(self, rows: int, width: int) -> float:
        """Milliseconds that a step of that width takes beyond one with one token per row."""
        size = _rounded(rows)
        found = self._added.get((size, width))
        if found is not None:
            return found
        # Scaled from the measured shape whose number of tokens is nearest.
        wanted = size * (width - 1)
        shapes = {shape[0] * (shape[1] - 1): ms for shape, ms in self._added.items()}
        if not shapes:
            return GUESSED_COST * self.narrow_ms(1) * rows * (width - 1)
        nearest = min(shapes, key=lambda tokens: abs(tokens - wanted))
        return shapes[nearest] * wanted / nearest

    def learn(self, rows: int, width: int, ms: float) -> None:
        if width == 1:
            known = self._narrow.get(rows)
            self._narrow[rows] = ms if known is None else _towards(known, min(ms, LEAP * known))
            return
        narrow_ms, shape = self.narrow_ms(rows), (_rounded(rows), width)
        known = self._added.get(shape)
        most = FIRST_LEAP * narrow_ms if known is None else LEAP * (narrow_ms + known)
        added = max(min(ms, most) - narrow_ms, 0.0)
        self._added[shape] = added if known is None else _towards(known, added)


class Speculator:
    """Chooses the width of each step of one model. Call `plan` before a step, `drafted` with what
    became of its drafts, `took` with the time it took."""

    def __init__(self) -> None:
        self._cost = WidthCost()
        self._everywhere = Acceptance(FORGET_ALL, [2.0 * chance for chance in PRIORS], 2.0)
        self._balance = START_BALANCE
        #: Wide steps since the last ordinary one, and ordinary ones since the last wide one.
        self._wide_steps = self._plain_steps = 0
        #: Whether drafts can be worthwhile, by number of rows; forgotten now and then.
        self._worth: dict[int, bool] = {}
        self._most_tokens = MOST_TOKENS
        #: Draft tokens that were verified, and those of them that were right.
        self.draft_tokens = 0
        self.accepted_tokens = 0

    def worth_drafting(self, rows: int) -> bool:
        """Whether a step with so many rows can be worth drafts at all, however good they are."""
        if self._wide_steps >= STALE_STEPS or self._balance <= 0:
            return False
        worth = self._worth.get(rows)
        if worth is None:
            worth = self._worth[rows] = self._is_worth_drafting(rows)
        return worth

    def _is_worth_drafting(self, rows: int) -> bool:
        narrow_ms = self._cost.narrow_ms(rows)
        return any(
            width * narrow_ms > GAIN * (narrow_ms + self._cost.added_ms(rows, width))
            for width in WIDTHS
            if rows * width <= self._most_tokens
        )

    def plan(
        self,
        rows: Sequence[RowDrafts],
        drafts: Sequence[Draft],
        room: int,
        *,
        drafted_ms: float = 0.0,
    ) -> Width:
        """The width of the next step, at most `room`; drafts must then be cut to one token less.
        `drafted_ms`: milliseconds that one more token in every draft costs before the step."""
        count = len(drafts)
        longest = max((len(draft.token_ids) for draft in drafts), default=0)
        narrow_ms = self._cost.narrow_ms(count)
        if not longest or not narrow_ms:
            return Width(1, 1.0)
        chances = [
            row.chance(draft.kind, self._everywhere) if draft.token_ids else 0.0
            for row, draft in zip(rows, drafts, strict=True)
        ]
        slower = 1 + (self._cost.added_ms(count, WIDTHS[0]) + drafted_ms) / narrow_ms
        most = sum(1 / max(1 - chance, 0.01) for chance in chances) / count
        if most < GAIN * slower and not self._affords(slower):
            # Even endless drafts would not pay: the usual case, and this check is cheap.
            return Width(1, 1.0)
        best, attempt = Width(1, GAIN), 1
        for width in WIDTHS:
            if width > room or count * width > self._most_tokens:
                break
            added_ms = self._cost.added_ms(count, width) + drafted_ms * (width - 1)
            slower = 1 + added_ms / narrow_ms
            tokens = [
                _expected(chance, min(len(draft.token_ids), width - 1))
                for chance, draft in zip(chances, drafts, strict=True)
            ]
            gain = sum(tokens) / count / slower
            if gain > best.gain and min(tokens) / slower >= FAIR:
                best = Width(width, gain)
            if attempt == 1 and self._affords(slower):
                # These drafts have failed so far, but the next ones may not: this tries them.
                attempt = width
            if width > longest:
                break
        return best if best.tokens > 1 else Width(attempt, 1.0)

    def _affords(self, slower: float) -> bool:
        """Whether the account can bear the failure of a step that is so many times slower."""
        return self._balance >= min(slower - 1 + START_BALANCE, MOST_BALANCE)

    def limit(self, tokens: int) -> None:
        """From now on, no step may compute more than `tokens` tokens."""
        self._most_tokens = min(self._most_tokens, tokens)
        self._worth.clear()

    def drafted(self, row: RowDrafts, draft: Draft, accepted: int) -> None:
        """The first `accepted` tokens of a draft were what was drawn."""
        if draft.token_ids:
            row.learn(draft, accepted)
            self._everywhere.learn(draft, accepted)
            self.draft_tokens += len(draft.token_ids)
            self.accepted_tokens += accepted

    def took(
        self, rows: int, width: int, ms: float | None, tokens: int, *, drafted_ms: float = 0.0
    ) -> None:
        """A step of that shape took `ms` milliseconds (None: unknown), after `drafted_ms` for its
        drafts, and gave all rows together `tokens` tokens."""
        if ms is not None:
            self._cost.learn(rows, width, ms)
        if width == 1:
            self._wide_steps = 0
            self._plain_steps += 1
            if self._plain_steps % STALE_STEPS == 1:
                self._worth.clear()
            self._balance = min(self._balance + SAVED, MOST_BALANCE)
            return
        self._wide_steps += 1
        self._plain_steps = 0
        self._worth.clear()
        narrow_ms = self._cost.narrow_ms(rows)
        if narrow_ms:
            spent = 1 + (self._cost.added_ms(rows, width) + drafted_ms) / narrow_ms
            self._balance = min(self._balance + tokens / rows - spent, MOST_BALANCE)


def _expected(chance: float, tokens: int) -> float:
    """Expected tokens of a row from a step with a draft of `tokens` tokens, each of which is right
    with probability `chance`."""
    return 1.0 + sum(chance**count for count in range(1, tokens + 1))


def _towards(estimate: float, measured: float) -> float:
    return estimate + (FASTER if measured < estimate else SLOWER) * (measured - estimate)


def _rounded(rows: int) -> int:
    return 1 << (rows - 1).bit_length()
