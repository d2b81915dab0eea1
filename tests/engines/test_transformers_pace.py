"""Pieces of prompts: what they cost is learned, and the bound on a step holds; with a clock of the
test's own, so that nothing depends on the machine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from tests.engines import tiny

pytest.importorskip("transformers", reason="install tokenbus[worker]")

from worker.engines.transformers.pace import (
    SMALLEST_PIECE,
    Load,
    PrefillCostModel,
    StepBudget,
)
from worker.engines.transformers.packing import Along, even_runs
from worker.engines.transformers.slots import SlotRunner
from worker.engines.transformers.step_costs import StepCosts

BOUND_MS = 100.0
DECODE_MS = 12 + 0.8 * 9
"""A decode of nine streams."""


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
    """A forward takes 200 ms and a token 4: pieces of 8 would cost six times as much as the whole
    prompt at once, and spare a stream a third of its wait."""
    seen = pieces(PrefillCostModel(), 400, lambda tokens, start: 10 * cost_ms(tokens, start))
    assert sum(tokens for tokens, _ in seen) == 400
    assert len(seen) < 15
    assert 200 <= max(ms for _, ms in seen[1:]) <= 2.3 * 200


def test_where_tokens_cost_more_than_a_forward_the_smallest_piece_is_small() -> None:
    seen = pieces(PrefillCostModel(), 600, lambda tokens, start: 10.0 + 20.0 * tokens)
    assert {tokens for tokens, _ in seen[2:-1]} == {SMALLEST_PIECE}


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


def test_rows_that_decode_in_the_same_forward_count_towards_its_time() -> None:
    pace = PrefillCostModel()
    pieces(pace, 1000, cost_ms)
    step, fuller = (StepBudget(pace, 256, BOUND_MS) for _ in range(2))
    fuller.along = Load(60, 60 * 500)
    assert fuller.piece(0) < step.piece(0) - 50


class Machine:
    """The engine on a machine that others use too: forward passes move its clocks, and the wall
    clock runs `load` times as fast as the CPU time of the engine."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, load: float) -> None:
        self.cpu_s = 0.0
        self.load = load
        monkeypatch.setattr("time.thread_time", lambda: self.cpu_s)
        monkeypatch.setattr("time.process_time", lambda: self.cpu_s)
        monkeypatch.setattr("time.perf_counter", lambda: self.load * self.cpu_s)
        self.engine = tiny.serve(
            tiny.llama(context=4096),
            kv_tokens=200_000,
            stall_ms=BOUND_MS,
            slots=33,
            prefix_tokens=0,
            prefill_chunk=256,
        )
        runner = self.engine._served[0].runner
        assert isinstance(runner, SlotRunner)
        self.runner, forward = runner, runner.forward
        #: Tokens of each forward of prompts.
        self.computed: list[int] = []
        prefill, prefill_many, decode = forward.prefill, forward.prefill_many, forward.decode

        def one(slot: int, sequence: Any, start: int, end: int, **more: Any) -> Any:
            self.take(end - start, start, more.get("along"))
            return prefill(slot, sequence, start, end, **more)

        def many(slot: int, sequences: list[Any], along: Along | None = None) -> Any:
            self.take(len(sequences) * max(s.total - s.filled for s in sequences), 0, along)
            return prefill_many(slot, sequences, along)

        def decoded(sequences: list[Any]) -> Any:
            self.cpu_s += (12 + 0.8 * len(sequences)) / 1e3
            return decode(sequences)

        monkeypatch.setattr(forward, "prefill", one)
        monkeypatch.setattr(forward, "prefill_many", many)
        monkeypatch.setattr(forward, "decode", decoded)

    def take(self, tokens: int, start: int, along: Along | None) -> None:
        decoded = len(along.sequences) if along is not None else 0
        self.cpu_s += (cost_ms(tokens, start) + 0.8 * decoded) / 1e3
        self.computed.append(tokens)

    def streams(self, count: int) -> None:
        """Streams that run until the engine is closed."""
        for ids in tiny.prompts(count, low=5, high=9):
            self.engine.add(tiny.ids_job(ids, max_tokens=3000))
        while self.runner.counts().batch < count:
            self.engine.step()


@pytest.fixture(params=[1.0, 10.0], ids=["quiet", "busy"])
def machine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    made = Machine(monkeypatch, request.param)
    yield made
    made.engine.close()


def test_running_streams_wait_for_a_long_prompt_no_longer_than_the_bound(machine: Machine) -> None:
    """The scheduler itself. The bound holds in the engine's own time: however busy the machine, the
    prompt slows the streams by the same factor, in as many pieces."""
    machine.streams(8)
    long = tiny.ids_job(tiny.prompts(1, low=3000, high=3000)[0], max_tokens=2)
    machine.engine.add(long)
    machine.computed.clear()
    waits = []
    while machine.engine._jobs.get(long.request_id):
        before_s = machine.cpu_s
        machine.engine.step()
        waits.append((machine.cpu_s - before_s) * 1e3)
    assert sum(machine.computed) == 3000
    assert max(waits) <= BOUND_MS + DECODE_MS
    assert len(machine.computed) < 70


def test_others_on_the_machine_make_no_prompts_smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pace that learnt wall time cut prompts the smaller the busier the machine was, and so made
    it busier: at a load of ten each prompt got a forward of its own."""
    counts: dict[float, int] = {}
    for load in (1.0, 10.0):
        with monkeypatch.context() as patch:
            machine = Machine(patch, load)
            try:
                machine.streams(1)
                jobs = [
                    tiny.ids_job(ids, max_tokens=2) for ids in tiny.prompts(32, low=16, high=16)
                ]
                for job in jobs:
                    machine.engine.add(job)
                tiny.await_prepared(machine.engine)
                machine.computed.clear()
                while any(job.request_id in machine.engine._jobs for job in jobs):
                    machine.engine.step()
                assert sum(machine.computed) == 32 * 16
                counts[load] = len(machine.computed)
            finally:
                machine.engine.close()
    assert counts[10.0] <= counts[1.0] < 10


def test_streams_get_a_token_with_every_forward_of_prompts(machine: Machine) -> None:
    """They used to wait until all prompts that came together were computed: four forwards."""
    if not machine.runner.forward.packs:
        pytest.skip("forwards are not packed here: there is no C compiler")
    pieces(machine.runner.costs.pace, 600, cost_ms)
    machine.streams(8)
    jobs = [tiny.ids_job(ids, max_tokens=2) for ids in tiny.prompts(24, low=40, high=40)]
    for job in jobs:
        machine.engine.add(job)
    tiny.await_prepared(machine.engine)
    streams = set(machine.engine._jobs) - {job.request_id for job in jobs}
    machine.computed.clear()
    while any(job.request_id in machine.engine._jobs for job in jobs):
        forwards = len(machine.computed)
        events = machine.engine.step()
        assert len(machine.computed) <= forwards + 1
        assert streams <= {event.request_id for event in events}
    assert sum(machine.computed) == 24 * 40
    assert len(machine.computed) <= 12


def test_short_prompts_that_keep_coming_in_pairs_do_not_starve_a_long_one(
    machine: Machine,
) -> None:
    """Prompts computed together took all tokens of every step, the half of the oldest too."""
    machine.streams(2)
    long = tiny.ids_job(tiny.prompts(1, low=1000, high=1000)[0], max_tokens=1)
    machine.engine.add(long)
    tiny.await_prepared(machine.engine)
    short = iter(tiny.prompts(200, low=20, high=20))
    for pair in zip(short, short, strict=True):
        if long.request_id not in machine.engine._jobs:
            break
        for ids in pair:
            machine.engine.add(tiny.ids_job(ids, max_tokens=1))
        tiny.await_prepared(machine.engine)
        machine.engine.step()
    assert long.request_id not in machine.engine._jobs


class Accelerator:
    """Stands in for a device that runs asynchronously: events happen when its work gets there."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.launched_ms = self.done_ms = 0.0
        device = self

        class Event:
            def __init__(self, of: torch.device, *, enable_timing: bool) -> None:
                assert enable_timing
                self.at_ms = 0.0

            def record(self, stream: object) -> None:
                self.at_ms = device.launched_ms

            def query(self) -> bool:
                return self.at_ms <= device.done_ms

            def synchronize(self) -> None:
                device.done_ms = max(device.done_ms, self.at_ms)

            def elapsed_time(self, other: Event) -> float:
                assert self.query() and other.query()
                return other.at_ms - self.at_ms

        monkeypatch.setattr("torch.Event", Event)
        monkeypatch.setattr("torch.accelerator.current_stream", lambda of: None)


def test_on_an_accelerator_pieces_take_what_the_device_takes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """However long the host was away between launch and reading; and nothing waits for it."""
    device = Accelerator(monkeypatch)
    costs = StepCosts(torch.device("cuda"))
    step = StepBudget(costs.pace, 4096, 1000.0)
    for tokens in (100, 200):
        started = costs.start()
        device.launched_ms += cost_ms(tokens, 0)
        costs.computed_piece(step, tokens, 0, 1, started)
        device.launched_ms += 30.0  # a decode
    costs.measure()
    assert not costs.pace.known
    device.done_ms = device.launched_ms
    costs.measure()
    assert costs.pace.predicted_ms(200, 0) == pytest.approx(cost_ms(200, 0), rel=0.1)
    assert step.tokens == 4096 - 300


def test_a_device_without_times_is_bounded_by_its_chunk(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def none(*_: Any, **__: Any) -> None:
        raise RuntimeError("no events here")

    monkeypatch.setattr("torch.Event", none)
    costs = StepCosts(torch.device("cuda"))
    step = StepBudget(costs.pace, 256, 1000.0)
    costs.computed_piece(step, 100, 0, 1, costs.start())
    costs.measure()
    assert step.piece(100) == 156
    assert "bounded by prefill_chunk" in caplog.text


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
    assert even_runs(lengths, worth=7000) == runs


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
