"""The client process of `bench.chaos` and of the wire tests of faults; a process, so that it can be
stopped and killed.

Reads paced streams of the echo engine. It prints `running` once every lane has part of its first
answer, and at the end one JSON line with every stream's tokens, text and arrival times. It judges
nothing: the starter knows what should have arrived.

Odd lanes draw words from a seed; even lanes echo text with several bytes per character and a stop
string whose start occurs in it, so that text is held back. Every other even lane is a chat: its
text is a thought, words and a call of a tool, at different places in different lanes.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import signal
import sys
import time
from collections.abc import Iterable, Sequence
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
    ToolCall,
)
from client.completion import pieces_of
from worker.engines.echo.tokens import tokenize

LIMIT_S: Final = 90.0
"""Time limit of one stream, so that one that hangs is counted as an error."""
BEGUN_TOKENS: Final = 25
STOP: Final = "zebra!"
_PIECES: Final = (" baba", " dema", "é", "漢", "🦊", " zebr", "x", "\n", " nilo")


_TOOL: Final = {
    "type": "function",
    "function": {
        "name": "paint",
        "parameters": {"type": "object", "properties": {"colours": {"type": "string"}}},
    },
}


@dataclass
class Got:
    """One stream, as its caller saw it."""

    lane: int
    token_ids: list[int] = field(default_factory=list)
    #: Of a chat, thoughts and calls as well: see `written`.
    text: str = ""
    #: Arrival of each piece in monotonic seconds, which all processes of a machine share.
    arrived_s: list[float] = field(default_factory=list)
    #: When it started at which worker.
    workers: list[tuple[float, str]] = field(default_factory=list)
    resumed: int = 0
    #: The cause of each interruption, and the tokens before it.
    causes: list[str] = field(default_factory=list)
    broken_at: list[int] = field(default_factory=list)
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


def is_chat(lane: int) -> bool:
    """The lane has thoughts and calls."""
    return lane % 4 == 2


def chat_of(lane: int, tokens: int) -> tuple[str, str]:
    """A text of at least so many tokens with a thought and a call, and what it is read as."""
    generator = random.Random(lane)

    def some(count: int) -> str:
        return "".join(generator.choices([p for p in _PIECES if p != "\n"], k=count)) + " baba"

    # At the 25th token, when faults strike, some lanes think, some begin a call, some write its
    # arguments.
    thought, before = ((40, 4), (8, 1), (1, 1))[lane // 4 % 3]
    parts = [("reasoning", "So" + some(thought)), ("content", "Well" + some(before))]
    colours = json.dumps({"colours": some(20)}, ensure_ascii=False)
    call = f'{{"name": "paint", "arguments": {colours}}}'
    said = "Done" + some(10)
    text = f"<think>{parts[0][1]}</think>{parts[1][1]}<tool_call>{call}</tool_call>"
    while len(tokenize(text + said)) < tokens:
        said += some(10)
    parts += [("call", f"paint {colours}"), ("content", said)]
    return text + said, written(parts)


def written(parts: Iterable[tuple[str, str]]) -> str:
    """An answer in parts of several kinds, as one text; neighbours of a kind are one part."""
    text, last = "", ""
    for kind, said in parts:
        text += said if kind == last != "call" else f"[{kind}]{said}"
        last = kind
    return text


def place_in_chat(written_so_far: str) -> str:
    """What a chat's answer is in the middle of."""
    if "</think>" not in written_so_far:
        return "thought"
    call = written_so_far.partition("<tool_call>")[2]
    if not call or "</tool_call>" in call:
        return "text"
    return "arguments" if '"arguments": {' in call else "name"


def arguments_of(lane: int, tokens: int, pace_ms: float) -> dict[str, Any]:
    """The arguments of a lane's request."""
    if is_chat(lane):
        return {
            "messages": chat_of(lane, tokens)[0],
            "tools": [_TOOL],
            "template_args": {"echo": {"step_delay_ms": pace_ms}},
            "seed": 1000 + lane,
            "stop": [STOP],
        }
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
        ask = client.chat if is_chat(got.lane) else client.generate
        stream: AsyncStream = await ask(model="echo", stream=True, **asked)
        parts: list[tuple[str, str]] = []
        try:
            async for event in stream:
                match event:
                    case Started():
                        got.workers.append((time.monotonic(), event.worker))
                    case Recovering():
                        got.causes.append(event.reason)
                        got.broken_at.append(len(got.token_ids))
                    case Tokens():
                        got.token_ids += event.token_ids
                        parts += [(piece.kind, piece.text) for piece in pieces_of(event)]
                        got.arrived_s.append(time.monotonic())
                        if len(got.token_ids) >= BEGUN_TOKENS:
                            self._begun(got.lane)
                    case ToolCall():
                        parts.append(("call", f"{event.name} {event.arguments_json}"))
                    case End():
                        parts += [(piece.kind, piece.text) for piece in pieces_of(event)]
        finally:
            got.resumed = stream.resumed
            split = is_chat(got.lane)
            got.text = written(parts) if split else "".join(text for _, text in parts)

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
