#!/usr/bin/env bash
# transformers' generate() writes other tokens with a cache that it is given, where `use_cache` is off.
#
# Versions: transformers 5.24.0, torch 2.13.0, Python 3.11.
#
# Behaviour: a model whose configuration says `use_cache: false`, as MPT's does by default and as checkpoints
# do that were saved after training with gradient checkpointing, is asked for a greedy answer with a new
# `DynamicCache` (to read keys and values afterwards, or to go on from them). Every step computes the whole text
# again, and yet stores it in the cache behind what is there already: from the second token on, attention sees the
# text several times over, at the wrong positions. The answer is another one in float32, without an error or a
# warning, and the cache that comes back holds 222 tokens of a text of 25. One would expect the cache to be used,
# to be left alone, or the contradiction to be refused. With `use_cache=True` beside it all is well.
#
# Output seen:
#   llama: without a cache [85, 464, 202, 173, 391, 210, 112, 44, 508, 94, 468, 177], given one [85, 133, 299, 19, 405, 184, 100, 295, 107, 170, 434, 144], 222 tokens in it
#   gpt2: without a cache [133, 156, 499, 216, 78, 32, 49, 223, 70, 273, 172, 425], given one [133, 156, 262, 383, 383, 352, 54, 246, 246, 366, 501, 182], 222 tokens in it
#   other answers in silence: True
#
# Exits 0 while the behaviour is as described, 1 when it changed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q "torch==2.13.0" "transformers==5.24.0"
HF_HUB_OFFLINE=1 "$work/venv/bin/python" -W error::UserWarning - <<'PYTHON'
import sys

import torch
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
models = {
    "llama": LlamaForCausalLM(
        LlamaConfig(
            vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
            num_attention_heads=4, initializer_range=0.2, use_cache=False,
        )
    ),
    "gpt2": GPT2LMHeadModel(
        GPT2Config(
            vocab_size=512, n_embd=64, n_layer=2, n_head=4, initializer_range=0.2,
            bos_token_id=1, eos_token_id=2, use_cache=False,
        )
    ),
}
prompt = torch.arange(100, 113)[None]


def answer(model, **more):
    tokens = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=12, do_sample=False,
        eos_token_id=511, pad_token_id=0, **more,
    )
    return tokens[0, prompt.shape[1] :].tolist()


found = []
for name, model in models.items():
    model.eval()
    cache = DynamicCache()
    alone, given = answer(model), answer(model, cache=cache)
    right = answer(model, cache=DynamicCache(), use_cache=True) == alone
    held = cache.get_seq_length()
    print(f"{name}: without a cache {alone}, given one {given}, {held} tokens in it")
    found.append(right and given != alone and given[0] == alone[0] and held > prompt.shape[1] + 12)
print(f"other answers in silence: {all(found)}")
sys.exit(not all(found))
PYTHON
