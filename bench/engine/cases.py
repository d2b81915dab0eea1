"""Models and runners of `bench.engine`: our engine and its peers on the same model.

Every runner takes the prompts of all streams at once, generates the same number of tokens for each,
greedily, and returns its figures. Nothing is downloaded: weights are random. The runners here share
this process; `bench.engine.served` has those that start servers.
"""

from __future__ import annotations

import argparse
import copy
import functools
import io
import json
import queue
import random
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    TextIteratorStreamer,
)

from bench.common import Report, Sample
from broker.protocol.messages import Kind, Params, Request, new_id
from worker.engines.base import Job, Tokens
from worker.engines.transformers.engine import TransformersEngine
from worker.engines.transformers.loaded import wrap_model
from worker.engines.transformers.served import ServedModel
from worker.engines.transformers.settings import EngineSettings

__all__ = [
    "KV_TOKENS",
    "SIZES",
    "Load",
    "Setting",
    "Shape",
    "build_engine",
    "build_model",
    "build_tokenizer",
    "build_vision",
    "paired",
    "peers",
    "run_engine",
    "run_generate_images",
    "run_images",
    "run_jobs",
    "spoken_tokenizer",
    "token_job",
]

FASTCHAT_THREADS = 5
"""FastChat's default limit of concurrent `generate()` calls in one worker."""
KV_TOKENS = 100_000
"""KV cache tokens of our engine on a CPU."""
QUEUED_STREAMS = 2 * FASTCHAT_THREADS
"""Requests per run for a peer that answers one by one or five at a time: its rate does not depend
on how many wait, but on their length, since FastChat collects garbage after each answer."""


@dataclass(frozen=True)
class Shape:
    """The dimensions of a Llama model."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    intermediate: int
    dtype: torch.dtype


SIZES = {
    "3m": Shape(192, 4, 4, 2, 4096, 512, torch.float32),
    "32m": Shape(512, 8, 8, 4, 8192, 1408, torch.float32),
    "110m": Shape(1024, 8, 16, 8, 8192, 2816, torch.bfloat16),
    "1b": Shape(2048, 16, 32, 8, 32_000, 8192, torch.bfloat16),
    "3b": Shape(3072, 28, 24, 8, 32_000, 8192, torch.bfloat16),
    "7b": Shape(4096, 32, 32, 32, 32_000, 11_008, torch.bfloat16),
    "8b": Shape(4096, 32, 32, 8, 32_000, 14_336, torch.bfloat16),
}
"""The targets are for 32m; 1b and larger are meant for a GPU."""


NO_WORDS = 3 + 256
"""How many ids, the first ones, stand for no word: special tokens and single bytes."""


def build_tokenizer(vocabulary: int) -> Any:
    """A byte-level tokenizer with a word for every id; `w00042 ` is three tokens."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    words = [f"w{number:05d} " for number in range(vocabulary)]
    trainer = trainers.BpeTrainer(
        vocab_size=min(vocabulary, 4000),
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(words, trainer)
    return _filled(core, vocabulary)


def spoken_tokenizer(vocabulary: int, text: str) -> Any:
    """A byte-level tokenizer that has learnt the words of a text."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(text.splitlines(), trainer)
    return _filled(core, vocabulary)


def _filled(core: Tokenizer, vocabulary: int) -> Any:
    learnt = json.loads(core.to_str())
    known = learnt["model"]["vocab"]
    # No merge produces these: prompts never contain them, answers do, and all are text.
    known |= {
        f"\N{LATIN CAPITAL LETTER G WITH DOT ABOVE}x{id_}": id_
        for id_ in range(len(known), vocabulary)
    }
    core = Tokenizer.from_str(json.dumps(learnt))
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def build_model(shape: Shape, device: torch.device, context: int = 16_384) -> Any:
    """A Llama with random weights, created on the device.

    Its greedy answers consist of whole words: no end token, which some peers cannot ignore, and no
    partial character.
    """
    torch.manual_seed(0)
    with torch.device(device):
        model = LlamaForCausalLM._from_config(build_config(shape, context), dtype=shape.dtype)
        with torch.no_grad():
            # Logits of 0 are never the largest among thousands.
            model.lm_head.weight[:NO_WORDS] = 0
    return model.eval()


def build_config(shape: Shape, context: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=context,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        tie_word_embeddings=False,
    )


IMAGE_SIDE = 224
IMAGE_PATCH = 14


def build_vision(shape: Shape, device: torch.device, tokenizer: Any = None) -> tuple[Any, Any]:
    """A LLaVA with random weights and a language model of this shape, and its processor.

    An image has 256 tokens. `tokenizer` is for the text, with one id less than the vocabulary.
    """
    from transformers import (
        CLIPImageProcessor,
        CLIPVisionConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )

    # The image's token takes the last id.
    tokenizer = tokenizer or build_tokenizer(shape.vocabulary - 1)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<image>"]})
    image_id = tokenizer.convert_tokens_to_ids("<image>")
    text = build_config(shape, 4096)
    vision = CLIPVisionConfig(
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=6,
        num_attention_heads=4,
        image_size=IMAGE_SIDE,
        patch_size=IMAGE_PATCH,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=image_id,
        image_token_index=image_id,
        image_seq_length=(IMAGE_SIDE // IMAGE_PATCH) ** 2,
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = LlavaForConditionalGeneration._from_config(config, dtype=shape.dtype)
    side = {"height": IMAGE_SIDE, "width": IMAGE_SIDE}
    processor = LlavaProcessor(
        CLIPImageProcessor(size={"shortest_edge": IMAGE_SIDE}, crop_size=side),
        tokenizer,
        patch_size=IMAGE_PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    return model.eval(), processor


@dataclass
class Setting:
    """What the cases of one run of `bench.engine` share. Models are built on first use."""

    arguments: argparse.Namespace
    report: Report
    device: torch.device
    size: str
    #: Numbers of streams.
    counts: list[int]

    @property
    def shape(self) -> Shape:
        return SIZES[self.size]

    @functools.cached_property
    def model(self) -> Any:
        return build_model(self.shape, self.device)

    @functools.cached_property
    def tokenizer(self) -> Any:
        return build_tokenizer(self.shape.vocabulary)

    @functools.cached_property
    def engine(self) -> TransformersEngine:
        """Our engine, for all cases that need no other settings."""
        own = build_engine(
            self.model,
            self.tokenizer,
            max(*self.counts, 9),
            kv_tokens=KV_TOKENS if self.device.type == "cpu" else 0,
            stall_ms=self.arguments.stall_ms,
        )
        self.report.note(f"scheduler: {own.capabilities.models[0].details['scheduler']}")
        return own

    def token_prompts(self, count: int, low: int, high: int, seed: int) -> list[list[int]]:
        """Prompts of `low` to `high` random token ids."""
        choose = random.Random(seed)
        return [
            [choose.randrange(10, self.shape.vocabulary) for _ in range(choose.randint(low, high))]
            for _ in range(count)
        ]

    def text_prompts(self, count: int, seed: int) -> list[str]:
        """Prompts of random words, with about as many tokens as `--prompt` says."""
        choose = random.Random(seed)
        low, high = self.arguments.prompt[0], self.arguments.prompt[-1]
        return [
            " ".join(
                f"w{choose.randrange(self.shape.vocabulary):05d}"
                for _ in range(max(1, choose.randint(low, high) // 3))
            )
            for _ in range(count)
        ]


@dataclass(frozen=True)
class Load:
    """Streams at the same time, and tokens of each answer."""

    streams: int
    tokens: int

    def for_a_queue(self, quick: bool) -> Load:
        """The load for a peer that answers one by one or five at a time.

        Since fewer requests wait, its first tokens come sooner.
        """
        if quick:
            return Load(min(self.streams, FASTCHAT_THREADS), min(self.tokens, 16))
        return Load(min(self.streams, QUEUED_STREAMS), self.tokens)

    def smaller(self, whole: Load) -> dict[str, int | None]:
        """Parameters of a row whose peer had this load while ours was `whole`."""
        return {
            "peer_streams": self.streams if self.streams < whole.streams else None,
            "peer_answer": self.tokens if self.tokens < whole.tokens else None,
        }


def paired(own: Sample, peer: Sample) -> float:
    """The peer's figure, chosen so that the ratio is the median of all rounds' ratios.

    Whatever slows the machine in a round slows both.
    """
    ratios = Sample(tuple(a / b for a, b in zip(own.values, peer.values, strict=True)))
    return own.median / ratios.median


def build_engine(
    model: Any, tokenizer: Any, slots: int, processor: Any = None, **settings: Any
) -> TransformersEngine:
    """Our engine with the model; on a CPU with a copy, since the engine changes the layers."""
    own = EngineSettings(**({"prefix_tokens": 0} | settings))
    if model.device.type == "cpu":
        model = copy.deepcopy(model)
    loaded = wrap_model(model, tokenizer, processor, settings=own)
    return TransformersEngine([ServedModel(loaded, ("bench",), own, slots=slots)], own, slots=slots)


def run_engine(
    engine: TransformersEngine, prompts: Sequence[Sequence[int]], new_tokens: int
) -> dict[str, float]:
    """Run all prompts at once through the engine; return tokens_per_s, ttft_ms and gap_ms."""
    return run_jobs(engine, [token_job(ids, new_tokens) for ids in prompts])


def token_job(ids: Sequence[int], new_tokens: int, **more: Any) -> Job:
    """A greedy request with a prompt of token ids; `more`: further parameters."""
    params = Params(temperature=0.0, max_tokens=new_tokens, ignore_eos=True, **more)
    request = Request(
        model="bench", kind=Kind.COMPLETE, token_ids=list(ids), params=params, window=1 << 30
    )
    return Job(new_id(), request)


def run_images(
    engine: TransformersEngine, images: Sequence[bytes], new_tokens: int
) -> dict[str, float]:
    """Ask one question about each encoded image, all at once, including image decoding."""
    params = Params(temperature=0.0, max_tokens=new_tokens, ignore_eos=True)
    request = Request(
        model="bench",
        kind=Kind.COMPLETE,
        prompt="<image> w00001 w00002",
        params=params,
        window=1 << 30,
    )
    return run_jobs(engine, [Job(new_id(), request, (data,)) for data in images])


def run_generate_images(
    model: Any, processor: Any, images: Sequence[bytes], new_tokens: int
) -> dict[str, float]:
    """The same questions with plain `generate()`, one after another."""
    config = _generation(new_tokens)
    clock = _Clock()
    for data in images:
        image = Image.open(io.BytesIO(data)).convert("RGB")
        text = "<image> w00001 w00002"
        inputs = processor(text=[text], images=[image], return_tensors="pt").to(model.device)
        inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
        model.generate(**inputs, generation_config=config)
    return _figures(len(images) * new_tokens, clock.stop(), [])


def run_jobs(engine: TransformersEngine, jobs: Sequence[Job]) -> dict[str, float]:
    """Run all jobs at once.

    Returns tokens_per_s, ttft_ms, gap_ms, and the CPU time of the process until the last of the
    first tokens.
    """
    clock = _Clock()
    for job in jobs:
        engine.add(job)
    last_first_s = 0.0
    first: dict[bytes, float] = {}
    last: dict[bytes, float] = {}
    gaps: list[float] = []
    count = 0
    while engine.busy:
        events = engine.step()
        now = time.perf_counter()
        for event in events:
            if isinstance(event, Tokens):
                count += len(event.token_ids)
                if event.request_id not in first:
                    first[event.request_id] = now
                    last_first_s = clock.stop()[1]
                if event.request_id in last:
                    gaps.append(now - last[event.request_id])
                last[event.request_id] = now
    spent = clock.stop()
    figures = _figures(count, spent, [at - clock.started for at in first.values()], gaps)
    return figures | {"last_ttft_cpu_ms": last_first_s * 1e3}


class _Clock:
    """Wall and CPU time of the process since this object was created."""

    def __init__(self) -> None:
        self.started = time.perf_counter()
        self._cpu = time.process_time()

    def stop(self) -> tuple[float, float]:
        return time.perf_counter() - self.started, time.process_time() - self._cpu


def _figures(
    tokens: int,
    spent: tuple[float, float],
    first: Sequence[float],
    gaps: Sequence[float] = (),
) -> dict[str, float]:
    elapsed, cpu = spent
    # On a shared machine, CPU time is the better comparison.
    figures = {"tokens_per_s": tokens / elapsed, "tokens_per_cpu_s": tokens / cpu}
    if first:
        figures["ttft_ms"] = statistics.median(first) * 1e3
    if gaps:
        figures["gap_ms"] = statistics.median(gaps) * 1e3
        figures["worst_gap_ms"] = max(gaps) * 1e3
    return figures


Runner = Callable[[Sequence[Sequence[int]], int], dict[str, float]]


def peers(model: Any, tokenizer: Any, slots: int) -> dict[str, Runner]:
    """The peers in this process, by their names in README.md."""
    return {
        "generate": lambda prompts, new: run_generate(model, prompts, new),
        "generate_threads": lambda prompts, new: run_threads(model, tokenizer, prompts, new),
        "transformers_cb": lambda prompts, new: run_cb(model, prompts, new, slots),
    }


def _generation(new_tokens: int) -> GenerationConfig:
    return GenerationConfig(
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=2,
    )


def run_generate(model: Any, prompts: Sequence[Sequence[int]], new_tokens: int) -> dict[str, float]:
    """Plain `generate()`, one request after another."""
    config = _generation(new_tokens)
    clock = _Clock()
    for ids in prompts:
        tensor = torch.tensor([list(ids)], device=model.device)
        model.generate(tensor, attention_mask=torch.ones_like(tensor), generation_config=config)
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    return _figures(len(prompts) * new_tokens, clock.stop(), [])


def run_threads(
    model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], new_tokens: int
) -> dict[str, float]:
    """At most five threads of `generate()`, each with a TextIteratorStreamer, as in FastChat."""
    config = _generation(new_tokens)
    permits = threading.Semaphore(FASTCHAT_THREADS)
    first: list[float] = []
    clock = _Clock()

    def serve(ids: Sequence[int]) -> None:
        with permits:
            streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=120.0)
            tensor = torch.tensor([list(ids)], device=model.device)
            work = threading.Thread(
                target=model.generate,
                kwargs={
                    "inputs": tensor,
                    "attention_mask": torch.ones_like(tensor),
                    "generation_config": config,
                    "streamer": streamer,
                },
            )
            work.start()
            for index, _ in enumerate(streamer):
                if index == 0:
                    first.append(time.perf_counter() - clock.started)
            work.join()

    threads = [threading.Thread(target=serve, args=(ids,)) for ids in prompts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return _figures(len(prompts) * new_tokens, clock.stop(), first)


def run_cb(
    model: Any, prompts: Sequence[Sequence[int]], new_tokens: int, slots: int
) -> dict[str, float]:
    """transformers' continuous batching, with sizes that fit the load.

    With its defaults, it reserves most of the memory and needs ten seconds to start on a CPU.
    """
    from transformers import ContinuousBatchingConfig

    longest = max(map(len, prompts)) + new_tokens
    page = 32
    attention = model.config._attn_implementation
    settings = ContinuousBatchingConfig(
        page_size=page,
        num_blocks=-(-longest // page) * slots + slots,
        max_batch_tokens=256,
        max_requests_per_batch=slots,
    )
    generation = GenerationConfig(
        max_new_tokens=new_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0
    )
    manager = model.init_continuous_batching(
        generation_config=generation, continuous_batching_config=settings
    )
    manager.start()
    try:
        # Do not count its start-up time.
        warm = manager.add_request([5, 6, 7], max_new_tokens=2)
        _await(manager, {warm})
        clock = _Clock()
        pending = {manager.add_request(list(ids), max_new_tokens=new_tokens) for ids in prompts}
        counts = _await(manager, pending)
        spent = clock.stop()
    finally:
        manager.stop(block=True)
        model.config._attn_implementation = attention
        model.set_attn_implementation(attention)
    return _figures(sum(counts), spent, [])


def _await(manager: Any, pending: set[str]) -> list[int]:
    counts = []
    deadline = time.monotonic() + 300.0
    while pending:
        if time.monotonic() > deadline:
            raise RuntimeError("transformers' continuous batching did not finish in 300 s")
        try:
            result = manager.get_result(timeout=1)
        except queue.Empty:
            continue
        if result is None:
            continue
        if result.error:
            raise RuntimeError(f"transformers' continuous batching failed: {result.error}")
        if result.is_finished() and result.request_id in pending:
            pending.discard(result.request_id)
            counts.append(len(result.generated_tokens))
    return counts
