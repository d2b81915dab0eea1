"""A real model as users reach it: our bus and gateway beside other servers.

Every server loads the same model (written to a folder by `save`), with the same number of torch
threads, and gets the same prompts through its own streaming interface. A server that is missing or
fails is left out, with a note that says why. `bus` compares our own bus with the engine in this
process. Never imports what it measures: servers run in their own processes.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers.utils.logging import disable_progress_bar

from bench import systems
from bench.common import (
    Process,
    Report,
    Sample,
    free_port,
    progress,
    python,
    repeats,
    short,
    wait_port,
)
from bench.engine.cases import KV_TOKENS, Load, Setting, paired, run_engine
from bench.stream import attempt, run
from bench.systems import Arrivals, Unavailable, pids
from broker.protocol.install import install_hint

READY_S = 120.0
"""Time limit for the start of a server that imports torch and loads a model."""
CB_BLOCK = 256
"""Tokens per cache block of `transformers serve`, its default."""
TARGET_SHARE = 3.0
"""Target for the cost of the bus, in percent of an engine step."""


@dataclass(frozen=True)
class Folder:
    """The model on disk, and how every server must run it."""

    path: Path
    device: str
    threads: int
    #: The most requests at the same time.
    slots: int

    @property
    def environment(self) -> dict[str, str]:
        return {"OMP_NUM_THREADS": str(self.threads), "HF_HUB_OFFLINE": "1"}


@contextlib.contextmanager
def save(setting: Setting) -> Iterator[Folder]:
    """The model of this run in a folder."""
    with save_folder(setting.model, setting.tokenizer) as path:
        yield Folder(path, str(setting.device), setting.arguments.threads, max(setting.counts))


@contextlib.contextmanager
def save_folder(model: Any, texts: Any) -> Iterator[Path]:
    """Write a model and its tokenizer or processor as `from_pretrained` reads them."""
    with tempfile.TemporaryDirectory(prefix="tb-model-") as name:
        path = Path(name) / "bench"
        disable_progress_bar()
        model.save_pretrained(path)
        texts.save_pretrained(path)
        # Name a class that every release of transformers knows.
        config = path / "tokenizer_config.json"
        config.write_text(
            config.read_text().replace("TokenizersBackend", "PreTrainedTokenizerFast")
        )
        yield path


class Asked(systems.Http):
    """Completions over HTTP, each with the next prompt."""

    prompts: Iterator[str]

    async def stream(self, tokens: int) -> Arrivals:
        self.body = {**self.body, "prompt": next(self.prompts)}
        return await super().stream(tokens)


Parties = dict[str, list[int]]


def bus_servers(folder: Folder) -> contextlib.AbstractContextManager[tuple[str, Parties]]:
    """Broker and worker with the transformers engine; yields front address and processes."""
    return systems.bus_servers(
        "transformers",
        folder.slots,
        # No prefix cache, as for the engine in this process: every round sends the same prompts.
        "prefix_tokens=0",
        *([f"kv_tokens={KV_TOKENS}"] if folder.device == "cpu" else []),
        options=(
            *("--model-path", str(folder.path), "--model-name", "bench"),
            *("--device", folder.device, "--threads", str(folder.threads)),
        ),
        ready_s=READY_S,
    )


@contextlib.asynccontextmanager
async def bus_client(front: str, parties: Parties) -> AsyncIterator[systems.Bus]:
    """The client library, in this process."""
    from client import AsyncClient

    async with AsyncClient(front) as client:
        system = systems.Bus(client, parties, False, "bench")
        system.params = {"ignore_eos": True, "temperature": 0.0}
        yield system


@contextlib.asynccontextmanager
async def gateway_client(front: str, parties: Parties) -> AsyncIterator[Asked]:
    """The gateway's SSE, in front of the same bus."""
    port = free_port()
    command = python("-m", "client.gateway", "--broker", front, "--port", str(port))
    with Process(command) as process:
        wait_port(port, process)
        body = {"model": "bench", "stream": True, "temperature": 0.0, "ignore_eos": True}
        yield _completions(port, body, b"[DONE]", {**parties, "gateway": pids(process)})


def _completions(port: int, body: dict[str, Any], last: bytes, parties: Parties) -> Asked:
    return Asked(port, "/v1/completions", body, "max_tokens", b'"text":', last, parties)


@contextlib.asynccontextmanager
async def fastchat_system(folder: Folder) -> AsyncIterator[Asked]:
    """FastChat's unmodified `model_worker`, called directly, without controller and API server."""
    interpreter = systems.FASTCHAT / ".venv" / "bin" / "python"
    if not any(interpreter.parent.parent.glob("lib/python*/site-packages/torch")):
        raise Unavailable("not installed: run bench/peers/fastchat/install.sh --with-model")
    port = free_port()
    command = [str(interpreter), "-m", "fastchat.serve.model_worker", "--no-register"]
    command += ["--model-path", str(folder.path), "--model-names", "bench"]
    command += ["--device", folder.device.partition(":")[0]]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    with tempfile.TemporaryDirectory(prefix="tb-fastchat-") as logs:
        environment = {**folder.environment, "LOGDIR": logs}
        with Process(command, environment, Path(logs)) as process:
            wait_port(port, process, READY_S)
            yield Asked(
                port,
                "/worker_generate_stream",
                {"model": "bench", "temperature": 0.0, "echo": False},
                "max_new_tokens",
                b"\0",
                b'"finish_reason": "length"',
                {"engine": pids(process)},
            )


@contextlib.asynccontextmanager
async def transformers_system(folder: Folder, *options: str) -> AsyncIterator[Asked]:
    """`transformers serve` from this environment."""
    with transformers_serve(folder, *options) as (port, parties):
        body = {"model": str(folder.path), "stream": True, "temperature": 0.0}
        yield _completions(port, body, b'"finish_reason":"length"', parties)


@contextlib.contextmanager
def transformers_serve(folder: Folder, *options: str) -> Iterator[tuple[int, Parties]]:
    """`transformers serve`: its port and its processes."""
    program = Path(sys.executable).parent / "transformers"
    try:
        import fastapi  # noqa: F401
    except ImportError:
        raise Unavailable(f"fastapi is not installed: {install_hint('bench')}") from None
    port = free_port()
    command = [str(program), "serve", str(folder.path), "--device", folder.device, *options]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    with Process(command, folder.environment) as process:
        wait_port(port, process, READY_S)
        yield port, {"engine": pids(process)}


Open = Callable[[], contextlib.AbstractAsyncContextManager[Any]]


def _foreign(folder: Folder, longest: int) -> dict[str, Open]:
    """The peers' servers; `longest`: the most tokens of a prompt with its answer."""
    # With its defaults it would reserve most of the memory.
    blocks = folder.slots * (longest // CB_BLOCK + 2)
    batching = ("--continuous-batching", "--cb-num-blocks", str(blocks))
    return {
        "fastchat": partial(fastchat_system, folder),
        "transformers_serve": partial(transformers_system, folder),
        "transformers_serve_cb": partial(transformers_system, folder, *batching),
    }


def served(setting: Setting) -> None:
    """Tokens/s and time to first token of every server at every number of streams."""
    with save(setting) as folder:
        asyncio.run(_served(setting, folder))


async def _served(setting: Setting, folder: Folder) -> None:
    arguments, report = setting.arguments, setting.report
    new = arguments.new or 64
    async with contextlib.AsyncExitStack() as stack:
        front, parties = stack.enter_context(bus_servers(folder))
        systems_open: dict[str, Any] = {
            "bus": await stack.enter_async_context(bus_client(front, parties)),
            "gateway": await stack.enter_async_context(gateway_client(front, parties)),
        }
        for name, open_ in _foreign(folder, arguments.prompt[-1] + new).items():
            if name in arguments.without:
                continue
            try:
                systems_open[name] = await stack.enter_async_context(open_())
            except Exception as error:
                report.note(f"{name} was not measured: {short(error)}")
        for count in setting.counts:
            whole = Load(count, new)
            queued = whole.for_a_queue(arguments.quick)
            loads = {name: queued if name in ONE_BY_ONE else whole for name in systems_open}
            asked = setting.text_prompts(count, seed=count)
            seen: dict[str, dict[str, list[float]]] = {name: {} for name in systems_open}
            # A short first round, for one-time work.
            for round_ in range(-1, min(3, repeats(arguments))):
                for name in list(seen):
                    system, load = systems_open[name], loads[name]
                    if round_ < 0:
                        load = Load(load.streams, 2)
                    system.prompts = itertools.cycle(asked)
                    progress(f"served, {count} streams: {name}, round {max(round_, 0) + 1}")
                    figures = await attempt(report, name, system, load.streams, load.tokens)
                    if figures is None:
                        del seen[name]
                        continue
                    figures["tokens_per_cpu_s"] = 1e6 / figures["all_us"]
                    for figure, value in figures.items() if round_ >= 0 else ():
                        seen[name].setdefault(figure, []).append(value)
            _add_served(report, seen, loads)


PATHS = ("bus", "gateway")
"""Our own paths to the engine."""
ONE_BY_ONE = frozenset({"fastchat", "transformers_serve"})
"""Peers that answer one request after another, or five at once."""


def _add_served(
    report: Report, seen: dict[str, dict[str, list[float]]], loads: dict[str, Load]
) -> None:
    samples = {
        name: {figure: Sample(tuple(values)) for figure, values in figures.items()}
        for name, figures in seen.items()
    }
    own = {name: samples.pop(name) for name in PATHS}
    whole = loads["bus"]
    for path, figures in own.items():
        for figure, name, unit in (
            ("tokens_per_s", "engine_served_tokens_per_s", "tokens/s"),
            ("tokens_per_cpu_s", "engine_served_tokens_per_cpu_s", "tokens/cpu s"),
            ("ttft_ms_p50", "engine_served_ttft_ms", "ms"),
        ):
            if not samples:
                report.add(name, figures[figure], unit, path=path, streams=whole.streams)
            for peer, others in samples.items():
                report.add(
                    name,
                    figures[figure],
                    unit,
                    peer=peer,
                    against=paired(figures[figure], others[figure]),
                    path=path,
                    streams=whole.streams,
                    **loads[peer].smaller(whole),
                )


def bus(setting: Setting) -> None:
    """Compare the CPU per step of the bus with that of the engine.

    The same requests go to the engine in this process, and through broker, worker and client.
    """
    with save(setting) as folder:
        asyncio.run(_bus(setting, folder))


async def _bus(setting: Setting, folder: Folder) -> None:
    engine, quick = setting.engine, setting.arguments.quick
    # Long answers, so that the share is that of a step, not of a request.
    new = setting.arguments.new or (32 if quick else 128)

    def alone(prompts: list[list[int]], tokens: int) -> dict[str, float]:
        # OpenMP stores this number per thread.
        torch.set_num_threads(folder.threads)
        return run_engine(engine, prompts, tokens)

    with bus_servers(folder) as (front, parties):
        async with bus_client(front, parties) as system:
            # A real client process holds no model, so exclude what is already here from collection.
            gc.collect()
            gc.freeze()
            try:
                for count in sorted({1, min(32, folder.slots)}):
                    texts = setting.text_prompts(count, seed=count)
                    prompts = [setting.tokenizer(text).input_ids for text in texts]
                    system.prompts = itertools.cycle(texts)
                    through: list[dict[str, float]] = []
                    within: list[dict[str, float]] = []
                    for round_ in range(-1, 2 if quick else repeats(setting.arguments)):
                        tokens = new if round_ >= 0 else 4
                        # In a thread, so that the client's heartbeats go on.
                        in_process = await asyncio.to_thread(alone, prompts, tokens)
                        on_the_bus = await run(system, count, tokens)
                        if round_ >= 0:
                            within.append(in_process)
                            through.append(on_the_bus)
                    _add_bus(setting.report, through, within, count)
            finally:
                gc.unfreeze()


def _add_bus(
    report: Report, through: list[dict[str, float]], within: list[dict[str, float]], count: int
) -> None:
    """Add the rows. A step generates one token of each stream."""

    def sample(figures: Iterable[float]) -> Sample:
        return Sample(tuple(figures))

    parties = ("link_us", "broker_us", "client_us")
    share = sample(
        sum(each[name] for name in parties) / each["engine_us"] * 100 for each in through
    )
    report.add("engine_bus_share", share, "%", peer="target", against=TARGET_SHARE, streams=count)
    # Wall time: how much longer a token takes than in this process.
    longer = sample(
        (alone["tokens_per_s"] / each["tokens_per_s"] - 1) * 100
        for each, alone in zip(through, within, strict=True)
    )
    report.add("engine_bus_longer", longer, "%", peer="target", against=TARGET_SHARE, streams=count)
    for name in parties:
        cost = sample(each[name] * count for each in through)
        report.add(f"engine_bus_step_us.{name.removesuffix('_us')}", cost, "us", streams=count)
    for name, unit, own, alone in (
        (
            "engine_bus_step_ms.engine",
            "ms",
            sample(each["engine_us"] * count / 1e3 for each in through),
            sample(count / each["tokens_per_cpu_s"] * 1e3 for each in within),
        ),
        (
            "engine_bus_tokens_per_s",
            "tokens/s",
            sample(each["tokens_per_s"] for each in through),
            sample(each["tokens_per_s"] for each in within),
        ),
    ):
        report.add(name, own, unit, peer="in_process", against=paired(own, alone), streams=count)
