"""Heartbeats in virtual time (SPEC section 5)."""

from __future__ import annotations

from broker.protocol.liveness import Liveness


def test_a_peer_is_lost_after_interval_times_liveness_of_silence() -> None:
    liveness = Liveness(1.0, 5, now_s=100.0)
    assert liveness.dead_at_s == 105.0
    liveness.heard(103.0)
    assert liveness.dead_at_s == 108.0
    assert liveness.silent_s(104.5) == 1.5


def test_a_heartbeat_is_due_one_interval_after_the_last_message_of_any_kind() -> None:
    liveness = Liveness(2.0, 3, now_s=0.0)
    assert liveness.beat_due_s == 2.0
    liveness.sent(1.5)
    assert liveness.beat_due_s == 3.5


def test_time_while_this_process_was_stopped_does_not_count() -> None:
    liveness = Liveness(1.0, 5, now_s=0.0)
    liveness.shift(60.0)
    assert liveness.dead_at_s == 65.0
