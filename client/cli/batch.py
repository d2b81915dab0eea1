"""`batch IN.jsonl OUT.jsonl`: answers OpenAI batch lines, many at once, at low priority.

It may be stopped and restarted at any time: lines already answered in OUT are not asked again. The
lines run as those of the gateway's batches do, through `client.gateway.batches`.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from broker.protocol.install import install_hint
from broker.protocol.options import count, number
from client import AsyncClient, BusError, InvalidRequest, Timeout
from client.cli import arguments as flags
from client.cli.progress import Progress, duration
from client.cli.terminal import Terminal

if TYPE_CHECKING:
    # Other commands do not pay for it.
    from client.gateway.batches.lines import Line
    from client.gateway.batches.output import Output

#: The same as OpenAI's `service_tier: flex` at the gateway.
PRIORITY: Final = -50
CONCURRENCY: Final = 64
#: A batch is not in a hurry: it waits longer than a person would.
_QUEUE_S: Final = 24 * 3600.0
_RECONNECT_S: Final = 600.0


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "batch",
        help="answer a file of OpenAI batch lines",
        description="Answers every line of IN into OUT, in order of completion, as the gateway "
        "would answer it. "
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


def run(arguments: argparse.Namespace, terminal: Terminal) -> int:
    """Answer the lines that are not answered yet."""
    try:
        import client.gateway.batches.answering  # noqa: F401
        from client.gateway.batches.output import Output
    except ModuleNotFoundError as error:
        raise InvalidRequest(
            f"batch needs {error.name}; install it with: {install_hint('gateway')}"
        ) from None
    wanted = _checked(arguments.input)
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
        started_s = time.monotonic()
        try:
            with Progress(terminal, "batch", len(wanted), before) as progress:
                asyncio.run(_answer_all(arguments, output, progress))
            output.sync()
        except (KeyboardInterrupt, BusError):
            left = len(wanted - output.done)
            terminal.notice(f"stopped: {left} lines are left; run the same command to continue")
            raise
        except OSError as error:
            raise InvalidRequest(
                f"{arguments.output}: {error.strerror}; run the same command to continue"
            ) from None
    _report(arguments, terminal, output, time.monotonic() - started_s)
    return 1 if output.tally.failed else 0


def _checked(path: Path) -> set[str]:
    """The ids of the whole input. Raises `InvalidRequest` for any mistake, so that nothing of a
    faulty file is run."""
    from client.gateway.batches.lines import check

    try:
        found = check(path)
    except OSError as error:
        raise InvalidRequest(f"{path}: {error.strerror}") from None
    for mistake in found.mistakes:
        where = "" if mistake.line is None else f", line {mistake.line}"
        raise InvalidRequest(f"{path}{where}: {mistake.message}")
    return found.ids


def _report(
    arguments: argparse.Namespace, terminal: Terminal, output: Output, took_s: float
) -> None:
    now, before = output.written, output.before
    answered = now.completed + now.failed
    if arguments.json:
        terminal.json(
            {
                "answered": answered,
                "failed": now.failed,
                "failed_before": before.failed,
                "prompt_tokens": now.prompt_tokens,
                "completion_tokens": now.completion_tokens,
                "took_s": round(took_s, 3),
            }
        )
        return
    if not answered:
        again = "; --retry-failed retries those" if before.failed else ""
        terminal.notice(f"nothing to do: all lines are answered, {before.failed} failed{again}")
        return
    rate = now.completion_tokens / max(took_s, 1e-3)
    failed = f", {now.failed} of them failed" if now.failed else ""
    terminal.notice(
        f"{answered} lines{failed}; {now.prompt_tokens} prompt tokens, "
        f"{now.completion_tokens} answer tokens ({rate:.0f}/s) in {duration(took_s)}"
    )
    if output.tally.failed:
        terminal.notice(f"{output.tally.failed} failed in total; --retry-failed retries those")


async def _answer_all(arguments: argparse.Namespace, output: Output, progress: Progress) -> None:
    from client.gateway.batches.answering import RETRY, Doors, Unanswered, gateway_of
    from client.gateway.batches.lines import lines
    from client.gateway.batches.work import Room, work_through
    from client.gateway.config import Config
    from client.gateway.keys import ANYBODY

    async with AsyncClient(
        arguments.broker,
        name="batch",
        server_key=arguments.server_key,
        key_file=arguments.key_file,
        join=arguments.join,
        timeout=Timeout(connect=arguments.connect_timeout),
    ) as bus:
        # Report an absent broker before anything starts.
        await bus.query("bus.version")
        doors = Doors(
            gateway_of(Config(allow_remote_images=arguments.allow_remote_images), bus),
            retry=replace(RETRY, reconnect=arguments.reconnect),
            priority=arguments.priority,
        )
        limits = Timeout(
            connect=max(arguments.reconnect, 0.001), queue=_QUEUE_S, total=arguments.timeout
        )
        room = Room(lambda _: arguments.concurrency)

        async def enter(line: Line) -> None:
            await room.enter("")

        def leave(line: Line) -> None:
            room.leave("")

        async def answer(line: Line) -> None:
            try:
                answered = await doors.answer(line, ANYBODY, limits)
            except Unanswered as error:
                # No line can succeed any more; what failed is not the line.
                assert isinstance(error.__cause__, BusError)
                raise error.__cause__ from None
            output.write(answered.line)
            progress.advance(failed=answered.failure is not None)

        left = (line for line in lines(arguments.input) if line.custom_id not in output.done)
        await work_through(left, enter, answer, leave)
