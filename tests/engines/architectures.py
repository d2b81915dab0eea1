"""Tiny random models of many architectures, for the conformance tests."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from tests.engines.tiny import (
    BOS,
    CHAT_TEMPLATE,
    END,
    PAD,
    SPECIAL,
    VOCABULARY,
    tokenizer,
)
from worker.engines.common.processors import images_only, processor_class

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


# --- vision-language models -----------------------------------------------------------------------

_MARKS = {
    "image_token": "<image>",
    "video_token": "<|video_pad|>",
    "boi_token": "<start_of_image>",
    "eoi_token": "<end_of_image>",
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<image>",
    "vision_start_token": "<|vision_start|>",
    "vision_end_token": "<|vision_end|>",
    "fake_image_token": "<fake_token_around_image>",
    "global_image_token": "<global-img>",
    "end_of_utterance_token": "<end_of_utterance>",
}
_WORDS = ["<image_soft_token>", "<image_newline>"]
_WORDS += [f"<row_{row + 1}_col_{column + 1}>" for row in range(4) for column in range(4)]
VISION_VOCABULARY = 608


def _vision_tokenizer(image_token: str = "<image>", template: str = "{image}") -> Any:
    """The tiny tokenizer with every mark that processors ask for."""
    words = sorted({*_MARKS.values(), *_WORDS, image_token} - {"<image>"})
    result = copy.deepcopy(tokenizer())
    result.add_special_tokens(
        {"extra_special_tokens": [*SPECIAL[3:], *words]}, replace_extra_special_tokens=False
    )
    for name, word in (_MARKS | {"image_token": image_token}).items():
        setattr(result, name, word)
        setattr(result, f"{name}_id", result.convert_tokens_to_ids(word))
    mark = template.replace("{image}", image_token)
    result.chat_template = CHAT_TEMPLATE.replace("'<image>'", repr(mark))
    assert len(result) <= VISION_VOCABULARY
    return result


def _text_config(kind: str = "llama", **own: Any) -> dict[str, Any]:
    return _COMMON | {"model_type": kind, "vocab_size": VISION_VOCABULARY} | own


_CLIP = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
    "initializer_range": 0.2,
}


def _processor(name: str, *parts: Any, **own: Any) -> Any:
    """A processor that could also take videos, as the worker loads it without torchvision."""
    return images_only(processor_class(name))(*parts, **own)


def _square(size: int) -> dict[str, Any]:
    return {"size": {"height": size, "width": size}}


def _llava() -> tuple[Any, Any]:
    import transformers as t

    tok = _vision_tokenizer()
    config = t.LlavaConfig(
        vision_config=_CLIP | {"model_type": "clip_vision_model"},
        text_config=_text_config(),
        image_token_id=tok.image_token_id,
        image_seq_length=4,
    )
    images = t.CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    processor = t.LlavaProcessor(
        images,
        tok,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=tok.chat_template,
    )
    return config, processor


def _llava_next() -> tuple[Any, Any]:
    import transformers as t

    tok = _vision_tokenizer()
    grid = [[28, 56], [56, 28], [56, 56]]
    config = t.LlavaNextConfig(
        vision_config=_CLIP | {"model_type": "clip_vision_model"},
        text_config=_text_config(),
        image_token_id=tok.image_token_id,
        image_grid_pinpoints=grid,
        image_seq_length=4,
    )
    images = t.LlavaNextImageProcessor(
        size={"shortest_edge": 28},
        crop_size={"height": 28, "width": 28},
        image_grid_pinpoints=grid,
    )
    processor = t.LlavaNextProcessor(
        images,
        tok,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=tok.chat_template,
    )
    return config, processor


def _llava_onevision() -> tuple[Any, Any]:
    import transformers as t

    tok = _vision_tokenizer()
    grid = [[28, 28], [28, 56], [56, 28], [56, 56]]
    vision = _CLIP | {"model_type": "siglip_vision_model", "vision_use_head": False}
    config = t.LlavaOnevisionConfig(
        vision_config=vision,
        text_config=_text_config("qwen2"),
        image_token_id=tok.image_token_id,
        video_token_id=tok.video_token_id,
        image_grid_pinpoints=grid,
        vision_feature_layer=-1,
    )
    images = t.LlavaOnevisionImageProcessor(**_square(28), image_grid_pinpoints=grid)
    processor = _processor(
        "LlavaOnevisionProcessor",
        images,
        tok,
        num_image_tokens=4,
        vision_feature_select_strategy="full",
        chat_template=tok.chat_template,
    )
    return config, processor


def _qwen_vl(kind: str) -> tuple[Any, Any]:
    import transformers as t

    tok = _vision_tokenizer("<|image_pad|>", "<|vision_start|>{image}<|vision_end|>")
    vision: dict[str, Any] = {
        "depth": 2,
        "num_heads": 4,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "initializer_range": 0.2,
    }
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
    text = _text_config(rope_parameters=rope)
    text.pop("model_type")
    if kind == "qwen2_vl":
        names = ("Qwen2VLConfig", "Qwen2VLProcessor")
        vision |= {"embed_dim": 32, "hidden_size": 64}
    elif kind == "qwen2_5_vl":
        names = ("Qwen2_5_VLConfig", "Qwen2_5_VLProcessor")
        vision |= {
            "hidden_size": 32,
            "intermediate_size": 64,
            "out_hidden_size": 64,
            "window_size": 56,
            "fullatt_block_indexes": [1],
        }
    else:
        names = ("Qwen3VLConfig", "Qwen3VLProcessor")
        text["head_dim"] = 16
        text["rope_parameters"] = rope | {"mrope_interleaved": True}
        vision |= {
            "hidden_size": 32,
            "intermediate_size": 64,
            "out_hidden_size": 64,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0, 1],
        }
    config = getattr(t, names[0])(
        vision_config=vision,
        text_config=text,
        image_token_id=tok.image_token_id,
        video_token_id=tok.video_token_id,
        vision_start_token_id=tok.vision_start_token_id,
        vision_end_token_id=tok.vision_end_token_id,
    )
    images = t.Qwen2VLImageProcessor(
        patch_size=14,
        merge_size=2,
        temporal_patch_size=2,
        size={"shortest_edge": 28 * 28, "longest_edge": 28 * 28 * 9},
    )
    processor = _processor(names[1], images, tok, chat_template=tok.chat_template)
    return config, processor


def _gemma3() -> tuple[Any, Any]:
    import transformers as t

    tok = _vision_tokenizer("<image_soft_token>")
    tok.chat_template = CHAT_TEMPLATE.replace("'<image>'", repr("<start_of_image>"))
    vision = _CLIP | {"model_type": "siglip_vision_model", "vision_use_head": False}
    config = t.Gemma3Config(
        vision_config=vision,
        text_config=_text_config(
            "gemma3_text",
            head_dim=16,
            sliding_window=16,
            layer_types=["sliding_attention", "full_attention"],
            query_pre_attn_scalar=16,
        ),
        mm_tokens_per_image=4,
        image_token_id=tok.image_token_id,
        boi_token_index=tok.boi_token_id,
        eoi_token_index=tok.eoi_token_id,
    )
    images = t.Gemma3ImageProcessor(**_square(28))
    processor = t.Gemma3Processor(images, tok, chat_template=tok.chat_template, image_seq_length=4)
    return config, processor


def _internvl() -> tuple[Any, Any]:
    import transformers as t

    tok = _vision_tokenizer()
    vision = _CLIP | {"image_size": [28, 28], "patch_size": [7, 7], "use_mean_pooling": True}
    config = t.InternVLConfig(
        vision_config=vision,
        text_config=_text_config("qwen2"),
        image_token_id=tok.image_token_id,
        image_seq_length=4,
        downsample_ratio=0.5,
    )
    images = t.GotOcr2ImageProcessor(**_square(28), crop_to_patches=True, max_patches=4)
    processor = _processor(
        "InternVLProcessor", images, tok, image_seq_length=4, chat_template=tok.chat_template
    )
    return config, processor


def _idefics3() -> tuple[Any, Any]:
    import transformers as t

    tok = _vision_tokenizer()
    vision = {**_CLIP, "image_size": 28, "patch_size": 7}
    config = t.Idefics3Config(
        vision_config=vision,
        text_config=_text_config(),
        image_token_id=tok.image_token_id,
        scale_factor=2,
        pad_token_id=PAD,
    )
    images = t.Idefics3ImageProcessor(
        size={"longest_edge": 56}, max_image_size={"longest_edge": 28}
    )
    processor = t.Idefics3Processor(images, tok, image_seq_len=4, chat_template=tok.chat_template)
    return config, processor


def _paligemma() -> tuple[Any, Any]:
    import transformers as t

    tok = _vision_tokenizer()
    vision = _CLIP | {"model_type": "siglip_vision_model", "vision_use_head": False}
    config = t.PaliGemmaConfig(
        vision_config=vision | {"projection_dim": 64},
        text_config=_text_config("gemma", head_dim=16),
        image_token_id=tok.image_token_id,
        projection_dim=64,
    )
    images = t.SiglipImageProcessor(**_square(28))
    images.image_seq_length = 4
    processor = t.PaliGemmaProcessor(images, tok, chat_template=tok.chat_template)
    return config, processor


VISION: dict[str, Callable[[], tuple[Any, Any]]] = {
    "llava": _llava,
    "llava_next": _llava_next,
    "llava_onevision": _llava_onevision,
    "qwen2_vl": lambda: _qwen_vl("qwen2_vl"),
    "qwen2_5_vl": lambda: _qwen_vl("qwen2_5_vl"),
    "qwen3_vl": lambda: _qwen_vl("qwen3_vl"),
    "gemma3": _gemma3,
    "internvl": _internvl,
    "idefics3": _idefics3,
    "paligemma": _paligemma,
}


def vision_model(name: str, seed: int = 0) -> tuple[Any, Any]:
    """A tiny random vision-language model and its processor."""
    from transformers import AutoModelForImageTextToText

    config, processor = VISION[name]()
    # Tied to the embeddings, random logits repeat the last token for ever.
    config.tie_word_embeddings = config.get_text_config().tie_word_embeddings = False
    torch.manual_seed(seed)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1 and float(parameter.std()) < 0.1:
                parameter.normal_(0.0, 0.15)
    model.generation_config.eos_token_id = END
    return model, processor
