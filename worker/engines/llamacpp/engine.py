"""One llama.cpp context as a continuous batch: many sequences in each `llama_decode`.

Running streams decode first; prompts fill the rest of the batch. Rows share one unified KV cache;
if it is full, the youngest row is preempted and prefilled again later. Attention over a unified
cache reads the tokens of all rows for each of them, so if the cache can hold the longest context
for every slot, each has a part of its own. Logits are on the host anyway, so every request uses
tokenbus' own sampler. Text only.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import llama_cpp as ll
import numpy as np
from transformers import PreTrainedConfig

from broker.protocol.errors import ErrorCode, ErrorInfo
from worker.engines.base import EngineLoadError, EngineOptions, Progress
from worker.engines.common.arguments import SharedSettings, split_arguments, whole
from worker.engines.common.facts import ModelFacts
from worker.engines.common.generator import Drawn
from worker.engines.common.host_sampling import HostSampler
from worker.engines.common.library_model import (
    LibraryEngine,
    LibraryModel,
    architecture,
    named_models,
    refuse_options,
)
from worker.engines.common.sequence import Sequence
from worker.engines.common.template import use_template
from worker.engines.llamacpp.gguf import GgufTokenizer, load_weights, metadata

__all__ = ["LlamaGenerator", "build_engine"]

DEFAULT_SLOTS = 16
"""Rows that decode together; on a CPU, more gain little."""

BATCH_TOKENS = 512
"""Tokens of one `llama_decode`, including those of prompts: running streams wait for it. The same
as llama.cpp's default size of a physical batch."""

CACHE_TYPES = {
    "auto": ll.GGML_TYPE_F16,
    "float16": ll.GGML_TYPE_F16,
    "float32": ll.GGML_TYPE_F32,
}
"""`--dtype` applies to keys and values; the file determines the type of the weights."""

NO_ROOM = 1
"""Return code of `llama_decode` if the cache has no room for the batch."""


def build_engine(options: EngineOptions, progress: Progress) -> LibraryEngine:
    """Load every GGUF file of `options`. Raises `EngineLoadError`."""
    own = {
        "kv_tokens": whole(1),
        "batch_tokens": whole(1),
        "gpu_layers": whole(-1),
        "threads": whole(1),
    }
    settings, arguments = split_arguments("llamacpp", options.engine_args, own)
    refuse_options(
        options,
        {
            "model_base": "merge the adapter before you convert the model to GGUF",
            "load_8bit": "the file determines the weights' type; convert it with llama-quantize",
            "load_4bit": "the file determines the weights' type; convert it with llama-quantize",
            "revision": "a GGUF file is local",
        },
    )
    if options.dtype not in CACHE_TYPES:
        raise EngineLoadError(f"unknown dtype {options.dtype!r}: choose {', '.join(CACHE_TYPES)}")
    if options.device not in ("auto", "cpu", "cuda", "mps"):
        raise EngineLoadError(
            f"engine llamacpp does not take --device {options.device}: choose auto or cpu; which "
            "GPUs are used depends on how llama.cpp was built"
        )
    on_gpu = options.device != "cpu" and ll.llama_supports_gpu_offload()
    served: list[LibraryModel] = []
    for path, names in named_models(options, several=True):
        if not Path(path).expanduser().is_file():
            raise EngineLoadError(
                f"there is no file {path}: engine llamacpp takes GGUF files "
                "(llama.cpp's convert_hf_to_gguf.py makes them)"
            )
        layers = arguments.get("gpu_layers", -1) if on_gpu else 0
        model = load_weights(str(Path(path).expanduser()), layers, progress)
        facts = _describe(model, path, settings)
        use_template(facts, options.chat_template)
        facts.reasoning_parser = options.reasoning_parser
        generator = LlamaGenerator(
            model,
            facts,
            slots=options.slots or DEFAULT_SLOTS,
            kv_tokens=arguments.get("kv_tokens", 0),
            batch_tokens=arguments.get("batch_tokens", BATCH_TOKENS),
            threads=arguments.get("threads", 0),
            cache_type=CACHE_TYPES[options.dtype],
        )
        served.append(
            LibraryModel(
                facts,
                names,
                settings,
                generator,
                unsupported={
                    "constraint": "cannot constrain answers: its tokenizers are not those that "
                    "llguidance reads; use --engine transformers"
                },
            )
        )
    progress(1.0, "ready")
    return LibraryEngine("llamacpp", "gpu" if on_gpu else "cpu", served, settings)


def _describe(model: Any, path: str, settings: SharedSettings) -> ModelFacts:
    if ll.llama_model_has_encoder(model):
        raise EngineLoadError(
            f"{path} is an encoder-decoder model, which engine llamacpp does not serve here: serve "
            "it with --engine transformers"
        )
    tokenizer = GgufTokenizer(model)
    config = PreTrainedConfig(
        hidden_size=int(ll.llama_model_n_embd(model)),
        vocab_size=len(tokenizer),
        max_position_embeddings=int(ll.llama_model_n_ctx_train(model)),
        eos_token_id=tokenizer.end_ids or None,
        architectures=[metadata(model, "general.architecture") or "unknown"],
    )
    details = {
        "architecture": architecture(config),
        "library": "llamacpp",
        "parameters": int(ll.llama_model_n_params(model)),
        "layers": int(ll.llama_model_n_layer(model)),
        "weights_bytes": int(ll.llama_model_size(model)),
        "name": metadata(model, "general.name"),
    }
    return ModelFacts.gather(config, tokenizer, settings=settings, details=details)


@dataclass(slots=True, eq=False)
class _Row:
    """A sequence and its place in the KV cache. `sequence.filled` counts its tokens there."""

    sequence: Sequence
    #: llama.cpp's sequence id.
    place: int
    #: Whether it has been preempted and waits for room in the cache.
    parked: bool = False
    #: In the current step: the index of its first token in the batch, and their number.
    start: int = 0
    count: int = 0


class LlamaGenerator:
    """One llama.cpp model and its context (see `Generator`). Owns both."""

    def __init__(
        self,
        model: Any,
        facts: ModelFacts,
        *,
        slots: int,
        kv_tokens: int,
        batch_tokens: int,
        threads: int,
        cache_type: int,
    ) -> None:
        self.slots = slots
        self._model = model
        self._vocabulary = len(facts.tokenizer)
        self._sampler = HostSampler(facts)
        self._batch_tokens = max(batch_tokens, slots)
        params = ll.llama_context_default_params()
        # Without a limit of its own, the cache holds one prompt of the longest length.
        params.n_ctx = kv_tokens or facts.context_tokens
        params.n_batch = self._batch_tokens
        params.n_seq_max = slots
        # Rows share the whole cache; else each has an equal part.
        params.kv_unified = params.n_ctx < slots * facts.context_tokens
        params.type_k = params.type_v = cache_type
        if cache_type == ll.GGML_TYPE_F32:
            # The kernels of flash attention compute keys and values in half precision.
            params.flash_attn_type = ll.LLAMA_FLASH_ATTN_TYPE_DISABLED
        if threads:
            params.n_threads = params.n_threads_batch = threads
        self._context = ll.llama_init_from_model(model, params)
        if not self._context:
            raise EngineLoadError(
                f"llama.cpp has no memory for a KV cache of {params.n_ctx} tokens: lower "
                "--engine-arg kv_tokens"
            )
        self._memory = ll.llama_get_memory(self._context)
        self._kv_tokens = int(ll.llama_n_ctx(self._context))
        facts.context_tokens = min(facts.context_tokens, self._kv_tokens)
        self._batch = ll.llama_batch_init(self._batch_tokens, 0, 1)
        self._free = list(range(slots))
        #: In order of admission.
        self._rows: list[_Row] = []

    # --- the Generator interface ------------------------------------------------------------------

    def insert(self, sequence: Sequence) -> None:
        sequence.filled = 0
        # The lowest: places that follow each other are computed together (see `_fill_batch`).
        place = min(self._free)
        self._free.remove(place)
        self._rows.append(_Row(sequence, place))

    def remove(self, sequence: Sequence) -> None:
        row = next(row for row in self._rows if row.sequence is sequence)
        self._rows.remove(row)
        self._forget(row)
        self._free.append(row.place)

    def next(self) -> list[Drawn]:
        self._make_room()
        used = self._fill_batch()
        while (code := ll.llama_decode(self._context, self._batch)) == NO_ROOM:
            holding = [row for row in self._rows if not row.parked]
            if len(holding) == 1:
                return [Drawn(holding[0].sequence, _no_room(holding[0].sequence))]
            self._park(holding[-1])
            used = self._fill_batch()
        if code != 0:
            raise RuntimeError(f"llama_decode failed with code {code}")
        for row in used:
            row.sequence.filled += row.count
        self._score_prompts(used)
        return self._sample([row for row in used if row.sequence.filled == row.sequence.total])

    def kv_total_tokens(self) -> int:
        return self._kv_tokens

    def close(self) -> None:
        if self._context is None:
            return
        ll.llama_batch_free(self._batch)
        ll.llama_free(self._context)
        ll.llama_model_free(self._model)
        self._context = self._model = None
        self._rows.clear()

    # --- the cache --------------------------------------------------------------------------------

    def _make_room(self) -> None:
        """Preempt the youngest rows while the cache has no room for one more token of each; readmit
        preempted rows, oldest first, while all their tokens fit."""
        holding = [row for row in self._rows if not row.parked]
        while len(holding) > 1 and self._needed(holding) > self._kv_tokens:
            self._park(holding.pop())
        for row in self._rows:
            if row.parked and self._needed([*holding, row]) <= self._kv_tokens:
                row.parked = False
                holding.append(row)

    @staticmethod
    def _needed(rows: list[_Row]) -> int:
        return sum(row.sequence.total for row in rows)

    def _park(self, row: _Row) -> None:
        self._forget(row)
        row.parked = True

    def _forget(self, row: _Row) -> None:
        ll.llama_memory_seq_rm(self._memory, row.place, -1, -1)
        row.sequence.filled = 0

    # --- one step ---------------------------------------------------------------------------------

    def _fill_batch(self) -> list[_Row]:
        """Fill the batch with the next tokens of the rows; returns the rows in it."""
        batch = self._batch
        batch.n_tokens = 0
        rows = [row for row in self._rows if not row.parked]
        pending = {id(row): row.sequence.total - row.sequence.filled for row in rows}
        # A stable sort: decoding rows first, then prompts in order of admission. Without a unified
        # cache, llama.cpp computes only rows together whose places follow each other.
        rows.sort(key=lambda row: (1, 0) if pending[id(row)] > 1 else (0, row.place))
        used: list[_Row] = []
        for row in rows:
            row.start = batch.n_tokens
            row.count = min(pending[id(row)], self._batch_tokens - batch.n_tokens)
            if row.count < 1:
                break
            self._put(row)
            used.append(row)
        return used

    def _put(self, row: _Row) -> None:
        batch, sequence = self._batch, row.sequence
        first = sequence.filled
        for offset, token_id in enumerate(sequence.tokens(first, first + row.count)):
            index, position = row.start + offset, first + offset
            batch.token[index] = token_id
            batch.pos[index] = position
            batch.n_seq_id[index] = 1
            batch.seq_id[index][0] = row.place
            scored = sequence.wants_prompt_logprobs and position < len(sequence.prompt.ids)
            batch.logits[index] = scored or position == sequence.total - 1
        batch.n_tokens += row.count

    def _logits(self, index: int) -> np.ndarray[Any, np.dtype[np.float32]]:
        """Logits [vocabulary] at one token of the batch, in llama.cpp's own memory: valid until its
        next step."""
        pointer = ll.llama_get_logits_ith(self._context, index)
        return np.ctypeslib.as_array(pointer, shape=(self._vocabulary,))

    def _score_prompts(self, used: list[_Row]) -> None:
        for row in used:
            sequence = row.sequence
            first = sequence.filled - row.count
            count = min(row.count, len(sequence.prompt.ids) - first)
            if sequence.wants_prompt_logprobs and count > 0:
                logits = [self._logits(row.start + offset) for offset in range(count)]
                self._sampler.score_prompt(sequence, first, np.stack(logits))

    def _sample(self, rows: list[_Row]) -> list[Drawn]:
        if not rows:
            return []
        logits = np.stack([self._logits(row.start + row.count - 1) for row in rows])
        outcomes = self._sampler.sample(logits, [row.sequence.row for row in rows])
        return [Drawn(row.sequence, outcome) for row, outcome in zip(rows, outcomes, strict=True)]


def _no_room(sequence: Sequence) -> ErrorInfo:
    return ErrorInfo(
        code=ErrorCode.OUT_OF_MEMORY.value,
        message=f"the KV cache has no room for the {sequence.total} tokens of this request, even "
        "alone: raise --engine-arg kv_tokens on the worker",
    )
