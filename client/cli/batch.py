"""`batch IN.jsonl OUT.jsonl`: answers OpenAI batch lines, many at once, at low priority.

It may be stopped and restarted at any time: lines already answered in OUT are not asked again.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from broker.protocol.options import count, number
from client import AsyncClient, BusError, InvalidRequest, Retry, Timeout
from client.cli import arguments as flags, batch_files
from client.cli.batch_files import Line, Output
from client.cli.progress import Progress, duration
from client.cli.terminal import Terminal

#: The same as OpenAI's `service_tier: flex` at the gateway.
PRIORITY: Final = -50
CONCURRENCY: Final = 64
#: A batch is not in a hurry: it waits longer than a person would.
_QUEUE_S: Final = 24 * 3600.0
_RECONNECT_S: Final = 600.0
_ATTEMPTS: Final = 100


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "batch",
        help="answer a file of OpenAI batch lines",
        description="Answers every line of IN into OUT, in order of completion. "
        "Lines whose custom_id is in OUT already are skipped, so that a batch continues where it "
        "stopped. Status: 0 all answered, 1 some failed, now or before, or the bus is away, "
        "130 stopped.",
    )
    parser.add_argument(
        "input",
        metavar="IN.jsonl",
        type=Path,
        help="requests, one per line, in OpenAI's batch format",
    )
    parser.add_argument(
        "output",
        metavar="OUT.jsonl",
        type=Path,
        help="answers, one per line; lines answered already are skipped",
    )
    parser.add_argument(
        "--concurrency",
        type=count,
        default=CONCURRENCY,
        metavar="N",
        help=f"lines in flight [{CONCURRENCY}]",
    )
    parser.add_argument(
        "--priority",
        type=_priority,
        default=PRIORITY,
        metavar="N",
        help=f"-100 to 100, for lines without one [{PRIORITY}: after everybody else]",
    )
    parser.add_argument(
        "--retry-failed", action="store_true", help="retry the lines that failed in OUT"
    )
    parser.add_argument(
        "--allow-remote-images",
        action="store_true",
        help="fetch images from http addresses; otherwise only data URLs",
    )
    parser.add_argument(
        "--reconnect",
        type=float,
        default=_RECONNECT_S,
        metavar="S",
        help=f"seconds to wait for a broker that went away [{_RECONNECT_S:g}]",
    )
    flags.add_json(parser)
    flags.add_connection(parser)
    parser.set_defaults(run=run)


def _priority(text: str) -> int:
    value = number(text)
    if not (-100 <= value <= 100 and value.is_integer()):
        raise argparse.ArgumentTypeError(f"{text} is not an integer from -100 to 100")
    return int(value)


@dataclass(slots=True)
class _Tally:
    """Statistics of this run."""

    answered: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0


def run(arguments: argparse.Namespace, terminal: Terminal) -> int:
    """Answer the lines that are not answered yet."""
    wanted = batch_files.check(arguments.input)
    if arguments.output.exists() and arguments.output.samefile(arguments.input):
        raise InvalidRequest(
            f"{arguments.output} is also the input; give another file for the answers"
        )
    with Output(arguments.output, retry_failed=arguments.retry_failed) as output:
        if output.torn_bytes:
            terminal.notice(f"a line of {arguments.output} was incomplete; it will be asked again")
        before = len(wanted & output.done)
        if before:
            terminal.notice(f"{before} of {len(wanted)} lines are answered; continuing")
        tally, started_s = _Tally(), time.monotonic()
        try:
            with Progress(terminal, "batch", len(wanted), before) as progress:
                asyncio.run(_answer_all(arguments, output, progress, tally))
        except (KeyboardInterrupt, BusError):
            left = len(wanted) - before - tally.answered
            terminal.notice(f"stopped: {left} lines are left; run the same command to continue")
            raise
    _report(arguments, terminal, tally, output, time.monotonic() - started_s)
    return 1 if tally.failed or output.failed else 0


def _report(
    arguments: argparse.Namespace, terminal: Terminal, tally: _Tally, output: Output, took_s: float
) -> None:
    if arguments.json:
        terminal.json(
            {
                "answered": tally.answered,
                "failed": tally.failed,
                "failed_before": output.failed,
                "prompt_tokens": tally.prompt_tokens,
                "completion_tokens": tally.completion_tokens,
                "took_s": round(took_s, 3),
            }
        )
        return
    if not tally.answered:
        again = "; --retry-failed retries those" if output.failed else ""
        terminal.notice(f"nothing to do: all lines are answered, {output.failed} failed{again}")
        return
    rate = tally.completion_tokens / max(took_s, 1e-3)
    failed = f", {tally.failed} of them failed" if tally.failed else ""
    terminal.notice(
        f"{tally.answered} lines{failed}; {tally.prompt_tokens} prompt tokens, "
        f"{tally.completion_tokens} answer tokens ({rate:.0f}/s) in {duration(took_s)}"
    )
    if tally.failed or output.failed:
        terminal.notice(
            f"{tally.failed + output.failed} failed in total; --retry-failed retries those"
        )


async def _answer_all(
    arguments: argparse.Namespace, output: Output, progress: Progress, tally: _Tally
) -> None:
    from client.cli.batch_answers import Asking
    from client.gateway.images import ImagePolicy

    async with AsyncClient(
        arguments.broker,
        name="batch",
        server_key=arguments.server_key,
        key_file=arguments.key_file,
        timeout=Timeout(connect=arguments.connect_timeout),
    ) as bus:
        # Report an absent broker before anything starts.
        await bus.query("bus.version")
        asking = Asking(
            bus,
            Retry(attempts=_ATTEMPTS, backoff_longest=30.0, reconnect=arguments.reconnect),
            Timeout(
                connect=max(arguments.reconnect, 0.001), queue=_QUEUE_S, total=arguments.timeout
            ),
            arguments.priority,
            ImagePolicy(allow_remote=arguments.allow_remote_images),
        )
        left = (
            line for line in batch_files.lines(arguments.input) if line.custom_id not in output.done
        )
        tasks = [
            asyncio.create_task(_work(left, asking, output, progress, tally))
            for _ in range(arguments.concurrency)
        ]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


async def _work(
    left: Iterator[Line], asking: Any, output: Output, progress: Progress, tally: _Tally
) -> None:
    from client.cli.batch_answers import answer

    for line in left:
        answered = await answer(line, asking)
        output.write(answered.line)
        tally.answered += 1
        tally.failed += answered.failed
        tally.prompt_tokens += answered.prompt_tokens
        tally.completion_tokens += answered.completion_tokens
        progress.advance(failed=answered.failed)
