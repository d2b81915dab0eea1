"""Keys and values in 8 bits: how they are stored, and a cache that rounds in the same way.

The key or value of one token and head is stored as `head_dim` symmetric codes and one float32
scale, side by side in int8, so whatever moves rows of the cache moves their scales with them. All
tokens are read as they were stored, a token's own included: beyond rounding, an answer does not
depend on how its prompt was cut, on a reused prefix, on neighbouring rows or on a resume. Must
never hide a key that is not finite: its scale is not finite either.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache

__all__ = ["Int8Codec", "KvInt8", "RoundedCache"]

LARGEST_CODE = 127
SCALE_BYTES = 4
"""One float32; codes are padded to a multiple of its size, so that it is aligned."""

PIECE = 1 << 18
"""Elements that are converted at once: 1 MiB of float32."""

SMALLEST_SCALE = 1e-30
"""The scale of a key of zeros."""

OUTLIER = 4
"""A model's keys have outlier channels if one of them is at least this many times as large as the
median. With biases of keys (Qwen2) it is up to a hundred times."""


class Int8Codec:
    """Rounds the keys, or the values, of one layer to 8 bits."""

    def __init__(self, *, levels: bool = False) -> None:
        """`levels`: divide large channels by powers of two first, which are learnt from the first
        states that are encoded."""
        self._levels = levels
        self._known = not levels
        #: Powers of two [heads, head_dim]; None if no channel stands out.
        self.factors: torch.Tensor | None = None

    @staticmethod
    def size(head_dim: int) -> int:
        """Bytes of the codes and the scale of one head."""
        return _padded(head_dim) + SCALE_BYTES

    def encode(self, states: torch.Tensor) -> torch.Tensor:
        """Codes and scales, int8 [..., heads, size], of states [..., heads, head_dim]."""
        dim = states.shape[-1]
        if not self._known:
            self.factors, self._known = _factors(states), True
        wide = states.float() if self.factors is None else states.float() / self.factors
        scales = wide.abs().amax(-1, keepdim=True).div_(LARGEST_CODE).clamp_min_(SMALLEST_SCALE)
        packed = torch.empty(
            (*states.shape[:-1], self.size(dim)), dtype=torch.int8, device=states.device
        )
        packed[..., :dim] = (wide / scales).round_()
        if dim != _padded(dim):
            packed[..., dim : _padded(dim)] = 0
        packed[..., _padded(dim) :].view(torch.float32).copy_(scales)
        return packed

    def decode(self, packed: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """Decode what `encode` returned into `out` [..., heads, head_dim], and return it."""
        dim = out.shape[-1]
        codes, scales = packed[..., :dim], packed[..., _padded(dim) :].view(torch.float32)
        if out.device.type != "cpu":
            torch.mul(codes, scales, out=out)
        elif out.dtype is torch.float32:
            # Two vectorised operators are faster on a CPU than one with mixed types.
            out.copy_(codes).mul_(scales)
        else:
            _scale_on_cpu(codes, scales, out)
        return out if self.factors is None else out.mul_(self.factors)

    def rounded(self, states: torch.Tensor) -> torch.Tensor:
        """States as they would be read back from the cache."""
        return self.decode(self.encode(states), torch.empty_like(states))


def _scale_on_cpu(codes: torch.Tensor, scales: torch.Tensor, out: torch.Tensor) -> None:
    """Multiply codes by scales into half precision, by way of float32 and in pieces that stay in
    the processor's cache. That takes half the time of a single operator with mixed types."""
    along = 0 if len(out) > 1 else 1
    size = max(PIECE * out.shape[along] // max(out.numel(), 1), 1)
    pieces = (torch.split(states, size, along) for states in (codes, scales, out))
    for part, scale, target in zip(*pieces, strict=True):
        target.copy_(part.float().mul_(scale))


def _padded(head_dim: int) -> int:
    return -(-head_dim // SCALE_BYTES) * SCALE_BYTES


def _factors(states: torch.Tensor) -> torch.Tensor | None:
    """Powers of two [heads, head_dim] by which channels of states [..., heads, head_dim] exceed the
    median of their head; None if none does by much. Rotary embeddings rotate a channel into another
    one as positions grow, the one half a head away or its neighbour, depending on the model: both
    get the same factor."""
    largest = states.float().abs().flatten(0, -3).amax(0)
    if largest.shape[-1] % 2:
        return None
    halves = largest.roll(largest.shape[-1] // 2, -1)
    pairs = largest.view(len(largest), -1, 2).flip(-1).flatten(-2)
    largest = torch.maximum(largest, torch.maximum(halves, pairs))
    usual = largest.median(-1, keepdim=True).values.clamp_min(SMALLEST_SCALE)
    factors = torch.exp2(torch.log2(largest / usual).floor().clamp_min(0))
    # Nothing can be learnt from keys that are not finite.
    return factors if bool((factors >= OUTLIER).any() & torch.isfinite(factors).all()) else None


class KvInt8:
    """The codecs of a model's layers, and memory into which one layer is decoded."""

    def __init__(self, layers: int) -> None:
        self.keys = [Int8Codec(levels=True) for _ in range(layers)]
        self.values = [Int8Codec() for _ in range(layers)]
        self._room: list[torch.Tensor] = [torch.zeros(0), torch.zeros(0)]

    def cache(self, config: Any) -> RoundedCache:
        """A cache for the model's own `generate()` that rounds with these codecs."""
        return RoundedCache(self, config)

    def room(
        self, which: int, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> torch.Tensor:
        """Memory for the keys (0) or values (1) of the current layer, of this shape. On a CPU, all
        layers use the same, since memory is slow when it is used for the first time."""
        if device.type != "cpu":
            return torch.empty(shape, dtype=dtype, device=device)
        count = torch.Size(shape).numel()
        if self._room[which].numel() < count or self._room[which].dtype is not dtype:
            self._room[which] = torch.zeros(0)
            self._room[which] = torch.empty(count, dtype=dtype)
        return self._room[which][:count].view(shape)

    def release(self) -> None:
        """Give this memory back while nothing runs."""
        self._room = [torch.zeros(0), torch.zeros(0)]


class RoundedCache(DynamicCache):  # type: ignore[misc]
    """A cache for the model's own `generate()` that rounds as `KvInt8` does."""

    def __init__(self, codecs: KvInt8, config: Any) -> None:
        super().__init__(config=config)
        self._codecs = codecs

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Like transformers' caches: states [batch, heads, tokens, head_dim]."""
        keys = self._codecs.keys[layer_idx].rounded(key_states.transpose(1, 2))
        values = self._codecs.values[layer_idx].rounded(value_states.transpose(1, 2))
        updated: tuple[torch.Tensor, torch.Tensor] = super().update(
            keys.transpose(1, 2), values.transpose(1, 2), layer_idx, *args, **kwargs
        )
        return updated
