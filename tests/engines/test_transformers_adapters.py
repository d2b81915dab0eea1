"""Adapters: each kind answers as peft's own forward of it, beside its base and its neighbours,
which it does not change; what does not fit is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.engines import tiny
from tests.engines.architectures import text_model, vision_model
from tests.engines.tiny import load
from tests.engines.tuned_models import (
    IN_BATCH,
    MERGED,
    Weights,
    answers,
    beside,
    biased,
    generated,
    how,
    images_and_question,
    peft,
    rewrite,
    save,
    tied_llama,
    tuned,
)
from worker.engines.base import EngineLoadError
from worker.engines.transformers.adapters import add_adapters
from worker.engines.transformers.engine import TransformersEngine
from worker.engines.transformers.loaded import wrap_model
from worker.engines.transformers.rows import RowAdapters
from worker.engines.transformers.selftest import check
from worker.engines.transformers.served import ServedModel
from worker.engines.transformers.settings import EngineSettings

# peft uses names that transformers is about to change.
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

QWEN_MOE = "qwen2_moe"


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
            wanted = images_and_question(alone, "tiny", count)
            assert images_and_question(engine, "a", count) == wanted
            unchanged = images_and_question(plain, "tiny", count)
            assert images_and_question(engine, "base", count) == unchanged
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
            wanted = images_and_question(alone, "tiny", count)
            assert images_and_question(engine, "a", count) == wanted
            assert images_and_question(engine, "base", count) != wanted
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
        wanted = images_and_question(alone, "tiny", 1)
        assert images_and_question(engine, "a", 1) == wanted
        assert images_and_question(engine, "base", 1) != wanted
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
