"""vLLM spread over processes or machines: its answers, and what happens if a part is killed.

    python -m bench.parallel --way tp2 tensor_parallel_size=2 distributed_executor_backend=mp

For each `--way NAME KEY=VALUE...`, a worker runs vLLM with those arguments, beside a second worker
with one process. Greedy answers of both are compared token by token. Then one of the first worker's
computing processes is killed (SIGKILL) mid-stream, or with `--beside` its other node: its engine
must end, and the stream must go on at the second worker. The model is a tiny random Llama in
float32, on a CPU.
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

from client import Client, Tokens
from client.cli.local_bus import LocalBus, ManagedProcess
from tests.engines import library_checks as checks

HIDDEN = 128
PROMPTS = ("ab ba", "the quick brown fox", "1 2 3 4", "z")
TOKENS = 48
LONG_TOKENS = 400


@dataclass
class Outcome:
    """The results of one way."""

    way: str
    equal: int = 0
    started_s: float = 0.0
    killed: str = ""
    ended_s: float = 0.0
    resumed: int = 0
    goes_on: str = ""
    error: str = ""


def answers(client: Client, model: str) -> list[list[int]]:
    """Greedy answers, as token ids."""
    return [
        client.generate(
            prompt, model=model, max_tokens=TOKENS, temperature=0.0, ignore_eos=True
        ).token_ids
        for prompt in PROMPTS
    ]


def computing(worker_pid: int) -> list[psutil.Process]:
    """The processes that compute for a worker's engine."""
    (engine, *_) = psutil.Process(worker_pid).children()
    found = engine.children(recursive=True)
    return [process for process in found if "resource_tracker" not in str(process.cmdline())]


def try_out(folder: Path, path: Path, way: str, arguments: list[str], beside: str) -> Outcome:
    """Start both workers, compare their answers, kill, and see how the stream goes on."""
    outcome = Outcome(way)
    common = ["--model-path", str(path), "--dtype", "float32", "--slots", "4"]
    common += ["--engine-arg", "enforce_eager=true", "--engine-arg", "max_num_batched_tokens=64"]
    spread = [word for argument in arguments for word in ("--engine-arg", argument)]
    with LocalBus(folder, start_s=400) as bus:
        bus.start_broker("--placement", "least_loaded")
        began_s = time.monotonic()
        # Each has a name of its own, for comparisons; both share one, for the stream.
        first = bus.start_worker(
            "w1", *common, "--model-name", "tiny,spread", *spread, engine="vllm"
        )
        node = None
        if beside:
            node = ManagedProcess("node", shlex.split(beside.format(model=path)), folder)
        bus.wait_ready(1)
        outcome.started_s = time.monotonic() - began_s
        bus.start_worker("w2", *common, "--model-name", "tiny,single", engine="vllm")
        bus.wait_ready(2)
        client = Client(bus.front)
        spread_out, single = answers(client, "spread"), answers(client, "single")
        outcome.equal = sum(a == b for a, b in zip(spread_out, single, strict=True))
        long = {"max_tokens": LONG_TOKENS, "temperature": 0.0, "ignore_eos": True}
        whole = client.generate(PROMPTS[0], model="single", **long).token_ids
        for _ in range(4):  # until the stream runs at w1
            stream = client.generate(PROMPTS[0], model="tiny", stream=True, **long)
            killed_s, ids = 0.0, list[int]()
            for event in stream:
                if not isinstance(event, Tokens):
                    continue
                ids += event.token_ids
                if killed_s or len(ids) < 5:
                    continue
                if stream.worker != "w1":
                    break
                if node is not None:
                    outcome.killed = "the other node"
                    for process in psutil.Process(node.pid).children(recursive=True):
                        process.kill()
                    node.kill()
                else:
                    victim = computing(first.pid)[-1]
                    outcome.killed = " ".join([victim.name(), *victim.cmdline()[-1:]])[:60]
                    os.kill(victim.pid, signal.SIGKILL)
                killed_s = time.monotonic()
            if killed_s:
                break
        if not killed_s:
            outcome.error = "the stream never ran at w1"
            return outcome
        outcome.goes_on = f"{stream.end.worker}, {'equal' if ids == whole else 'DIFFERENT'}"
        outcome.resumed = stream.end.resumed
        lines = first.log().splitlines()
        lost = [line for line in lines if "engine lost" in line or "engine died" in line]
        outcome.error = lost[0][-160:] if lost else "its engine did not end"
        outcome.ended_s = time.monotonic() - killed_s
    return outcome


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="python -m bench.parallel", description=__doc__)
    parser.add_argument("--way", nargs="+", action="append", required=True, metavar="WORD")
    parser.add_argument(
        "--beside",
        default="",
        metavar="COMMAND",
        help="starts another node for the model in {model}, which is then what is killed",
    )
    options = parser.parse_args()
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    folder = Path(tempfile.mkdtemp(prefix="bench-parallel-"))
    path = checks.saved_model(folder / "model", HIDDEN)
    print("| way | ready after s | equal answers | killed | stream went on at | resumed | s |")
    print("|---|---|---|---|---|---|---|")
    for number, (name, *arguments) in enumerate(options.way):
        place = folder / str(number)
        place.mkdir()
        outcome = try_out(place, path, name, arguments, options.beside)
        print(
            f"| {name} | {outcome.started_s:.0f} | {outcome.equal} of {len(PROMPTS)} "
            f"| {outcome.killed} | {outcome.goes_on} | {outcome.resumed} "
            f"| {outcome.ended_s:.1f} |\n  {outcome.error}",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
