"""The worker's engine beside its peers, on the same model, machine and run.

    python -m bench.engine --quick
    python -m bench.engine --size 32m --streams 1,4,16,32 --json engine.json --plot engine.svg
    python -m bench.engine --device cuda --size 3b --streams 1,16,64

Peers: `generate` (one request after the other), `generate_threads` (FastChat's way: five threads of
`generate()` with streamers), `transformers_cb` (transformers' own continuous batching). Cases run
interleaved, figures are medians, the ratio stands last. On a GPU, tokens/s stand beside the
memory-bandwidth floor: bytes of weights and of keys and values that a step must read, over the
bandwidth measured in the same run. `--gap` measures what a long prompt does to running streams.
"""

from __future__ import annotations

import os

# A thread that spins in a barrier takes the core from the peers that are measured beside it.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import argparse
import io
import random
import sys
import time
from typing import Any

import torch
from PIL import Image

from bench.common import Report, Row, Sample, integers, interleave, options, percentile, repeats
from bench.engine_cases import (
    SIZES,
    build_engine,
    build_model,
    build_tokenizer,
    build_vision,
    peers,
    run_engine,
    run_generate_pictures,
    run_pictures,
    token_job,
)
from worker.engines.base import Ended, Failed


def _arguments() -> argparse.Namespace:
    parser = options(__doc__.partition("\n")[0] if __doc__ else "")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ...")
    parser.add_argument("--size", choices=tuple(SIZES), help="model; default 32m, 3b on a GPU")
    parser.add_argument("--streams", type=integers, help="default 1,4,16,32; 1,16,64 on a GPU")
    parser.add_argument("--prompt", type=integers, default=[4, 12], help="shortest,longest; tokens")
    parser.add_argument("--new", type=int, help="tokens of each answer; default 64")
    parser.add_argument("--threads", type=int, default=1, help="torch threads on a CPU")
    parser.add_argument(
        "--peers", default="generate,generate_threads,transformers_cb", help="which peers to run"
    )
    parser.add_argument(
        "--shared", type=int, metavar="TOKENS", help="only: prompts that share a prefix"
    )
    parser.add_argument("--pictures", action="store_true", help="only: questions about pictures")
    parser.add_argument("--gap", action="store_true", help="only: a long prompt beside 8 streams")
    parser.add_argument("--gap-prompt", type=int, default=8000, help="tokens of the long prompt")
    parser.add_argument("--stall-ms", type=float, default=200.0, help="the engine's bound")
    parser.add_argument("--profile", action="store_true", help="only: where a decode step goes")
    return parser.parse_args()


def _prompts(count: int, low: int, high: int, vocabulary: int, seed: int) -> list[list[int]]:
    choose = random.Random(seed)
    return [
        [choose.randrange(10, vocabulary) for _ in range(choose.randint(low, high))]
        for _ in range(count)
    ]


def main() -> None:
    arguments = _arguments()
    device = torch.device(arguments.device)
    on_gpu = device.type != "cpu"
    if not on_gpu:
        torch.set_num_threads(arguments.threads)
    size = arguments.size or ("3b" if on_gpu else "32m")
    shape = SIZES[size]
    streams = arguments.streams or ([1, 16, 64] if on_gpu else [1, 4, 16, 32])
    if arguments.quick and not arguments.streams:
        streams = [1, 16, 64] if on_gpu else [1, 32]
    if arguments.pictures:
        report = Report(f"engine, pictures: {size} on {_device_words(device)}")
        _pictures(shape, device, streams[-1], arguments, report)
        report.finish(arguments)
        return
    model = build_model(shape, device)
    tokenizer = build_tokenizer(shape.vocabulary)
    report = Report(f"engine: {size} on {_device_words(device)}")
    settings = {"kv_tokens": 0 if on_gpu else 100_000, "stall_ms": arguments.stall_ms}
    engine = build_engine(model, tokenizer, max(*streams, 9), **settings)
    report.note(f"scheduler: {engine.capabilities.models[0].details['scheduler']}")
    if arguments.profile:
        _profile(engine, model, streams[-1], arguments, shape.vocabulary)
        return
    if arguments.shared:
        engine.close()
        _shared(model, tokenizer, streams[-1], arguments, report)
        report.finish(arguments)
        return
    if arguments.gap:
        _gap(engine, arguments, report, shape.vocabulary)
        report.finish(arguments)
        return
    _throughput(engine, model, tokenizer, streams, arguments, report, size)
    if on_gpu:
        _floor(model, engine, streams, arguments, report)
    report.finish(arguments, _plot)
    engine.close()


def _throughput(
    engine: Any,
    model: Any,
    tokenizer: Any,
    streams: list[int],
    arguments: argparse.Namespace,
    report: Report,
    size: str,
) -> None:
    """Tokens/s and time to first token, each number of streams beside every peer."""
    new = arguments.new or 64
    # Five threads are saturated at once: their rate does not depend on the length of answers, so
    # --quick does not wait for long ones.
    lengths = {"generate_threads": min(new, 16)} if arguments.quick else {}
    for name, length in lengths.items():
        report.note(f"{name} wrote {length} tokens an answer, the others {new}")
    low, high = arguments.prompt[0], arguments.prompt[-1]
    wanted = [name for name in arguments.peers.split(",") if name]
    for count in streams:
        prompts = _prompts(count, low, high, model.config.vocab_size, seed=count)
        runners = peers(model, tokenizer, max(count, 4))
        # One stream: plain generate() is the limit. Many: it only repeats what one stream shows.
        names = [name for name in wanted if name != "generate" or count == 1]
        if count == 1:
            names = [name for name in names if name != "generate_threads"]
        cases = {"tokenbus": lambda p=prompts: run_engine(engine, p, new)}
        for name in names:
            length = lengths.get(name, new)
            cases[name] = lambda p=prompts, run=runners[name], n=length: run(p, n)
        for name in list(cases):
            try:
                cases[name]()
            except Exception as error:
                if name == "tokenbus":
                    raise
                cause = " ".join(str(error).split())[:160]
                report.note(f"{name} at {count} streams: {type(error).__name__}: {cause}")
                del cases[name]
        # One stream is compared to within a few percent: it takes more rounds.
        rounds = repeats(arguments) * (3 if count == 1 else 1)
        seen = interleave(cases, rounds)
        own = seen.pop("tokenbus")
        common = {"streams": count, "model": size}
        for name, figures in seen.items():
            for figure in ("tokens_per_s", "tokens_per_cpu_s"):
                report.add(
                    f"engine_{figure}",
                    own[figure],
                    figure.replace("_per_", "/").replace("_", " "),
                    peer=name,
                    against=_paired(own[figure], figures[figure]),
                    **common,
                )
        if not seen:
            report.add("engine_tokens_per_s", own["tokens_per_s"], "tokens/s", **common)
        threads = seen.get("generate_threads", {}).get("ttft_ms")
        report.add(
            "engine_ttft_ms",
            own["ttft_ms"],
            "ms",
            peer="generate_threads" if threads else None,
            against=threads,
            **common,
        )
        report.add("engine_gap_ms", own["gap_ms"], "ms", **common)


def _paired(own: Sample, peer: Sample) -> float:
    """The peer's figure such that the ratio is the median of the ratios of each round: what slows
    the machine in one round slows both."""
    ratios = Sample(tuple(a / b for a, b in zip(own.values, peer.values, strict=True)))
    return own.median / ratios.median


def _shared(
    model: Any, tokenizer: Any, count: int, arguments: argparse.Namespace, report: Report
) -> None:
    """Prompts that share a prefix, with and without reuse of what was computed."""
    tail = _prompts(count, 8, 16, model.config.vocab_size, seed=5)
    head = _prompts(1, arguments.shared, arguments.shared, model.config.vocab_size, seed=6)[0]
    prompts = [head + ids for ids in tail]
    new = arguments.new or 16
    engines = {
        "reuse": build_engine(model, tokenizer, count, prefix_tokens=20_000, kv_tokens=200_000),
        "none": build_engine(model, tokenizer, count, prefix_tokens=0, kv_tokens=200_000),
    }
    # Without reuse, rows that run side by side would still share: they go one after the other.
    cases = {
        name: lambda e=engine: {
            "ttft_ms": percentile([run_engine(e, [ids], new)["ttft_ms"] for ids in prompts], 50)
        }
        for name, engine in engines.items()
    }
    seen = interleave(cases, repeats(arguments))
    report.add(
        "engine_shared_prefix_ttft_ms",
        seen["reuse"]["ttft_ms"],
        "ms",
        peer="no reuse",
        against=seen["none"]["ttft_ms"],
        prefix_tokens=arguments.shared,
    )


def _pictures(
    shape: Any, device: torch.device, count: int, arguments: argparse.Namespace, report: Report
) -> None:
    """Questions about pictures, all at once, beside plain generate()."""
    model, processor = build_vision(shape, device)
    engine = build_engine(model, processor.tokenizer, count, processor, kv_tokens=100_000)
    report.note(f"scheduler: {engine.capabilities.models[0].details['scheduler']}")
    new = arguments.new or 32
    pictures = []
    for seed in range(count):
        octets = io.BytesIO()
        colour = (seed * 37 % 256, seed * 91 % 256, seed * 53 % 256)
        Image.new("RGB", (640, 480), colour).save(octets, "JPEG")
        pictures.append(octets.getvalue())
    seen = interleave(
        {
            "tokenbus": lambda: run_pictures(engine, pictures, new),
            "generate": lambda: run_generate_pictures(model, processor, pictures, new),
        },
        repeats(arguments),
    )
    for figure in ("tokens_per_s", "tokens_per_cpu_s"):
        own, peer = seen["tokenbus"][figure], seen["generate"][figure]
        report.add(
            f"engine_pictures_{figure}",
            own,
            figure.replace("_per_", "/").replace("_", " "),
            peer="generate",
            against=_paired(own, peer),
            streams=count,
        )
    report.add("engine_pictures_ttft_ms", seen["tokenbus"]["ttft_ms"], "ms", streams=count)
    engine.close()


def _gap(engine: Any, arguments: argparse.Namespace, report: Report, vocabulary: int) -> None:
    """Time between tokens of 8 streams: alone, while a long prompt is computed beside them, and
    while it is answered. By the wall and by the CPU: where other programs run, the wall's tail is
    theirs."""
    streams = [token_job(ids, 4000) for ids in _prompts(8, 5, 9, vocabulary, seed=1)]
    prompt = _prompts(1, arguments.gap_prompt, arguments.gap_prompt, vocabulary, 2)[0]
    long = token_job(prompt, 16)
    for one in streams:
        engine.add(one)
    # Of each step with tokens: wall and CPU milliseconds since the one before.
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


def _floor(
    model: Any, engine: Any, streams: list[int], arguments: argparse.Namespace, report: Report
) -> None:
    """Decode beside the memory-bandwidth floor of the same GPU."""
    device = model.device
    bandwidth = _bandwidth(device)
    embedding = model.get_input_embeddings().weight
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    # A step reads a few rows of the embedding, not the table.
    weights -= embedding.numel() * embedding.element_size()
    token_bytes = engine._served[0].runner.cache.token_bytes
    report.add("gpu_bandwidth", bandwidth / 1e9, "GB/s")
    for count in streams:
        prompts = _prompts(count, 128, 128, model.config.vocab_size, seed=count)
        run_engine(engine, prompts, 16)
        seen = [run_engine(engine, prompts, 128)["gap_ms"] for _ in range(repeats(arguments))]
        sample = Sample(tuple(seen))
        floor_ms = (weights + count * 192 * token_bytes) / bandwidth * 1e3
        report.add(
            "engine_floor_share",
            floor_ms / sample.median,
            "of floor",
            streams=count,
            step_ms=round(sample.median, 3),
            floor_ms=round(floor_ms, 3),
            tokens_per_s=round(count / sample.median * 1e3),
        )


def _bandwidth(device: torch.device) -> float:
    """Bytes per second that a plain read of memory reaches."""
    data = torch.empty(1 << 30, dtype=torch.float32, device=device).normal_()
    for _ in range(3):
        data.sum()
    torch.cuda.synchronize(device)
    started = time.perf_counter()
    for _ in range(10):
        data.sum()
    torch.cuda.synchronize(device)
    return 10 * data.numel() * 4 / (time.perf_counter() - started)


def _profile(
    engine: Any, model: Any, count: int, arguments: argparse.Namespace, vocabulary: int
) -> None:
    """Where the time of decode steps goes, by Python function and by operator."""
    import cProfile
    import pstats

    prompts = _prompts(count, *arguments.prompt[:1], arguments.prompt[-1], vocabulary, seed=3)
    new = arguments.new or 64
    run_engine(engine, prompts, new)
    profiler = cProfile.Profile()
    profiler.enable()
    run_engine(engine, prompts, new)
    profiler.disable()
    pstats.Stats(profiler, stream=sys.stdout).sort_stats("tottime").print_stats(25)
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU]
    if model.device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as seen:
        run_engine(engine, prompts, new)
    key = "self_cuda_time_total" if model.device.type == "cuda" else "self_cpu_time_total"
    print(seen.key_averages().table(sort_by=key, row_limit=25))


def _plot(figure: Any, rows: list[Row]) -> None:
    axes = figure.subplots()
    own: dict[int, float] = {}
    others: dict[str, dict[int, float]] = {}
    for row in rows:
        if row.name != "engine_tokens_per_s":
            continue
        count = int(row.parameters["streams"])
        own[count] = row.value
        if row.peer and row.peer_value:
            others.setdefault(row.peer, {})[count] = row.peer_value
    for name, curve in {"tokenbus": own, **others}.items():
        points = sorted(curve.items())
        axes.plot([p[0] for p in points], [p[1] for p in points], marker="o", label=name)
    axes.set_xscale("log", base=2)
    axes.set_xlabel("streams")
    axes.set_ylabel("tokens/s")
    axes.legend()


def _device_words(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} torch threads"


if __name__ == "__main__":
    main()
