"""Checkpoints: a weight that is missing is never made up, and the class that loads a folder is the
one of its architecture, remote code included."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from broker.protocol.messages import Kind, Request, new_id
from tests.engines import tiny
from tests.engines.architectures import text_model
from tests.engines.tiny import load
from worker.engines.base import EngineLoadError, Job
from worker.engines.transformers.loading.checkpoint import refuse_left_out
from worker.engines.transformers.loading.classes import model_class


def save(path: Path, model: Any, processor: Any = None) -> Path:
    model.save_pretrained(path)
    (processor or tiny.tokenizer()).save_pretrained(path)
    return path


Weights = dict[str, torch.Tensor]


def rewrite(file: Path, change: Callable[[Weights], Weights]) -> None:
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


def without(part: str) -> Callable[[Weights], Weights]:
    def change(weights: Weights) -> Weights:
        kept = {name: tensor for name, tensor in weights.items() if part not in name}
        assert len(kept) < len(weights), f"no weight is called {part}"
        return kept

    return change


def generated(model: Any, ids: list[int], count: int = 12) -> list[int]:
    return tiny.generated(model, {"input_ids": torch.tensor([ids])}, count, ())


# --- what is missing ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "part",
    [
        "layers.1.self_attn.o_proj",
        "layers.0.mlp",
        "model.norm",
        "embed_tokens",
        "lm_head",
    ],
)
def test_a_checkpoint_without_a_weight_of_its_language_model_is_refused(
    part: str, tmp_path: Path
) -> None:
    path = save(tmp_path / "m", tiny.llama())
    rewrite(path / "model.safetensors", without(part))
    with pytest.raises(EngineLoadError, match=part):
        load(path)


@pytest.mark.parametrize(
    "part", ["multi_modal_projector.linear_2", "vision_tower", "layers.1.mlp.fc1"]
)
def test_a_checkpoint_without_a_part_that_sees_is_refused(part: str, tmp_path: Path) -> None:
    path = save(tmp_path / "m", tiny.llava(), tiny.llava_processor())
    rewrite(path / "model.safetensors", without(part))
    with pytest.raises(EngineLoadError, match=r"lacks \d+ of the model's weights"):
        load(path)


def test_a_renamed_layer_is_a_missing_layer(tmp_path: Path) -> None:
    path = save(tmp_path / "m", tiny.llama())
    rewrite(
        path / "model.safetensors",
        lambda weights: {k.replace("layers.1.", "blocks.1."): v for k, v in weights.items()},
    )
    with pytest.raises(EngineLoadError, match=r"layers\.1\."):
        load(path)


def test_an_index_that_forgets_a_shard_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m"
    tiny.llama().save_pretrained(path, max_shard_size="100KB")
    tiny.tokenizer().save_pretrained(path)
    index = path / "model.safetensors.index.json"
    facts = json.loads(index.read_text())
    last = max(facts["weight_map"].values())
    facts["weight_map"] = {k: v for k, v in facts["weight_map"].items() if v != last}
    index.write_text(json.dumps(facts))
    with pytest.raises(EngineLoadError, match="lacks"):
        load(path)


@pytest.mark.parametrize("part", ["bias", "weight_scale"])
def test_weights_of_a_layer_that_its_configuration_leaves_out_are_refused(
    part: str, tmp_path: Path
) -> None:
    path = save(tmp_path / "m", tiny.llama())
    name = f"model.layers.0.self_attn.q_proj.{part}"
    rewrite(path / "model.safetensors", lambda weights: weights | {name: torch.ones(64)})
    with pytest.raises(EngineLoadError, match=part):
        load(path)


def test_weights_of_a_part_that_the_model_does_not_have_are_ignored(tmp_path: Path) -> None:
    path = save(tmp_path / "m", tiny.llama())
    more = {"score.weight": torch.ones(2, 64), "model.rotary_emb.inv_freq": torch.ones(8)}
    rewrite(path / "model.safetensors", lambda weights: weights | more)
    engine = load(path)
    try:
        ids = tiny.prompts(1, low=20)[0]
        answer = tiny.run(engine, [tiny.ids_job(ids, "m", max_tokens=12)])[0]
        assert answer.token_ids == generated(tiny.llama(), ids)
    finally:
        engine.close()


def test_a_buffer_that_older_releases_stored_may_be_in_the_file() -> None:
    model = tiny.llava()
    refuse_left_out(model, ["model.vision_tower.embeddings.position_ids"], "m")
    with pytest.raises(EngineLoadError, match=r"embeddings\.bias"):
        refuse_left_out(model, ["model.vision_tower.embeddings.bias"], "m")


def test_a_file_of_weights_that_is_cut_is_refused_in_one_line(tmp_path: Path) -> None:
    path = save(tmp_path / "m", tiny.llama())
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-500])
    with pytest.raises(EngineLoadError, match="damaged or incomplete"):
        load(path)


def test_a_learned_buffer_is_a_weight(tmp_path: Path) -> None:
    path = save(tmp_path / "m", text_model("deepseek_v3"))
    rewrite(path / "model.safetensors", without("e_score_correction_bias"))
    with pytest.raises(EngineLoadError, match="e_score_correction_bias"):
        load(path)


def test_a_tied_head_may_be_missing(tmp_path: Path) -> None:
    model = tiny.llama()
    model.config.tie_word_embeddings = True
    model.lm_head.weight = model.model.embed_tokens.weight
    path = save(tmp_path / "m", model)
    assert "lm_head.weight" not in load_file(path / "model.safetensors")
    ids = tiny.prompts(1)[0]
    engine = load(path, model_names=(("m",),))
    try:
        answer = tiny.run(engine, [tiny.ids_job(ids, model="m")])[0]
        assert answer.token_ids == generated(model, ids)
    finally:
        engine.close()


# --- the class of an architecture -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("model_type", "architecture", "auto", "images"),
    [
        ("gpt2", "GPT2LMHeadModel", "AutoModelForCausalLM", False),
        ("gpt2", "GPT2DoubleHeadsModel", "AutoModelForCausalLM", False),
        ("gpt2", "GPT2Model", "AutoModel", False),
        ("openai-gpt", "OpenAIGPTLMHeadModel", "AutoModelForCausalLM", False),
        ("xlnet", "XLNetLMHeadModel", "AutoModelForCausalLM", False),
        ("ctrl", "CTRLLMHeadModel", "AutoModelForCausalLM", False),
        ("llama", "LlamaForCausalLM", "AutoModelForCausalLM", False),
        ("llama", "LlamaModel", "AutoModel", False),
        ("qwen3", "Qwen3BiModel", "AutoModel", False),
        ("bert", "BertForMaskedLM", "AutoModel", False),
        ("bert", "BertForPreTraining", "AutoModel", False),
        ("bert", "BertLMHeadModel", "AutoModelForCausalLM", False),
        ("flaubert", "FlaubertWithLMHeadModel", "AutoModel", False),
        ("t5", "T5ForConditionalGeneration", "AutoModelForSeq2SeqLM", False),
        ("t5", "T5Model", "AutoModel", False),
        ("t5", "T5EncoderModel", "AutoModelForTextEncoding", False),
        ("marian", "MarianMTModel", "AutoModelForSeq2SeqLM", False),
        ("bart", "BartModel", "AutoModel", False),
        ("llava", "LlavaForConditionalGeneration", "AutoModelForImageTextToText", True),
        ("gemma3", "Gemma3ForConditionalGeneration", "AutoModelForImageTextToText", True),
        ("gemma3_text", "Gemma3ForCausalLM", "AutoModelForCausalLM", False),
        # One class writes text and takes images.
        ("fuyu", "FuyuForCausalLM", "AutoModelForImageTextToText", True),
        ("git", "GitForCausalLM", "AutoModelForImageTextToText", True),
    ],
)
def test_the_architecture_says_which_class_loads_it(
    model_type: str, architecture: str, auto: str, images: bool
) -> None:
    config = AutoConfig.for_model(model_type)
    config.architectures = [architecture]
    chosen = model_class(config, None, "m", trust_remote_code=False)
    assert (chosen.auto.__name__, chosen.takes_images) == (auto, images)


def test_a_head_whose_class_ends_in_model_writes_text(tmp_path: Path) -> None:
    model = text_model("gpt2")
    path = save(tmp_path / "m", model)
    assert json.loads((path / "config.json").read_text())["architectures"] == ["GPT2LMHeadModel"]
    ids = tiny.prompts(1)[0]
    engine = load(path, model_names=(("m",),))
    try:
        answer = tiny.run(engine, [tiny.ids_job(ids, model="m")])[0]
        assert answer.token_ids == generated(model, ids)
    finally:
        engine.close()


def embedded(path: Path, ids: list[int]) -> np.ndarray[Any, Any]:
    engine = load(path, model_names=(("m",),))
    try:
        request = Request(model="m", kind=Kind.EMBED, inputs=[ids], window=1)
        ended = tiny.run(engine, [Job(new_id(), request)])[0].ended
        assert ended is not None and ended.result is not None
        return np.frombuffer(ended.result["embeddings"][0], "<f4")
    finally:
        engine.close()


def test_an_encoder_alone_embeds_with_its_own_weights(tmp_path: Path) -> None:
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    model = T5EncoderModel(T5Config(vocab_size=tiny.VOCABULARY, **sizes)).eval()
    path = save(tmp_path / "m", model)
    ids = tiny.prompts(1)[0]
    with torch.inference_mode():
        states = model(torch.tensor([ids])).last_hidden_state[0].mean(0)
    wanted = torch.nn.functional.normalize(states, dim=-1).numpy()
    assert np.allclose(embedded(path, ids), wanted, atol=1e-5)


def test_a_masked_language_model_embeds_and_may_lack_the_pooler_that_nobody_reads(
    tmp_path: Path,
) -> None:
    from transformers import BertConfig, BertForMaskedLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    config = BertConfig(vocab_size=tiny.VOCABULARY, num_attention_heads=4, **sizes)
    model = BertForMaskedLM(config).eval()
    path = save(tmp_path / "m", model)
    ids = tiny.prompts(1)[0]
    with torch.inference_mode():
        states = model.bert(torch.tensor([ids])).last_hidden_state[0].mean(0)
    wanted = torch.nn.functional.normalize(states, dim=-1).numpy()
    assert np.allclose(embedded(path, ids), wanted, atol=1e-5)


# --- remote code ----------------------------------------------------------------------------------

CODE = """
from transformers import LlavaConfig, LlavaForConditionalGeneration

class OwnConfig(LlavaConfig):
    model_type = "own_llava"

class OwnModel(LlavaForConditionalGeneration):
    config_class = OwnConfig
"""


def remote_folder(path: Path, auto: str) -> Path:
    """A LLaVA whose classes are code in its folder."""
    model = tiny.llava()
    save(path, model, tiny.llava_processor())
    # With the names of its modules: transformers renames nothing for an unknown type.
    save_file(model.state_dict(), path / "model.safetensors", metadata={"format": "pt"})
    (path / "modeling_own.py").write_text(CODE)
    facts = json.loads((path / "config.json").read_text())
    facts |= {"model_type": "own_llava", "architectures": ["OwnModel"]}
    facts["auto_map"] = {"AutoConfig": "modeling_own.OwnConfig", auto: "modeling_own.OwnModel"}
    (path / "config.json").write_text(json.dumps(facts))
    return path


@pytest.mark.parametrize(
    "auto", ["AutoModelForImageTextToText", "AutoModelForVision2Seq", "AutoModelForCausalLM"]
)
def test_remote_code_with_a_processor_takes_images_whatever_it_is_registered_as(
    auto: str, tmp_path: Path
) -> None:
    path = remote_folder(tmp_path / auto, auto)
    image = tiny.image(3)
    wanted_engine = tiny.serve(tiny.llava(), processor=tiny.llava_processor())
    engine = load(path, model_names=(("m",),), trust_remote_code=True)
    try:
        wanted = tiny.run(wanted_engine, [tiny.chat_job("what is this", [image])])[0]
        assert engine.capabilities.models[0].images
        answer = tiny.run(engine, [tiny.chat_job("what is this", [image], model="m")])[0]
        assert answer.token_ids == wanted.token_ids != []
    finally:
        engine.close()
        wanted_engine.close()


def test_remote_code_whose_processor_cannot_be_used_is_served_without_images_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = remote_folder(tmp_path / "m", "AutoModelForCausalLM")
    facts = json.loads((path / "processor_config.json").read_text())
    (path / "processor_config.json").write_text(
        json.dumps(facts | {"processor_class": "ProcessorThatIsNotThere"})
    )
    with caplog.at_level(logging.WARNING):
        engine = load(path, model_names=(("m",),), trust_remote_code=True)
    try:
        assert not engine.capabilities.models[0].images
        assert "served without images" in caplog.text
        refused = tiny.run(engine, [tiny.chat_job("what", [tiny.image(3)], model="m")])[0]
        assert refused.failed is not None and "takes no images" in refused.failed.message
    finally:
        engine.close()


def test_remote_code_is_refused_unless_it_is_trusted(tmp_path: Path) -> None:
    path = remote_folder(tmp_path / "m", "AutoModelForImageTextToText")
    with pytest.raises(EngineLoadError, match="--trust-remote-code"):
        load(path)
