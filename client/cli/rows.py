"""Cells that several tables share, computed from rows of `bus.workers`. Pure; knows no terminal."""

from __future__ import annotations

from typing import Any

Row = dict[str, Any]


def worker_state(row: Row) -> str:
    """`ready`, `loading 40%`, `ready, serial` if a model of the worker is not batched, ..."""
    state = str(row.get("state") or "unknown")
    progress = row.get("progress")
    if state == "loading" and progress is not None:
        return f"{state} {progress:.0%}"
    return f"{state}, serial" if row.get("serial") else state


def worker_note(row: Row) -> str:
    """The worker's own note, and why requests of a model run one at a time."""
    serial: dict[str, str] = row.get("serial") or {}
    slow = [f"{model} runs one request at a time: {why}" for model, why in serial.items()]
    return "; ".join([*filter(None, [str(row.get("note") or "")]), *slow])
