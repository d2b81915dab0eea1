"""Loads a model's own processor with only Pillow installed.

Without torchvision, transformers refuses every processor that also supports videos (Qwen-VL,
InternVL, LLaVA-OneVision, Pixtral, ...), although its image part works. Here such a processor is
loaded without its video part: videos reach the engine as frames, which are images. Must never
change what a processor does with images.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

from transformers import AutoFeatureExtractor, AutoImageProcessor, AutoProcessor, AutoTokenizer
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

__all__ = ["images_only", "load_processor", "processor_class"]


def load_processor(path: str, config: Any, **options: Any) -> Any:
    """The processor of the model at `path`. `options` go to `from_pretrained`."""
    known = PROCESSOR_MAPPING_NAMES.get(config.model_type)
    if importlib.util.find_spec("torchvision") is not None or known is None:
        return AutoProcessor.from_pretrained(path, **options)
    try:
        return AutoProcessor.from_pretrained(path, **options)
    except (ImportError, AttributeError, ValueError, TypeError):
        # Which of these is raised depends on where torchvision was missed first.
        return images_only(processor_class(known)).from_pretrained(path, **options)


def processor_class(name: str) -> Any:
    """The processor class with that name, even if transformers' own namespace has a dummy."""
    for model_type, known in PROCESSOR_MAPPING_NAMES.items():
        if known != name:
            continue
        folder = model_type.replace("-", "_")
        place = f"transformers.models.{folder}.processing_{folder}"
        if importlib.util.find_spec(f"transformers.models.{folder}") is None:
            continue
        if importlib.util.find_spec(place) is not None:
            found = getattr(importlib.import_module(place), name, None)
            if found is not None:
                return found
    raise ValueError(f"transformers has no {name}")


def images_only(base: Any) -> Any:
    """The processor class `base` without its video part, which is None in its instances."""

    def check(self: Any, name: str, argument: Any) -> Any:
        if argument is None and "video" in name:
            return None
        return super(result, self).check_argument_for_proper_class(name, argument)

    def parts(cls: type[Any], path: Any, /, processor_dict: Any = None, **options: Any) -> Any:
        options.pop("subfolder", None)
        loaded: list[Any] = []
        for name in cls.get_attributes():
            if "video" in name:
                loaded.append(None)
            elif "tokenizer" in name:
                loaded.append(AutoTokenizer.from_pretrained(path, **options))
            elif "image" in name:
                loaded.append(AutoImageProcessor.from_pretrained(path, **options))
            else:
                loaded.append(AutoFeatureExtractor.from_pretrained(path, **options))
        return loaded

    result: Any = type(
        base.__name__,
        (base,),
        {
            "__doc__": base.__doc__,
            "__module__": base.__module__,
            "check_argument_for_proper_class": check,
            "_get_arguments_from_pretrained": classmethod(parts),
        },
    )
    return result
