"""Number formats of weights, keys and values: memory, tokens per CPU second, and change of answers.

A model with random weights shows memory, speed and the change of its logits; the demo model, which
is trained, shows how many questions about unseen images it answers exactly. Each kind is loaded as
a worker loads it. Counts only memory that an engine itself holds.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.common import Sample, interleave, progress, repeats
from bench.engine.cases import KV_TOKENS, Setting, paired, run_engine
from bench.engine.served import save_folder
from broker.protocol.messages import ImagePart, Message, Params, Part, Request, TextPart, new_id
from worker.demo import model_path
from worker.demo.pictures import held_out
from worker.engines.base import Ended, EngineLoadError, EngineOptions, Failed, Job, Tokens
from worker.engines.common.prompt import Prompt
from worker.engines.common.sequence import Sequence as EngineSequence, bare_fields
from worker.engines.transformers import build
from worker.engines.transformers.engine import TransformersEngine

__all__ = ["KINDS", "numbers"]

PROMPT_TOKENS = 256
ANSWER_TOKENS = 32
LOGITS_TOKENS = 400
"""Tokens of the text whose logits are compared."""
TASKS, QUICK_TASKS = 300, 60
SEED = 2
"""The seed of the held-out tasks, as in worker/demo/README.md."""


@dataclass(frozen=True)
class Kind:
    """The number formats of the weights, and of keys and values."""

    weights: str
    kv: str

    def load(self, path: Path, slots: int) -> TransformersEngine:
        """Load an engine with the model in a folder. Raises `EngineLoadError`."""
        few = self.weights.partition(" ")[0]
        options = EngineOptions(
            model_paths=(str(path),),
            model_names=(("bench",),),
            device="cpu",
            dtype="bfloat16" if self.weights == "bfloat16" else "float32",
            load_8bit=few == "8",
            load_4bit=few == "4",
            slots=slots,
            engine_args={
                "kv_cache_dtype": self.kv,
                "kv_tokens": str(KV_TOKENS),
                "prefix_tokens": "0",
                "speculate": "off",
            },
        )
        engine = build(options, lambda fraction, note: None)
        assert isinstance(engine, TransformersEngine)
        return engine


KINDS = tuple(
    Kind(weights, kv)
    for weights in ("float32", "bfloat16", "8 bits", "4 bits")
    for kv in ("auto", "int8")
)


def numbers(setting: Setting) -> None:
    """Measure all kinds beside float32 with keys and values in full."""
    report, quick = setting.report, setting.arguments.quick
    counts = [count for count in setting.counts if count in (1, 8, 32)] or [1, 32]
    slots = max(counts)
    rows: dict[Kind, dict[str, Any]] = {}
    with save_folder(setting.model, setting.tokenizer) as folder:
        engines: dict[Kind, TransformersEngine] = {}
        for kind in KINDS:
            try:
                engines[kind] = kind.load(folder, slots)
            except EngineLoadError as error:
                report.note(f"weights {kind.weights}, keys and values {kind.kv}: {error}")
        (text,) = setting.token_prompts(1, LOGITS_TOKENS, LOGITS_TOKENS, seed=7)
        exact = _logits(engines[KINDS[0]], text)
        for kind, engine in engines.items():
            rows[kind] = _memory(engine) | {"change": _change(_logits(engine, text), exact)}
        for count in counts:
            _speed(setting, engines, count, rows)
        for engine in engines.values():
            engine.close()
    for kind, row in rows.items():
        progress(f"held-out tasks, weights {kind.weights}, keys and values {kind.kv}")
        row["right"] = _right(kind, QUICK_TASKS if quick else TASKS)
    for kind, row in rows.items():
        _add(setting, kind, row, rows[KINDS[0]])
    for line in _table(rows, counts, QUICK_TASKS if quick else TASKS):
        report.note(line)


def _speed(
    setting: Setting,
    engines: dict[Kind, TransformersEngine],
    count: int,
    rows: dict[Kind, dict[str, Any]],
) -> None:
    """Measure tokens per CPU second, prefill included, at one number of streams."""
    prompts = setting.token_prompts(count, PROMPT_TOKENS, PROMPT_TOKENS, seed=count)
    new = setting.arguments.new or ANSWER_TOKENS
    cases: dict[str, Callable[[], dict[str, float]]] = {
        str(kind): functools.partial(run_engine, engine, prompts, new)
        for kind, engine in engines.items()
    }
    for case in cases.values():
        case()
    seen = interleave(cases, repeats(setting.arguments))
    for kind in engines:
        rows[kind][f"speed {count}"] = seen[str(kind)]["tokens_per_cpu_s"]


# --- facts of an engine ---------------------------------------------------------------------------


def _memory(engine: TransformersEngine) -> dict[str, float]:
    """Bytes of the weights, and of a token's keys and values with its share of the work buffers."""
    runner = engine._served[0].slot_runner
    assert runner is not None
    cache = runner.cache
    return {
        "weights": runner.forward._weight_bytes,
        "token": cache.token_bytes + cache.work_bytes,
    }


@torch.inference_mode()
def _logits(engine: TransformersEngine, ids: list[int]) -> torch.Tensor:
    """The logits of a text, float32 [tokens, vocabulary], by the engine's own forward."""
    import numpy as np

    runner = engine._served[0].slot_runner
    assert runner is not None
    prompt = Prompt(ids=ids, key=np.asarray(ids, dtype=np.int64))
    sequence = EngineSequence(**bare_fields(b"", prompt, None))
    assert runner.cache.reserve(1, len(ids) + 1, 0, 0)
    return runner.forward.prefill(0, sequence, 0, len(ids), kept=range(len(ids))).float()


def _change(logits: torch.Tensor, exact: torch.Tensor) -> float:
    """Mean distance from `exact`, as a fraction of a token's spread."""
    spread = (exact - exact.mean(-1, keepdim=True)).norm(dim=-1)
    return float(((logits - exact).norm(dim=-1) / spread).mean())


# --- the demo model -------------------------------------------------------------------------------


@functools.cache
def _tasks(count: int) -> tuple[tuple[Request, tuple[bytes, ...], str], ...]:
    """Questions about images, with the right answers."""
    return tuple(_requests(count))


def _requests(count: int) -> Iterator[tuple[Request, tuple[bytes, ...], str]]:
    for images, question, answer, _ in held_out(count, SEED):
        files = []
        for image in images:
            data = io.BytesIO()
            image.save(data, "PNG")
            files.append(data.getvalue())
        parts: list[Part] = [ImagePart(attachment=index) for index in range(len(files))]
        request = Request(
            model="bench",
            messages=[Message(role="user", content=[*parts, TextPart(text=question)])],
            params=Params(temperature=0.0, max_tokens=128),
            window=1 << 30,
        )
        yield request, tuple(files), answer


def _right(kind: Kind, count: int) -> int:
    """How many of the tasks the demo model answers exactly."""
    engine = kind.load(model_path(), 32)
    tasks = _tasks(count)
    jobs = [Job(new_id(), request, files) for request, files, _ in tasks]
    said = _said(engine, jobs)
    engine.close()
    return sum(
        said[job.request_id] == answer for job, (_, _, answer) in zip(jobs, tasks, strict=True)
    )


def _said(engine: TransformersEngine, jobs: Sequence[Job]) -> dict[bytes, str]:
    said = {job.request_id: "" for job in jobs}
    for job in jobs:
        engine.add(job)
    while engine.busy:
        for event in engine.step():
            if isinstance(event, Failed):
                raise RuntimeError(event.error.message)
            if isinstance(event, Tokens | Ended):
                said[event.request_id] += event.text
    return said


# --- the report -----------------------------------------------------------------------------------


def _add(setting: Setting, kind: Kind, row: dict[str, Any], full: dict[str, Any]) -> None:
    common = {"weights": kind.weights, "kv": kind.kv, "model": setting.size}
    for name, value in row.items():
        what, _, streams = name.partition(" ")
        if what == "speed":
            setting.report.add(
                "engine_numbers_tokens_per_cpu_s",
                value,
                "tokens/cpu s",
                peer="float32",
                against=paired(value, full[name]),
                streams=int(streams),
                **common,
            )
    for name, figure, unit in (
        ("weights", "engine_numbers_weight_mib", "MiB"),
        ("token", "engine_numbers_kv_token_kib", "KiB"),
    ):
        scale = 1 << (20 if unit == "MiB" else 10)
        setting.report.add(
            figure, row[name] / scale, unit, peer="float32", against=full[name] / scale, **common
        )
    setting.report.add("engine_numbers_logits_change", row["change"], "of spread", **common)
    setting.report.add(
        "engine_numbers_right",
        row["right"],
        "answers",
        peer="float32",
        against=full["right"],
        **common,
    )


def _table(rows: dict[Kind, dict[str, Any]], counts: Sequence[int], tasks: int) -> Iterator[str]:
    """All kinds in Markdown, with each speed over that of float32 in full, round by round."""
    full = rows[KINDS[0]]
    speeds = "".join(f" tokens/CPU s, {count} |" for count in counts)
    yield (
        "| weights | keys, values | weights, MiB | a token's, KiB | tokens in 1 GiB |"
        f"{speeds} logits' change | right of {tasks} |"
    )
    yield f"| --- | --- | {'---: | ' * (5 + len(counts))}".rstrip()
    for kind, row in rows.items():
        cells = [kind.weights, "full" if kind.kv == "auto" else kind.kv]
        cells += [f"{row['weights'] / 2**20:.1f}", f"{row['token'] / 1024:.2f}"]
        cells += [f"{2**30 // row['token']:,}"]
        for count in counts:
            speed: Sample = row[f"speed {count}"]
            ratio = speed.median / paired(speed, full[f"speed {count}"])
            cells += [f"{speed.median:,.0f} ({ratio:.2f})"]
        cells += [f"{row['change']:.4f}", str(row["right"])]
        yield f"| {' | '.join(cells)} |"
