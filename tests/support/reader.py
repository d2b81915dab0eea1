"""The client process of `bench.chaos` and of the wire tests of faults; a process, so that it can be
stopped and killed.

Reads paced streams of the echo engine. It prints `running` once every lane has part of its first
answer, and at the end one JSON line with every stream's tokens, text and arrival times. It judges
nothing: the starter knows what should have arrived.

Odd lanes draw words from a seed; even lanes echo text with several bytes per character and a stop
string whose start occurs in it, so that text is held back.
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
"""Time limit of one stream, so that one that hangs is counted as an error."""
BEGUN_TOKENS: Final = 25
STOP: Final = "zebra!"
_PIECES: Final = (" baba", " dema", "é", "漢", "🦊", " zebr", "x", "\n", " nilo")


@dataclass
class Got:
    """One stream, as its caller saw it."""

    lane: int
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    #: Arrival of each piece in monotonic seconds, which all processes of a machine share.
    arrived_s: list[float] = field(default_factory=list)
    #: When it started at which worker.
    workers: list[tuple[float, str]] = field(default_factory=list)
    resumed: int = 0
    #: The cause of each interruption.
    causes: list[str] = field(default_factory=list)
    #: Code of the error that ended it; None for an END.
    error: str | None = None
    message: str = ""
    #: The logprob of each token, if requested.
    logprobs: list[float] = field(default_factory=list)


def prompt_of(lane: int, tokens: int) -> str:
    """Text of at least this many tokens; always the same for a lane."""
    generator = random.Random(lane)
    text = f"{lane}:"
    while len(tokenize(text)) < tokens:
        text += "".join(generator.choices(_PIECES, k=20))
    return text


def arguments_of(lane: int, tokens: int, pace_ms: float) -> dict[str, Any]:
    """The arguments of a lane's request."""
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
        """Read one stream; with --repeat, one after the other until told to stop."""
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
    """Read and report; the exit status does not depend on the streams."""
    parser = argparse.ArgumentParser(description="Reader of bench.chaos.")
    parser.add_argument("--broker", required=True, help="front addresses, separated by commas")
    parser.add_argument("--name", default="reader")
    parser.add_argument("--lanes", type=lambda text: range(*map(int, text.split(":"))))
    parser.add_argument("--tokens", type=int, required=True, help="tokens of each answer")
    parser.add_argument("--pace-ms", type=float, required=True, help="time between two tokens")
    parser.add_argument("--repeat", action="store_true", help="go on until SIGUSR1")
    asyncio.run(_main(parser.parse_args(argv)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
