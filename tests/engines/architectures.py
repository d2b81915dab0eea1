"""Tiny random models of many architectures, for the conformance tests."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from tests.engines.tiny import BOS, END, PAD, VOCABULARY

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": BOS,
    "eos_token_id": END,
    "pad_token_id": PAD,
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
}
_WINDOW = {"sliding_window": 16}
_HEAD = {"head_dim": 16}
_MIXED = {"layer_types": ["sliding_attention", "full_attention"]}
_EXPERTS = {
    "num_local_experts": 4,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
}

#: Architectures whose sequences share a batch, and what differs from the common configuration.
BATCHED: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": _WINDOW | _HEAD,
    "qwen2": {},
    "qwen3": _HEAD,
    "qwen2_moe": _EXPERTS | {"shared_expert_intermediate_size": 48},
    "qwen3_moe": _HEAD | _EXPERTS,
    "mixtral": _EXPERTS,
    "gemma": _HEAD,
    "gemma2": _HEAD | _WINDOW | _MIXED | {"query_pre_attn_scalar": 16},
    "gemma3_text": _HEAD | _WINDOW | _MIXED | {"query_pre_attn_scalar": 16},
    "phi": {},
    "phi3": {},
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512, "n_inner": 96},
    "gpt_neox": {},
    "gptj": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512, "rotary_dim": 8},
    "gpt_neo": {
        "num_layers": 2,
        "num_heads": 4,
        "attention_types": [[["global"], 2]],
    },
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64},
    "mpt": {"d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 512},
    "stablelm": {},
    "starcoder2": _WINDOW,
    "olmo": {},
    "olmo2": {},
    "cohere": {},
    "cohere2": _WINDOW | _MIXED | _HEAD,
    "glm": _HEAD,
    "glm4": _HEAD,
    "granite": {},
    "nemotron": {},
    "exaone4": _WINDOW | _MIXED | _HEAD,
    "smollm3": {},
    "deepseek_v3": {
        "num_key_value_heads": 4,
        "q_lora_rank": 24,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 16,
        "n_routed_experts": 4,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
    }
    | _EXPERTS,
    "gpt_oss": _WINDOW | _MIXED | _HEAD | _EXPERTS,
    "helium": _HEAD,
    "ernie4_5": _HEAD,
    "seed_oss": _HEAD,
    "hunyuan_v1_dense": _HEAD,
}

#: Architectures that slots cannot hold: they take turns on `generate()`.
ALONE: dict[str, dict[str, Any]] = {
    "bloom": {"n_layer": 2, "n_head": 4},
    "mamba": {"state_size": 8, "intermediate_size": 128},
    "qwen3_next": _HEAD
    | _EXPERTS
    | {
        "layer_types": ["linear_attention", "full_attention"],
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
        "shared_expert_intermediate_size": 48,
    },
    "t5": {
        "d_model": 64,
        "d_kv": 16,
        "d_ff": 96,
        "num_layers": 2,
        "num_heads": 4,
        "decoder_start_token_id": PAD,
        "initializer_factor": 3.0,
    },
    "bart": {
        "d_model": 64,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_ffn_dim": 96,
        "decoder_ffn_dim": 96,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "decoder_start_token_id": END,
        "forced_bos_token_id": None,
        "forced_eos_token_id": None,
        "init_std": 0.2,
    },
}


def text_model(name: str, *, attention: str | None = None, seed: int = 0) -> Any:
    """A tiny random model of an architecture."""
    own = BATCHED[name] if name in BATCHED else ALONE[name]
    torch.manual_seed(seed)
    common = dict(_COMMON)
    if "d_model" in own or "n_embd" in own:
        # Their configurations alias these names.
        for alias in ("hidden_size", "num_hidden_layers", "num_attention_heads"):
            common.pop(alias)
    config = AutoConfig.for_model(name, **(common | own))
    factory = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    kwargs = {"attn_implementation": attention} if attention else {}
    model = factory.from_config(config, dtype=torch.float32, **kwargs).eval()
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            # Some models start with zeros or ignore initializer_range; logits must differ.
            if parameter.dim() > 1 and float(parameter.std()) < 0.05 and "A_log" not in path:
                parameter.normal_(0.0, 0.15)
    return model
