"""Writes a tiny Llama of transformers as a GGUF file, the way llama.cpp's conversion does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

__all__ = ["write_gguf"]


def _rotary(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows in llama.cpp's order: it rotates neighbours, transformers rotates halves."""
    rows, columns = weight.shape
    return weight.view(heads, 2, rows // heads // 2, columns).transpose(1, 2).reshape(rows, columns)


def write_gguf(model: Any, tokenizer: Any, path: Path) -> Path:
    """`model` is a Llama, `tokenizer` a byte-level BPE one."""
    import gguf

    config, weights = model.config, model.state_dict()
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    _write_tokenizer(writer, gguf, tokenizer, config)

    def put(name: str, weight: torch.Tensor) -> None:
        writer.add_tensor(name, np.ascontiguousarray(weight.float().numpy()))

    put("token_embd.weight", weights["model.embed_tokens.weight"])
    put("output_norm.weight", weights["model.norm.weight"])
    put("output.weight", weights["lm_head.weight"])
    for layer in range(config.num_hidden_layers):
        source, target = f"model.layers.{layer}.", f"blk.{layer}."
        query = weights[source + "self_attn.q_proj.weight"]
        key = weights[source + "self_attn.k_proj.weight"]
        put(target + "attn_q.weight", _rotary(query, config.num_attention_heads))
        put(target + "attn_k.weight", _rotary(key, config.num_key_value_heads))
        for ours, theirs in {
            "attn_v": "self_attn.v_proj",
            "attn_output": "self_attn.o_proj",
            "attn_norm": "input_layernorm",
            "ffn_norm": "post_attention_layernorm",
            "ffn_gate": "mlp.gate_proj",
            "ffn_up": "mlp.up_proj",
            "ffn_down": "mlp.down_proj",
        }.items():
            put(f"{target}{ours}.weight", weights[f"{source}{theirs}.weight"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _write_tokenizer(writer: Any, gguf: Any, tokenizer: Any, config: Any) -> None:
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    special = set(tokenizer.all_special_ids)
    tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    missing = range(len(tokens), config.vocab_size)
    kinds = [
        gguf.TokenType.CONTROL if i in special else gguf.TokenType.NORMAL
        for i in range(len(tokens))
    ]
    # The model has more outputs than the tokenizer has tokens; as control tokens they have no text.
    tokens += [f"[PAD{i}]" for i in missing]
    kinds += [gguf.TokenType.CONTROL for _ in missing]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([" ".join(pair) for pair in described["model"]["merges"]])
    writer.add_bos_token_id(config.bos_token_id)
    writer.add_eos_token_id(config.eos_token_id)
    writer.add_add_bos_token(False)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)
