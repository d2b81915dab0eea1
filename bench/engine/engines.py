"""vLLM and llama.cpp beside our engine on the same cores, served and in the process.

All load the weights of this run (llama.cpp from a GGUF file of them) in the same dtype, with one
thread for the model and without a prefix cache, and take turns with the same prompts. *Served*
means HTTP with server-sent events: our gateway, `vllm serve`, llama.cpp's server, and our gateway
with these libraries as the worker's engine. *In the process* means the engine alone, without any
server. CPU is that of all processes of a system except the client, which is the same bare socket
for all. Never imports a peer: each runs in its own environment (`bench/peers/engines/install.sh`).
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import itertools
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import urllib.request
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import __version__ as transformers_version

from bench import bus
from bench.common import (
    ROOT,
    Process,
    Report,
    Sample,
    free_port,
    progress,
    python,
    repeats,
    short,
    wait_for,
    wait_port,
)
from bench.engine.cases import KV_TOKENS, Setting, paired
from bench.engine.inside import Inside, inside
from bench.engine.served import READY_S, Asked, Folder, save
from bench.stream import run
from bench.systems import Unavailable, pids

__all__ = ["engines"]

PEERS = ROOT / "bench" / "peers" / "engines"
SCRIPTS = "bench.peers.engines"
VLLM_READY_S = 400.0
"""The first start of vLLM compiles the model."""
LOADS = ((16, 64), (512, 32))
"""Tokens of a prompt and of its answer."""
CONTEXT = 640
"""The most tokens that a request may have."""
OURS = ("tokenbus", "bus_vllm", "bus_llamacpp")

FIGURES = {
    "tokens_per_s": "tokens/s",
    "ttft_ms": "ms",
    "gap_p99_ms": "ms",
    "cpu_us_per_token": "us",
}

GOALS = {
    "served": {"tokens_per_s": 1.25, "ttft_ms": 1.0, "gap_p99_ms": 1.0, "cpu_us_per_token": 0.5},
    "process": {"cpu_us_per_token": 1.0},
}
"""Ratios of ours to vLLM: tokens/s at least, the others at most."""
BUS_GOALS = {"tokens_per_s": 1.05, "ttft_ms": 1.0}
"""Ratios of a library behind our bus to its own server."""


def engines(setting: Setting) -> None:
    """Every engine at every number of streams and length of prompt."""
    if setting.device.type != "cpu":
        setting.report.note("engines: only on a CPU; for vLLM beside ours on a GPU, run bench.gpu")
        return
    # If it is stopped from outside, it must not leave a dozen processes behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    asyncio.run(_engines(setting, _saved(setting)))


def _saved(setting: Setting) -> Folder:
    """The model of this run, in a folder that is kept for later runs.

    By its path, vLLM finds its compiled code again; compiling takes a minute and more.
    """
    written = {
        "shape": repr(setting.shape),
        "torch": torch.__version__,
        "with": transformers_version,
    }
    name = hashlib.sha256(json.dumps(written).encode()).hexdigest()[:16]
    root = Path(tempfile.gettempdir()) / f"tokenbus-bench-{os.getuid()}"
    path = root / name / "bench"
    if not path.exists():
        root.mkdir(mode=0o700, exist_ok=True)
        with save(setting) as folder:
            new = Path(tempfile.mkdtemp(dir=root))
            shutil.copytree(folder.path, new / "bench")
        # Another run may have put it there first.
        with contextlib.suppress(OSError):
            new.rename(root / name)
    arguments = setting.arguments
    return Folder(path, str(setting.device), arguments.threads, max(setting.counts))


async def _engines(setting: Setting, folder: Folder) -> None:
    arguments, report = setting.arguments, setting.report
    rows: list[_Measured] = []
    async with contextlib.AsyncExitStack() as stack:
        served, alone = await _open(setting, folder, stack)
        await _same(report, served, _texts(setting, 1, LOADS[0][0], 1)[0])
        for prompt, new in LOADS:
            for count in _counts(setting, prompt):
                load = _Load(prompt, arguments.new or new, count)
                rows += await _served(setting, served, load)
                rows += _alone(setting, alone, load)
    for row in rows:
        _add(report, row, rows)
    for line in [*_table(rows), *_goals(rows)]:
        report.note(line)


def _counts(setting: Setting, prompt: int) -> list[int]:
    if setting.arguments.streams:
        return setting.counts
    if not setting.arguments.quick:
        return [1, 8, 32, 64]
    return [8, 32] if prompt == LOADS[0][0] else [8]


# --- what is measured -----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Load:
    prompt: int
    new: int
    streams: int


@dataclass(frozen=True)
class _Measured:
    """One system under one load."""

    where: str
    system: str
    load: _Load
    figures: dict[str, Sample]


@dataclass
class _Rounds:
    """The figures of all rounds of one system."""

    values: dict[str, list[float]] = field(default_factory=dict)

    def add(self, figures: dict[str, float]) -> None:
        for name in FIGURES:
            if name in figures:
                self.values.setdefault(name, []).append(figures[name])

    def samples(self) -> dict[str, Sample]:
        return {name: Sample(tuple(values)) for name, values in self.values.items()}


async def _served(setting: Setting, systems_open: dict[str, Asked], load: _Load) -> list[_Measured]:
    seen = {name: _Rounds() for name in systems_open}
    # A short first round, for one-time work.
    for round_ in range(-1, repeats(setting.arguments)):
        texts = _texts(setting, load.streams, load.prompt, round_ + 2)
        for name in list(seen):
            progress(f"served, {load.streams} streams of {load.prompt}: {name}, round {round_ + 1}")
            system = systems_open[name]
            system.prompts = itertools.cycle(texts)
            try:
                got = await run(system, load.streams, load.new if round_ >= 0 else 4)
            except Exception as error:
                if name == "tokenbus":
                    raise
                setting.report.note(f"{name} failed at {load}: {short(error)}")
                del seen[name]
                continue
            if round_ >= 0:
                seen[name].add(_figures(got))
    return [_Measured("served", name, load, rounds.samples()) for name, rounds in seen.items()]


def _figures(got: dict[str, float]) -> dict[str, float]:
    return {
        "tokens_per_s": got["tokens_per_s"],
        "ttft_ms": got["ttft_ms_p50"],
        "gap_p99_ms": got["between_ms_p99"],
        "cpu_us_per_token": got["all_us"] - got["client_us"],
    }


def _alone(setting: Setting, processes: dict[str, Inside], load: _Load) -> list[_Measured]:
    seen = {name: _Rounds() for name in processes}
    for round_ in range(-1, repeats(setting.arguments)):
        prompts = setting.token_prompts(load.streams, load.prompt, load.prompt, seed=round_ + 2)
        for name in list(seen):
            progress(f"alone, {load.streams} streams of {load.prompt}: {name}, round {round_ + 1}")
            try:
                got = processes[name].run(prompts, load.new if round_ >= 0 else 4)
            except Exception as error:
                if name == "tokenbus":
                    raise
                setting.report.note(f"{name} in the process failed at {load}: {short(error)}")
                del seen[name]
                continue
            if round_ >= 0:
                seen[name].add(got)
    return [_Measured("process", name, load, rounds.samples()) for name, rounds in seen.items()]


def _texts(setting: Setting, count: int, tokens: int, seed: int) -> list[str]:
    """Prompts of random words, of exactly that many tokens each."""
    choose = random.Random(seed)
    tokenizer = setting.tokenizer
    texts: list[str] = []
    while len(texts) < count:
        words = [f"w{choose.randrange(setting.shape.vocabulary):05d}" for _ in range(tokens)]
        text = tokenizer.decode(tokenizer(" ".join(words)).input_ids[:tokens])
        if len(tokenizer(text).input_ids) == tokens:
            texts.append(text)
    return texts


async def _same(report: Report, systems_open: dict[str, Asked], text: str) -> None:
    """Note every system whose prompt length or answer differs from ours."""
    answers = {
        name: await asyncio.to_thread(_ask, system, text) for name, system in systems_open.items()
    }
    own = answers["tokenbus"]
    for name, answer in answers.items():
        if answer != own:
            report.note(f"{name} answers {answer!r}, ours answers {own!r}: compare with care")


def _ask(system: Asked, text: str) -> tuple[int, str]:
    """Tokens of the prompt, and the answer."""
    body = {**system.body, "prompt": text, "max_tokens": 16, "stream": False}
    request = urllib.request.Request(
        f"http://127.0.0.1:{system.port}{system.path}",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=READY_S) as answer:
        got = json.load(answer)
    return got["usage"]["prompt_tokens"], got["choices"][0]["text"]


# --- rows -----------------------------------------------------------------------------------------


def _find(rows: list[_Measured], like: _Measured, system: str) -> _Measured | None:
    return next(
        (
            row
            for row in rows
            if (row.where, row.load, row.system) == (like.where, like.load, system)
        ),
        None,
    )


def _peers_of(row: _Measured, rows: list[_Measured]) -> list[_Measured]:
    """The peers of a row of ours."""
    names = (row.system.removeprefix("bus_"),) if row.system != "tokenbus" else ("vllm", "llamacpp")
    return [peer for name in names if (peer := _find(rows, row, name)) is not None]


def _add(report: Report, row: _Measured, rows: list[_Measured]) -> None:
    if row.system not in OURS:
        return
    for name, unit in FIGURES.items():
        common: dict[str, Any] = {
            "where": row.where,
            "path": row.system,
            "prompt": row.load.prompt,
            "answer": row.load.new,
            "streams": row.load.streams,
        }
        peers = [peer for peer in _peers_of(row, rows) if name in peer.figures]
        if name not in row.figures:
            continue
        if not peers:
            report.add(f"engines_{name}", row.figures[name], unit, **common)
        for peer in peers:
            against = paired(row.figures[name], peer.figures[name])
            report.add(
                f"engines_{name}",
                row.figures[name],
                unit,
                peer=peer.system,
                against=against,
                **common,
            )


def _table(rows: list[_Measured]) -> Iterator[str]:
    """Every system's figures in Markdown."""
    yield "| where | prompt | streams | system | tokens/s | first token ms | gap p99 ms | CPU us |"
    yield "| --- | ---: | ---: | --- | ---: | ---: | ---: | ---: |"
    for row in rows:
        figures = [
            f"{row.figures[name].median:,.0f}" if name in row.figures else "–" for name in FIGURES
        ]
        load = row.load
        yield (
            f"| {row.where} | {load.prompt} | {load.streams} | {row.system} | "
            f"{' | '.join(figures)} |"
        )


def _goals(rows: list[_Measured]) -> Iterator[str]:
    """Whether the goals are met, load by load."""
    for row in rows:
        if row.system not in OURS:
            continue
        goals = BUS_GOALS if row.system != "tokenbus" else GOALS[row.where]
        for peer in _peers_of(row, rows):
            # When ours is served, only vLLM sets a goal; llama.cpp sets one in the process and
            # behind our bus.
            if row.system == "tokenbus" and row.where == "served" and peer.system != "vllm":
                continue
            said = []
            for name, goal in goals.items():
                if name not in row.figures or name not in peer.figures:
                    continue
                ratio = row.figures[name].median / paired(row.figures[name], peer.figures[name])
                met = ratio >= goal if name == "tokens_per_s" else ratio <= goal
                said.append(f"{name} {ratio:.2f} ({goal:g}{'' if met else ', missed'})")
            load = row.load
            yield (
                f"goal, {row.where}, {load.streams} streams of {load.prompt}: {row.system} over "
                f"{peer.system}: {', '.join(said)}"
            )


# --- the systems ----------------------------------------------------------------------------------


async def _open(
    setting: Setting, folder: Folder, stack: contextlib.AsyncExitStack
) -> tuple[dict[str, Asked], dict[str, Inside]]:
    """Start everything that is installed."""
    report, without = setting.report, setting.arguments.without
    dtype = str(setting.shape.dtype).removeprefix("torch.")
    file = folder.path.parent / "bench.gguf"
    over_http: dict[str, Any] = {
        "tokenbus": lambda: _bus(folder, dtype, "transformers", folder.path),
        "vllm": lambda: _vllm_serve(folder, dtype),
        "bus_vllm": lambda: _bus(folder, dtype, "vllm", folder.path),
        "llamacpp": lambda: _llamacpp_serve(folder, file),
        "bus_llamacpp": lambda: _bus(folder, dtype, "llamacpp", file),
    }
    sizes = [str(folder.slots), str(CONTEXT)]
    own = {
        "engine": "transformers",
        "model_paths": [str(folder.path)],
        "model_names": [["bench"]],
        "device": "cpu",
        "dtype": dtype,
        "slots": folder.slots,
        "engine_args": {"prefix_tokens": "0", "kv_tokens": str(KV_TOKENS)},
    }
    alone_plans: dict[str, Any] = {
        "tokenbus": lambda: _inside("tokenbus", [json.dumps(own)], folder, own=True),
        "vllm": lambda: _inside("vllm", [str(folder.path), dtype, *sizes], folder),
        "llamacpp": lambda: _inside("llamacpp", [str(file), *sizes], folder),
    }
    if "llamacpp" not in without:
        try:
            await asyncio.to_thread(_write_gguf, folder, file)
        except Exception as error:
            report.note(f"llamacpp was not measured: {short(error)}")
            without = without | {"llamacpp"}
    served: dict[str, Asked] = {}
    alone: dict[str, Inside] = {}

    async def start(name: str, plan: Any, opened: dict[str, Any], where: str) -> None:
        try:
            opened[name] = await stack.enter_async_context(plan())
        except Exception as error:
            if name == "tokenbus":
                raise
            report.note(f"{name} {where} was not measured: {short(error)}")

    progress("all engines start")
    wanted = [
        (name, plan, opened, where)
        for plans, opened, where in (
            (over_http, served, "served"),
            (alone_plans, alone, "in a process"),
        )
        for name, plan in plans.items()
        if not {name, name.removeprefix("bus_")} & without
    ]
    # Together: most of a start is waiting, except on a machine of a few cores.
    await asyncio.gather(*(start(*each) for each in wanted))
    order = list(over_http)
    served = dict(sorted(served.items(), key=lambda item: order.index(item[0])))
    alone = dict(sorted(alone.items(), key=lambda item: order.index(item[0])))
    return served, alone


def _interpreter(name: str) -> str:
    """A peer's interpreter. Raises `Unavailable`."""
    path = PEERS / name / ".venv" / "bin" / "python"
    if not path.exists():
        raise Unavailable(f"not installed: run bench/peers/engines/install.sh {name}")
    return str(path)


def _environment(folder: Folder) -> dict[str, str]:
    """For every process: one thread for the model, no network, no usage statistics."""
    return {
        **folder.environment,
        "OMP_WAIT_POLICY": "passive",
        "TOKENIZERS_PARALLELISM": "false",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
    }


def _write_gguf(folder: Folder, file: Path) -> None:
    if file.exists():
        return
    command = [_interpreter("llamacpp"), "-m", f"{SCRIPTS}.to_gguf", str(folder.path)]
    command.append(str(file))
    with Process(command, _environment(folder)) as process:
        if process.wait(READY_S) != 0:
            raise Unavailable(f"its file could not be written: {process.last_words()}")


BODY = {"model": "bench", "stream": True, "temperature": 0.0, "ignore_eos": True}


def _completions(port: int, parties: dict[str, list[int]]) -> Asked:
    return Asked(port, "/v1/completions", BODY, "max_tokens", b'"text":', b"[DONE]", parties)


@contextlib.asynccontextmanager
async def _bus(folder: Folder, dtype: str, engine: str, path: Path) -> AsyncIterator[Asked]:
    """Broker, worker with the engine and gateway."""
    interpreter = _interpreter(engine) if engine != "transformers" else python()[0]
    settings = {
        # No prefix cache, as for the peers.
        "transformers": ["prefix_tokens=0", f"kv_tokens={KV_TOKENS}"],
        "vllm": ["enable_prefix_caching=false", f"context_tokens={CONTEXT}"],
        "llamacpp": [
            *(f"kv_tokens={folder.slots * CONTEXT}", f"context_tokens={CONTEXT}"),
            f"threads={folder.threads}",
        ],
    }[engine]
    command = [interpreter, "-m", "worker", "--engine", engine, "--worker-id", "w1", *bus.LOG]
    command += ["--no-progress", "--slots", str(folder.slots), "--dtype", dtype]
    command += ["--model-path", str(path), "--model-name", "bench", "--device", "cpu"]
    command += ["--threads", str(folder.threads)]
    command += [part for item in settings for part in ("--engine-arg", item)]
    limits = ("--inflight", "100000", "--queue-requests", "100000")
    with (
        bus.running(*limits) as local,
        Process([*command, "--broker", local.back], _environment(folder)) as worker,
    ):
        await asyncio.to_thread(_wait_ready, local, worker)
        gateway = local.start_gateway()
        port = int(gateway.url.rstrip("/").rpartition(":")[2])
        family = pids(worker)
        parties = {
            "broker": [local.broker.pid],
            "link": [worker.pid],
            "engine": [pid for pid in family if pid != worker.pid],
            "gateway": pids(gateway.process),
        }
        yield _completions(port, parties)


def _wait_ready(local: Any, worker: Process) -> None:
    wait_for(
        lambda: any(row["state"] == "ready" for row in local.rows()),
        "the worker to be ready",
        VLLM_READY_S,
        worker,
    )


@contextlib.asynccontextmanager
async def _vllm_serve(folder: Folder, dtype: str) -> AsyncIterator[Asked]:
    port = free_port()
    command = [_interpreter("vllm"), "-m", "vllm.entrypoints.openai.api_server"]
    command += ["--model", str(folder.path), "--served-model-name", "bench", "--dtype", dtype]
    command += ["--max-num-seqs", str(folder.slots), "--max-model-len", str(CONTEXT)]
    command += ["--no-enable-prefix-caching", "--host", "127.0.0.1", "--port", str(port)]
    # No access log, which would have a line for each request.
    command += ["--uvicorn-log-level", "warning"]
    with Process(command, _environment(folder)) as process:
        await asyncio.to_thread(wait_port, port, process, VLLM_READY_S)
        yield _completions(port, {"engine": pids(process)})


@contextlib.asynccontextmanager
async def _llamacpp_serve(folder: Folder, file: Path) -> AsyncIterator[Asked]:
    port = free_port()
    command = [_interpreter("llamacpp"), "-m", f"{SCRIPTS}.inside_llamacpp", str(file)]
    command += [str(folder.slots), str(CONTEXT), str(port)]
    with Process(command, _environment(folder)) as process:
        await asyncio.to_thread(process.wait_line, "ready", READY_S)
        yield _completions(port, {"engine": pids(process)})


@contextlib.asynccontextmanager
async def _inside(
    name: str, arguments: Sequence[str], folder: Folder, *, own: bool = False
) -> AsyncIterator[Inside]:
    interpreter = python()[0] if own else _interpreter(name)
    with inside(interpreter, name, arguments, _environment(folder)) as process:
        await asyncio.to_thread(process.wait_ready)
        yield process
