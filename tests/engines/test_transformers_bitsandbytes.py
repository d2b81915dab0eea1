"""Weights in 8 and 4 bits: what is quantised, what is reported as left dense, and checkpoints that
were saved quantised by other releases of transformers."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.quantizers_utils import should_convert_module

from tests.engines import tiny
from tests.engines.architectures import text_model
from tests.engines.test_transformers_quantised import load
from worker.engines.base import EngineLoadError
from worker.engines.transformers.loading.quantise import modules_to_skip, normalise_skip_names

pytest.importorskip("bitsandbytes")
pytestmark = pytest.mark.filterwarnings("ignore")

each_width = pytest.mark.parametrize("bits", [8, 4])


def saved(folder: Path, model: Any, processor: Any = None) -> Path:
    model.save_pretrained(folder)
    (processor or tiny.tokenizer()).save_pretrained(folder)
    return folder


def in_few_bits(bits: int) -> dict[str, Any]:
    return {"load_8bit": bits == 8, "load_4bit": bits == 4}


def quantised_layers(model: nn.Module) -> set[str]:
    return {path for path, module in model.named_modules() if "bit" in type(module).__name__}


# --- experts --------------------------------------------------------------------------------------


@each_width
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_experts_that_stay_dense_are_reported(
    name: str, bits: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = text_model(name)
    experts = sum(p.numel() for n, p in model.named_parameters() if ".experts." in n)
    whole = sum(p.numel() for p in model.parameters())
    with caplog.at_level(logging.WARNING, "worker"):
        loaded = load(saved(tmp_path, model), **in_few_bits(bits))
    share = loaded.details["quantised_share"]
    assert 0.0 < share < 1.0 - experts / whole
    assert f"only {100 * share:.0f} % of the weights are quantised" in caplog.text
    assert re.search(r"Experts stay (float32|bfloat16)", caplog.text)


@each_width
def test_a_model_without_such_parts_is_not_remarked_upon(
    bits: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny.llama(layers=4)
    with caplog.at_level(logging.WARNING, "worker"):
        loaded = load(saved(tmp_path, model), **in_few_bits(bits))
    linear = sum(
        module.weight.numel()
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and path != "lm_head"
    )
    whole = sum(parameter.numel() for parameter in model.parameters())
    assert loaded.details["quantised_share"] == pytest.approx(linear / whole, abs=1e-3)
    assert "are quantised" not in caplog.text


def test_a_model_of_which_nothing_can_be_quantised_is_refused(tmp_path: Path) -> None:
    model = tiny.llama(hidden=48)
    with pytest.raises(EngineLoadError, match="multiple of 64 inputs"):
        load(saved(tmp_path, model), load_4bit=True)


def test_a_dense_model_has_no_quantised_share(tmp_path: Path) -> None:
    assert "quantised_share" not in load(saved(tmp_path, tiny.llama())).details


# --- which layers ---------------------------------------------------------------------------------


def parts(model: nn.Module, *, quantised: bool) -> set[str]:
    """The paths of the layers that are quantised, or not, without their numbers."""
    skip = modules_to_skip(model, bits=8, device=torch.device("cuda"))
    return {
        re.sub(r"\.\d+", "", path)
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and should_convert_module(path, skip) is quantised
    }


@pytest.mark.parametrize(
    ("config", "kind", "text", "others"),
    [
        (
            transformers.IdeficsConfig,
            transformers.IdeficsForVisionText2Text,
            {"model.layers", "model.gated_cross_attn_layers"},
            {"model.vision_model", "lm_head"},
        ),
        (
            transformers.BlipConfig,
            transformers.BlipForConditionalGeneration,
            {"text_decoder.bert", "text_decoder.cls.predictions.transform"},
            {"vision_model", "text_decoder.cls.predictions.decoder"},
        ),
        (
            transformers.GitConfig,
            transformers.GitForCausalLM,
            {"git.encoder"},
            {"git.image_encoder", "git.visual_projection", "output"},
        ),
        (
            transformers.Pix2StructConfig,
            transformers.Pix2StructForConditionalGeneration,
            {"decoder.layer"},
            {"encoder", "decoder.lm_head"},
        ),
        (
            transformers.VisionEncoderDecoderConfig,
            transformers.VisionEncoderDecoderModel,
            {"decoder.bert", "decoder.cls.predictions.transform"},
            {"encoder", "decoder.cls.predictions.decoder"},
        ),
        (
            transformers.Blip2Config,
            transformers.Blip2ForConditionalGeneration,
            {"language_model.model"},
            {"vision_model", "qformer", "language_projection", "language_model.lm_head"},
        ),
        (
            transformers.T5Gemma2Config,
            transformers.T5Gemma2ForConditionalGeneration,
            {"model.encoder.text_model", "model.decoder"},
            {"model.encoder.vision_tower", "lm_head"},
        ),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_only_the_language_model_is_quantised(
    config: Callable[[], Any], kind: Any, text: set[str], others: set[str]
) -> None:
    """Also in families with other names, whose tower is next to the language model's layers."""
    own = config()
    if config is transformers.VisionEncoderDecoderConfig:
        decoder = transformers.BertConfig(is_decoder=True, add_cross_attention=True)
        own = config.from_encoder_decoder_configs(transformers.ViTConfig(), decoder)
    with torch.device("meta"):
        model = kind(own)

    def under(path: str, places: set[str]) -> bool:
        return any(path == place or path.startswith(place + ".") for place in places)

    quantised, dense = parts(model, quantised=True), parts(model, quantised=False)
    assert all(under(path, text) for path in quantised), quantised
    assert all(under(path, others) for path in dense), dense
    assert all(any(under(path, {place}) for path in quantised) for place in text)


def test_transposed_layers_that_a_cpu_cannot_pack_stay_dense() -> None:
    config = transformers.GPT2Config(n_embd=96, n_layer=1, n_head=4, n_inner=128, vocab_size=100)
    with torch.device("meta"):
        model = transformers.GPT2LMHeadModel(config)
    skip = modules_to_skip(model, bits=4, device=torch.device("cpu"))
    assert not should_convert_module("transformer.h.0.mlp.c_fc", skip), "96 inputs"
    assert should_convert_module("transformer.h.0.mlp.c_proj", skip), "128 inputs"


# --- checkpoints that come quantised --------------------------------------------------------------

SKIP_LISTS = [
    ["vision_tower", "multi_modal_projector", "lm_head"],
    ["model.vision_tower", "model.multi_modal_projector", "lm_head"],
    # As the parts were called, and where they lay, before transformers 4.52.
    ["vision_tower.vision_model", "multi_modal_projector.linear_1", "language_model.lm_head"],
    # Parts of names, as rules before that had it.
    ["vision", "projector", "head"],
    # Names that say less, or more, than what was done.
    ["lm_head"],
    ["vision_tower", "multi_modal_projector", "lm_head", "mlp"],
    [],
    None,
]


@each_width
@pytest.mark.parametrize("names", SKIP_LISTS, ids=str)
def test_the_files_decide_which_layers_are_quantised(
    names: list[str] | None, bits: int, tmp_path: Path
) -> None:
    original = saved(tmp_path / "dense", tiny.llava(), tiny.llava_processor())
    quantised = load(original, **in_few_bits(bits)).model
    folder = saved(tmp_path / "quantised", quantised, tiny.llava_processor())
    facts = json.loads((folder / "config.json").read_text())
    facts["quantization_config"]["llm_int8_skip_modules"] = names
    (folder / "config.json").write_text(json.dumps(facts))
    again = load(folder).model
    assert quantised_layers(again) == quantised_layers(quantised)
    ids = torch.tensor([[*tiny.prompts(1)[0], *[tiny.IMAGE] * 4]])
    pixels = torch.rand(1, 3, 28, 28, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        wanted, found = (m(input_ids=ids, pixel_values=pixels).logits for m in (quantised, again))
    torch.testing.assert_close(found, wanted)


def test_experts_that_were_quantised_one_by_one_are_refused(tmp_path: Path) -> None:
    model = text_model("mixtral")
    folder = saved(tmp_path, load(saved(tmp_path / "dense", model), load_8bit=True).model)
    file = folder / "model.safetensors"
    state = {}
    for name, tensor in load_file(file).items():
        state[name] = tensor
        if ".experts." in name and name.endswith(".weight"):
            scale = tensor.abs().amax(-1).float()
            state[name] = (tensor * 127 / scale[:, None]).round().to(torch.int8)
            state[name.removesuffix("weight") + "SCB"] = scale
    save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(EngineLoadError, match=r"experts.0.w1, \.\.\.\): quantise the original"):
        load(folder)


def test_4_bit_weights_saved_after_a_forward_with_avx512_are_refused(tmp_path: Path) -> None:
    """`findings/nf4_saved_after_a_forward.sh`: the scales come back in another order."""
    dense = saved(tmp_path / "dense", tiny.llama())
    plain = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = transformers.AutoModelForCausalLM.from_pretrained(dense, quantization_config=plain)
    folder = saved(tmp_path / "quantised", model)
    load(folder)
    file = folder / "model.safetensors"
    state = load_file(file)
    for name in [name for name in state if name.endswith(".absmax")]:
        rows = state[name.removesuffix(".absmax")].numel() * 2 // tiny.llama().config.hidden_size
        state[name] = state[name].reshape(rows, -1).T.contiguous().bfloat16()
    save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(EngineLoadError, match=r"scales in another order.*--load-4bit"):
        load(folder)


@pytest.mark.parametrize(
    ("names", "path", "skipped"),
    [
        (["vision_tower"], "model.vision_tower.layers.0.fc1", True),
        (["visual.merger"], "model.visual.merger.mlp.0", True),
        (["model.visual"], "model.visual.blocks.0.attn.qkv", True),
        (["layers.1"], "model.layers.1.mlp.up_proj", True),
        (["layers.1"], "model.layers.11.mlp.up_proj", False),
        (["mlp.gate"], "model.layers.0.mlp.gate", True),
        (["mlp.gate"], "model.layers.0.mlp.gate_proj", False),
        (["gate"], "model.layers.0.mlp.shared_expert_gate", True),
        ([r".*\.mlp\..*"], "model.layers.0.mlp.up_proj", True),
        ([r".*\.mlp\..*"], "model.layers.0.self_attn.q_proj", False),
    ],
)
@pytest.mark.parametrize("key", ["llm_int8_skip_modules", "modules_to_not_convert"])
def test_skip_names_mean_what_they_did_and_what_transformers_has_them_mean(
    names: list[str], path: str, skipped: bool, key: str
) -> None:
    config = normalise_skip_names({key: names})
    assert should_convert_module(path, config[key]) is not skipped
    if not should_convert_module(path, names):
        assert skipped
