"""The engine's own settings: every `--engine-arg KEY=VALUE`, its default, unit and reason.

Parses text into checked values and nothing else; must never import torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from worker.engines.base import EngineLoadError

__all__ = ["EngineSettings", "parse_settings"]


@dataclass(frozen=True, slots=True)
class EngineSettings:
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
    #: Longest prompt plus answer, tokens; 0: what the model's configuration says.
    context_tokens: int = 0
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
    #: Threads that decode pictures and tokenise prompts outside the step loop.
    preprocess_threads: int = 2
    #: Largest picture, pixels (width times height), checked before it is decoded.
    image_pixels: int = 50_000_000
    #: Largest picture, octets.
    image_bytes: int = 32 * 1024 * 1024
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
    "context_tokens": 0,
    "threads": 0,
    "preprocess_threads": 1,
    "image_pixels": 1,
    "image_bytes": 1,
}


def _boolean(text: str) -> bool:
    words = {"1": True, "true": True, "yes": True, "on": True}
    words |= {"0": False, "false": False, "no": False, "off": False}
    try:
        return words[text.strip().lower()]
    except KeyError:
        raise ValueError("expected true or false") from None


def parse_settings(engine_args: Mapping[str, str]) -> EngineSettings:
    """Turn the texts of `--engine-arg` into settings. Raises `EngineLoadError` for an unknown name
    or a bad value."""
    known = {field.name: field for field in fields(EngineSettings)}
    values: dict[str, Any] = {}
    for given, text in engine_args.items():
        name = given.replace("-", "_")
        if name not in known:
            raise EngineLoadError(
                f"unknown --engine-arg {given!r}: the transformers engine knows "
                + ", ".join(sorted(known))
            )
        default = known[name].default
        parse: Callable[[str], Any] = _boolean if isinstance(default, bool) else type(default)
        try:
            value = parse(text)
        except ValueError as error:
            raise EngineLoadError(f"--engine-arg {given}={text}: {error}") from None
        if name in _CHOICES and value not in _CHOICES[name]:
            raise EngineLoadError(
                f"--engine-arg {given}={text}: choose one of {', '.join(_CHOICES[name])}"
            )
        if name in _MINIMUM and value < _MINIMUM[name]:
            raise EngineLoadError(f"--engine-arg {given}={text}: at least {_MINIMUM[name]:g}")
        values[name] = value
    return EngineSettings(**values)
