"""mlx-lm's continuous batching as a `Generator`.

Greedy requests stay entirely on the device. Others use tokenbus' own sampler, passed to the library
as a logits processor that leaves only the sampled token. Thus every sampling parameter works, at
the cost of one transfer per token of such a request. Text models only (mlx-lm has no others).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.generate import BatchGenerator
from mlx_lm.utils import load as load_mlx

from worker.engines.base import EngineLoadError, EngineOptions, Progress
from worker.engines.common.arguments import split_arguments, whole
from worker.engines.common.facts import ModelFacts
from worker.engines.common.failures import error_info
from worker.engines.common.generator import Drawn
from worker.engines.common.host_sampling import HostSampler, RowAhead, is_plain_greedy
from worker.engines.common.library_model import (
    LibraryEngine,
    LibraryModel,
    describe,
    explained,
    named_models,
    refuse_options,
)
from worker.engines.common.sampling import Sampled
from worker.engines.common.sequence import Sequence

__all__ = ["MlxGenerator", "build_engine"]

DEFAULT_SLOTS = 32
"""mlx-lm's own default for the number of rows that decode together."""

PREFILL_TOKENS = 512
"""Prompt tokens per step, for which running streams wait. mlx-lm's own default is 2048."""

GROUP_SIZE = 64
"""Weights that share a scale when quantised at load time: mlx-lm's default."""

UNBOUNDED = 1 << 30
"""No limit for mlx-lm: tokenbus finds the end of an answer itself, and removes the sequence."""

DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}


def build_engine(options: EngineOptions, progress: Progress) -> LibraryEngine:
    """Load every model of `options`. Raises `EngineLoadError`."""
    own = {"prefill_tokens": whole(1), "prefill_batch": whole(1)}
    settings, arguments = split_arguments("mlx", options.engine_args, own)
    refuse_options(options, {"model_base": "merge the adapter into its base first (mlx_lm.fuse)"})
    _set_device(options.device)
    served: list[LibraryModel] = []
    for path, names in named_models(options, several=True):
        progress(None, f"loading {path}")
        facts = describe(path, options, settings, images=False, library="mlx")
        model = _load(path, options, facts)
        generator = MlxGenerator(
            model,
            facts,
            slots=options.slots or DEFAULT_SLOTS,
            prefill_tokens=arguments.get("prefill_tokens", PREFILL_TOKENS),
            prefill_batch=arguments.get("prefill_batch", 8),
        )
        served.append(LibraryModel(facts, names, settings, generator))
    progress(1.0, "ready")
    return LibraryEngine("mlx", str(mx.default_device()), served, settings)


def _set_device(name: str) -> None:
    if name == "auto":
        return
    devices = {"cpu": mx.cpu, "gpu": mx.gpu, "mps": mx.gpu, "cuda": mx.gpu}
    if name not in devices:
        raise EngineLoadError(f"unknown --device {name} for engine mlx: choose auto, cpu or gpu")
    if devices[name] == mx.gpu and not mx.is_available(mx.gpu):
        raise EngineLoadError(f"--device {name}: this MLX finds no GPU; choose auto or cpu")
    mx.set_default_device(devices[name])


def _load(path: str, options: EngineOptions, facts: ModelFacts) -> Any:
    """The model, in the requested dtype or quantised."""
    if options.load_8bit and options.load_4bit:
        raise EngineLoadError("choose one of --load-8bit and --load-4bit")
    if options.dtype != "auto" and options.dtype not in DTYPES:
        raise EngineLoadError(f"unknown dtype {options.dtype!r}: choose auto, {', '.join(DTYPES)}")
    with explained(path, "mlx"):
        model, *_ = load_mlx(
            path, revision=options.revision, trust_remote_code=options.trust_remote_code
        )
        if options.dtype != "auto":
            model.set_dtype(DTYPES[options.dtype])
        if bits := 8 if options.load_8bit else 4 if options.load_4bit else 0:
            nn.quantize(model, group_size=GROUP_SIZE, bits=bits)
            facts.quantised = True
        mx.eval(model.parameters())
    facts.details |= {"quantised": facts.quantised}
    return model


class _Running:
    """A sequence in the library's batch, and the tokens sampled ahead."""

    def __init__(self, sequence: Sequence) -> None:
        self.sequence = sequence
        self.ahead: RowAhead | None = None
        self.sampled: deque[Sampled] = deque()


class MlxGenerator:
    """One MLX model and its batch (see `Generator`)."""

    def __init__(
        self,
        model: Any,
        facts: ModelFacts,
        *,
        slots: int,
        prefill_tokens: int,
        prefill_batch: int,
    ) -> None:
        self.slots = slots
        self._model = model
        self._sampler = HostSampler(facts)
        self._batch = BatchGenerator(
            model,
            completion_batch_size=slots,
            prefill_batch_size=min(prefill_batch, slots),
            prefill_step_size=prefill_tokens,
        )
        self._by_uid: dict[int, _Running] = {}
        self._uids: dict[int, int] = {}
        self._failed: list[Drawn] = []

    def insert(self, sequence: Sequence) -> None:
        running = _Running(sequence)
        processors: list[Callable[[Any, mx.array], mx.array]] = []
        if not is_plain_greedy(sequence):
            running.ahead = RowAhead(sequence)
            processors.append(self._chooser(running, running.ahead))
        try:
            if sequence.wants_prompt_logprobs:
                self._score_prompt(sequence)
        except (RuntimeError, ValueError) as error:
            self._failed.append(
                Drawn(sequence, error_info(error, "the model failed on this request"))
            )
        (uid,) = self._batch.insert(
            [sequence.prompt.ids + sequence.answer],
            max_tokens=[UNBOUNDED],
            logits_processors=[processors],
        )
        self._by_uid[uid] = running
        self._uids[id(sequence)] = uid

    def remove(self, sequence: Sequence) -> None:
        uid = self._uids.pop(id(sequence))
        del self._by_uid[uid]
        self._batch.remove([uid])

    def next(self) -> list[Drawn]:
        drawn, self._failed = self._failed, []
        _, responses = self._batch.next()
        for response in responses:
            running = self._by_uid[response.uid]
            sampled = Sampled(int(response.token), None, ok=True)
            if running.ahead is not None:
                sampled = running.sampled.popleft()
            drawn.append(Drawn(running.sequence, sampled))
        return drawn

    def kv_total_tokens(self) -> int:
        return 0

    def close(self) -> None:
        self._batch.close()
        self._by_uid.clear()
        self._uids.clear()
        self._model = None

    def _chooser(self, running: _Running, ahead: RowAhead) -> Callable[[Any, mx.array], mx.array]:
        """A logits processor that samples, and leaves the library only the sampled token."""

        def choose(context: Any, logits: mx.array) -> mx.array:
            values = np.array(logits.astype(mx.float32))
            sampled = ahead.took(self._sampler.sample(values, [ahead.row])[0])
            running.sampled.append(sampled)
            only = mx.arange(logits.shape[-1]) == max(sampled.token_id, 0)
            return mx.where(only[None], 0.0, -mx.inf).astype(logits.dtype)

        return choose

    def _score_prompt(self, sequence: Sequence) -> None:
        """The prompt's logprobs, by a separate pass: the batch does not return them."""
        logits = self._model(mx.array([sequence.prompt.ids]))[0]
        self._sampler.score_prompt(sequence, 0, np.array(logits.astype(mx.float32)))
