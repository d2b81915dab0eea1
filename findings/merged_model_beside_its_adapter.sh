#!/usr/bin/env bash
# transformers applies an adapter twice when the merged model is saved into the adapter's folder.
#
# Versions: transformers 5.24.0, peft 0.21.2, torch 2.13.0, Python 3.11.
#
# Behaviour: a folder with complete weights and a config.json is loaded by from_pretrained; if an
# adapter_config.json also lies in it, the adapter is put on top of these weights, in silence. That
# is what a folder looks like after merge_and_unload().save_pretrained(FOLDER_OF_THE_ADAPTER): the
# weights have the adapter in them already, and the loaded model computes with W + 2 B A. No warning,
# no missing key. One would expect the folder's own model, for every weight of it is there.
#
# Output seen:
#   merged model, before it is saved: differs from the base by 0.67
#   loaded again from the folder: differs from the merged model by 0.35
#   loaded again without adapter_config.json: differs from the merged model by 0.00
#   adapter applied again: True
#
# Exits 0 while the behaviour is as described, 1 when it changed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q "torch==2.13.0" "transformers==5.24.0" "peft==0.21.2"
cd "$work"
HF_HUB_OFFLINE=1 "$work/venv/bin/python" - <<'PYTHON'
import sys
import warnings
from pathlib import Path

warnings.filterwarnings("ignore")
import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

transformers.logging.set_verbosity_error()
torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4
)
LlamaForCausalLM(config).save_pretrained("base")
base = AutoModelForCausalLM.from_pretrained("base")
tuned = get_peft_model(
    AutoModelForCausalLM.from_pretrained("base"), LoraConfig(r=4, target_modules=["down_proj"])
)
with torch.no_grad():
    for name, parameter in tuned.named_parameters():
        if "lora_" in name:
            parameter.normal_(0.0, 0.3)
tuned.save_pretrained("tuned")
merged = tuned.merge_and_unload()
merged.save_pretrained("tuned")

ids = torch.arange(16)[None]


@torch.no_grad()
def apart(one, other):
    """Relative difference of the logits."""
    a, b = one(ids).logits, other(ids).logits
    return float((a - b).norm() / b.norm())


again = AutoModelForCausalLM.from_pretrained("tuned")
twice = apart(again, merged)
Path("tuned/adapter_config.json").unlink()
once = apart(AutoModelForCausalLM.from_pretrained("tuned"), merged)
on_top = any("lora_" in name for name, _ in again.named_parameters())
print(f"merged model, before it is saved: differs from the base by {apart(merged, base):.2f}")
print(f"loaded again from the folder: differs from the merged model by {twice:.2f}")
print(f"loaded again without adapter_config.json: differs from the merged model by {once:.2f}")
print(f"adapter applied again: {on_top}")
sys.exit(0 if on_top and twice > 0.05 and once < 1e-5 else 1)
PYTHON
