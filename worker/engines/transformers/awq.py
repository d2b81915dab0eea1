"""AWQ checkpoints (4 bits, GEMM layout) without gptqmodel: dequantised while they are loaded.

Each weight is unpacked as it is read, so the packed and the dense model never lie in memory
together. What is served is a dense model in the dtype asked for. Uses transformers' own extension
points for quantisers; must never be imported where gptqmodel is to do the work.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.core_model_loading import ConversionOps
from transformers.quantizers import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from worker.engines.base import EngineLoadError

__all__ = ["dequantised", "dequantising_config"]

METHOD = "tokenbus_awq"

_PARTS = ("qweight", "qzeros", "scales")

NIBBLE_COLUMNS = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of eight neighbouring columns each nibble of a word holds, lowest nibble first."""


def dequantising_config(stored: dict[str, Any], path: str) -> dict[str, Any]:
    """What stands in for the checkpoint's own quantisation config. Raises `EngineLoadError` for
    layouts other than 4 bits with zero points, GEMM."""
    layout = str(stored.get("version") or stored.get("format") or "gemm").lower()
    bits = stored.get("bits", stored.get("w_bit", 4))
    if layout != "gemm" or bits != 4 or not stored.get("zero_point", True):
        raise EngineLoadError(
            f"{path} is an AWQ checkpoint of another kind than 4 bits, GEMM, zero points ({bits} "
            f"bits, {layout}): it needs gptqmodel (pip install gptqmodel)"
        )
    return {"quant_method": METHOD}


def dequantised(qweight: torch.Tensor, qzeros: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """The weight of a linear layer, float32 [out, in].

    `qweight` int32 [in, out / 8], `qzeros` int32 [groups, out / 8], `scales` [groups, out]. Raises
    `ValueError` for shapes that do not belong together.
    """
    values, zeros = _unpacked(qweight), _unpacked(qzeros)
    groups = scales.shape[0]
    if zeros.shape != scales.shape or values.shape[1] != scales.shape[1] or len(values) % groups:
        raise ValueError(
            f"AWQ tensors do not fit: {list(qweight.shape)}, {list(qzeros.shape)}, "
            f"{list(scales.shape)}"
        )
    grouped = values.view(groups, -1, values.shape[1])
    weight = (grouped - zeros[:, None]).float() * scales[:, None].float()
    return weight.view(values.shape).t().contiguous()


def _unpacked(words: torch.Tensor) -> torch.Tensor:
    """int8 [rows, 8 x columns] of int32 [rows, columns]."""
    result = torch.empty(*words.shape, 8, dtype=torch.int8, device=words.device)
    for nibble, column in enumerate(NIBBLE_COLUMNS):
        result[..., column] = ((words >> (4 * nibble)) & 15).to(torch.int8)
    return result.flatten(1)


class _Dequantise(ConversionOps):  # type: ignore[misc]
    """The three tensors of a layer become its weight; those of experts, which transformers fuses
    in a later operation, a list of weights."""

    def __init__(self, quantizer: HfQuantizer) -> None:
        self._quantizer = quantizer

    def convert(
        self, input_dict: dict[str, Any], *args: Any, full_layer_name: str, **kwargs: Any
    ) -> dict[str, Any]:
        dtype = kwargs["model"].get_parameter(full_layer_name).dtype
        result: dict[str, Any] = {}
        for name in input_dict:
            stem, separator, _ = name.rpartition("qweight")
            if not separator:
                continue
            parts = (input_dict[stem + part] for part in _PARTS)
            lists = (part if isinstance(part, list) else [part] for part in parts)
            dense = [dequantised(*layer).to(dtype) for layer in zip(*lists, strict=True)]
            if not stem:
                return {full_layer_name: dense[0]}
            # Later operations look for the names of sources.
            result[name] = dense
        return result


@register_quantization_config(METHOD)
class _Config(QuantizationConfigMixin):  # type: ignore[misc]
    """Says that weights are AWQ's and shall be dense."""

    def __init__(self, **kwargs: Any) -> None:
        self.quant_method = METHOD
        self.dequantize = True


@register_quantizer(METHOD)
class _Quantizer(HfQuantizer):  # type: ignore[misc]
    """Loads AWQ's tensors into a model of ordinary layers."""

    requires_calibration = True
    serialized_names = {"weight": [*_PARTS]}  # noqa: RUF012

    def get_load_operations(self) -> dict[str, Any]:
        return {"dequantize": _Dequantise}

    def is_serializable(self) -> bool:
        return False

    @property
    def is_trainable(self) -> bool:
        return False
