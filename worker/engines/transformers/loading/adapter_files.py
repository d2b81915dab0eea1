"""PEFT adapters on disk: which files belong together, and which kinds are supported.

Must never put an adapter into a model.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from broker.protocol.install import install_hint
from worker.engines.base import EngineLoadError
from worker.engines.common.failures import one_line
from worker.engines.transformers.settings import EngineSettings

__all__ = [
    "Adapter",
    "explained",
    "peft_library",
    "read_adapter",
    "refusal",
    "refuse_over_quantised",
]

_FILES = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")

FROM_BASE_WEIGHTS = ("pissa", "olora")
"""Initialisations that also change the base, in a way that can be recomputed from its weights."""
HARMLESS_STARTS = ("gaussian", "eva", "orthogonal", "mica")
"""Initialisations that leave the base as it is."""


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter on disk."""

    path: str
    config: Any
    weights: dict[str, torch.Tensor]

    @property
    def changes_base(self) -> bool:
        """Whether its training began by changing the base's weights."""
        start = getattr(self.config, "init_lora_weights", None)
        return isinstance(start, str) and start.lower() in FROM_BASE_WEIGHTS


def peft_library() -> Any:
    """peft, an optional dependency. Raises `EngineLoadError` if it is missing."""
    try:
        import peft
    except ImportError:
        raise EngineLoadError(
            f"LoRA adapters need peft: {install_hint('worker', 'lora')}"
        ) from None
    return peft


def read_adapter(path: str, settings: EngineSettings) -> Adapter:
    """The adapter at `path`, a folder or a hub id. Raises `EngineLoadError` if its kind is not
    supported or its files are incomplete."""
    peft = peft_library()
    folder = Path(path).expanduser()
    if folder.is_dir():
        _refuse_incomplete(folder, settings)
    with explained(path):
        config = peft.PeftConfig.from_pretrained(path)
        _refuse_kind(path, config)
        weights = peft.load_peft_weights(path, device="cpu")
    return Adapter(path, config, weights)


def _refuse_incomplete(folder: Path, settings: EngineSettings) -> None:
    held = {name for name in _FILES if (folder / name).is_file()}
    if _FILES[0] not in held or len(held) < 2:
        raise EngineLoadError(
            f"{folder} is not a complete adapter: it needs {_FILES[0]} and {_FILES[1]}"
        )
    if _FILES[1] not in held and settings.safetensors_only:
        raise EngineLoadError(
            f"adapter {folder} holds pickled weights ({_FILES[2]}): convert them to safetensors, "
            "or pass --engine-arg safetensors_only=false"
        )


def _refuse_kind(path: str, config: Any) -> None:
    """Refuse adapters that depend on more than weights: neither merging nor choosing per row
    could reproduce them."""
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    unknown = _unknown_options(Path(path).expanduser() / _FILES[0], config)
    if unknown:
        raise refusal(
            path,
            f"it was saved by another peft and sets {', '.join(unknown)}, which the installed one "
            "does not support",
        )
    if config.is_prompt_learning or config.is_adaption_prompt or kind in ("XLORA", "POLY"):
        raise refusal(path, f"it is of kind {kind}, which changes more than weights")
    if getattr(config, "alora_invocation_tokens", None):
        raise refusal(path, "it is an activated LoRA, which depends on tokens of the prompt")
    if getattr(config, "arrow_config", None):
        raise refusal(path, "it routes between other adapters (Arrow)")
    start = getattr(config, "init_lora_weights", True)
    if isinstance(start, str) and start.lower() not in (*FROM_BASE_WEIGHTS, *HARMLESS_STARTS):
        raise refusal(
            path,
            f"its training changed the base (init_lora_weights={start}), and its folder does not "
            "contain that change; save it with path_initial_model_for_weight_conversion",
        )


def _unknown_options(file: Path, config: Any) -> list[str]:
    """Options in an adapter's configuration file that peft would ignore with a warning. Numbers are
    left out: a number alone does not enable anything."""
    if not file.is_file():
        return []
    known = {field.name for field in fields(config)}
    return sorted(
        name
        for name, value in json.loads(file.read_text()).items()
        if name not in known and (value is True or (value and isinstance(value, str | list | dict)))
    )


def refuse_over_quantised(model: Any, adapter: Adapter) -> None:
    """Raise `EngineLoadError` for adapters that need the base's exact weights, if these are
    quantised and peft cannot dequantise them."""
    if adapter.changes_base:
        raise refusal(
            adapter.path, "its initialisation depends on the base's weights, which are quantised"
        )
    in_8_bits = any(type(module).__name__ == "Linear8bitLt" for module in model.modules())
    if in_8_bits and getattr(adapter.config, "use_dora", False):
        # On a CPU, peft's dequantisation leaves a layer that fails in its next forward.
        raise refusal(adapter.path, "DoRA needs the weights that --load-8bit rounds (4 bits work)")


def refusal(path: str, cause: str) -> EngineLoadError:
    """The error for an adapter that cannot be served, with the remedy."""
    return EngineLoadError(
        f"adapter {path} cannot be served: {cause}. Merge it into its base where it was trained, "
        "and serve the result"
    )


@contextmanager
def explained(path: str) -> Iterator[None]:
    """Turn exceptions of peft into an `EngineLoadError` of one clear line. Its warnings are
    suppressed: checks here cover them, or they are known to be harmless."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except EngineLoadError:
        raise
    except Exception as error:  # peft raises all kinds of exceptions, even bare assertions
        raise EngineLoadError(f"cannot load adapter {path}: {one_line(error, 400)}") from error
