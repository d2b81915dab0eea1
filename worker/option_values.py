"""Parses the values of the worker's options: addresses, sizes, times, models.

Unless its docstring says otherwise, each function parses one value and raises
`argparse.ArgumentTypeError`, which says what to write instead. Must never import zmq or torch, so
that `--help` is quick.
"""

from __future__ import annotations

import argparse
import shlex
from datetime import datetime
from pathlib import Path
from typing import Final

from broker.protocol.limits import MAX_HELD_REQUESTS, MAX_SECONDS, MAX_SPEED
from broker.protocol.options import count, number
from worker.conversations import read_template
from worker.ending import times

NEVER: Final = "never"
CLOUDS: Final = ("aws", "gcp", "azure")
"""The clouds in `ending.sources`, named here so that `--help` need not load that module."""


def check_address(address: str) -> str:
    """Check a broker address for ZeroMQ. Raises ValueError that says what to use instead."""
    scheme, _, rest = address.partition("://")
    if scheme in ("http", "https"):
        raise ValueError(
            f"{address} is a web address, but the bus speaks ZeroMQ: use tcp://HOST:PORT with the "
            "broker's back port (5556 unless its operator chose another)"
        )
    if scheme == "ipc" and rest:
        return address
    host, _, port = rest.rpartition(":")
    if scheme == "tcp" and host and port.isdigit() and 0 < int(port) < 65536:
        return address
    raise ValueError(f"{address!r} is not a broker address: use tcp://HOST:PORT or ipc://PATH")


def addresses(text: str) -> str:
    """Addresses of brokers, separated by commas."""
    try:
        for address in text.split(","):
            check_address(address)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def template(text: str) -> str:
    """The name of a chat template, or the file of one."""
    try:
        read_template(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def models_in(text: str) -> list[str]:
    """What `--models` names: the models in a folder, or a list separated by commas. Raises
    ValueError."""
    folder = Path(text).expanduser()
    if "," in text or not folder.is_dir() or (folder / "config.json").is_file():
        return [item.strip() for item in text.split(",") if item.strip()]
    found = [str(p.parent) for p in folder.glob("*/config.json")]
    found += [str(p) for p in folder.glob("*.gguf")]
    if not found:
        raise ValueError(
            f"--models {text}: it has neither a folder with a config.json nor a .gguf file"
        )
    return sorted(found)


def positive(text: str) -> float:
    value = number(text)
    if not 0 < value <= min(MAX_SECONDS, MAX_SPEED):
        raise argparse.ArgumentTypeError(f"{text} is not a positive number up to {MAX_SECONDS:.0f}")
    return value


def slots(text: str) -> int:
    """As many as HELLO can list requests that run."""
    value = count(text)
    if value > MAX_HELD_REQUESTS:
        raise argparse.ArgumentTypeError(f"must be {MAX_HELD_REQUESTS} or less, got {text!r}")
    return value


_UNITS: Final = {
    "": 1,
    **{f"{letter}B": 1000**power for power, letter in enumerate("KMGT", 1)},
    **{f"{letter}iB": 1024**power for power, letter in enumerate("KMGT", 1)},
}


def size(text: str) -> int:
    amount = text.rstrip("KMGTiB")
    unit = text[len(amount) :]
    try:
        value = int(float(amount) * _UNITS[unit])
    except (ValueError, KeyError, OverflowError):
        value = 0
    if value <= 0:
        raise argparse.ArgumentTypeError(
            f"{text} is not a size: write 20GiB, 500MB, or a number of bytes"
        )
    return value


def seconds(text: str) -> float:
    value = number(text)
    if not 0 <= value <= MAX_SECONDS:
        raise argparse.ArgumentTypeError(
            f"{text} is not a number of seconds from 0 to {MAX_SECONDS:.0f}"
        )
    return value


def point(text: str) -> str:
    try:
        if text != NEVER:
            times.point(text, datetime.now())
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{error}, or {NEVER}") from None
    return text


def command(text: str) -> str:
    """A command line, split into words as by a shell."""
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a command: {error}") from None
    if not words:
        raise argparse.ArgumentTypeError("an empty command")
    return text


def length(text: str) -> float:
    try:
        return times.length(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def clouds(text: str) -> str:
    for name in text.split(","):
        if name not in CLOUDS:
            raise argparse.ArgumentTypeError(f"{name!r}: must be one of {', '.join(CLOUDS)}")
    return text
