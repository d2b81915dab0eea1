"""The client that `bench.chaos` and the wire tests of faults start, as a process of its own so that
it can be stopped and killed.

Reads paced streams of the echo engine and prints what it got: `running` once every lane has
some of its first answer, and at the end one JSON line with every stream's tokens, text and times
of arrival. Judges nothing: that is for who started it and knows what should have come.

Odd lanes draw words from a seed; even lanes echo text of several bytes a character, with a stop
string whose beginning occurs, so that text is held back.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Final

from client import (
    AsyncClient,
    AsyncStream,
    BusError,
    End,
    Recovering,
    Retry,
    Started,
    Timeout,
    Tokens,
)
from worker.engines.echo.tokens import tokenize

LIMIT_S: Final = 90.0
"""Of one stream: one that hangs must become an error that is counted."""
BEGUN_TOKENS: Final = 25
STOP: Final = "zebra!"
_PIECES: Final = (" baba", " dema", "é", "漢", "🦊", " zebr", "x", "\n", " nilo")


@dataclass
class Got:
    """One stream as its caller saw it."""

    lane: int
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    #: Monotonic seconds (of the machine, so comparable between processes) of each piece.
    arrived_s: list[float] = field(default_factory=list)
    #: When it started where.
    workers: list[tuple[float, str]] = field(default_factory=list)
    resumed: int = 0
    #: Why it was interrupted, each time.
    causes: list[str] = field(default_factory=list)
    #: Code of the error that ended it; None: an END.
    error: str | None = None
    message: str = ""
    #: Of each token, where they were asked for.
    logprobs: list[float] = field(default_factory=list)


def prompt_of(lane: int, tokens: int) -> str:
    """Text of at least so many tokens; the same for a lane always."""
    generator = random.Random(lane)
    text = f"{lane}:"
    while len(tokenize(text)) < tokens:
        text += "".join(generator.choices(_PIECES, k=20))
    return text


def arguments_of(lane: int, tokens: int, pace_ms: float) -> dict[str, Any]:
    """What a lane asks for."""
    echo: dict[str, Any] = {"step_delay_ms": pace_ms}
    params: dict[str, Any] = {"max_tokens": tokens, "seed": 1000 + lane, "stop": [STOP]}
    if lane % 2:
        echo |= {"mode": "sampled", "answer_tokens": tokens}
        prompt = f"p{lane}"
    else:
        prompt = prompt_of(lane, tokens)
    return {"prompt": prompt, "template_args": {"echo": echo}, **params}


class _Lanes:
    """All lanes of this process."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.got: list[Got] = []
        self.stopping = False
        self._late = set(options.lanes)

    async def lane(self, client: AsyncClient, lane: int) -> None:
        """One stream; with --repeat, one after the other until told to stop."""
        options = self.options
        while True:
            got = Got(lane)
            self.got.append(got)
            try:
                await self._read(client, got)
            except BusError as error:
                got.error, got.message = error.code, str(error)
            self._begun(lane)
            if self.stopping or not options.repeat:
                return

    async def _read(self, client: AsyncClient, got: Got) -> None:
        options = self.options
        asked = arguments_of(got.lane, options.tokens, options.pace_ms)
        stream: AsyncStream = await client.generate(model="echo", stream=True, **asked)
        try:
            async for event in stream:
                match event:
                    case Started():
                        got.workers.append((time.monotonic(), event.worker))
                    case Recovering():
                        got.causes.append(event.reason)
                    case Tokens():
                        got.token_ids += event.token_ids
                        got.text += event.text
                        got.arrived_s.append(time.monotonic())
                        if len(got.token_ids) >= BEGUN_TOKENS:
                            self._begun(got.lane)
                    case End():
                        got.text += event.text
        finally:
            got.resumed = stream.resumed

    def _begun(self, lane: int) -> None:
        if lane in self._late:
            self._late.discard(lane)
            if not self._late:
                print("running", flush=True)


async def _main(options: argparse.Namespace) -> None:
    lanes = _Lanes(options)
    asyncio.get_running_loop().add_signal_handler(
        signal.SIGUSR1, lambda: setattr(lanes, "stopping", True)
    )
    retry = Retry(attempts=10)
    async with AsyncClient(
        options.broker, timeout=Timeout(connect=20, total=LIMIT_S), retry=retry, name=options.name
    ) as client:
        await asyncio.gather(*(lanes.lane(client, lane) for lane in options.lanes))
    print(json.dumps({"streams": [asdict(got) for got in lanes.got]}), flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Read and report; the exit status says nothing of the streams."""
    parser = argparse.ArgumentParser(description="Reader of bench.chaos.")
    parser.add_argument("--broker", required=True, help="front addresses, a comma between two")
    parser.add_argument("--name", default="reader")
    parser.add_argument("--lanes", type=lambda text: range(*map(int, text.split(":"))))
    parser.add_argument("--tokens", type=int, required=True, help="of each answer")
    parser.add_argument("--pace-ms", type=float, required=True, help="between two tokens")
    parser.add_argument("--repeat", action="store_true", help="go on until SIGUSR1")
    asyncio.run(_main(parser.parse_args(argv)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
