"""Free memory of a device, memory used by this process, and the errors for too little of it.

Must never allocate.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

import psutil
import torch

from broker.protocol.errors import ErrorCode, ErrorInfo

__all__ = [
    "free_bytes",
    "host_bytes",
    "no_room",
    "release_cached",
    "uncomputable",
    "used_bytes",
]

OTHERS = ("xpu", "npu")
"""Accelerators whose modules (`torch.npu`: torch_npu) tell their memory as `torch.cuda` does."""

_CGROUP = Path("/sys/fs/cgroup")


def free_bytes(device: torch.device) -> int:
    """Bytes that may still be allocated on `device`, respecting a container's limit."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        # Memory that torch holds but does not use is free too.
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory()
    if device.type in OTHERS:
        free, _ = getattr(torch, device.type).mem_get_info(device)
        return int(free)
    free = int(psutil.virtual_memory().available)
    try:
        limit = (_CGROUP / "memory.max").read_text().strip()
        if limit != "max":
            used = int((_CGROUP / "memory.current").read_text())
            free = min(free, int(limit) - used)
    except (OSError, ValueError):
        # No cgroup v2 here: use the machine's value.
        return free
    return max(free, 0)


def host_bytes() -> int:
    """Total memory of this machine, or of its container, in bytes."""
    whole = int(psutil.virtual_memory().total)
    with contextlib.suppress(OSError, ValueError):
        # "max" instead of a number: there is no limit.
        whole = min(whole, int((_CGROUP / "memory.max").read_text()))
    return whole


def used_bytes(device: torch.device) -> int:
    """Bytes in use: torch's allocations on an accelerator, resident memory on a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.memory_allocated(device))
    if device.type == "mps":
        return int(torch.mps.current_allocated_memory())
    if device.type in OTHERS:
        return int(getattr(torch, device.type).memory_allocated(device))
    return int(psutil.Process().memory_info().rss)


def release_cached(device: torch.device) -> None:
    """Release memory that the allocator only keeps in reserve."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()
    elif device.type in OTHERS:
        getattr(torch, device.type).empty_cache()


def no_room(tokens: int, budget: int, capacity: int) -> ErrorInfo:
    """The error for one request whose `tokens` do not fit into the KV cache. `budget` is its limit
    in tokens (0: none), `capacity` the length of a row."""
    return ErrorInfo(
        code=ErrorCode.OUT_OF_MEMORY.value,
        message=(
            f"{tokens} tokens of prompt and answer do not fit into the KV cache "
            f"({budget or capacity} tokens): shorten the prompt, or start the worker with a larger "
            "kv_tokens or memory_share"
        ),
        details={"tokens": tokens, "budget_tokens": budget},
    )


def uncomputable(tokens: int) -> ErrorInfo:
    """The error for one request for which memory ran out while its `tokens` were computed."""
    return ErrorInfo(
        code=ErrorCode.OUT_OF_MEMORY.value,
        message=(
            f"memory ran out while {tokens} tokens of prompt and answer were computed: shorten the "
            "prompt or send smaller images, or start the worker with a smaller prefill_chunk, "
            "kv_tokens or memory_share"
        ),
        details={"tokens": tokens},
    )
