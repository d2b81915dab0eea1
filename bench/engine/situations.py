"""Cases other than plain throughput; each adds its rows to the report of the run.

A shared prefix, images, a long prompt beside running streams, and a GPU's memory bandwidth.
"""

from __future__ import annotations

import io
import time

import torch
from PIL import Image

from bench.common import Sample, interleave, percentile, repeats
from bench.engine.cases import (
    KV_TOKENS,
    Setting,
    build_engine,
    build_vision,
    paired,
    run_engine,
    run_generate_images,
    run_images,
    token_job,
)
from worker.engines.base import Ended, Failed

COMMON_TOKENS = 2000

IMAGES = 16
"""How many questions about images are asked at once; plain `generate()` answers one by one."""


def shared(setting: Setting) -> None:
    """Prompts that share a prefix, with and without reuse of its KV cache."""
    arguments = setting.arguments
    count, new = 8, 8
    tail = setting.token_prompts(count, 8, 16, seed=5)
    head = setting.token_prompts(1, arguments.shared, arguments.shared, seed=6)[0]
    prompts = [head + ids for ids in tail]
    engines = {
        name: build_engine(
            setting.model, setting.tokenizer, count, prefix_tokens=tokens, kv_tokens=KV_TOKENS
        )
        for name, tokens in (("reuse", 20_000), ("none", 0))
    }
    # One after another: requests that run at the same time would share even without reuse.
    cases = {
        name: lambda e=engine: {
            "ttft_ms": percentile([run_engine(e, [ids], new)["ttft_ms"] for ids in prompts], 50)
        }
        for name, engine in engines.items()
    }
    seen = interleave(cases, min(3, repeats(arguments)))
    setting.report.add(
        "engine_shared_prefix_ttft_ms",
        seen["reuse"]["ttft_ms"],
        "ms",
        peer="no reuse",
        against=seen["none"]["ttft_ms"],
        prefix_tokens=arguments.shared,
    )
    for engine in engines.values():
        engine.close()
    _common_prompt(setting)


def _common_prompt(setting: Setting) -> None:
    """32 requests at once that begin with the same 2,000 tokens, beside one of them.

    Measured is the CPU time until each has its first token, in memory that was used before.
    """
    count, new = 32, 2
    engine = build_engine(
        setting.model, setting.tokenizer, count, prefix_tokens=0, kv_tokens=KV_TOKENS
    )
    seed = 0

    def asked(number: int, tail: int) -> dict[str, float]:
        nonlocal seed
        seed += 2
        head = setting.token_prompts(1, COMMON_TOKENS, COMMON_TOKENS, seed=seed)[0]
        tails = setting.token_prompts(number, tail, tail, seed=seed + 1)
        return run_engine(engine, [head + ids for ids in tails], new)

    asked(count, 12)
    cases = {"one": lambda: asked(1, 1)} | {
        str(tail): lambda t=tail: asked(count, t)  # type: ignore[misc]
        for tail in (1, 4, 12)
    }
    seen = interleave(cases, repeats(setting.arguments))
    one = seen.pop("one")["last_ttft_cpu_ms"]
    for tail, figures in seen.items():
        setting.report.add(
            "engine_common_prompt_last_ttft_cpu_ms",
            figures["last_ttft_cpu_ms"],
            "ms",
            peer="one request",
            against=paired(figures["last_ttft_cpu_ms"], one),
            streams=count,
            common_tokens=COMMON_TOKENS,
            own_tokens=int(tail),
        )
    engine.close()


def images(setting: Setting) -> None:
    """Questions about images, all at once, beside plain `generate()`."""
    arguments, report = setting.arguments, setting.report
    model, processor = build_vision(setting.shape, setting.device)
    engine = build_engine(model, processor.tokenizer, IMAGES, processor, kv_tokens=KV_TOKENS)
    new = arguments.new or 32
    raw = []
    for seed in range(IMAGES):
        file = io.BytesIO()
        colour = (seed * 37 % 256, seed * 91 % 256, seed * 53 % 256)
        Image.new("RGB", (640, 480), colour).save(file, "JPEG")
        raw.append(file.getvalue())
    run_images(engine, raw[:1], 2)
    seen = interleave(
        {
            "tokenbus": lambda: run_images(engine, raw, new),
            "generate": lambda: run_generate_images(model, processor, raw, new),
        },
        min(3, repeats(arguments)),
    )
    for figure in ("tokens_per_s", "tokens_per_cpu_s"):
        own, peer = seen["tokenbus"][figure], seen["generate"][figure]
        report.add(
            f"engine_pictures_{figure}",
            own,
            figure.replace("_per_", "/").replace("_", " "),
            peer="generate",
            against=paired(own, peer),
            streams=IMAGES,
        )
    report.add("engine_pictures_ttft_ms", seen["tokenbus"]["ttft_ms"], "ms", streams=IMAGES)
    engine.close()


def gap(setting: Setting) -> None:
    """Gaps of 8 streams: alone, during the prefill of a long prompt, and during its answer.

    They are measured in wall and CPU time, since other programs distort the tail of wall time.
    """
    arguments, report, engine = setting.arguments, setting.report, setting.engine
    streams = [token_job(ids, 4000) for ids in setting.token_prompts(8, 5, 9, seed=1)]
    prompt = setting.token_prompts(1, arguments.gap_prompt, arguments.gap_prompt, seed=2)[0]
    long = token_job(prompt, 16)
    for one in streams:
        engine.add(one)
    # For each step with tokens: wall and CPU milliseconds since the last one.
    quiet: list[tuple[float, float]] = []
    prompting: list[tuple[float, float]] = []
    answering: list[tuple[float, float]] = []
    at, cpu = time.perf_counter(), time.process_time()
    arrived = ttft_ms = 0.0
    done = False
    while not done:
        events = engine.step()
        now, cpu_now = time.perf_counter(), time.process_time()
        of_long = [event for event in events if event.request_id == long.request_id]
        if len(of_long) < len(events):
            phase = quiet if not arrived else answering if ttft_ms else prompting
            phase.append(((now - at) * 1e3, (cpu_now - cpu) * 1e3))
            at, cpu = now, cpu_now
        if of_long and not ttft_ms:
            ttft_ms = (now - arrived) * 1e3
        if not arrived and len(quiet) > 60:
            engine.add(long)
            arrived = now
        done = any(isinstance(event, Ended | Failed) for event in of_long)
    for one in streams:
        engine.cancel(one.request_id)
    while engine.busy:
        engine.step()
    common = {"streams": 8, "prompt": arguments.gap_prompt}
    bound = arguments.stall_ms
    for column, clock in enumerate(("wall", "cpu")):
        usual = percentile([gap[column] for gap in quiet[10:]], 50)
        report.add("engine_gap_quiet_ms", usual, "ms", clock=clock, **common)
        for name, gaps in (("prompt", prompting), ("answer", answering)):
            for share in (50.0, 99.0, 100.0):
                report.add(
                    f"engine_gap_added_p{share:g}_ms",
                    percentile([gap[column] for gap in gaps], share) - usual,
                    "ms",
                    peer="bound",
                    against=bound,
                    beside=f"its {name}",
                    clock=clock,
                    **common,
                )
    report.add("engine_long_prompt_ttft_ms", ttft_ms, "ms", **common)
    report.note(f"{len(prompting)} steps while the long prompt was computed")


def floor(setting: Setting) -> None:
    """A decode step beside the lower bound that the GPU's memory bandwidth sets."""
    model, engine, report = setting.model, setting.engine, setting.report
    read_per_s = bandwidth(setting.device)
    embedding = model.get_input_embeddings().weight
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    # A step reads only a few rows of the embedding table.
    weights -= embedding.numel() * embedding.element_size()
    token_bytes = engine._served[0].runner.cache.token_bytes
    report.add("engine_gpu_bandwidth", read_per_s / 1e9, "GB/s")
    for count in setting.counts:
        prompts = setting.token_prompts(count, 128, 128, seed=count)
        run_engine(engine, prompts, 16)
        seen = [
            run_engine(engine, prompts, 128)["gap_ms"] for _ in range(repeats(setting.arguments))
        ]
        step = Sample(tuple(seen))
        floor_ms = (weights + count * 192 * token_bytes) / read_per_s * 1e3
        report.add("engine_floor_share", floor_ms / step.median, "of floor", streams=count)
        report.add("engine_step_ms", step, "ms", peer="floor", against=floor_ms, streams=count)


def bandwidth(device: torch.device, numbers: int = 1 << 30) -> float:
    """Bytes per second of a plain read of this many float32 numbers."""
    data = torch.empty(numbers, dtype=torch.float32, device=device).normal_()
    for _ in range(3):
        data.sum()
    synchronise(device)
    started = time.perf_counter()
    for _ in range(10):
        data.sum()
    synchronise(device)
    return 10 * data.numel() * 4 / (time.perf_counter() - started)


def synchronise(device: torch.device | str) -> None:
    """Wait until a device has finished all its work, as a CPU always has."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
