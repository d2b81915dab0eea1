"""Dequantises checkpoints of packed integers while loading, if their own library is missing.

Each weight is unpacked as it is read, so the packed and the dense model are never in memory at the
same time. The result is a dense model in the requested dtype. Uses transformers' own extension
points for quantisers; the formats are in `awq` and `gptq`. Must never know a format.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers.core_model_loading import ConversionOps
from transformers.quantizers import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from worker.engines.base import EngineLoadError

__all__ = ["ROUNDED", "explained_conversion", "noted_cause", "register"]

ROUNDED = "tokenbus_rounded_activations"
"""Attribute of a model whose layers round activations as they were rounded when it was quantised:
it computes like a quantised model although its weights are dense."""


_causes: list[str] = []


@contextmanager
def noted_cause() -> Iterator[None]:
    """Context for a conversion: notes the cause of a failure, for which transformers then raises a
    generic error."""
    try:
        yield
    except ValueError as error:
        _causes.append(str(error))
        raise


@contextmanager
def explained_conversion(path: str) -> Iterator[None]:
    """Context for loading: if it fails, raises `EngineLoadError` with the first cause that was
    noted."""
    _causes.clear()
    try:
        yield
    except RuntimeError as error:
        if not _causes:
            raise
        raise EngineLoadError(f"cannot load {path}: {_causes[0]}") from error


def register(method: str, parts: tuple[str, ...], dequantised: Callable[..., torch.Tensor]) -> None:
    """Teach transformers the quantisation method `method`. A layer's tensors are `parts`, and
    `dequantised(*tensors, **facts)` computes its weight [out, in] from them; `facts` is the rest of
    the quantisation config."""

    class Dequantise(ConversionOps):  # type: ignore[misc]
        """Converts the tensors of a layer to its weight, and those of experts to a list of weights,
        which transformers fuses in a later operation."""

        def __init__(self, quantizer: HfQuantizer) -> None:
            self._facts = quantizer.quantization_config.facts

        def convert(
            self, input_dict: dict[str, Any], *args: Any, full_layer_name: str, **kwargs: Any
        ) -> dict[str, Any]:
            dtype = kwargs["model"].get_parameter(full_layer_name).dtype
            result: dict[str, Any] = {}
            for name in input_dict:
                stem, separator, _ = name.rpartition(parts[0])
                if not separator:
                    continue
                held = (input_dict[stem + part] for part in parts)
                lists = (part if isinstance(part, list) else [part] for part in held)
                with noted_cause():
                    dense = [
                        dequantised(*layer, **self._facts).to(dtype)
                        for layer in zip(*lists, strict=True)
                    ]
                if not stem:
                    return {full_layer_name: dense[0]}
                # Later operations look up weights by the names of their sources.
                result[name] = dense
            return result

    class Config(QuantizationConfigMixin):  # type: ignore[misc]
        """Describes how weights are packed, and requests dense ones."""

        def __init__(self, quant_method: str = method, **facts: Any) -> None:
            self.quant_method = quant_method
            self.dequantize = True
            self.facts = facts

    class Quantizer(HfQuantizer):  # type: ignore[misc]
        """Loads packed tensors into a model of ordinary layers."""

        requires_calibration = True
        serialized_names = {"weight": [*parts]}  # noqa: RUF012

        def get_load_operations(self) -> dict[str, Any]:
            return {"dequantize": Dequantise}

        def is_serializable(self) -> bool:
            return False

        @property
        def is_trainable(self) -> bool:
            return False

    register_quantization_config(method)(Config)
    register_quantizer(method)(Quantizer)
