"""`generate`, `embed`, `count`: one question, one answer, for people and for scripts."""

from __future__ import annotations

import argparse
import math
import os
import select
import stat
import sys
import time
from typing import Any, Final

from client import (
    End,
    FinishReason,
    InvalidRequest,
    PieceKind,
    Queued,
    Recovering,
    Started,
    Stream,
    Tokens,
)
from client.cli import arguments as flags, thoughts
from client.cli.terminal import Terminal
from client.cli.thoughts import FOLD, HIDE, Thoughts
from client.completion import pieces_of
from client.images import check_file

PIPE_WAIT_S: Final = 3.0
"""How long to wait for the first byte of a pipe on standard input if a question was
typed as well."""


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the commands."""
    parser = commands.add_parser("generate", help="ask once and stream the answer")
    parser.add_argument("prompt", nargs="*", help="the question; piped input is put before it")
    flags.add_model(parser)
    parser.add_argument(
        "--image", "-i", action="append", default=[], metavar="PATH", help="image; repeatable"
    )
    parser.add_argument("--system", metavar="TEXT", help="system prompt")
    parser.add_argument(
        "--raw", action="store_true", help="continue the text without a chat template"
    )
    parser.add_argument("--stats", action="store_true", help="tokens and times on standard error")
    thoughts.add(parser)
    flags.add_json(parser)
    flags.add_params(parser)
    flags.add_connection(parser)
    parser.set_defaults(run=generate)

    parser = commands.add_parser("embed", help="vectors of texts, as JSON lines")
    parser.add_argument("text", nargs="*", help="texts; without them, lines of standard input")
    flags.add_model(parser)
    flags.add_connection(parser)
    parser.set_defaults(run=embed)

    parser = commands.add_parser("count", help="tokens of a text")
    parser.add_argument("text", nargs="*", help="the text; piped input is put before it")
    flags.add_model(parser)
    flags.add_connection(parser)
    parser.set_defaults(run=count)


def generate(arguments: argparse.Namespace, terminal: Terminal) -> int:
    """Ask one question."""
    if arguments.raw and arguments.system:
        raise InvalidRequest("--system is for the chat template: leave it out, or --raw")
    prompt = read_text(arguments.prompt)
    params = flags.params_of(arguments)
    for path in arguments.image:
        check_file(path)  # a wrong one is told before anything is sent
    with flags.connect(arguments) as client:
        if arguments.raw:
            stream = client.generate(
                prompt, model=arguments.model, images=arguments.image, stream=True, **params
            )
        else:
            turns: list[dict[str, Any]] = [{"role": "user", "content": prompt}]
            if arguments.system:
                turns.insert(0, {"role": "system", "content": arguments.system})
            stream = client.chat(
                arguments.model, turns, images=arguments.image, stream=True, **params
            )
        with stream:
            if arguments.json:
                end = _as_json(stream, terminal, with_thoughts=arguments.thoughts != HIDE)
            else:
                end = show(stream, terminal, thoughts.mode_of(arguments.thoughts))
        if arguments.stats:
            terminal.notice(summary(end))
    return 0


_WAIT_SAID_S: Final = 5.0
"""Between two words about the same wait."""
CONTINUED: Final = {
    "ids": ", from the same tokens: what is drawn at random goes on differently",
    "text": ", from the same text: the rest may differ from what was interrupted",
}
"""For people: how a stream went on, where not exactly."""


class _Waits:
    """Tells people what a request waits for, and not too often."""

    def __init__(self, terminal: Terminal) -> None:
        self._terminal = terminal
        self._said = ""
        self._said_at_s = -math.inf

    def tell(self, event: Queued) -> None:
        ahead = f"{event.position} ahead" if event.position else "next"
        words = [event.reason] if event.reason else []
        if event.starts_in_s is not None and event.starts_in_s >= 1:
            words.append(f"starts in about {event.starts_in_s:.0f} s")
        if not words and not event.position:
            return
        said = f"[waiting: {', '.join([ahead, *words])}]"
        every_s = _WAIT_SAID_S if event.reason == self._said else 0.0
        if time.monotonic() - self._said_at_s < every_s:
            return
        self._said, self._said_at_s = event.reason, time.monotonic()
        self._terminal.notice(said)


def show(stream: Stream, terminal: Terminal, mode: str = FOLD) -> End:
    """Print a stream's text as it arrives, with a notice if it had to be resumed. `mode`: what is
    done with thoughts, see `thoughts`."""
    broken, told, waits = False, "", _Waits(terminal)
    thinking = Thoughts(terminal, mode)
    try:
        for event in stream:
            match event:
                case Tokens() | End():
                    text = thinking.take(event)
                    if text:
                        terminal.piece(text)
                case Recovering(reason, worker) if worker:
                    broken = True
                    terminal.notice(f"\n[interrupted: {reason}; resuming]")
                case Queued():
                    waits.tell(event)
                case Recovering(reason) if reason != told:  # repeated while nobody serves it
                    told = reason
                    terminal.notice(f"[{reason}; trying again]")
                case Started(worker) if broken:
                    how = CONTINUED.get(event.continued, "")
                    terminal.notice(f"[resumed on worker {worker}{how}]")
    finally:
        thinking.close()
    terminal.line()
    end = stream.end
    cut = end.finish_reason is FinishReason.LENGTH
    if cut and stream.reasoning_so_far and not stream.text_so_far:
        terminal.notice(
            "(no answer: the thought took all tokens; raise max_tokens, or limit the thought by "
            "thinking_tokens)"
        )
    return end


def _as_json(stream: Stream, terminal: Terminal, *, with_thoughts: bool) -> End:
    for event in stream:
        match event:
            case Tokens():
                line: dict[str, Any] = {
                    "event": "tokens",
                    "offset": event.offset,
                    "text": event.text,
                    "token_ids": event.token_ids,
                }
                thought = "".join(
                    piece.text for piece in pieces_of(event) if piece.kind == PieceKind.REASONING
                )
                if thought and with_thoughts:
                    line["reasoning"] = thought
                if event.logprobs is not None:
                    line["logprobs"] = [entry.logprob for entry in event.logprobs]
                terminal.json(line)
            case End():
                whole: dict[str, Any] = {"event": "end", "text": stream.text_so_far}
                if stream.reasoning_so_far and with_thoughts:
                    whole["reasoning"] = stream.reasoning_so_far
                terminal.json(
                    whole
                    | {
                        "finish_reason": event.finish_reason,
                        "usage": event.usage,
                        "timings": event.timings,
                        "model": event.model,
                        "worker": event.worker,
                        "resumed": event.resumed,
                        "continued": event.continued,
                        "seed": stream.seed,
                        "request_id": stream.request_id,
                        "first_token_s": event.first_token_s,
                        "total_s": event.total_s,
                    }
                )
            case Queued(position, starts_in_s, why, progress):
                line = {"event": "queued", "position": position}
                if starts_in_s is not None:
                    line["starts_in_s"] = starts_in_s
                if progress is not None:
                    line["progress"] = progress
                terminal.json(line | ({"why": why} if why else {}))
            case Started():
                terminal.json({"event": "started", "worker": event.worker, "model": event.model})
            case Recovering():
                terminal.json({"event": "recovering", "reason": event.reason})
    return stream.end


def summary(end: End) -> str:
    """Tokens and times of an answer, in one line."""
    count = end.usage.completion_tokens
    thought = end.usage.reasoning_tokens
    parts = [
        f"{end.usage.prompt_tokens} prompt tokens, {count} answer tokens"
        + (f" ({thought} of them thought)" if thought else "")
    ]
    if end.first_token_s is not None:
        parts.append(f"first token after {end.first_token_s * 1000:.0f} ms")
        streaming_s = end.total_s - end.first_token_s
        if count > 1 and streaming_s > 0.001:
            parts.append(f"then {(count - 1) / streaming_s:.1f} tokens/s")
        elif end.timings.decode_ms > 0:  # all tokens came at once: only the worker knows the rate
            parts.append(f"{count * 1000 / end.timings.decode_ms:.1f} tokens/s at the worker")
    parts.append(f"{end.total_s:.2f} s in all, on {end.worker or 'no worker'}")
    if end.resumed:
        how = f" ({end.continued})" if end.continued else ""
        parts.append(f"resumed {end.resumed} times{how}")
    return "; ".join(parts)


def embed(arguments: argparse.Namespace, terminal: Terminal) -> int:
    """Print vectors."""
    texts = arguments.text or [line.rstrip("\n") for line in sys.stdin]
    with flags.connect(arguments) as client:
        answer = client.embed(texts, model=arguments.model)
    for text, vector in zip(texts, answer.vectors, strict=True):
        terminal.json({"text": text, "embedding": vector.tolist()})
    return 0


def count(arguments: argparse.Namespace, terminal: Terminal) -> int:
    """Print a number of tokens."""
    with flags.connect(arguments) as client:
        terminal.line(str(client.count(read_text(arguments.text), model=arguments.model)))
    return 0


def read_text(words: list[str]) -> str:
    """The question: piped input, then the words of the command line. Raises `InvalidRequest` for
    none."""
    if not words and sys.stdin.isatty():
        # Otherwise the command would seem to hang.
        print("type the text; Ctrl-D at the start of a line ends it:", file=sys.stderr)
    piped = sys.stdin.read() if not words else _piped()
    text = "\n\n".join(filter(None, [piped.rstrip("\n"), " ".join(words)]))
    if not text:
        raise InvalidRequest("no text given; put it on the command line or on standard input")
    return text


def _piped() -> str:
    """The content of a pipe or file on standard input; empty for anything else. An open pipe that
    nobody writes to, left there by some program, is not waited for."""
    try:
        kind = os.fstat(sys.stdin.fileno()).st_mode
    except (OSError, ValueError):  # closed
        return ""
    if not (stat.S_ISFIFO(kind) or stat.S_ISREG(kind)):
        return ""
    if not select.select([sys.stdin], [], [], PIPE_WAIT_S)[0]:
        print("nothing came on standard input; asking without it", file=sys.stderr)
        return ""
    return sys.stdin.read()
