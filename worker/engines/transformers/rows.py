"""Adapters inside a model, chosen per row of a forward.

peft can compute a batch in which every row has its own adapter or none. Here the choice is a state
of the model rather than an argument, so that all callers (the slots, `generate()`, embeddings) run
the transformers model itself. Must never load anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

__all__ = ["RowAdapters"]

BASE = "__base__"
"""peft's name for a row without an adapter."""


class RowAdapters:
    """The adapters of one model. Until one is chosen, it computes like the base."""

    def __init__(self, model: Any, names: dict[str, str]) -> None:
        """`names`: peft's name for each served adapter."""
        from peft.tuners.tuners_utils import BaseTunerLayer

        self._names = names
        self._chosen: list[str] | None = None
        for module in model.modules():
            if isinstance(module, BaseTunerLayer) and isinstance(module, nn.Module):
                module.register_forward_pre_hook(self._name_rows, with_kwargs=True)

    def choose(self, rows: Sequence[str | None]) -> None:
        """Choose the adapter of each row for the next forwards, None for the base."""
        self._chosen = [BASE if row is None else self._names[row] for row in rows]

    def _name_rows(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        chosen = [BASE] * len(args[0]) if self._chosen is None else self._chosen
        return args, kwargs | {"adapter_names": chosen}
