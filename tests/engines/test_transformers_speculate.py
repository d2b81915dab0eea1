"""Drafts of an answer, and how many of them a step verifies: in numbers alone, without a model."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from worker.engines.transformers.lookup import LONGEST_MATCH, LookupIndex
from worker.engines.transformers.speculate import (
    BY_MODEL,
    MOST_TOKENS,
    NO_DRAFT,
    WIDTHS,
    Draft,
    RowDrafts,
    Speculator,
)

# --- prompt look-up -------------------------------------------------------------------------------


def test_what_followed_an_earlier_occurrence_is_the_draft() -> None:
    index = LookupIndex([1, 2, 3, 4, 5, 6, 7, 8])
    index.extend([2, 3, 4])
    assert index.draft(3) == ([5, 6, 7], 3)


def test_two_tokens_are_no_match() -> None:
    index = LookupIndex([1, 2, 3, 4, 5, 6])
    index.extend([2, 3])
    assert index.draft(4) == ([], 0)


def test_the_longest_match_counts_and_of_equal_ones_the_latest() -> None:
    index = LookupIndex([9, 1, 2, 3, 50, 8, 1, 2, 3, 60, 7, 1, 2, 3, 70])
    index.extend([8, 1, 2, 3])
    assert index.draft(1) == ([60], 4)
    index = LookupIndex([9, 1, 2, 3, 50, 8, 1, 2, 3, 60])
    index.extend([4, 1, 2, 3])
    assert index.draft(1) == ([60], 3)


def test_a_match_may_span_the_end_of_the_prompt_and_lie_in_the_answer() -> None:
    index = LookupIndex([5, 6])
    index.extend([7, 8, 9, 5, 6, 7])
    assert index.draft(2) == ([8, 9], 3)


def test_a_copy_with_a_change_goes_on_after_the_change() -> None:
    prompt = list(range(100, 140))
    index = LookupIndex(prompt)
    index.extend(prompt[:10])
    assert index.draft(2) == ([110, 111], 10)
    index.extend([7])
    assert index.repeats and index.draft(2) == ([111, 112], 0)
    index.extend([8, 9, 10])
    assert index.draft(1) == ([114], 0)
    index.extend([11])
    assert not index.repeats and index.draft(1) == ([], 0)
    # A short match is not a copy.
    index = LookupIndex(prompt)
    index.extend(prompt[:4])
    assert index.draft(1) == ([104], 4)
    index.extend([7])
    assert index.draft(1) == ([], 0)


def test_a_text_that_repeats_itself_goes_on_repeating() -> None:
    index = LookupIndex([4, 4, 4, 4])
    assert index.draft(5) == ([4] * 5, 3)
    index = LookupIndex([0])
    index.extend([1, 2, 3] * 3)
    draft, matched = index.draft(7)
    assert draft == [1, 2, 3, 1, 2, 3, 1] and matched == 6


def test_a_draft_is_never_too_long_and_the_end_of_a_text_does_not_match_itself() -> None:
    index = LookupIndex([1, 2, 3])
    assert index.draft(8) == ([], 0)
    assert LookupIndex([]).draft(8) == ([], 0)
    assert LookupIndex([3] * 50).draft(0) == ([], 0)


def test_every_draft_equals_what_a_search_through_the_whole_text_finds() -> None:
    choose = random.Random(5)
    for _ in range(200):
        prompt = [choose.randrange(4) for _ in range(choose.randrange(30))]
        index = LookupIndex(prompt)
        text = list(prompt)
        for _ in range(20):
            token_id = choose.randrange(4)
            index.extend([token_id])
            text.append(token_id)
            draft, matched = index.draft(6)
            # With more occurrences than are compared a longer one may be missed.
            assert len(index) == len(text)
            if not draft:
                assert not any(text[i : i + 3] == text[-3:] for i in range(len(text) - 3))
                continue
            assert matched >= 3 and len(draft) == 6
            ends = [
                end
                for end in range(matched - 1, len(text) - 1)
                if text[end + 1 - matched : end + 1] == text[-matched:]
            ]
            known = text + draft
            assert any(known[end + 1 : end + 7] == draft for end in ends)
            assert matched <= LONGEST_MATCH


def test_ids_of_any_size_are_told_apart() -> None:
    big = 1 << 30
    index = LookupIndex([big, big + 1, big + 2, 7, 1, 1, 2, 8])
    index.extend([big, big + 1, big + 2])
    assert index.draft(1) == ([7], 3)


# --- the width of a step --------------------------------------------------------------------------


class Machine:
    """A machine on which a step costs `base` and `each` more for every token but one in a row."""

    def __init__(self, base_ms: float = 20.0, each_ms: float = 1.0, jump_ms: float = 0.0) -> None:
        self.base_ms, self.each_ms, self.jump_ms = base_ms, each_ms, jump_ms
        self.speculator = Speculator()
        self.spent_ms = 0.0
        self.plain_ms = 0.0
        self.widths: list[int] = []

    def step_ms(self, rows: int, width: int) -> float:
        return self.base_ms + self.each_ms * (rows * width - 1) + self.jump_ms * (width > 1)

    def run(self, rows: int, steps: int, right: Callable[[int], int], draft: int = 16) -> None:
        """`right`: how many tokens of a row's draft are right."""
        books = [RowDrafts([], []) for _ in range(rows)]
        for _ in range(steps):
            width = 1
            drafts = [Draft([1] * draft, 1) if draft else NO_DRAFT for _ in books]
            if self.speculator.worth_drafting(rows):
                width = self.speculator.plan(books, drafts, 64).tokens
            tokens = rows
            if width > 1:
                for place, (book, one) in enumerate(zip(books, drafts, strict=True)):
                    cut = Draft(one.token_ids[: width - 1], one.kind)
                    accepted = min(right(place), len(cut.token_ids))
                    self.speculator.drafted(book, cut, accepted)
                    tokens += accepted
            ms = self.step_ms(rows, width)
            self.speculator.took(rows, width, ms, tokens)
            self.spent_ms += ms
            self.plain_ms += tokens / rows * self.step_ms(rows, 1)
            self.widths.append(width)

    @property
    def gain(self) -> float:
        """Times the speed of a machine without drafts."""
        return self.plain_ms / self.spent_ms


def test_a_text_that_repeats_is_several_times_as_fast() -> None:
    machine = Machine()
    machine.run(1, 100, lambda _: 16)
    assert machine.gain > 6
    assert max(machine.widths) == WIDTHS[-1]


@pytest.mark.parametrize("jump_ms", [0.0, 10.0, 60.0])
@pytest.mark.parametrize("rows", [1, 4, 8, 32])
def test_drafts_that_are_never_right_cost_less_than_three_in_a_hundred(
    rows: int, jump_ms: float
) -> None:
    machine = Machine(jump_ms=jump_ms)
    machine.run(rows, 400, lambda _: 0)
    assert 0.97 < machine.gain <= 1


@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize("share", [0.1, 0.3, 0.5])
def test_drafts_that_are_sometimes_right_never_cost_more_than_they_gain(
    rows: int, share: float
) -> None:
    choose = random.Random(3)

    def right(_: int) -> int:
        count = 0
        while choose.random() < share:
            count += 1
        return count

    machine = Machine()
    machine.run(rows, 600, right)
    assert machine.gain > 0.97


def test_a_draft_is_tried_again_now_and_then_and_found_to_be_right() -> None:
    machine = Machine()
    machine.run(1, 300, lambda _: 0)
    before = len(machine.widths)
    tried = sum(width > 1 for width in machine.widths)
    assert 3 < tried < 60
    machine.run(1, 200, lambda _: 16)
    assert max(machine.widths[before:]) == WIDTHS[-1]


def test_a_draft_of_one_row_may_not_slow_the_others_much() -> None:
    machine = Machine(base_ms=20, each_ms=4)
    machine.run(8, 300, lambda place: 16 if place == 0 else 0)
    wide = [width for width in machine.widths if width > 1]
    # Two tokens of eight rows take 1.7 times as long.
    assert len(wide) < 30


def test_a_full_batch_that_is_bound_by_computing_drafts_nothing() -> None:
    machine = Machine(base_ms=20, each_ms=20)
    machine.run(32, 300, lambda _: 1, draft=1)
    assert sum(width > 1 for width in machine.widths) < 30
    assert all(32 * width <= MOST_TOKENS for width in machine.widths)


def test_a_machine_that_becomes_slower_is_measured_again() -> None:
    machine = Machine()
    machine.run(1, 400, lambda _: 16)
    assert machine.widths.count(1) >= 5


def test_no_draft_and_no_measurement_mean_an_ordinary_step() -> None:
    speculator = Speculator()
    row = RowDrafts([], [])
    assert not speculator.worth_drafting(1)
    assert speculator.plan([row], [Draft([1, 2, 3])], 64).tokens == 1
    speculator.took(1, 1, 20.0, 1)
    assert speculator.worth_drafting(1)
    assert speculator.plan([row], [NO_DRAFT], 64).tokens == 1
    assert speculator.plan([row], [Draft([1, 2, 3])], 64).tokens > 1
    assert speculator.plan([row], [Draft([1, 2, 3])], 1).tokens == 1


def test_a_slow_step_by_chance_does_not_end_drafts_that_pay() -> None:
    machine = Machine()
    machine.run(1, 20, lambda _: 16)
    machine.speculator.took(1, 9, 5000.0, 9)
    machine.widths.clear()
    machine.run(1, 30, lambda _: 16)
    assert max(machine.widths) >= 9


def test_draft_tokens_and_those_that_were_right_are_counted() -> None:
    speculator = Speculator()
    row = RowDrafts([], [])
    speculator.drafted(row, Draft([1, 2, 3]), 2)
    speculator.drafted(row, NO_DRAFT, 0)
    assert (speculator.draft_tokens, speculator.accepted_tokens) == (3, 2)


def test_a_draft_that_costs_as_much_as_what_it_saves_is_not_made() -> None:
    speculator = Speculator()
    row = RowDrafts([], [])
    promised = [Draft([0] * 16, BY_MODEL)]
    for _ in range(50):
        speculator.took(1, 1, 20.0, 1)
        speculator.drafted(row, Draft([1, 2, 3, 4], BY_MODEL), 3)
    cheap = speculator.plan([row], promised, 64, drafted_ms=1.0)
    dear = speculator.plan([row], promised, 64, drafted_ms=20.0)
    assert cheap.tokens > 3 and cheap.gain > 2
    assert dear.gain <= 1
