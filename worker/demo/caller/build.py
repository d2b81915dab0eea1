"""The tool caller before training: its tokenizer, chat template and architecture.

A small Llama. Thoughts and calls are marked as most open models mark them: with `<think>`, and with
`<tool_call>` around the JSON of name and arguments.
"""

import json
import os
import random
from collections.abc import Iterator
from typing import Any

# Read when transformers is first imported, so it must be set before.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from worker.demo.caller.tasks import Task, make_task
from worker.demo.caller.turns import answer_text

__all__ = ["END", "PAD", "build_model", "build_tokenizer"]

# Only half of its classes are typed; as Any, the calls below need no `type: ignore`.
hf: Any = transformers

SPECIAL_TOKENS = ("<|pad|>", "<|im_start|>", "<|im_end|>")
PAD, START, END = range(len(SPECIAL_TOKENS))
# Not special: they are part of the text.
MARKERS = (
    *("<think>", "</think>", "<tool_call>", "</tool_call>"),
    *("<tool_response>", "</tool_response>", "<tools>", "</tools>"),
)
CHAT_TEMPLATE = """\
{%- set start = '<|im_start|>' %}{%- set end = '<|im_end|>\\n' %}
{%- set first = messages[0] if messages and messages[0].role == 'system' else none %}
{%- if first or tools %}{{- start + 'system\\n' }}
{%- if first %}{{- first.content }}{%- if tools %}{{- '\\n' }}{%- endif %}{%- endif %}
{%- if tools %}{{- '<tools>' }}
{%- for tool in tools %}{{- '\\n' + (tool | tojson) }}{%- endfor %}
{{- '\\n</tools>' }}{%- endif %}{{- end }}{%- endif %}
{%- for message in messages %}
{%- if message.role == 'user' %}{{- start + 'user\\n' + message.content + end }}
{%- elif message.role == 'assistant' %}{{- start + 'assistant\\n' }}
{%- if message.content %}{{- message.content }}{%- endif %}
{%- for call in message.tool_calls or [] %}
{%- set function = call.function or call %}
{%- if message.content or not loop.first %}{{- '\\n' }}{%- endif %}
{{- '<tool_call>\\n{"name": "' + function.name + '", "arguments": ' }}
{%- if function.arguments is string %}{{- function.arguments }}
{%- else %}{{- function.arguments | tojson }}{%- endif %}
{{- '}\\n</tool_call>' }}{%- endfor %}{{- end }}
{%- elif message.role == 'tool' %}
{{- start + 'user\\n<tool_response>\\n' + message.content + '\\n</tool_response>' + end }}
{%- elif not loop.first %}
{{- raise_exception('a system message is the first, or there is none') }}
{%- endif %}{%- endfor %}
{%- if add_generation_prompt %}{{- start + 'assistant\\n' }}
{%- if enable_thinking is defined and enable_thinking is false %}
{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}{%- endif %}"""
# Enough for every word of the tasks to be one token.
VOCABULARY_SIZE = 1024
WIDTH, INNER, LAYERS, HEADS = 128, 384, 4, 4
CONTEXT_TOKENS = 2048

# About one over the square root of the width; the usual 0.02 is meant for much wider models.
INITIAL_SPREAD = 0.06


def build_tokenizer() -> Any:
    """Train a byte-level BPE tokenizer on tasks; any text can be encoded.

    Each digit is a token, so that numbers can be copied.
    """

    def texts() -> Iterator[str]:
        rng = random.Random("tokenizer")
        for _ in range(12_000):
            yield from _texts(make_task(rng))

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE - len(MARKERS),
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(), trainer)
    tokenizer.add_tokens([AddedToken(marker, normalized=False) for marker in MARKERS])
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=SPECIAL_TOKENS[PAD],
        eos_token=SPECIAL_TOKENS[END],
        additional_special_tokens=[SPECIAL_TOKENS[START]],
        padding_side="left",
        model_max_length=CONTEXT_TOKENS,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def _texts(task: Task) -> Iterator[str]:
    yield from (json.dumps(tool) for tool in task.tools)
    yield from (message["content"] for message in task.messages)
    yield answer_text(task, thinking=True)


def build_model() -> Any:
    """Make the model with fresh random weights."""
    config = hf.LlamaConfig(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=CONTEXT_TOKENS,
        bos_token_id=None,
        eos_token_id=END,
        pad_token_id=PAD,
        tie_word_embeddings=True,
        initializer_range=INITIAL_SPREAD,
    )
    return hf.LlamaForCausalLM(config)
