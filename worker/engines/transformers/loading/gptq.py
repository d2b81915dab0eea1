"""GPTQ checkpoints (2, 4 and 8 bits) without gptqmodel: dequantised while loading (`dense`).

Must never be imported if gptqmodel and optimum are used.
"""

from __future__ import annotations

from typing import Any

import torch

from worker.engines.base import EngineLoadError
from worker.engines.transformers.loading.dense import register

__all__ = ["dequantised", "dequantising_config"]

METHOD = "tokenbus_gptq"

BITS = (2, 4, 8)
"""Bit widths that divide a word of 32 bits; some 3-bit values would cross a word boundary."""


def dequantising_config(stored: dict[str, Any], path: str) -> dict[str, Any]:
    """A replacement for the checkpoint's own quantisation config, whose method is dequantised here.
    Raises `EngineLoadError` for layouts other than plain GPTQ's."""
    bits = stored.get("bits")
    layout = str(stored.get("checkpoint_format") or "gptq").lower()
    if bits not in BITS or layout not in ("gptq", "gptq_v2"):
        raise EngineLoadError(
            f"{path} is a GPTQ checkpoint with {bits} bits and layout {layout}; without gptqmodel "
            "and optimum, only 2, 4 and 8 bits in the plain layout can be read (pip install "
            "gptqmodel optimum)"
        )
    # The first version of the layout stores zero points minus one.
    return {"quant_method": METHOD, "bits": bits, "zero_offset": int(layout == "gptq")}


def dequantised(
    qweight: torch.Tensor,
    qzeros: torch.Tensor,
    scales: torch.Tensor,
    g_idx: torch.Tensor,
    *,
    bits: int,
    zero_offset: int,
) -> torch.Tensor:
    """The weight of a linear layer, float32 [out, in].

    `qweight` int32 [in * bits / 32, out], `qzeros` int32 [groups, out * bits / 32], `scales`
    [groups, out], `g_idx` [in]: the group of each input; `zero_offset`: what is added to stored
    zero points. Raises `ValueError` for inconsistent shapes.
    """
    values = _unpacked(qweight.t(), bits).t()
    zeros = (_unpacked(qzeros, bits) + zero_offset) & ((1 << bits) - 1)
    if (
        zeros.shape != scales.shape
        or values.shape != (len(g_idx), scales.shape[1])
        or not 0 <= int(g_idx.min()) <= int(g_idx.max()) < len(scales)
    ):
        raise ValueError(
            f"GPTQ tensors do not fit: {list(qweight.shape)}, {list(qzeros.shape)}, "
            f"{list(scales.shape)}, {list(g_idx.shape)}"
        )
    groups = g_idx.long()
    weight = (values - zeros[groups]).float() * scales[groups].float()
    return weight.t().contiguous()


def _unpacked(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Unpack int32 [rows, columns] to int32 [rows, columns * 32 / bits], lowest bits first."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=words.device)
    return ((words[..., None] >> shifts) & ((1 << bits) - 1)).flatten(1)


register(METHOD, ("qweight", "qzeros", "scales", "g_idx"), dequantised)
