"""A LLaVA from what its project saves: projector or LoRA folder, beside a language model."""

from __future__ import annotations

import json
import shutil
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.engines import tiny
from worker.engines.base import EngineLoadError, EngineOptions
from worker.engines.transformers import build
from worker.engines.transformers.loaded import LoadedModel
from worker.engines.transformers.loader import load_model
from worker.engines.transformers.settings import EngineSettings

PROJECTOR = {"linear_1": "0", "linear_2": "2"}


def language_model(whole: Any) -> Any:
    """The language model of a LLaVA, separately."""
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM(whole.config.text_config)
    model.model.load_state_dict(whole.model.language_model.state_dict())
    model.lm_head.load_state_dict(whole.lm_head.state_dict())
    return model.eval()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("parts") / "vicuna"
    language_model(tiny.llava()).save_pretrained(path)
    tiny.tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def tower(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("parts") / "clip"
    tiny.llava().model.vision_tower.save_pretrained(path)
    tiny.llava_processor().image_processor.save_pretrained(path)
    return path


def facts(tower: Path, **more: Any) -> dict[str, Any]:
    """config.json as the LLaVA project writes it."""
    return {
        "model_type": "llava_llama",
        "architectures": ["LlavaLlamaForCausalLM"],
        "mm_vision_tower": str(tower),
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
    } | more


def projector_weights(whole: Any, prefix: str = "model.mm_projector.") -> dict[str, Any]:
    """The projector under the LLaVA project's names."""
    result = {}
    for name, tensor in whole.model.multi_modal_projector.state_dict().items():
        layer, _, rest = name.partition(".")
        result[f"{prefix}{PROJECTOR[layer]}.{rest}"] = tensor.clone()
    return result


def write(folder: Path, config: dict[str, Any], name: str, weights: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if name.endswith(".bin"):
        torch.save(weights, folder / name)
    else:
        save_file(weights, folder / name)
    return folder


def load(folder: Path, base: Path | None, **settings: Any) -> LoadedModel:
    options = EngineOptions(device="cpu", model_base=None if base is None else str(base))
    return load_model(str(folder), options, EngineSettings(**settings), lambda share, note: None)


@torch.inference_mode()
def logits(model: Any, processor: Any, image_id: int | None = None) -> torch.Tensor:
    """The logits after a text with a wide image."""
    image = Image.linear_gradient("L").resize((60, 40)).convert("RGB")
    inputs = processor(text=["what is <image> in this"], images=[image], return_tensors="pt")
    if image_id is not None:
        assert int((inputs["input_ids"] == image_id).sum()) == 4
    return model(**inputs).logits


@pytest.mark.parametrize("name", ["mm_projector.safetensors", "mm_projector.bin"])
def test_a_projector_and_its_base_are_the_llava_they_were_taken_from(
    name: str, base: Path, tower: Path, tmp_path: Path
) -> None:
    whole = tiny.llava()
    folder = write(tmp_path / "llava-pretrain", facts(tower), name, projector_weights(whole))
    loaded = load(folder, base, safetensors_only=name.endswith(".safetensors"))
    assert loaded.details["architecture"] == "LlavaForConditionalGeneration"
    assert loaded.takes_images
    assert not any(tensor.is_meta for tensor in loaded.model.state_dict().values())
    wanted = logits(whole, tiny.llava_processor())
    assert torch.equal(logits(loaded.model, loaded.processor), wanted)


def test_an_assembled_llava_answers_questions_on_images_in_the_batch(
    base: Path, tower: Path, tmp_path: Path
) -> None:
    weights = projector_weights(tiny.llava())
    folder = write(tmp_path / "mine", facts(tower), "mm_projector.safetensors", weights)
    engine = build(
        EngineOptions(
            model_paths=(str(folder),),
            model_base=str(base),
            device="cpu",
            engine_args={"kv_tokens": "4096"},
        ),
        lambda share, note: None,
    )
    direct = tiny.serve(tiny.llava(), processor=tiny.llava_processor(), name="mine")
    try:
        assert engine.capabilities.models[0].details["scheduler"] == "slots"
        jobs = [tiny.chat_job("hello", [tiny.image(i)], model="mine") for i in range(3)]
        answers = [answer.token_ids for answer in tiny.run(engine, jobs)]  # type: ignore[arg-type]
        assert answers == [answer.token_ids for answer in tiny.run(direct, jobs)]
    finally:
        engine.close()
        direct.close()


def test_a_base_without_image_token_and_template_is_given_both(
    base: Path, tower: Path, tmp_path: Path
) -> None:
    whole = tiny.llava()
    words = len(tiny.tokenizer())
    plain = tmp_path / "plain"
    small = language_model(whole)
    small.resize_token_embeddings(words)
    small.save_pretrained(plain)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        text = (base / name).read_text().replace('"<image>"', '"<spare>"')
        (plain / name).write_text(text)
    weights = projector_weights(whole)
    folder = write(tmp_path / "llava", facts(tower), "mm_projector.safetensors", weights)
    loaded = load(folder, plain)
    assert loaded.placeholder_ids == {words}
    assert loaded.vocabulary == words + 1
    found = logits(loaded.model, loaded.processor, image_id=words)
    wanted = logits(whole, tiny.llava_processor())
    torch.testing.assert_close(found[..., :words], wanted[..., :words])
    text = loaded.processor.apply_chat_template(
        [
            {"role": "user", "content": [{"type": "text", "text": "what?"}, {"type": "image"}]},
            {"role": "assistant", "content": "a fox"},
            {"role": "user", "content": "why?"},
        ],
        tokenize=False,
        add_generation_prompt=True,
    )
    assert text.endswith(
        "human's questions. USER: <image>\nwhat? ASSISTANT: a fox<|end|>USER: why? ASSISTANT:"
    )


def test_images_are_padded_to_a_square_if_the_folder_says_so(
    base: Path, tower: Path, tmp_path: Path
) -> None:
    weights = projector_weights(tiny.llava())
    config = facts(tower, image_aspect_ratio="pad")
    folder = write(tmp_path / "padded", config, "mm_projector.safetensors", weights)
    loaded = load(folder, base)
    wide = Image.new("RGB", (56, 28), "white")
    pixels = loaded.processor.image_processor(wide, return_tensors="pt")["pixel_values"][0]
    assert pixels.shape == (3, 28, 28)
    # The mean colour of CLIP is 0 once normalised: above and below the image.
    assert pixels[:, 0, :].abs().max() < 0.02 and pixels[:, 14, :].min() > 1.5


@pytest.mark.parametrize(("kind", "layers"), [("linear", 1), ("mlp3x_gelu", 3)])
def test_projectors_of_other_depths_are_computed_as_the_llava_project_does(
    kind: str, layers: int, base: Path, tower: Path, tmp_path: Path
) -> None:
    torch.manual_seed(5)
    sizes = [32] + [64] * layers
    modules: list[torch.nn.Module] = []
    for index in range(layers):
        modules += [torch.nn.GELU()] if index else []
        modules.append(torch.nn.Linear(sizes[index], sizes[index + 1]))
    projector = modules[0] if layers == 1 else torch.nn.Sequential(*modules)
    weights = {f"model.mm_projector.{n}": t.clone() for n, t in projector.state_dict().items()}
    config = facts(tower, mm_projector_type=kind)
    folder = write(tmp_path / "other", config, "mm_projector.safetensors", weights)
    loaded = load(folder, base)
    whole = tiny.llava()
    whole.model.multi_modal_projector = projector
    assert torch.equal(
        logits(loaded.model, loaded.processor), logits(whole, tiny.llava_processor())
    )


@pytest.fixture(scope="module")
def tuned(base: Path, tower: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A LoRA folder of the LLaVA project, and the whole model that it stands for."""
    peft = pytest.importorskip("peft")
    whole = tiny.llava()
    torch.manual_seed(3)
    config = peft.LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "v_proj"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model = peft.get_peft_model(language_model(whole), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0.0, 0.2)
        for parameter in whole.model.multi_modal_projector.parameters():
            parameter.add_(0.1)
    folder = tmp_path_factory.mktemp("tuned") / "llava-lora"
    model.peft_config["default"].base_model_name_or_path = str(base)
    model.save_pretrained(folder)
    weights = projector_weights(whole, "base_model.model.model.mm_projector.")
    write(folder, facts(tower), "non_lora_trainables.bin", weights)
    merged = model.merge_and_unload()
    whole.model.language_model.load_state_dict(merged.model.state_dict())
    return folder, whole


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("named", [True, False], ids=["with --model-base", "base of the adapter"])
def test_a_lora_folder_is_merged_into_language_model_and_projector(
    named: bool, tuned: tuple[Path, Any], base: Path
) -> None:
    folder, whole = tuned
    loaded = load(folder, base if named else None, safetensors_only=False)
    wanted = logits(whole, tiny.llava_processor())
    torch.testing.assert_close(logits(loaded.model, loaded.processor), wanted)
    assert not torch.allclose(wanted, logits(tiny.llava(), tiny.llava_processor()), atol=0.1)


@pytest.mark.parametrize(
    ("missing", "words"),
    [
        ("config.json", "incomplete LLaVA.*config.json"),
        ("non_lora_trainables.bin", "incomplete LLaVA.*projector"),
        ("adapter_config.json", "incomplete LLaVA.*adapter_config.json"),
    ],
)
def test_half_of_a_lora_folder_is_refused(
    missing: str, words: str, tuned: tuple[Path, Any], base: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "half"
    shutil.copytree(tuned[0], folder)
    (folder / missing).unlink()
    with pytest.raises(EngineLoadError, match=words):
        load(folder, base, safetensors_only=False)


def test_a_checkpoint_of_a_run_has_the_adapter_alone_and_is_refused(
    tuned: tuple[Path, Any], base: Path, tmp_path: Path
) -> None:
    for parent, finished in (("run", True), ("llava-lora", False)):
        folder = tmp_path / parent / "checkpoint-10"
        folder.mkdir(parents=True)
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            shutil.copy(tuned[0] / name, folder)
        if finished:
            shutil.copy(tuned[0] / "non_lora_trainables.bin", folder.parent)
        with pytest.raises(EngineLoadError, match="incomplete LLaVA"):
            load(folder, base)


def test_an_adapter_alone_over_a_whole_llava_is_refused(
    tuned: tuple[Path, Any], tower: Path, tmp_path: Path
) -> None:
    whole = original(tmp_path / "whole", tiny.llava(), facts(tower))
    folder = tmp_path / "adapter"
    folder.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(tuned[0] / name, folder)
    with pytest.raises(EngineLoadError, match="incomplete LLaVA"):
        load(folder, whole)


def test_a_vision_tower_without_a_weight_is_refused(
    base: Path, tower: Path, tmp_path: Path
) -> None:
    damaged = tmp_path / "clip"
    shutil.copytree(tower, damaged)
    weights = load_file(damaged / "model.safetensors")
    lost = next(name for name in weights if name.endswith("layers.1.mlp.fc1.weight"))
    del weights[lost]
    save_file(weights, damaged / "model.safetensors", metadata={"format": "pt"})
    folder = write(
        tmp_path / "mine",
        facts(damaged),
        "mm_projector.safetensors",
        projector_weights(tiny.llava()),
    )
    with pytest.raises(EngineLoadError, match=r"layers\.1\.mlp\.fc1\.weight"):
        load(folder, base)


@pytest.mark.filterwarnings("ignore")
def test_a_lora_folder_is_not_rounded_with_its_quantised_language_model(
    tuned: tuple[Path, Any], base: Path
) -> None:
    pytest.importorskip("bitsandbytes")
    from peft import PeftModel

    folder, whole = tuned
    options = EngineOptions(device="cpu", dtype="float32", load_4bit=True, model_base=str(base))
    settings = EngineSettings(safetensors_only=False)
    loaded = load_model(str(folder), options, settings, lambda share, note: None)
    quantised = load_model(
        str(base), replace(options, model_base=None), settings, lambda share, note: None
    ).model
    with_it = PeftModel.from_pretrained(quantised, str(folder)).get_base_model()
    whole.model.language_model, whole.lm_head = with_it.model, with_it.lm_head
    wanted = logits(whole, tiny.llava_processor())
    torch.testing.assert_close(logits(loaded.model, loaded.processor), wanted)


def test_pickled_weights_are_refused_unless_they_are_asked_for(
    tuned: tuple[Path, Any], base: Path
) -> None:
    with pytest.raises(EngineLoadError, match=r"non_lora_trainables\.bin.*safetensors_only=false"):
        load(tuned[0], base)


def test_a_pickle_that_would_run_code_is_never_run(base: Path, tower: Path, tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "ran",))

    folder = write(tmp_path / "bad", facts(tower), "mm_projector.bin", {"mm_projector.0": Bomb()})
    with pytest.raises(EngineLoadError, match="something other than tensors"):
        load(folder, base, safetensors_only=False)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"mm_use_im_start_end": True}, "im_start"),
        ({"image_aspect_ratio": "anyres"}, "LLaVA-NeXT"),
        ({"mm_projector_type": "resampler"}, "mlpNx_gelu"),
        ({"mm_projector_type": "mlp3x_gelu"}, "lacks weights: 4"),
    ],
)
def test_the_error_for_parts_that_do_not_fit_says_why(
    change: dict[str, Any], words: str, base: Path, tower: Path, tmp_path: Path
) -> None:
    weights = projector_weights(tiny.llava())
    folder = write(tmp_path / "odd", facts(tower, **change), "mm_projector.safetensors", weights)
    with pytest.raises(EngineLoadError, match=words):
        load(folder, base)


def test_a_projector_without_its_base_asks_for_it(tower: Path, tmp_path: Path) -> None:
    weights = projector_weights(tiny.llava())
    folder = write(tmp_path / "alone", facts(tower), "mm_projector.safetensors", weights)
    with pytest.raises(EngineLoadError, match="--model-base"):
        load(folder, None)


def test_a_projector_for_another_base_is_refused(base: Path, tower: Path, tmp_path: Path) -> None:
    weights = projector_weights(tiny.llava(hidden=96))
    folder = write(tmp_path / "wide", facts(tower), "mm_projector.safetensors", weights)
    with pytest.raises(EngineLoadError, match=r"does not fit this --model-base.*size mismatch"):
        load(folder, base)


# --- whole checkpoints in the LLaVA project's format ----------------------------------------------


def original(
    folder: Path, whole: Any, config: dict[str, Any], *, with_tower: bool = False, end: str = ""
) -> Path:
    """`whole` as the LLaVA project saves it, in two files."""
    text = whole.config.text_config.to_dict()
    text = {name: text[name] for name in text if name not in ("model_type", "architectures")}
    # Of version 1.5 on the type is the one that transformers gave to its own class later.
    config = text | config | {"model_type": config.get("model_type", "llava")}
    weights = {name: t.clone() for name, t in language_model(whole).state_dict().items()}
    weights |= projector_weights(whole)
    if with_tower:
        for name, tensor in whole.model.vision_tower.state_dict().items():
            name = name.removeprefix("vision_model.")
            weights[f"model.vision_tower.vision_tower.vision_model.{name}"] = tensor.clone()
    names = sorted(weights)
    halves = names[: len(names) // 2], names[len(names) // 2 :]
    end = end or ".safetensors"
    stem = "pytorch_model" if end == ".bin" else "model"
    places = {}
    for number, half in enumerate(halves, 1):
        file = f"{stem}-{number:05}-of-00002{end}"
        write(folder, config, file, {name: weights[name] for name in half})
        places |= dict.fromkeys(half, file)
    index = {"metadata": {"total_size": 1}, "weight_map": places}
    (folder / f"{stem}{end}.index.json").write_text(json.dumps(index))
    tiny.tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["llava", "llava_llama"])
@pytest.mark.parametrize("end", [".safetensors", ".bin"])
def test_a_whole_checkpoint_is_the_same_model_as_in_transformers_format(
    kind: str, end: str, tower: Path, tmp_path: Path
) -> None:
    whole = tiny.llava()
    config = facts(tower, model_type=kind)
    folder = original(tmp_path / "llava-v1.5-tiny", whole, config, end=end)
    loaded = load(folder, None, safetensors_only=end != ".bin")
    assert loaded.details["architecture"] == "LlavaForConditionalGeneration"
    assert torch.equal(
        logits(loaded.model, loaded.processor), logits(whole, tiny.llava_processor())
    )


@pytest.mark.parametrize(
    ("part", "words"),
    [
        ("layers.1.mlp.up_proj", r"lacks .*layers\.1\.mlp\.up_proj"),
        ("lm_head", "lacks .*lm_head"),
        ("mm_projector.2", "lacks weights: linear_2"),
        ("mm_projector", "no weights of a projector"),
    ],
)
def test_a_whole_checkpoint_without_a_weight_is_refused(
    part: str, words: str, tower: Path, tmp_path: Path
) -> None:
    folder = original(tmp_path / "llava-v1.5-tiny", tiny.llava(), facts(tower))
    index = folder / "model.safetensors.index.json"
    places = json.loads(index.read_text())
    places["weight_map"] = {k: v for k, v in places["weight_map"].items() if part not in k}
    index.write_text(json.dumps(places))
    for file in folder.glob("*.safetensors"):
        kept = {k: v for k, v in load_file(file).items() if part not in k}
        save_file(kept, file, metadata={"format": "pt"})
    with pytest.raises(EngineLoadError, match=words):
        load(folder, None)


def test_a_whole_checkpoint_answers_as_in_transformers_format(tower: Path, tmp_path: Path) -> None:
    whole = tiny.llava()
    folder = original(tmp_path / "theirs", whole, facts(tower))
    converted = tmp_path / "ours"
    whole.save_pretrained(converted)
    tiny.llava_processor().save_pretrained(converted)
    engine = build(
        EngineOptions(
            model_paths=(str(folder), str(converted)),
            device="cpu",
            engine_args={"kv_tokens": "4096"},
        ),
        lambda share, note: None,
    )
    try:
        answers = []
        for name in ("theirs", "ours"):
            jobs = [tiny.chat_job("hello", [tiny.image(i)], model=name) for i in range(3)]
            jobs.append(tiny.chat_job("no picture", model=name))
            answers.append([answer.token_ids for answer in tiny.run(engine, jobs)])
        assert answers[0] == answers[1]
        assert len({tuple(ids) for ids in answers[0]}) > 1
    finally:
        engine.close()


def test_a_tower_among_the_weights_takes_precedence_over_the_named_one(
    tower: Path, tmp_path: Path
) -> None:
    whole = tiny.llava()
    with torch.no_grad():
        for parameter in whole.model.vision_tower.parameters():
            parameter.mul_(1.1)
    # Only sizes and preprocessing come from the named folder: its weights are not needed.
    bare = tmp_path / "bare"
    bare.mkdir()
    for file in tower.glob("*.json"):
        (bare / file.name).write_bytes(file.read_bytes())
    folder = original(tmp_path / "tuned", whole, facts(bare), with_tower=True)
    loaded = load(folder, None)
    assert torch.equal(
        logits(loaded.model, loaded.processor), logits(whole, tiny.llava_processor())
    )


def test_sizes_of_a_clip_tower_among_the_weights_are_those_of_its_weights(tmp_path: Path) -> None:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    whole = tiny.llava()
    torch.manual_seed(7)
    vision = CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
    )
    whole.config.vision_config = vision
    whole.model.vision_tower = CLIPVisionModel(vision).eval()
    whole.model.multi_modal_projector.linear_1 = torch.nn.Linear(128, 64)
    config = facts(Path("openai/clip-vit-tiny-patch14"))
    folder = original(tmp_path / "offline", whole, config, with_tower=True)
    loaded = load(folder, None)
    assert torch.equal(
        logits(loaded.model, loaded.processor), logits(whole, tiny.llava_processor())
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"mm_vision_tower": "openai/clip-vit-large-patch14-336"}, "load it once while online"),
        ({"mm_vision_tower": "towers/missing"}, "names the vision tower towers/missing"),
        ({"mm_patch_merge_type": "spatial_unpad"}, "llava-hf"),
        ({"model_type": "llava_mpt"}, "LLaVA of type 'llava_mpt'"),
    ],
)
def test_a_whole_checkpoint_that_cannot_be_read_says_why(
    change: dict[str, Any], words: str, tower: Path, tmp_path: Path
) -> None:
    folder = original(tmp_path / "odd", tiny.llava(), facts(tower) | change)
    with pytest.raises(EngineLoadError, match=words):
        load(folder, None)
