"""Adapters that do not fit are refused by name, at load."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.engines import tiny
from tests.engines.tiny import load
from tests.engines.tuned_models import (
    answers,
    beside,
    biased,
    generated,
    peft,
    rewrite,
    save,
    tuned,
)
from worker.engines.base import EngineLoadError

# peft uses names that transformers is about to change.
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


def configure(folder: Path, **changes: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


MISFITS: dict[str, tuple[Callable[[Path], None], str]] = {
    "names of another model": (
        lambda folder: rewrite(
            folder, lambda w: {k.replace("model.layers", "language_model.layers"): w[k] for k in w}
        ),
        "trained on another model",
    ),
    "half under other names": (
        lambda folder: rewrite(
            folder, lambda w: {k.replace("layers.1.", "blocks.1."): w[k] for k in w}
        ),
        r"blocks\.1\.",
    ),
    "a layer is missing": (
        lambda folder: rewrite(folder, lambda w: {k: w[k] for k in w if "layers.1." not in k}),
        r"lacks .*layers\.1\.",
    ),
    "one half of a pair is missing": (
        lambda folder: rewrite(
            folder, lambda w: {k: w[k] for k in w if "layers.1.self_attn.q_proj.lora_B" not in k}
        ),
        r"lacks .*layers\.1\.self_attn\.q_proj\.lora_B",
    ),
    "a module that is not targeted": (
        lambda folder: configure(folder, target_modules=["q_proj"]),
        "v_proj",
    ),
    "another rank": (lambda folder: configure(folder, r=8), "size mismatch"),
    "no such module": (lambda folder: configure(folder, target_modules=["wq"]), "wq"),
    "biases that were not saved": (lambda folder: configure(folder, bias="all"), "bias"),
    "a head that was not saved": (
        lambda folder: configure(folder, modules_to_save=["lm_head"]),
        "lm_head",
    ),
    "an option of another peft": (
        lambda folder: configure(folder, use_warp_drive=True),
        "use_warp_drive",
    ),
    "activated LoRA": (
        lambda folder: configure(folder, alora_invocation_tokens=[20, 21]),
        "activated LoRA",
    ),
    "a base that was changed at the start": (
        lambda folder: configure(folder, init_lora_weights="corda"),
        "init_lora_weights=corda",
    ),
    "no weights": (
        lambda folder: (folder / "adapter_model.safetensors").unlink(),
        "not a complete adapter",
    ),
}


@pytest.mark.parametrize("fault", MISFITS)
@pytest.mark.parametrize("merged", [True, False], ids=["merged", "beside"])
def test_an_adapter_that_does_not_fit_is_refused_by_name(
    fault: str, merged: bool, tmp_path: Path
) -> None:
    base = save(tmp_path / "base", biased())
    folder = tmp_path / "odd-adapter"
    tuned(folder, biased())
    spoil, words = MISFITS[fault]
    spoil(folder)
    pattern = rf"odd-adapter.*{words}|{words}.*odd-adapter"
    with pytest.raises(EngineLoadError, match=pattern) as caught:
        if merged:
            load(folder, model_base=str(base))
        else:
            beside(base, a=folder)
    assert "\n" not in str(caught.value)


def test_prompt_tuning_is_refused(tmp_path: Path) -> None:
    base = save(tmp_path / "base", tiny.llama())
    config = peft.PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM")
    peft.get_peft_model(tiny.llama(), config).save_pretrained(tmp_path / "a")
    for refused in (
        lambda: beside(base, a=tmp_path / "a"),
        lambda: load(tmp_path / "a", model_base=str(base)),
    ):
        with pytest.raises(EngineLoadError, match="PROMPT_TUNING"):
            refused()


def test_an_adapter_of_another_size_is_refused(tmp_path: Path) -> None:
    base = save(tmp_path / "base", tiny.llama())
    tuned(tmp_path / "a", tiny.llama(hidden=96))
    with pytest.raises(EngineLoadError, match="size mismatch"):
        beside(base, a=tmp_path / "a")


def test_pickled_adapters_are_refused_unless_they_are_asked_for(tmp_path: Path) -> None:
    base = save(tmp_path / "base", tiny.llama())
    with_it = tuned(tmp_path / "a", tiny.llama())
    file = tmp_path / "a" / "adapter_model.safetensors"
    torch.save(load_file(file), tmp_path / "a" / "adapter_model.bin")
    file.unlink()
    with pytest.raises(EngineLoadError, match="safetensors_only=false"):
        beside(base, a=tmp_path / "a")
    ids = tiny.prompts(1)[0]
    engine = load(
        base,
        model_names=(("base",),),
        engine_args={"adapters": f"a={tmp_path / 'a'}", "safetensors_only": "false"},
    )
    try:
        assert answers(engine, ids, "a")["a"] == generated(with_it, ids)
    finally:
        engine.close()


def test_a_folder_with_adapter_and_configuration_is_an_adapter(tmp_path: Path) -> None:
    base = save(tmp_path / "base", tiny.llama())
    with_it = tuned(tmp_path / "a", tiny.llama())
    shutil.copy(base / "config.json", tmp_path / "a")
    ids = tiny.prompts(1)[0]
    engine = load(tmp_path / "a", model_base=str(base), model_names=(("a",),))
    try:
        assert answers(engine, ids, "a")["a"] == generated(with_it, ids)
    finally:
        engine.close()
    shutil.copy(base / "model.safetensors", tmp_path / "a")
    with pytest.raises(EngineLoadError, match="a complete model and an adapter"):
        load(tmp_path / "a", model_base=str(base))


def test_the_base_of_an_adapter_must_be_a_model(tmp_path: Path) -> None:
    for name in ("a", "b"):
        tuned(tmp_path / name, tiny.llama())
    with pytest.raises(EngineLoadError, match="is an adapter itself"):
        load(tmp_path / "a", model_base=str(tmp_path / "b"))


@pytest.mark.parametrize("text", ["red", "red=", "=path", "red=a,red=b"])
def test_a_list_of_adapters_is_checked(text: str, tmp_path: Path) -> None:
    base = save(tmp_path / "base", tiny.llama())
    with pytest.raises(EngineLoadError, match="adapters="):
        load(base, engine_args={"adapters": text})
