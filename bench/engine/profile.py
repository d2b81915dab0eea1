"""Where a step of the engine spends its CPU time, beside the bare matrix products of its shapes.

Measures decode steps and a prefill, in float32 and bfloat16, in CPU time of the process, which a
busy machine distorts less than wall time. Runs only what the engine runs: the step is that of a
loaded engine, with all its preparations.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from bench.common import Sample, interleave, repeats
from bench.engine.cases import KV_TOKENS, Setting, build_engine, build_model
from worker.engines.common.prompt import Prompt
from worker.engines.common.sequence import Sequence, bare_fields
from worker.engines.transformers.forward import Forward
from worker.engines.transformers.kernels import Kernels

__all__ = ["Step", "kind_of", "products", "profile"]

DEFAULT_ROWS = (1, 8, 32)
FILLED = 48
"""Tokens in the KV cache of every decoded row: a prompt of 16 and half of an answer of 64."""
DTYPES = (torch.float32, torch.bfloat16)
SHORTEST_S = 0.1
"""A measurement repeats its step for at least this long, since the CPU clock is coarse."""

PARTS = ("products", "attention", "pointwise", "copies", "other", "python")
"""The parts of a step. `pointwise`: norms, rotary embedding, activation, sums. `python`: all that
is neither an operator of torch nor compiled code, such as the dispatch between them."""

_KINDS = {
    "products": ("mm", "addmm", "linear", "_linear_pointwise", "mkldnn_linear", "_mkl_linear"),
    "attention": (
        "_scaled_dot_product_flash_attention_for_cpu",
        "scaled_dot_product_attention",
        "bmm",
        "baddbmm",
        "softmax",
        "_softmax",
    ),
    "pointwise": (
        *("add", "add_", "sub", "mul", "mul_", "neg", "pow", "mean", "rsqrt", "cat", "cos", "sin"),
        *("silu", "silu_", "rms_norm", "_fused_rms_norm", "addcmul", "addcmul_", "embedding", "le"),
        *(
            "complex",
            "view_as_complex",
            "view_as_real",
            "where",
            "bitwise_and",
            "native_layer_norm",
        ),
    ),
    "copies": (
        *("copy_", "clone", "contiguous", "_to_copy", "to", "index_copy_", "index_copy", "index"),
        *(
            "index_select",
            "index_put_",
            "_index_put_impl_",
            "fill_",
            "zero_",
            "gather",
            "slice_copy",
        ),
    ),
}
_KIND = {name: kind for kind, names in _KINDS.items() for name in names}


_COMPILED = {
    "norm": "pointwise",
    "store": "pointwise",
    "attend": "attention",
    "attend_together": "attention",
}
"""The parts to which our compiled functions belong, which torch does not see."""


def kind_of(operator: str) -> str:
    """The part (one of `PARTS`) to which an operator such as `aten.mm.default` belongs."""
    return _KIND.get(operator.split(".")[1], "other")


class Step:
    """One decode step of `rows` rows, or (`rows` 0) one prefill of `tokens` tokens."""

    def __init__(self, forward: Forward, rows: int, tokens: int) -> None:
        self.rows, self.tokens = rows, tokens
        self._forward = forward
        vocabulary = forward._loaded.vocabulary
        self._sequences = [
            _sequence([(row * 131 + at * 7) % (vocabulary - 10) + 10 for at in range(tokens)])
            for row in range(max(rows, 1))
        ]
        if not forward.cache.reserve(len(self._sequences), tokens + 2, 0, 0):
            raise MemoryError(f"no room for {rows} rows of {tokens} tokens")
        for slot, sequence in enumerate(self._sequences if rows else ()):
            self._prefill(slot, sequence)
            sequence.filled = tokens
            sequence.answer.append(10)

    def _prefill(self, slot: int, sequence: Sequence) -> None:
        with torch.inference_mode():
            self._forward.prefill(slot, sequence, 0, self.tokens)

    def __call__(self) -> None:
        if not self.rows:
            self._prefill(0, self._sequences[0])
            return
        with torch.inference_mode():
            # The same position each time: a step does not depend on whether it was run before.
            self._forward.decode(self._sequences)


def _sequence(ids: list[int]) -> Sequence:
    import numpy as np

    prompt = Prompt(ids=ids, key=np.asarray(ids, dtype=np.int64))
    return Sequence(**bare_fields(b"", prompt, None))


def products(model: nn.Module, rows: int, last: int) -> Callable[[], None]:
    """The matrix products of one forward of `model` over `rows` tokens.

    They are plain `linear` on new weights; the head, the last layer, computes only `last` tokens.
    """
    weights = [m.weight for m in model.modules() if isinstance(m, nn.Linear)]
    own = [torch.randn(w.shape, dtype=w.dtype) * 0.02 for w in weights]
    counts = [rows] * (len(own) - 1) + [last]
    inputs = {
        (count, weight.shape[1]): torch.randn(count, weight.shape[1], dtype=weight.dtype)
        for count, weight in zip(counts, own, strict=True)
    }

    def run() -> None:
        with torch.inference_mode():
            for count, weight in zip(counts, own, strict=True):
                nn.functional.linear(inputs[count, weight.shape[1]], weight)

    return run


def profile(setting: Setting) -> None:
    """Report each step beside its bare products, and each of its parts."""
    if setting.device.type != "cpu":
        raise SystemExit("--only profile measures CPU time, so it needs --device cpu")
    rows = setting.arguments.streams or DEFAULT_ROWS
    for dtype in DTYPES:
        shape = replace(setting.shape, dtype=dtype)
        with torch.device("meta"):
            bare = build_model(shape, torch.device("meta"))
        engine = build_engine(
            build_model(shape, setting.device),
            setting.tokenizer,
            max(rows),
            kv_tokens=KV_TOKENS,
        )
        runner = engine._served[0].slot_runner
        assert runner is not None
        for count in (*rows, 0):
            tokens = FILLED if count else setting.arguments.prefill
            _measure(setting, bare, Step(runner.forward, count, tokens), dtype)
        engine.close()


def _measure(setting: Setting, bare: nn.Module, step: Step, dtype: torch.dtype) -> None:
    floor = products(bare, step.rows or step.tokens, step.rows or 1)
    times = repeats(setting.arguments)
    step()
    floor()
    seen = interleave(
        {"step": lambda: _cpu_ms(step), "products": lambda: _cpu_ms(floor)}, 2 * times
    )
    common: dict[str, Any] = {
        "phase": "decode" if step.rows else "prefill",
        "rows": step.rows or 1,
        "tokens": step.tokens,
        "dtype": str(dtype).removeprefix("torch."),
        "model": setting.size,
    }
    own = seen["step"]["cpu_ms"]
    setting.report.add(
        "engine_step_cpu_ms",
        own,
        "ms",
        peer="products",
        against=seen["products"]["cpu_ms"],
        **common,
    )
    for part, spent in _parts(step, own, times).items():
        setting.report.add("engine_step_part_ms", spent, "ms", part=part, **common)


def _cpu_ms(run: Callable[[], None]) -> dict[str, float]:
    """CPU milliseconds of one call."""
    count, started = 0, time.process_time()
    while (spent := time.process_time() - started) < SHORTEST_S:
        run()
        count += 1
    return {"cpu_ms": spent / count * 1e3}


def _parts(step: Step, whole: Sample, times: int) -> dict[str, float]:
    """CPU milliseconds by part."""
    runs: dict[str, list[float]] = {part: [] for part in PARTS}
    for _ in range(max(3, times)):
        clock = _OperatorClock()
        with clock, _compiled_code(clock):
            step()
        for part, spent in clock.ms.items():
            runs[part].append(spent)
    parts = {part: Sample(tuple(seen)).median for part, seen in runs.items() if seen}
    parts["python"] = max(whole.median - sum(parts.values()), 0.0)
    return parts


class _OperatorClock(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sums up the CPU time of operators.

    torch's profiler uses wall time, which was four times that of the step on a busy machine.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.ms = dict.fromkeys(PARTS[:-1], 0.0)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        started = time.process_time_ns()
        result = func(*args, **(kwargs or {}))
        spent = time.process_time_ns() - started
        self.ms[kind_of(str(func))] += spent / 1e6
        return result


@contextmanager
def _compiled_code(clock: _OperatorClock) -> Iterator[None]:
    """Time calls of our compiled code too."""
    own = {name: getattr(Kernels, name) for name in _COMPILED}

    def timed(name: str) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            started = time.process_time_ns()
            result = own[name](*arguments, **named)
            clock.ms[_COMPILED[name]] += (time.process_time_ns() - started) / 1e6
            return result

        return call

    for name in own:
        setattr(Kernels, name, timed(name))
    try:
        yield
    finally:
        for name, function in own.items():
            setattr(Kernels, name, function)
