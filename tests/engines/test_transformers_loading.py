"""Loading: folders and what is wrong with them, kinds of numbers, adapters, several models, and
models that only embed."""

from __future__ import annotations

import importlib.util
import json
import logging
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from broker.protocol.messages import FinishReason, Kind
from tests.engines import tiny
from tests.engines.architectures import vision_model
from tests.engines.tiny import load, plain
from worker.engines.base import EngineLoadError, EngineOptions
from worker.engines.transformers import build, loader, memory
from worker.engines.transformers.loading.quantise import modules_to_skip, normalise_skip_names
from worker.engines.transformers.quiet import quiet_libraries
from worker.engines.transformers.settings import parse_settings


@pytest.fixture(scope="module")
def vision_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny-llava"
    tiny.llava().save_pretrained(path)
    tiny.llava_processor().save_pretrained(path)
    return path


# --- folders --------------------------------------------------------------------------------------


def test_a_folder_is_served_under_its_name_with_its_details(folder: Path) -> None:
    told: list[tuple[float | None, str]] = []
    engine = build(
        EngineOptions(model_paths=(str(folder),), device="cpu"),
        lambda fraction, note: told.append((fraction, note)),
    )
    try:
        info = engine.capabilities.models[0]
        assert info.name == "tiny-llama"
        assert info.context_tokens == 512
        assert not info.images
        assert Kind.CHAT in info.kinds and Kind.EMBED in info.kinds
        assert info.details["architecture"] == "LlamaForCausalLM"
        assert info.details["scheduler"] == "slots"
        fractions = [fraction for fraction, _ in told if fraction is not None]
        assert fractions == sorted(fractions) and fractions[-1] == 1.0
        assert any("loading weights" in note for _, note in told)
        assert any("warming up" in note for _, note in told)
    finally:
        engine.close()


def test_a_loaded_model_answers_like_the_saved_one(folder: Path) -> None:
    engine = load(folder)
    ids = tiny.prompts(1)[0]
    try:
        answer = tiny.run(engine, [tiny.ids_job(ids, model="tiny-llama")])[0]
        assert answer.token_ids == plain(tiny.llama(), ids, 12)
    finally:
        engine.close()


def test_a_vision_language_folder_is_loaded_with_its_processor(vision_folder: Path) -> None:
    engine = load(vision_folder)
    job = tiny.chat_job("hello", [tiny.image(3)], model="tiny-llava")
    direct = tiny.serve(tiny.llava(), processor=tiny.llava_processor(), name="tiny-llava")
    try:
        assert engine.capabilities.models[0].images
        assert tiny.run(engine, [job])[0].token_ids == tiny.run(direct, [job])[0].token_ids
    finally:
        engine.close()
        direct.close()


@pytest.mark.parametrize("name", ["qwen2_vl", "llava_onevision"])
def test_a_processor_that_could_take_videos_is_loaded_with_pillow_alone(
    name: str, tmp_path: Path
) -> None:
    model, processor = vision_model(name)
    model.save_pretrained(tmp_path / name)
    processor.image_processor.save_pretrained(tmp_path / name)
    processor.tokenizer.save_pretrained(tmp_path / name)
    facts = {"processor_class": type(processor).__name__}
    for key in ("num_image_tokens", "vision_feature_select_strategy"):
        if hasattr(processor, key):
            facts[key] = getattr(processor, key)
    (tmp_path / name / "processor_config.json").write_text(json.dumps(facts))
    engine = load(tmp_path / name)
    try:
        answer = tiny.run(engine, [tiny.chat_job("hello", [tiny.image(3, 90, 70)], model=name)])[0]
        assert answer.failed is None and len(answer.token_ids) == 12
        assert engine.capabilities.models[0].details["scheduler"] == "slots"
    finally:
        engine.close()


def empty(path: Path) -> str:
    return str(path)


def gguf_file(path: Path) -> str:
    file = path / "model-Q4_K_M.gguf"
    file.write_bytes(b"GGUF")
    return str(file)


def of_unknown_kind(path: Path) -> str:
    (path / "config.json").write_text(json.dumps({"model_type": "nobody-knows-this"}))
    return str(path)


def without_weights(path: Path) -> str:
    tiny.llama().config.save_pretrained(path)
    tiny.tokenizer().save_pretrained(path)
    return str(path)


def of_images_only(path: Path) -> str:
    (path / "config.json").write_text("not json at all")
    return str(path)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: str(path / "nowhere"), "there is no folder"),
        (gguf_file, "serve it with --engine llamacpp --model-path"),
        (lambda path: str(Path(gguf_file(path)).parent), "--engine llamacpp --model-path"),
        (empty, "no config.json"),
        (of_unknown_kind, "nobody-knows-this"),
        (without_weights, "safetensors"),
        (of_images_only, "cannot load"),
    ],
    ids=["missing", "GGUF", "folder of GGUF", "empty", "unknown", "no weights", "broken"],
)
def test_a_folder_that_cannot_be_loaded_says_why_in_one_line(
    make: Callable[[Path], str], words: str, tmp_path: Path
) -> None:
    path = make(tmp_path)
    with pytest.raises(EngineLoadError) as caught:
        load(Path(path))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"device": "gpu7"}, "unknown device"),
        ({"dtype": "float12"}, "unknown dtype"),
        ({"load_8bit": True, "load_4bit": True}, "choose one"),
        ({"engine_args": {"speed": "11"}}, "unknown --engine-arg"),
        ({"engine_args": {"stall_ms": "soon"}}, "stall_ms=soon"),
        ({"engine_args": {"scheduler": "magic"}}, "choose one of auto, slots, generate"),
        ({"model_names": ((), ())}, "2 names were given for 1 models"),
    ],
)
def test_a_wrong_option_says_what_is_right(
    folder: Path, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(EngineLoadError, match=words):
        build(
            EngineOptions(**({"model_paths": (str(folder),), "device": "cpu"} | options)),
            lambda fraction, note: None,
        )


def test_settings_are_parsed_from_text() -> None:
    settings = parse_settings({"prefill-chunk": "64", "safetensors_only": "no", "stall_ms": "12.5"})
    assert settings.prefill_chunk == 64
    assert settings.safetensors_only is False
    assert settings.stall_ms == 12.5


def test_naming_the_engine_does_not_load_torch() -> None:
    code = "import sys, worker.engines.transformers; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("quantisation", "package"),
    [
        ({"quant_method": "awq", "bits": 8, "group_size": 128}, "gptqmodel"),
        ({"quant_method": "gptq", "bits": 3, "group_size": 128}, "gptqmodel and optimum"),
        pytest.param(
            {"quant_method": "compressed-tensors"},
            "[compressed]",
            marks=pytest.mark.skipif(
                importlib.util.find_spec("compressed_tensors") is not None,
                reason="the package is installed",
            ),
        ),
    ],
)
def test_a_quantised_checkpoint_names_the_package_that_it_needs(
    quantisation: dict[str, Any], package: str, folder: Path, tmp_path: Path
) -> None:
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = quantisation
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(EngineLoadError) as caught:
        load(tmp_path)
    assert package in str(caught.value).lower()
    assert "\n" not in str(caught.value)


# --- dtypes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("native", [True, False], ids=["native", "emulated"])
def test_auto_takes_bfloat16_on_a_cpu_where_it_pays(
    native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader, "multiplies_bfloat16", lambda: native)

    monkeypatch.setattr(loader, "host_bytes", lambda: 16 << 30)

    def picked(stored: str, size: int, memory_bytes: int = 0) -> torch.dtype:
        options = EngineOptions(memory_bytes=memory_bytes)
        config = LlamaConfig(dtype=stored)
        return loader._pick_dtype(options, config, torch.device("cpu"), size, AutoModelForCausalLM)

    for half in ("bfloat16", "float16"):
        assert picked(half, 100 << 20) is torch.float32
        for size in (500 << 20, 4 << 30):
            assert picked(half, size) is (torch.bfloat16 if native else torch.float32)
        assert picked(half, 5 << 30) is torch.bfloat16, "in float32 it takes half of the memory"
        assert picked(half, 3 << 30, memory_bytes=10 << 30) is torch.bfloat16
    assert picked("float32", 5 << 30) is torch.float32, "what its author saved"


def test_auto_knows_the_size_of_a_model_whose_files_do_not_tell_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On the hub, or pickled: it is counted in the model's own layers."""
    monkeypatch.setattr(loader, "multiplies_bfloat16", lambda: False)
    config = LlamaConfig(dtype="bfloat16")  # of 7 billion parameters, if it says nothing else

    def picked(memory_bytes: int) -> torch.dtype:
        monkeypatch.setattr(loader, "host_bytes", lambda: memory_bytes)
        device = torch.device("cpu")
        return loader._pick_dtype(EngineOptions(), config, device, 0, AutoModelForCausalLM)

    assert picked(64 << 30) is torch.float32
    assert picked(48 << 30) is torch.bfloat16, "in float32 it takes half of the memory"


def test_an_adapter_whose_config_is_damaged_is_said_so(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"base_model')
    with pytest.raises(EngineLoadError, match=r"adapter_config\.json is damaged"):
        load(tmp_path)


@pytest.mark.parametrize("kind", ["xpu", "npu"])
def test_memory_of_an_accelerator_is_its_own(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = SimpleNamespace(
        mem_get_info=lambda _: (3 << 30, 8 << 30), memory_allocated=lambda _: 2 << 30
    )
    monkeypatch.setattr(torch, kind, backend, raising=False)
    device = SimpleNamespace(type=kind)
    assert memory.free_bytes(device) == 3 << 30  # type: ignore[arg-type]
    assert memory.used_bytes(device) == 2 << 30  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_agrees_with_itself_within_its_tolerance(folder: Path, dtype: str) -> None:
    engine = load(folder, dtype=dtype)
    ids = tiny.prompts(6, seed=3)
    try:
        assert engine.capabilities.models[0].details["dtype"] == dtype
        assert engine.capabilities.models[0].details["scheduler"] == "slots"
        jobs = [tiny.ids_job(i, model="tiny-llama", max_tokens=1, logprobs=5) for i in ids]
        together = tiny.run(engine, jobs)
        alone = [
            tiny.run(engine, [tiny.ids_job(i, model="tiny-llama", max_tokens=1, logprobs=5)])[0]
            for i in ids
        ]
        for one, other in zip(together, alone, strict=True):
            assert one.logprobs[0].logprob == pytest.approx(other.logprobs[0].logprob, abs=0.15)
    finally:
        engine.close()


def test_images_are_served_in_half_precision(vision_folder: Path) -> None:
    engine = load(vision_folder, dtype="bfloat16")
    try:
        assert engine.capabilities.models[0].details["scheduler"] == "slots"
        job = tiny.chat_job("hello", [tiny.image(1)], model="tiny-llava")
        assert tiny.run(engine, [job])[0].reason is FinishReason.LENGTH
    finally:
        engine.close()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("bits", [8, 4])
def test_quantised_weights_serve_text_and_images(vision_folder: Path, bits: int) -> None:
    pytest.importorskip("bitsandbytes")
    engine = load(vision_folder, load_8bit=bits == 8, load_4bit=bits == 4)
    try:
        details = engine.capabilities.models[0].details
        assert details["quantised"] is True
        assert details["scheduler"] == "slots", details
        model = engine._served[0].loaded.model
        kinds = {type(m).__name__ for p, m in model.named_modules() if "language_model" in p}
        assert "Linear8bitLt" in kinds or "Linear4bit" in kinds
        for path, module in model.named_modules():
            if "vision_tower" in path or "projector" in path or path.endswith("lm_head"):
                assert "bit" not in type(module).__name__, path
        jobs = [
            tiny.chat_job("hello", [tiny.image(1)], model="tiny-llava"),
            tiny.chat_job("what is in this", model="tiny-llava"),
        ]
        assert [a.reason for a in tiny.run(engine, jobs)] == [FinishReason.LENGTH] * 2
    finally:
        engine.close()


def test_layers_that_are_not_quantised_are_named_by_their_full_path() -> None:
    from transformers.quantizers.quantizers_utils import should_convert_module

    model = tiny.llava(hidden=96)
    skip = modules_to_skip(model, bits=4, device=torch.device("cpu"))
    for path, module in model.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        inside = ".language_model." in path and module.in_features % 64 == 0
        assert should_convert_module(path, skip) is inside, path


def test_old_skip_names_mean_what_they_did() -> None:
    from transformers.quantizers.quantizers_utils import should_convert_module

    config = normalise_skip_names({"llm_int8_skip_modules": ["vision_tower", "lm_head"]})
    skip = config["llm_int8_skip_modules"]
    assert not should_convert_module("model.vision_tower.layers.0.fc1", skip)
    assert not should_convert_module("lm_head", skip)
    assert should_convert_module("model.language_model.layers.0.mlp.up_proj", skip)


# --- several models and adapters ------------------------------------------------------------------


def test_one_worker_serves_several_models(folder: Path, vision_folder: Path) -> None:
    engine = load(folder, vision_folder, model_names=(("text", "chat"), ("vision",)))
    ids = tiny.prompts(1)[0]
    try:
        assert [info.name for info in engine.capabilities.models] == ["text", "chat", "vision"]
        text, chat, vision = tiny.run(
            engine,
            [
                tiny.ids_job(ids, model="text"),
                tiny.ids_job(ids, model="chat"),
                tiny.chat_job("hello", [tiny.image(1)], model="vision"),
            ],
        )
        assert text.token_ids == chat.token_ids == plain(tiny.llama(), ids, 12)
        assert vision.reason is FinishReason.LENGTH
    finally:
        engine.close()


@pytest.fixture(scope="module")
def adapters(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    peft = pytest.importorskip("peft")
    result = {}
    for seed, name in enumerate(("red", "blue")):
        torch.manual_seed(seed)
        config = peft.LoraConfig(
            r=4, lora_alpha=16, target_modules=["q_proj", "v_proj", "down_proj"]
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            model = peft.get_peft_model(tiny.llama(), config)
        with torch.no_grad():
            for path, parameter in model.named_parameters():
                if "lora_B" in path:
                    parameter.normal_(0.0, 0.2)
        result[name] = tmp_path_factory.mktemp("adapters") / name
        model.peft_config["default"].base_model_name_or_path = str(folder)
        model.save_pretrained(result[name])
    return result


# peft uses names that transformers is about to change.
PEFT = pytest.mark.filterwarnings("ignore::FutureWarning")


def merged(adapter: Path) -> Any:
    from peft import PeftModel

    return PeftModel.from_pretrained(tiny.llama(), str(adapter)).merge_and_unload().eval()


@PEFT
def test_an_adapter_is_merged_into_its_base(folder: Path, adapters: dict[str, Path]) -> None:
    ids = tiny.prompts(1)[0]
    wanted = plain(merged(adapters["red"]), ids, 12)
    for options in ({"model_base": str(folder)}, {}):
        engine = load(adapters["red"], **options)
        try:
            answer = tiny.run(engine, [tiny.ids_job(ids, model="red")])[0]
            assert answer.token_ids == wanted != plain(tiny.llama(), ids, 12)
        finally:
            engine.close()


@PEFT
def test_several_adapters_and_their_base_share_one_batch(
    folder: Path, adapters: dict[str, Path]
) -> None:
    text = ",".join(f"{name}={path}" for name, path in adapters.items())
    engine = load(folder, engine_args={"adapters": text})
    prompts = tiny.prompts(6, seed=6)
    names = ["tiny-llama", "red", "blue"] * 2
    models = {
        "tiny-llama": tiny.llama(),
        "red": merged(adapters["red"]),
        "blue": merged(adapters["blue"]),
    }
    try:
        assert {info.name for info in engine.capabilities.models} == set(names)
        assert engine.capabilities.models[0].details["scheduler"] == "slots"
        answers = tiny.run(
            engine,
            [tiny.ids_job(i, model=n) for i, n in zip(prompts, names, strict=True)],
            every=[0, 1, 0, 2, 0, 1],
        )
        wanted = [plain(models[n], i, 12) for i, n in zip(prompts, names, strict=True)]
        assert [a.token_ids for a in answers] == wanted
        # The same prompt to two adapters must not share its prefix.
        same = [tiny.ids_job(prompts[0] * 2, model=name) for name in models]
        together = [tiny.run(engine, [job])[0] for job in same]
        assert [a.token_ids for a in together] == [
            plain(models[name], prompts[0] * 2, 12) for name in models
        ]
    finally:
        engine.close()


# --- what libraries say ---------------------------------------------------------------------------


def test_known_noise_of_libraries_is_hidden_and_their_other_warnings_are_shown(
    caplog: pytest.LogCaptureFixture,
) -> None:
    quiet_libraries()
    logger = logging.getLogger("transformers.utils.import_utils")
    with caplog.at_level(logging.WARNING, "transformers"):
        logger.addHandler(caplog.handler)
        logger.warning("`X` requires torchvision (not installed); falling back to `XPil` ...")
        logger.warning("something is wrong with the weights")
        logger.removeHandler(caplog.handler)
    assert "torchvision" not in caplog.text and "weights" in caplog.text


def test_a_wrong_path_is_an_error_before_torch_is_imported() -> None:
    code = (
        "import sys\n"
        "from worker.engines.base import EngineLoadError, EngineOptions\n"
        "from worker.engines.transformers import build\n"
        "try: build(EngineOptions('transformers', model_paths=('./nowhere',)), print)\n"
        "except EngineLoadError as error: print(error)\n"
        "sys.exit('torch' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "there is no folder ./nowhere" in done.stdout
    assert done.returncode == 0, done.stderr


def test_an_engine_without_its_packages_says_how_to_install_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from worker.engines import registry
    from worker.engines.transformers import build

    monkeypatch.setattr(registry, "find_spec", lambda name: None if name == "torch" else object())
    with pytest.raises(EngineLoadError, match=r"'torch'.*pip install .*\[worker\]"):
        build(EngineOptions("transformers"), lambda fraction, note: None)
