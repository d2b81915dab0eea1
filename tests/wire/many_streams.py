"""Reads several streams at once while something happens in the middle, and checks each text."""

from __future__ import annotations

from collections.abc import Callable

from client import Client, Tokens

WINDOW_TOKENS = 32
"""The most tokens of a stream that a reader which does not read on is sent."""


def read_all(client: Client, count: int, fault: Callable[[], None]) -> list[int]:
    """Read `count` streams at once, call `fault` in the middle, and check every text.

    Returns how often each stream was resumed. Before the fault, only one event of each is read: the
    window is so small that no stream can end before the fault, however long that takes.
    """
    echo = {"mode": "sampled", "answer_tokens": 80, "step_delay_ms": 10}
    options = {"model": "echo", "template_args": {"echo": echo}}
    streams = [
        client.generate("x", seed=n, stream=True, window=WINDOW_TOKENS, **options)
        for n in range(count)
    ]
    events = [iter(stream) for stream in streams]
    heard = [""] * count
    for index, stream in enumerate(events):
        while True:
            event = next(stream)
            if isinstance(event, Tokens):
                heard[index] += event.text
                break
    fault()
    texts = [
        begun + "".join(getattr(event, "text", "") for event in rest)
        for begun, rest in zip(heard, events, strict=True)
    ]
    quick = {"model": "echo", "template_args": {"echo": echo | {"step_delay_ms": 0}}}
    assert texts == [client.generate("x", seed=n, **quick).text for n in range(count)]
    return [stream.resumed for stream in streams]
