"""Reads checkpoints of the LLaVA project and converts them to transformers' own LLaVA.

Such a folder contains either a whole language model with the projector among its weights, or only
what was trained: the projector (`mm_projector`), or a LoRA adapter and everything trained with it
(`non_lora_trainables`); `--model-base` then names the language model. The vision tower is among the
weights or named in config.json (see `tower`). Names of weights are the LLaVA project's. Must never
unpickle anything but tensors, or read a pickle that was not requested.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from worker.engines.base import EngineLoadError
from worker.engines.common.failures import one_line
from worker.engines.transformers.loading.tower import load_tower

__all__ = [
    "LLAVA_TEMPLATE",
    "LlavaParts",
    "assemble",
    "find_parts",
    "language_config",
    "refuse_incomplete_llava",
]

_WEIGHTS = ("non_lora_trainables", "mm_projector")
_WHOLE = ("model*.safetensors", "pytorch_model*.bin")
_LANGUAGE_MODELS = {"llava": "llama", "llava_llama": "llama", "llava_mistral": "mistral"}
"""The LLaVA project's `model_type` and transformers' for the same language model."""
_IMAGE_TOKEN = "<image>"

LLAVA_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}"
    "A chat between a curious human and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the human's questions. {% endif %}"
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}USER: {% elif message['role'] == 'assistant' %}ASSISTANT: "
    "{% endif %}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ '<image>\n' }}"
    "{% endif %}{% endfor %}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}"
    "{% endif %}{% endfor %}{% endif %}"
    "{{ eos_token if message['role'] == 'assistant' else ' ' }}"
    "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
"""LLaVA's conversation format "v1", for language models without a chat template of their own."""


@dataclass(frozen=True, slots=True)
class LlavaParts:
    """A checkpoint folder of the LLaVA project."""

    folder: Path
    #: Contents of its config.json.
    facts: dict[str, Any]
    #: Files with the projector and everything else that was trained in full.
    weights: tuple[Path, ...]
    #: Whether the folder contains a LoRA adapter for the language model.
    has_adapter: bool
    #: Whether the weights include the language model.
    whole: bool


def find_parts(folder: Path, *, safetensors_only: bool) -> LlavaParts | None:
    """The parts in `folder`, or None if it is not a folder of the LLaVA project (a model in
    transformers' own format is not one). Raises `EngineLoadError` for incomplete folders, for
    pickles if only safetensors are wanted, and for LLaVAs that transformers' class cannot
    compute."""
    try:
        facts = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        return None
    if not isinstance(facts, dict) or "mm_vision_tower" not in facts:
        return None
    found: list[Path] = []
    for pattern in _WHOLE:
        found = found or sorted(folder.glob(pattern))
    whole = bool(found)
    if not whole:
        trained = [folder / (name + end) for name in _WEIGHTS for end in (".safetensors", ".bin")]
        found = [file for file in trained if file.is_file()][:1]
    has_adapter = not whole and (folder / "adapter_config.json").is_file()
    if not found:
        files = "non_lora_trainables.bin beside its adapter" if has_adapter else "mm_projector.bin"
        raise EngineLoadError(
            f"{folder} is an incomplete LLaVA: its config.json names a vision tower, but the "
            f"projector ({files}) is missing; copy the whole folder"
        )
    if not whole and not has_adapter and found[0].stem == _WEIGHTS[0]:
        raise EngineLoadError(
            f"{folder} is an incomplete LLaVA: {found[0].name} was trained together with a LoRA "
            "adapter, but adapter_config.json is missing; copy the whole folder"
        )
    pickles = [file for file in found if file.suffix == ".bin"]
    if has_adapter and not (folder / "adapter_model.safetensors").is_file():
        pickles.append(folder / "adapter_model.bin")
    if pickles and safetensors_only:
        raise EngineLoadError(
            f"{folder} holds pickled weights ({', '.join(file.name for file in pickles)}): "
            "convert them to safetensors, or pass --engine-arg safetensors_only=false"
        )
    if facts.get("mm_use_im_start_end"):
        raise EngineLoadError(
            f"{folder} marks images with <im_start> and <im_end> (mm_use_im_start_end), which "
            "transformers' LLaVA does not: only projectors trained without them can be served"
        )
    if facts.get("image_aspect_ratio") == "anyres" or facts.get("mm_patch_merge_type") not in (
        None,
        "flat",
    ):
        raise EngineLoadError(
            f"{folder} is a LLaVA-NeXT (images in tiles) in the LLaVA project's format, in which "
            "only 1.0 and 1.5 are supported: use the model in transformers' format (llava-hf on "
            "the hub)"
        )
    return LlavaParts(folder, facts, tuple(found), has_adapter, whole)


def refuse_incomplete_llava(folder: Path) -> None:
    """Raise `EngineLoadError` for a LLaVA adapter without its config.json: it would be merged into
    a language model that cannot see images. Such an adapter is recognised by a trained projector
    next to it (or next to the `checkpoint-N` folder that contains it), or by "llava" in the
    folder's name, which is how the LLaVA project itself recognises it."""
    place = folder.resolve()
    beside = [place, place.parent] if place.name.startswith("checkpoint-") else [place]
    for one in beside:
        trained = [one / (name + end) for name in _WEIGHTS for end in (".safetensors", ".bin")]
        if any(file.is_file() for file in trained) or "llava" in one.name.lower():
            raise EngineLoadError(
                f"{folder} is an incomplete LLaVA: the adapter alone cannot see images, and "
                "config.json and the projector (non_lora_trainables.bin) are missing; copy the "
                "whole folder of the finished run"
            )


def language_config(parts: LlavaParts) -> Any:
    """Transformers' configuration of the language model in a whole checkpoint."""
    from transformers import AutoConfig

    kind = _LANGUAGE_MODELS.get(str(parts.facts.get("model_type")))
    if kind is None:
        raise EngineLoadError(
            f"{parts.folder} is a LLaVA of type {parts.facts.get('model_type')!r}: in the LLaVA "
            f"project's format, only {', '.join(sorted(_LANGUAGE_MODELS))} are supported"
        )
    strange = ("model_type", "architectures", "auto_map", "transformers_version")
    own = {
        name: value
        for name, value in parts.facts.items()
        if name not in strange and not name.startswith(("mm_", "tune_mm_"))
    }
    return AutoConfig.for_model(kind, **own)


def assemble(
    parts: LlavaParts,
    language_model: Any,
    tokenizer: Any,
    *,
    safetensors_only: bool = True,
    attention: str | None = None,
) -> tuple[Any, Any]:
    """The model and its processor.

    `language_model` must have its output head, be on its device and have the folder's adapter
    already merged; its modules are reused, not copied. `attention` None means transformers' choice.
    Raises `EngineLoadError` if the parts do not fit together, and whatever transformers raises for
    the tower.
    """
    from transformers import GenerationConfig, LlavaConfig, LlavaForConditionalGeneration

    source = parts.weights[0] if len(parts.weights) == 1 else parts.folder
    projector_state, tower_state, language_state = _sorted_weights(parts)
    if not projector_state:
        raise EngineLoadError(f"{source} holds no weights of a projector (mm_projector)")
    tower, images = load_tower(
        parts.folder,
        str(parts.facts["mm_vision_tower"]),
        tower_state,
        device=language_model.device,
        dtype=language_model.dtype,
        attention=attention,
        safetensors_only=safetensors_only,
    )
    image_token_id = _add_image_token(language_model, tokenizer)
    classes = tower.config.model_type == "clip_vision_model"
    whole = not classes or parts.facts.get("mm_vision_select_feature") == "cls_patch"
    patches = (tower.config.image_size // tower.config.patch_size) ** 2
    config = LlavaConfig(
        vision_config=tower.config,
        text_config=language_model.config,
        image_token_index=image_token_id,
        image_seq_length=patches + (1 if classes and whole else 0),
        vision_feature_layer=parts.facts.get("mm_vision_select_layer", -2),
        vision_feature_select_strategy="full" if whole else "default",
        tie_word_embeddings=bool(getattr(language_model.config, "tie_word_embeddings", False)),
    )
    config.architectures = [LlavaForConditionalGeneration.__name__]
    with torch.device("meta"):
        model = LlavaForConditionalGeneration._from_config(
            config, **({"attn_implementation": attention} if attention else {})
        )
    projector = _projector(parts, model.model.multi_modal_projector, tower, language_model)
    _fill(projector, projector_state, source)
    _fill(language_model, language_state, source, complete=False)
    # The modules replace those on the meta device, so nothing is in memory twice.
    model.model.multi_modal_projector = projector
    model.model.vision_tower = tower
    model.model.language_model = language_model.base_model
    model.lm_head = language_model.get_output_embeddings()
    model.generation_config = getattr(language_model, "generation_config", GenerationConfig())
    if tokenizer.chat_template is None:
        tokenizer.chat_template = LLAVA_TEMPLATE
    return model.eval(), _processor(parts, images, config, tokenizer, classes=classes)


# --- weights --------------------------------------------------------------------------------------


def _sorted_weights(
    parts: LlavaParts,
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Weights of projector, tower and language model, under the names of those modules; those of
    the language model are left out if transformers reads them itself."""
    state: dict[str, Any] = {}
    for file in parts.weights:
        state |= _tensors(file, _of_images if parts.whole else None)
    projector: dict[str, Any] = {}
    tower: dict[str, Any] = {}
    language: dict[str, Any] = {}
    for name, tensor in state.items():
        name = name.removeprefix("base_model.").removeprefix("module.")
        if name.startswith("model.model.") or name.startswith("model.lm_head."):
            name = name.removeprefix("model.")
        if "mm_projector." in name:
            projector[name.split("mm_projector.", 1)[1]] = tensor
        elif "vision_tower.vision_tower." in name:
            tower[name.split("vision_tower.vision_tower.", 1)[1]] = tensor
        else:
            language[name] = tensor
    return projector, tower, language


def _of_images(name: str) -> bool:
    return "mm_projector." in name or "vision_tower." in name


def _tensors(file: Path, wanted: Callable[[str], bool] | None) -> dict[str, Any]:
    """The tensors of a file, or only those whose names are wanted."""
    if file.suffix == ".safetensors":
        from safetensors import safe_open

        with safe_open(file, framework="pt") as held:
            names = [name for name in held.keys() if wanted is None or wanted(name)]  # noqa: SIM118
            return {name: held.get_tensor(name) for name in names}
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception:  # including the unpickler's own error, which is not imported here
        raise EngineLoadError(
            f"{file} was not loaded: it is damaged, or contains something other than tensors"
        ) from None
    return {name: state[name] for name in state if wanted is None or wanted(name)}


def _projector(parts: LlavaParts, own: nn.Module, tower: Any, language_model: Any) -> nn.Module:
    """A projector without weights, of the kind that config.json names, on the language model's
    device. Its weights have the LLaVA project's names or transformers' (see `_fill`)."""
    kind = str(parts.facts.get("mm_projector_type", "linear"))
    inside, outside = tower.config.hidden_size, language_model.config.hidden_size
    place = {"device": language_model.device, "dtype": tower.dtype}
    if kind == "mlp2x_gelu":
        return own.to_empty(device=place["device"]).to(place["dtype"])
    if kind == "linear":
        return nn.Linear(inside, outside, **place)
    depth = kind.removeprefix("mlp").removesuffix("x_gelu")
    if not depth.isdigit():
        raise EngineLoadError(
            f"{parts.folder} has a projector of kind {kind!r}: only linear and mlpNx_gelu are "
            "supported"
        )
    layers: list[nn.Module] = [nn.Linear(inside, outside, **place)]
    for _ in range(1, int(depth)):
        layers += [nn.GELU(), nn.Linear(outside, outside, **place)]
    return nn.Sequential(*layers)


_OWN_NAMES = {"0": "linear_1", "2": "linear_2"}
"""Transformers' names for the layers of the usual projector."""


def _fill(module: nn.Module, state: dict[str, Any], source: Path, *, complete: bool = True) -> None:
    """Copy `state` into `module`. `complete`: every weight of the module must be in it. Raises
    `EngineLoadError`."""
    if hasattr(module, "linear_1"):
        renamed = {}
        for name, tensor in state.items():
            layer, _, rest = name.partition(".")
            renamed[f"{_OWN_NAMES.get(layer, layer)}.{rest}"] = tensor
        state = renamed
    try:
        left_out, unknown = module.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise EngineLoadError(
            f"{source} does not fit this --model-base: {one_line(error, 300)}"
        ) from None
    if unknown or (complete and left_out):
        names = ", ".join(sorted(unknown or left_out)[:3])
        raise EngineLoadError(
            f"{source} {'holds unknown weights' if unknown else 'lacks weights'}: {names}"
        )


# --- tokenizer, processor ------------------------------------------------------------------------


def _add_image_token(language_model: Any, tokenizer: Any) -> int:
    """The id of `<image>`, which is added to tokenizer and model if they lack it. Its embedding is
    never used (images replace it) and it is never sampled, so the new rows are zero."""
    from tokenizers import AddedToken

    if _IMAGE_TOKEN not in tokenizer.get_vocab():
        token = AddedToken(_IMAGE_TOKEN, special=True, normalized=False)
        tokenizer.add_tokens([token], special_tokens=True)
    token_id = int(tokenizer.convert_tokens_to_ids(_IMAGE_TOKEN))
    rows = language_model.get_input_embeddings().num_embeddings
    if token_id >= rows:
        language_model.resize_token_embeddings(token_id + 1, mean_resizing=False)
        with torch.no_grad():
            for layer in (
                language_model.get_input_embeddings(),
                language_model.get_output_embeddings(),
            ):
                layer.weight[rows:] = 0.0
    return token_id


def _processor(
    parts: LlavaParts, images: Any, config: Any, tokenizer: Any, *, classes: bool
) -> Any:
    from transformers import LlavaImageProcessor, LlavaProcessor

    if parts.facts.get("image_aspect_ratio") == "pad":
        facts = images.to_dict()
        facts.pop("image_processor_type", None)
        images = LlavaImageProcessor(**facts | {"do_pad": True})
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        num_additional_image_tokens=1 if classes else 0,
        chat_template=tokenizer.chat_template,
        image_token=_IMAGE_TOKEN,
    )
