"""The engine on one GPU beside its lower bounds: at most ten minutes, nothing downloaded.

    python -m bench.gpu --json gpu.json
    python -m bench.gpu --tiny

Makes a Llama of 7 B parameters with random weights on the device, writes it to a folder, and loads
it as a worker does: in bfloat16 with and without CUDA graphs, in 8 bits, in 4 bits, and in vLLM if
that is installed. For each, it measures a decode step of 1, 16 and 64 streams beside the time to
read weights, keys and values, and a prefill beside the time of its arithmetic, at the bandwidth and
rate measured in the same run. Then the device's memory is taken away while a long prompt is
computed: the request must fail or wait, and the next one must be answered.

Each engine has a process of its own, so that its memory is free for the next. What does not fit
into the time is left out, with a note. `--tiny` runs whatever a CPU can, with a tiny model, to
check the script: its figures mean nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.common import ROOT, Report, Sample, integers, options, progress, short
from bench.engine.cases import SIZES, Shape, build_model, build_tokenizer
from bench.engine.inside import Inside, inside
from bench.engine.served import save_folder
from bench.engine.situations import bandwidth, synchronise

VLLM = ROOT / "bench" / "peers" / "engines" / "vllm" / ".venv" / "bin" / "python"
PROMPT, ANSWER = 128, 128
"""Tokens of a request whose decode steps are measured."""
LONG = 2048
"""Tokens of a prompt whose prefill is measured."""
RESERVE_S = 20.0
"""Left over for the end of the last engine and the report."""


@dataclass(frozen=True)
class Plan:
    """The sizes of a run."""

    shape: Shape
    device: str
    prompt: int
    answer: int
    long: int
    #: Side of the square matrices whose product gives the rate of arithmetic.
    side: int
    repeats: int


@dataclass(frozen=True)
class Variant:
    """One way to run the model."""

    name: str
    #: Fields of `EngineOptions`, or None for vLLM.
    options: dict[str, Any] | None
    #: Bits of a weight in the layers.
    bits: int = 16


VARIANTS = (
    Variant("graphs", {}),
    Variant("no_graphs", {"engine_args": {"cuda_graphs": "off"}}),
    Variant("8bit", {"load_8bit": True}, 8),
    Variant("4bit", {"load_4bit": True}, 4),
    Variant("vllm", None),
)


def _arguments() -> argparse.Namespace:
    parser = options("The engine on one GPU beside its lower bounds, in at most ten minutes.")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, on the CPU if need be")
    parser.add_argument("--size", choices=tuple(SIZES), help="model [7b; with --tiny 3m]")
    parser.add_argument(
        "--streams", type=integers, help="list of stream counts [1,16,64; with --tiny 1,2]"
    )
    parser.add_argument("--seconds", type=float, default=570.0, help="time for everything [570]")
    parser.add_argument("--folder", type=Path, help="where the weights are written [a new one]")
    parser.add_argument(
        "--vllm", default=str(VLLM), metavar="PYTHON", help="interpreter that has vLLM"
    )
    return parser.parse_args()


def main() -> None:
    """Run each variant while there is time."""
    arguments = _arguments()
    on_gpu = torch.cuda.is_available()
    if not on_gpu and not arguments.tiny:
        raise SystemExit("there is no CUDA device; --tiny checks the script on a CPU")
    tiny = arguments.tiny
    plan = Plan(
        shape=SIZES[arguments.size or ("3m" if tiny else "7b")],
        device="cuda" if on_gpu else "cpu",
        prompt=16 if tiny else PROMPT,
        answer=8 if tiny else ANSWER,
        long=64 if tiny else LONG,
        side=256 if tiny else 8192,
        repeats=1 if tiny else 3,
    )
    counts = arguments.streams or ([1, 2] if tiny else [1, 16, 64])
    over_s = time.monotonic() + arguments.seconds - RESERVE_S
    words = torch.cuda.get_device_name() if on_gpu else "CPU"
    report = Report(f"gpu: {_billions(plan.shape):.2g} B parameters on {words}")
    if not on_gpu:
        report.note("on a CPU, this only checks the script: its figures mean nothing")
    speed = bandwidth(torch.device(plan.device), 1 << (20 if tiny else 30))
    report.add("gpu_bandwidth", speed / 1e9, "GB/s")
    rate = _arithmetic(plan)
    report.add("gpu_arithmetic", rate / 1e12, "TFLOP/s")
    with _written(plan, arguments.folder) as folder:
        # From here on, the device's memory is for the engines.
        for variant in VARIANTS:
            if variant.name in arguments.without:
                continue
            if time.monotonic() > over_s:
                report.note(f"{variant.name} was left out: no time was left (--seconds)")
                continue
            try:
                with _opened(variant, plan, folder, counts, arguments.vllm) as engine:
                    _measure(report, variant, plan, engine, counts, (speed, rate), over_s)
            except Exception as error:
                report.note(f"{variant.name} was not measured: {short(error)}")
    report.finish(arguments)


# --- the model ------------------------------------------------------------------------------------


def _linear_parameters(shape: Shape) -> int:
    """Parameters of the layers' matrices, which quantisation shrinks."""
    head = shape.hidden // shape.heads
    attention = 2 * shape.hidden * head * (shape.heads + shape.kv_heads)
    return shape.layers * (attention + 3 * shape.hidden * shape.intermediate)


def _billions(shape: Shape) -> float:
    return (_linear_parameters(shape) + 2 * shape.hidden * shape.vocabulary) / 1e9


def _step_bytes(shape: Shape, bits: int, streams: int, tokens: float) -> float:
    """Bytes that a decode step must read.

    These are the matrices, the head (never quantised here), and the keys and values of `tokens`
    tokens of each stream.
    """
    width = shape.dtype.itemsize
    layers = _linear_parameters(shape) * (width if bits == 16 else bits / 8)
    head = shape.hidden * shape.vocabulary * width
    token = 2 * shape.layers * shape.kv_heads * (shape.hidden // shape.heads) * width
    return layers + head + streams * tokens * token


@contextlib.contextmanager
def _written(plan: Plan, chosen: Path | None) -> Iterator[Path]:
    """The model in a folder, made on the device."""
    if chosen is not None and (chosen / "config.json").exists():
        yield chosen
        return
    progress("making and writing the weights")
    needed = _billions(plan.shape) * 1e9 * plan.shape.dtype.itemsize * 1.05
    free = shutil.disk_usage(chosen.parent if chosen else tempfile.gettempdir()).free
    if free < needed:
        raise SystemExit(
            f"the weights need {needed / 1e9:.0f} GB of disk: choose a place with --folder"
        )
    model = build_model(plan.shape, torch.device(plan.device), 4096)
    with save_folder(model, build_tokenizer(plan.shape.vocabulary)) as folder:
        del model
        if plan.device == "cuda":
            torch.cuda.empty_cache()
        if chosen is None:
            yield folder
        else:
            shutil.copytree(folder, chosen)
            yield chosen


@contextlib.contextmanager
def _opened(
    variant: Variant, plan: Plan, folder: Path, counts: list[int], interpreter: str
) -> Iterator[Inside]:
    """The variant's engine, loaded."""
    progress(f"{variant.name} loads")
    dtype = str(plan.shape.dtype).removeprefix("torch.")
    if variant.options is None:
        if importlib.util.find_spec("vllm") is not None:
            interpreter = sys.executable
        elif not Path(interpreter).exists():
            raise RuntimeError("vLLM is not installed: name an interpreter that has it with --vllm")
        arguments = [str(folder), dtype, str(max(counts)), str(plan.long + plan.answer)]
        opening = inside(interpreter, "vllm", arguments, {"HF_HUB_OFFLINE": "1"})
    else:
        engine_args = {"prefix_tokens": "0", **variant.options.get("engine_args", {})}
        if plan.device == "cpu":
            engine_args["kv_tokens"] = "4096"
        described = {
            "engine": "transformers",
            "model_paths": [str(folder)],
            "model_names": [["bench"]],
            "device": plan.device,
            "dtype": dtype,
            "slots": max(counts),
            **variant.options,
            "engine_args": engine_args,
        }
        environment = {"HF_HUB_OFFLINE": "1"}
        opening = inside(sys.executable, "tokenbus", [json.dumps(described)], environment)
    with opening as engine:
        engine.wait_ready()
        yield engine


# --- measurements ---------------------------------------------------------------------------------


def _arithmetic(plan: Plan) -> float:
    """Operations per second of a large matrix product in the model's dtype."""
    square = (plan.side, plan.side)
    left, right = (
        torch.randn(square, device=plan.device, dtype=plan.shape.dtype) for _ in range(2)
    )
    times = 10
    left @ right
    synchronise(plan.device)
    started = time.perf_counter()
    for _ in range(times):
        left @ right
    synchronise(plan.device)
    return times * 2.0 * plan.side**3 / (time.perf_counter() - started)


def _prompts(plan: Plan, count: int, tokens: int, seed: int) -> list[list[int]]:
    choose = random.Random(seed)
    return [
        [choose.randrange(300, plan.shape.vocabulary) for _ in range(tokens)] for _ in range(count)
    ]


def _measure(
    report: Report,
    variant: Variant,
    plan: Plan,
    engine: Inside,
    counts: list[int],
    rates: tuple[float, float],
    over_s: float,
) -> None:
    bandwidth_bytes, arithmetic = rates
    for count in counts:
        progress(f"{variant.name}: decode, {count} streams")
        # The first run is for one-time work, such as captured graphs.
        engine.run(_prompts(plan, count, plan.prompt, 0), plan.answer)
        seen = [
            engine.run(_prompts(plan, count, plan.prompt, round_ + 1), plan.answer)
            for round_ in range(plan.repeats)
        ]
        step = Sample(tuple(each["gap_ms"] for each in seen))
        read = _step_bytes(plan.shape, variant.bits, count, plan.prompt + plan.answer / 2)
        common = {"variant": variant.name, "streams": count}
        report.add(
            "gpu_step_ms", step, "ms", peer="floor", against=read / bandwidth_bytes * 1e3, **common
        )
        rate = Sample(tuple(each["tokens_per_s"] for each in seen))
        report.add("gpu_tokens_per_s", rate, "tokens/s", **common)
        if time.monotonic() > over_s:
            report.note(f"{variant.name}: the rest was left out: no time was left (--seconds)")
            return
    for count in (1, 8):
        progress(f"{variant.name}: prefill, {count} prompts")
        engine.run(_prompts(plan, count, plan.long, 0), 1)
        seen = [
            engine.run(_prompts(plan, count, plan.long, round_ + 1), 1)
            for round_ in range(plan.repeats)
        ]
        last = Sample(tuple(each["last_ttft_ms"] for each in seen))
        work = 2.0 * _linear_parameters(plan.shape) * plan.long * count
        report.add(
            "gpu_prefill_ms",
            last,
            "ms",
            peer="floor",
            against=work / arithmetic * 1e3,
            variant=variant.name,
            prompts=count,
            prompt=plan.long,
        )
    if variant.name == "graphs":
        _without_memory(report, plan, engine)


def _without_memory(report: Report, plan: Plan, engine: Inside) -> None:
    """Take the device's free memory away while a long prompt is computed, and give it back."""
    if plan.device != "cuda":
        report.note("out of memory: not tried, since only a GPU's memory can be taken away")
        return
    progress("out of memory")
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    ballast = torch.empty(max(0, free - (64 << 20)), dtype=torch.uint8, device=plan.device)
    try:
        engine.run(_prompts(plan, 8, plan.long, 99), 4)
        said = "they were answered, from memory that the engine held"
    except RuntimeError as error:
        said = short(error)
    del ballast
    torch.cuda.empty_cache()
    after = engine.run(_prompts(plan, 1, plan.prompt, 98), 4)
    report.add("gpu_after_no_memory_ttft_ms", after["ttft_ms"], "ms")
    report.note(
        f"with 64 MiB free, 8 prompts of {plan.long}: {said}; the next request was answered"
    )


if __name__ == "__main__":
    main()
