"""The KV cache: one dense pair of tensors per layer, with one row for each running request.

A layer holds `[slots, capacity, heads, head_dim]`, or 8-bit codes and their scales (`kv_int8.py`).
A row starts at position 0, is right-padded and has its own length, so requests of different
lengths share a batch without copying.

`SlotLayer` plugs into transformers through its public `CacheLayerMixin`: the models' own code calls
`update`, and the shared `Plan` describes the next forward. Knows nothing of requests; must never
decide what runs.
"""

from __future__ import annotations

import math
import mmap
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from worker.engines.common.failures import is_out_of_memory
from worker.engines.transformers.kv_int8 import Int8Codec, KvInt8

__all__ = ["Packed", "Plan", "SlotCache", "SlotLayer", "Together"]

ROUND_TOKENS = 64
"""Capacities are multiples of this, for fewer reallocations and aligned reads."""


@dataclass(frozen=True, slots=True)
class Together:
    """Tokens `first` to `last` - 1 of a forward, whose attention is computed in blocks. They are
    consecutive tokens of row `row`, the last of which attends to the row's first `end` tokens. Or,
    if `apart`, they belong to different rows with a common beginning: all attend to the first `end`
    tokens of `row`, and then to the rest of their own rows."""

    first: int
    last: int
    row: int
    end: int
    apart: bool = False


@dataclass(frozen=True, slots=True)
class Packed:
    """The tokens of a forward laid one after the other, whatever row each belongs to. Each attends
    to its row up to itself."""

    #: int64 [tokens]: the row and the position of each.
    rows: torch.Tensor
    places: torch.Tensor
    #: Attention of this many tokens at the beginning is computed one by one, that of the others in
    #: blocks (`together`).
    alone: int
    together: tuple[Together, ...] = ()


class Plan:
    """How the next forward uses the cache; set before it, read by every layer.

    A prefill of one row stores tokens in row `slot` from position `start` on. Otherwise, `rows`
    rows from `slot` on store the same number of tokens each, at `positions`, and all read `length`
    positions; a decode is the case of one token each. Where `packed` is set, layers that can
    compute packed tokens use that instead.
    """

    __slots__ = (
        "_flat",
        "length",
        "many",
        "packed",
        "positions",
        "row_index",
        "rows",
        "slot",
        "start",
        "static",
    )

    def __init__(self) -> None:
        #: Whether the forward is a `step` over several rows, not a `prefill` of one.
        self.many = False
        self.packed: Packed | None = None
        self.slot = 0
        self.start = 0
        self.rows = 0
        self.length = 0
        self.positions = torch.zeros(0, dtype=torch.long)
        #: int64 [rows]: where each row is stored, if not in rows `slot` to `slot` + `rows` - 1.
        self.row_index: torch.Tensor | None = None
        #: Whether the forward may be captured: then positions must be read from tensors only.
        self.static = False
        # Row and position as a single index, by device and capacity, computed once for all layers.
        self._flat: dict[tuple[torch.device, int], torch.Tensor] = {}

    def prefill(self, slot: int, start: int) -> None:
        """Plan a prefill of row `slot` from position `start` on."""
        self.many, self.slot, self.start, self.static = False, slot, start, False
        self.packed = None

    def step(
        self,
        slot: int,
        positions: torch.Tensor,
        length: int,
        row_index: torch.Tensor | None = None,
    ) -> None:
        """Plan a forward over several rows. `positions`: int64 [rows, tokens], where each row's new
        tokens are stored; `length`: that of the longest row, its new tokens included. With
        `row_index` the step is static."""
        self.many, self.slot, self.rows, self.length = True, slot, positions.shape[0], length
        self.positions, self.start = positions, length - positions.shape[1]
        self.row_index, self.static = row_index, row_index is not None
        self.packed = None
        self._flat.clear()

    def flat_index(self, device: torch.device, capacity: int) -> torch.Tensor:
        """Row and position of every new token as a single index into a layer of that capacity."""
        key = (device, capacity)
        index = self._flat.get(key)
        if index is None:
            positions = self.positions.to(device)
            if self.row_index is not None:
                rows = self.row_index.to(device)
            else:
                rows = torch.arange(self.slot, self.slot + self.rows, device=device)
            index = (rows[:, None] * capacity + positions).flatten()
            self._flat[key] = index
        return index


class SlotLayer(CacheLayerMixin):  # type: ignore[misc]
    """One layer's keys and values, `[slots, capacity, heads, head_dim]` each."""

    is_sliding = False

    def __init__(self, plan: Plan, slots: int, capacity: int, spare: int = 0) -> None:
        super().__init__()
        self.plan = plan
        #: Extra rows after the slots, written by steps that are padded to a fixed shape.
        self.spare = spare
        self.slots = slots
        self.capacity = capacity

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Allocate on the first update: shapes, dtype and device are not known earlier."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys = self._allocate(key_states)
        self.values = self._allocate(value_states)
        self.is_initialized = True

    def _allocate(self, states: torch.Tensor) -> torch.Tensor:
        shape = (self.slots + self.spare, self.capacity, states.shape[1], states.shape[3])
        return _zeros(shape, states)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store new states [batch, heads, tokens, head_dim]. Returns all that these rows may read,
        as views [batch, heads, length, head_dim]."""
        return self.store(key_states.transpose(1, 2), value_states.transpose(1, 2))

    def prepare(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Allocate for states like these [batch, tokens, heads, head_dim], if not done yet."""
        if not self.is_initialized:
            self.lazy_initialization(keys.transpose(1, 2), values.transpose(1, 2))

    def store(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Like `update`, but for new states [batch, tokens, heads, head_dim]."""
        self.prepare(keys, values)
        keys, values = self._stored(keys, values)
        plan = self.plan
        tokens = keys.shape[1]
        first = plan.slot
        if plan.many and (plan.static or plan.rows > 1 or tokens > 1):
            last, length = first + plan.rows, plan.length
            index = plan.flat_index(self.device, self.capacity)
            self.keys.flatten(0, 1).index_copy_(0, index, keys.flatten(0, 1))
            self.values.flatten(0, 1).index_copy_(0, index, values.flatten(0, 1))
        else:
            last, length = first + 1, plan.start + tokens
            self.keys[first, plan.start : length] = keys[0]
            self.values[first, plan.start : length] = values[0]
        keys, values = self.read(first, last, length)
        return keys.transpose(1, 2), values.transpose(1, 2)

    def read(self, first: int, last: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [rows, length, heads, head_dim] of rows `first` to `last` - 1; valid
        until another layer is read."""
        return self.keys[first:last, :length], self.values[first:last, :length]

    def _stored(
        self, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """New states [..., heads, head_dim] in the form in which they are stored."""
        return keys, values

    @property
    def work_bytes(self) -> int:
        """Bytes of temporary memory for each token that a forward reads; 0 before the first."""
        return 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.plan.start + query_length, 0

    def get_seq_length(self) -> int:
        return self.plan.start

    def get_max_length(self) -> int:
        return -1

    def resize(self, slots: int, capacity: int, used_rows: int, used_length: int) -> None:
        """Reallocate, keeping `used_length` tokens of the first `used_rows` rows. If that fails,
        the layer is unchanged."""
        if self.is_initialized and (slots, capacity) != (self.slots, self.capacity):
            resized = [
                self._resized(states, slots + self.spare, capacity, used_rows, used_length)
                for states in (self.keys, self.values)
            ]
            self.keys, self.values = resized
        self.slots, self.capacity = slots, capacity

    @staticmethod
    def _resized(
        states: torch.Tensor, slots: int, capacity: int, used_rows: int, used_length: int
    ) -> torch.Tensor:
        result = _zeros((slots, capacity, *states.shape[2:]), states)
        # Running streams wait for this, so only what rows use is copied.
        result[:used_rows, :used_length] = states[:used_rows, :used_length]
        return result


class Int8Layer(SlotLayer):
    """One layer's keys and values in 8 bits, `[slots, capacity, heads, size]` (see `kv_int8`)."""

    def __init__(
        self, plan: Plan, slots: int, capacity: int, spare: int, codecs: KvInt8, index: int
    ) -> None:
        super().__init__(plan, slots, capacity, spare)
        self._model_codecs = codecs
        self._codecs = codecs.keys[index], codecs.values[index]
        #: (heads, head_dim) of keys and of values as attention reads them.
        self._forms: tuple[tuple[int, int], ...] = ()

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        states = key_states, value_states
        self._forms = tuple((each.shape[1], each.shape[3]) for each in states)
        super().lazy_initialization(key_states, value_states)

    def _allocate(self, states: torch.Tensor) -> torch.Tensor:
        heads, dim = states.shape[1], states.shape[3]
        shape = (self.slots + self.spare, self.capacity, heads, Int8Codec.size(dim))
        return _zeros(shape, states.new_empty(0, dtype=torch.int8))

    def _stored(
        self, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self._codecs[0].encode(keys), self._codecs[1].encode(values)

    def read(self, first: int, last: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        found = [
            codec.decode(
                states[first:last, :length],
                self._model_codecs.room(
                    which, (last - first, length, *form), self.dtype, self.device
                ),
            )
            for which, (codec, states, form) in enumerate(
                zip(self._codecs, (self.keys, self.values), self._forms, strict=True)
            )
        ]
        return found[0], found[1]

    @property
    def work_bytes(self) -> int:
        if not self.is_initialized:
            return 0
        return sum(heads * dim for heads, dim in self._forms) * self.dtype.itemsize


class SlotCache(Cache):  # type: ignore[misc]
    """All layers, resized and moved together.

    `budget` limits slots times capacity, in tokens; 0 for no limit.
    """

    def __init__(
        self,
        layers: int,
        *,
        slots: int = 1,
        capacity: int = ROUND_TOKENS,
        spare: int = 0,
        codecs: KvInt8 | None = None,
    ) -> None:
        """`spare`: extra rows for steps of fixed shape. `codecs` store keys and values in 8 bits;
        None stores them as the model computes them."""
        self.plan = Plan()
        self.codecs = codecs
        #: Number of reallocations: addresses from an earlier generation are invalid.
        self.generation = 0
        self.slots = slots
        self.capacity = capacity
        self.budget = 0
        self.slot_layers = [
            SlotLayer(self.plan, slots, capacity, spare)
            if codecs is None
            else Int8Layer(self.plan, slots, capacity, spare, codecs, index)
            for index in range(layers)
        ]
        super().__init__(layers=list(self.slot_layers))

    @property
    def token_bytes(self) -> int:
        """Bytes stored per token over all layers; 0 before the first forward."""
        return sum(
            states.shape[2] * states.shape[3] * states.element_size()
            for layer in self.slot_layers
            if layer.is_initialized
            for states in (layer.keys, layer.values)
        )

    @property
    def work_bytes(self) -> int:
        """Bytes of temporary memory for each token that a forward reads, which is shared by all
        layers, since they are read one after the other. 0 before the first forward."""
        return max((layer.work_bytes for layer in self.slot_layers), default=0)

    def reserve(self, rows: int, length: int, used_rows: int, used_length: int) -> bool:
        """Make room for `rows` rows of `length` tokens, keeping the first `used_rows` rows of up to
        `used_length` tokens. Returns False if budget or memory do not allow it."""
        length = max(length, used_length)
        if rows <= self.slots and length <= self.capacity:
            return True
        capacity = self.capacity
        if length > capacity:
            capacity = _rounded(max(length, capacity + capacity // 2))
        slots = self.slots if rows <= self.slots else max(rows, 2 * self.slots)
        for wanted in ((slots, capacity), (rows, capacity), (rows, _rounded(length))):
            if self.budget and wanted[0] * wanted[1] > max(self.budget, ROUND_TOKENS):
                continue
            if self._resize(*wanted, used_rows, used_length):
                return True
        return False

    def shrink(self, slots: int, capacity: int) -> None:
        """Give memory back while no row is in use."""
        if self.codecs is not None:
            self.codecs.release()
        capacity = _rounded(capacity)
        if self.slots * self.capacity > slots * capacity:
            self._resize(slots, capacity)

    def _resize(self, slots: int, capacity: int, used_rows: int = 0, used_length: int = 0) -> bool:
        self.generation += 1
        try:
            for layer in self.slot_layers:
                layer.resize(slots, capacity, used_rows, used_length)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            # Layers that were already resized are larger than recorded here, which does no harm.
            self.slots = min(self.slots, slots)
            self.capacity = min(self.capacity, capacity)
            return False
        self.slots, self.capacity = slots, capacity
        return True

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` tokens of a row to another row."""
        for layer in self.slot_layers:
            layer.keys[target, :length] = layer.keys[source, :length]
            layer.values[target, :length] = layer.values[source, :length]

    def share(self, source: int, first: int, last: int, length: int) -> None:
        """Copy the first `length` tokens of row `source` to rows `first` to `last` - 1, which must
        not include it; they are read only once."""
        for layer in self.slot_layers:
            for states in (layer.keys, layer.values):
                states[first:last, :length] = states[source, :length]

    def spread(self, slot: int, start: int, lengths: list[int]) -> None:
        """Row `slot` holds texts of these lengths one after the other, from `start` on: copy each
        but the first to position `start` of a row of its own, in the rows after `slot`."""
        first, end = start + lengths[0], start + sum(lengths)
        places = torch.cat([torch.arange(start, start + length) for length in lengths[1:]])
        rows = torch.repeat_interleave(
            torch.arange(slot + 1, slot + len(lengths)), torch.tensor(lengths[1:])
        )
        for layer in self.slot_layers:
            index = (rows * layer.capacity + places).to(layer.device, non_blocking=True)
            for states in (layer.keys, layer.values):
                # A copy, since torch does not allow source and target to overlap.
                rests = states[slot, first:end].clone()
                states.flatten(0, 1).index_copy_(0, index, rests)

    def swap(self, one: int, other: int, length: int) -> None:
        """Exchange the first `length` tokens of two rows."""
        for layer in self.slot_layers:
            for states in (layer.keys, layer.values):
                kept = states[one, :length].clone()
                states[one, :length] = states[other, :length]
                states[other, :length] = kept

    def read(self, row: int, length: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """A copy of the first `length` tokens of a row as they are stored, layer by layer."""
        return [
            (layer.keys[row, :length].clone(), layer.values[row, :length].clone())
            for layer in self.slot_layers
        ]

    def dense(self, row: int, length: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """A copy of the first `length` tokens of a row as attention reads them, layer by layer."""
        found = (layer.read(row, row + 1, length) for layer in self.slot_layers)
        return [(keys[0].clone(), values[0].clone()) for keys, values in found]

    def write(self, row: int, states: list[tuple[torch.Tensor, torch.Tensor]], length: int) -> None:
        """Put the first `length` tokens of an earlier `read` into a row."""
        for layer, (keys, values) in zip(self.slot_layers, states, strict=True):
            layer.keys[row, :length] = keys[:length]
            layer.values[row, :length] = values[:length]


def _zeros(shape: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
    """Zeros with the dtype and device of `like`. On a host, the system zeroes each page on first
    use, so room for a long prompt costs nothing until it is used; writing all zeros at once would
    stall running streams for seconds."""
    if like.device.type != "cpu":
        return torch.zeros(shape, dtype=like.dtype, device=like.device)
    size_bytes = max(math.prod(shape) * like.element_size(), 1)
    try:
        memory = mmap.mmap(-1, size_bytes)
    except OSError as error:
        raise MemoryError(f"{size_bytes} bytes for keys and values: {error}") from error
    return torch.frombuffer(memory, dtype=like.dtype).view(shape)


def _rounded(tokens: int) -> int:
    return -(-tokens // ROUND_TOKENS) * ROUND_TOKENS
