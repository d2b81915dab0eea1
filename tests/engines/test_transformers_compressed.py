"""Checkpoints of compressed-tensors: each layer is what its own group's scheme says, and what was
rounded when the model was quantised is rounded when it is served."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.engines import tiny
from tests.engines.test_transformers_quantised import GROUP, linear_weights, load, load_state, write
from worker.engines.base import EngineLoadError, EngineOptions
from worker.engines.transformers import build

pytest.importorskip("compressed_tensors")
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

Rounding = Callable[[torch.Tensor], torch.Tensor]


# --- what a checkpoint holds, and what it stands for ----------------------------------------------


def to_int8(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return (values / scale).round().clamp(-128, 127)


def to_fp8(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return (values / scale).clamp(-448, 448).to(torch.float8_e4m3fn)


def int8_of_each_token(values: torch.Tensor) -> torch.Tensor:
    low, high = values.amin(-1, keepdim=True), values.amax(-1, keepdim=True)
    scale = torch.maximum(low.abs(), high.abs()).clamp_min(1e-9) / 127.5
    return to_int8(values, scale) * scale


def fp8_of_each_token(values: torch.Tensor) -> torch.Tensor:
    scale = values.abs().amax(-1, keepdim=True).clamp_min(1e-9) / 448.0
    return to_fp8(values, scale).float() * scale


def fp8_at(scale: float) -> Rounding:
    step = torch.tensor(scale)
    return lambda values: to_fp8(values, step).float() * step


def packed_group(bits: int, *targets: str) -> dict[str, Any]:
    weights = {"num_bits": bits, "type": "int", "symmetric": True}
    return {
        "targets": list(targets),
        "weights": weights | {"strategy": "group", "group_size": GROUP},
        "format": "pack-quantized",
    }


def eight_bits(kind: str, *targets: str, **inputs: Any) -> dict[str, Any]:
    """Weights of 8 bits with a scale for each output; `inputs`: how activations are rounded."""
    common = {"num_bits": 8, "type": kind, "symmetric": True}
    return {
        "targets": list(targets),
        "weights": common | {"strategy": "channel"},
        "input_activations": common | inputs if inputs else None,
        "format": f"{kind}-quantized",
    }


TOKENS = {"strategy": "token", "dynamic": True}
TENSOR = {"strategy": "tensor", "dynamic": False}


def store_packed(weight: torch.Tensor, bits: int) -> dict[str, torch.Tensor]:
    """The tensors of a layer of packed integers; `weight` becomes what they stand for."""
    groups, top = weight.detach().view(weight.shape[0], -1, GROUP), 2 ** (bits - 1) - 1
    scales = groups.abs().amax(-1, keepdim=True) / top
    values = (groups / scales).round().clamp(-top - 1, top)
    with torch.no_grad():
        weight.copy_((values * scales).view_as(weight))
    return {
        "weight_packed": pack_to_int32(values.view_as(weight).to(torch.int8), bits).contiguous(),
        "weight_scale": scales[..., 0].contiguous(),
        "weight_shape": torch.tensor(weight.shape),
    }


def store_eight_bits(weight: torch.Tensor, kind: str) -> dict[str, torch.Tensor]:
    scale = weight.detach().abs().amax(-1, keepdim=True) / (448.0 if kind == "float" else 127.0)
    if kind == "float":
        values = to_fp8(weight.detach(), scale)
    else:
        values = to_int8(weight.detach(), scale).to(torch.int8)
    with torch.no_grad():
        weight.copy_(values.float() * scale)
    return {"weight": values, "weight_scale": scale}


def checkpoint(
    folder: Path,
    model: Any,
    store: Callable[[str, torch.Tensor], dict[str, torch.Tensor]],
    weights: dict[str, torch.Tensor] | None = None,
    **config: Any,
) -> None:
    """Write `model` with its layers as `store` has them (nothing: as they are)."""
    state = {name: tensor.clone() for name, tensor in load_state(folder, model).items()}
    for name, weight in (weights or linear_weights(model)).items():
        held = store(name, weight)
        if held:
            del state[name]
            stem = name.removesuffix("weight")
            state |= {stem + part: tensor for part, tensor in held.items()}
    facts = {"quant_method": "compressed-tensors", "quantization_status": "compressed"}
    write(folder, model, state, facts | {"ignore": ["lm_head"]} | config)


def rounding(model: Any, how: Rounding, only: str = "") -> None:
    """Round what goes into the layers of `model`."""
    for name in linear_weights(model):
        if only in name:
            module = model.get_submodule(name.removesuffix(".weight"))
            module.register_forward_pre_hook(lambda _, given: (how(given[0]), *given[1:]))


IDS = torch.tensor([tiny.prompts(1, low=20, high=20)[0]])


@torch.inference_mode()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=IDS).logits


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / other.norm())


# --- groups ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [(4, 8), (8, 4), (2, 4), (3, 6)])
@pytest.mark.parametrize(
    "targets",
    [
        ("re:.*self_attn.*", "re:.*mlp.*"),
        ("Linear", "re:.*mlp.*"),
        # As the language model was called inside a vision-language model.
        ("Linear", "re:language_model.model.layers.*.mlp.*"),
    ],
    ids=str,
)
def test_groups_of_different_bits_are_read_each_by_its_own(
    bits: tuple[int, int], targets: tuple[str, str], tmp_path: Path
) -> None:
    model = tiny.llama()
    groups = {f"group_{i}": packed_group(bits[i], targets[i]) for i in range(2)}

    def store(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        return store_packed(weight, bits["mlp" in name])

    checkpoint(tmp_path, model, store, format="pack-quantized", config_groups=groups)
    found = logits(load(tmp_path, dtype="float32").model)
    torch.testing.assert_close(found, logits(model), rtol=1e-3, atol=1e-3)
    assert apart(logits(tiny.llama()), logits(model)) > 0.01


def test_layers_named_one_by_one_are_read_by_their_own_group(tmp_path: Path) -> None:
    model = tiny.llama()
    special = ["model.layers.1.mlp.down_proj", "model.layers.0.self_attn.q_proj"]
    groups = {"group_0": packed_group(4, "Linear"), "group_1": packed_group(8, *special)}

    def store(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        return store_packed(weight, 8 if name.removesuffix(".weight") in special else 4)

    checkpoint(tmp_path, model, store, format="pack-quantized", config_groups=groups)
    found = logits(load(tmp_path, dtype="float32").model)
    torch.testing.assert_close(found, logits(model), rtol=1e-3, atol=1e-3)


def test_groups_of_different_formats_are_read_each_by_its_own(tmp_path: Path) -> None:
    model = tiny.llama()
    groups = {
        "group_0": eight_bits("float", "re:.*self_attn.*", **TOKENS),
        "group_1": packed_group(4, "re:.*mlp.*"),
    }

    def store(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        return store_packed(weight, 4) if "mlp" in name else store_eight_bits(weight, "float")

    checkpoint(tmp_path, model, store, format="mixed-precision", config_groups=groups)
    rounding(model, fp8_of_each_token, "self_attn")
    found = logits(load(tmp_path, dtype="float32").model)
    assert apart(found, logits(model)) < 1e-4


def test_a_layer_that_fits_no_group_is_refused(tmp_path: Path) -> None:
    model = tiny.llama()
    groups = {"group_0": packed_group(4, "Linear"), "group_1": packed_group(2, "re:.*mlp.*")}

    def store(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        return store_packed(weight, 8 if "mlp" in name else 4)

    checkpoint(tmp_path, model, store, format="pack-quantized", config_groups=groups)
    with pytest.raises(EngineLoadError, match=r"fit none of the quantisation groups"):
        load(tmp_path, dtype="float32")


def mixtral() -> Any:
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=tiny.VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        initializer_range=0.2,
    )
    return MixtralForCausalLM(config).eval()


def expert_weights(model: Any) -> dict[str, torch.Tensor]:
    """Files hold experts one by one, the model holds them in one tensor: views of its parts."""
    weights = {}
    for layer in range(2):
        experts = model.model.layers[layer].mlp.experts
        stem = f"model.layers.{layer}.block_sparse_moe.experts"
        for index in range(4):
            weights[f"{stem}.{index}.w1.weight"] = experts.gate_up_proj.data[index, :96]
            weights[f"{stem}.{index}.w3.weight"] = experts.gate_up_proj.data[index, 96:]
            weights[f"{stem}.{index}.w2.weight"] = experts.down_proj.data[index]
    return weights


@pytest.mark.parametrize(
    ("targets", "bits_of"),
    [
        (("re:.*self_attn.*", "re:.*experts.*"), lambda name: 4 if "attn" in name else 8),
        (
            ("re:.*layers.0.*", "re:.*layers.1.*"),
            lambda name: 4 if "layers.0" in name else 8,
        ),
        (("Linear", "re:.*experts.*w2"), lambda name: 8 if "w2" in name else 4),
        (("Linear", "re:.*experts.3.*"), lambda name: 8 if "experts.3" in name else 4),
    ],
    ids=["attention and experts", "layers", "one kind of weight", "one expert"],
)
def test_experts_are_read_each_by_its_own_group(
    targets: tuple[str, str], bits_of: Callable[[str], int], tmp_path: Path
) -> None:
    model = mixtral()
    weights = {n: w for n, w in linear_weights(model).items() if "attn" in n}
    groups = {"group_0": packed_group(4, targets[0]), "group_1": packed_group(8, targets[1])}
    checkpoint(
        tmp_path,
        model,
        lambda name, weight: store_packed(weight, bits_of(name)),
        weights | expert_weights(model),
        format="pack-quantized",
        config_groups=groups,
    )
    found = logits(load(tmp_path, dtype="float32").model)
    torch.testing.assert_close(found, logits(model), rtol=1e-3, atol=1e-3)


# --- activations ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "inputs", "how", "least"),
    [
        ("int", TOKENS, int8_of_each_token, 0.004),
        ("float", TOKENS, fp8_of_each_token, 0.02),
        ("float", TENSOR, fp8_at(0.02), 0.02),
    ],
    ids=["W8A8", "FP8 dynamic", "FP8 static"],
)
def test_activations_are_rounded_as_when_the_model_was_quantised(
    kind: str, inputs: dict[str, Any], how: Rounding, least: float, tmp_path: Path
) -> None:
    model = tiny.llama()

    def store(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        scale = {} if inputs["dynamic"] else {"input_scale": torch.tensor([0.02])}
        return store_eight_bits(weight, kind) | scale

    groups = {"group_0": eight_bits(kind, "Linear", **inputs)}
    checkpoint(tmp_path, model, store, format=f"{kind}-quantized", config_groups=groups)
    exact = logits(model)
    rounding(model, how)
    assert apart(exact, logits(model)) > least, "rounding must matter"
    loaded = load(tmp_path, dtype="float32")
    assert apart(logits(loaded.model), logits(model)) < least / 4
    assert loaded.quantised
    flat = nn.functional.embedding(IDS[0], loaded.model.get_input_embeddings().weight)
    layer = loaded.model.model.layers[0].mlp.up_proj
    torch.testing.assert_close(layer(flat), layer(flat[None])[0], msg="each token by itself")


def test_layers_that_were_left_alone_are_not_rounded(tmp_path: Path) -> None:
    """Even if they had other names when the list was written."""
    model = tiny.llama()
    groups = {"group_0": eight_bits("int", "Linear", **TOKENS)}

    def store(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        return {} if "mlp" in name else store_eight_bits(weight, "int")

    config = {"format": "int-quantized", "config_groups": groups}
    checkpoint(tmp_path, model, store, **config, ignore=["lm_head", "re:tower.mlp.*"])
    rounding(model, int8_of_each_token, "self_attn")
    found = logits(load(tmp_path, dtype="float32").model)
    assert apart(found, logits(model)) < 1e-4


def test_a_checkpoint_with_rounded_activations_is_served_in_slots(tmp_path: Path) -> None:
    folder = tmp_path / "w8a8"
    model = tiny.llama()
    groups = {"group_0": eight_bits("int", "Linear", **TOKENS)}
    checkpoint(
        folder,
        model,
        lambda name, weight: store_eight_bits(weight, "int"),
        format="int-quantized",
        config_groups=groups,
    )
    engine = build(
        EngineOptions(model_paths=(str(folder),), device="cpu", engine_args={"kv_tokens": "4096"}),
        lambda share, note: None,
    )
    try:
        details = engine.capabilities.models[0].details
        assert details["scheduler"] == "slots" and details["quantised"] is True
        served = engine._served[0].loaded.model  # type: ignore[attr-defined]
        for ids in tiny.prompts(3):
            answer = tiny.run(engine, [tiny.ids_job(ids, model="w8a8", max_tokens=4)])[0]  # type: ignore[arg-type]
            inputs = {"input_ids": torch.tensor([ids])}
            assert answer.token_ids == tiny.generated(served, inputs, 4, ())
    finally:
        engine.close()


def test_a_scale_that_is_missing_is_refused(tmp_path: Path) -> None:
    model = tiny.llama()
    groups = {"group_0": eight_bits("float", "Linear", **TENSOR)}
    checkpoint(
        tmp_path,
        model,
        lambda name, weight: store_eight_bits(weight, "float"),
        format="float-quantized",
        config_groups=groups,
    )
    with pytest.raises(EngineLoadError, match="input_scale"):
        load(tmp_path, dtype="float32")


def test_experts_whose_activations_cannot_be_rounded_are_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = mixtral()
    groups = {"group_0": eight_bits("int", "Linear", **TOKENS)}
    checkpoint(
        tmp_path,
        model,
        lambda name, weight: store_eight_bits(weight, "int"),
        expert_weights(model),
        format="int-quantized",
        config_groups=groups,
    )
    with caplog.at_level(logging.WARNING, "worker"):
        found = logits(load(tmp_path, dtype="float32").model)
    torch.testing.assert_close(found, logits(model), rtol=1e-3, atol=1e-3)
    assert "activations of 4 fused experts" in caplog.text


# --- what cannot be served right ------------------------------------------------------------------


def rotation(*places: str) -> dict[str, Any]:
    apply = [{"targets": ["re:.*down_proj$"], "location": place} for place in places]
    return {"config_groups": {"R4": {"type": "hadamard", "apply": apply, "randomize": False}}}


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"transform_config": rotation("input", "weight_input")}, r"rotated.*R4 \(input\)"),
        ({"transform_config": rotation("output")}, r"rotated.*R4 \(output\)"),
        ({"transform_config": rotation("q_attn", "k_cache")}, r"rotated.*R4 \(k_cache\), R4"),
        ({"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparse-24-bitmask"),
        ({"format": "marlin-24"}, "marlin-24"),
    ],
    ids=str,
)
def test_a_checkpoint_that_cannot_be_served_correctly_is_refused_by_name(
    config: dict[str, Any], named: str, tmp_path: Path
) -> None:
    model = tiny.llama()
    groups = {"group_0": packed_group(4, "Linear")}
    common = {"format": "pack-quantized", "config_groups": groups}
    checkpoint(tmp_path, model, lambda _, weight: store_packed(weight, 4), **common | config)
    with pytest.raises(EngineLoadError, match=named):
        load(tmp_path, dtype="float32")


def test_a_rotation_that_is_in_the_stored_weights_needs_nothing_more(tmp_path: Path) -> None:
    model = tiny.llama()
    groups = {"group_0": packed_group(4, "Linear")}
    checkpoint(
        tmp_path,
        model,
        lambda _, weight: store_packed(weight, 4),
        format="pack-quantized",
        config_groups=groups,
        transform_config=rotation("weight_input", "weight_output"),
        sparsity_config={"format": "dense"},
    )
    found = logits(load(tmp_path, dtype="float32").model)
    torch.testing.assert_close(found, logits(model), rtol=1e-3, atol=1e-3)


def test_keys_and_values_that_are_not_rounded_are_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny.llama()
    scheme = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor"}
    checkpoint(
        tmp_path,
        model,
        lambda _, weight: store_packed(weight, 4),
        format="pack-quantized",
        config_groups={"group_0": packed_group(4, "Linear")},
        kv_cache_scheme=scheme,
    )
    with caplog.at_level(logging.WARNING, "worker"):
        found = logits(load(tmp_path, dtype="float32").model)
    torch.testing.assert_close(found, logits(model), rtol=1e-3, atol=1e-3)
    assert "kv_cache_scheme is not applied" in caplog.text


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("merged", [True, False])
def test_an_adapter_stands_beside_layers_whose_activations_are_rounded(
    merged: bool, tmp_path: Path
) -> None:
    """It was trained with what is not rounded: merged, its inputs would be."""
    peft = pytest.importorskip("peft")
    model = tiny.llama()
    base = tmp_path / "base"
    checkpoint(
        base,
        model,
        lambda _, weight: store_eight_bits(weight, "int"),
        config_groups={"group_0": eight_bits("int", "Linear", **TOKENS)},
        format="int-quantized",
    )
    tiny.tokenizer().save_pretrained(base)
    rounding(model, int8_of_each_token, "layers")
    unchanged = logits(model)
    with_it = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj"]))
    with torch.no_grad():
        for name, parameter in with_it.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0.0, 0.2)
    with_it.eval().save_pretrained(tmp_path / "a")
    wanted = logits(with_it)
    if merged:
        engine = tiny.load(tmp_path / "a", model_base=str(base), model_names=(("a",),))
    else:
        engine = tiny.load(
            base, model_names=(("base",),), engine_args={"adapters": f"a={tmp_path / 'a'}"}
        )
    try:
        for name, scores in (("a", wanted), ("base", unchanged)):
            if merged and name == "base":
                continue
            job = tiny.ids_job(IDS[0].tolist(), model=name, max_tokens=1, logprobs=1)
            answer = tiny.run(engine, [job])[0]
            best = scores[0, -1].log_softmax(-1).max(-1)
            assert answer.token_ids == [int(best.indices)]
            assert answer.logprobs[0].logprob == pytest.approx(float(best.values), abs=1e-3)
    finally:
        engine.close()
