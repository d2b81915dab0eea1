"""Cells that several tables share, computed from rows of `bus.workers`. Pure; knows no terminal."""

from __future__ import annotations

from typing import Any

Row = dict[str, Any]


def worker_state(row: Row) -> str:
    """`ready`, `loading 40%`, `ready, loading llama 40%` where it loads a model on demand, `ready,
    serial` if a model of the worker is not batched, ..."""
    state = str(row.get("state") or "unknown")
    progress = row.get("progress")
    if state == "loading" and progress is not None:
        return f"{state} {progress:.0%}"
    if row.get("swap") and progress is not None:
        return f"{state}, loading {row['swap']} {progress:.0%}"
    return f"{state}, serial" if row.get("serial") else state


def worker_device(row: Row) -> str:
    """`cpu, bfloat16`: the device, and what the models on it compute in."""
    numbers: dict[str, str] = row.get("numbers") or {}
    return ", ".join(filter(None, [str(row.get("device") or ""), *dict.fromkeys(numbers.values())]))


def worker_note(row: Row) -> str:
    """The worker's own note, when it will be gone, and why requests of a model run one at a
    time."""
    serial: dict[str, str] = row.get("serial") or {}
    slow = [f"{model} runs one request at a time: {why}" for model, why in serial.items()]
    return "; ".join([*filter(None, [worker_end(row), str(row.get("note") or "")]), *slow])


def worker_end(row: Row) -> str:
    """`ends in 12 min (Slurm job 7)`; empty if no end is known."""
    left_ms = row.get("ends_in_ms")
    if left_ms is None:
        return ""
    why = f" ({row['ends_why']})" if row.get("ends_why") else ""
    return f"ends in {_rough(left_ms / 1000)}{why}"


def _rough(seconds: float) -> str:
    """`45 s`, `12 min`, `3.5 h`."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
