"""Families of models that think: the shapes of their chat templates, and answers of theirs.

Each is a template cut down to what begins an answer, the tokens that its tokenizer adds, and the
reference for its answers: transformers' own parser with the family's response template. Weights are
random: the answers are forced.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from typing import Any

from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_parsing import parse_response

from tests.engines.tiny_tokenizers import byte_level

_TURNS = (
    "{%- for message in messages %}"
    "{{ @turn@ + message.role + '\\n' + message.content + @end@ + '\\n' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{ @turn@ + 'assistant\\n' }}@begin@{%- endif %}"
)


def chat_ml(begin: str = "") -> str:
    """ChatML, with what the template writes to begin an answer."""
    return turns("<|im_start|>", "<|im_end|>", begin)


def turns(turn: str, end: str, begin: str = "", assistant: str = "") -> str:
    """Turns between two marks. `begin`: what stands before an answer, or a block of the template;
    `assistant`: how an assistant's turn begins, where it is not like the others."""
    block = begin if begin.startswith("{") else "{{ " + repr(begin) + " }}"
    made = _TURNS.replace("@end@", repr(end)).replace("@begin@", block)
    if assistant:
        made = made.replace("@turn@ + 'assistant\\n'", repr(assistant))
    return made.replace("@turn@", repr(turn))


OPTIONAL = (
    "{%- if enable_thinking is defined and enable_thinking is false %}"
    "{{ '<think>\\n\\n</think>\\n\\n' }}{%- endif %}"
)
"""Qwen 3: no thought where the caller wants none; else the model opens it itself."""


def marked(
    anchor: str | list[str], open_: str, close: str, end: str = "<|im_end|>", **more: Any
) -> dict[str, Any]:
    """The response template of a family that marks thoughts."""
    return {
        "start_anchor": anchor,
        "fields": {
            "reasoning_content": {"open": open_, "close": close, "content": "text"},
            "content": {"close": [end], "content": "text"} | more,
        },
    }


@dataclass(frozen=True)
class Family:
    """One family."""

    name: str
    template: str
    #: What transformers parses its answers with.
    reference: dict[str, Any]
    #: The parser that its models get here.
    parser: str
    #: Tokens that its tokenizer adds: special ones, and others.
    special: tuple[str, ...] = ("<|im_start|>", "<|im_end|>")
    added: tuple[str, ...] = ()
    #: Answers as its models write them, after what the template wrote.
    answers: tuple[str, ...] = ()
    #: Arguments of the template.
    arguments: dict[str, Any] = field(default_factory=dict)

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """A tokenizer with the family's tokens and template."""
        return _tokenizer(self.template, self.special, self.added)

    def parsed(self, prompt: str, answer: str) -> tuple[str, str]:
        """Thought and content of an answer as transformers says."""
        message = parse_response(answer, self.reference, prefix=prompt)
        return message.get("reasoning_content", ""), message.get("content", "")


@cache
def _tokenizer(
    template: str, special: tuple[str, ...], added: tuple[str, ...]
) -> PreTrainedTokenizerFast:
    plain = byte_level()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=type(plain.backend_tokenizer).from_str(plain.backend_tokenizer.to_str()),
        eos_token=plain.eos_token,
        bos_token=plain.bos_token,
    )
    tokenizer.add_special_tokens(
        {"additional_special_tokens": [AddedToken(text, special=True) for text in special]}
    )
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in added])
    tokenizer.chat_template = template
    return tokenizer


_THINK_TOKENS = ("<think>", "</think>")
_OPEN = "<think>\n"
_CLOSED = "Hm, 2 < 3.\n\nSo <b>yes</b>.\n</think>\n\nYes: **2 < 3**.\n\nReally"
_MARKED = "<think>\n" + _CLOSED
_ANSWERS = (_MARKED, "<think>\n\n</think>\n\nYes", "Yes, at once.", "<think>\nOn and on")
_OPENED_ANSWERS = (_CLOSED, "On and on", "</think>Yes", "Ünïcödé 思考 🤔</think>\n\n答え 🙂")
_CHAT_ML = marked("<|im_start|>assistant\n", "<think>", "</think>")

_SEED = turns("<seed:bos>", "<seed:eos>")
_SEED_ANSWER = _MARKED.replace("think>", "seed:think>")
_COHERE_TURN = "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>"
_GPT_OSS = (
    "{%- for message in messages %}<|start|>{{ message.role }}<|message|>{{ message.content }}"
    "<|end|>{%- endfor %}{%- if add_generation_prompt %}<|start|>assistant{%- endif %}"
)

FAMILIES = [
    Family(
        "qwen3",
        chat_ml(OPTIONAL),
        _CHAT_ML,
        "think",
        added=_THINK_TOKENS,
        answers=_ANSWERS,
    ),
    Family(
        "qwen3-not-thinking",
        chat_ml(OPTIONAL),
        _CHAT_ML,
        "think",
        added=_THINK_TOKENS,
        answers=("Yes", "It is 42.\n\nIs it?"),
        arguments={"enable_thinking": False},
    ),
    Family(
        "qwen3.5-thinking",
        chat_ml(_OPEN),
        _CHAT_ML,
        "think",
        added=_THINK_TOKENS,
        answers=_OPENED_ANSWERS,
    ),
    Family(
        "deepseek-r1",
        turns("<｜User｜>", "", _OPEN, "<｜Assistant｜>"),
        marked("<｜Assistant｜>", "<think>", "</think>", "<｜end▁of▁sentence｜>"),
        "think",
        special=("<｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>"),
        added=_THINK_TOKENS,
        answers=_OPENED_ANSWERS,
    ),
    Family(
        "deepseek-r1-words",
        turns("<｜User｜>", "", _OPEN, "<｜Assistant｜>"),
        marked("<｜Assistant｜>", "<think>", "</think>", "<｜end▁of▁sentence｜>"),
        "think",
        special=("<｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>"),
        answers=_OPENED_ANSWERS,
    ),
    Family(
        "glm-4.5",
        turns("<|user|>", "", "{# <think></think> #}", "<|assistant|>"),
        marked("<|assistant|>", "<think>", "</think>", "<|endoftext|>"),
        "think",
        special=("<|user|>", "<|assistant|>", "<|endoftext|>"),
        added=_THINK_TOKENS,
        answers=("\n" + _MARKED, "\nYes"),
    ),
    Family(
        "magistral",
        turns("[INST]", "[/INST]", assistant=" "),
        marked("[/INST]", "[THINK]", "[/THINK]", "</s>"),
        "mistral",
        special=("[INST]", "[/INST]", "[THINK]", "[/THINK]", "</s>"),
        answers=("[THINK]Hm, so [b].[/THINK]Yes.", "Yes", "[THINK]On"),
    ),
    Family(
        "kimi-k2-thinking",
        turns("<|im_user|>", "<|im_end|>", "{# </think> #}"),
        marked("<|im_user|>assistant\n", "<think>", "</think>"),
        "think",
        special=("<|im_user|>", "<|im_end|>"),
        answers=_ANSWERS,
    ),
    Family(
        "kimi-vl-thinking",
        turns("<|im_user|>", "<|im_end|>", "{# ◁think▷ #}"),
        marked("<|im_user|>assistant\n", "◁think▷", "◁/think▷"),
        "kimi-vl",
        special=("<|im_user|>", "<|im_end|>"),
        answers=("◁think▷Hm ◁ so◁/think▷Yes", "Yes"),
    ),
    Family(
        "minimax-m2",
        turns("]~b]", "[e~[", _OPEN),
        marked("]~b]assistant\n", "<think>", "</think>", "[e~["),
        "think",
        special=("]~b]", "[e~["),
        added=_THINK_TOKENS,
        answers=_OPENED_ANSWERS,
    ),
    Family(
        "nemotron-nano",
        turns("<SPECIAL_10>", "<SPECIAL_12>", _OPEN),
        marked("<SPECIAL_10>assistant\n", "<think>", "</think>", "<SPECIAL_12>"),
        "think",
        special=("<SPECIAL_10>", "<SPECIAL_12>"),
        answers=_OPENED_ANSWERS,
    ),
    Family(
        "granite-3.2",
        turns("<|start_of_role|>", "<|end_of_text|>", "{# Here is my thought process: #}"),
        marked(
            "<|start_of_role|>assistant\n",
            "Here is my thought process:",
            "Here is my response:",
            "<|end_of_text|>",
        ),
        "granite",
        special=("<|start_of_role|>", "<|end_of_text|>"),
        answers=(
            "Here is my thought process:\n\nHm. Here is more.\n\nHere is my response:\n\nYes.",
            "Here is an answer.",
        ),
    ),
    Family(
        "seed-oss",
        _SEED,
        marked("<seed:bos>assistant\n", "<seed:think>", "</seed:think>", "<seed:eos>"),
        "seed",
        special=("<seed:bos>", "<seed:eos>"),
        added=("<seed:think>", "</seed:think>"),
        answers=(_SEED_ANSWER, "Yes", "<seed:think>On"),
    ),
    Family(
        "gemma4",
        turns("<|turn>", "<turn|>", assistant="<|turn>model\n"),
        marked("<|turn>model\n", "<|channel>thought\n", "<channel|>", "<turn|>"),
        "gemma4",
        special=("<|turn>", "<turn|>", "<|channel>", "<channel|>"),
        answers=("<|channel>thought\nHm.<channel|>Yes.", "<|channel>thought\n<channel|>Yes", "Yes"),
    ),
    Family(
        "phi-4-reasoning",
        turns("<|im_start|>", "<|im_end|>", "{# <think> thought </think> solution #}"),
        _CHAT_ML,
        "think",
        answers=_ANSWERS,
    ),
    Family(
        "ernie-4.5-thinking",
        turns("<|im_start|>", "<|im_end|>", "{{ '<think>\\n' }}{# </think> <response> #}"),
        marked("<|im_start|>assistant\n", "<think>", "</think>")
        | {
            "fields": {
                "reasoning_content": {"open": "<think>", "close": "</think>"},
                "content": {"open": "<response>", "close": "</response>"},
            }
        },
        "think",
        answers=("Hm.\n</think>\n\n<response>\nYes <b>!\n</response>\n",),
    ),
    Family(
        "hunyuan-a13b",
        turns("<|im_start|>", "<|im_end|>", "{# <think> </think> <answer> #}"),
        _CHAT_ML
        | {
            "fields": {
                "reasoning_content": {"open": "<think>", "close": "</think>"},
                "content": {"open": "<answer>", "close": "</answer>"},
            }
        },
        "think",
        answers=("<think>\nHm.\n</think>\n<answer>\nYes.\n</answer>",),
    ),
    Family(
        "exaone-deep",
        turns("[|user|]", "[|endofturn|]", "<thought>\n", "[|assistant|]\n"),
        marked("[|assistant|]\n", "<thought>", "</thought>", "[|endofturn|]"),
        "thought",
        special=("[|user|]", "[|assistant|]", "[|endofturn|]"),
        answers=tuple(text.replace("think>", "thought>") for text in _OPENED_ANSWERS),
    ),
    Family(
        "cohere-command-a",
        turns("<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", assistant=_COHERE_TURN),
        marked(_COHERE_TURN, "<|START_THINKING|>", "<|END_THINKING|>")
        | {
            "fields": {
                "reasoning_content": {"open": "<|START_THINKING|>", "close": "<|END_THINKING|>"},
                "content": {"open": "<|START_RESPONSE|>", "close": "<|END_RESPONSE|>"},
            }
        },
        "cohere",
        special=(
            "<|START_OF_TURN_TOKEN|>",
            "<|END_OF_TURN_TOKEN|>",
            "<|CHATBOT_TOKEN|>",
            "<|START_THINKING|>",
            "<|END_THINKING|>",
            "<|START_RESPONSE|>",
            "<|END_RESPONSE|>",
        ),
        answers=(
            "<|START_THINKING|>Hm.<|END_THINKING|><|START_RESPONSE|>Yes.<|END_RESPONSE|>",
            "<|START_RESPONSE|>Yes<|END_RESPONSE|>",
        ),
    ),
    Family(
        "gpt-oss",
        _GPT_OSS,
        {
            "start_anchor": "<|start|>assistant",
            "fields": {
                "reasoning_content": {"open": "<|channel|>analysis<|message|>", "close": "<|end|>"},
                "content": {
                    "open": "<|channel|>final<|message|>",
                    "close": ["<|end|>", "<|return|>"],
                },
            },
        },
        "harmony",
        special=(
            "<|start|>",
            "<|message|>",
            "<|channel|>",
            "<|constrain|>",
            "<|return|>",
            "<|call|>",
        ),
        answers=(
            "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final"
            "<|message|>Yes.<|return|>",
            "<|channel|>final<|message|>Yes",
            "<|channel|>analysis<|message|>On and on",
        ),
    ),
]
"""By name; `<|end|>` is the end token of every tokenizer here."""
