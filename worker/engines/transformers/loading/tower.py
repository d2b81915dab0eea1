"""The vision tower of a LLaVA in the LLaVA project's format, and its image processor.

config.json names a folder or a hub id; the weights may be in the checkpoint itself, if the tower
was trained too. Must never guess settings that affect images: without the tower's own configuration
only OpenAI's CLIP is supported, whose sizes follow from its weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from worker.engines.base import EngineLoadError
from worker.engines.common.failures import one_line
from worker.engines.transformers.loading.checkpoint import refuse_missing

__all__ = ["load_tower"]

_OPENAI_CLIP = "openai/clip-vit-"
_CLIP_HEAD = 64
"""Size of an attention head in each of OpenAI's towers."""


def load_tower(
    folder: Path,
    name: str,
    state: dict[str, Any],
    *,
    device: torch.device,
    dtype: torch.dtype,
    attention: str | None,
    safetensors_only: bool,
) -> tuple[Any, Any]:
    """The tower and its image processor. `name` is a folder, possibly inside `folder`, or a hub id;
    `state` holds the tower's weights from the checkpoint, if it has any. Raises
    `EngineLoadError`."""
    from transformers import AutoImageProcessor

    path = str(folder / name) if (folder / name).is_dir() else name
    state = {key.removeprefix("vision_model."): tensor for key, tensor in state.items()}
    extra = {"attn_implementation": attention} if attention else {}
    try:
        config = _config(path)
        images = AutoImageProcessor.from_pretrained(path)
    except (OSError, ValueError) as error:
        if not (name.startswith(_OPENAI_CLIP) and "embeddings.patch_embedding.weight" in state):
            raise EngineLoadError(
                f"{folder} names the vision tower {name}, which is neither a folder nor available "
                "from the hub now: load it once while online, or set mm_vision_tower in "
                f"config.json to the path of its folder ({one_line(error, 160)})"
            ) from error
        config, images = _openai_clip(state)
    kind = _CLASSES[config.model_type]()
    if state:
        with torch.device("meta"):
            empty = kind._from_config(config, dtype=dtype, **extra)
        # Buffers are computed, not stored.
        whole = set(dict(empty.named_parameters())) <= _named_by(empty, state).keys()
        if whole:
            tower = kind._from_config(config, dtype=dtype, **extra)
            _fill(tower, state, folder)
            return tower.to(device).eval(), images
    tower, loading_info = kind.from_pretrained(
        path,
        config=config,
        dtype=dtype,
        use_safetensors=True if safetensors_only else None,
        output_loading_info=True,
        **extra,
    )
    refuse_missing(tower, set(loading_info["missing_keys"]) - _named_by(tower, state).keys(), path)
    _fill(tower, state, folder)
    return tower.to(device).eval(), images


def _clip() -> Any:
    from transformers import CLIPVisionModel

    return CLIPVisionModel


def _siglip() -> Any:
    from transformers import SiglipVisionModel

    return SiglipVisionModel


_CLASSES = {"clip_vision_model": _clip, "siglip_vision_model": _siglip}


def _config(path: str) -> Any:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(path)
    config = getattr(config, "vision_config", config)
    if config.model_type not in _CLASSES:
        raise EngineLoadError(
            f"vision tower {path} is a {config.model_type}: only CLIP and SigLIP are supported"
        )
    return config


def _openai_clip(state: dict[str, Any]) -> tuple[Any, Any]:
    """Configuration and image processor of one of OpenAI's towers, derived from the shapes of its
    weights."""
    from transformers import CLIPImageProcessor, CLIPVisionConfig

    width, _, patch, _ = state["embeddings.patch_embedding.weight"].shape
    side = round((state["embeddings.position_embedding.weight"].shape[0] - 1) ** 0.5)
    layers = {key.split(".")[2] for key in state if key.startswith("encoder.layers.")}
    config = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=state["encoder.layers.0.mlp.fc1.weight"].shape[0],
        num_hidden_layers=len(layers),
        num_attention_heads=width // _CLIP_HEAD,
        image_size=side * patch,
        patch_size=patch,
        hidden_act="quick_gelu",
    )
    size = config.image_size
    return config, CLIPImageProcessor(
        size={"shortest_edge": size}, crop_size={"height": size, "width": size}
    )


def _named_by(tower: Any, state: dict[str, Any]) -> dict[str, Any]:
    """Weights under the names that the installed transformers uses, which may have the prefix
    `vision_model.`."""
    prefix = "vision_model." if hasattr(tower, "vision_model") else ""
    return {prefix + key: tensor for key, tensor in state.items()}


def _fill(tower: Any, state: dict[str, Any], source: Path) -> None:
    try:
        _, unknown = tower.load_state_dict(_named_by(tower, state), strict=False)
    except RuntimeError as error:
        raise EngineLoadError(
            f"weights of the vision tower in {source} do not fit the tower that config.json names: "
            f"{one_line(error, 300)}"
        ) from None
    unknown = [key for key in unknown if not key.endswith("position_ids")]
    if unknown:
        raise EngineLoadError(
            f"{source} holds unknown weights of a vision tower: {', '.join(sorted(unknown)[:3])}"
        )
