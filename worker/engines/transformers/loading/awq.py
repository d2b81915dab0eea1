"""AWQ checkpoints (4 bits, GEMM layout) without gptqmodel: dequantised while loading (`dense`).

Must never be imported if gptqmodel is used.
"""

from __future__ import annotations

from typing import Any

import torch

from worker.engines.base import EngineLoadError
from worker.engines.transformers.loading.dense import register

__all__ = ["dequantised", "dequantising_config"]

METHOD = "tokenbus_awq"

NIBBLE_COLUMNS = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of eight neighbouring columns each nibble of a word holds, lowest nibble first."""


def dequantising_config(stored: dict[str, Any], path: str) -> dict[str, Any]:
    """A replacement for the checkpoint's own quantisation config, whose method is dequantised here.
    Raises `EngineLoadError` for anything but 4 bits with zero points in the GEMM layout."""
    layout = str(stored.get("version") or stored.get("format") or "gemm").lower()
    bits = stored.get("bits", stored.get("w_bit", 4))
    if layout != "gemm" or bits != 4 or not stored.get("zero_point", True):
        raise EngineLoadError(
            f"{path} is an AWQ checkpoint with {bits} bits and layout {layout}; without gptqmodel, "
            "only 4 bits with zero points in the GEMM layout can be read (pip install gptqmodel)"
        )
    return {"quant_method": METHOD}


def dequantised(qweight: torch.Tensor, qzeros: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """The weight of a linear layer, float32 [out, in].

    `qweight` int32 [in, out / 8], `qzeros` int32 [groups, out / 8], `scales` [groups, out]. Raises
    `ValueError` for inconsistent shapes.
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
    """Unpack int32 [rows, columns] to int8 [rows, columns * 8]."""
    result = torch.empty(*words.shape, 8, dtype=torch.int8, device=words.device)
    for nibble, column in enumerate(NIBBLE_COLUMNS):
        result[..., column] = ((words >> (4 * nibble)) & 15).to(torch.int8)
    return result.flatten(1)


register(METHOD, ("qweight", "qzeros", "scales"), dequantised)
