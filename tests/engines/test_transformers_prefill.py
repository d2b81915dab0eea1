"""Prompts that come together: which are computed in one forward, in what order their first tokens
are told, and that all of it changes no answer."""

from __future__ import annotations

import copy
import random
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests.engines import tiny
from tests.engines.architectures import BATCHED, text_model
from worker.engines.base import Tokens
from worker.engines.transformers.cache import SlotCache
from worker.engines.transformers.prefix import SMALLEST_PREFIX, PrefixCache
from worker.engines.transformers.slots import SlotRunner


class Watched:
    """An engine, and the forwards that its prompts took."""

    def __init__(self, model: Any, **settings: Any) -> None:
        # The engine changes layers of its model.
        self.plain = copy.deepcopy(model)
        wanted: dict[str, Any] = {"prefill_chunk": 512, "prefix_tokens": 0, "kv_tokens": 16_384}
        self.engine = tiny.serve(model, **(wanted | settings))
        runner = self.engine._served[0].slot_runner
        assert isinstance(runner, SlotRunner)
        self.runner = runner
        #: Name of each forward, and its prompts.
        self.forwards: list[tuple[str, int]] = []
        forward: Any = runner.forward
        for name in ("prefill_many", "prefill_fanned"):
            setattr(forward, name, self._counted(name, getattr(forward, name)))
        one = forward.prefill

        def alone(*arguments: Any, **options: Any) -> Any:
            self.forwards.append(("prefill", 1))
            return one(*arguments, **options)

        forward.prefill = alone

    def _counted(self, name: str, compute: Any) -> Any:
        def counted(slot: int, sequences: list[Any], *more: Any) -> Any:
            self.forwards.append((name, len(sequences)))
            return compute(slot, sequences, *more)

        return counted

    def answers(self, asked: list[list[int]], count: int = 6) -> list[tiny.Answer]:
        return tiny.run_at_once(self.engine, [tiny.ids_job(ids, max_tokens=count) for ids in asked])

    def written(self, ids: list[int], count: int = 6) -> list[int]:
        return tiny.generated(self.plain, {"input_ids": torch.tensor([ids])}, count, ())


def alike(count: int, common: int = 100) -> list[list[int]]:
    """Prompts with a common beginning; some have two tokens more in common."""
    head, *tails = tiny.prompts(count + 1, low=3, high=20, seed=4)
    [head] = tiny.prompts(1, low=common, high=common, seed=3)
    return [head + ([7, 8] if number % 3 == 2 else []) + tail for number, tail in enumerate(tails)]


@pytest.mark.parametrize("name", BATCHED)
def test_prompts_that_begin_alike_are_computed_as_one_row(name: str) -> None:
    watched = Watched(text_model(name), slots=8)
    asked = alike(7)
    try:
        answers = watched.answers(asked)
        assert [a.token_ids for a in answers] == [watched.written(ids) for ids in asked]
        if watched.runner.forward.branches:
            # The first one computes what is common; the others follow it together.
            together = "prefill_many" if watched.runner.forward.packs else "prefill_fanned"
            assert watched.forwards == [("prefill", 1), (together, 6)]
            cached = [a.ended.usage.cached_tokens for a in answers if a.ended is not None]
            assert cached[0] == 0 and min(cached[1:]) >= 100
    finally:
        watched.engine.close()


@pytest.mark.parametrize("fused", ["on", "off"])
def test_prompts_after_a_kept_prefix_are_computed_as_one_row(fused: str) -> None:
    watched = Watched(tiny.llama(), slots=8, prefix_tokens=4096, fused=fused)
    first, *asked = alike(7)
    try:
        watched.answers([first])
        watched.forwards.clear()
        answers = watched.answers(asked)
        assert [a.token_ids for a in answers] == [watched.written(ids) for ids in asked]
        together = "prefill_many" if watched.runner.forward.packs else "prefill_fanned"
        assert watched.forwards == [(together, 6)]
    finally:
        watched.engine.close()


def test_rests_that_find_no_room_after_the_prefix_are_computed_otherwise() -> None:
    """The budget holds the rows and nothing more."""
    watched = Watched(tiny.llama(), slots=8, kv_tokens=8 * 128, fused="off")
    asked = [ids[:119] for ids in alike(7)]
    try:
        answers = watched.answers(asked)
        assert [a.token_ids for a in answers] == [watched.written(ids) for ids in asked]
        assert max(count for name, count in watched.forwards if name == "prefill_fanned") < 6
        cache = watched.runner.cache
        assert cache.slots * cache.capacity <= 8 * 128
    finally:
        watched.engine.close()


def test_a_forward_of_prompts_that_fails_is_repeated_one_by_one(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    watched = Watched(tiny.llama(), slots=8, fused="off")
    asked = alike(5)

    def broken(*_: Any) -> Any:
        raise RuntimeError("no fan here")

    monkeypatch.setattr(watched.runner.forward, "prefill_fanned", broken)
    try:
        answers = watched.answers(asked)
        assert [a.token_ids for a in answers] == [watched.written(ids) for ids in asked]
        assert "no fan here" in caplog.text
    finally:
        watched.engine.close()


def test_rows_and_prompts_are_computed_apart_where_together_they_fail(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    watched = Watched(tiny.llama(), slots=8)
    forward: Any = watched.runner.forward
    if not forward.packs:
        pytest.skip("forwards are not packed here: there is no C compiler")
    packed, tried = forward._packed, []

    def broken(layout: Any, along: Any = None) -> Any:
        if along is not None:
            tried.append(along)
            raise RuntimeError("not these together")
        return packed(layout)

    monkeypatch.setattr(forward, "_packed", broken)
    asked = [*tiny.prompts(3, low=5, high=5), *tiny.prompts(3, low=70, high=90)]
    try:
        answers = watched.answers(asked)
        assert [a.token_ids for a in answers] == [watched.written(ids) for ids in asked]
        assert len(tried) == 1
        assert "not these together" in caplog.text
    finally:
        watched.engine.close()


def test_first_tokens_do_not_wait_for_later_prompts() -> None:
    """Two short prompts are computed first, and their tokens sent at once. Then two longer ones are
    computed, where forwards are packed together with the next tokens of the short ones, else before
    the decode, which serves all four."""
    # The first forwards of a process may take long, which is not what is looked at here.
    watched = Watched(tiny.llama(), slots=8, stall_ms=1e6, idle_ms=1e6)
    asked = [*tiny.prompts(2, low=5, high=5), *tiny.prompts(2, low=60, high=60)]
    jobs = [tiny.ids_job(ids, max_tokens=6) for ids in asked]
    forward: Any = watched.runner.forward
    decode, decoded = forward.decode, []

    def counted(sequences: list[Any]) -> Any:
        decoded.append(len(sequences))
        return decode(sequences)

    forward.decode = counted
    try:
        for job in jobs:
            watched.engine.add(job)
        tiny.await_prepared(watched.engine)
        for wanted in (jobs[:2], jobs if forward.packs else jobs[2:]):
            told: list[bytes] = []
            while not told:  # a step may wait for requests that have just come
                events = watched.engine.step()
                told = [e.request_id for e in events if isinstance(e, Tokens)]
            assert sorted(told) == sorted(job.request_id for job in wanted)
        assert watched.forwards == [("prefill_many", 2)] * 2 and decoded == []
        watched.engine.step()
        assert decoded == [4]
    finally:
        watched.engine.close()


def test_rows_share_a_beginning_and_get_their_rests() -> None:
    cache = SlotCache(2, slots=4, capacity=64)
    states = torch.randn(1, 2, 30, 8)
    for layer in range(2):
        cache.plan.prefill(1, 0)
        cache.update(states, states + layer, layer)
    cache.share(1, 2, 4, 20)
    cache.spread(1, 20, [3, 5, 2])
    for layer in range(2):
        values = cache.slot_layers[layer].values
        whole = (states + layer)[0].transpose(0, 1)
        for row, (start, end) in enumerate([(20, 23), (23, 28), (28, 30)], 1):
            assert torch.equal(values[row, :20], whole[:20])
            assert torch.equal(values[row, 20 : 20 + end - start], whole[start:end])


@dataclass
class Row:
    """What the prefix cache reads of a sequence."""

    ids: list[int]
    adapter: str | None = None
    answer: list[int] = field(default_factory=list)

    @property
    def prompt(self) -> Any:
        return SimpleNamespace(key=np.asarray(self.ids, dtype=np.int64), media_end=0)

    @property
    def kept_tokens(self) -> int:
        return len(self.ids)


def test_the_longest_common_beginning_is_found_among_many() -> None:
    """As by comparing with every row that was kept, of each adapter."""
    choose = random.Random(5)
    prefix = PrefixCache(1 << 30)
    kept: list[Row] = []
    for _ in range(400):
        # Few different tokens: many rows have something in common, and some contain others.
        ids = [choose.randrange(2) for _ in range(choose.randint(SMALLEST_PREFIX, 26))]
        row: Any = Row(ids, choose.choice([None, "adapter"]))
        wanted = max(
            (
                next((i for i, (a, b) in enumerate(zip(ids, one.ids, strict=False)) if a != b), 99)
                if ids[: len(one.ids)] != one.ids[: len(ids)]
                else min(len(ids), len(one.ids))
                for one in kept
                if one.adapter == row.adapter
            ),
            default=0,
        )
        _, found = prefix.longest(row, 1000)
        assert found == (wanted if wanted >= SMALLEST_PREFIX else 0)
        prefix.store(row, lambda length: [])
        kept.append(row)
    # None that is the beginning of another is kept.
    whole = {
        (row.adapter, *row.ids)
        for row in kept
        if not any(
            row.adapter == other.adapter
            and len(row.ids) < len(other.ids)
            and other.ids[: len(row.ids)] == row.ids
            for other in kept
        )
    }
    assert prefix.tokens == sum(len(ids) - 1 for ids in whole)
    prefix.forget("adapter")
    assert prefix.tokens == sum(len(ids) - 1 for ids in whole if ids[0] is None)
