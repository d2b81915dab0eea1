"""Forward passes of a model over the slot cache: prefill of one or several rows, decode of all.

Hides what differs between architectures: the arguments that a model takes, masks of sliding and
chunked layers, boolean or additive masks, M-RoPE positions, adapters. Must never sample or
schedule.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence as Items
from contextlib import contextmanager
from enum import Enum, auto
from typing import Any

import torch

from worker.engines.common.compat import cache_argument, forward_parameters, rope_owner
from worker.engines.common.sequence import Sequence
from worker.engines.transformers.cache import Packed, SlotCache
from worker.engines.transformers.fused import direct_forward
from worker.engines.transformers.graphs import StaticDecode
from worker.engines.transformers.kv_int8 import KvInt8
from worker.engines.transformers.loaded import LoadedModel
from worker.engines.transformers.packed import packed_bytes
from worker.engines.transformers.packing import (
    Along,
    CommonPrefixes,
    Layout,
    Piece,
    common_prefixes,
    even_runs,
)
from worker.engines.transformers.vision import ImageFeatures, Vision

__all__ = ["Forward", "StaticUse", "Unsupported"]

LAYER_KINDS = ("full_attention", "sliding_attention", "chunked_attention")
"""Kinds of layers with a plain KV cache."""

DIRECT = frozenset({"input_ids", "position_ids", "attention_mask", "logits_to_keep"})
"""Arguments of a forward over text alone."""

GROUPED_HEADS = "TRANSFORMERS_SDPA_FORCE_GQA"
"""Environment variable that makes transformers pass grouped heads to torch unchanged."""


class StaticUse(Enum):
    """Whether decode steps have fixed shapes, and whether they are captured."""

    NEVER = auto()
    UNCAPTURED = auto()
    CAPTURED = auto()


class Unsupported(Exception):
    """The model cannot be served from slots; the message says why."""


class Forward:
    """The model's forward over a slot cache. Raises `Unsupported` on construction if the
    configuration shows that the model cannot be served from slots."""

    def __init__(
        self,
        loaded: LoadedModel,
        *,
        static: StaticUse = StaticUse.NEVER,
        codecs: KvInt8 | None = None,
    ) -> None:
        """`codecs` store keys and values in 8 bits; None stores them as the model computes them."""
        model = loaded.model
        config = model.config.get_text_config(decoder=True)
        if loaded.encoder_decoder:
            raise Unsupported("encoder-decoder models keep two caches")
        if getattr(config, "num_kv_shared_layers", 0):
            raise Unsupported("layers share keys and values")
        kinds = list(getattr(config, "layer_types", None) or [])
        self._window = int(getattr(config, "sliding_window", None) or 0)
        self._chunk = int(getattr(config, "attention_chunk_size", None) or 0)
        if not kinds:
            kinds = ["sliding_attention" if self._window else "full_attention"]
        self._kinds = sorted(set(kinds))
        unknown = [kind for kind in self._kinds if kind not in LAYER_KINDS]
        if unknown:
            raise Unsupported(f"layers of type {', '.join(unknown)}")
        self._loaded = loaded
        self._model = model
        self.device = loaded.device
        self._dtype = loaded.dtype
        self._additive = getattr(config, "_attn_implementation", "") == "eager"
        self._accepts = forward_parameters(model)
        argument = cache_argument(self._accepts)
        if argument is None:
            raise Unsupported("its forward takes no key/value cache")
        self._cache_argument = argument
        plain_bytes: int = sum(p.numel() * p.element_size() for p in model.parameters())
        self._weight_bytes = plain_bytes + packed_bytes(model)
        if loaded.adapters:
            # A captured step does not include the choice of adapters.
            static = StaticUse.NEVER
        self.cache = SlotCache(
            int(config.num_hidden_layers),
            spare=0 if static is StaticUse.NEVER else 1,
            codecs=codecs,
        )
        #: Decode steps of fixed shape, if used.
        self.static: StaticDecode | None = None
        if static is not StaticUse.NEVER:
            self.static = StaticDecode(self, capture=static is StaticUse.CAPTURED)
        # Layers with a window need a mask even where others do without one.
        plain = self._kinds == ["full_attention"]
        self._direct = direct_forward(model) if plain else None
        #: Whether fused layers may compute the token of each row by itself, without a mask.
        self._each_alone = plain and self.device.type == "cpu" and self.static is None
        self._each_alone = self._each_alone and codecs is None
        #: Whether the tokens of all rows are laid one after the other, without padding.
        self.packs = self._each_alone and self._direct is not None and self._direct.packs
        self._prefixes = CommonPrefixes()
        self._rope_owner = rope_owner(model)
        #: Number of M-RoPE position axes; of four, the first is the text position.
        self._rope_axes = 4
        self._index = torch.arange(0, device=self.device)
        #: Whether several prompts may be computed in one forward, and the branches of one; the
        #: self test decides.
        self.many_prompts = True
        self.branches = True
        #: Whether a step may compute several tokens of each row (`verify`); the self test decides.
        self.verifies = True
        #: The vision tower, if images are computed apart from their tokens; the self test decides.
        self.vision: Vision | None = None

    # --- prefill ----------------------------------------------------------------------------------

    def prepare(self, sequence: Sequence) -> None:
        """Compute the M-RoPE positions of a prompt. Call it before its first prefill."""
        if self._rope_owner is None or sequence.rope_positions is not None:
            return
        prompt = sequence.prompt
        ids = torch.tensor([prompt.ids])
        arguments = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        arguments |= prompt.media | prompt.aligned
        positions = self._model._prepare_position_ids_for_generation(ids, dict(arguments))
        sequence.rope_delta = int(self._rope_owner.rope_deltas.reshape(-1)[0])
        sequence.rope_positions = positions

    def takes_along(self, sequence: Sequence, start: int, end: int) -> bool:
        """Whether the forward of these tokens of a sequence can also decode other rows."""
        return self.packs and end <= sequence.stem_tokens and start >= sequence.prompt.media_end

    def prefill(
        self,
        slot: int,
        sequence: Sequence,
        start: int,
        end: int,
        *,
        kept: Items[int] = (),
        along: Along | None = None,
    ) -> torch.Tensor:
        """Compute tokens `start` to `end` of a sequence in row `slot`, and, where that can be
        (`takes_along`), the next tokens of other rows.

        Returns logits [tokens, vocabulary] at the positions `kept`, in order; if it is empty, at
        the last token.
        """
        prompt = sequence.prompt
        branched = end > sequence.stem_tokens
        if self.takes_along(sequence, start, end):
            piece = Piece(sequence, slot, start, sequence.tokens(start, end))
            places = [position - start for position in kept] or [end - start - 1]
            return self._packed(Layout([piece], [], [places]), along)
        self.cache.plan.prefill(slot, start)
        ids = torch.tensor([sequence.tokens(start, end)]).to(self.device, non_blocking=True)
        arguments: dict[str, Any] = {"input_ids": ids}
        if prompt.media and start < prompt.media_end:
            arguments |= self._media_arguments(sequence, start, end)
        places = [position - start for position in kept] or [end - start - 1]
        chosen = "logits_to_keep" in self._accepts and len(places) < end - start
        if chosen:
            arguments["logits_to_keep"] = (
                1 if places == [end - start - 1] else torch.tensor(places, device=self.device)
            )
        if branched:
            arguments["attention_mask"] = self._branch_mask(sequence, start, end)
        if "position_ids" in self._accepts:
            places_of = self._branch_positions if branched else self._prefill_positions
            arguments["position_ids"] = places_of(sequence, start, end)
        with self._grouped_heads():
            logits = self._run(arguments, [sequence])[0]
        return logits if chosen or len(logits) == len(places) else logits[places]

    def images(self, sequence: Sequence) -> ImageFeatures | None:
        """The images of a prompt that must be computed before its next tokens; None if there are
        none, or if images are computed together with their tokens."""
        prompt = sequence.prompt
        if self.vision is None or not prompt.media or sequence.filled >= prompt.media_end:
            return None
        if sequence.images is None:
            sequence.images = self.vision.begin(prompt)
        images = sequence.images
        return images if isinstance(images, ImageFeatures) else None

    def compute_image(self, sequence: Sequence) -> None:
        """Compute the next of a prompt's images, and wait for it."""
        images = sequence.images
        assert self.vision is not None and isinstance(images, ImageFeatures)
        self._loaded.choose_rows([sequence.adapter])
        self.vision.compute(images)
        images.done[-1][:1].cpu()

    def _media_arguments(self, sequence: Sequence, start: int, end: int) -> dict[str, Any]:
        """Arguments for tokens `start` to `end`, some of which belong to images."""
        prompt, images = sequence.prompt, sequence.images
        if isinstance(images, ImageFeatures):
            assert self.vision is not None
            return self.vision.piece(prompt, images, start, end)
        if start != 0:
            raise ValueError("a prompt with images must be prefilled from its start")
        if end > sequence.stem_tokens:
            raise ValueError("a prompt's images must be prefilled before its branches")
        arguments = prompt.media_on(self.device, self._dtype)
        for name, value in prompt.aligned.items():
            if name in self._accepts or "kwargs" in self._accepts:
                arguments[name] = _stretched(value, end)[:, start:end].to(self.device)
        return arguments

    @contextmanager
    def _grouped_heads(self) -> Iterator[None]:
        """On a CPU, let torch's attention handle grouped heads with a mask; transformers would
        otherwise copy all keys and values for each query head, in every layer. Not for single
        tokens, for which folding the query heads is even cheaper."""
        if self.device.type != "cpu" or GROUPED_HEADS in os.environ:
            yield
            return
        os.environ[GROUPED_HEADS] = "1"
        try:
            yield
        finally:
            del os.environ[GROUPED_HEADS]

    def _prefill_positions(self, sequence: Sequence, start: int, end: int) -> torch.Tensor:
        if self._rope_owner is None:
            return torch.arange(start, end, device=self.device)[None]
        known = sequence.rope_positions
        assert isinstance(known, torch.Tensor)
        axes, count = known.shape[0], known.shape[-1]
        parts = [known[..., start : min(end, count)]]
        if end > count:
            text = torch.arange(max(start, count), end)
            behind = (text + sequence.rope_delta).expand(axes, 1, -1).clone()
            if axes == 4:
                behind[0] = text
            parts.append(behind)
        return torch.cat(parts, dim=-1).to(self.device)

    def _branch_positions(self, sequence: Sequence, start: int, end: int) -> torch.Tensor:
        """Positions of tokens some of which are in branches: each branch counts on from the
        stem."""
        positions = _fan(sequence.stem_tokens, sequence.branches)[0][start:end]
        if self._rope_owner is None:
            return positions[None].to(self.device)
        stem = self._prefill_positions(sequence, start, max(start, sequence.stem_tokens))
        text = positions[stem.shape[-1] :]
        behind = (text + sequence.rope_delta).expand(stem.shape[0], 1, -1).clone()
        if stem.shape[0] == 4:
            behind[0] = text
        return torch.cat([stem, behind.to(self.device)], dim=-1)

    def _branch_mask(
        self, sequence: Sequence, start: int, end: int
    ) -> torch.Tensor | dict[str, torch.Tensor]:
        """Masks for tokens some of which are in branches (see `_mask`)."""
        places, numbers = _fan(sequence.stem_tokens, sequence.branches)
        return self._fan_mask(places[:end], numbers[:end], start)

    def _fan_mask(
        self, places: torch.Tensor, numbers: torch.Tensor, start: int
    ) -> torch.Tensor | dict[str, torch.Tensor]:
        """Masks for the tokens from `start` on; `places` and `numbers` as from `_fan`."""
        places, numbers, end = places.to(self.device), numbers.to(self.device), len(places)
        index = self._first(end)
        past = index <= index[start:end, None]
        related = (numbers == 0) | (numbers == numbers[start:end, None])
        return self._kind_masks((past & related)[None], places[start:end, None][None], places)

    def prefill_many(
        self, slot: int, sequences: list[Sequence], along: Along | None = None
    ) -> torch.Tensor:
        """Compute the remaining tokens of several prompts at once, in rows from `slot` on; where
        forwards are packed, also the next tokens of other rows.

        They must not belong to images. Returns logits [rows, vocabulary] of the last tokens.
        """
        if self.packs:
            pieces = [
                Piece(one, row, one.filled, one.tokens(one.filled, one.total))
                for row, one in enumerate(sequences, slot)
            ]
            groups = common_prefixes(sequences, [sequence.filled for sequence in sequences])
            return self._packed(Layout.of_last(pieces, groups), along)
        tokens = max(sequence.total - sequence.filled for sequence in sequences)
        ids: list[list[int]] = []
        places: list[list[int]] = []
        for sequence in sequences:
            start, end = sequence.filled, sequence.total
            padding = tokens - (end - start)
            # Rows are aligned at their last token. The padding at the front is stored after the
            # row's end, where the next token overwrites it before it is read.
            ids.append([0] * padding + sequence.tokens(start, end))
            places.append([end] * padding + list(range(start, end)))
        positions = torch.tensor(places).to(self.device, non_blocking=True)
        length = max(sequence.total for sequence in sequences) + 1
        self.cache.plan.step(slot, positions, length)
        arguments: dict[str, Any] = {
            "input_ids": torch.tensor(ids).to(self.device, non_blocking=True),
            "attention_mask": self._mask(positions, self._first(length)),
        }
        if "logits_to_keep" in self._accepts:
            arguments["logits_to_keep"] = 1
        if "position_ids" in self._accepts:
            if self._rope_owner is None:
                arguments["position_ids"] = positions
            else:
                rows = [self._prefill_positions(s, s.filled, s.total) for s in sequences]
                padded = [torch.nn.functional.pad(p, (tokens - p.shape[-1], 0)) for p in rows]
                arguments["position_ids"] = torch.cat(padded, dim=1)
        with self._grouped_heads():
            return self._run(arguments, sequences)[:, -1]

    def prefill_fanned(self, slot: int, sequences: list[Sequence], start: int) -> torch.Tensor:
        """Compute the remaining tokens of several prompts with a common beginning as branches of
        one row, so that the beginning's keys and values are read once and nothing is padded. Then
        copy each prompt's part to its own row, from `slot` on.

        The first `start` tokens of all prompts, their images and adapters included, must be the
        same and stored in row `slot`, which needs room for all that follow; these must not belong
        to images. Returns logits [rows, vocabulary] of the last tokens.
        """
        lengths = [sequence.total - start for sequence in sequences]
        places, numbers = _fan(start, lengths)
        self.cache.plan.prefill(slot, start)
        ids = [token for sequence in sequences for token in sequence.tokens(start, sequence.total)]
        arguments: dict[str, Any] = {
            "input_ids": torch.tensor([ids]).to(self.device, non_blocking=True),
            "attention_mask": self._fan_mask(places, numbers, start),
        }
        last = torch.tensor(lengths, device=self.device).cumsum(0) - 1
        if "logits_to_keep" in self._accepts:
            arguments["logits_to_keep"] = last
        if "position_ids" in self._accepts:
            rows = [self._prefill_positions(s, start, s.total) for s in sequences]
            arguments["position_ids"] = torch.cat(rows, dim=-1)
        with self._grouped_heads():
            logits = self._run(arguments, sequences[:1])[0]
        self.cache.spread(slot, start, lengths)
        return logits if len(logits) == len(sequences) else logits[last]

    # --- packed -----------------------------------------------------------------------------------

    def _packed(self, layout: Layout, along: Along | None = None) -> torch.Tensor:
        """Compute pieces of rows in one forward, without padding, and the next tokens of the rows
        that go along. Returns logits [tokens, vocabulary] of the tokens that the layout keeps."""
        if along is None:
            return self._laid_out(layout)
        decoded = self._decoded(along)
        logits = self._laid_out(decoded.and_then(layout))
        along.logits = along.by_row(logits[: decoded.read])
        return logits[decoded.read :]

    def _laid_out(self, layout: Layout) -> torch.Tensor:
        assert self._direct is not None
        packing, wanted = layout.packed()
        self.cache.plan.packed = packing.packed
        return self._direct(
            torch.tensor([packing.ids]),
            packing.packed.places[None],
            self.cache,
            logits_to_keep=torch.tensor(wanted),
        )[0]

    def _decoded(self, along: Along) -> Layout:
        return along.layout(self._prefixes.decoded(along.sequences))

    # --- decode -----------------------------------------------------------------------------------

    def decode(self, sequences: list[Sequence]) -> torch.Tensor:
        """One token for rows 0 to len(sequences) - 1. Returns logits [rows, vocabulary], which the
        next call may overwrite."""
        self._rope_axes = _axes(sequences[0], self._rope_axes)
        if self.static is not None:
            logits = self.static.decode(sequences)
            if logits is not None:
                return logits
        lengths = [sequence.filled for sequence in sequences]
        if self.packs:
            return self._laid_out(self._decoded(Along(sequences)))
        runs = even_runs(lengths, self._forward_tokens())
        parts = [self._decode_run(sequences[start:end], start) for start, end in runs]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def verify(
        self, sequences: list[Sequence], drafts: list[list[int]], width: int
    ) -> torch.Tensor:
        """Compute the last token and the draft of rows 0 to len(sequences) - 1. Returns logits
        [rows, width, vocabulary] of the token that follows each; those beyond a row's draft are
        meaningless.

        All rows have `width` tokens. Padding after a row's draft, and drafts that turn out wrong,
        are stored after the row's end, where later tokens overwrite them before they are read.
        """
        self._rope_axes = _axes(sequences[0], self._rope_axes)
        if self.packs:
            along = Along(sequences, drafts, width)
            return along.by_row(self._laid_out(self._decoded(along)))
        length = max(sequence.filled for sequence in sequences) + width
        tokens = [
            [sequence.answer[-1], *draft] + [0] * (width - 1 - len(draft))
            for sequence, draft in zip(sequences, drafts, strict=True)
        ]
        rows = [[sequence.filled, sequence.rope_delta] for sequence in sequences]
        facts = torch.tensor([one + row for one, row in zip(rows, tokens, strict=True)])
        facts = facts.to(self.device, non_blocking=True)
        positions = facts[:, :1] + self._first(length)[:width]
        self.cache.plan.step(0, positions, length)
        arguments: dict[str, Any] = {
            "input_ids": facts[:, 2:],
            "attention_mask": self._mask(positions, self._first(length)),
        }
        if "position_ids" in self._accepts:
            arguments["position_ids"] = self._decode_positions(positions, facts[:, 1])
        with self._grouped_heads():
            return self._run(arguments, sequences)

    def _forward_tokens(self) -> int:
        """How many cached tokens take as long to read as the weights."""
        layers = len(self.cache.slot_layers)
        token_bytes = self.cache.token_bytes + layers * self.cache.work_bytes
        return self._weight_bytes // max(token_bytes, 1)

    def _decode_run(self, sequences: list[Sequence], slot: int) -> torch.Tensor:
        """One token for rows from `slot` on, in one forward."""
        lengths = [sequence.filled for sequence in sequences]
        length = max(lengths) + 1
        # One transfer to the device for everything that depends on the rows.
        facts = torch.tensor(
            [
                [sequence.answer[-1] for sequence in sequences],
                lengths,
                [sequence.rope_delta for sequence in sequences],
            ]
        ).to(self.device, non_blocking=True)
        positions = facts[1][:, None]
        self.cache.plan.step(slot, positions, length)
        if self._each_alone:
            rows = torch.arange(slot, slot + len(sequences))
            self.cache.plan.packed = Packed(rows, facts[1], len(sequences))
        arguments: dict[str, Any] = {"input_ids": facts[0][:, None]}
        if len(sequences) > 1:
            arguments["attention_mask"] = self._mask(positions, self._first(length))
        if "position_ids" in self._accepts:
            arguments["position_ids"] = self._decode_positions(positions, facts[2])
        return self._run(arguments, sequences)[:, -1]

    def _decode_positions(self, positions: torch.Tensor, deltas: torch.Tensor) -> torch.Tensor:
        if self._rope_owner is None:
            return positions
        shifted = positions + deltas[:, None]
        return torch.stack([positions] * (self._rope_axes - 3) + [shifted] * 3)

    def run_static(self, facts: torch.Tensor, length: int) -> torch.Tensor:
        """A decode of fixed shape over `facts` [4, rows] (see `graphs`) that reads `length`
        positions. From one run to the next only the contents of tensors change. Returns logits
        [rows, vocabulary]."""
        positions = facts[1][:, None]
        self.cache.plan.step(0, positions, length, row_index=facts[2])
        arguments: dict[str, Any] = {
            "input_ids": facts[0][:, None],
            "attention_mask": self._mask(positions, torch.arange(length, device=self.device)),
        }
        if "position_ids" in self._accepts:
            arguments["position_ids"] = self._decode_positions(positions, facts[3])
        return self._run(arguments, [])[:, -1]

    def _first(self, length: int) -> torch.Tensor:
        """The integers 0 to `length` - 1 on the device, allocated once."""
        if self._index.shape[0] < length:
            self._index = torch.arange(2 * length, device=self.device)
        return self._index[:length]

    def _mask(
        self, positions: torch.Tensor, index: torch.Tensor
    ) -> torch.Tensor | dict[str, torch.Tensor]:
        """Masks [rows, 1, tokens, length] of the keys at positions `index` [length] that each new
        token at `positions` [rows, tokens] attends to; by kind of layer if there are several."""
        own = positions[:, :, None]
        return self._kind_masks(index <= own, own, index)

    def _kind_masks(
        self, past: torch.Tensor, own: torch.Tensor, places: torch.Tensor
    ) -> torch.Tensor | dict[str, torch.Tensor]:
        """Masks by kind of layer. `past` [rows, tokens, length]: whether a key is not later than a
        token; `own` and `places`: the positions of the tokens and of the keys."""
        masks: dict[str, torch.Tensor] = {}
        for kind in self._kinds:
            seen = past
            if kind == "sliding_attention" and self._window:
                seen = past & (places > own - self._window)
            elif kind == "chunked_attention" and self._chunk:
                seen = past & (places // self._chunk == own // self._chunk)
            seen = seen[:, None]
            if self._additive:
                # The eager path adds the mask: a boolean one would be added as 0 and 1.
                lowest = torch.finfo(self._dtype).min
                zeros = torch.zeros(seen.shape, dtype=self._dtype, device=self.device)
                seen = zeros.masked_fill_(~seen, lowest)
            masks[kind] = seen
        return masks if len(masks) > 1 else masks[self._kinds[0]]

    def _run(self, arguments: dict[str, Any], sequences: list[Sequence]) -> torch.Tensor:
        if self._direct is not None and self._is_direct(arguments):
            return self._direct(cache=self.cache, **arguments)
        self._loaded.choose_rows([sequence.adapter for sequence in sequences])
        arguments[self._cache_argument] = self.cache
        output = self._model(**arguments, use_cache=True)
        logits: torch.Tensor = output.logits
        return logits

    def _is_direct(self, arguments: dict[str, Any]) -> bool:
        """Whether a forward takes no images and needs no mask other than the one given: then
        transformers' code around the layers has nothing to do."""
        mask = arguments.get("attention_mask")
        alone = arguments["input_ids"].shape[1] == 1 or self.cache.plan.start == 0
        return arguments.keys() <= DIRECT and (isinstance(mask, torch.Tensor) or alone)


def _fan(stem: int, branches: Items[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """The position of each token of a stem and of branches of these lengths, and the number of its
    branch (0 for the stem); int64 [tokens] each."""
    lengths = torch.tensor(branches)
    numbers = torch.repeat_interleave(torch.arange(1, len(lengths) + 1), lengths)
    begins = torch.repeat_interleave(lengths.cumsum(0) - lengths, lengths)
    places = stem + torch.arange(len(numbers)) - begins
    return (
        torch.cat([torch.arange(stem), places]),
        torch.cat([torch.zeros(stem, dtype=torch.long), numbers]),
    )


def _axes(sequence: Sequence, known: int) -> int:
    positions = sequence.rope_positions
    return int(positions.shape[0]) if isinstance(positions, torch.Tensor) else known


def _stretched(value: torch.Tensor, length: int) -> torch.Tensor:
    """Per-token values of a prompt, extended by zeros for the answer."""
    missing = length - value.shape[1]
    return torch.nn.functional.pad(value, (0, missing)) if missing > 0 else value
