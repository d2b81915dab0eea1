"""`bench`: a quick load test of a live bus, measured where a user would: at the client.

Prompts are random words, different in every request, so that no prefix cache flatters the results.
Published figures come from the repository's `bench/`, never from here.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from broker.protocol.options import count, number
from client import AsyncClient, BusError, Retry, Timeout, Tokens
from client.cli import arguments as flags
from client.cli.progress import Progress
from client.cli.terminal import Terminal

_PERCENTILES: Final = (50, 90, 99)
#: Short and common, so that most tokenizers make one token of each.
_TEXT: Final = (
    "the of and to in is was for on that with as by at from his it an were are which this be has"
    " had first one their its new after but who not they have her she two been other when there"
    " all year time more up than some only over most part made down day life work name water"
)
_WORDS: Final = _TEXT.split()


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "bench",
        help="a quick load test of a live bus",
        description="Sends chats with random prompts and reports times and rates as seen here. "
        "Status: 0 all answered, 1 some failed.",
    )
    flags.add_model(parser)
    parser.add_argument(
        "--requests", "-n", type=count, default=64, metavar="N", help="number of requests [64]"
    )
    parser.add_argument(
        "--concurrency", "-c", type=count, default=8, metavar="N", help="requests at once [8]"
    )
    parser.add_argument(
        "--rate",
        type=_positive,
        metavar="N",
        help="requests per second, arriving at random (Poisson); at most --concurrency at once",
    )
    parser.add_argument(
        "--prompt-words", type=count, default=64, metavar="N", help="words per prompt [64]"
    )
    parser.add_argument(
        "--answer-tokens",
        type=count,
        default=64,
        metavar="N",
        help="exact length of each answer: the end of sequence is ignored [64]",
    )
    parser.add_argument("--priority", type=int, default=0, metavar="N", help="-100 to 100 [0]")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the prompts [0]")
    flags.add_json(parser)
    flags.add_connection(parser)
    parser.set_defaults(run=run)


def _positive(text: str) -> float:
    value = number(text)
    if not 0 < value < 1e9:
        raise argparse.ArgumentTypeError(f"{text} is not a rate above 0")
    return value


@dataclass(slots=True)
class Measured:
    """Measurements of all requests, in seconds and tokens."""

    first_token_s: list[float] = field(default_factory=list)
    #: One entry for each token but the first; tokens that arrived together share the time.
    between_tokens_s: list[float] = field(default_factory=list)
    whole_s: list[float] = field(default_factory=list)
    #: For each answer, after its first token.
    tokens_per_s: list[float] = field(default_factory=list)
    prompt_tokens: int = 0
    answer_tokens: int = 0
    resumed: int = 0
    failed: Counter[str] = field(default_factory=Counter)
    workers: Counter[str] = field(default_factory=Counter)
    took_s: float = 0.0

    def report(self) -> dict[str, Any]:
        """As `--json` prints it; times in milliseconds."""
        took_s = max(self.took_s, 1e-9)
        return {
            "requests": len(self.whole_s),
            "failed": dict(self.failed),
            "resumed": self.resumed,
            "took_s": round(self.took_s, 3),
            "requests_per_s": round(len(self.whole_s) / took_s, 3),
            "answer_tokens": self.answer_tokens,
            "answer_tokens_per_s": round(self.answer_tokens / took_s, 2),
            "prompt_tokens": self.prompt_tokens,
            "first_token_ms": _summary(self.first_token_s, 1000),
            "between_tokens_ms": _summary(self.between_tokens_s, 1000),
            "whole_ms": _summary(self.whole_s, 1000),
            "tokens_per_s": _summary(self.tokens_per_s, 1),
            "workers": dict(sorted(self.workers.items())),
        }


def percentile(values: Sequence[float], share: float) -> float:
    """Linear interpolation between the two nearest of sorted values; `share` from 0 to 100."""
    place = (len(values) - 1) * share / 100
    below = int(place)
    above = min(below + 1, len(values) - 1)
    return values[below] + (values[above] - values[below]) * (place - below)


def _summary(values: list[float], factor: float) -> dict[str, float] | None:
    if not values:
        return None
    values = sorted(values)
    found = {"mean": sum(values) / len(values)}
    found |= {f"p{share}": percentile(values, share) for share in _PERCENTILES}
    found["max"] = values[-1]
    return {name: round(value * factor, 3) for name, value in found.items()}


def run(arguments: argparse.Namespace, terminal: Terminal) -> int:
    """Measure and report."""
    measured = Measured()
    try:
        with Progress(terminal, "bench", arguments.requests) as progress:
            asyncio.run(_measure(arguments, measured, progress))
    except KeyboardInterrupt:
        if measured.whole_s:
            _tell(arguments, terminal, measured)
        raise
    _tell(arguments, terminal, measured)
    return 1 if measured.failed else 0


def _tell(arguments: argparse.Namespace, terminal: Terminal, measured: Measured) -> None:
    report = measured.report()
    if arguments.json:
        terminal.json(report)
        return
    rows = [
        [words, *(f"{value:.1f}" for value in report[name].values())]
        for words, name in (
            ("first token, ms", "first_token_ms"),
            ("between tokens, ms", "between_tokens_ms"),
            ("whole answer, ms", "whole_ms"),
            ("tokens/s of one answer", "tokens_per_s"),
        )
        if report[name] is not None
    ]
    if rows:
        headings = ["", "mean", *(f"p{share}" for share in _PERCENTILES), "max"]
        terminal.table("", headings, rows)
    terminal.line(
        f"{report['requests']} answers in {report['took_s']:.2f} s: "
        f"{report['requests_per_s']:.2f} requests/s, {report['answer_tokens_per_s']:.1f} tokens/s"
    )
    terminal.line(
        f"{report['prompt_tokens']} prompt tokens, {report['answer_tokens']} answer tokens; by "
        + (", ".join(f"{name} {n}" for name, n in report["workers"].items()) or "nobody")
    )
    if measured.resumed:
        terminal.line(f"resumed {measured.resumed} times")
    for code, failures in measured.failed.most_common():
        terminal.error(f"{failures} failed with {code}")


async def _measure(arguments: argparse.Namespace, measured: Measured, progress: Progress) -> None:
    generator = random.Random(arguments.seed)
    async with AsyncClient(
        arguments.broker,
        name="bench",
        server_key=arguments.server_key,
        key_file=arguments.key_file,
        join=arguments.join,
        timeout=Timeout(connect=arguments.connect_timeout, total=arguments.timeout),
        retry=Retry(),
    ) as bus:
        # The first request includes the connection time, and reveals a misspelt model
        # before the rest.
        await bus.chat(arguments.model, _prompt(generator, 1), max_tokens=1)
        left = iter(range(arguments.requests))
        started_s = time.monotonic()
        due_s = started_s

        async def work() -> None:
            nonlocal due_s
            for _ in left:
                if arguments.rate is not None:
                    due_s += generator.expovariate(arguments.rate)
                    await asyncio.sleep(due_s - time.monotonic())
                prompt = _prompt(generator, arguments.prompt_words)
                failed = False
                try:
                    await _ask(bus, arguments, prompt, measured)
                except BusError as error:
                    measured.failed[error.code] += 1
                    failed = True
                measured.took_s = time.monotonic() - started_s
                progress.advance(failed=failed)

        await asyncio.gather(*(work() for _ in range(arguments.concurrency)))


def _prompt(generator: random.Random, words: int) -> str:
    return " ".join(generator.choices(_WORDS, k=words))


async def _ask(
    bus: AsyncClient, arguments: argparse.Namespace, prompt: str, measured: Measured
) -> None:
    began_s = time.monotonic()
    first_s = last_s = None
    tokens = 0
    between_s: list[float] = []
    stream = await bus.chat(
        arguments.model,
        prompt,
        stream=True,
        max_tokens=arguments.answer_tokens,
        ignore_eos=True,
        priority=arguments.priority,
    )
    async for event in stream:
        if not isinstance(event, Tokens) or not event.token_ids:
            continue
        now_s = time.monotonic()
        count = len(event.token_ids)
        if last_s is None:
            first_s = now_s
        else:
            between_s += [(now_s - last_s) / count] * count
        last_s = now_s
        tokens += count
    whole_s = time.monotonic() - began_s
    end = stream.end
    measured.whole_s.append(whole_s)
    measured.workers[end.worker] += 1
    measured.resumed += end.resumed
    measured.prompt_tokens += end.usage.prompt_tokens
    measured.answer_tokens += end.usage.completion_tokens
    measured.between_tokens_s += between_s
    if first_s is not None:
        measured.first_token_s.append(first_s - began_s)
        if between_s:
            measured.tokens_per_s.append(len(between_s) / max(sum(between_s), 1e-9))
