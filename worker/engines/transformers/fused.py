"""Fused decoder layers of the Llama kind: one product for queries, keys and values, sums and
activations fused into products, and the rotary embedding as one complex multiplication.

A decode step of a small model runs some thirty operators per layer, of which seven multiply by
weights; a fused layer runs about fifteen. Only the `forward` of a layer whose class is known to
have this form is replaced, and only if the fused one gives the same output for a probe. Everything
around layers (masks, caches, embeddings) stays with transformers. Must never hold weights twice.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear, scaled_dot_product_attention, silu

from worker.engines.transformers.cache import Packed, SlotCache, SlotLayer
from worker.engines.transformers.kernels import Kernels, compiled
from worker.engines.transformers.packed import (
    PackedLinear,
    can_pack,
    is_plain,
    pack_weights,
    packs_faster,
)
from worker.engines.transformers.settings import EngineSettings

__all__ = ["DirectForward", "FusedLayer", "direct_forward", "fuse_layers", "prepare_layers"]

log = logging.getLogger(__name__)

LAYERS = frozenset(
    {"LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer"}
)
"""Classes of transformers with this form: norm, attention with rotary embedding, residual sum,
norm, gated SiLU, residual sum."""

MODELS = frozenset(
    {"LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"}
)
"""Classes of transformers whose forward consists of embedding, layers, norm and head."""

ERRORS = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Largest relative difference of a layer from transformers'. Observed: 9e-7 in float32,
0.012 in bfloat16."""

PROBED_ROWS, PROBED_TOKENS = 2, 5

BLOCK_TOKENS = 128
BLOCK_SCORES = 1 << 20
"""Attention of a prompt is computed for at most this many tokens at a time, and for fewer if they
would have more scores than this for each key head."""


class Product(nn.Module):
    """A linear layer that uses torch's own product, with the interface of `PackedLinear`."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.detach(), requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return linear(inputs, self.weight, self.bias)

    def product(self, inputs: torch.Tensor, activation: str) -> torch.Tensor:
        result = linear(inputs, self.weight, self.bias)
        return silu(result, inplace=True) if activation == "swish" else result

    def combined(self, inputs: torch.Tensor, other: torch.Tensor, operation: str) -> torch.Tensor:
        result = linear(inputs, self.weight, self.bias)
        return result.mul_(other) if operation == "mul" else result.add_(other)


AnyProduct = Product | PackedLinear


class Part(nn.Module):
    """Some outputs of a joined layer, in place of one of the layers that were joined."""

    def __init__(self, joined: AnyProduct, outputs: torch.Tensor) -> None:
        super().__init__()
        # In a tuple, so that the joined layer's parameters are not registered here again.
        self._joined = (joined,)
        self._outputs = outputs

    @property
    def weight(self) -> torch.Tensor:
        """The plain weight [outputs, inputs], copied on each access."""
        return self._joined[0].weight[self._outputs]

    @property
    def bias(self) -> torch.Tensor | None:
        bias = self._joined[0].bias
        return None if bias is None else bias[self._outputs]

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        whole: torch.Tensor = self._joined[0](inputs)
        return whole[..., self._outputs]


class Shared:
    """What all layers of a forward use and the first one computes: rotary factors as complex
    numbers, and masks in the form that is added to scores. Keyed by the tensors from which they
    were made."""

    def __init__(self) -> None:
        self._cos: torch.Tensor | None = None
        self._turns = torch.zeros(0)
        self._masks: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._causal = torch.zeros(0, 0)

    def turns(self, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """The rotary factors cos + i sin: complex64 [rows, tokens, 1, head_dim / 2]."""
        if cos is not self._cos:
            half = cos.shape[-1] // 2
            turns = torch.complex(cos[..., :half].float(), sin[..., :half].float())
            self._turns = turns[:, :, None]
            self._cos = cos
            self._masks.clear()
        return self._turns

    def mask(self, mask: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
        """`mask` in the form that is added to scores: 0 where a boolean mask allows attention, else
        minus infinity."""
        if mask is None or mask.dtype is not torch.bool:
            return mask
        for known, added in self._masks:
            if known is mask:
                return added
        added = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
        added.masked_fill_(mask.logical_not(), -torch.inf)
        self._masks.append((mask, added))
        return added

    def causal(self, tokens: int, like: torch.Tensor) -> torch.Tensor:
        """The additive causal mask [tokens, tokens]."""
        if self._causal.shape[0] < tokens or self._causal.dtype is not like.dtype:
            whole = torch.full((tokens, tokens), -torch.inf, dtype=like.dtype, device=like.device)
            self._causal = whole.triu(1)
        return self._causal[:tokens, :tokens]


class FusedLayer:
    """The fused `forward` of one decoder layer. `pack`: with packed weights (see `packed`)."""

    def __init__(self, layer: Any, shared: Shared, *, pack: bool) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        make: type[AnyProduct] = PackedLinear if pack else Product
        self._shared = shared
        self._index: int = attention.layer_idx
        self._scaling: float = attention.scaling
        self._dim: int = attention.head_dim
        self._keys = attention.k_proj.out_features // self._dim
        self._queries = attention.q_proj.out_features // self._dim
        self._rotated = self._queries + self._keys
        # The two halves of each rotary pair are put side by side, as complex numbers are stored.
        pairs = torch.arange(self._dim).view(2, -1).t().flatten()
        places = torch.arange(self._rotated)[:, None] * self._dim + pairs
        order = torch.cat(
            [places.flatten(), torch.arange(self._keys * self._dim) + self._rotated * self._dim]
        )
        projections = [attention.q_proj, attention.k_proj, attention.v_proj]
        weight = torch.cat([one.weight.detach() for one in projections])[order]
        bias = None
        if projections[0].bias is not None:
            bias = torch.cat([one.bias.detach() for one in projections])[order]
        self.qkv = make(weight, bias)
        self._order = order
        self.out, self.gate, self.up, self.down = (
            make(one.weight, one.bias)
            for one in (attention.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj)
        )
        self.kernels: Kernels | None = None
        if weight.device.type == "cpu":
            self.kernels = compiled(weight.dtype, self._dim, self._queries // self._keys)
        self._normed_input = Norm(layer.input_layernorm, self.kernels)
        self._normed_inside = Norm(layer.post_attention_layernorm, self.kernels)
        own_norms = (attention.q_norm, attention.k_norm) if hasattr(attention, "q_norm") else ()
        self._head_norms = [Norm(norm, order=pairs) for norm in own_norms]
        # torch's attention uses MKL, which is the slower one where oneDNN's packing pays.
        self._blockwise = pack

    def install(self, layer: Any) -> None:
        """Replace the layer's `forward` and its weights."""
        attention, mlp = layer.self_attn, layer.mlp
        back = torch.argsort(self._order)
        sizes = [self._queries, self._keys, self._keys]
        parts = torch.split(back, [size * self._dim for size in sizes])
        for name, outputs in zip(("q_proj", "k_proj", "v_proj"), parts, strict=True):
            setattr(attention, name, Part(self.qkv, outputs))
        attention.qkv_proj = self.qkv
        attention.o_proj = self.out
        mlp.gate_proj, mlp.up_proj, mlp.down_proj = self.gate, self.up, self.down
        layer.forward = self.forward
        layer.fused = self

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: Any = None,
        use_cache: bool | None = None,
        position_embeddings: Any = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Like transformers' decoder layers: hidden states [rows, tokens, size] in and out."""
        joined = self.qkv.product(self._normed_input(hidden_states), "none")
        cache = past_key_values if cache is None else cache
        packed = cache.plan.packed if type(cache) is SlotCache else None
        if packed is not None and self.kernels is not None:
            turns = self._shared.turns(*position_embeddings)
            seen = self._attend_packed(joined, turns, cache.slot_layers[self._index], packed)
        else:
            seen = self._attend_apart(joined, attention_mask, cache, position_embeddings)
        hidden_states = self.out.combined(seen, hidden_states, "add")
        normed = self._normed_inside(hidden_states)
        gated = self.up.combined(normed, self.gate.product(normed, "swish"), "mul")
        return self.down.combined(gated, hidden_states, "add")

    def _attend_packed(
        self, joined: torch.Tensor, turns: torch.Tensor, layer: SlotLayer, packed: Packed
    ) -> torch.Tensor:
        """Store keys and values of packed tokens, and compute their attention [..., queries *
        head_dim]."""
        assert self.kernels is not None
        heads = joined.view(-1, self._rotated + self._keys, self._dim)
        layer.prepare(heads[None, :, : self._keys], heads[None, :, : self._keys])
        where = (layer.keys, layer.values, packed.rows, packed.places)
        norms = self._head_norms
        if norms:
            weights = (norms[0].weight, norms[1].weight)
            self.kernels.store(heads, turns, *where, weights, norms[0].epsilon)
        else:
            self.kernels.store(heads, turns, *where)
        seen = joined.new_empty(*joined.shape[:-1], self._queries * self._dim)
        self.kernels.attend(heads, *where, seen, packed.alone, self._scaling)
        flat = seen.view(len(heads), -1)
        for one in packed.together:
            tokens = slice(one.first, one.last)
            self.kernels.attend_together(
                *(heads[tokens], layer.keys, layer.values, one.row, one.end, flat[tokens]),
                self._scaling,
                (packed.rows[tokens], packed.places[tokens]) if one.apart else None,
            )
        return seen

    def _attend_apart(
        self, joined: torch.Tensor, attention_mask: Any, cache: Any, position_embeddings: Any
    ) -> torch.Tensor:
        """Attention of rows with the same number of tokens each."""
        rows, tokens, _ = joined.shape
        heads = joined.view(rows, tokens, -1, self._dim)
        rotated = heads[:, :, : self._rotated]
        if self._head_norms:
            for part, norm in zip(
                torch.split(rotated, [self._queries, self._keys], dim=2),
                self._head_norms,
                strict=True,
            ):
                part.copy_(norm(part))
        self._turn(rotated, self._shared.turns(*position_embeddings))
        keys, values = rotated[:, :, self._queries :], heads[:, :, self._rotated :]
        if type(cache) is SlotCache:
            keys, values = cache.slot_layers[self._index].store(keys, values)
        else:
            keys, values = keys.transpose(1, 2), values.transpose(1, 2)
            if cache is not None:
                keys, values = cache.update(keys, values, self._index)
            if attention_mask is None and tokens > 1:
                # A cache of fixed size returns all of it; only what is filled may be attended to.
                keys, values = keys[:, :, :tokens], values[:, :, :tokens]
        mask = self._shared.mask(attention_mask, joined.dtype)
        return self._attend(rotated[:, :, : self._queries], keys, values, mask)

    def _turn(self, heads: torch.Tensor, turns: torch.Tensor) -> None:
        """Rotary embedding of heads [rows, tokens, heads, head_dim], in place."""
        pairs = heads.view(*heads.shape[:-1], -1, 2)
        if heads.dtype is torch.float32:
            torch.view_as_complex(pairs).mul_(turns)
        else:
            # Half precision has no complex numbers.
            pairs.copy_(torch.view_as_real(torch.view_as_complex(pairs.float()).mul_(turns)))

    def _attend(
        self,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """Attention of queries [rows, tokens, heads, head_dim] to keys and values [rows, heads,
        length, head_dim]. Returns [rows, tokens, heads * head_dim]."""
        rows, tokens = queries.shape[:2]
        if tokens == 1:
            # Queries that share a key head are treated as tokens of that head.
            folded = queries.view(rows, self._keys, -1, self._dim)
            seen = scaled_dot_product_attention(
                folded, keys, values, attn_mask=mask, scale=self._scaling
            )
            return seen.reshape(rows, 1, -1)
        if mask is None and keys.shape[2] != tokens:
            raise ValueError("several tokens that follow cached ones need a mask")
        if self._blockwise and rows == 1 and tokens >= BLOCK_TOKENS // 2:
            return self._attend_blockwise(queries[0], keys[0], values[0], mask)
        seen = scaled_dot_product_attention(
            queries.transpose(1, 2),
            keys,
            values,
            attn_mask=mask,
            scale=self._scaling,
            is_causal=mask is None,
            enable_gqa=self._queries != self._keys,
        )
        return seen.transpose(1, 2).reshape(rows, tokens, -1)

    def _attend_blockwise(
        self,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """Attention of one row's last tokens, a block at a time, with oneDNN's products, which
        torch's own attention does not use. Queries [tokens, heads, head_dim], keys and values
        [heads, length, head_dim]. Without a mask, attention is causal. Returns [1, tokens, heads *
        head_dim]."""
        tokens, length = queries.shape[0], keys.shape[1]
        keys, values = keys.contiguous(), values.transpose(1, 2).contiguous()
        group = self._queries // self._keys
        grouped = (queries * self._scaling).view(tokens, self._keys, group, self._dim)
        grouped = grouped.permute(1, 0, 2, 3)
        result = torch.empty_like(grouped, memory_format=torch.contiguous_format)
        times = _times if self._blockwise else linear
        block = max(BLOCK_TOKENS // 8, min(BLOCK_TOKENS, BLOCK_SCORES // (group * length)))
        for start in range(0, tokens, block):
            end = min(start + block, tokens)
            limit = length - tokens + end if mask is None else length
            bias = self._shared.causal(end - start, queries) if mask is None else mask[0]
            for head in range(self._keys):
                asked = grouped[head, start:end].reshape(-1, self._dim)
                scores = times(asked, keys[head, :limit]).view(end - start, group, limit)
                if mask is None:
                    scores[:, :, limit - end + start :].add_(bias[:, None])
                else:
                    scores.add_(bias[head % len(bias), start:end, None])
                shares = torch.softmax(scores, -1).view(-1, limit)
                seen = times(shares, values[head, :, :limit])
                result[head, start:end] = seen.view(end - start, group, self._dim)
        return result.transpose(0, 1).reshape(1, tokens, -1)


def prepare_layers(model: nn.Module, settings: EngineSettings) -> None:
    """Fuse and pack the layers of a model that was just loaded, as `settings` allow. A model with
    adapters is left as it is: they are inside its layers and share weights with their base."""
    first = next(model.parameters())
    on_cpu = first.device.type == "cpu"
    adapted = settings.adapters or settings.adapters_folder
    if adapted or settings.fused == "off" or not (on_cpu or settings.fused == "on"):
        return
    pack = on_cpu and can_pack(first.dtype) and (settings.fused == "on" or packs_faster(model))
    fuse_layers(model, pack=pack)
    if pack:
        pack_weights(model)


class DirectForward:
    """The forward of a model whose layers are all fused, without transformers' code around them,
    which takes a tenth of a single row's step. Only for a `SlotCache`, with masks as `Forward`
    makes them."""

    def __init__(self, model: Any) -> None:
        self._embed = model.model.embed_tokens
        self._rotary = model.model.rotary_emb
        self._layers = [layer.forward for layer in model.model.layers]
        fused = [layer.fused for layer in model.model.layers]
        self._norm = Norm(model.model.norm, fused[0].kernels if fused else None)
        self._head = model.lm_head
        #: Whether it can compute packed tokens.
        self.packs = all(one.kernels is not None for one in fused)

    def __call__(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        cache: SlotCache,
        attention_mask: torch.Tensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
    ) -> torch.Tensor:
        """Logits [rows, kept tokens, vocabulary]. Without a mask, each token attends to all that
        precede it in its row."""
        states = self._embed(input_ids)
        turns = self._rotary(states, position_ids)
        for layer in self._layers:
            states = layer(states, attention_mask, cache=cache, position_embeddings=turns)
        if isinstance(logits_to_keep, torch.Tensor):
            states = states[:, logits_to_keep]
        elif logits_to_keep:
            states = states[:, -logits_to_keep:]
        logits: torch.Tensor = self._head(self._norm(states))
        return logits


def direct_forward(model: Any) -> DirectForward | None:
    """The direct forward of a causal language model of a known class whose layers are all fused;
    None for any other model."""
    kind = type(model)
    if kind.__name__ not in MODELS or not kind.__module__.startswith("transformers.models."):
        return None
    body = model.model
    around = [model, body, body.embed_tokens, body.rotary_emb, body.norm, model.lm_head]
    layers = list(body.layers)
    if (
        not all(isinstance(vars(one).get("fused"), FusedLayer) for one in layers)
        or len(layers) != model.config.num_hidden_layers
        or type(body.embed_tokens) is not nn.Embedding
        or any(_is_observed(one) for one in around)
        or any(one._forward_hooks or one._forward_pre_hooks for one in layers)
    ):
        return None
    return DirectForward(model)


def fuse_layers(model: nn.Module, *, pack: bool) -> int:
    """Fuse all decoder layers of a model that have a known class and whose fused form agrees with
    their own code. Returns how many were fused. `pack`: also pack their weights (see `packed`)."""
    count = 0
    for owner, layers in _stacks(model):
        shared = Shared()
        for layer in layers:
            if not _is_known(layer):
                continue
            fused = FusedLayer(
                layer, shared, pack=pack and can_pack(layer.mlp.down_proj.weight.dtype)
            )
            error = _difference(layer, fused, owner.rotary_emb)
            if not error <= ERRORS[layer.mlp.down_proj.weight.dtype]:
                log.warning("a layer is not fused: its output would differ by %.2g", error)
                continue
            fused.install(layer)
            count += 1
    log.debug("%d decoder layers are fused", count)
    return count


def _stacks(model: nn.Module) -> Iterator[tuple[Any, Any]]:
    for module in model.modules():
        layers, config = getattr(module, "layers", None), getattr(module, "config", None)
        known = isinstance(layers, nn.ModuleList) and hasattr(module, "rotary_emb")
        if known and getattr(config, "_attn_implementation", "") == "sdpa":
            yield module, layers


def _is_known(layer: Any) -> bool:
    kind = type(layer)
    if kind.__name__ not in LAYERS or not kind.__module__.startswith("transformers.models."):
        return False
    attention, mlp = layer.self_attn, layer.mlp
    projections = [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj]
    projections += [mlp.gate_proj, mlp.up_proj, mlp.down_proj]
    return (
        all(map(is_plain, projections))
        and getattr(attention, "is_causal", False)
        and getattr(attention.config, "is_causal", True)
        and projections[0].weight.dtype in ERRORS
        and len({one.bias is None for one in projections[:3]}) == 1
        and type(mlp.act_fn).__name__ in ("SiLU", "SiLUActivation")
        and not any(map(_is_observed, layer.modules()))
    )


def _is_observed(module: nn.Module) -> bool:
    """Whether something hooks into a module or has replaced its code."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
    ) or hasattr(module, "_hf_hook")


@torch.inference_mode()
def _difference(layer: Any, fused: FusedLayer, rotary: Any) -> float:
    """Relative difference of a layer and its fused form, for a probe with a causal mask."""
    weight = layer.self_attn.q_proj.weight
    numbers = torch.arange(PROBED_ROWS * PROBED_TOKENS * weight.shape[1], dtype=torch.float32)
    probe = torch.sin(numbers).view(PROBED_ROWS, PROBED_TOKENS, -1)
    probe = probe.to(device=weight.device, dtype=weight.dtype)
    positions = torch.arange(PROBED_TOKENS, device=weight.device)[None]
    arguments: dict[str, Any] = {
        "position_embeddings": rotary(probe, positions),
        "attention_mask": (positions[0][:, None] >= positions)[None, None],
    }
    wanted = layer(probe, **arguments) - probe
    error = (fused.forward(probe, **arguments) - probe - wanted).float().norm()
    return float(error / wanted.float().norm().clamp_min(1e-12))


class Norm:
    """RMSNorm as in Llama, computed in float32. On a CPU, torch's `rms_norm` makes three temporary
    tensors of the same size."""

    def __init__(
        self, norm: Any, kernels: Kernels | None = None, *, order: torch.Tensor | None = None
    ) -> None:
        """`order`: a permutation of the weights; None leaves them in order."""
        weight: torch.Tensor = norm.weight.detach()
        size = weight.shape[0]
        self.weight = (weight if order is None else weight[order]).contiguous()
        self.epsilon = float(norm.variance_epsilon)
        self._kernels = kernels
        self._dtype = weight.dtype
        # x / sqrt(mean(x * x) + epsilon) is x * sqrt(size) / hypot(|x|, sqrt(epsilon * size)).
        self._factor = size**0.5
        self._leg = torch.tensor((self.epsilon * size) ** 0.5, device=weight.device)

    def __call__(self, states: torch.Tensor) -> torch.Tensor:
        if self._kernels is not None and states.dtype is self._dtype and states.is_contiguous():
            return self._kernels.norm(states, self.weight, self.epsilon)
        length = torch.linalg.vector_norm(states, dim=-1, keepdim=True, dtype=torch.float32)
        scaled = states * torch.hypot(length, self._leg).reciprocal_().mul_(self._factor)
        return scaled.to(self._dtype).mul_(self.weight)


def _times(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """`left` [rows, size] times the transpose of `right` [columns, size], by oneDNN."""
    result: torch.Tensor = torch.ops.mkldnn._linear_pointwise.default(
        left, right.contiguous(), None, "none", [], ""
    )
    return result
