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

    def __init__(self, model: Any, names: dict[str, str], outer: Any) -> None:
        """`names`: peft's name for each served adapter. `outer`: peft's wrapper of the model."""
        self._names = dict(names)
        self._chosen: list[str] | None = None
        self._model = model
        self.outer = outer
        self._watched: set[int] = set()
        self._watch()

    def _watch(self) -> None:
        """Hook into every layer that peft has put into the model."""
        from peft.tuners.tuners_utils import BaseTunerLayer

        for module in self._model.modules():
            if not isinstance(module, BaseTunerLayer) or not isinstance(module, nn.Module):
                continue
            if id(module) not in self._watched:
                self._watched.add(id(module))
                module.register_forward_pre_hook(self._name_rows, with_kwargs=True)

    def added(self, name: str, own_name: str) -> None:
        """An adapter was attached, which peft knows as `own_name`."""
        self._names[name] = own_name
        self._watch()

    def forget(self, name: str) -> None:
        """An adapter is about to be removed."""
        self._names.pop(name, None)

    def choose_none(self) -> None:
        """Until an adapter is chosen again, compute like the base."""
        self._chosen = None

    def own_name(self, name: str) -> str:
        """What peft calls a served adapter."""
        return self._names[name]

    def choose(self, rows: Sequence[str | None]) -> None:
        """Choose the adapter of each row for the next forwards, None for the base."""
        self._chosen = [BASE if row is None else self._names[row] for row in rows]

    def _name_rows(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        chosen = [BASE] * len(args[0]) if self._chosen is None else self._chosen
        return args, kwargs | {"adapter_names": chosen}
