"""Adapters: each kind answers as peft's own forward of it, beside its base and its neighbours,
which it does not change; what does not fit is refused by name."""

from __future__ import annotations

import copy
import json
import shutil
import struct
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from broker.protocol.messages import Kind, Message, Params, Request, new_id
from tests.engines import tiny
from tests.engines.architectures import text_model, vision_model
from tests.engines.tiny import load
from worker.engines.base import EngineLoadError, Job
from worker.engines.transformers.adapters import add_adapters
from worker.engines.transformers.engine import TransformersEngine
from worker.engines.transformers.loaded import wrap_model
from worker.engines.transformers.rows import RowAdapters
from worker.engines.transformers.selftest import check
from worker.engines.transformers.served import ServedModel
from worker.engines.transformers.settings import EngineSettings

peft = pytest.importorskip("peft")

# peft uses names that transformers is about to change.
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

Weights = dict[str, torch.Tensor]


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


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

QWEN_MOE = "qwen2_moe"


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


KINDS: dict[str, tuple[Callable[[], Any], Callable[[], Any], str]] = {
    "plain": (tiny.llama, lambda: None, IN_BATCH),
    "rslora, ranks of its own": (
        tiny.llama,
        lambda: peft.LoraConfig(
            r=4, use_rslora=True, rank_pattern={"q_proj": 8}, target_modules=["q_proj", "o_proj"]
        ),
        IN_BATCH,
    ),
    "all linear layers and the head": (
        tiny.llama,
        lambda: peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj", "lm_head"]),
        IN_BATCH,
    ),
    "embeddings and head of a tied model": (
        tied_llama,
        lambda: peft.LoraConfig(r=4, target_modules=["embed_tokens", "lm_head"]),
        IN_BATCH,
    ),
    "embeddings of a tied model": (
        tied_llama,
        lambda: peft.LoraConfig(r=4, target_modules=["embed_tokens", "q_proj"]),
        IN_BATCH,
    ),
    "dora": (
        tiny.llama,
        lambda: peft.LoraConfig(r=4, use_dora=True, target_modules=["q_proj", "up_proj"]),
        MERGED,
    ),
    "bias=all": (
        biased,
        lambda: peft.LoraConfig(r=4, bias="all", target_modules=["q_proj"]),
        MERGED,
    ),
    "bias=lora_only": (
        biased,
        lambda: peft.LoraConfig(r=4, bias="lora_only", target_modules=["q_proj"]),
        MERGED,
    ),
    "lora_bias": (
        biased,
        lambda: peft.LoraConfig(r=4, lora_bias=True, target_modules=["q_proj"]),
        IN_BATCH,
    ),
    "modules_to_save": (
        tiny.llama,
        lambda: peft.LoraConfig(
            r=4, modules_to_save=["lm_head", "embed_tokens"], target_modules=["q_proj"]
        ),
        MERGED,
    ),
    "modules_to_save, the head of a tied model": (
        tied_llama,
        lambda: peft.LoraConfig(r=4, modules_to_save=["lm_head"], target_modules=["q_proj"]),
        MERGED,
    ),
    "trained tokens": (
        tiny.llama,
        lambda: peft.LoraConfig(
            r=4, trainable_token_indices=[20, 21, 300], target_modules=["q_proj"]
        ),
        MERGED,
    ),
    "trained tokens of a tied model": (
        tied_llama,
        lambda: peft.LoraConfig(
            r=4, trainable_token_indices=[20, 21, 300], target_modules=["q_proj"]
        ),
        MERGED,
    ),
    "parameters": (
        lambda: text_model("mixtral"),
        lambda: peft.LoraConfig(
            r=4, target_modules=["q_proj"], target_parameters=["mlp.experts.gate_up_proj"]
        ),
        MERGED,
    ),
    "two parameters of one module": (
        lambda: text_model("mixtral"),
        lambda: peft.LoraConfig(
            r=4,
            target_modules=["q_proj"],
            target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        ),
        MERGED,
    ),
    "a shared expert": (
        lambda: text_model(QWEN_MOE),
        lambda: peft.LoraConfig(r=4, target_modules=["gate_proj", "q_proj"]),
        MERGED,
    ),
    "layers that flatten rows (OPT)": (
        lambda: text_model("opt"),
        lambda: peft.LoraConfig(r=4, target_modules=["fc1", "q_proj"]),
        MERGED,
    ),
    "transposed layers (GPT-2)": (
        lambda: text_model("gpt2"),
        lambda: peft.LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True),
        IN_BATCH,
    ),
    "some layers": (
        tiny.llama,
        lambda: peft.LoraConfig(r=4, layers_to_transform=[1], target_modules=["q_proj"]),
        IN_BATCH,
    ),
    "repeated layers": (
        tiny.llama,
        lambda: peft.LoraConfig(r=4, layer_replication=[[0, 2], [0, 2]], target_modules=["q_proj"]),
        MERGED,
    ),
    "pissa": (
        tiny.llama,
        lambda: peft.LoraConfig(r=4, init_lora_weights="pissa", target_modules=["q_proj"]),
        MERGED,
    ),
    "ia3": (
        tiny.llama,
        lambda: peft.IA3Config(
            target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]
        ),
        MERGED,
    ),
    "adalora": (
        tiny.llama,
        lambda: peft.AdaLoraConfig(init_r=4, total_step=10, target_modules=["q_proj"]),
        MERGED,
    ),
    "loha": (tiny.llama, lambda: peft.LoHaConfig(r=4, target_modules=["q_proj"]), MERGED),
    "lokr": (tiny.llama, lambda: peft.LoKrConfig(r=4, target_modules=["q_proj"]), MERGED),
    "oft": (
        tiny.llama,
        lambda: peft.OFTConfig(r=0, oft_block_size=4, target_modules=["q_proj"]),
        MERGED,
    ),
    "vera": (tiny.llama, lambda: peft.VeraConfig(r=4, target_modules=["q_proj"]), MERGED),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_answers_exactly_beside_base_and_neighbour(kind: str, tmp_path: Path) -> None:
    make, config, served = KINDS[kind]
    base = save(tmp_path / "base", make())
    with_it = tuned(tmp_path / "a", make(), config())
    neighbour = tuned(
        tmp_path / "b",
        make(),
        seed=2,
        target_modules=["c_attn"] if "GPT-2" in kind else ["q_proj", "v_proj"],
        fan_in_fan_out="GPT-2" in kind,
    )
    ids = [20, 21, 300, *tiny.prompts(1, low=20, seed=4)[0]]
    wanted = {
        "base": generated(make(), ids),
        "a": generated(with_it, ids),
        "b": generated(neighbour, ids),
    }
    assert len({tuple(tokens) for tokens in wanted.values()}) == 3
    engine = beside(base, a=tmp_path / "a", b=tmp_path / "b")
    try:
        assert answers(engine, ids, "base", "a", "b") == wanted
        assert how(engine, "a") == served
        assert how(engine, "b") == IN_BATCH
    finally:
        engine.close()


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_merged_exactly(kind: str, tmp_path: Path) -> None:
    make, config, _ = KINDS[kind]
    base = save(tmp_path / "base", make())
    with_it = tuned(tmp_path / "a", make(), config())
    ids = [20, 21, 300, *tiny.prompts(1, low=20, seed=4)[0]]
    engine = load(tmp_path / "a", model_base=str(base), model_names=(("a",),))
    try:
        assert answers(engine, ids, "a")["a"] == generated(with_it, ids)
    finally:
        engine.close()


# --- other models ---------------------------------------------------------------------------------


def pictures_and_question(engine: TransformersEngine, name: str, count: int) -> list[int]:
    job = tiny.chat_job("what is this", [tiny.picture(n) for n in range(count)], model=name)
    answer = tiny.run(engine, [job])[0]
    assert answer.failed is None, answer.failed
    return answer.token_ids


@pytest.mark.parametrize("part", ["tower and language model", "projector", "language model"])
def test_adapters_of_a_vision_language_model_see_every_number_of_images(
    part: str, tmp_path: Path
) -> None:
    targets = {
        "tower and language model": ["q_proj", "v_proj"],
        "projector": ["linear_1"],
        "language model": r".*language_model.*(q|v)_proj",
    }[part]
    base = save(tmp_path / "base", tiny.llava(), tiny.llava_processor())
    with_it = tuned(tmp_path / "a", tiny.llava(), target_modules=targets)
    alone = tiny.serve(with_it.merge_and_unload(), processor=tiny.llava_processor())
    engine = beside(base, a=tmp_path / "a")
    plain = tiny.serve(tiny.llava(), processor=tiny.llava_processor())
    try:
        assert how(engine, "a") == (IN_BATCH if part == "language model" else MERGED)
        for count in (1, 2, 0):
            wanted = pictures_and_question(alone, "tiny", count)
            assert pictures_and_question(engine, "a", count) == wanted
            unchanged = pictures_and_question(plain, "tiny", count)
            assert pictures_and_question(engine, "base", count) == unchanged
            assert (part == "projector" and not count) or wanted != unchanged
    finally:
        for one in (engine, alone, plain):
            one.close()


def test_adapters_of_a_model_with_its_own_position_ids(tmp_path: Path) -> None:
    model, processor = vision_model("qwen2_vl")
    with_it = tuned(
        tmp_path / "a", vision_model("qwen2_vl")[0], target_modules=r".*layers.*(q|v)_proj"
    )
    alone = tiny.serve(with_it.merge_and_unload(), processor=processor)
    # Without torchvision such a processor cannot be saved.
    settings = EngineSettings(kv_tokens=8192, adapters=f"a={tmp_path / 'a'}")
    loaded = wrap_model(model, processor.tokenizer, processor, settings=settings)
    assert not add_adapters(loaded, settings, lambda share, note: None, trust_remote_code=False)
    served = ServedModel(loaded, ("base",), settings, slots=4)
    engine = TransformersEngine([served], settings, slots=4)
    try:
        assert how(engine, "a") == IN_BATCH
        for count in (1, 2, 0):
            wanted = pictures_and_question(alone, "tiny", count)
            assert pictures_and_question(engine, "a", count) == wanted
            assert pictures_and_question(engine, "base", count) != wanted
    finally:
        alone.close()
        engine.close()


def test_an_adapter_of_single_experts_changes_those_of_a_fused_model(tmp_path: Path) -> None:
    """Before transformers 5, each expert of a Mixtral had its own layers."""
    base = save(tmp_path / "base", text_model("mixtral"))
    merged = text_model("mixtral")
    width, inside = merged.config.hidden_size, merged.config.intermediate_size
    torch.manual_seed(0)
    weights: Weights = {}

    def changed(path: str, outputs: int, inputs: int) -> torch.Tensor:
        stem = f"base_model.model.model.layers.{path}"
        one = weights[f"{stem}.lora_A.weight"] = torch.randn(2, inputs) * 0.3
        other = weights[f"{stem}.lora_B.weight"] = torch.randn(outputs, 2) * 0.3
        return other @ one * 2

    with torch.no_grad():
        for number, layer in enumerate(merged.model.layers):
            for expert in range(merged.config.num_local_experts):
                path = f"{number}.block_sparse_moe.experts.{expert}"
                gate = changed(f"{path}.w1", inside, width)
                up = changed(f"{path}.w3", inside, width)
                layer.mlp.experts.gate_up_proj[expert] += torch.cat([gate, up])
                layer.mlp.experts.down_proj[expert] += changed(f"{path}.w2", width, inside)
            query = changed(f"{number}.self_attn.q_proj", width, width)
            layer.self_attn.q_proj.weight += query
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["w1", "w2", "w3", "q_proj"])
    config.save_pretrained(tmp_path / "a")
    save_file(weights, tmp_path / "a" / "adapter_model.safetensors")
    ids = tiny.prompts(1, low=10)[0]
    engine = beside(base, a=tmp_path / "a")
    try:
        wanted = {"base": generated(text_model("mixtral"), ids), "a": generated(merged, ids)}
        assert answers(engine, ids, "base", "a") == wanted
    finally:
        engine.close()


def test_an_adapter_with_names_of_an_older_release_finds_its_places(tmp_path: Path) -> None:
    """Before transformers 4.52, a LLaVA's language model was complete, with its own head."""
    base = save(tmp_path / "base", tiny.llava(), tiny.llava_processor())
    targets = r".*language_model.*(q|v)_proj"
    with_it = tuned(tmp_path / "a", tiny.llava(), target_modules=targets)
    new, old = "model.language_model.layers", "language_model.model.layers"
    rewrite(tmp_path / "a", lambda w: {k.replace(f".{new}", f".{old}"): w[k] for k in w})
    alone = tiny.serve(with_it.merge_and_unload(), processor=tiny.llava_processor())
    engine = beside(base, a=tmp_path / "a")
    try:
        wanted = pictures_and_question(alone, "tiny", 1)
        assert pictures_and_question(engine, "a", 1) == wanted
        assert pictures_and_question(engine, "base", 1) != wanted
    finally:
        alone.close()
        engine.close()


@pytest.mark.parametrize(("kind", "targets"), [("t5", ["q", "v"]), ("mamba", ["in_proj"])])
def test_adapters_of_models_that_run_one_by_one(
    kind: str, targets: list[str], tmp_path: Path
) -> None:
    base = save(tmp_path / "base", text_model(kind))
    models = {"base": text_model(kind)}
    for seed, name in enumerate("ab"):
        models[name] = tuned(tmp_path / name, text_model(kind), seed=seed, target_modules=targets)
    ids = tiny.prompts(1, low=10)[0]
    engine = beside(base, a=tmp_path / "a", b=tmp_path / "b")
    try:
        wanted = {name: generated(model, ids) for name, model in models.items()}
        assert answers(engine, ids, "base", "a", "b") == wanted
        assert len(set(map(tuple, wanted.values()))) == 3
    finally:
        engine.close()


def test_the_probabilities_of_a_prompt_are_those_of_its_adapter(tmp_path: Path) -> None:
    base = save(tmp_path / "base", tiny.llama())
    models = {"base": tiny.llama(), "a": tuned(tmp_path / "a", tiny.llama())}
    ids = tiny.prompts(1, low=10)[0]
    for scheduler in ("slots", "generate"):
        engine = load(
            base,
            model_names=(("base",),),
            engine_args={"adapters": f"a={tmp_path / 'a'}", "scheduler": scheduler},
        )
        try:
            for name, model in models.items():
                job = tiny.ids_job(ids, model=name, max_tokens=1, prompt_logprobs=0)
                facts = tiny.run(engine, [job])[0].facts
                assert facts is not None and facts.logprobs is not None
                with torch.inference_mode():
                    scores = model(torch.tensor([ids])).logits[0].log_softmax(-1)
                wanted = [float(scores[i - 1, ids[i]]) for i in range(1, len(ids))]
                got = [one.logprob for one in facts.logprobs[1:]]
                assert got == pytest.approx(wanted, abs=1e-4)
        finally:
            engine.close()


def test_an_adapter_may_have_a_dot_in_its_name(tmp_path: Path) -> None:
    base = save(tmp_path / "base", tiny.llama())
    with_it = tuned(tmp_path / "a", tiny.llama())
    ids = tiny.prompts(1)[0]
    engine = beside(base, **{"mine-1.5": tmp_path / "a"})
    try:
        assert answers(engine, ids, "mine-1.5")["mine-1.5"] == generated(with_it, ids)
    finally:
        engine.close()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("use_dora", [False, True])
def test_adapters_in_half_precision(dtype: str, use_dora: bool, tmp_path: Path) -> None:
    base = save(tmp_path / "base", tiny.llama())
    with_it = tuned(tmp_path / "a", tiny.llama(), use_dora=use_dora)
    ids = tiny.prompts(1, low=10)[0]
    engine = load(
        base,
        dtype=dtype,
        model_names=(("base",),),
        engine_args={"adapters": f"a={tmp_path / 'a'}"},
    )
    try:
        job = tiny.ids_job(ids, model="a", max_tokens=1, logprobs=1)
        got = tiny.run(engine, [job])[0].logprobs[0]
        with torch.inference_mode():
            scores = with_it(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
        assert got.logprob == pytest.approx(float(scores.max()), abs=0.15)
    finally:
        engine.close()


def test_the_self_test_compares_with_the_base_as_it_was_before_its_adapters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuned(tmp_path / "a", tiny.llama())
    settings = EngineSettings(adapters=f"a={tmp_path / 'a'}")
    loaded = wrap_model(tiny.llama(), tiny.tokenizer(), settings=settings)
    add_adapters(loaded, settings, lambda share, note: None, trust_remote_code=False)
    assert check(loaded, None).forward is not None
    choose = RowAdapters.choose
    monkeypatch.setattr(RowAdapters, "choose", lambda self, rows: choose(self, ["a" for _ in rows]))
    verdict = check(loaded, None)
    assert verdict.forward is None and "logits differ" in verdict.reason


# --- quantised ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bits", "kind"),
    [(bits, kind) for bits in (8, 4) for kind in ("plain", "modules_to_save", "bias")]
    + [(4, "dora")],
)
def test_an_adapter_is_not_rounded_with_the_weights_of_its_base(
    bits: int, kind: str, tmp_path: Path
) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    own: dict[str, Any] = {
        "plain": {},
        "dora": {"use_dora": True},
        "modules_to_save": {"modules_to_save": ["lm_head"]},
        "bias": {"bias": "all"},
    }[kind]
    make = biased if kind == "bias" else tiny.llama
    base = save(tmp_path / "base", make())
    tuned(tmp_path / "a", make(), **own)
    options: dict[str, Any] = {"load_8bit": bits == 8, "load_4bit": bits == 4, "dtype": "float32"}
    ids = tiny.prompts(1, low=10)[0]
    quantised = load(base, model_names=(("q",),), **options)
    model = quantised._served[0].loaded.model
    quantised.close()
    with torch.inference_mode():
        unchanged = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
        with_it = peft.PeftModel.from_pretrained(model, str(tmp_path / "a")).eval()
        wanted = with_it(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
    engines = {
        "beside": load(
            base,
            model_names=(("base",),),
            engine_args={"adapters": f"a={tmp_path / 'a'}"},
            **options,
        ),
        "on its base": load(tmp_path / "a", model_base=str(base), model_names=(("a",),), **options),
    }
    for engine in engines.values():
        try:
            for name, scores in (("a", wanted), ("base", unchanged)):
                if name not in {info.name for info in engine.capabilities.models}:
                    continue
                job = tiny.ids_job(ids, model=name, max_tokens=1, logprobs=1)
                got = tiny.run(engine, [job])[0]
                # LLM.int8 depends on the company; the plain rows of NF4 do not, where
                # bitsandbytes multiplies them in float32.
                native = getattr(bitsandbytes.functional, "has_avx512bf16", lambda: False)
                exact = bits == 4 and not native()
                allowed = 1e-4 if exact else 0.05
                (token,) = got.token_ids
                assert got.logprobs[0].logprob == pytest.approx(float(scores[token]), abs=allowed)
                assert float(scores[token]) >= float(scores.max()) - 2 * allowed
        finally:
            engine.close()


def test_dora_over_8_bit_weights_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    base = save(tmp_path / "base", tiny.llama())
    tuned(tmp_path / "a", tiny.llama(), use_dora=True)
    for refused in (
        lambda: load(base, load_8bit=True, engine_args={"adapters": f"a={tmp_path / 'a'}"}),
        lambda: load(tmp_path / "a", model_base=str(base), load_8bit=True),
    ):
        with pytest.raises(EngineLoadError, match="DoRA"):
            refused()


def test_adapters_beside_an_adapter_over_quantised_weights_are_refused(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    base = save(tmp_path / "base", tiny.llama())
    for name in ("a", "b"):
        tuned(tmp_path / name, tiny.llama())
    with pytest.raises(EngineLoadError, match="name both adapters"):
        load(
            tmp_path / "a",
            model_base=str(base),
            load_4bit=True,
            engine_args={"adapters": f"b={tmp_path / 'b'}"},
        )


# --- what does not fit ----------------------------------------------------------------------------


def rewrite(folder: Path, change: Callable[[Weights], Weights]) -> None:
    file = folder / "adapter_model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


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


# --- embeddings -----------------------------------------------------------------------------------


def embedded(engine: TransformersEngine, name: str, inputs: list[list[int]]) -> Any:
    request = Request(model=name, kind=Kind.EMBED, inputs=inputs, window=1)
    ended = tiny.run(engine, [Job(new_id(), request)])[0].ended
    assert ended is not None and ended.result is not None
    width = ended.result["dimensions"]
    return np.array([struct.unpack(f"<{width}f", row) for row in ended.result["embeddings"]])


@torch.inference_mode()
def states(model: Any, inputs: list[list[int]]) -> Any:
    """The normalised mean of the last hidden states."""
    rows = [
        model(torch.tensor([ids]), output_hidden_states=True).hidden_states[-1][0].mean(0)
        for ids in inputs
    ]
    return torch.nn.functional.normalize(torch.stack(rows), dim=-1).numpy()


def test_base_and_adapters_each_give_their_own_embeddings(tmp_path: Path) -> None:
    base = save(tmp_path / "base", tiny.llama())
    models = {
        "base": tiny.llama(),
        "a": tuned(tmp_path / "a", tiny.llama()),
        "b": tuned(tmp_path / "b", tiny.llama(), seed=2),
        "dora": tuned(tmp_path / "dora", tiny.llama(), seed=3, use_dora=True),
    }
    inputs = tiny.prompts(5, low=3, high=40)
    engine = beside(base, **{name: tmp_path / name for name in ("a", "b", "dora")})
    try:
        # In an order that would reveal a leftover choice of adapter.
        for name in ("base", "a", "base", "b", "dora", "a"):
            got = embedded(engine, name, inputs)
            assert np.allclose(got, states(models[name], inputs), atol=1e-5), name
    finally:
        engine.close()


def test_embeddings_beside_streams_keep_to_their_own_adapters(tmp_path: Path) -> None:
    base = save(tmp_path / "base", tiny.llama())
    models = {
        "base": tiny.llama(),
        "a": tuned(tmp_path / "a", tiny.llama()),
        "b": tuned(tmp_path / "b", tiny.llama(), seed=2),
    }
    ids, inputs = tiny.prompts(1, low=10)[0], tiny.prompts(60, low=90, high=120)
    engine = beside(base, a=tmp_path / "a", b=tmp_path / "b")
    try:
        jobs = [tiny.ids_job(ids, model=name, max_tokens=30) for name in models]
        request = Request(model="b", kind=Kind.EMBED, inputs=inputs, window=1)
        ran = tiny.run(engine, [*jobs, Job(new_id(), request)])
        for answer, model in zip(ran, models.values(), strict=False):
            assert answer.token_ids == generated(model, ids, 30)
        ended = ran[-1].ended
        assert ended is not None and ended.result is not None
        got = np.array([np.frombuffer(row, "<f4") for row in ended.result["embeddings"]])
        assert np.allclose(got, states(models["b"], inputs), atol=1e-5)
    finally:
        engine.close()


# --- tokenizers and templates ---------------------------------------------------------------------

OWN_TEMPLATE = (
    "{% for m in messages %}<|user|>please: {{ m['content'] }}<|end|>{% endfor %}<|assistant|>"
)


def own_tokenizer(*added: str) -> Any:
    """The base's tokenizer with another template, and perhaps tokens beyond all its rows."""
    result = copy.deepcopy(tiny.tokenizer())
    result.chat_template = OWN_TEMPLATE
    if added:
        fillers = [f"<filler-{number}>" for number in range(len(result), tiny.VOCABULARY)]
        result.add_tokens([*fillers, *added])
    return result


def template_text(engine: TransformersEngine, name: str) -> str:
    messages = [Message(role="user", content="hello")]
    request = Request(model=name, kind=Kind.TEMPLATE, messages=messages, window=1)
    ended = tiny.run(engine, [Job(new_id(), request)])[0].ended
    assert ended is not None and ended.result is not None
    return str(ended.result["text"])


def chat(engine: TransformersEngine, name: str) -> list[int]:
    request = Request(
        model=name,
        messages=[Message(role="user", content="hello <new> world")],
        params=Params(temperature=0.0, max_tokens=12, ignore_eos=True),
        window=1 << 30,
    )
    answer = tiny.run(engine, [Job(new_id(), request)])[0]
    assert answer.failed is None, answer.failed
    return answer.token_ids


OWN_TEXT = "<|user|>please: hello<|end|><|assistant|>"


@pytest.mark.parametrize("saved", ["tokenizer", "template"])
def test_an_adapter_uses_its_own_template(saved: str, tmp_path: Path) -> None:
    base = save(tmp_path / "base", tiny.llama())
    with_it = tuned(tmp_path / "a", tiny.llama())
    if saved == "tokenizer":
        own_tokenizer().save_pretrained(tmp_path / "a")
    else:
        (tmp_path / "a" / "chat_template.jinja").write_text(OWN_TEMPLATE)
    tuned(tmp_path / "b", tiny.llama(), seed=2)
    ids = tiny.tokenizer()("<|user|>please: hello <new> world<|end|><|assistant|>")["input_ids"]
    wanted = generated(with_it, ids)
    engine = beside(base, a=tmp_path / "a", b=tmp_path / "b")
    alone = load(tmp_path / "a", model_base=str(base), model_names=(("a",),))
    try:
        assert how(engine, "a") == IN_BATCH
        assert template_text(engine, "a") == template_text(alone, "a") == OWN_TEXT
        for name in ("base", "b"):
            assert "please" not in template_text(engine, name)
        assert chat(engine, "a") == chat(alone, "a") == wanted
    finally:
        engine.close()
        alone.close()


@pytest.mark.parametrize(
    "kept", ["modules_to_save", "embedding layers", "trained tokens", "tied embedding layers"]
)
def test_tokens_that_an_adapter_added_are_its_own(kept: str, tmp_path: Path) -> None:
    make = tied_llama if "tied" in kept else tiny.llama
    base = save(tmp_path / "base", make())
    wider = make()
    torch.manual_seed(5)
    wider.resize_token_embeddings(tiny.VOCABULARY + 1, mean_resizing=False)
    with torch.no_grad():
        wider.model.embed_tokens.weight[-1].normal_(0.0, 0.5)
        if "tied" not in kept:
            wider.lm_head.weight[-1].normal_(0.0, 0.5)
    more: dict[str, Any] = {
        "modules_to_save": {"modules_to_save": ["embed_tokens", "lm_head"]},
        "embedding layers": {},
        "tied embedding layers": {},
        "trained tokens": {"trainable_token_indices": [tiny.VOCABULARY]},
    }[kept]
    with_it = tuned(tmp_path / "a", wider, **more)
    with_it.save_pretrained(tmp_path / "a", save_embedding_layers=kept != "modules_to_save")
    tokenizer = own_tokenizer("<new>")
    tokenizer.save_pretrained(tmp_path / "a")
    ids = tokenizer("<|user|>please: hello <new> world<|end|><|assistant|>")["input_ids"]
    assert tiny.VOCABULARY in ids
    wanted = generated(with_it, ids)
    engine = beside(base, a=tmp_path / "a")
    alone = load(tmp_path / "a", model_base=str(base), model_names=(("a",),))
    try:
        assert how(engine, "a") == MERGED
        assert chat(engine, "a") == chat(alone, "a") == wanted
        plain = generated(make(), [20, 21, 22])
        assert answers(engine, [20, 21, 22], "base")["base"] == plain
    finally:
        engine.close()
        alone.close()


def test_added_tokens_without_embeddings_are_refused(tmp_path: Path) -> None:
    base = save(tmp_path / "base", tiny.llama())
    tuned(tmp_path / "a", tiny.llama())
    own_tokenizer("<new>").save_pretrained(tmp_path / "a")
    for refused in (
        lambda: beside(base, a=tmp_path / "a"),
        lambda: load(tmp_path / "a", model_base=str(base)),
    ):
        with pytest.raises(EngineLoadError, match="<new>"):
            refused()


def test_new_rows_that_the_file_does_not_hold_are_refused(tmp_path: Path) -> None:
    base = save(tmp_path / "base", tiny.llama())
    wider = tiny.llama()
    wider.resize_token_embeddings(tiny.VOCABULARY + 1, mean_resizing=False)
    tuned(tmp_path / "a", wider, modules_to_save=["embed_tokens"])
    own_tokenizer("<new>").save_pretrained(tmp_path / "a")
    with pytest.raises(EngineLoadError, match="output head"):
        beside(base, a=tmp_path / "a")


def test_an_adapter_with_another_vocabulary_of_the_same_size_keeps_it(tmp_path: Path) -> None:
    base = save(tmp_path / "base", tiny.llama())
    with_it = tuned(tmp_path / "a", tiny.llama())
    facts = json.loads(tiny.tokenizer().backend_tokenizer.to_str())
    ids_of = facts["model"]["vocab"]
    ids_of["l"], ids_of["o"] = ids_of["o"], ids_of["l"]
    other = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(facts)), eos_token="<|end|>"
    )
    other.chat_template = OWN_TEMPLATE
    other.save_pretrained(tmp_path / "a")
    ids = other("<|user|>please: hello <new> world<|end|><|assistant|>")["input_ids"]
    engine = beside(base, a=tmp_path / "a")
    try:
        assert how(engine, "a") == MERGED
        assert chat(engine, "a") == generated(with_it, ids)
    finally:
        engine.close()


def test_the_template_of_a_vision_language_adapter_is_its_own(tmp_path: Path) -> None:
    base = save(tmp_path / "base", tiny.llava(), tiny.llava_processor())
    tuned(tmp_path / "a", tiny.llava(), target_modules=r".*language_model.*(q|v)_proj")
    template = tiny.CHAT_TEMPLATE.replace("'<|assistant|>'", "'<|assistant|>well'")
    own = copy.deepcopy(tiny.tokenizer())
    own.chat_template = template
    own.save_pretrained(tmp_path / "a")
    tuned(tmp_path / "b", tiny.llava(), target_modules=r".*language_model.*(q|v)_proj")
    processor = tiny.llava_processor()
    processor.chat_template = template
    processor.save_pretrained(tmp_path / "b")
    engine = beside(base, a=tmp_path / "a", b=tmp_path / "b")
    try:
        assert how(engine, "a") == how(engine, "b") == IN_BATCH
        for name in ("a", "b"):
            assert template_text(engine, name).endswith("<|assistant|>well")
        assert template_text(engine, "base").endswith("<|assistant|>")
        wanted = pictures_and_question(engine, "a", 1)
        assert pictures_and_question(engine, "b", 1) == wanted
        assert pictures_and_question(engine, "base", 1) != wanted
    finally:
        engine.close()
