"""Weights of linear layers in oneDNN's own order, on a CPU.

On some processors, oneDNN multiplies by a matrix stored in the blocks that its kernels read more
than twice as fast as torch's `linear` does by one stored in rows (float32 on an AMD EPYC 9005: 2.2
times). So a layer's weight is put into that order once, when the model is loaded; there is no
second copy. Must never change what a layer computes beyond rounding: each packed layer is compared
with the plain one.
"""

from __future__ import annotations

import logging
import math
import time
from collections import Counter
from collections.abc import Callable
from typing import TypeGuard

import torch
from torch import nn

from worker.engines.common.failures import one_line

__all__ = [
    "PackedLinear",
    "can_pack",
    "is_plain",
    "pack_weights",
    "packed_bytes",
    "packs_faster",
    "restore_read",
]

log = logging.getLogger(__name__)

ERRORS = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
"""Largest relative difference of a product from torch's, for each dtype that can be packed.
Observed: 4e-7 and 3e-3."""

SMALLEST = 1 << 14
"""Only a layer of at least this many weights is timed."""

PROBED_ROWS = 4
TIMED_ROWS = 8
TIMED_RUNS = 15
WORTH = 1.05
"""Weights are packed if a product then takes at most this share of torch's CPU time. It is above 1
because little is lost where the two are equal, but half of the speed where packing is faster and a
disturbed measurement hid it."""


def is_plain(module: nn.Module | None) -> TypeGuard[nn.Linear]:
    """Whether this is an ordinary linear layer that nothing else observes or changes: neither
    quantised, nor spread by accelerate, nor with hooks."""
    if type(module) is not nn.Linear or "forward" in vars(module) or hasattr(module, "_hf_hook"):
        return False
    weight, bias = module.weight, module.bias
    return (
        not module._forward_hooks
        and not module._forward_pre_hooks
        and type(weight) is nn.Parameter
        and weight.layout is torch.strided
        and (bias is None or bias.dtype == weight.dtype)
    )


def _is_packable(module: nn.Module | None) -> TypeGuard[nn.Linear]:
    return is_plain(module) and module.weight.device.type == "cpu" and can_pack(module.weight.dtype)


class PackedLinear(nn.Module):
    """A linear layer with a packed weight."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.dtype = weight.dtype
        self.packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), None)
        self.bias = None if bias is None else bias.detach()
        #: How often the model's own code has read the weight instead of calling the layer.
        self.reads = 0

    @property
    def weight(self) -> torch.Tensor:
        """The plain weight [outputs, inputs], unpacked anew on each access."""
        self.reads += 1
        return self.packed.to_dense()

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        if inputs.dtype is not self.dtype:
            # Like torch's own layer: an error unless autocast is on.
            return nn.functional.linear(inputs, self.weight, self.bias)
        return self.product(inputs, "none")

    def product(self, inputs: torch.Tensor, activation: str) -> torch.Tensor:
        """The layer's output for `inputs` [..., inputs], after an activation that oneDNN fuses
        ("none", "swish")."""
        result: torch.Tensor = torch.ops.mkldnn._linear_pointwise.default(
            inputs, self.packed, self.bias, activation, [], ""
        )
        return result

    def combined(self, inputs: torch.Tensor, other: torch.Tensor, operation: str) -> torch.Tensor:
        """The layer's output combined ("add", "mul") with `other` [..., outputs]."""
        result: torch.Tensor = torch.ops.mkldnn._linear_pointwise.binary(
            inputs, other, self.packed, self.bias, operation
        )
        return result

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}"


def can_pack(dtype: torch.dtype) -> bool:
    """Whether weights of this dtype can be packed here: torch must be built with oneDNN (on macOS
    it is not), and bfloat16 needs a processor with AVX-512 or an equivalent."""
    if dtype not in ERRORS or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    return dtype is not torch.bfloat16 or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def packs_faster(model: nn.Module) -> bool:
    """Whether this processor multiplies faster by packed weights, measured on the largest layer
    whose shape the model has several times."""
    plain = [m for m in model.modules() if _is_packable(m) and m.weight.numel() >= SMALLEST]
    shapes = Counter(m.weight.shape for m in plain)
    several = [m for m in plain if shapes[m.weight.shape] > 1] or plain
    try:
        return bool(several) and _is_quicker(max(several, key=lambda m: m.weight.numel()))
    except RuntimeError as error:
        log.info("weights are not packed: %s", one_line(error))
        return False


def pack_weights(model: nn.Module) -> int:
    """Pack the weights of all plain linear layers of a model. Returns how many were packed. A
    weight that is tied to an embedding is then in memory twice."""
    done: dict[nn.Module, PackedLinear] = {}
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if child not in done and _is_packable(child):
                packed = PackedLinear(child.weight, child.bias)
                if _agrees(packed, child):
                    done[child] = packed
            if child in done:
                setattr(parent, name, done[child])
    log.debug("%d linear layers are packed", len(done))
    return len(done)


def restore_read(model: nn.Module) -> int:
    """Make packed layers plain again whose weight the model's own code has read, since each read
    unpacks a copy. Returns how many were restored."""
    count = 0
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, PackedLinear) and child.reads:
                linear = nn.Linear(child.in_features, child.out_features, device="meta")
                linear.weight = nn.Parameter(child.packed.to_dense(), requires_grad=False)
                bias = None if child.bias is None else nn.Parameter(child.bias, requires_grad=False)
                linear.register_parameter("bias", bias)
                setattr(parent, name, linear.eval())
                count += 1
    return count


def packed_bytes(model: nn.Module) -> int:
    """Bytes of all packed weights, which do not count as parameters."""
    seen = {m.packed for m in model.modules() if isinstance(m, PackedLinear)}
    return sum(packed.numel() * packed.element_size() for packed in seen)


@torch.inference_mode()
def _agrees(packed: PackedLinear, linear: nn.Linear) -> bool:
    inputs = _inputs(linear, PROBED_ROWS)
    wanted = linear(inputs)
    error = (packed(inputs) - wanted).float().norm() / wanted.float().norm().clamp_min(1e-12)
    if float(error) <= ERRORS[linear.weight.dtype]:
        return True
    log.warning("a linear layer is not packed: its output differs from torch's by %.2g", error)
    return False


@torch.inference_mode()
def _is_quicker(linear: nn.Linear) -> bool:
    inputs = _inputs(linear, TIMED_ROWS)
    packed = PackedLinear(linear.weight, linear.bias)
    plain_s = packed_s = math.inf
    # Alternately and often, since other programs disturb measurements and evict caches.
    for _ in range(TIMED_RUNS):
        plain_s = min(plain_s, _cpu_s(lambda: linear(inputs)))
        packed_s = min(packed_s, _cpu_s(lambda: packed(inputs)))
    log.debug("a product takes %.3g ms of CPU, packed %.3g", plain_s * 1e3, packed_s * 1e3)
    return packed_s <= WORTH * plain_s


def _inputs(linear: nn.Linear, rows: int) -> torch.Tensor:
    numbers = torch.arange(rows * linear.in_features, dtype=torch.float32)
    return torch.sin(numbers).view(rows, -1).to(linear.weight.dtype)


def _cpu_s(run: Callable[[], object]) -> float:
    """CPU time of a run, in seconds."""
    started = time.process_time()
    run()
    return time.process_time() - started
