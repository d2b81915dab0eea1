"""Checks that a checkpoint contains every weight that the model uses.

If weights are missing, transformers continues with random ones and only logs it. Must never load
weights.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors import safe_open
from transformers.utils import cached_file

from worker.engines.base import EngineLoadError

__all__ = ["refuse_left_out", "refuse_missing", "weight_names"]


def refuse_missing(
    model: Any, missing: Iterable[str], path: str, *, quantised: bool = False
) -> None:
    """Raise `EngineLoadError` if weights that `model` needs were not in its checkpoint.

    `missing` is what transformers reports, which already excludes weights tied to another and those
    that the model declares optional.
    """
    buffers = dict(model.named_buffers())
    headless = not hasattr(model, "get_output_embeddings") or model.get_output_embeddings() is None
    lacking = sorted(
        name
        for name in map(str, missing)
        # Computed, not learned. Learned values may be buffers too (statistics, a router's bias).
        if not (name in buffers and not buffers[name].is_floating_point())
        and not name.endswith("inv_freq")
        # Not used: embeddings are pooled from the last hidden states.
        and not (headless and "pooler" in name.split("."))
    )
    if not lacking:
        return
    names = ", ".join(lacking[:3]) + (", ..." if len(lacking) > 3 else "")
    cause = (
        "it is quantised in a way that leaves them out, or a file is missing"
        if quantised
        else "a file is missing, or it was saved for another architecture"
    )
    raise EngineLoadError(
        f"{path} lacks {len(lacking)} of the model's weights ({names}): {cause}; "
        "fetch or convert it again"
    )


def refuse_left_out(model: Any, unexpected: Iterable[str], path: str) -> None:
    """Raise `EngineLoadError` if the checkpoint has extra weights for layers of `model`: biases
    that its configuration does not declare, scales of a quantisation that it does not name. Without
    them the layers would compute something else.

    `unexpected` is what transformers reports. Layers that the model does not have at all (a head
    for another task, multi-token predictors) may be left out.
    """
    layers = {name: layer for name, layer in model.named_modules() if layer._parameters}
    left_out = []
    for name in sorted(map(str, unexpected)):
        place, _, own = name.rpartition(".")
        # Buffers that older releases stored (`position_ids`) are computed today.
        if place in layers and own not in layers[place]._buffers:
            left_out.append(name)
    if not left_out:
        return
    names = ", ".join(left_out[:3]) + (", ..." if len(left_out) > 3 else "")
    raise EngineLoadError(
        f"{path} holds {len(left_out)} weights that its configuration has no place for ({names}): "
        "without them its answers would differ; use the config.json that it was saved with"
    )


def weight_names(path: str, revision: str | None) -> list[str]:
    """Names of the tensors in a safetensors checkpoint (a folder or a hub id); empty for other
    formats."""
    for file in ("model.safetensors.index.json", "model.safetensors"):
        found = cached_file(
            path,
            file,
            revision=revision,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_connection_errors=False,
        )
        if found is None:
            continue
        if file.endswith(".json"):
            return list(json.loads(Path(found).read_text())["weight_map"])
        with safe_open(found, framework="pt") as tensors:
            return list(tensors.keys())
    return []
