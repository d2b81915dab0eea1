"""Runs the vision tower apart from the language model: images are computed one by one, each as a
step of its own, and their tokens are then prefilled in pieces like any others.

transformers' models accept features that their tower has computed before (`mm_encoder_outputs`),
and put them where the image's placeholders are. A piece of a prompt gets the features for its own
placeholders. The self test decides for which models this is exact. Must never schedule.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import Any

import torch

from worker.engines.common.compat import forward_parameters
from worker.engines.common.prompt import Prompt
from worker.engines.transformers.loaded import LoadedModel

__all__ = ["ImageFeatures", "Vision", "doubled"]

GIVEN = "mm_encoder_outputs"
"""The argument of a model's forward for features that its tower has computed."""


@dataclass(slots=True)
class ImageFeatures:
    """The images of a prompt, some of which are computed."""

    #: The tower's inputs for the images that are still to be computed, in order.
    left: list[dict[str, Any]]
    #: Features [tokens, width] of each computed part; the same for each deepstack layer.
    done: list[torch.Tensor] = field(default_factory=list)
    deep: list[list[torch.Tensor]] = field(default_factory=list)
    #: The class of the tower's output, and whether it is a list with an item for each image.
    kind: Any = None
    listed: bool = False

    @property
    def ready(self) -> bool:
        """Whether all images are computed."""
        return not self.left

    def joined(self) -> None:
        """Join all parts into one tensor."""
        self.done = [torch.cat(self.done)]
        self.deep = [[torch.cat(layer)] for layer in self.deep]


class Vision:
    """The tower of one model."""

    def __init__(self, loaded: LoadedModel, features: Any, token_id: int) -> None:
        self._loaded = loaded
        self._features = features
        self._token_id = token_id
        self._takes = inspect.signature(features).parameters.keys() - {"kwargs"}
        #: Whether images are computed one by one; the self test decides.
        self.splits = True

    @classmethod
    def find(cls, loaded: LoadedModel) -> Vision | None:
        """The tower of a model whose forward accepts its output; else None."""
        model = loaded.model
        config = model.config
        token_id = getattr(config, "image_token_id", None)
        for owner in (model, getattr(model, "model", None)):
            features = getattr(owner, "get_image_features", None)
            if features is not None and token_id is not None:
                return cls(loaded, features, token_id) if _takes_given(model) else None
        return None

    def begin(self, prompt: Prompt) -> ImageFeatures | None:
        """The images of a prompt, none of them computed yet; None if it has none, or has inputs
        that the tower does not take."""
        if not prompt.media or prompt.media.keys() - self._takes:
            return None
        return ImageFeatures(_split(prompt.media) if self.splits else [prompt.media])

    def compute(self, images: ImageFeatures) -> None:
        """Compute the next image."""
        loaded = self._loaded
        part = Prompt([], media=images.left[0])
        output = self._features(**part.media_on(loaded.device, loaded.dtype), return_dict=True)
        pooled = output.pooler_output
        images.kind, images.listed = type(output), isinstance(pooled, list | tuple)
        images.done.append(_flat(pooled))
        layers = getattr(output, "deepstack_features", None) or []
        images.deep = images.deep or [[] for _ in layers]
        for layer, features in zip(images.deep, layers, strict=True):
            layer.append(_flat(features))
        images.left.pop(0)
        if images.ready:
            images.joined()

    def piece(self, prompt: Prompt, images: ImageFeatures, start: int, end: int) -> dict[str, Any]:
        """Arguments for the prompt's tokens `start` to `end`."""
        before = prompt.ids[:start].count(self._token_id)
        here = slice(before, before + prompt.ids[start:end].count(self._token_id))
        if here.start == here.stop:
            return {}

        def part(whole: torch.Tensor) -> Any:
            return [whole[here]] if images.listed else whole[here]

        given: dict[str, Any] = {"pooler_output": part(images.done[0])}
        if images.deep:
            given["deepstack_features"] = [[layer[0][here]] for layer in images.deep]
        return {GIVEN: {"image": images.kind(**given)}}

    def fits(self, prompt: Prompt, images: ImageFeatures) -> bool:
        """Whether the computed features have a row for each of the prompt's placeholders."""
        return sum(map(len, images.done)) == prompt.ids.count(self._token_id)


def doubled(media: dict[str, Any]) -> dict[str, Any] | None:
    """The same images twice, as a processor would return them; None if it is not known how."""
    axis = _axis(media)
    if axis is None:
        return None
    return {name: torch.cat([value, value], axis) for name, value in media.items()}


def _takes_given(model: Any) -> bool:
    return GIVEN in forward_parameters(model)


def _flat(features: Any) -> torch.Tensor:
    """The features of images, flattened to [tokens, width]."""
    if isinstance(features, list | tuple):
        return torch.cat([each.flatten(0, -2) for each in features])
    flat: torch.Tensor = features.flatten(0, -2)
    return flat


def _axis(media: dict[str, Any]) -> int | None:
    """The axis along which a processor concatenates images in all tensors; None if unknown."""
    values = list(media.values())
    if not all(isinstance(value, torch.Tensor) and value.dim() for value in values):
        return None
    if "image_grid_thw" in media:
        return 0 if media.keys() == {"pixel_values", "image_grid_thw"} else None
    pixels = media["pixel_values"]
    if media.keys() <= {"pixel_values", "pixel_attention_mask"} and pixels.dim() == 5:
        # [prompts, tiles, channels, height, width]: each tile is an image of its own.
        return 1 if pixels.shape[0] == 1 else None
    return 0 if len({value.shape[0] for value in values}) == 1 else None


def _split(media: dict[str, Any]) -> list[dict[str, Any]]:
    """The inputs of each image, in order; in one part if they cannot be separated."""
    axis = _axis(media)
    if axis is None:
        return [media]
    if "image_grid_thw" in media:
        grid = media["image_grid_thw"]
        pixels = media["pixel_values"].split(grid.prod(-1).tolist())
        return [
            {"pixel_values": own, "image_grid_thw": grid[index : index + 1]}
            for index, own in enumerate(pixels)
        ]
    parts = {name: value.split(1, axis) for name, value in media.items()}
    return [
        {name: own[index] for name, own in parts.items()}
        for index in range(media["pixel_values"].shape[axis])
    ]
