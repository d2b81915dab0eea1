"""Checkpoints that come quantised: what is served is what their integers and scales stand for."""

from __future__ import annotations

import importlib.util
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tests.engines import tiny
from worker.engines.base import EngineLoadError, EngineOptions
from worker.engines.transformers import build
from worker.engines.transformers.loaded import LoadedModel
from worker.engines.transformers.loader import load_model
from worker.engines.transformers.settings import EngineSettings

GROUP = 32

without_gptqmodel = pytest.mark.skipif(
    importlib.util.find_spec("gptqmodel") is not None, reason="gptqmodel computes AWQ itself"
)

GPTQ_PACKAGES = all(importlib.util.find_spec(name) for name in ("gptqmodel", "optimum"))


def load(folder: Path, **options: Any) -> LoadedModel:
    return load_model(
        str(folder),
        EngineOptions(**({"device": "cpu"} | options)),
        EngineSettings(),
        lambda share, note: None,
    )


def linear_weights(model: Any) -> dict[str, torch.Tensor]:
    """Weights of all linear layers but the output head, by name."""
    return {
        f"{path}.weight": module.weight
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and path != "lm_head"
    }


def packed(columns: torch.Tensor) -> torch.Tensor:
    """AutoAWQ's own packing, as its GEMM layout is documented."""
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    words = torch.zeros(columns.shape[0], columns.shape[1] // 8, dtype=torch.int32)
    for index in range(8):
        words |= columns[:, order[index] :: 8].to(torch.int32) << (4 * index)
    return words


def write(folder: Path, model: Any, state: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    model.save_pretrained(folder)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    facts = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(facts | {"quantization_config": config}))
    tiny.tokenizer().save_pretrained(folder)


def awq(folder: Path, model: Any, weights: dict[str, torch.Tensor], **config: Any) -> None:
    """Write `model` as an AWQ checkpoint with random integers, and set its own weights to what
    they stand for."""
    torch.manual_seed(11)
    state = {name: tensor.clone() for name, tensor in load_state(folder, model).items()}
    for name, weight in weights.items():
        outs, ins = weight.shape
        values = torch.randint(0, 16, (ins, outs))
        zeros = torch.randint(4, 12, (ins // GROUP, outs))
        scales = (torch.rand(ins // GROUP, outs) * 0.05 + 0.01).half()
        wide = zeros.repeat_interleave(GROUP, 0), scales.float().repeat_interleave(GROUP, 0)
        with torch.no_grad():
            weight.copy_(((values - wide[0]) * wide[1]).t())
        stem = name.removesuffix("weight")
        del state[name]
        state |= {f"{stem}qweight": packed(values), f"{stem}qzeros": packed(zeros)}
        state[f"{stem}scales"] = scales
    facts = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm"}
    write(folder, model, state, facts | {"zero_point": True} | config)


def load_state(folder: Path, model: Any) -> dict[str, torch.Tensor]:
    """The model's weights under the names of its files."""
    model.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


@torch.inference_mode()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=torch.tensor([tiny.prompts(1)[0]])).logits


@without_gptqmodel
def test_an_awq_checkpoint_is_the_model_that_its_integers_stand_for(tmp_path: Path) -> None:
    model = tiny.llama()
    awq(tmp_path, model, linear_weights(model))
    loaded = load(tmp_path)
    assert loaded.dtype == torch.float32
    assert torch.equal(logits(loaded.model), logits(model))
    assert not torch.allclose(logits(model), logits(tiny.llama()), atol=0.1)


@without_gptqmodel
def test_layers_that_awq_left_alone_stay_as_they_are(tmp_path: Path) -> None:
    model = tiny.llama()
    some = {name: weight for name, weight in linear_weights(model).items() if "mlp" in name}
    awq(tmp_path, model, some, modules_to_not_convert=["self_attn"])
    assert torch.equal(logits(load(tmp_path).model), logits(model))


@without_gptqmodel
def test_experts_of_an_awq_checkpoint_are_dequantised_before_they_are_joined(
    tmp_path: Path,
) -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=tiny.VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
    )
    model = MixtralForCausalLM(config).eval()
    # Files hold experts one by one, the model holds them in one tensor: views of its parts.
    experts = model.model.layers[0].mlp.experts
    stem = "model.layers.0.block_sparse_moe.experts"
    weights = {}
    for index in range(4):
        weights[f"{stem}.{index}.w1.weight"] = experts.gate_up_proj.data[index, :96]
        weights[f"{stem}.{index}.w3.weight"] = experts.gate_up_proj.data[index, 96:]
        weights[f"{stem}.{index}.w2.weight"] = experts.down_proj.data[index]
    awq(tmp_path, model, weights)
    torch.testing.assert_close(logits(load(tmp_path).model), logits(model))


@without_gptqmodel
def test_an_awq_checkpoint_is_served_in_slots(tmp_path: Path) -> None:
    folder = tmp_path / "awq"
    model = tiny.llama()
    awq(folder, model, linear_weights(model))
    engine = build(
        EngineOptions(model_paths=(str(folder),), device="cpu", engine_args={"kv_tokens": "4096"}),
        lambda share, note: None,
    )
    try:
        assert engine.capabilities.models[0].details["scheduler"] == "slots"
        ids = tiny.prompts(3)
        jobs = [tiny.ids_job(prompt, model="awq") for prompt in ids]
        answers = tiny.run(engine, jobs)  # type: ignore[arg-type]
        for prompt, answer in zip(ids, answers, strict=True):
            inputs = {"input_ids": torch.tensor([prompt])}
            assert answer.token_ids == tiny.generated(model, inputs, 12, ())
    finally:
        engine.close()


@without_gptqmodel
@pytest.mark.parametrize("change", [{"bits": 8}, {"version": "gemv"}, {"zero_point": False}])
def test_an_awq_checkpoint_of_another_kind_names_the_package_that_it_needs(
    change: dict[str, Any], tmp_path: Path
) -> None:
    model = tiny.llama()
    awq(tmp_path, model, linear_weights(model), **change)
    with pytest.raises(EngineLoadError, match="gptqmodel"):
        load(tmp_path)


def without_scales(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {
        name: tensor for name, tensor in state.items() if not name.endswith("0.mlp.up_proj.scales")
    }


def with_short_scales(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {
        name: tensor[:1] if name.endswith("0.mlp.up_proj.scales") else tensor
        for name, tensor in state.items()
    }


@without_gptqmodel
@pytest.mark.parametrize("damage", [without_scales, with_short_scales])
def test_a_damaged_awq_checkpoint_is_not_served_with_random_weights(
    damage: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    model = tiny.llama()
    awq(tmp_path, model, linear_weights(model))
    file = tmp_path / "model.safetensors"
    save_file(damage(load_file(file)), file, metadata={"format": "pt"})
    with pytest.raises(EngineLoadError):
        load(tmp_path)


def gptq(
    folder: Path, model: Any, *, bits: int = 4, layout: str = "gptq", reordered: bool = False
) -> None:
    """Write `model` as a GPTQ checkpoint with random integers, packed as AutoGPTQ documents it,
    and set its own weights to what they stand for."""
    torch.manual_seed(12)
    state = {name: tensor.clone() for name, tensor in load_state(folder, model).items()}
    each = 32 // bits
    for name, weight in linear_weights(model).items():
        outs, ins = weight.shape
        values = torch.randint(0, 1 << bits, (ins, outs))
        zeros = torch.randint(1, 1 << bits, (ins // GROUP, outs))
        scales = (torch.rand(ins // GROUP, outs) * 0.2 / (1 << bits) + 0.01).half()
        groups = torch.arange(ins) // GROUP
        if reordered:
            groups = groups[torch.randperm(ins)]
        with torch.no_grad():
            weight.copy_(((values - zeros[groups]) * scales.float()[groups]).t())
        stored = zeros - int(layout == "gptq")
        weights = torch.zeros(ins // each, outs, dtype=torch.int64)
        points = torch.zeros(ins // GROUP, outs // each, dtype=torch.int64)
        for place in range(each):
            weights |= values[place::each] << (bits * place)
            points |= stored[:, place::each] << (bits * place)
        stem = name.removesuffix("weight")
        del state[name]
        state |= {f"{stem}qweight": weights.int(), f"{stem}qzeros": points.int()}
        state |= {f"{stem}scales": scales, f"{stem}g_idx": groups.int()}
    config = {"quant_method": "gptq", "bits": bits, "group_size": GROUP, "desc_act": reordered}
    write(folder, model, state, config | {"sym": False, "checkpoint_format": layout})


without_gptq = pytest.mark.skipif(
    GPTQ_PACKAGES, reason="gptqmodel and optimum compute GPTQ themselves"
)


@without_gptq
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("layout", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("reordered", [False, True])
def test_a_gptq_checkpoint_is_the_model_that_its_integers_stand_for(
    bits: int, layout: str, reordered: bool, tmp_path: Path
) -> None:
    model = tiny.llama()
    gptq(tmp_path, model, bits=bits, layout=layout, reordered=reordered)
    loaded = load(tmp_path)
    assert not loaded.quantised
    assert torch.equal(logits(loaded.model), logits(model))
    assert not torch.allclose(logits(model), logits(tiny.llama()), atol=0.1)


@without_gptq
def test_a_damaged_gptq_checkpoint_is_not_served_with_random_weights(tmp_path: Path) -> None:
    model = tiny.llama()
    gptq(tmp_path, model)
    file = tmp_path / "model.safetensors"
    save_file(with_short_scales(load_file(file)), file, metadata={"format": "pt"})
    with pytest.raises(EngineLoadError, match="GPTQ tensors do not fit"):
        load(tmp_path)


@pytest.mark.skipif(not GPTQ_PACKAGES, reason="gptqmodel and optimum are not installed here")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.timeout(900)  # gptqmodel compiles its kernel when it is first used
def test_gptqmodel_computes_what_the_integers_stand_for(tmp_path: Path) -> None:
    model = tiny.llama()
    gptq(tmp_path, model)
    loaded = load(tmp_path, dtype="float32")
    assert loaded.quantised
    found, wanted = logits(loaded.model), logits(model)
    assert float((found - wanted).norm() / wanted.norm()) < 0.05


def test_an_fp8_checkpoint_is_the_model_that_its_blocks_stand_for(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny.llama(hidden=128)
    state = {name: tensor.clone() for name, tensor in load_state(tmp_path, model).items()}
    for name, weight in linear_weights(model).items():
        outs, ins = weight.shape
        rows, columns = -(-outs // 64), -(-ins // 64)
        blocks = weight.detach().view(rows, outs // rows, columns, ins // columns)
        scales = blocks.abs().amax((1, 3)) / 448.0
        wide = scales[:, None, :, None]
        values = (blocks / wide).to(torch.float8_e4m3fn)
        with torch.no_grad():
            weight.copy_((values.float() * wide).view(outs, ins))
        state[name] = values.view(outs, ins)
        state[f"{name}_scale_inv"] = scales
    config = {"quant_method": "fp8", "weight_block_size": [64, 64], "activation_scheme": "dynamic"}
    write(tmp_path, model, state, config)
    with caplog.at_level(logging.WARNING, "worker"):
        loaded = load(tmp_path, dtype="float32")
    torch.testing.assert_close(logits(loaded.model), logits(model))
    assert not torch.equal(logits(model), logits(tiny.llama(hidden=128)))
    if not torch.cuda.is_available():
        assert not loaded.quantised
        assert "its activations are not rounded" in caplog.text


def test_a_compressed_tensors_checkpoint_is_the_model_that_it_was_packed_from(
    tmp_path: Path,
) -> None:
    compressors = pytest.importorskip("compressed_tensors.compressors")
    from compressed_tensors.quantization import (
        QuantizationConfig,
        apply_quantization_config,
    )

    config = QuantizationConfig(
        format="pack-quantized",
        quantization_status="compressed",
        ignore=["lm_head"],
        config_groups={
            "group_0": {
                "targets": ["Linear"],
                "weights": {
                    "num_bits": 4,
                    "type": "int",
                    "symmetric": True,
                    "strategy": "group",
                    "group_size": GROUP,
                },
                "format": "pack-quantized",
            }
        },
    )
    model, packing = tiny.llama(), tiny.llama()
    apply_quantization_config(packing, config)
    for name, weight in linear_weights(model).items():
        groups = weight.detach().view(weight.shape[0], -1, GROUP)
        scales = groups.abs().amax(-1, keepdim=True) / 7.0
        values = (groups / scales).round().clamp(-8, 7)
        layer = packing.get_submodule(name.removesuffix(".weight"))
        with torch.no_grad():
            weight.copy_((values * scales).view_as(weight))
            layer.weight.copy_(weight)
            layer.weight_scale.copy_(scales[..., 0])
    compressor = compressors.ModelCompressor(quantization_config=config)
    compressor.compress_model(packing)
    state = {name: tensor.contiguous() for name, tensor in packing.state_dict().items()}
    write(tmp_path, tiny.llama(), state, json.loads(config.model_dump_json()))
    loaded = load(tmp_path)
    assert "model.layers.0.mlp.up_proj.weight_packed" in state
    torch.testing.assert_close(logits(loaded.model), logits(model), rtol=1e-3, atol=1e-3)
    assert not torch.allclose(logits(model), logits(tiny.llama()), atol=0.1)
