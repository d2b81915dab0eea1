"""Models with adapters: made and saved with peft, and asked, by peft and by the engine."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.engines import tiny
from tests.engines.architectures import text_model
from tests.engines.tiny import load
from worker.engines.transformers.engine import TransformersEngine

peft = pytest.importorskip("peft")

Weights = dict[str, torch.Tensor]


def save(path: Path, model: Any, processor: Any = None) -> Path:
    model.save_pretrained(path)
    (processor or tiny.tokenizer()).save_pretrained(path)
    return path


def tuned(path: Path, model: Any, config: Any = None, *, seed: int = 1, **own: Any) -> Any:
    """The model with a trained adapter, saved at `path`."""
    torch.manual_seed(seed)
    arguments = {"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]} | own
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = peft.get_peft_model(model, config or peft.LoraConfig(**arguments)).eval()
        with torch.no_grad():
            for parameter in result.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.2)
        result.save_pretrained(path)
    return result


@torch.inference_mode()
def generated(model: Any, ids: list[int], count: int = 12, **inputs: Any) -> list[int]:
    tokens = torch.tensor([ids])
    output = model.generate(
        input_ids=tokens,
        attention_mask=torch.ones_like(tokens),
        do_sample=False,
        max_new_tokens=count,
        eos_token_id=10**9,
        pad_token_id=0,
        **inputs,
    )
    start = 1 if model.config.is_encoder_decoder else len(ids)
    return [int(token) for token in output[0, start:]]


def beside(base: Path, **adapters: Path) -> TransformersEngine:
    text = ",".join(f"{name}={path}" for name, path in adapters.items())
    return load(base, model_names=(("base",),), engine_args={"adapters": text})


def answers(engine: TransformersEngine, ids: list[int], *names: str) -> dict[str, list[int]]:
    """The answer of each model; all run at once."""
    ran = tiny.run(engine, [tiny.ids_job(ids, model=name) for name in names])
    for name, answer in zip(names, ran, strict=True):
        assert answer.failed is None, f"{name}: {answer.failed}"
    return {name: answer.token_ids for name, answer in zip(names, ran, strict=True)}


def how(engine: TransformersEngine, name: str) -> str:
    info = next(info for info in engine.capabilities.models if info.name == name)
    return str(info.details["adapter"])


IN_BATCH, MERGED = "chosen for each row", "merged into layers of its own"


def tied_llama() -> Any:
    model = tiny.llama()
    model.config.tie_word_embeddings = True
    model.lm_head.weight = model.model.embed_tokens.weight
    return model


def biased() -> Any:
    model = text_model("qwen2")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0.0, 0.3)
    return model


# --- other models ---------------------------------------------------------------------------------


def images_and_question(engine: TransformersEngine, name: str, count: int) -> list[int]:
    job = tiny.chat_job("what is this", [tiny.image(n) for n in range(count)], model=name)
    answer = tiny.run(engine, [job])[0]
    assert answer.failed is None, answer.failed
    return answer.token_ids


# --- what does not fit ----------------------------------------------------------------------------


def rewrite(folder: Path, change: Callable[[Weights], Weights]) -> None:
    file = folder / "adapter_model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})
