"""Layers of few operators and packed weights compute what the model's own do, replace only what is
known, and hold no weight twice."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from transformers import DynamicCache

from tests.engines import tiny
from tests.engines.architectures import text_model
from worker.engines.common.compat import cache_argument, forward_parameters
from worker.engines.transformers import fused, packed
from worker.engines.transformers.cache import SlotCache
from worker.engines.transformers.fused import Product, direct_forward, fuse_layers, prepare_layers
from worker.engines.transformers.packed import PackedLinear, pack_weights, restore_read
from worker.engines.transformers.settings import EngineSettings

KNOWN = ("llama", "mistral", "qwen2", "qwen3")
IDS = torch.tensor([[5, 90, 17, 300, 44, 21], [80, 8, 133, 12, 400, 9]])


def _logits(model: Any, **arguments: Any) -> torch.Tensor:
    with torch.inference_mode():
        logits: torch.Tensor = model(input_ids=IDS, **arguments).logits
    return logits


def _close(got: torch.Tensor, wanted: torch.Tensor, error: float = 1e-5) -> None:
    assert float((got - wanted).norm() / wanted.norm()) < error


@pytest.mark.parametrize("pack", [True, False], ids=["packed", "plain"])
@pytest.mark.parametrize("name", KNOWN)
def test_a_fused_model_computes_what_transformers_does(name: str, pack: bool) -> None:
    model = text_model(name)
    wanted = _logits(model)
    padded = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    wanted_padded = _logits(model, attention_mask=padded)
    assert fuse_layers(model, pack=pack) == model.config.num_hidden_layers
    _close(_logits(model), wanted)
    _close(_logits(model, attention_mask=padded)[:, 2:], wanted_padded[:, 2:])


def test_code_that_calls_a_joined_layer_gets_its_own_outputs() -> None:
    model = text_model("qwen2")
    plain = copy.deepcopy(model.model.layers[0].self_attn)
    fuse_layers(model, pack=True)
    states = torch.randn(2, 3, model.config.hidden_size)
    with torch.inference_mode():
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            own, joined = getattr(plain, name), getattr(model.model.layers[0].self_attn, name)
            if name != "o_proj":
                _close(joined(states), own(states))
            assert torch.equal(joined.weight, own.weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("behind", [0, 70])
def test_a_long_prompt_is_computed_block_by_block_to_the_same(
    dtype: torch.dtype, behind: int
) -> None:
    model = text_model("qwen2").to(dtype)
    ids = torch.arange(10, 10 + behind + 200)[None]
    wanted = _prefilled(model, ids, behind).float()
    assert fuse_layers(model, pack=True)
    _close(_prefilled(model, ids, behind).float(), wanted, 1e-5 if dtype is torch.float32 else 0.05)


def _prefilled(model: Any, ids: torch.Tensor, behind: int) -> torch.Tensor:
    """Logits of a prompt after its first `behind` tokens, which are computed before."""
    cache = {str(cache_argument(forward_parameters(model))): DynamicCache(config=model.config)}
    with torch.inference_mode():
        if behind:
            model(input_ids=ids[:, :behind], use_cache=True, **cache)
        output = model(input_ids=ids[:, behind:], use_cache=True, **cache)
    logits: torch.Tensor = output.logits
    return logits


def test_half_precision_stays_within_its_rounding() -> None:
    model = text_model("llama").to(torch.bfloat16)
    wanted = _logits(model).float()
    assert fuse_layers(model, pack=True)
    pack_weights(model)
    _close(_logits(model).float(), wanted, 0.05)


def test_a_layer_that_computes_something_else_keeps_its_own_code(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = text_model("llama")
    wanted = _logits(model)
    right = fused.Norm.__call__
    monkeypatch.setattr(fused.Norm, "__call__", lambda *args: right(*args) * 1.01)
    assert fuse_layers(model, pack=False) == 0
    assert "not fused" in caplog.text
    assert torch.equal(_logits(model), wanted)


def test_layers_that_others_observe_or_changed_are_left_alone() -> None:
    model = text_model("llama")
    first, second = model.model.layers[0], model.model.layers[1]
    first.self_attn.q_proj.register_forward_hook(lambda *args: None)
    second.mlp.forward = second.mlp.forward
    assert fuse_layers(model, pack=True) == model.config.num_hidden_layers - 2
    # Beside the hooked projection, those of the two layers are packed one by one.
    pack_weights(model)
    assert type(first.self_attn.q_proj) is nn.Linear
    assert type(second.self_attn.q_proj) is PackedLinear


@pytest.mark.parametrize("name", ["gemma", "phi3", "qwen3_moe"])
def test_layers_of_another_form_are_only_packed(name: str) -> None:
    model = text_model(name)
    wanted = _logits(model)
    assert fuse_layers(model, pack=True) == 0
    assert pack_weights(model)
    _close(_logits(model), wanted)


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
def test_a_whole_fused_model_runs_without_transformers_around_its_layers(name: str) -> None:
    model = text_model(name)
    assert direct_forward(model) is None, "its layers are not fused"
    wanted = _logits(model)
    fuse_layers(model, pack=True)
    direct = direct_forward(model)
    assert direct is not None
    positions = torch.arange(IDS.shape[1])[None]
    mask = (positions[0][:, None] >= positions)[None, None]
    cache = SlotCache(model.config.num_hidden_layers, slots=2)
    cache.plan.step(0, positions.expand(2, -1), IDS.shape[1])
    with torch.inference_mode():
        _close(direct(IDS, positions, cache, mask), wanted)
        _close(direct(IDS, positions, cache, mask, 2), wanted[:, -2:])
        places = torch.tensor([0, 3])
        _close(direct(IDS, positions, cache, mask, places), wanted[:, places])
    model.model.norm.register_forward_hook(lambda *args: None)
    assert direct_forward(model) is None, "something observes its norm"


def test_a_model_whose_attention_sees_later_tokens_keeps_its_own_code() -> None:
    model = text_model("llama")
    model.config.is_causal = False
    assert fuse_layers(model, pack=True) == 0


def test_without_onednn_nothing_is_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "can_pack", lambda dtype: False)
    model = text_model("llama")
    prepare_layers(model, EngineSettings(fused="on"))
    assert not any(isinstance(m, PackedLinear) for m in model.modules())
    assert direct_forward(model) is not None


def test_bfloat16_is_packed_only_where_the_processor_can(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    model = text_model("llama").to(torch.bfloat16)
    prepare_layers(model, EngineSettings(fused="on"))
    assert not any(isinstance(m, PackedLinear) for m in model.modules())
    prepare_layers(model.float(), EngineSettings(fused="on"))
    assert direct_forward(model) is not None


def test_no_weight_is_held_twice() -> None:
    model = text_model("llama")
    layer = model.model.layers[0]
    before = sum(p.numel() for p in layer.parameters())
    fuse_layers(model, pack=True)
    pack_weights(model)
    kept = sum(p.numel() for p in layer.parameters())
    packed_numbers = sum(
        m.packed.numel() for m in set(layer.modules()) if isinstance(m, PackedLinear)
    )
    assert kept + packed_numbers == before


def test_a_plain_product_takes_part_with_the_same_operations() -> None:
    linear = nn.Linear(48, 32)
    inputs, other = torch.randn(3, 48), torch.randn(3, 32)
    with torch.inference_mode():
        for made in (PackedLinear(linear.weight, linear.bias), Product(linear.weight, linear.bias)):
            _close(made(inputs), linear(inputs))
            _close(made.product(inputs, "swish"), nn.functional.silu(linear(inputs)))
            _close(made.combined(inputs, other, "mul"), linear(inputs) * other)
            _close(made.combined(inputs, other, "add"), linear(inputs) + other)


def test_a_weight_that_code_reads_becomes_plain_again() -> None:
    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.read, self.called = nn.Linear(8, 8), nn.Linear(8, 8, bias=False)

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = self.called(inputs) @ self.read.weight.t()
            return result

    model = Reader()
    inputs = torch.randn(2, 8)
    with torch.inference_mode():
        wanted = model(inputs)
        assert pack_weights(model) == 2
        _close(model(inputs), wanted)
        assert restore_read(model) == 1
        assert isinstance(model.get_submodule("read"), nn.Linear)
        assert isinstance(model.get_submodule("called"), PackedLinear)
        _close(model(inputs), wanted)


def test_a_packed_product_that_differs_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "ERRORS", {torch.float32: -1.0})
    model = text_model("llama")
    assert pack_weights(model) == 0
    assert type(model.lm_head) is nn.Linear


@pytest.mark.parametrize(
    "settings",
    [{"fused": "off"}, {"adapters": "one=/somewhere"}, {"adapters_folder": "/somewhere"}],
)
def test_a_model_stays_as_it_is_where_it_should(settings: dict[str, Any]) -> None:
    model = text_model("llama")
    prepare_layers(model, EngineSettings(**settings))
    assert not any(isinstance(m, PackedLinear | Product) for m in model.modules())


def test_weights_are_packed_only_where_that_is_quicker(monkeypatch: pytest.MonkeyPatch) -> None:
    for quicker in (True, False):
        monkeypatch.setattr(fused, "packs_faster", lambda model, q=quicker: q)
        model = text_model("llama")
        prepare_layers(model, EngineSettings())
        assert any(isinstance(m, PackedLinear) for m in model.modules()) is quicker
        assert type(model.lm_head) is (PackedLinear if quicker else nn.Linear)


def test_an_engine_reports_the_bytes_of_weights_and_cache_separately() -> None:
    plain = tiny.serve(text_model("llama"), fused="off")
    quick = tiny.serve(text_model("llama"), fused="on")
    sizes = [e._served[0].slot_runner.forward._weight_bytes for e in (plain, quick)]  # type: ignore[union-attr]
    assert sizes[0] == sizes[1]
    plain.close()
    quick.close()
