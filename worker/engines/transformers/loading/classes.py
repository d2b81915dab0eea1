"""Chooses the transformers Auto class that loads a model, and finds out whether it accepts images.

The architecture in the configuration and transformers' own mappings decide, never just the ending
of a name: `GPT2LMHeadModel` has a head. Must never load weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTextEncoding,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    MODEL_FOR_TEXT_ENCODING_MAPPING,
    MODEL_MAPPING,
)

from worker.engines.base import EngineLoadError
from worker.engines.transformers.heads import decision_class

__all__ = ["ModelClass", "model_class"]

_IMAGE_TEXT_ALIASES = ("AutoModelForVision2Seq", "AutoModelForMultimodalLM")
"""Other names under which remote code offers a vision-language model."""

_PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")


@dataclass(frozen=True, slots=True)
class ModelClass:
    """How a model is loaded."""

    #: The Auto class whose `from_pretrained` loads it.
    auto: Any
    #: Whether it cannot be served without its processor.
    takes_images: bool = False
    #: Whether it is remote code with an image processor although its Auto class does not mention
    #: images: images are then served if the processor can be loaded.
    may_take_images: bool = False


def model_class(
    config: Any,
    folder: Path | None,
    path: str,
    *,
    trust_remote_code: bool,
    revision: str | None = None,
) -> ModelClass:
    """The class for `config`. If remote code has a class for an alias of
    `AutoModelForImageTextToText`, `config` is changed to name it for that class too. Raises
    `EngineLoadError` for a kind of model that neither generates, embeds nor classifies text."""
    kind = type(config)
    names = set(getattr(config, "architectures", None) or ())
    remote = dict(getattr(config, "auto_map", None) or {})
    sentence_model = folder is not None and (folder / "modules.json").is_file()
    if remote and (trust_remote_code or kind not in MODEL_MAPPING):
        chosen = _remote_class(config, remote, names, folder, sentence_model=sentence_model)
        if chosen is not None:
            return chosen
    deciding = decision_class(kind, path, revision)
    if deciding is not None:
        return ModelClass(deciding, takes_images=_has_processor_file(folder))
    if names & _class_names(MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, kind):
        return ModelClass(AutoModelForSequenceClassification)
    if _encoder_alone(kind, names):
        return ModelClass(AutoModelForTextEncoding)
    if kind in MODEL_MAPPING and (sentence_model or _headless(kind, names)):
        return ModelClass(AutoModel)
    if kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING and (
        kind not in MODEL_FOR_CAUSAL_LM_MAPPING
        or names & _class_names(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, kind)
        or any("ConditionalGeneration" in name or "ImageText" in name for name in names)
        or (not names and _has_processor_file(folder))
    ):
        return ModelClass(AutoModelForImageTextToText, takes_images=True)
    if getattr(config, "is_encoder_decoder", False) and (
        kind in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING
    ):
        return ModelClass(AutoModelForSeq2SeqLM)
    if kind in MODEL_FOR_CAUSAL_LM_MAPPING:
        return ModelClass(AutoModelForCausalLM)
    if kind in MODEL_MAPPING:
        return ModelClass(AutoModel)
    raise EngineLoadError(
        f"{path}: {kind.__name__} does not belong to a text, image-and-text or embedding model of "
        "transformers"
    )


def _class_names(mapping: Any, kind: type) -> set[str]:
    """Names of the classes in a mapping for a kind of configuration."""
    if kind not in mapping:
        return set()
    found = mapping[kind]
    return {one.__name__ for one in (found if isinstance(found, list | tuple) else (found,))}


def _headless(kind: type, names: set[str]) -> bool:
    """Whether the checkpoint is a model without a language-model head."""
    heads = set().union(
        *(
            _class_names(mapping, kind)
            for mapping in (
                MODEL_FOR_CAUSAL_LM_MAPPING,
                MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
                MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
            )
        )
    )
    # Some older models with heads are in none of the mappings: GPT2DoubleHeadsModel.
    return bool(names) and all(
        name not in heads
        and "Head" not in name
        and name.endswith(("Model", "ForMaskedLM", "ForPreTraining"))
        for name in names
    )


def _encoder_alone(kind: type, names: set[str]) -> bool:
    """Whether the checkpoint is only the encoder of an encoder-decoder model (T5EncoderModel); the
    whole model would get a random decoder."""
    encoders = _class_names(MODEL_FOR_TEXT_ENCODING_MAPPING, kind)
    return bool(names & (encoders - _class_names(MODEL_MAPPING, kind)))


def _remote_class(
    config: Any,
    remote: dict[str, Any],
    names: set[str],
    folder: Path | None,
    *,
    sentence_model: bool,
) -> ModelClass | None:
    """The class for a model whose folder brings its own code; None if that has no model class."""
    for alias in _IMAGE_TEXT_ALIASES:
        if alias in remote:
            remote.setdefault(AutoModelForImageTextToText.__name__, remote[alias])
            config.auto_map = remote
    order = [
        AutoModelForImageTextToText,
        AutoModelForCausalLM,
        AutoModelForSeq2SeqLM,
        AutoModel,
    ]
    if sentence_model:
        order.reverse()
    classifying = str(remote.get(AutoModelForSequenceClassification.__name__, ""))
    if classifying.rsplit(".", 1)[-1] in names:
        return ModelClass(AutoModelForSequenceClassification)
    offered = [auto for auto in order if auto.__name__ in remote]
    if not offered:
        return None
    # One class may be registered several times, and several classes once each.
    of_weights = [a for a in offered if str(remote[a.__name__]).rsplit(".", 1)[-1] in names]
    auto = (offered if sentence_model else of_weights or offered)[0]
    if auto is AutoModelForImageTextToText:
        return ModelClass(auto, takes_images=True)
    brings_processor = "AutoProcessor" in remote or "AutoImageProcessor" in remote
    return ModelClass(auto, may_take_images=brings_processor or _has_processor_file(folder))


def _has_processor_file(folder: Path | None) -> bool:
    return folder is not None and any((folder / name).is_file() for name in _PROCESSOR_FILES)
