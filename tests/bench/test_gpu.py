"""`bench.gpu` as far as a CPU goes: a tiny model, written, loaded in a process of its own and
measured."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench.common import ROOT
from bench.gpu import main

needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")


def gpu(*options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "bench.gpu", *options]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


@needs_no_gpu
def test_a_tiny_run_measures_steps_and_prefill_beside_their_floors(tmp_path: Path) -> None:
    file = tmp_path / "gpu.json"
    run = gpu("--tiny", "--streams", "2", "--without", "no_graphs,8bit,4bit", "--json", str(file))
    assert run.returncode == 0, run.stderr
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    (step,) = (row for row in rows if row["name"] == "gpu_step_ms")
    assert step["variant"] == "graphs" and step["streams"] == 2
    assert step["value"] > 0 and step["peer"] == "floor" and step["ratio"] > 0
    assert {row["prompts"] for row in rows if row["name"] == "gpu_prefill_ms"} == {1, 8}
    notes = " ".join(row["text"] for row in rows if row["name"] == "note")
    assert "its figures mean nothing" in notes
    assert "out of memory: not tried" in notes


@needs_no_gpu
def test_what_there_is_no_time_for_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu", "--tiny", "--seconds", "0", "--without", "vllm"])
    main()
    said = capsys.readouterr().out
    for variant in ("graphs", "no_graphs", "8bit", "4bit"):
        assert f"note: {variant} was left out: no time was left" in said


@needs_no_gpu
def test_without_a_gpu_it_says_how_to_try_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu"])
    with pytest.raises(SystemExit, match="there is no CUDA device; --tiny checks the script on a"):
        main()
