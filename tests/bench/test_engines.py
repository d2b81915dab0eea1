"""Engines in processes of their own, as `bench.engine --only engines` and `bench.gpu` drive them,
and the verdict on the goals."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest

from bench.common import Sample
from bench.engine.engines import _goals, _Load, _Measured, _table
from bench.engine.inside import inside
from bench.systems import Unavailable

ECHO = {"engine": "echo", "model_names": [["bench"]], "slots": 4}
PROMPTS = [[10, 11, 12], [20, 21], [30]]


def described(**engine_args: str) -> list[str]:
    return [json.dumps(ECHO | {"engine_args": {"mode": "sampled", **engine_args}})]


def test_an_engine_of_ours_answers_lines_in_a_process_of_its_own() -> None:
    with inside(sys.executable, "tokenbus", described(), {}) as engine:
        engine.wait_ready()
        figures = engine.run(PROMPTS, 5)
        assert figures["tokens_per_s"] > 0 and figures["cpu_us_per_token"] > 0
        assert 0 < figures["ttft_ms"] <= figures["last_ttft_ms"]
        assert figures["gap_ms"] <= figures["gap_p99_ms"]


def test_a_failure_is_told_and_the_engine_goes_on() -> None:
    with inside(sys.executable, "tokenbus", described(context_tokens="64"), {}) as engine:
        engine.wait_ready()
        with pytest.raises(RuntimeError, match="requests failed"):
            engine.run([[1] * 100], 5)
        assert engine.run(PROMPTS, 2)["tokens_per_s"] > 0


def test_an_engine_that_cannot_load_says_why() -> None:
    options = [json.dumps(ECHO | {"engine_args": {"colour": "red"}})]
    with (
        inside(sys.executable, "tokenbus", options, {}) as engine,
        pytest.raises(Unavailable, match=r"ended with status 1: .*colour"),
    ):
        engine.wait_ready()


def measured(system: str, where: str = "served", **figures: float) -> _Measured:
    samples: dict[str, Any] = {name: Sample((value, value)) for name, value in figures.items()}
    return _Measured(where, system, _Load(16, 64, 8), samples)


def test_goals_name_what_is_missed() -> None:
    rows = [
        measured("tokenbus", tokens_per_s=130, ttft_ms=90, gap_p99_ms=30, cpu_us_per_token=70),
        measured("vllm", tokens_per_s=100, ttft_ms=100, gap_p99_ms=20, cpu_us_per_token=100),
        measured("bus_vllm", tokens_per_s=104, ttft_ms=100, gap_p99_ms=20, cpu_us_per_token=60),
    ]
    ours, through_the_bus = _goals(rows)
    assert "tokens_per_s 1.30 (1.25)" in ours and "ttft_ms 0.90 (1)" in ours
    assert "gap_p99_ms 1.50 (1, missed)" in ours and "cpu_us_per_token 0.70 (0.5, missed)" in ours
    assert "bus_vllm over vllm: tokens_per_s 1.04 (1.05, missed), ttft_ms 1.00 (1)" in (
        through_the_bus
    )


def test_in_the_process_both_peers_set_the_goal() -> None:
    rows = [
        measured("tokenbus", "process", cpu_us_per_token=50),
        measured("vllm", "process", cpu_us_per_token=40),
        measured("llamacpp", "process", cpu_us_per_token=60),
    ]
    beside_vllm, beside_llamacpp = _goals(rows)
    assert "over vllm: cpu_us_per_token 1.25 (1, missed)" in beside_vllm
    assert "over llamacpp: cpu_us_per_token 0.83 (1)" in beside_llamacpp
    assert "| process | 16 | 8 | vllm | – | – | – | 40 |" in list(_table(rows))
