"""The demo model before training: its tokenizer, processor and architecture.

A small LLaVA: a CLIP tower and a Llama, with one patch per cell of an image's grid. `train` trains
it.
"""

import os
import random
from collections.abc import Iterator
from typing import Any

# Read when transformers is first imported, so it must be set before.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from worker.demo.pictures import IMAGE_COUNTS, KINDS, ask, make_scene

__all__ = [
    "ASSISTANT",
    "BOS",
    "END",
    "IMAGE",
    "IMAGE_TOKENS",
    "PAD",
    "SIDE_PX",
    "SYSTEM",
    "SYSTEM_PROMPTS",
    "TOWER_WIDTH",
    "USER",
    "build_model",
    "build_processor",
    "build_tokenizer",
]

# Only half of its classes are typed; as Any, the calls below need no `type: ignore`.
hf: Any = transformers

# One patch for each cell of the grid: nine tokens per image keep prompts short and fast.
PATCH_PX = 24
SIDE_PX = 3 * PATCH_PX
IMAGE_TOKENS = (SIDE_PX // PATCH_PX) ** 2

SPECIAL_TOKENS = (
    "<|pad|>",
    "<|bos|>",
    "<|end|>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<image>",
)
PAD, BOS, END, SYSTEM, USER, ASSISTANT, IMAGE = range(len(SPECIAL_TOKENS))
# Images are numbered over the whole conversation, which makes "the second image" easy to find.
# As in LLaVA's own template, a message's images come before its text, wherever they stood: a model
# answers a question more easily if it has seen the images before it reads the question.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% set pictures = namespace(count=0) %}"
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' }}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}"
    "{% for part in message['content'] if part['type'] == 'image' %}"
    "{% set pictures.count = pictures.count + 1 %}"
    "{{ '#' + pictures.count|string + '<image>' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "{% endif %}{{ '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
# Enough for every word of the questions and answers to be one token.
VOCABULARY_SIZE = 768
SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are a helpful assistant. Answer briefly.",
    "Answer the question about the pictures.",
    "Be brief and polite.",
)

# Every input size of a Linear layer is a multiple of 64: 4-bit weights are stored in blocks of 64.
TEXT_WIDTH, TEXT_INNER, TEXT_LAYERS, TEXT_HEADS = 128, 384, 4, 4
TOWER_WIDTH, TOWER_INNER, TOWER_LAYERS, TOWER_HEADS = 128, 384, 3, 4

# About one over the square root of the width; the usual 0.02 is meant for much wider models.
INITIAL_SPREAD = 0.06


def build_tokenizer() -> Any:
    """Train a byte-level BPE tokenizer on questions and answers; any text can be encoded."""

    def texts() -> Iterator[str]:
        rng = random.Random("tokenizer")
        yield from SYSTEM_PROMPTS
        for _ in range(1500):
            for kind in KINDS:
                asked = ask(rng, [make_scene(rng) for _ in range(IMAGE_COUNTS[kind][-1])], kind)
                yield from asked or ()

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(), trainer)
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=SPECIAL_TOKENS[PAD],
        bos_token=SPECIAL_TOKENS[BOS],
        eos_token=SPECIAL_TOKENS[END],
        additional_special_tokens=list(SPECIAL_TOKENS[SYSTEM:]),
        padding_side="left",
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )


def build_processor(tokenizer: Any) -> Any:
    """Make the processor; images of any size and proportion are scaled to the tower's square."""
    image_processor = hf.CLIPImageProcessor(
        size={"height": SIDE_PX, "width": SIDE_PX},
        do_center_crop=False,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    return hf.LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=PATCH_PX,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
        image_token=SPECIAL_TOKENS[IMAGE],
    )


def build_model() -> Any:
    """Make the model with fresh random weights."""
    text = hf.LlamaConfig(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=TEXT_WIDTH,
        intermediate_size=TEXT_INNER,
        num_hidden_layers=TEXT_LAYERS,
        num_attention_heads=TEXT_HEADS,
        num_key_value_heads=TEXT_HEADS,
        max_position_embeddings=2048,
        bos_token_id=BOS,
        eos_token_id=END,
        pad_token_id=PAD,
        tie_word_embeddings=True,
        initializer_range=INITIAL_SPREAD,
    )
    vision = hf.CLIPVisionConfig(
        hidden_size=TOWER_WIDTH,
        intermediate_size=TOWER_INNER,
        num_hidden_layers=TOWER_LAYERS,
        num_attention_heads=TOWER_HEADS,
        image_size=SIDE_PX,
        patch_size=PATCH_PX,
        hidden_act="gelu",
    )
    config = hf.LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=IMAGE,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        image_seq_length=IMAGE_TOKENS,
        tie_word_embeddings=True,
    )
    return hf.LlavaForConditionalGeneration(config)
