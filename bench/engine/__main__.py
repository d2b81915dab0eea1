"""The worker's engine beside its peers: same model, same machine, same run.

    python -m bench.engine --quick
    python -m bench.engine --only throughput,bus --size 32m --streams 1,4,16,32 --json engine.json
    python -m bench.engine --device cuda --size 3b --streams 1,16,64

Cases, all in one run (`--only` selects):

* throughput: tokens/s and time to first token in this process, beside `generate` (one request after
  another), `generate_threads` (five threads of it with streamers, as FastChat does it) and
  `transformers_cb` (transformers' own continuous batching).
* served: the same model as users reach it, over the network: broker, worker and client library,
  and the gateway's SSE, beside FastChat's real `model_worker` (`fastchat`) and `transformers serve`
  without and with continuous batching (`transformers_serve`, `transformers_serve_cb`).
* engines: vLLM and llama.cpp beside ours, served and in the process, and each behind our bus
  (`bench/peers/engines/install.sh` installs them).
* bus: CPU of link, broker and client per step, over that of the engine.
* shared: prompts that share a prefix, with and without reuse of its KV cache; 32 at once with a
  common prompt of 2,000 tokens, beside one of them.
* pictures: questions about images, beside `generate`.
* gap: what a long prompt adds to the gaps of running streams, beside the engine's limit.
* profile, on a CPU: a decode step of `--streams` rows and a prefill of `--prefill` tokens, in
  float32 and bfloat16, by operator and beside the bare matrix products of the same shapes.
* speculation: answers that copy their prompt, and answers that do not, beside one token per step.
* numbers, on a CPU: weights in float32, bfloat16, 8 and 4 bits, keys and values in full and in 8
  bits: memory, tokens per CPU second, and how much the answers change.
* floor, on a GPU: a step beside the time to read its weights, keys and values at the bandwidth
  measured in the same run.

Cases run interleaved; figures are medians; the last column is the ratio.
"""

from __future__ import annotations

import os

# Threads that spin in a barrier would take cores from the peers measured at the same time.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import argparse
import sys
from collections.abc import Callable
from typing import Any

import torch

from bench.common import Report, Row, integers, interleave, options, repeats
from bench.engine import (
    engines as engine_engines,
    numbers as engine_numbers,
    profile as engine_profile,
    served as engine_served,
    situations as engine_situations,
    speculation as engine_speculation,
)
from bench.engine.cases import SIZES, Load, Setting, paired, peers, run_engine

Case = Callable[[Setting], None]


def _arguments() -> argparse.Namespace:
    parser = options(__doc__.partition("\n")[0] if __doc__ else "")
    parser.add_argument(
        "--only", type=_cases, metavar="LIST", help=f"some of these cases: {', '.join(CASES)}"
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ...")
    parser.add_argument("--size", choices=tuple(SIZES), help="model; default 32m, 3b on a GPU")
    parser.add_argument(
        "--streams",
        type=integers,
        help="list of stream counts; default 1,4,16,32,64; 1,16,64 on a GPU",
    )
    parser.add_argument(
        "--prompt", type=integers, default=[4, 12], help="shortest,longest prompt, in tokens"
    )
    parser.add_argument("--new", type=int, help="tokens of each answer [by case]")
    parser.add_argument("--threads", type=int, default=1, help="torch threads on a CPU")
    parser.add_argument("--shared", type=int, default=512, help="tokens of the shared prefix")
    parser.add_argument(
        "--prefill", type=int, default=512, help="tokens of the prefill that `profile` measures"
    )
    parser.add_argument("--gap-prompt", type=int, default=8000, help="tokens of the long prompt")
    parser.add_argument(
        "--stall-ms", type=float, default=200.0, help="the engine's limit for a gap"
    )
    parser.set_defaults(repeats=3)  # a round of all peers takes minutes
    parser.add_argument(
        "--profile", action="store_true", help="only profile decode steps, and exit"
    )
    return parser.parse_args()


def _cases(text: str) -> list[str]:
    chosen = [name for name in text.split(",") if name]
    if unknown := [name for name in chosen if name not in CASES]:
        raise argparse.ArgumentTypeError(
            f"there is no case {unknown[0]!r}: choose from {', '.join(CASES)}"
        )
    return chosen


def main() -> None:
    arguments = _arguments()
    device = torch.device(arguments.device)
    on_gpu = device.type != "cpu"
    if not on_gpu:
        torch.set_num_threads(arguments.threads)
    size = arguments.size or ("3b" if on_gpu else "32m")
    quick = [1, 16, 64] if on_gpu else [1, 32]
    full = [1, 16, 64] if on_gpu else [1, 4, 16, 32, 64]
    counts = arguments.streams or (quick if arguments.quick else full)
    report = Report(f"engine: {size} on {_device_words(device)}")
    setting = Setting(arguments, report, device, size, counts)
    if arguments.profile:
        _profile(setting)
        return
    if on_gpu and "floor" in (arguments.only or ()) and device.type != "cuda":
        raise SystemExit("--only floor: the bandwidth is measured only on CUDA devices")
    for name in arguments.only or _default_cases(device, arguments.quick):
        CASES[name](setting)
    report.finish(arguments, _plot)


def throughput(setting: Setting) -> None:
    """Tokens/s and time to first token at each number of streams, beside every peer."""
    arguments, report, engine = setting.arguments, setting.report, setting.engine
    new = arguments.new or (32 if arguments.quick else 64)
    low, high = arguments.prompt[0], arguments.prompt[-1]
    for count in setting.counts:
        prompts = setting.token_prompts(count, low, high, seed=count)
        runners = peers(setting.model, setting.tokenizer, max(count, 4))
        # With many streams, plain generate() would only repeat what one stream shows.
        left_out = arguments.without | {"generate_threads" if count == 1 else "generate"}
        whole = Load(count, new)
        queued = whole.for_a_queue(arguments.quick)
        loads = {"generate_threads": queued}
        cases: dict[str, Callable[[int], dict[str, float]]] = {
            "tokenbus": lambda n, p=prompts: run_engine(engine, p, n)  # type: ignore[misc]
        }
        for name in (name for name in runners if name not in left_out):
            load = loads.get(name, whole)
            cases[name] = lambda n, r=runners[name], p=prompts[: load.streams], m=load.tokens: r(  # type: ignore[misc]
                p, min(n, m)
            )
        for name in list(cases):
            try:
                # A short run first, for one-time work.
                cases[name](2)
            except Exception as error:
                if name == "tokenbus":
                    raise
                cause = " ".join(str(error).split())[:160]
                report.note(f"{name} at {count} streams: {type(error).__name__}: {cause}")
                del cases[name]
        # One stream is compared to within a few percent, which needs more rounds.
        rounds = repeats(arguments) + (1 if count == 1 else 0)
        seen = interleave({name: lambda r=run: r(new) for name, run in cases.items()}, rounds)
        own = seen.pop("tokenbus")
        common = {"streams": count, "model": setting.size}
        for name, figures in seen.items():
            for figure in ("tokens_per_s", "tokens_per_cpu_s"):
                report.add(
                    f"engine_{figure}",
                    own[figure],
                    figure.replace("_per_", "/").replace("_", " "),
                    peer=name,
                    against=paired(own[figure], figures[figure]),
                    **loads.get(name, whole).smaller(whole),
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
            **(queued if threads else whole).smaller(whole),
            **common,
        )
        report.add("engine_gap_ms", own["gap_ms"], "ms", **common)


CASES: dict[str, Case] = {
    "throughput": throughput,
    "served": engine_served.served,
    "engines": engine_engines.engines,
    "bus": engine_served.bus,
    "shared": engine_situations.shared,
    "pictures": engine_situations.images,
    "gap": engine_situations.gap,
    "speculation": engine_speculation.speculation,
    "profile": engine_profile.profile,
    "numbers": engine_numbers.numbers,
    "floor": engine_situations.floor,
}


def _default_cases(device: torch.device, quick: bool) -> list[str]:
    if device.type != "cpu":
        return ["throughput", "floor"] if device.type == "cuda" else ["throughput"]
    return ["throughput", "bus"] if quick else [name for name in CASES if name != "floor"]


def _profile(setting: Setting) -> None:
    """Print where the time of decode steps goes, by Python function and by operator."""
    import cProfile
    import pstats

    engine, arguments = setting.engine, setting.arguments
    low, high = arguments.prompt[0], arguments.prompt[-1]
    prompts = setting.token_prompts(setting.counts[-1], low, high, seed=3)
    new = arguments.new or 64
    run_engine(engine, prompts, new)
    profiler = cProfile.Profile()
    profiler.enable()
    run_engine(engine, prompts, new)
    profiler.disable()
    pstats.Stats(profiler, stream=sys.stdout).sort_stats("tottime").print_stats(25)
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU]
    if setting.device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as seen:
        run_engine(engine, prompts, new)
    key = "self_cuda_time_total" if setting.device.type == "cuda" else "self_cpu_time_total"
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
