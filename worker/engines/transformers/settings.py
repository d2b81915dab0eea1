"""The engine's own settings: every `--engine-arg KEY=VALUE`, its default, unit and reason.

Parses text into checked values and nothing else; must never import torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from worker.engines.common.arguments import SharedSettings, settings_from

__all__ = ["EngineSettings", "parse_settings"]


@dataclass(frozen=True, slots=True)
class EngineSettings(SharedSettings):
    """Settings of the transformers engine. 0 means "the engine's own choice" where it says so."""

    #: "auto" tries the slot scheduler and falls back; "slots" and "generate" force one.
    scheduler: str = "auto"
    #: Prompt tokens computed in one step; 0: 256 on a CPU, 1024 elsewhere. Larger chunks raise the
    #: gap between tokens of running streams, smaller ones the time to the first token.
    prefill_chunk: int = 0
    #: Longest time, milliseconds, that prompts may add to one step while streams are running; the
    #: chunk shrinks until it is kept.
    stall_ms: float = 200.0
    #: Key/value tokens held at once, all rows together; 0: what fits into `memory_share`.
    kv_tokens: int = 0
    #: Share of the memory left free after loading that keys, values and prefixes may take; 0: 0.8
    #: of an accelerator's, 0.4 of a host's, which others use too.
    memory_share: float = 0.0
    #: Tokens of finished prompts and answers kept for reuse; -1: a quarter of what fits, on a host
    #: at most 1 GiB; 0: none.
    prefix_tokens: int = -1
    #: "auto", "eager", "sdpa", "flash_attention_2", ...: handed to transformers.
    attention: str = "auto"
    #: "auto": decode steps are captured on CUDA where the load-time test passes; "off": never;
    #: "on": steps of fixed shape everywhere, captured or not.
    cuda_graphs: str = "auto"
    #: The host tells of one token while the device computes the next: "auto": on an accelerator;
    #: "on"; "off".
    overlap: str = "auto"
    #: Threads of one torch operation on a CPU; 0: torch's own choice.
    threads: int = 0
    #: Load only safetensors: pickled weights run code.
    safetensors_only: bool = True
    #: Memory for weights, "0=20GiB,cpu=64GiB"; empty: accelerate's own choice.
    max_memory: str = ""
    #: PEFT adapters served beside their base: "name=path,name=path" (first model only).
    adapters: str = ""


_CHOICES: dict[str, tuple[str, ...]] = {
    "scheduler": ("auto", "slots", "generate"),
    "cuda_graphs": ("auto", "on", "off"),
    "overlap": ("auto", "on", "off"),
}
_MINIMUM: dict[str, float] = {
    "prefill_chunk": 0,
    "stall_ms": 1,
    "kv_tokens": 0,
    "memory_share": 0,
    "prefix_tokens": -1,
    "threads": 0,
}


def parse_settings(engine_args: Mapping[str, str]) -> EngineSettings:
    """Turn the texts of `--engine-arg` into settings. Raises `EngineLoadError` for an unknown name
    or a bad value."""
    return settings_from(
        engine_args, EngineSettings, "transformers", choices=_CHOICES, minimum=_MINIMUM
    )
