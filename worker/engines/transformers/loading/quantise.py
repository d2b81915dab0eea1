"""8-bit and 4-bit weights with bitsandbytes: decides which modules must not be quantised.

transformers matches the names to skip with the start of a module's full path or with its end, and
passing any list removes its own exclusion of the output head. So the list is built from the full
paths in the model itself, on the meta device. Must never load weights.
"""

from __future__ import annotations

import importlib.util
import logging
import re
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.pytorch_utils import Conv1D

from broker.protocol.install import install_hint
from worker.engines.base import EngineLoadError
from worker.engines.transformers.loading.dense import ROUNDED

__all__ = [
    "bitsandbytes_config",
    "computes_quantised",
    "modules_to_skip",
    "normalise_skip_names",
    "numbers_of",
    "quantised_share",
    "refuse_packed_scales",
    "stored_skip_list",
    "tell_dense_weights",
    "warn_of_lost_rounding",
]

log = logging.getLogger(__name__)

LANGUAGE_NAMES = ("language_model", "text_model", "llm")
"""Names of the language model inside a vision-language model."""

MEDIA_INPUTS = ("pixel_values", "flattened_patches", "input_features", "input_values")
"""First inputs of image and audio models."""

MEDIA = re.compile(
    "(?<![a-z])(vision|visual|image|img|pixel|vqmodel|vpm|tower|audio|speech|protein|"
    "projector|connector|resampler|qformer|perceiver|aligner)(?![a-z])"
)
"""Words in the names of modules for images, audio and the like, and of modules that connect them to
the text."""

FUSED_SHARE = 0.05
"""Fraction of a model's weights that must stay dense before a warning is logged."""

_BNB_LAYERS = {"Linear8bitLt": 8, "Linear4bit": 4}

_BNB_SCALES = re.compile(r"\.(SCB|weight\.absmax)$")
"""Names of the tensor that accompanies every weight quantised by bitsandbytes."""

PACKED_MULTIPLE = 64
"""On a CPU, bitsandbytes packs 4-bit weights in blocks of 64 input features, and fails for layers
whose number of inputs is not a multiple of that."""


def bitsandbytes_config(
    skeleton: nn.Module, *, bits: int, dtype: torch.dtype, device: torch.device
) -> Any:
    """The quantisation config for `skeleton` (the model on the meta device): LLM.int8 for 8 bits,
    NF4 with double quantisation for 4. Raises `EngineLoadError` if bitsandbytes is missing."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise EngineLoadError(
            f"8-bit and 4-bit loading need bitsandbytes: {install_hint('worker')}"
        )
    from transformers import BitsAndBytesConfig

    skip = modules_to_skip(skeleton, bits=bits, device=device)
    if bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skip)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=skip,
    )


def modules_to_skip(skeleton: nn.Module, *, bits: int, device: torch.device) -> list[str]:
    """Full paths (as regular expressions) of modules not to quantise: output heads, everything
    outside the language model (vision tower, projector), and what a CPU kernel cannot pack."""
    roots = _language_paths(skeleton)
    media = _media_paths(skeleton, roots)
    heads = _output_heads(skeleton)
    skip: list[str] = []
    for path, module in _linear_layers(skeleton):
        inside = any(_under(path, root) for root in roots) if roots else True
        outside = not inside or any(_under(path, place) for place in media)
        inputs = module.in_features if isinstance(module, nn.Linear) else module.weight.shape[0]
        odd = bits == 4 and device.type == "cpu" and inputs % PACKED_MULTIPLE != 0
        if module in heads or outside or odd:
            skip.append(re.escape(path))
    # An empty list would restore transformers' defaults; a name that matches nothing does not.
    return skip or ["lm_head"]


def _linear_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Layers that bitsandbytes can quantise: linear ones, including GPT-2's transposed ones."""
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear | Conv1D):
            yield path, module


def _under(path: str, root: str) -> bool:
    return path == root or path.startswith(root + ".")


def _language_paths(skeleton: nn.Module) -> list[str]:
    """Paths of the language model inside a vision-language model, including its decoder if it has
    one; empty for a text model."""
    paths = [
        path
        for path, _ in skeleton.named_modules()
        if path.rpartition(".")[2] in LANGUAGE_NAMES and not MEDIA.search(path)
    ]
    roots = [path for path in paths if not any(_under(path, o) for o in paths if o != path)]
    decoder = _decoder_path(skeleton)
    if roots and decoder and not any(_under(decoder, root) for root in roots):
        roots.append(decoder)
    return roots


def _decoder_path(skeleton: nn.Module) -> str:
    """Path of an encoder-decoder model's decoder; empty for other models."""
    if not getattr(getattr(skeleton, "config", None), "is_encoder_decoder", False):
        return ""
    decoder = skeleton.get_decoder()  # type: ignore[operator]
    return next((path for path, module in skeleton.named_modules() if module is decoder), "")


def _media_paths(skeleton: nn.Module, roots: list[str]) -> list[str]:
    """Paths of modules for images, audio and the like, inside the language model or next to it.
    They are recognised by the inputs of a nested model or, in older families with plain modules, by
    name."""
    paths = []
    for path, module in skeleton.named_modules():
        takes = getattr(module, "main_input_name", None) if path else None
        root = next((root for root in roots if _under(path, root)), "")
        named = MEDIA.search(path.removeprefix(root).rpartition(".")[2])
        if named or takes in MEDIA_INPUTS:
            paths.append(path)
    texts = [*roots, *filter(None, [_decoder_path(skeleton)])]
    return [path for path in paths if not any(_under(text, path) for text in texts)]


def _output_heads(skeleton: nn.Module) -> set[nn.Module]:
    """Output heads of a model and of models nested in it."""
    heads = set()
    for module in skeleton.modules():
        get_head = getattr(module, "get_output_embeddings", None)
        head = get_head() if callable(get_head) else None
        if isinstance(head, nn.Module):
            heads.add(head)
    return heads


# --- quantised checkpoints --------------------------------------------------------------


def stored_skip_list(
    quantization_config: dict[str, Any], skeleton: nn.Module, names: Iterable[str], path: str
) -> dict[str, Any]:
    """The config of a bitsandbytes checkpoint with a skip list derived from its files: layers whose
    weights have scales are quantised, all others are not. The stored skip list is not used, since
    it follows the names and rules of the release that saved it.

    `names` are those of the stored tensors. Raises `EngineLoadError` if a quantised one does not
    belong to a layer of `skeleton`.
    """
    renamings = get_model_conversion_mapping(skeleton)
    layers = dict(_linear_layers(skeleton))
    stored = {_BNB_SCALES.sub("", name) for name in names if _BNB_SCALES.search(name)}
    quantised: set[str] = set()
    unknown: list[str] = []
    for layer in stored:
        renamed = layer + ".weight"
        for renaming in renamings:
            renamed, _ = renaming.rename_source_key(renamed)
        renamed = renamed.removesuffix(".weight")
        same = [p for p in layers if p == renamed or p.endswith("." + renamed)]
        same = same or [p for p in layers if renamed.endswith("." + p)]
        if len(same) == 1:
            quantised.add(same[0])
        else:
            unknown.append(layer)
    if unknown:
        raise EngineLoadError(
            f"{path} holds quantised weights that are not layers of their own in this release of "
            f"transformers ({sorted(unknown)[0]}, ...): quantise the original checkpoint with "
            "--load-8bit or --load-4bit"
        )
    skip = [re.escape(layer) for layer in layers if layer not in quantised]
    return quantization_config | {"llm_int8_skip_modules": skip or ["lm_head"]}


def normalise_skip_names(quantization_config: dict[str, Any]) -> dict[str, Any]:
    """A config in which the names to skip match as they did before transformers 5, anywhere in a
    path; now only the start or the end of a path is matched."""
    fixed = dict(quantization_config)
    for key in ("llm_int8_skip_modules", "modules_to_not_convert"):
        names = fixed.get(key)
        if isinstance(names, list):
            plain = [name for name in names if re.fullmatch(r"[\w.]+", name)]
            fixed[key] = [*names, *(rf"(.*\.)?{re.escape(name)}" for name in plain)]
    return fixed


def refuse_packed_scales(model: nn.Module, path: str) -> None:
    """Raise `EngineLoadError` for 4-bit weights that were saved after a forward on a CPU with
    AVX-512 bfloat16.

    bitsandbytes 0.50.2 packs weights for its kernel in that forward. When it saves them, it unpacks
    the weights but not their scales, which stay transposed and would be applied to the wrong
    weights. Must be called before the model's first forward.
    """
    for name, module in model.named_modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        scales = getattr(state, "absmax", None)
        packed = getattr(state, "packing_format_for_cpu", False)
        if isinstance(scales, torch.Tensor) and scales.dim() > 1 and not packed:
            raise EngineLoadError(
                f"{path}: the 4-bit weights of {name} were saved after they had been used on a CPU "
                "with AVX-512 bfloat16; bitsandbytes then writes their scales in another order, "
                "and the model would give wrong answers. Quantise the original checkpoint with "
                "--load-4bit, or save it again before its first forward"
            )


# --- reports about a loaded model ---------------------------------------------------------------


def quantised_share(model: nn.Module) -> float | None:
    """The fraction of a model's weights that bitsandbytes has quantised; None if it has not
    quantised any."""
    few, whole = 0, 0
    for module in model.modules():
        packed = isinstance(module, nn.Linear) and type(module).__name__ in _BNB_LAYERS
        for name, parameter in module.named_parameters(recurse=False):
            count = parameter.numel()
            if packed and name == "weight":
                count = int(module.in_features) * int(module.out_features)  # type: ignore[arg-type]
                few += count
            whole += count
    return few / whole if few else None


def numbers_of(model: nn.Module, *, quantised: bool) -> str:
    """The dtype of a model and the bits of its weights, in words: `bfloat16, weights of 4 bits`."""
    bits = {_BNB_LAYERS.get(type(module).__name__, 0) for module in model.modules()} - {0}
    few = " and ".join(str(each) for each in sorted(bits))
    words = [str(model.dtype).removeprefix("torch.")]
    words += [f"weights of {few} bits"] if few else ["quantised weights"] if quantised else []
    return ", ".join(words)


def tell_dense_weights(model: nn.Module, path: str) -> None:
    """Warn about the part of a model that bitsandbytes could not quantise: experts that are fused
    into single parameters. Raises `EngineLoadError` if that is the whole model."""
    share = quantised_share(model)
    if share is None:
        raise EngineLoadError(
            f"{path}: bitsandbytes cannot quantise any of its weights (it quantises linear layers, "
            f"and to 4 bits on a CPU only those with a multiple of {PACKED_MULTIPLE} inputs): load "
            "it without --load-8bit and --load-4bit"
        )
    counts: dict[tuple[str, torch.dtype], int] = {}
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding | nn.modules.conv._ConvNd | Conv1D):
            continue
        for parameter in module.parameters(recurse=False):
            kind = type(module).__name__, parameter.dtype
            counts[kind] = counts.get(kind, 0) + parameter.numel()
    least = FUSED_SHARE * sum(parameter.numel() for parameter in model.parameters())
    for (name, dtype), count in counts.items():
        if count > least:
            log.warning(
                "%s: only %.0f %% of the weights are quantised: %s stay %s, because bitsandbytes "
                "quantises linear layers only, and each of these is a single fused parameter",
                path,
                100 * share,
                name,
                str(dtype).removeprefix("torch."),
            )


def computes_quantised(model: nn.Module) -> bool:
    """Whether a loaded model has quantised weights or rounds its activations. A model that
    transformers made dense while loading does neither."""
    return bool(getattr(model, "is_quantized", False)) or hasattr(model, ROUNDED)


def warn_of_lost_rounding(model: nn.Module, stored: dict[str, Any], path: str) -> None:
    """Warn if transformers made an FP8 model dense: FP8 kernels also round activations."""
    if not computes_quantised(model) and str(stored.get("quant_method")) in ("fp8", "fbgemm_fp8"):
        log.warning(
            "%s is dense in memory, because this device has no FP8 kernels: its activations are "
            "not rounded as they were when it was quantised",
            path,
        )
