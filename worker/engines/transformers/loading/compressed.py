"""compressed-tensors checkpoints: weights become dense while loading, and activations are rounded
as they were when the model was quantised.

transformers reads every layer with the scheme of a single group and drops the rest. Here each layer
is read with the scheme of its own group, and hooks round the inputs and outputs of quantised layers
(W8A8, FP8, W4A8, NVFP4), each token by itself. What cannot be reproduced is refused or reported.
The library defines the formats. Must never be imported if compressed-tensors is not installed.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from typing import Any

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.format import infer_module_format
from compressed_tensors.quantization import fake_quantize, initialize_qparams
from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp
from compressed_tensors.utils.match import match_targets
from torch import nn
from transformers import CompressedTensorsConfig
from transformers.core_model_loading import ConversionOps
from transformers.quantizers import register_quantization_config, register_quantizer
from transformers.quantizers.quantizer_compressed_tensors import CompressedTensorsHfQuantizer

from worker.engines.base import EngineLoadError
from worker.engines.transformers.loading.dense import ROUNDED, noted_cause

__all__ = ["keeping_config"]

log = logging.getLogger(__name__)

METHOD = "tokenbus_compressed_tensors"

OFFLINE = ("weight_input", "weight_output")
"""Locations of rotations that are fused into the stored weights; all others are computed at run
time."""

NAMES = (
    "weight",
    "weight_packed",
    "weight_scale",
    "weight_zero_point",
    "weight_global_scale",
    "weight_shape",
    "weight_g_idx",
)
"""Names of the tensors in which the formats store one weight."""


def keeping_config(stored: dict[str, Any], path: str) -> dict[str, Any]:
    """A replacement for the checkpoint's own quantisation config, whose method is read here. Raises
    `EngineLoadError` for checkpoints that would give wrong answers."""
    rotated = sorted(
        f"{name} ({place['location']})"
        for name, group in (
            (stored.get("transform_config") or {}).get("config_groups") or {}
        ).items()
        for place in group.get("apply") or ()
        if place.get("location") not in OFFLINE
    )
    if rotated:
        raise EngineLoadError(
            f"{path} is stored rotated: its transform_config rotates activations at run time "
            f"({', '.join(rotated)}), which transformers does not do; use a checkpoint whose "
            "rotations are all fused into its weights, or an engine that computes them"
        )
    sparse = (stored.get("sparsity_config") or {}).get("format") or "dense"
    form = str(stored.get("format") or "dense")
    if sparse != "dense" or form.startswith(("sparse", "marlin")):
        raise EngineLoadError(
            f"{path} is stored in the sparse format {sparse if sparse != 'dense' else form}, which "
            "compressed-tensors no longer reads: use a checkpoint in a dense or packed format"
        )
    if stored.get("kv_cache_scheme"):
        log.warning("%s: kv_cache_scheme is not applied: keys and values stay as computed", path)
    ours = ("quant_method", "transform_config", "sparsity_config", "run_compressed", "dequantize")
    return {name: value for name, value in stored.items() if name not in ours} | {
        "quant_method": METHOD
    }


@register_quantization_config(METHOD)
class Config(CompressedTensorsConfig):  # type: ignore[misc]
    """The checkpoint's config, for dense weights."""

    def __init__(self, quant_method: str = METHOD, **facts: Any) -> None:
        super().__init__(**facts, dequantize=True)
        self.quant_method = quant_method
        form = self.quantization_config.format
        for group in self.quantization_config.config_groups.values():
            if group.format is None and form == "mixed-precision":
                group.format = infer_module_format(nn.Linear, group).value
            elif group.format is None:
                group.format = "dense" if form == "fakequant" else form


@register_quantizer(METHOD)
class Quantizer(CompressedTensorsHfQuantizer):  # type: ignore[misc]
    """Loads each layer with its group's scheme."""

    serialized_names = {"weight": [*NAMES]}  # noqa: RUF012

    def __init__(self, quantization_config: Config, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._config = self.compressor.quantization_config
        #: Quantised layers by path in the model, with their schemes.
        self.found: dict[str, Any] = {}

    def get_load_operations(self) -> dict[str, Any]:
        return {"dequantize": Decompress}

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        """Make room for activation scales in the checkpoint."""
        for path, module in model.named_modules():
            scheme = None
            if isinstance(module, nn.Linear) and not self._ignored(path, module):
                scheme = self._named(path, module)
            if scheme is not None:
                for side, arguments in _activations(scheme):
                    initialize_qparams(
                        module,
                        side,
                        arguments,
                        observed_shape=module.weight.shape[-1:]
                        if side == "input"
                        else module.weight.shape[:1],
                        observed_dtype=module.weight.dtype,
                        force_zero_point=False,
                    )

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        """Round activations from now on. Which layers are quantised follows from the checkpoint's
        tensors, since the names in its config may be those of another release."""
        fused = []
        for parameter, scheme in self.found.items():
            sides = _activations(scheme)
            path, whole, _ = parameter.rpartition(".weight")
            if sides and not whole:
                fused.append(parameter)
                continue
            for side, arguments in sides:
                _round(path, model.get_submodule(path), side, arguments)
                setattr(model, ROUNDED, True)
        if fused:
            log.warning(
                "the activations of %d fused experts (%s, ...) are not rounded as the checkpoint "
                "asks: they are more exact than when its authors measured it",
                len(fused),
                fused[0],
            )
        return model

    def scheme(self, path: str, module: nn.Module, tensors: dict[str, torch.Tensor]) -> Any:
        """The scheme of a layer. Raises `ValueError` if its tensors fit no group, or several."""
        named = self._named(path, module)
        if named is not None and _fits(named, tensors):
            return named
        groups = [g for g in self._config.config_groups.values() if _fits(g, tensors)]
        if not groups or any(group.weights != groups[0].weights for group in groups):
            raise ValueError(
                f"the name and the tensors of {path} fit {'none' if not groups else 'several'} of "
                "the quantisation groups"
            )
        return groups[0]

    def _named(self, path: str, module: nn.Module) -> Any:
        """The scheme whose targets match a layer, by the rules of compressed-tensors; None if there
        is none."""
        schemes = {
            target: scheme
            for scheme in self._config.config_groups.values()
            for target in scheme.targets
        }
        for name in _names(path):
            targets = match_targets(name, module, schemes)
            exact = [target for target in targets if target not in _class_names(module)]
            if exact:
                return schemes[exact[0]]
        targets = match_targets(path, module, schemes)
        return schemes[targets[0]] if targets else None

    def _ignored(self, path: str, module: nn.Module) -> bool:
        ignored = self._config.ignore or []
        return any(match_targets(name, module, ignored) for name in _names(path))


class Decompress(ConversionOps):  # type: ignore[misc]
    """Converts the tensors of a layer to its weight, and those of experts to a list of weights,
    which transformers fuses in a later operation."""

    def __init__(self, quantizer: Quantizer) -> None:
        self._quantizer = quantizer

    def __deepcopy__(self, memo: dict[int, Any]) -> Decompress:
        # Copies are made for every parameter, but all must report to the same quantiser.
        return Decompress(self._quantizer)

    def convert(
        self, input_dict: dict[str, Any], *args: Any, full_layer_name: str, **kwargs: Any
    ) -> dict[str, Any]:
        model = kwargs["model"]
        dtype = model.get_parameter(full_layer_name).dtype
        layers: dict[str, dict[str, list[torch.Tensor]]] = {}
        for key, value in input_dict.items():
            stem, _, name = key.rpartition(".")
            layers.setdefault(stem, {})[name] = value if isinstance(value, list) else [value]
        result: dict[str, Any] = {}
        for stem, tensors in layers.items():
            weights = tensors.get("weight", [])
            if "weight_scale" in tensors:
                with noted_cause():
                    weights = [
                        self._dense(full_layer_name, stem, index, model, held)
                        for index, held in enumerate(_each(tensors))
                    ]
            # Later operations look up weights by the names of their sources.
            key = next(key for key in input_dict if key.rpartition(".")[0] == stem)
            result[key] = [weight.to(dtype) for weight in weights]
        if "" in layers:
            return {full_layer_name: next(iter(result.values()))[0]}
        return result

    def _dense(
        self,
        parameter: str,
        stem: str,
        index: int,
        model: nn.Module,
        tensors: dict[str, torch.Tensor],
    ) -> torch.Tensor:
        path = _source_path(parameter, stem, index) if stem else parameter.removesuffix(".weight")
        module = nn.Linear(1, 1, device="meta") if stem else model.get_submodule(path)
        scheme = self._quantizer.scheme(path, module, tensors)
        self._quantizer.found[parameter] = scheme
        if scheme.format == "dense":
            # Stored unrounded, as it was during quantisation.
            weight: torch.Tensor = fake_quantize(
                tensors["weight"],
                tensors["weight_scale"],
                tensors.get("weight_zero_point"),
                scheme.weights,
                global_scale=tensors.get("weight_global_scale"),
            )
        else:
            compressor = BaseCompressor.get_value_from_registry(scheme.format)
            weight = compressor.decompress(tensors, scheme)["weight"]
        return weight


def _each(tensors: dict[str, list[torch.Tensor]]) -> Iterator[dict[str, torch.Tensor]]:
    """The tensors of each layer, one layer after the other."""
    for index in range(len(tensors["weight_scale"])):
        yield {name: held[index] for name, held in tensors.items()}


# --- names ----------------------------------------------------------------------------------------


def _names(path: str) -> Iterator[str]:
    """Names that a layer may have had in the transformers release that quantised it: with the
    language model in another place, and without some of the leading modules."""
    for name in (
        path,
        path.replace("model.language_model.", "language_model.model.", 1),
        path.replace("language_model.", "", 1),
    ):
        parts = name.split(".")
        yield from (".".join(parts[start:]) for start in range(len(parts)))


def _class_names(module: nn.Module) -> set[str]:
    return {kind.__name__ for kind in type(module).__mro__}


def _source_path(parameter: str, stem: str, index: int) -> str:
    """Path of a layer before transformers fused it into `parameter`; `stem` is the pattern of its
    name, such as `.experts.*.w1`."""
    before, experts, _ = parameter.rpartition(".experts.")
    if experts and "experts." in stem:
        return before + experts + stem.partition("experts.")[2].replace("*", str(index), 1)
    parent = parameter.removesuffix(".weight").rpartition(".")[0]
    return f"{parent}.{stem.rpartition('.')[2]}"


# --- schemes --------------------------------------------------------------------------------------


def _fits(scheme: Any, tensors: dict[str, torch.Tensor]) -> bool:
    """Whether a layer's tensors match a scheme in type, bits, groups and zero points."""
    weights = scheme.weights
    if weights is None:
        return False
    if scheme.format == "dense":
        return "weight" in tensors
    whole = tensors.get("weight")
    if whole is not None:
        return whole.is_floating_point() == bool(weights.type == "float")
    shape = tensors.get("weight_shape")
    if shape is None or shape.is_meta or shape.numel() != 2:
        return True
    inputs = int(shape[1])
    columns = tensors["weight_packed"].shape[-1]
    # Older releases pack 3, 5, 6 and 7 bits so that no number crosses a word boundary.
    fits = columns in (
        math.ceil(inputs * weights.num_bits / 32),
        math.ceil(inputs / (32 // weights.num_bits)),
    )
    if weights.strategy == "group":
        fits &= tensors["weight_scale"].shape[-1] == math.ceil(inputs / weights.group_size)
    return fits and bool(weights.symmetric) == ("weight_zero_point" not in tensors)


def _activations(scheme: Any) -> list[tuple[str, Any]]:
    """Which sides of a layer are rounded, and how."""
    sides = (("input", scheme.input_activations), ("output", scheme.output_activations))
    return [(side, arguments) for side, arguments in sides if arguments is not None]


def _round(path: str, module: nn.Module, side: str, arguments: Any) -> None:
    """Round the inputs or outputs of a layer from now on."""
    if arguments.dynamic is False and not hasattr(module, f"{side}_scale"):
        raise EngineLoadError(
            f"{path} needs rounded activations, but the checkpoint has no {side}_scale for it "
            "under the name that the installed transformers uses"
        )

    def rounded(values: torch.Tensor) -> torch.Tensor:
        if not values.numel():
            return values
        # The library takes the second-to-last of three axes for tokens, but none of two axes.
        tokens = values.reshape(1, -1, values.shape[-1])
        overall = getattr(module, f"{side}_global_scale", None)
        if arguments.dynamic:
            scale, zero = compute_dynamic_scales_and_zp(
                tokens, arguments, module, global_scale=overall
            )
        else:
            scale = getattr(module, f"{side}_scale")
            zero = getattr(module, f"{side}_zero_point", None)
        result: torch.Tensor = fake_quantize(tokens, scale, zero, arguments, global_scale=overall)
        return result.view_as(values)

    if side == "input":
        module.register_forward_pre_hook(lambda _, given: (rounded(given[0]), *given[1:]))
    else:
        module.register_forward_hook(lambda _, given, result: rounded(result))
