"""8-bit and 4-bit weights through bitsandbytes: which modules must stay as they are.

transformers matches skip names from the start of a module's full path, or as a suffix; passing
any list removes its own exclusion of the output head. So the list is built from the model itself,
on the meta device, with full paths. Must never load weights.
"""

from __future__ import annotations

import importlib.util
import logging
import re
from typing import Any

import torch
from torch import nn

from worker.engines.base import EngineLoadError
from worker.engines.transformers.dense import ROUNDED

__all__ = [
    "bitsandbytes_config",
    "computes_quantised",
    "modules_to_skip",
    "normalise_skip_names",
    "warn_of_lost_rounding",
]

log = logging.getLogger(__name__)

PACKED_MULTIPLE = 64
"""bitsandbytes packs 4-bit weights on a CPU in blocks of 64 input features and fails on others."""


def bitsandbytes_config(
    skeleton: nn.Module, *, bits: int, dtype: torch.dtype, device: torch.device
) -> Any:
    """The quantisation config for `skeleton` (the model on the meta device): LLM.int8 for 8 bits,
    NF4 with double quantisation for 4. Raises `EngineLoadError` where bitsandbytes is missing."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise EngineLoadError(
            "8-bit and 4-bit loading need bitsandbytes: pip install 'tokenbus[worker]'"
        )
    from transformers import BitsAndBytesConfig

    skip = modules_to_skip(skeleton, bits=bits, device=device)
    if bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skip)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=skip,
    )


def modules_to_skip(skeleton: nn.Module, *, bits: int, device: torch.device) -> list[str]:
    """Full paths (as regular expressions) of what is not quantised: the output head, everything
    outside the language model (vision tower, projector), and what a CPU kernel cannot pack."""
    language = _language_model_path(skeleton)
    head = _output_head(skeleton)
    skip: list[str] = []
    for path, module in skeleton.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        outside = language is not None and not path.startswith(language + ".")
        odd = bits == 4 and device.type == "cpu" and module.in_features % PACKED_MULTIPLE != 0
        if module is head or outside or odd:
            skip.append(re.escape(path))
    # An empty list would bring transformers' defaults back, a name that matches nothing does not.
    return skip or ["lm_head"]


def _language_model_path(skeleton: nn.Module) -> str | None:
    """Path of the language model inside a vision-language model; None in a text model."""
    for path, _ in skeleton.named_modules():
        if path.rsplit(".", 1)[-1] in ("language_model", "text_model") and "vision" not in path:
            return str(path)
    return None


def _output_head(skeleton: nn.Module) -> nn.Module | None:
    get_head = getattr(skeleton, "get_output_embeddings", None)
    head = get_head() if callable(get_head) else None
    return head if isinstance(head, nn.Module) else None


def normalise_skip_names(quantization_config: dict[str, Any]) -> dict[str, Any]:
    """Skip names of checkpoints quantised before transformers 5 were matched anywhere in a path;
    the present rule matches from its start. Returns a config in which they mean what they did."""
    fixed = dict(quantization_config)
    for key in ("llm_int8_skip_modules", "modules_to_not_convert"):
        names = fixed.get(key)
        if isinstance(names, list):
            fixed[key] = [
                name if "." in name or "*" in name else rf"(.*\.)?{re.escape(name)}"
                for name in names
            ]
    return fixed


def computes_quantised(model: nn.Module) -> bool:
    """Whether a loaded model has weights of few bits, or rounds its activations. What transformers
    made dense while it was loaded has neither."""
    return bool(getattr(model, "is_quantized", False)) or hasattr(model, ROUNDED)


def warn_of_lost_rounding(model: nn.Module, stored: dict[str, Any], path: str) -> None:
    """Tell where transformers made an FP8 model dense: its kernels round activations as well."""
    if not computes_quantised(model) and str(stored.get("quant_method")) in ("fp8", "fbgemm_fp8"):
        log.warning(
            "%s is dense in memory, for this device has no FP8 kernels: its activations are not "
            "rounded as they were when it was quantised",
            path,
        )
