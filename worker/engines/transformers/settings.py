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
    """Settings of the transformers engine."""

    #: "auto" tries the slot scheduler and falls back; "slots" and "generate" force one.
    scheduler: str = "auto"
    #: Prompt tokens computed in one step; 0: 512 on a CPU, 1024 elsewhere. Larger chunks increase
    #: the time between tokens of running streams, smaller ones the time to first token.
    prefill_chunk: int = 0
    #: Longest time, in milliseconds, that prefill may add to a step while streams are running;
    #: chunks shrink to meet it. Measured as CPU time of the engine's thread, or on the device.
    stall_ms: float = 200.0
    #: Longest time, in milliseconds, that prefill may take in a step while no streams are running:
    #: a cancellation, or another model of this worker, may have to wait that long.
    idle_ms: float = 1000.0
    #: Tokens in the KV cache, over all rows; 0: as many as fit into `memory_share`.
    kv_tokens: int = 0
    #: Fraction of the memory that is free after loading that the KV cache and the prefix cache may
    #: take; 0: 0.8 on an accelerator, 0.4 on a host, whose memory other programs use too.
    memory_share: float = 0.0
    #: How the KV cache is stored: "auto": in the model's dtype; "int8": in 8 bits with a scale for
    #: each token and head, which takes about half of the memory of bfloat16 and a quarter of
    #: float32, for slightly different answers.
    kv_cache_dtype: str = "auto"
    #: Tokens of finished prompts and answers kept in the prefix cache; -1: a quarter of what fits,
    #: and on a host at most 1 GiB; 0: none.
    prefix_tokens: int = -1
    #: "auto", "eager", "sdpa", "flash_attention_2", ...: passed to transformers.
    attention: str = "auto"
    #: "auto": decode steps are captured on CUDA if the load-time test passes; "off": never; "on":
    #: steps of fixed shape everywhere, captured or not.
    cuda_graphs: str = "auto"
    #: Whether the host emits one token while the device computes the next: "auto" (on an
    #: accelerator), "on", "off".
    overlap: str = "auto"
    #: "auto": on a CPU, fused decoder layers for model classes that are known, and weights packed
    #: for oneDNN if that makes products faster; "on": both unconditionally, and fused layers on
    #: other devices too; "off": transformers' own layers.
    fused: str = "auto"
    #: Speculative decoding, which verifies several drafted tokens in a step: "auto" and "ngram":
    #: drafts by look-up in prompt and answer, where that pays; "off".
    speculate: str = "auto"
    #: Threads for one torch operation on a CPU; 0: torch's own choice.
    threads: int = 0
    #: Whether only safetensors are loaded: pickled weights can run code.
    safetensors_only: bool = True
    #: Memory for weights by device, "0=20GiB,cpu=64GiB"; empty: accelerate's own choice.
    max_memory: str = ""
    #: PEFT adapters served alongside their base: "name=path,name=path" (first model only).
    adapters: str = ""
    #: A folder of PEFT adapters for the first model, each in a subfolder with the adapter's name,
    #: that are loaded on demand and unloaded again while the model runs; empty: none.
    adapters_folder: str = ""
    #: How many of these may be loaded at once; the least recently used one is unloaded first.
    adapters_loaded: int = 16


_CHOICES: dict[str, tuple[str, ...]] = {
    "scheduler": ("auto", "slots", "generate"),
    "kv_cache_dtype": ("auto", "int8"),
    "cuda_graphs": ("auto", "on", "off"),
    "overlap": ("auto", "on", "off"),
    "fused": ("auto", "on", "off"),
    "speculate": ("auto", "ngram", "off"),
}
_MINIMUM: dict[str, float] = {
    "prefill_chunk": 0,
    "stall_ms": 1,
    "idle_ms": 1,
    "kv_tokens": 0,
    "memory_share": 0,
    "prefix_tokens": -1,
    "threads": 0,
    "adapters_loaded": 1,
}


def parse_settings(engine_args: Mapping[str, str]) -> EngineSettings:
    """Parse `--engine-arg` values into settings. Raises `EngineLoadError` for an unknown name or a
    bad value."""
    return settings_from(
        engine_args, EngineSettings, "transformers", choices=_CHOICES, minimum=_MINIMUM
    )
