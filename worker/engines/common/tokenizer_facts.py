"""What a tokenizer tells about itself: its class, special tokens and chat template, and the tokens
between which a model fills in a middle. Must never tell a path of the worker's machine.
"""

from __future__ import annotations

from typing import Any, Final

from worker.engines.common.facts import ModelFacts
from worker.engines.common.template import template_source

__all__ = ["infill_tokens", "tokenizer_facts"]

_SPECIAL: Final = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
#: Of `tokenizer_config.json`, where the tokenizer has them.
_SETTINGS: Final = (
    "add_bos_token",
    "add_eos_token",
    "add_prefix_space",
    "clean_up_tokenization_spaces",
    "padding_side",
    "truncation_side",
)
#: Tokenizers without a limit say 10^30.
_MOST_TOKENS: Final = 1 << 53

#: The first that the vocabulary has counts. The names are those of the families: Qwen and others,
#: StarCoder, CodeLlama, DeepSeek, CodeGemma, GLM and Granite.
_INFILL: Final = {
    "prefix": (
        *("<|fim_prefix|>", "<fim-prefix>", "<fim_prefix>", "<PRE>", "▁<PRE>"),
        *("<｜fim▁begin｜>", "<|code_prefix|>"),
    ),
    "suffix": (
        *("<|fim_suffix|>", "<fim-suffix>", "<fim_suffix>", "<SUF>", "▁<SUF>"),
        *("<｜fim▁hole｜>", "<|code_suffix|>"),
    ),
    "middle": (
        *("<|fim_middle|>", "<fim-middle>", "<fim_middle>", "<MID>", "▁<MID>"),
        *("<｜fim▁end｜>", "<|code_middle|>"),
    ),
    "pad": ("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>"),
    "end": ("<EOT>", "▁<EOT>"),
    "repository": ("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"),
    "file": ("<|file_sep|>", "<|file_separator|>", "<file_sep>"),
}


def tokenizer_facts(facts: ModelFacts) -> dict[str, Any]:
    """What vLLM's `/tokenizer_info` tells; only what this tokenizer says is in it."""
    tokenizer = facts.tokenizer
    told: dict[str, Any] = {"tokenizer_class": type(tokenizer).__name__}
    for name in _SPECIAL:
        if (token := getattr(tokenizer, f"{name}_token", None)) is not None:
            told[f"{name}_token"] = str(token)
    told["additional_special_tokens"] = [
        str(token)
        for token in getattr(tokenizer, "all_special_tokens", ())
        if str(token) not in told.values()
    ]
    added = getattr(tokenizer, "added_tokens_decoder", {})
    if added:
        told["added_tokens_decoder"] = {str(id_): str(token) for id_, token in added.items()}
    for name in _SETTINGS:
        value = getattr(tokenizer, name, None)
        if isinstance(value, bool | str):
            told[name] = value
    limit = getattr(tokenizer, "model_max_length", None)
    if isinstance(limit, int) and 0 < limit < _MOST_TOKENS:
        told["model_max_length"] = limit
    source = template_source(tokenizer, facts.processor)
    if source:
        told["chat_template"] = source
    return told


def infill_tokens(tokenizer: Any) -> dict[str, Any]:
    """Ids of the tokens for filling in a middle by role, and those that `begins` every prompt;
    empty for a model that has no form for it."""
    found: dict[str, Any] = {}
    for role, names in _INFILL.items():
        for name in names:
            if (id_ := _id_of(tokenizer, name)) is not None:
                found[role] = id_
                break
    if not {"prefix", "suffix", "middle"} <= set(found):
        return {}
    return {**found, "begins": list(tokenizer("", add_special_tokens=True)["input_ids"])}


def _id_of(tokenizer: Any, name: str) -> int | None:
    """The id of a token that the vocabulary has as one."""
    by_name = getattr(tokenizer, "convert_tokens_to_ids", None)
    if by_name is not None:
        id_ = by_name(name)
        # A name that it does not know may be the unknown token's.
        return id_ if id_ is not None and tokenizer.convert_ids_to_tokens(id_) == name else None
    ids = tokenizer(name, add_special_tokens=False)["input_ids"]
    return int(ids[0]) if len(ids) == 1 else None
