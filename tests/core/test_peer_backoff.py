"""The back-off of peers that dial out, in virtual time (SPEC section 5)."""

from __future__ import annotations

import random

import pytest

from broker.peer.backoff import (
    ABSENT_LONGEST_S,
    BACKOFF_FIRST_S,
    GREETING_LONGEST_S,
    REFUSED_LONGEST_S,
    SESSION_PROVEN_S,
    Backoff,
)


class _Highest(random.Random):
    """Always draws the ceiling."""

    def uniform(self, a: float, b: float) -> float:
        return b


def test_back_off_prolongs_an_absence_by_a_quarter_at_most() -> None:
    backoff = Backoff(_Highest())
    waits = {absent_s: backoff.next_s(100.0 + absent_s) for absent_s in (0, 1, 4, 20, 3600)}
    assert waits == {0: BACKOFF_FIRST_S, 1: 0.5, 4: 1.0, 20: 5.0, 3600: ABSENT_LONGEST_S}


def test_waits_are_drawn_from_zero_to_their_ceiling() -> None:
    backoff = Backoff(random.Random(1))
    waits = [backoff.next_s(0.0) for _ in range(100)]
    assert min(waits) < 0.02 and 0.48 < max(waits) <= BACKOFF_FIRST_S


def test_refusals_double_the_wait_up_to_a_ceiling() -> None:
    backoff = Backoff(_Highest())
    waits = [backoff.next_s(0.0, refused=True) for _ in range(7)]
    assert waits == [1, 2, 4, 8, 16, REFUSED_LONGEST_S, REFUSED_LONGEST_S]


def test_a_time_named_by_the_broker_is_kept_and_jittered() -> None:
    backoff = Backoff(random.Random(1))
    waits = [backoff.hinted_s(1.0) for _ in range(100)]
    assert 1.0 <= min(waits) < 1.02 and 1.48 < max(waits) <= 1.5
    assert backoff.next_s(0.0) <= BACKOFF_FIRST_S, "it is not a failure"


@pytest.mark.parametrize(
    ("lasted_s", "refused", "anew"),
    [
        (0.0, False, True),
        (3600.0, False, True),
        (SESSION_PROVEN_S, True, True),
        (SESSION_PROVEN_S / 2, True, False),
    ],
)
def test_waits_are_reset_by_any_session_except_one_refused_right_after_welcome(
    lasted_s: float, refused: bool, anew: bool
) -> None:
    backoff = Backoff(_Highest())
    backoff.next_s(0.0, refused=True)
    backoff.next_s(0.0, refused=True)
    backoff.session_over(lasted_s, refused=refused)
    assert backoff.next_s(3600.0, refused=refused) == ((1.0 if refused else 0.5) if anew else 10.0)


def test_after_an_unanswered_hello_the_next_one_gets_more_time() -> None:
    backoff = Backoff(random.Random(1))
    patience = []
    for _ in range(4):
        patience.append(backoff.greeting_s)
        backoff.unanswered()
    assert patience == [5, 10, GREETING_LONGEST_S, GREETING_LONGEST_S]
    backoff.reset()
    assert backoff.greeting_s == 5
