"""Rotary embeddings whose frequencies depend on how long a sequence is (dynamic NTK, longrope).

They use one set of frequencies for a whole forward, determined by its largest position, and some
keep it for the next forward. So rows of one batch, pieces of one prompt and earlier requests would
change each other's answers. Up to some length the frequencies stay the same, and this module
measures that length. It only calls rotary embeddings; must never run the model.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

__all__ = ["LengthRope", "RopeState", "find_length_rope"]

PROBED = 2
"""Number of positions whose angles are compared: those of position 1 are the frequencies
themselves."""


@dataclass(frozen=True, slots=True)
class _ModuleState:
    """Attributes of one rotary embedding; each buffer with a copy of its values, since some types
    write to buffers and others replace them."""

    module: nn.Module
    attributes: dict[str, Any]
    buffers: dict[str, tuple[torch.Tensor, torch.Tensor]]


RopeState = tuple[_ModuleState, ...]
"""State that a model's rotary embeddings keep between forwards."""


class LengthRope:
    """The rotary embeddings of a model with such frequencies. Between uses they are in the state in
    which the model was loaded."""

    def __init__(self, modules: list[nn.Module]) -> None:
        self._modules = modules
        self._fresh = self.state()
        #: Forwards whose positions are all below this use the same angles, whatever their length.
        self.unchanged_tokens = 0

    def state(self) -> RopeState:
        """A copy of their current state."""
        return tuple(
            _ModuleState(
                module,
                {name: value for name, value in vars(module).items() if name[0] != "_"},
                {
                    name: (buffer, buffer.detach().clone())
                    for name, buffer in module._buffers.items()
                    if buffer is not None
                },
            )
            for module in self._modules
        )

    @contextmanager
    def used(self, state: RopeState | None = None) -> Iterator[None]:
        """Context in which a forward of any length may run, starting from `state` or, if that is
        None, as if the model had just been loaded."""
        self._put(self._fresh if state is None else state)
        try:
            yield
        finally:
            self._put(self._fresh)

    @staticmethod
    @torch.inference_mode()
    def _put(state: RopeState) -> None:
        for held in state:
            own = vars(held.module)
            for name in [n for n in own if n[0] != "_" and n not in held.attributes]:
                del own[name]
            own.update(held.attributes)
            buffers = held.module._buffers
            for name in [n for n in buffers if n not in held.buffers]:
                del buffers[name]
            for name, (buffer, values) in held.buffers.items():
                buffer.copy_(values)
                # The same tensor as before: a captured decode reads it by address.
                buffers[name] = buffer


def find_length_rope(model: Any, tokens: int) -> LengthRope | None:
    """The rotary embeddings of `model` that depend on the length of a sequence of up to `tokens`
    tokens; None if there are none."""
    if not isinstance(model, nn.Module):
        return None
    unchanged: dict[nn.Module, int] = {}
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        if not isinstance(kinds, str | dict):
            continue
        layer_types = list(kinds) if isinstance(kinds, dict) else [None]
        probe = LengthRope([module])
        found = [_unchanged_tokens(module, kind, tokens, probe) for kind in layer_types]
        if min(found) < tokens:
            unchanged[module] = min(found)
    if not unchanged:
        return None
    rope = LengthRope(list(unchanged))
    rope.unchanged_tokens = min(unchanged.values())
    return rope


@torch.inference_mode()
def _unchanged_tokens(
    module: nn.Module, layer_type: str | None, tokens: int, probe: LengthRope
) -> int:
    """Length of the longest sequence, up to `tokens`, whose first positions have the same angles as
    in a short one."""
    short = _angles(module, layer_type, PROBED, probe)
    if short is None:
        return tokens
    low, high = PROBED, max(tokens, PROBED) + 1
    if _equal(_angles(module, layer_type, high - 1, probe), short):
        return max(tokens, PROBED)
    while high - low > 1:
        middle = (low + high) // 2
        if _equal(_angles(module, layer_type, middle, probe), short):
            low = middle
        else:
            high = middle
    return low


def _angles(
    module: nn.Module, layer_type: str | None, tokens: int, probe: LengthRope
) -> list[torch.Tensor] | None:
    """The angles of the first positions of a sequence of `tokens` tokens; None if the embedding
    needs arguments other than positions."""
    buffer = next(module.buffers(), None)
    device = torch.device("cpu") if buffer is None else buffer.device
    positions = torch.arange(PROBED + 1, device=device)[None]
    positions[0, PROBED] = tokens - 1
    values = torch.zeros(1, 1, 1, device=device)
    arguments = (layer_type,) if layer_type is not None else ()
    # Multimodal kinds have three axes of positions.
    for given in (positions, positions.expand(3, 1, -1)):
        with probe.used():
            try:
                result = module(values, given, *arguments)
            except (TypeError, ValueError, IndexError, RuntimeError, KeyError):
                continue
        parts = result if isinstance(result, tuple) else (result,)
        return [part[..., :PROBED, :].clone() for part in parts]
    return None


def _equal(one: list[torch.Tensor] | None, other: list[torch.Tensor]) -> bool:
    return one is not None and all(map(torch.equal, one, other))
