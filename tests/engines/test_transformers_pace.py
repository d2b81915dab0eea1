"""Pieces of prompts: what they cost is learned, and the bound on a step holds; with a clock of the
test's own, so that nothing depends on the machine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.engines import tiny

pytest.importorskip("transformers", reason="install tokenbus[worker]")

from worker.engines.transformers.forward import _runs
from worker.engines.transformers.pace import SMALLEST_PIECE, PrefillCostModel, StepBudget
from worker.engines.transformers.slots import SlotRunner

BOUND_MS = 100.0


def cost_ms(tokens: int, start: int) -> float:
    """A machine: 20 ms to read the weights, 0.4 ms a token, and attention."""
    return 20 + 0.4 * tokens + 0.0005 * tokens * (start + tokens / 2)


def pieces(
    pace: PrefillCostModel, prompt: int, cost: Callable[[int, int], float], start: int = 0
) -> list[tuple[int, float]]:
    """A prompt computed step by step: tokens and milliseconds of each."""
    seen = []
    while start < prompt:
        step = StepBudget(pace, 256, BOUND_MS)
        tokens = min(step.piece(start), prompt - start)
        spent = cost(tokens, start)
        pace.learn(tokens, start, spent)
        seen.append((tokens, spent))
        start += tokens
    return seen


def test_no_piece_of_a_long_prompt_takes_longer_than_the_bound() -> None:
    pace = PrefillCostModel()
    pace.learn(8, 0, cost_ms(8, 0))
    seen = pieces(pace, 8000, cost_ms)
    assert max(ms for _, ms in seen) <= BOUND_MS
    # The bound is used, not merely kept, and pieces shrink as attention grows.
    assert sum(ms for _, ms in seen) / len(seen) > 0.6 * BOUND_MS
    assert seen[3][0] > 2 * seen[-2][0] > 2 * SMALLEST_PIECE


def test_a_short_prompt_says_little_about_a_long_one() -> None:
    """Five tokens take almost as long as fifty: pieces grow as soon as that is measured."""
    pace = PrefillCostModel()
    for _ in range(20):
        pace.learn(5, 0, cost_ms(5, 0))
    seen = pieces(pace, 1500, cost_ms)
    assert seen[0][0] < 40
    assert seen[3][0] > 80


def test_the_first_long_piece_keeps_the_bound_though_short_ones_told_nothing_of_it() -> None:
    """The very first prompts came into a cold cache: the larger of two took less time than the
    smaller, as if tokens cost nothing."""
    pace = PrefillCostModel()
    pace.learn(24, 0, 45.0, rows=3)
    pace.learn(40, 0, 34.0, rows=5)
    seen = pieces(pace, 1000, cost_ms)
    assert max(ms for _, ms in seen) <= BOUND_MS


def test_a_single_disturbance_is_forgotten_within_a_few_steps() -> None:
    pace = PrefillCostModel()
    pieces(pace, 2000, cost_ms)
    usual = pace.tokens(500, BOUND_MS, 256)
    pace.learn(100, 500, 8 * cost_ms(100, 500))
    assert SMALLEST_PIECE < pace.tokens(500, BOUND_MS, 256) < usual
    for _ in range(12):
        pace.learn(100, 500, cost_ms(100, 500))
    assert pace.tokens(500, BOUND_MS, 256) > 0.8 * usual


def test_a_machine_that_becomes_slower_is_followed() -> None:
    pace = PrefillCostModel()
    pieces(pace, 2000, cost_ms)
    seen = pieces(pace, 4000, lambda tokens, start: 1.8 * cost_ms(tokens, start), start=2000)
    assert max(ms for _, ms in seen[2:]) <= BOUND_MS


def test_a_bound_that_cannot_be_kept_stops_no_prompt() -> None:
    seen = pieces(PrefillCostModel(), 400, lambda tokens, start: 10 * cost_ms(tokens, start))
    assert sum(tokens for tokens, _ in seen) == 400
    assert seen[-2][0] == SMALLEST_PIECE


def test_several_prompts_in_a_step_share_its_allowance() -> None:
    pace = PrefillCostModel()
    pieces(pace, 1000, cost_ms)
    step = StepBudget(pace, 256, BOUND_MS)
    spent = 0.0
    while tokens := min(step.piece(0), 30):
        step.spend(tokens, cost_ms(tokens, 0))
        spent += cost_ms(tokens, 0)
    assert spent <= BOUND_MS


def test_time_for_admission_counts_as_part_of_the_step() -> None:
    """Room for a long prompt was made in 50 ms, and its first piece then took the whole bound."""
    pace = PrefillCostModel()
    pieces(pace, 1000, cost_ms)
    step, late = (StepBudget(pace, 256, 1000.0) for _ in range(2))
    step.tighten(BOUND_MS, 0.0)
    late.tighten(BOUND_MS, 50.0)
    assert cost_ms(late.piece(0), 0) + 50.0 <= BOUND_MS < cost_ms(step.piece(0), 0) + 50.0


def test_running_streams_wait_for_a_long_prompt_no_longer_than_the_bound(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The scheduler itself, on a clock that only forward passes move."""
    model = tiny.llama(context=4096)
    engine = tiny.serve(model, kv_tokens=200_000, stall_ms=BOUND_MS, slots=9, prefix_tokens=0)
    runner = engine._served[0].runner
    assert isinstance(runner, SlotRunner)
    now = 0.0
    prefill, prefill_many = runner.forward.prefill, runner.forward.prefill_many
    computed: list[tuple[int, float]] = []

    def one(slot: int, sequence: Any, start: int, end: int, **more: Any) -> Any:
        nonlocal now
        now += cost_ms(end - start, start) / 1e3
        computed.append((end - start, cost_ms(end - start, start)))
        return prefill(slot, sequence, start, end, **more)

    def many(slot: int, sequences: list[Any]) -> Any:
        nonlocal now
        now += cost_ms(len(sequences) * max(s.total for s in sequences), 0) / 1e3
        return prefill_many(slot, sequences)

    monkeypatch.setattr(runner.costs, "now_s", lambda: now)
    monkeypatch.setattr(runner.forward, "prefill", one)
    monkeypatch.setattr(runner.forward, "prefill_many", many)
    streams = [tiny.ids_job(ids, max_tokens=2000) for ids in tiny.prompts(8, low=5, high=9)]
    long = tiny.ids_job(tiny.prompts(1, low=3000, high=3000)[0], max_tokens=2)
    try:
        for job in streams:
            engine.add(job)
        while runner.counts().batch < 8:
            engine.step()
        engine.add(long)
        computed.clear()
        waits = []
        while engine._jobs.get(long.request_id):
            before = now
            engine.step()
            waits.append((now - before) * 1e3)
        assert sum(tokens for tokens, _ in computed) == 3000
        assert max(waits) <= BOUND_MS
    finally:
        engine.close()


@pytest.mark.parametrize(
    ("lengths", "runs"),
    [
        ([10, 12, 11], [(0, 3)]),
        ([100] * 8 + [8000], [(0, 8), (8, 9)]),
        ([8000] + [100] * 8, [(0, 1), (1, 9)]),
        ([100] * 8 + [8000] + [100] * 4, [(0, 8), (8, 9), (9, 13)]),
        ([900, 1000, 1100, 1200], [(0, 4)]),
        ([5], [(0, 1)]),
    ],
)
def test_a_long_row_is_decoded_apart_where_that_spares_reading(
    lengths: list[int], runs: list[tuple[int, int]]
) -> None:
    assert _runs(lengths, worth=7000) == runs


def test_rows_decoded_apart_answer_as_together() -> None:
    model = tiny.llama(context=4096)
    engine = tiny.serve(model, kv_tokens=200_000, slots=9)
    runner = engine._served[0].runner
    assert isinstance(runner, SlotRunner)
    runner.forward._weight_bytes = 0
    prompts = [*tiny.prompts(4, low=5, high=9), *tiny.prompts(1, low=700, high=700)]
    try:
        seen = tiny.run(engine, [tiny.ids_job(ids, max_tokens=12) for ids in prompts])
        for ids, answer in zip(prompts, seen, strict=True):
            assert answer.token_ids == tiny.generated(
                model, {"input_ids": torch.tensor([ids])}, 12, ()
            )
    finally:
        engine.close()
