"""Tiny models, tokenizers and processors, made on the spot with random weights: nothing is
downloaded, nothing is stored.

Random weights are the hardest case for exactness: logits are flat, so a small error shows.
"""

from __future__ import annotations

import io
import random
from collections.abc import Iterator, Sequence
from concurrent.futures import wait
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from broker.protocol.errors import ErrorInfo
from broker.protocol.messages import (
    FinishReason,
    ImagePart,
    Kind,
    Message,
    Params,
    Part,
    Request,
    TextPart,
    TokenLogprob,
    new_id,
)
from worker.engines.base import Ended, EngineOptions, Failed, Job, PromptFacts, Tokens
from worker.engines.transformers import build
from worker.engines.transformers.engine import TransformersEngine
from worker.engines.transformers.loaded import wrap_model
from worker.engines.transformers.served import ServedModel
from worker.engines.transformers.settings import EngineSettings

SPECIAL = ["<|pad|>", "<|bos|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>", "<image>"]
PAD, BOS, END, SYSTEM, USER, ASSISTANT, IMAGE = range(7)
VOCABULARY = 512
AS_ON_A_GPU = {"overlap": "on", "cuda_graphs": "on"}
"""Options: steps of fixed shape, and events sent while the next step is computed."""

CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' }}"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}{{ '<image>' }}{% elif c['type'] == 'text' %}{{ c['text'] }}"
    "{% endif %}{% endfor %}{% endif %}{{ '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

# fmt: off
WORDS = [
    "the", "a", "red", "blue", "green", "circle", "square", "picture", "of", "what", "is", "in",
    "this", "where", "how", "many", "words", "there", "quick", "brown", "fox", "jumps", "over",
    "lazy", "dog", "hello", "world", "answer", "question", "left", "right", "two", "three", "four",
]
# fmt: on


def _corpus() -> Iterator[str]:
    choose = random.Random(7)
    for _ in range(400):
        yield " ".join(choose.choice(WORDS) for _ in range(12)) + ". Grüße, 世界! 🙂"


@cache
def tokenizer(vocabulary: int = VOCABULARY) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with a chat template and the special tokens above."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(_corpus(), trainer)
    result = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<|pad|>",
        bos_token="<|bos|>",
        eos_token="<|end|>",
        additional_special_tokens=SPECIAL[3:],
    )
    result.chat_template = CHAT_TEMPLATE
    return result


def llama(
    *,
    hidden: int = 64,
    layers: int = 2,
    vocabulary: int = VOCABULARY,
    context: int = 512,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Any:
    """A Llama with grouped-query attention."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=hidden * 2,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=context,
        bos_token_id=BOS,
        eos_token_id=END,
        pad_token_id=PAD,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).to(dtype).eval()


def llava(*, hidden: int = 64, image: int = 28, patch: int = 14, seed: int = 0) -> Any:
    """A LLaVA: CLIP vision tower, projector, Llama."""
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
    )

    torch.manual_seed(seed)
    text = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=hidden * 2,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        bos_token_id=BOS,
        eos_token_id=END,
        pad_token_id=PAD,
        initializer_range=0.2,
    )
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=image,
        patch_size=patch,
        initializer_range=0.2,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE,
        image_token_id=IMAGE,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_seq_length=(image // patch) ** 2,
    )
    model = LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():
        # Random projections of a tiny tower are faint; images must make a difference.
        for parameter in model.model.multi_modal_projector.parameters():
            parameter.mul_(8.0)
    return model


def llava_processor(*, image: int = 28, patch: int = 14) -> Any:
    """The processor of `llava`."""
    from transformers import CLIPImageProcessor, LlavaProcessor

    images = CLIPImageProcessor(
        size={"shortest_edge": image}, crop_size={"height": image, "width": image}
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer(),
        patch_size=patch,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
        image_token="<image>",
    )


# --- engines and answers --------------------------------------------------------------------------


def serve(
    model: Any,
    *,
    processor: Any = None,
    own_tokenizer: Any = None,
    slots: int = 8,
    name: str = "tiny",
    **settings: Any,
) -> TransformersEngine:
    """An engine over a model that is in memory; its tokenizer is `tokenizer` unless it has one."""
    own = EngineSettings(**({"kv_tokens": 8192, "prefill_chunk": 16} | settings))
    loaded = wrap_model(model, own_tokenizer or tokenizer(), processor, settings=own)
    return TransformersEngine([ServedModel(loaded, (name,), own, slots=slots)], own, slots=slots)


def load(*paths: Path, **options: Any) -> TransformersEngine:
    """An engine over models in folders; `options` are those of `EngineOptions`."""
    arguments = {"kv_tokens": "4096"} | options.pop("engine_args", {})
    engine = build(
        EngineOptions(
            model_paths=tuple(map(str, paths)), device="cpu", engine_args=arguments, **options
        ),
        lambda fraction, note: None,
    )
    assert isinstance(engine, TransformersEngine)
    return engine


@dataclass
class Answer:
    """All events of one job, joined."""

    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    facts: PromptFacts | None = None
    ended: Ended | None = None
    failed: ErrorInfo | None = None

    @property
    def reason(self) -> FinishReason:
        assert self.ended is not None, self.failed
        return self.ended.finish_reason


def collect(events: Sequence[Any], answers: dict[bytes, Answer]) -> None:
    """Add events to the answers, checking that nothing follows the end."""
    for event in events:
        answer = answers.setdefault(event.request_id, Answer())
        assert answer.ended is None and answer.failed is None, "an event after the end"
        match event:
            case Tokens():
                answer.token_ids += event.token_ids
                answer.text += event.text
                answer.logprobs += event.logprobs or []
            case PromptFacts():
                assert not answer.token_ids, "the prompt's facts come before its first token"
                answer.facts = event
            case Ended():
                answer.text += event.text
                answer.ended = event
            case Failed():
                answer.failed = event.error


def run(
    engine: TransformersEngine, jobs: Sequence[Job], *, every: Sequence[int] = (), steps: int = 5000
) -> list[Answer]:
    """Run jobs to their ends; job i is added `every[i]` steps after the one before it."""
    answers: dict[bytes, Answer] = {}
    pending = list(zip(jobs, list(every) + [0] * len(jobs), strict=False))
    wait = 0
    for _ in range(steps):
        while pending and wait >= pending[0][1]:
            engine.add(pending.pop(0)[0])
            wait = 0
        wait += 1
        if not engine.busy and not pending:
            break
        if engine.busy:
            collect(engine.step(), answers)
    assert not engine.busy, "the engine did not come to an end"
    return [answers[job.request_id] for job in jobs]


def run_at_once(
    engine: TransformersEngine, jobs: Sequence[Job], *, steps: int = 5000
) -> list[Answer]:
    """Run jobs to their ends that are all prepared before the first step."""
    for job in jobs:
        engine.add(job)
    await_prepared(engine)
    answers: dict[bytes, Answer] = {}
    for _ in range(steps):
        if engine.busy:
            collect(engine.step(), answers)
    assert not engine.busy, "the engine did not come to an end"
    return [answers[job.request_id] for job in jobs]


def await_prepared(engine: TransformersEngine) -> None:
    """Wait until all jobs are ready for the next step."""
    wait([running.future for running in engine._jobs.values() if running.future is not None])


def one(engine: TransformersEngine, job: Job) -> Answer:
    return run(engine, [job])[0]


def ids_job(token_ids: Sequence[int], model: str = "tiny", **params: Any) -> Job:
    """A job of token ids; greedy unless told otherwise."""
    request = Request(
        model=model,
        kind=Kind.COMPLETE,
        token_ids=list(token_ids),
        params=Params(**({"temperature": 0.0, "max_tokens": 12, "ignore_eos": True} | params)),
        window=1 << 30,
    )
    return Job(new_id(), request)


def chat_job(
    text: str, image_files: Sequence[bytes] = (), model: str = "tiny", **params: Any
) -> Job:
    """A job of one user message with images before the text; greedy unless told otherwise."""
    parts: list[Part] = [ImagePart(attachment=index) for index in range(len(image_files))]
    request = Request(
        model=model,
        messages=[Message(role="user", content=[*parts, TextPart(text=text)])],
        params=Params(**({"temperature": 0.0, "max_tokens": 12, "ignore_eos": True} | params)),
        window=1 << 30,
    )
    return Job(new_id(), request, tuple(image_files))


def prompts(count: int, low: int = 3, high: int = 60, seed: int = 0) -> list[list[int]]:
    """Random ordinary token ids."""
    choose = random.Random(seed)
    return [
        [choose.randrange(10, VOCABULARY) for _ in range(choose.randint(low, high))]
        for _ in range(count)
    ]


def image(seed: int, width: int = 40, height: int = 32, kind: str = "PNG") -> bytes:
    """An encoded image with some shapes."""
    choose = random.Random(seed)
    image = Image.new("RGB", (width, height), tuple(choose.randrange(256) for _ in range(3)))
    draw = ImageDraw.Draw(image)
    for _ in range(4):
        x, y = choose.randrange(width), choose.randrange(height)
        color = tuple(choose.randrange(256) for _ in range(3))
        draw.rectangle((x, y, x + width // 3, y + height // 3), fill=color)
    data = io.BytesIO()
    image.save(data, kind)
    return data.getvalue()


@torch.inference_mode()
def generated(
    model: Any, inputs: dict[str, Any], max_tokens: int, banned: Sequence[int]
) -> list[int]:
    """What plain greedy `generate()` writes, EOS ignored, placeholders never."""
    from worker.engines.transformers.fallback import plain_generation_config

    config = plain_generation_config(
        model, max_new_tokens=max_tokens, suppress_tokens=list(banned) or None
    )
    inputs = dict(inputs)
    inputs.setdefault("attention_mask", torch.ones_like(inputs["input_ids"]))
    output = model.generate(**inputs, generation_config=config)
    start = 1 if model.config.is_encoder_decoder else inputs["input_ids"].shape[1]
    return [int(token) for token in output[0, start:]]


def plain(model: Any, ids: list[int], count: int) -> list[int]:
    """What plain greedy `generate()` writes after these ids of a text."""
    return generated(model, {"input_ids": torch.tensor([ids])}, count, ())
